"""What keeps an adapting model from being worse than one that does not adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmrl.adaptation.optim import check_positive, check_rate

__all__ = ["Guard", "GuardState"]


@dataclass(frozen=True)
class Guard:
    """Bounds what adaptation can cost, against the anchor, which runs beside the model on the same transitions.

    - An update that leaves a loss or a weight not finite, or whose loss on its own data rises, is rolled back: weights
      and optimizer state are those from before it.
    - The excess e_t = max(0, e_{t-1} + l_t - a_t) sums how much worse the adapted model's loss l on every new
      transition is than the anchor's loss a (the one-sided CUSUM of Page 1954, https://doi.org/10.2307/2333009). Once
      it is above `allowance` times the anchor's mean loss, or l is not finite, the anchor's weights come back, with a
      fresh optimizer.
    - Either makes the next steps smaller by the factor `backoff`; every update that stands makes them larger again, by
      `recovery`, up to their full size.

    So the loss summed over any stretch of time with R resets is above the anchor's by at most (R + 1) · `allowance`
    mean losses of the anchor, and R times the largest loss of a transition, by which a reset comes late; and resets
    become rare, since each takes the step down, and it needs log(1 / backoff) / log(recovery) good updates to come up.

    The anchor has a hidden state of its own, carried from call to call: a guarded adapter has to see every transition
    of its stream, one step a call, in order (`AdaptationConfig.every` spares the adaptation, not the look). Given whole
    sequences, (B, T, D), it starts every one of them from the state that is given, as the model does.

    Raises:
        TypeError, ValueError: a value out of its range.
    """

    rise: float = 0.0
    """Roll back an update after which the loss on its data is above what it was before by `rise` times that; >= 0."""
    allowance: float = 10.0
    """How much worse than the anchor, in mean losses of the anchor, before it comes back; > 0."""
    backoff: float = 0.5
    """Factor on the size of steps after a rollback or a reset; 0 < backoff <= 1."""
    recovery: float = 1.002
    """Factor on it after every update that stands; >= 1."""
    memory: float = 0.99
    """Decay per transition of the anchor's mean loss; 0 <= memory < 1."""

    def __post_init__(self) -> None:
        check_rate("rise", self.rise)
        check_positive("allowance", self.allowance)
        check_positive("backoff", self.backoff)
        check_rate("recovery", self.recovery)
        check_rate("memory", self.memory)
        if self.backoff > 1:
            raise ValueError(f"backoff must be at most 1; got {self.backoff}.")
        if self.recovery < 1:
            raise ValueError(f"recovery must be at least 1; got {self.recovery}.")
        if self.memory >= 1:
            raise ValueError(f"memory must be below 1; got {self.memory}.")

    def init(self, like: Tensor, anchor_hidden: Any) -> GuardState:
        """The state before the first transition; `like` a loss, `anchor_hidden` the hidden state before it."""
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return GuardState(zero, zero, zero, zero + 1, anchor_hidden)

    def watch(
        self, state: GuardState, loss: Tensor, anchor_loss: Tensor, anchor_hidden: Any
    ) -> tuple[Tensor, GuardState]:
        """Compare the losses of one transition: whether to go back to the anchor, Bool (), and the state after it."""
        known = torch.isfinite(anchor_loss)  # else there is nothing to compare with
        anchor_sum = torch.where(known, self.memory * state.anchor_sum + anchor_loss.abs(), state.anchor_sum)
        weight = torch.where(known, self.memory * state.weight + 1, state.weight)
        excess = torch.where(known, torch.clamp(state.excess + loss - anchor_loss, min=0), state.excess)
        back = (excess > self.allowance * anchor_sum / weight.clamp(min=1e-6)) | ~torch.isfinite(loss)
        scale = torch.where(back, state.scale * self.backoff, state.scale)
        return back, GuardState(torch.where(back, 0.0, excess), anchor_sum, weight, scale, anchor_hidden)

    def judge(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether an update stands, by the loss on its data before and after it."""
        return after <= before + self.rise * before.abs()

    def rescaled(self, state: GuardState, tried: Tensor, stands: Tensor) -> GuardState:
        """The state after an update was `tried` or not, and `stands` or not."""
        larger = (state.scale * self.recovery).clamp(max=1)
        scale = torch.where(stands, larger, state.scale * self.backoff)
        return state._replace(scale=torch.where(tried, scale, state.scale))


class GuardState(NamedTuple):
    """State of a guard, for one stream."""

    excess: Tensor
    """() how much worse the adapted model was."""
    anchor_sum: Tensor
    """() weighted sum of the sizes of the anchor's losses."""
    weight: Tensor
    """() and the sum of its weights."""
    scale: Tensor
    """() factor on the size of steps, at most 1."""
    anchor_hidden: Any
    """The anchor's hidden state before the next transition."""
