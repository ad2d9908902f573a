"""The last transitions of a stream, to adapt to: a buffer of fixed shapes, as pure functions of one stream.

Letters: B rows of the stream, M transitions in the window, L = burn_in + M in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from ssmrl.adaptation.optim import check_num_steps
from ssmrl.adaptation.tree import is_there, tree_map

__all__ = ["Buffer", "Window", "empty_buffer", "keep_newest", "push", "window_loss"]

Forward = Callable[[Any, Tensor, Any, Any], tuple[Tensor, Any]]
"""(params, x, hidden_state, reset) -> (output, next state); () for a state or a mask that there is not."""


@dataclass(frozen=True)
class Window:
    """Adapt to the last `length` transitions of a stream, as one sequence, instead of the newest alone.

    The hidden state at its start is one of two things (Kapturowski et al. 2019, "R2D2",
    https://openreview.net/forum?id=r1lyTjAqYX, section 3):

    - `burn_in=0`: the state that was *recorded* when the stream passed there. It costs nothing, and is what older
      weights gave: after large steps it is stale.
    - `burn_in=n`: what the *current* weights give, from the state recorded n transitions before the window, through
      those n, without gradient. It costs n more steps forward. It is exact where an episode begins within them, and
      elsewhere as good as n steps make the model forget. Until they are there, the recorded state is taken.

    Where an episode begins, within the window too, the state is forgotten, as `reset` says in the model's contract.

    Raises:
        TypeError, ValueError: sizes that are no integers, or out of their range.
    """

    length: int
    """M >= 1. The loss is the mean over the transitions that are there."""
    minimum: int = 1
    """How many of them there must be before the model adapts; 1 <= minimum <= length."""
    burn_in: int = 0
    """Transitions before the window that bring the state up to date; >= 0."""

    def __post_init__(self) -> None:
        for name in ("length", "minimum", "burn_in"):
            check_num_steps(name, getattr(self, name))
        if self.length < 1:
            raise ValueError(f"length must be at least 1; got {self.length}.")
        if not 1 <= self.minimum <= self.length:
            raise ValueError(f"minimum must be between 1 and length = {self.length}; got {self.minimum}.")

    @property
    def capacity(self) -> int:
        """L."""
        return self.burn_in + self.length


class Buffer(NamedTuple):
    """The oldest transition first, then places that do not count; the leading axes of all leaves are (B, L)."""

    x: Tensor
    y: Any
    """What the losses compare with; () where they need nothing."""
    hidden: Any
    """The state before every transition, as it was recorded; () for a model without one."""
    reset: Any
    """Bool, where episodes begin; () if no mask was ever given."""
    filled: Tensor
    """() Int64, how many there are."""


def empty_buffer(window: Window, x: Tensor, y: Any, hidden: Any, reset: Any) -> Buffer:
    """A buffer for transitions of which these, (B, ...), are one."""

    def places(leaf: Tensor) -> Tensor:
        return leaf.new_zeros(leaf.shape[0], window.capacity, *leaf.shape[1:])

    return _buffer(tree_map(places, (x, y, hidden, reset)), torch.zeros((), dtype=torch.int64, device=x.device))


def push(buffer: Buffer, x: Tensor, y: Any, hidden: Any, reset: Any) -> Buffer:
    """Put a transition, (B, ...), at the end; the oldest one leaves a full buffer."""
    capacity = buffer.x.shape[1]
    places = torch.arange(capacity, device=buffer.x.device)
    full = buffer.filled >= capacity
    # Empty places hold the newest transition too: losses there do not count, but must have a derivative.
    at = places >= buffer.filled.clamp(max=capacity - 1)

    def put(held: Tensor, new: Tensor) -> Tensor:
        held = torch.where(full, held.roll(-1, 1), held)
        return torch.where(at.view(1, -1, *[1] * (held.dim() - 2)), new[:, None], held)

    return _buffer(tree_map(put, tuple(buffer[:4]), (x, y, hidden, reset)), (buffer.filled + 1).clamp(max=capacity))


def keep_newest(buffer: Buffer, number: int, where: Tensor) -> Buffer:
    """Drop all but the `number` newest transitions if `where`, Bool (), says so."""
    kept = torch.where(where, buffer.filled.clamp(max=number), buffer.filled)
    return _buffer(_from(buffer[:4], buffer.filled - kept, buffer.x.shape[1]), kept)


def window_loss(
    window: Window,
    buffer: Buffer,
    forward: Forward,
    loss_fn: Callable[[Tensor, Any], Tensor],
    params: Any,
) -> Tensor:
    """Mean of `loss_fn(output_t, y_t)` over the transitions in the window, run as one sequence; 0 if it is empty."""
    inside = buffer.filled.clamp(max=window.length)
    before = buffer.filled - inside
    rows = buffer[:4] if window.burn_in == 0 else _from(buffer[:4], before, window.length)
    x, y, hidden, reset = rows
    start = tree_map(lambda leaf: leaf[:, 0], hidden)
    if window.burn_in and is_there(hidden):
        early_x, _, early_hidden, early_reset = tree_map(lambda leaf: leaf[:, : window.burn_in], tuple(buffer[:4]))
        constant = tree_map(Tensor.detach, params)
        oldest = tree_map(lambda leaf: leaf[:, 0], early_hidden)
        _, burned = forward(constant, early_x, oldest, early_reset)
        there = before == window.burn_in
        start = tree_map(lambda new, old: torch.where(there, new, old).detach(), burned, start)
    output, _ = forward(params, x, start, reset)
    each = vmap(loss_fn, in_dims=(1, 1))(output, y) if is_there(y) else vmap(lambda o: loss_fn(o, None), 1)(output)
    present = torch.arange(window.length, device=x.device) < inside
    total: Tensor = torch.where(present, each, 0.0).sum()
    return total / inside.clamp(min=1)


def _buffer(rows: tuple[Any, Any, Any, Any], filled: Tensor) -> Buffer:
    x, y, hidden, reset = rows
    return Buffer(x, y, hidden, reset, filled)


def _from(rows: Any, start: Tensor, length: int) -> Any:
    """Places start, start + 1, ... of the axis L; past its end the last one again."""
    index = torch.arange(length, device=start.device) + start
    return tree_map(lambda leaf: leaf[:, index.clamp(max=leaf.shape[1] - 1)], tuple(rows))
