"""Proximal policy optimisation of a policy that has a value, on whole rows: what RL² trains a policy with memory by.

Letters: B rows, T steps, D inputs, A action components or number of actions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmrl.adaptation.optim import check_num_steps, check_positive, check_rate
from ssmrl.meta_rl.actor_critic import (
    ActorCriticBatch,
    check_has_value,
    check_rows,
    evaluate_rows,
    some_rows,
    zero_where_invalid,
)
from ssmrl.meta_rl.baselines import value_loss
from ssmrl.meta_rl.losses import clipped_surrogate_loss, entropy_bonus, importance_ratio, kl_penalty, masked_mean
from ssmrl.meta_rl.nonfinite import NonFinite, Updates, all_finite, copy_of, go_back
from ssmrl.meta_rl.segments import check_steps
from ssmrl.sharding import Shards

__all__ = ["PPO", "PPOTerms", "PPOUpdate", "ppo_loss"]


class PPOTerms(NamedTuple):
    """What `ppo_loss` returns: the loss, and scalars that say where it is; means over the valid steps."""

    loss: Tensor
    """To be minimised."""
    surrogate: Tensor
    """`clipped_surrogate_loss`."""
    value: Tensor
    """`value_loss`."""
    entropy: Tensor | None
    """H(π), in nats; None of a distribution without a formula for it."""
    divergence: Tensor
    """KL(π_old ‖ π), in nats, without derivatives."""
    clipped: Tensor
    """The share of steps with |ρ_t - 1| > ε."""


def ppo_loss(
    policy: nn.Module,
    params: Mapping[str, Tensor],
    batch: ActorCriticBatch,
    *,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.0,
) -> PPOTerms:
    """-mean min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c_v ½ mean (v_t - G_t)² - c_e mean H(π_t), and its parts.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 9, https://arxiv.org/abs/1707.06347. The
    policy runs over whole rows, and gradients go through its state from the end of a row to its last `reset`.

    Args:
        policy: a `PolicyModel` with a value.
        params: name -> tensor, in place of its own; empty: its own.
        batch: B rows.
        clip: ε > 0.
        value_weight: c_v >= 0.
        entropy_weight: c_e >= 0.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, a number out of range, a policy without a
            value, or a weight of an entropy that its distribution does not have (`TanhGaussian`).
    """
    check_rate("value_weight", value_weight)
    check_rate("entropy_weight", entropy_weight)
    valid = batch.valid
    check_steps("advantage", batch.advantage, target=batch.target, valid=valid)
    check_rows(batch.advantage, batch.x, batch.action, batch.reset)
    x, action = zero_where_invalid(valid, batch.x), zero_where_invalid(valid, batch.action)
    distribution, value = evaluate_rows(policy, params, x, batch.hidden_state, batch.reset)
    log_prob, old_log_prob = distribution.log_prob(action), batch.old.log_prob(action).detach()
    surrogate = clipped_surrogate_loss(log_prob, old_log_prob, batch.advantage, valid, clip=clip)
    error = value_loss(value, batch.target, valid)
    loss = surrogate + value_weight * error
    entropy = None
    if hasattr(distribution, "entropy"):
        entropy = -entropy_bonus(distribution, valid)
        loss = loss - entropy_weight * entropy
    elif entropy_weight:
        raise ValueError(
            f"entropy_weight must be 0, as a {type(distribution).__name__} has no entropy in closed form; got "
            f"{entropy_weight}."
        )
    with torch.no_grad():
        divergence = kl_penalty(distribution, batch.old, valid)
        change = (importance_ratio(log_prob, old_log_prob, valid) - 1).abs()
        clipped = masked_mean((change > clip).to(change.dtype), valid)
    return PPOTerms(
        loss, surrogate.detach(), error.detach(), None if entropy is None else entropy.detach(), divergence, clipped
    )


class PPOUpdate(NamedTuple):
    """What `PPO.update` did: means over its minibatches, those of `PPOTerms` first; NaNs where it was left out."""

    loss: float
    surrogate: float
    value: float
    entropy: float | None
    divergence: float
    clipped: float
    gradient_norm: float
    """Before it was clipped."""
    explained_variance: float
    """1 - Var(G - v) / Var(G) of the values that acted; 0 where all targets are equal."""
    steps: int
    """Of the optimizer: fewer than epochs × minibatches where `max_divergence` ended the update."""


class PPO:
    """Several epochs of steps on `ppo_loss`, on minibatches of whole rows.

    Args:
        policy: a `PolicyModel` with a value.
        optimizer: any `torch.optim` optimizer whose step needs no closure, over some or all of its parameters.
        clip, value_weight: as for `ppo_loss`.
        epochs: passes over the rows of a batch.
        minibatches: into which every epoch divides the rows, by a new permutation; they differ by one row at most.
        max_grad_norm: clip the global norm of every gradient to this; None: do not clip.
        max_divergence: end an update at the first minibatch on which the mean KL(π_old ‖ π) is larger, before its step;
            None: never.
        nonfinite: what to do where a loss, a gradient or a weight is not finite; None: raise an error.
        process_group: of `torch.distributed`, whose ranks make rows of their own and learn from those of all, every
            minibatch from one of every rank. The policy is at first that of the first rank. None: one process.

    Raises:
        TypeError, ValueError: a policy without a value, an optimizer of another kind or of other tensors, or a number
            out of range.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.2,
        epochs: int = 4,
        minibatches: int = 4,
        value_weight: float = 0.5,
        max_grad_norm: float | None = 0.5,
        max_divergence: float | None = None,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
        self.policy, self.optimizer = policy, optimizer
        if not {id(p) for p in policy.parameters()} & {id(p) for p in self._learned()}:
            raise ValueError("optimizer must hold parameters of the policy; it holds none.")
        check_has_value(getattr(policy, "has_value", True))
        check_positive("clip", clip)
        check_rate("value_weight", value_weight)
        self.clip, self.value_weight = clip, value_weight
        self.epochs, self.minibatches = check_num_steps("epochs", epochs), check_num_steps("minibatches", minibatches)
        if self.epochs == 0 or self.minibatches == 0:
            raise ValueError(f"epochs and minibatches must be at least 1; got {epochs} and {minibatches}.")
        for name, limit in (("max_grad_norm", max_grad_norm), ("max_divergence", max_divergence)):
            if limit is not None:
                check_positive(name, limit)
        self.max_grad_norm, self.max_divergence = max_grad_norm, max_divergence
        self.updates = Updates(nonfinite, self._learned, optimizer)
        self.shards = Shards(process_group)
        self.shards.broadcast([*policy.parameters(), *policy.buffers()])

    @property
    def left_out(self) -> int:
        """How many updates `nonfinite` has left out."""
        return self.updates.left_out

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimizer and counters: a tree for `ssmrl.checkpoint.save_checkpoint`."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the same bits.

        Raises:
            ValueError, RuntimeError: it is of another policy or optimizer.
        """
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would take the tensors themselves
        self.updates.load_state_dict(state["updates"])

    @torch.enable_grad()
    def update(self, batch: ActorCriticBatch, generator: torch.Generator, *, entropy_weight: float = 0.0) -> PPOUpdate:
        """Epochs x minibatches steps, or fewer.

        Args:
            batch: B rows, made by the policy as it is.
            generator: of the permutations.
            entropy_weight: as for `ppo_loss`; lower it from update to update to anneal it.

        Raises:
            ValueError: fewer rows than minibatches, or what `ppo_loss` refuses.
            FloatingPointError: a loss or a gradient is not finite, and `nonfinite` does not leave the update out;
                policy and optimizer are as before the update.
        """
        rows = self.shards.counts(len(batch.x), batch.advantage)
        if min(rows) < self.minibatches:
            raise ValueError(f"batch must have a row for each of the {self.minibatches} minibatches; got {min(rows)}.")
        left_out = PPOUpdate(**dict.fromkeys(PPOUpdate._fields, math.nan) | {"steps": 0})  # type: ignore[arg-type]
        return self.updates(lambda: self._update(batch, generator, entropy_weight), left_out)

    def _update(self, batch: ActorCriticBatch, generator: torch.Generator, entropy_weight: float) -> PPOUpdate:
        learned = self._learned()
        before = copy_of(learned, self.optimizer)
        try:
            terms, norms = self._steps(batch, generator, entropy_weight, learned)
            if not all_finite(learned):
                raise FloatingPointError(
                    "The last step made weights that are not finite; policy and optimizer are as before the update. "
                    "Lower the rate."
                )
        except FloatingPointError:
            go_back(before, learned, self.optimizer)
            self.optimizer.zero_grad()
            raise
        return _summary(batch, terms, norms, self.shards)

    def _steps(
        self, batch: ActorCriticBatch, generator: torch.Generator, entropy_weight: float, learned: list[Tensor]
    ) -> tuple[list[PPOTerms], list[Tensor]]:
        """Terms of every minibatch, and the norms of the gradients of all that made a step."""
        terms: list[PPOTerms] = []
        norms: list[Tensor] = []
        for _ in range(self.epochs):
            order = torch.randperm(len(batch.x), generator=generator, device=generator.device).to(batch.x.device)
            for rows in order.tensor_split(self.minibatches):
                share, found = self._terms(some_rows(batch, rows), entropy_weight)
                terms.append(found)
                if self.max_divergence is not None and found.divergence > self.max_divergence:
                    return terms, norms
                norms.append(self._step(share, found.loss, learned))
        return terms, norms

    def _terms(self, batch: ActorCriticBatch, entropy_weight: float) -> tuple[Tensor, PPOTerms]:
        """The share of the loss that is this rank's, which has a graph, and the terms over all ranks, without."""
        found = ppo_loss(
            self.policy,
            {},
            batch,
            clip=self.clip,
            value_weight=self.value_weight,
            entropy_weight=entropy_weight,
        )
        there = {name: value.detach() for name, value in found._asdict().items() if value is not None}
        means, share = self.shards.mean(list(there.values()), batch.valid.sum().to(found.loss.dtype))
        return found.loss * share, found._replace(**dict(zip(there, means, strict=True)))

    def _step(self, share: Tensor, loss: Tensor, learned: list[Tensor]) -> Tensor:
        """One step of the optimizer; the norm of the gradient."""
        for p, gradient in zip(learned, torch.autograd.grad(share, learned, allow_unused=True), strict=True):
            p.grad = gradient
        self.shards.sum(learned, share.detach()[None])
        norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"The loss ({float(loss)}) or the norm of its gradient ({float(norm)}) is not finite; policy and "
                "optimizer are as before the update. Lower the rate, or look for what is not finite in the batch."
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(learned, self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _learned(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _summary(batch: ActorCriticBatch, terms: list[PPOTerms], norms: list[Tensor], shards: Shards) -> PPOUpdate:
    def mean(values: list[Any]) -> Any:
        return float(torch.stack(values).mean()) if values and values[0] is not None else None

    target, value = batch.target[batch.valid], batch.value[batch.valid]
    variance, left = _variance(target, shards), _variance(target - value, shards)
    return PPOUpdate(
        **{name: mean([getattr(term, name) for term in terms]) for name in PPOTerms._fields},
        gradient_norm=mean(norms) if norms else 0.0,
        explained_variance=float(1 - left / variance) if variance > 0 else 0.0,
        steps=len(norms),
    )


def _variance(values: Tensor, shards: Shards) -> Tensor:
    """Of the values (n,) of all ranks."""
    total, number = shards.total((values.sum(), values.new_tensor(len(values))))
    (squares,) = shards.total(((values - total / number).square().sum(),))
    return squares / number
