"""Checks of data at the public boundary, shared by everything that adapts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_finite", "check_pair"]


def check_pair(x_name: str, x: Any, y_name: str, y: Any, like: Tensor, *, stacked: bool = False) -> None:
    """Refuse inputs and targets that do not go together, or do not fit the model's weights `like`.

    Args:
        x_name, y_name: what error messages call them.
        x: (B, D) or (B, T, D), with a task axis N before it if `stacked`.
        y: the same leading axes as `x`; what follows them is the loss's business.
        like: a weight of the model, whose dtype (for floating-point data) and device the data must have.
    """
    for name, value in ((x_name, x), (y_name, y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")
        if value.is_floating_point() and value.dtype != like.dtype:
            raise ValueError(f"{name} must be of dtype {like.dtype}, as the model's weights are; got {value.dtype}.")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, where the model is; got {value.device}.")
    axes, ranks = ("N, B, D) or (N, B, T, D", (3, 4)) if stacked else ("B, D) or (B, T, D", (2, 3))
    if x.dim() not in ranks:
        raise ValueError(f"{x_name} must have shape ({axes}); got {tuple(x.shape)}.")
    leading = tuple(x.shape[:-1])
    if tuple(y.shape[: len(leading)]) != leading:
        raise ValueError(
            f"{y_name} must begin with the axes {leading} of {x_name} (same batch and same steps); "
            f"got shape {tuple(y.shape)}."
        )


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity in data, before they can reach a weight."""
    if value.is_floating_point() and not torch.isfinite(value).all():
        where = tuple(torch.nonzero(~torch.isfinite(value))[0].tolist())
        raise ValueError(f"{name} must be finite; got {value[where].item()} at index {where}. The model is untouched.")
