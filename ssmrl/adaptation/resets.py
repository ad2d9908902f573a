"""When adaptation starts again from the anchor: policies, as pure functions for one stream.

A plain reset every n steps beats most clever methods on long streams (Press et al. 2023, "RDumb",
https://arxiv.org/abs/2306.05401).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmrl.adaptation.optim import check_num_steps, check_rate

__all__ = ["Observed", "ResetPolicy", "reset_at_episode_end", "reset_every", "reset_on_rise"]


class Observed(NamedTuple):
    """What a policy sees of a transition, before the model adapts to it."""

    loss: Tensor
    """() the loss of the weights that were in use, on this transition alone."""
    episode_begins: Tensor
    """Bool () an episode begins with this transition, in any of the rows."""


class ResetPolicy(NamedTuple):
    """A pure function that says when to go back to the anchor, in the manner of TorchOpt's transformations.

    Functions of tensors without a read on the host, to be mapped over streams.
    """

    init: Callable[[Tensor], Any]
    """A loss, for its dtype and device -> state, a pytree of tensors."""
    update: Callable[[Observed, Any], tuple[Tensor, Any]]
    """(what was observed, state) -> (Bool () whether to reset, state)."""
    keep: int | None = None
    """How many of the newest transitions a reset leaves in the window; None: all of them."""


def reset_every(num_updates: int) -> ResetPolicy:
    """Reset before every n-th update, n = num_updates >= 1, the first after n of them."""
    if check_num_steps("num_updates", num_updates) < 1:
        raise ValueError(f"num_updates must be at least 1; got {num_updates}.")

    def update(observed: Observed, since: Tensor) -> tuple[Tensor, Tensor]:
        reset = since >= num_updates
        return reset, torch.where(reset, 1, since + 1)

    return ResetPolicy(lambda like: torch.zeros((), dtype=torch.int64, device=like.device), update)


def reset_at_episode_end(*, keep: int | None = None) -> ResetPolicy:
    """Reset where an episode begins.

    Args:
        keep: how many of the newest transitions stay in the window, the first of the new episode being one; None:
            all of them.
    """
    return ResetPolicy(lambda like: (), lambda observed, state: (observed.episode_begins, state), _check_keep(keep))


class RiseState(NamedTuple):
    """State of `reset_on_rise`: sums of weighted losses, of their weights, and how many there were."""

    fast: Tensor
    slow: Tensor
    fast_weight: Tensor
    slow_weight: Tensor
    number: Tensor


def reset_on_rise(ratio: float = 3.0, *, fast: float = 0.5, slow: float = 0.02, keep: int | None = 4) -> ResetPolicy:
    """Reset where the error says so: a fast mean of the loss is above `ratio` times a slow one, or a loss not finite.

    The means are exponential, m = Σ_j (1 - w)^j l_{t-j} / Σ_j (1 - w)^j, and begin anew with every reset; nothing
    happens in the first 2 / fast updates after one.

    Args:
        ratio: > 1.
        fast, slow: weights w of the newest loss, 0 < slow < fast <= 1.
        keep: how many of the newest transitions a reset leaves in the window, since those before the rise are of
            another regime; None: all of them.

    Raises:
        TypeError, ValueError: a ratio or weights that are no numbers, or out of their range.
    """
    for name, value in (("ratio", ratio), ("fast", fast), ("slow", slow)):
        check_rate(name, value)
    if not ratio > 1:
        raise ValueError(f"ratio must be > 1; got {ratio}.")
    if not 0 < slow < fast <= 1:
        raise ValueError(f"The weights must be 0 < slow < fast <= 1; got slow={slow}, fast={fast}.")
    exempt = round(2 / fast)

    def init(like: Tensor) -> RiseState:
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return RiseState(zero, zero, zero, zero, torch.zeros((), dtype=torch.int64, device=like.device))

    def update(observed: Observed, state: RiseState) -> tuple[Tensor, RiseState]:
        loss = observed.loss
        after = RiseState(
            (1 - fast) * state.fast + loss,
            (1 - slow) * state.slow + loss,
            (1 - fast) * state.fast_weight + 1,
            (1 - slow) * state.slow_weight + 1,
            state.number + 1,
        )
        # Against the slow mean as it was before this loss.
        before = state.slow / torch.where(state.slow_weight > 0, state.slow_weight, 1.0)
        rose = after.fast / after.fast_weight - before > (ratio - 1) * before.abs()
        reset = (rose & (state.number >= exempt)) | ~torch.isfinite(loss)
        return reset, RiseState(*(torch.where(reset, torch.zeros_like(value), value) for value in after))

    return ResetPolicy(init, update, _check_keep(keep))


def _check_keep(keep: int | None) -> int | None:
    return None if keep is None else check_num_steps("keep", keep)
