"""Episodes that follow each other in a row of T steps, and recurrences over time that stop at their ends.

Every function takes (..., T), one row or any batch of them, and maps with `vmap`. `terminated`, `truncated` and `valid`
are the Bool masks of a trajectory (`ssmrl.env_runner.Trajectory`). Step t + 1 goes on from step t where

    continues_t = valid_t ∧ valid_{t+1} ∧ ¬terminated_t ∧ ¬truncated_t,     valid_T = False,

so that a row that stops in the middle of an episode is cut there as a truncation would cut it, and an invalid step, be
it padding or the step that NEXT_STEP autoreset inserts, neither gives nor passes on anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "check_fraction",
    "check_steps",
    "continuing",
    "count_episodes",
    "episode_step",
    "following",
    "sum_back",
    "sum_forward",
    "where_valid",
]


def continuing(terminated: Tensor, truncated: Tensor, valid: Tensor | None = None) -> Tensor:
    """Bool (..., T): whether step t + 1 goes on from step t; see above."""
    goes_on = ~(terminated | truncated)
    if valid is not None:
        goes_on = goes_on & valid & pad(valid[..., 1:], (0, 1))
    return pad(goes_on[..., :-1], (0, 1)) if goes_on.shape[-1] else goes_on


def following(goes_on: Tensor) -> Tensor:
    """Bool (..., T): whether step t goes on from step t - 1, from `continuing`."""
    return pad(goes_on[..., :-1], (1, 0)) if goes_on.shape[-1] else goes_on


def episode_step(terminated: Tensor, truncated: Tensor, valid: Tensor | None = None) -> Tensor:
    """Int64 (..., T): t, counted from 0 at the first step of every episode; 0 where a step is invalid.

    A row that begins in the middle of an episode counts from there.
    """
    check_steps("terminated", terminated, truncated=truncated, valid=valid)
    follows = following(continuing(terminated, truncated, valid)).long()
    return sum_forward(follows, follows)  # t = k (t' + 1), with t' of the step before and k whether this one follows it


def count_episodes(terminated: Tensor, truncated: Tensor, valid: Tensor | None = None) -> Tensor:
    """Int64 scalar: how many episodes, whole or cut, all the rows (..., T) hold together."""
    check_steps("terminated", terminated, truncated=truncated, valid=valid)
    begins = ~following(continuing(terminated, truncated, valid))
    return (begins if valid is None else begins & valid).sum()


def sum_back(f: Tensor, c: Tensor) -> Tensor:
    """Solve y_t = f_t + c_t y_{t+1}, y_T = 0, in O(T) work and 2 log2 T rounds, differentiable to every order.

    Two steps of the recurrence are one of another, y_t = (f_t + c_t f_{t+1}) + c_t c_{t+1} y_{t+2}, half as long
    (Blelloch 1990, "Prefix Sums and Their Applications", https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf).

    Args:
        f: (..., T).
        c: (..., T), the shape of f.

    Returns:
        y: (..., T).
    """
    num_steps = f.shape[-1]
    if num_steps <= 1:
        return f
    f, c = (pad(x, (0, num_steps % 2)) for x in (f, c))
    f_even, f_odd, c_even, c_odd = f[..., 0::2], f[..., 1::2], c[..., 0::2], c[..., 1::2]
    even = sum_back(f_even + c_even * f_odd, c_even * c_odd)
    odd = f_odd + c_odd * pad(even[..., 1:], (0, 1))
    return torch.stack([even, odd], -1).flatten(-2)[..., :num_steps]


def sum_forward(f: Tensor, c: Tensor) -> Tensor:
    """Solve y_t = f_t + c_t y_{t-1}, y_{-1} = 0: `sum_back` in the other direction."""
    return sum_back(f.flip(-1), c.flip(-1)).flip(-1)


def where_valid(valid: Tensor | None, x: Tensor) -> Tensor:
    """Return x (..., T), and 0 where a step is invalid: also where x is NaN, and also in what follows' derivatives."""
    return x if valid is None else torch.where(valid, x, 0.0)


def check_steps(name: str, like: Any, **others: Any) -> None:
    """Refuse tensors that do not have a value for every step of `like` (..., T), and masks that are not Bool."""
    for key, value in {name: like, **others}.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"`{key}` must be a tensor (..., T); got {type(value).__name__}.")
        if value.dim() == 0:
            raise ValueError(f"`{key}` must have an axis of steps, (..., T); got a scalar.")
        if value.shape != like.shape:
            raise ValueError(
                f"`{key}` must have the shape (..., T) = {tuple(like.shape)} of `{name}`; got {tuple(value.shape)}."
            )
        if key in ("terminated", "truncated", "valid") and value.dtype is not torch.bool:
            raise ValueError(f"`{key}` must be Bool; got {value.dtype}.")


def check_fraction(name: str, value: Any) -> None:
    """Refuse a number that is not in [0, 1]; a tensor, which may be learned, is taken as it is."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1] or a tensor; got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value}.")
