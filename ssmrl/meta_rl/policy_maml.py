"""MAML for policies: inner steps by policy gradient on data of their own, and the outer objective through all of them.

For one task; `vmap` maps it. θ_0 = θ collects D_0, one inner step on it gives θ_1, which collects D_1, and so on; the
outer loss is that of θ_K on D_K, differentiated through every step:

    θ_{k+1} = θ_k - α ∇ inner_loss(θ_k, D_k),     meta-loss(θ) = outer_loss(θ_K, D_K)

Letters: E episodes, T steps, D inputs, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from ssmrl.adaptation.inner_loop import adapt
from ssmrl.core import functional_forward
from ssmrl.meta_rl.losses import clipped_surrogate_loss, likelihood_ratio_loss, masked_mean, surrogate_loss

__all__ = ["PolicyBatch", "PolicyLosses", "adapt_policy", "policy_meta_loss"]


class PolicyBatch(NamedTuple):
    """E rows of T steps that a policy made on a task, with what a policy gradient needs of them."""

    x: Tensor
    """(E, T, D) what the policy saw."""
    action: Tensor
    """(E, T) or (E, T, A)."""
    reset: Tensor
    """Bool (E, T) where it forgot."""
    valid: Tensor
    """Bool (E, T)."""
    advantage: Tensor
    """(E, T)."""
    old: Any
    """The distributions that the actions were drawn from, leaves (E, T, A)."""


class PolicyLosses:
    """Losses (params, batch) -> scalar of a policy model on the batch of one task, for either loop.

    Args:
        policy: a `PolicyModel`.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    def distribution(self, params: Any, batch: PolicyBatch) -> Any:
        """The distributions over actions at every step, of these parameters."""
        output: Any = functional_forward(self.policy, params, batch.x, None, reset=batch.reset)[0]
        return output.distribution

    def likelihood_ratio(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean log π(a_t) A_t: the inner loss of MAML. See `likelihood_ratio_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return likelihood_ratio_loss(log_prob, batch.advantage, batch.valid)

    def surrogate(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean ρ_t A_t: the inner loss of ProMP, and the outer one of MAML with TRPO. See `surrogate_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return surrogate_loss(log_prob, self.old_log_prob(batch), batch.advantage, batch.valid)

    def clipped(self, params: Any, batch: PolicyBatch, *, clip: float = 0.2) -> Tensor:
        """PPO's clipped surrogate. See `clipped_surrogate_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        old = self.old_log_prob(batch)
        return clipped_surrogate_loss(log_prob, old, batch.advantage, batch.valid, clip=clip)

    def divergence(self, params: Any, batch: PolicyBatch) -> Tensor:
        """Mean KL(π_old ‖ π) over the valid steps."""
        return masked_mean(batch.old.kl(self.distribution(params, batch)), batch.valid)

    @staticmethod
    def old_log_prob(batch: PolicyBatch) -> Tensor:
        """(E, T) of the actions, under the policy that took them."""
        log_prob: Tensor = batch.old.log_prob(batch.action)
        return log_prob.detach()


Loss = Callable[[Any, PolicyBatch], Tensor]


def adapt_policy(
    inner_loss: Loss, params: Any, batches: Sequence[PolicyBatch], *, optimizer: GradientTransformation, **options: Any
) -> Any:
    """Return θ_K: one step on each of the batches D_0, ..., D_{K-1}, that of one task.

    Args:
        inner_loss: `(params, batch) -> scalar`.
        params: θ_0, a pytree of tensors.
        batches: K of them, each collected by the parameters that the steps before it gave.
        optimizer: a TorchOpt transformation; its state is carried from step to step.
        **options: of `ssmrl.adapt`, `first_order` for instance.
    """
    *_, adapted = _path(inner_loss, params, batches, optimizer, options)
    return adapted


def policy_meta_loss(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Any,
    batches: Sequence[PolicyBatch],
    *,
    optimizer: GradientTransformation,
    divergence: Loss | None = None,
    divergence_weight: float | Sequence[float] | Tensor = 0.0,
    **options: Any,
) -> Tensor:
    """outer_loss(θ_K, D_K) + mean_k η_k divergence(θ_k, D_k), for one task: what MAML's outer loop minimises.

    Args:
        inner_loss, optimizer: as for `adapt_policy`.
        outer_loss: `(params, batch) -> scalar`, on the last batch.
        params: θ.
        batches: D_0, ..., D_K.
        divergence: of the adapted policies from those that collected the data at every inner step: ProMP's penalty,
            which keeps what the batches say true while the outer loop makes several steps on them. None: no penalty.
        divergence_weight: η, or one of each of the K inner steps.
        **options: of `ssmrl.adapt`.
    """
    if not batches:
        raise ValueError("`batches` must hold at least the batch of the outer loss; got none.")
    weights = torch.as_tensor(divergence_weight, dtype=torch.get_default_dtype()).expand(len(batches) - 1)
    *before, params = _path(inner_loss, params, batches[:-1], optimizer, options)
    penalty: Any = 0.0
    if divergence is not None:
        for weight, at, batch in zip(weights, before, batches, strict=False):
            penalty = penalty + weight * divergence(at, batch) / len(before)
    loss: Tensor = outer_loss(params, batches[-1]) + penalty
    return loss


def _path(
    inner_loss: Loss,
    params: Any,
    batches: Sequence[PolicyBatch],
    optimizer: GradientTransformation,
    options: Mapping[str, Any],
) -> Iterator[Any]:
    """Yield θ_0, ..., θ_K: the parameters before the step on every batch, and after the last."""
    state = None
    yield params
    for batch in batches:
        adapted = adapt(inner_loss, params, batch, optimizer=optimizer, num_steps=1, optimizer_state=state, **options)
        params, state = adapted.params, adapted.optimizer_state
        yield params
