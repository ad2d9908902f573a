"""Axes of recurrences: time-major copies, products over all steps at once, and where a vmapped axis goes.

Letters: T steps, B sequences, S and H widths, G groups. Sequences are (T, B, S) and weights (S, H); or (G, T, B, S)
with weights that all groups share, (S, H), or of their own, (G, S, H).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "Fold",
    "add",
    "at_steps",
    "check_operands",
    "define_operation",
    "empty_results",
    "from_time_major",
    "matmul",
    "over_steps",
    "pad_to_targets",
    "sizes",
    "sources",
    "sum_of_outer_products",
    "sum_of_rows",
    "targets",
    "time_major",
    "with_signature",
]

_LIBRARY = torch.library.Library("ssmrl", "FRAGMENT")


def sizes(name: str, operand: Tensor, axes: str) -> torch.Size:
    """The shape of an operand that must have these axes, such as "T+1, B, S", of which T+1 must not be 0."""
    shape = operand.shape
    if len(shape) != axes.count(",") + 1 or (axes.startswith("T+1") and shape[0] == 0):
        raise ValueError(f"{name} must be of shape ({axes}); got {tuple(shape)}.")
    return shape


def check_operands(like: Tensor, **operands: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuse operands that are not of these shapes, and of the dtype and on the device of `like`; a mask, Bool.

    Loops in C++ are given addresses: of anything else they would read what lies beside it.
    """
    for name, (operand, shape) in operands.items():
        if operand is None:
            continue
        dtype = torch.bool if name == "keep" else like.dtype
        if operand.shape != shape or operand.dtype != dtype or operand.device != like.device:
            raise ValueError(
                f"{name} must be of shape {shape} and dtype {dtype}, on {like.device}; "
                f"got {tuple(operand.shape)}, {operand.dtype}, on {operand.device}."
            )


def time_major(sequence: Tensor, weight: Tensor, *, copy: bool = False) -> Tensor:
    """(T, B, S), or (T, G, B, S) for weights of their own: what a loop over time multiplies by the weight step by step.

    Groups that share the weight go into B. Contiguous, since small batched products are up to 8x faster so; with
    `copy`, never a view.
    """
    sequence = sequence.movedim(-3, 0)
    sequence = sequence.flatten(1, -2) if weight.dim() == 2 else sequence
    return sequence.clone(memory_format=torch.contiguous_format) if copy else sequence.contiguous()


def from_time_major(sequence: Tensor, like: Tensor) -> Tensor:
    """The inverse of `time_major`, contiguous, with groups and B as `like` has them."""
    *groups, _, batch, _ = like.shape
    sequence = sequence.unflatten(1, (*groups, batch)) if sequence.dim() < like.dim() else sequence
    return sequence.movedim(0, -3).contiguous()


def with_signature(function: type[Function]) -> type[Function]:
    """Keep the signature of `forward` with it, which `Function.apply` else works out anew at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def empty_results(initial_and_inputs: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """What a recurrence fills: states, as f (T+1, B, S), and what a step computes on its way, (T, B, hidden)."""
    *groups, states, batch, _ = initial_and_inputs.shape
    like = initial_and_inputs
    return torch.empty_like(like, memory_format=torch.contiguous_format), like.new_empty(
        *groups, states - 1, batch, hidden
    )


def at_steps(sequence: Tensor | None, weight: Tensor) -> tuple[Tensor, ...] | None:
    """The steps of `time_major(sequence, weight)`, one tensor each; None for no sequence."""
    return None if sequence is None else time_major(sequence, weight).unbind(0)


def define_operation(schema: str, compute: Callable[..., Any], describe: Callable[..., Any]) -> None:
    """Make `compute` the operation `torch.ops.ssmrl.<name>`, opaque to tracing; it has no derivative of its own.

    Args:
        schema: name, arguments and result, in PyTorch's notation.
        compute: the function.
        describe: a function of the same arguments: empty tensors of the results' shapes, dtypes, devices and strides.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmrl::{name}", describe, lib=_LIBRARY)


def matmul(sequence: Tensor, weight: Tensor) -> Tensor:
    """(T, B, S) @ (S, H) -> (T, B, H) as one product with T folded into B."""
    product = torch.matmul(_fold_time(sequence), weight)
    return product.reshape(*sequence.shape[:-1], weight.shape[-1])


def sum_of_outer_products(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Sum of left^T right over T, B and the groups that share the weight: (T, B, S), (T, B, H) -> (S, H) like it."""
    left, right = (_fold_time(x) if weight.dim() == 3 else x.reshape(-1, x.shape[-1]) for x in (left, right))
    return torch.matmul(left.mT, right)


def sum_of_rows(sequence: Tensor, weight: Tensor) -> Tensor:
    """Sum over T, B and the groups that share the weight: (T, B, H) -> (H,); as a product, 5x faster than `sum`."""
    rows = _fold_time(sequence) if weight.dim() == 3 else sequence.reshape(-1, sequence.shape[-1])
    return torch.matmul(rows.new_ones(1, rows.shape[-2]), rows).squeeze(-2)


def over_steps(bias: Tensor) -> Tensor:
    """(H,) -> (1, 1, H), or (G, H) -> (G, 1, 1, H): a bias as a sequence."""
    return bias[..., None, None, :]


def _fold_time(sequence: Tensor) -> Tensor:
    """(T, B, S) -> (T·B, S). A reshape, since `is_grads_batched` has no rule for `flatten`."""
    *groups, steps, batch, width = sequence.shape
    return sequence.reshape(*groups, steps * batch, width)


class Fold:
    """Where a vmapped axis of size n goes: into G; but into B where groups have weights and n has none.

    Args:
        size: n.
        sequence, dim: a sequence, and where it has the axis.
        weights, dims: weights, a matrix first, and where they have it.
    """

    def __init__(
        self, size: int, sequence: Tensor, dim: int | None, weights: tuple[Tensor, ...], dims: tuple[int | None, ...]
    ) -> None:
        self.size = size
        groups = sequence.shape[: sequence.dim() - 3] if dim is None else sequence.movedim(dim, 0).shape[1:-3]
        self.groups = tuple(groups)
        self.weights_have_groups = weights[0].dim() - (dims[0] is not None) == 3
        self.weights_differ = any(d is not None for d in dims)
        self.into_batch = self.weights_have_groups and not self.weights_differ

    def _front(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def weight(self, weight: Tensor, dim: int | None) -> Tensor:
        if not self.weights_differ:
            return weight
        weight = self._front(weight, dim)
        if self.groups and not self.weights_have_groups:
            weight = weight.unsqueeze(1).expand(self.size, *self.groups, *weight.shape[1:])
        return weight.flatten(0, 1) if self.groups else weight

    def sequence(self, sequence: Tensor, dim: int | None) -> Tensor:
        sequence = self._front(sequence, dim)
        if self.into_batch:
            return sequence.movedim(0, -3).flatten(-3, -2)
        return sequence.flatten(0, 1) if self.groups else sequence

    def optional(self, sequence: Tensor | None, dim: int | None) -> Tensor | None:
        return None if sequence is None else self.sequence(sequence, dim)

    def unfold(self, *results: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Results with the vmapped axis restored, and where it is."""
        if self.into_batch:
            results = tuple(x.unflatten(-2, (self.size, x.shape[-2] // self.size)) for x in results)
            return results, (results[0].dim() - 3,) * len(results)
        if self.groups:
            results = tuple(x.unflatten(0, (self.size, *self.groups)) for x in results)
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
