"""Checks of data at the public boundary, shared by everything that adapts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchopt import pytree

__all__ = ["check_finite", "check_pair", "check_reset_mask", "check_state"]


def check_pair(
    x_name: str, x: Any, y_name: str, y: Any, like: Tensor, *, stacked: bool = False, optional: bool = False
) -> None:
    """Refuse inputs and targets that do not go together, or do not fit the model's weights `like`.

    Args:
        x_name, y_name: what error messages call them.
        x: (B, D) or (B, T, D), with a task axis N before it if `stacked`.
        y: the same leading axes as `x`; what follows them is the loss's business.
        like: a weight of the model, whose dtype (for floating-point data) and device the data must have.
        optional: y may be None, for a loss that needs no targets.
    """
    for name, value in ((x_name, x), (y_name, y)):
        if optional and name == y_name and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")
        if value.is_floating_point() and value.dtype != like.dtype:
            raise ValueError(f"{name} must be of dtype {like.dtype}, as the model's weights are; got {value.dtype}.")
        _check_device(name, value, like)
    axes, ranks = ("N, B, D) or (N, B, T, D", (3, 4)) if stacked else ("B, D) or (B, T, D", (2, 3))
    if x.dim() not in ranks:
        raise ValueError(f"{x_name} must have shape ({axes}); got {tuple(x.shape)}.")
    leading = tuple(x.shape[:-1])
    if 0 in leading[stacked:]:
        raise ValueError(f"{x_name} must hold at least one sequence and one step; got shape {tuple(x.shape)}.")
    if y is not None and tuple(y.shape[: len(leading)]) != leading:
        raise ValueError(
            f"{y_name} must begin with the axes {leading} of {x_name} (same batch and same steps); "
            f"got shape {tuple(y.shape)}."
        )


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity in data, before they can reach a weight."""
    # A sum is finite only if every term is, and cheaper; where it overflows the second test decides.
    if value.is_floating_point() and not value.sum().isfinite() and not torch.isfinite(value).all():
        where = tuple(torch.nonzero(~torch.isfinite(value))[0].tolist())
        raise ValueError(f"{name} must be finite; got {value[where].item()} at index {where}. The model is untouched.")


def check_state(name: str, state: Any, like: Tensor, *, finite: bool = True) -> None:
    """Refuse a hidden state, a pytree, with a tensor on another device than the weight `like`, or not finite."""
    for leaf in pytree.tree_leaves(state):
        if isinstance(leaf, Tensor):
            _check_device(name, leaf, like)
            if finite:
                check_finite(name, leaf)


def check_reset_mask(reset: Any, x: Tensor) -> Tensor | None:
    """The mask of where episodes begin, Bool of the shape of x without its last axis, of which one bool is short.

    Raises:
        TypeError, ValueError: another type, dtype, shape or device.
    """
    shape = tuple(x.shape[:-1])
    if reset is None:
        return None
    if isinstance(reset, bool):
        mask = torch.zeros(shape, dtype=torch.bool, device=x.device)
        mask[(slice(None), 0) if len(shape) > 1 else slice(None)] = reset
        return mask
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Bool tensor of shape {shape}, a bool or None; got {type(reset).__name__}.")
    if reset.dtype is not torch.bool or tuple(reset.shape) != shape:
        raise ValueError(
            f"reset must be Bool of shape {shape} to match x; got {reset.dtype} of shape {tuple(reset.shape)}."
        )
    _check_device("reset", reset, x)
    return reset


def _check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, where the model is; got {value.device}.")
