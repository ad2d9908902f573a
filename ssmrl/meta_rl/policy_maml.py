"""MAML for policies: inner steps by policy gradient on data of their own, and the outer objective through all of them.

For one task; `vmap` maps it. θ_0 = θ collects D_0, one inner step on it gives θ_1, which collects D_1, and so on; the
outer loss is that of θ_K on D_K, differentiated through every step:

    θ_{k+1} = θ_k - α ∇ inner_loss(θ_k, D_k),     meta-loss(θ) = outer_loss(θ_K, D_K)

Letters: E episodes, T steps, D inputs, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torchopt.base import GradientTransformation

from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.select import split
from ssmrl.meta_rl.policy_batch import PolicyBatch

__all__ = ["adapt_policy", "policy_meta_loss"]


Loss = Callable[[Any, PolicyBatch], Tensor]


def adapt_policy(
    inner_loss: Loss,
    params: Mapping[str, Tensor],
    batches: Sequence[PolicyBatch],
    *,
    optimizer: GradientTransformation,
    adapted: Iterable[str] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return θ_K: one step on each of the batches D_0, ..., D_{K-1}, that of one task.

    Args:
        inner_loss: `(params, batch) -> scalar`.
        params: θ_0, name -> tensor.
        batches: K of them, each collected by the parameters that the steps before it gave.
        optimizer: a TorchOpt transformation; its state is carried from step to step.
        adapted: names of the parameters that the steps change (ANIL); None: all of them.
        **options: of `ssmrl.adapt`, `first_order` for instance.
    """
    *_, last = _path(inner_loss, params, batches, optimizer, adapted, options)
    return last


def policy_meta_loss(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Mapping[str, Tensor],
    batches: Sequence[PolicyBatch],
    *,
    optimizer: GradientTransformation,
    adapted: Iterable[str] | None = None,
    before: Callable[[Any, PolicyBatch, int], Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """outer_loss(θ_K, D_K) + 1/K Σ_{k<K} before(θ_k, D_k, k), for one task: what MAML's outer loop minimises.

    Args:
        inner_loss, optimizer, adapted: as for `adapt_policy`.
        outer_loss: `(params, batch) -> scalar`, on the last batch.
        params: θ.
        batches: D_0, ..., D_K.
        before: `(params, batch, k) -> scalar`, of the policy and the data of every inner step: ProMP's penalty on the
            divergence of the two, which keeps what the batches say true while the outer loop makes several steps on
            them, or the exploration term of E-MAML. None: nothing.
        **options: of `ssmrl.adapt`.
    """
    if not batches:
        raise ValueError("`batches` must hold at least the batch of the outer loss; got none.")
    *path, last = _path(inner_loss, params, batches[:-1], optimizer, adapted, options)
    loss = outer_loss(last, batches[-1])
    if before is not None:
        for k, (at, batch) in enumerate(zip(path, batches, strict=False)):
            loss = loss + before(at, batch, k) / len(path)
    return loss


def _path(
    inner_loss: Loss,
    params: Mapping[str, Tensor],
    batches: Sequence[PolicyBatch],
    optimizer: GradientTransformation,
    adapted: Iterable[str] | None,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Tensor]]:
    """Yield θ_0, ..., θ_K: the parameters before the step on every batch, and after the last."""
    own, shared = split(params, params if adapted is None else adapted)

    def loss(own: dict[str, Tensor], shared: dict[str, Tensor], batch: PolicyBatch) -> Tensor:
        return inner_loss({**shared, **own}, batch)

    state = None
    yield {**shared, **own}
    for batch in batches:
        done = adapt(loss, own, shared, batch, optimizer=optimizer, num_steps=1, optimizer_state=state, **options)
        own, state = done.params, done.optimizer_state
        yield {**shared, **own}
