"""Axes of recurrences: time-major copies, products over all steps at once, and where a vmapped axis goes.

Letters: T steps, B sequences, S and H widths, G groups with weights of their own. Sequences are (T, B, S) and weights
(S, H), or (G, T, B, S) and (G, S, H).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Fold",
    "add",
    "define_operation",
    "from_time_major",
    "matmul",
    "pad_to_targets",
    "sources",
    "sum_of_outer_products",
    "sum_of_rows",
    "targets",
    "time_major",
]

_LIBRARY = torch.library.Library("ssmrl", "FRAGMENT")


def time_major(sequence: Tensor, *, copy: bool = False) -> Tensor:
    """Time first and contiguous, since small batched products are up to 8x faster so; with `copy`, never a view."""
    sequence = sequence.movedim(-3, 0)
    return sequence.clone(memory_format=torch.contiguous_format) if copy else sequence.contiguous()


def from_time_major(sequence: Tensor) -> Tensor:
    """The inverse of `time_major`, contiguous."""
    return sequence.movedim(0, -3).contiguous()


def define_operation(schema: str, compute: Callable[..., Tensor], describe: Callable[..., Tensor]) -> None:
    """Make `compute` the operation `torch.ops.ssmrl.<name>`, opaque to tracing; it has no derivative of its own.

    Args:
        schema: name, arguments and result, in PyTorch's notation.
        compute: the function.
        describe: a function of the same arguments: an empty tensor of the result's shape, dtype, device and strides.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmrl::{name}", describe, lib=_LIBRARY)


def matmul(sequence: Tensor, weight: Tensor) -> Tensor:
    """(T, B, S) @ (S, H) -> (T, B, H) as one product with T folded into B."""
    product = torch.matmul(_fold_time(sequence), weight)
    return product.reshape(*sequence.shape[:-1], weight.shape[-1])


def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over T and B of left^T right: (T, B, S), (T, B, H) -> (S, H)."""
    return torch.matmul(_fold_time(left).mT, _fold_time(right))


def sum_of_rows(sequence: Tensor) -> Tensor:
    """Sum over T and B: (T, B, S) -> (S,). As a product with ones, which is up to 5x faster than `sum`."""
    rows = _fold_time(sequence)
    return torch.matmul(rows.new_ones(1, rows.shape[-2]), rows).squeeze(-2)


def _fold_time(sequence: Tensor) -> Tensor:
    """(T, B, S) -> (T·B, S). A reshape, since `is_grads_batched` has no rule for `flatten`."""
    *groups, steps, batch, width = sequence.shape
    return sequence.reshape(*groups, steps * batch, width)


class Fold:
    """Where a vmapped axis of size n goes: into G if any weight varies along it, else into B."""

    def __init__(self, size: int, weights: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> None:
        self.size = size
        self.has_groups = weights[0].dim() - (dims[0] is not None) == 3
        self.into_groups = any(dim is not None for dim in dims)

    def _front(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def weight(self, weight: Tensor, dim: int | None) -> Tensor:
        if not self.into_groups:
            return weight
        weight = self._front(weight, dim)
        return weight.flatten(0, 1) if self.has_groups else weight

    def sequence(self, sequence: Tensor | None, dim: int | None) -> Tensor | None:
        if sequence is None:
            return None
        sequence = self._front(sequence, dim)
        if not self.into_groups:
            return sequence.movedim(0, -3).flatten(-3, -2)
        return sequence.flatten(0, 1) if self.has_groups else sequence

    def unfold(self, *results: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Results with the vmapped axis restored, and where it is."""
        if not self.into_groups:
            return tuple(h.unflatten(-2, (self.size, h.shape[-2] // self.size)) for h in results), (
                results[0].dim() - 2,
            ) * len(results)
        if self.has_groups:
            results = tuple(h.unflatten(0, (self.size, h.shape[0] // self.size)) for h in results)
        return results, (0,) * len(results)


def sources(h: Tensor, keep: Tensor | None) -> Tensor:
    """States that steps t = 1..T start from, k_t h_{t-1}: (T+1, B, S) -> (T, B, S)."""
    source = h[..., :-1, :, :]
    return source if keep is None else torch.where(keep, source, 0.0)


def targets(h: Tensor) -> Tensor:
    """States that steps t = 1..T lead to, h_t: (T+1, B, S) -> (T, B, S)."""
    return h[..., 1:, :, :]


def pad_to_targets(drive: Tensor, adjoint: bool) -> Tensor:
    """(T, B, S) -> (T+1, B, S): zero where a recurrence, or its adjoint, starts."""
    return torch.nn.functional.pad(drive, (0, 0, 0, 0, 0, 1) if adjoint else (0, 0, 0, 0, 1, 0))


def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two tensors, where None is zero."""
    if x is None or y is None:
        return y if x is None else x
    return x + y
