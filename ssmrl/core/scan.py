"""Recurrences that are differentiable to every order and have their own vmap rule.

Letters: T steps, B sequences, S state, H hidden, G groups with weights of their own (tasks, under `vmap`).

The backward pass of a nonlinear recurrence is a linear recurrence in reverse time, and the backward pass of a
linear recurrence is a linear recurrence the other way. So two operations close the family: `mlp_recurrence`,
whose derivatives are written with `linear_recurrence`, whose derivatives are written with itself. Only what is
truly sequential runs step by step; linearisations and weight gradients are one matrix product for all T.
docs/recurrence.md has the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssmrl.core.axes import (
    Fold,
    define_operation,
    from_time_major,
    matmul,
    sources_and_targets,
    sum_of_outer_products,
    time_major,
)

__all__ = ["linear_recurrence", "mlp_recurrence"]


def linear_recurrence(f: Tensor, w_in: Tensor, d: Tensor, w_out: Tensor, *, reverse: bool = False) -> Tensor:
    """Solve h_0 = f_0, h_t = ((h_{t-1} W_in) ∘ d_t) W_out + f_t for t = 1..T.

    Args:
        f: (T+1, B, S) the initial state f_0 and the input of every step.
        w_in: (S, H).
        d: (T, B, H) the elementwise coefficients of steps 1..T.
        w_out: (H, S).
        reverse: solve from the other end: h_T = f_T, h_{t-1} = ((h_t W_in) ∘ d_t) W_out + f_{t-1}.
            With W_out^T for W_in and W_in^T for W_out, this is the adjoint of the forward solution.

    Returns:
        h: (T+1, B, S), differentiable to every order in every tensor argument.
    """
    h: Tensor = _LinearRecurrence.apply(f, w_in, d, w_out, reverse)
    return h


def mlp_recurrence(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None = None) -> Tensor:
    """Solve h_0 = c_0, h_t = relu((k_t ∘ h_{t-1}) W_in + b_in) W_out + c_t for t = 1..T.

    Args:
        c: (T+1, B, S) the initial state c_0 and what is added at every step.
        w_in: (S, H).
        b_in: (H,).
        w_out: (H, S).
        keep: Bool (T, B, 1). Where it is False k_t = 0: step t starts from the zero state, whatever
            h_{t-1} was, NaN included.

    Returns:
        h: (T+1, B, S), differentiable to every order in every floating-point argument.
    """
    h: Tensor = _MLPRecurrence.apply(c, w_in, b_in, w_out, keep)
    return h


# The loops over time, without derivatives. As operations of their own a trace records each as one node, whatever T is.


def _solve_linear(f: Tensor, w_in: Tensor, d: Tensor, w_out: Tensor, reverse: bool) -> Tensor:
    h = time_major(f, copy=True)
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    h_at, d_at = h.unbind(0), time_major(d).unbind(0)
    steps = range(len(d_at))
    for t in reversed(steps) if reverse else steps:
        source, target = (h_at[t + 1], h_at[t]) if reverse else (h_at[t], h_at[t + 1])
        _add_product(target, torch.matmul(source, w_in).mul_(d_at[t]), w_out)
    return from_time_major(h)


def _solve_mlp(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None) -> Tensor:
    h = time_major(c, copy=True)
    w_in, w_out, b_in = w_in.contiguous(), w_out.contiguous(), b_in.unsqueeze(-2)
    h_at = h.unbind(0)
    keep_at = None if keep is None else time_major(keep).unbind(0)
    for t in range(len(h_at) - 1):
        source = h_at[t] if keep_at is None else torch.where(keep_at[t], h_at[t], 0.0)
        _add_product(h_at[t + 1], torch.matmul(source, w_in).add_(b_in).relu_(), w_out)
    return from_time_major(h)


define_operation(
    "linear_recurrence(Tensor f, Tensor w_in, Tensor d, Tensor w_out, bool reverse) -> Tensor",
    _solve_linear,
    lambda f, *others: torch.empty_like(f, memory_format=torch.contiguous_format),
)
define_operation(
    "mlp_recurrence(Tensor c, Tensor w_in, Tensor b_in, Tensor w_out, Tensor? keep) -> Tensor",
    _solve_mlp,
    lambda c, *others: torch.empty_like(c, memory_format=torch.contiguous_format),
)


# In the two Functions all operands, or none, may have a leading axis G: weights (G, S, H), sequences
# (G, T, B, S). Their vmap rules fold the mapped axis into B where the weights are shared and into G
# where they are not, so that the loop over time never sees more than these axes.


class _LinearRecurrence(Function):
    @staticmethod
    def forward(f: Tensor, w_in: Tensor, d: Tensor, w_out: Tensor, reverse: bool) -> Tensor:
        h: Tensor = torch.ops.ssmrl.linear_recurrence(f, w_in, d, w_out, reverse)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w_in, d, w_out, ctx.reverse = inputs
        ctx.save_for_backward(w_in, d, w_out, output)
        ctx.save_for_forward(w_in, d, w_out, output)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        w_in, d, w_out, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        adjoint = linear_recurrence(grad_h, w_out.mT, d, w_in.mT, reverse=not ctx.reverse)
        source, _ = sources_and_targets(h, ctx.reverse)
        _, target = sources_and_targets(adjoint, ctx.reverse)
        e = matmul(source, w_in)
        k = matmul(target, w_out.mT)
        return (
            adjoint,
            sum_of_outer_products(source, d * k) if needs[1] else None,
            e * k if needs[2] else None,
            sum_of_outer_products(d * e, target) if needs[3] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, df: Tensor, dw_in: Tensor, dd: Tensor, dw_out: Tensor, no_tangent: None) -> Tensor:
        w_in, d, w_out, h = ctx.saved_tensors
        source, _ = sources_and_targets(h, ctx.reverse)
        e = matmul(source, w_in)
        drive = matmul(matmul(source, dw_in) * d + e * dd, w_out) + matmul(e * d, dw_out)
        df = df + _pad_to_targets(drive, ctx.reverse)
        return linear_recurrence(df, w_in, d, w_out, reverse=ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        f, w_in, d, w_out, reverse = operands
        f_dim, w_in_dim, d_dim, w_out_dim, _ = in_dims
        fold = Fold(info.batch_size, (w_in, w_out), (w_in_dim, w_out_dim))
        h = linear_recurrence(
            fold.sequence(f, f_dim),
            fold.weight(w_in, w_in_dim),
            fold.sequence(d, d_dim),
            fold.weight(w_out, w_out_dim),
            reverse=reverse,
        )
        return fold.unfold(h)


class _MLPRecurrence(Function):
    @staticmethod
    def forward(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None) -> Tensor:
        h: Tensor = torch.ops.ssmrl.mlp_recurrence(c, w_in, b_in, w_out, keep)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w_in, b_in, w_out, keep = inputs
        ctx.save_for_backward(w_in, b_in, w_out, keep, output)
        ctx.save_for_forward(w_in, b_in, w_out, keep, output)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        w_in, b_in, w_out, keep, h = ctx.saved_tensors
        source, z, slope, d = _linearise(h, w_in, b_in, keep)
        adjoint = linear_recurrence(grad_h, w_out.mT, d, w_in.mT, reverse=True)
        _, target = sources_and_targets(adjoint, reverse=False)
        grad_a = matmul(target, w_out.mT) * slope
        return (
            adjoint,
            sum_of_outer_products(source, grad_a),
            grad_a.sum((-3, -2)),
            sum_of_outer_products(z, target),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dc: Tensor, dw_in: Tensor, db_in: Tensor, dw_out: Tensor, no_tangent: None) -> Tensor:
        w_in, b_in, w_out, keep, h = ctx.saved_tensors
        source, z, slope, d = _linearise(h, w_in, b_in, keep)
        da = matmul(source, dw_in) + db_in[..., None, None, :]
        drive = matmul(da * slope, w_out) + matmul(z, dw_out)
        return linear_recurrence(dc + _pad_to_targets(drive, reverse=False), w_in, d, w_out)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        c, w_in, b_in, w_out, keep = operands
        c_dim, w_in_dim, b_in_dim, w_out_dim, keep_dim = in_dims
        fold = Fold(info.batch_size, (w_in, b_in, w_out), (w_in_dim, b_in_dim, w_out_dim))
        h = mlp_recurrence(
            fold.sequence(c, c_dim),
            fold.weight(w_in, w_in_dim),
            fold.weight(b_in, b_in_dim),
            fold.weight(w_out, w_out_dim),
            None if keep is None else fold.sequence(keep, keep_dim),
        )
        return fold.unfold(h)


def _linearise(h: Tensor, w_in: Tensor, b_in: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At all steps: source state k ∘ h, z = relu(a), slope relu'(a), and coefficients d = k relu'(a)."""
    source, _ = sources_and_targets(h, reverse=False)
    if keep is not None:
        source = torch.where(keep, source, 0.0)
    z = (matmul(source, w_in) + b_in[..., None, None, :]).relu()
    # Piecewise constant, so cut out of every graph; sign is 5x faster than a comparison and a cast.
    slope = z.detach().sign()
    return source, z, slope, slope if keep is None else slope * keep


def _pad_to_targets(drive: Tensor, reverse: bool) -> Tensor:
    """(T, B, S) -> (T+1, B, S): zero where the recurrence starts."""
    return torch.nn.functional.pad(drive, (0, 0, 0, 0, 0, 1) if reverse else (0, 0, 0, 0, 1, 0))


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to target, in place, for (B, S) or (G, B, S)."""
    if target.dim() == 2:
        target.addmm_(left, right)
    else:
        target.baddbmm_(left, right)
