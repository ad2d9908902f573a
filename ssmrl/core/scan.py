"""Recurrences that are differentiable to every order and have their own vmap rule.

Letters: T steps, B sequences, S state, H hidden, G groups with weights of their own (tasks, under `vmap`).

`mlp_recurrence` is the recurrence of `StateSpaceModel`; `linear_recurrence` is its linearisation. The backward pass of
the first is the adjoint of the second, and the backward pass of that is the second again, so the two close the family:
every derivative is written with them and with products over all T at once. The hidden activations that a loop computes
on its way are its second output, which derivatives read instead of computing it again.
docs/recurrence.md has the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssmrl.core import native
from ssmrl.core.axes import (
    Fold,
    add,
    at_steps,
    check_operands,
    define_operation,
    empty_results,
    from_time_major,
    matmul,
    over_steps,
    pad_to_targets,
    sizes,
    sources,
    sum_of_outer_products,
    sum_of_rows,
    targets,
    time_major,
    with_signature,
)

__all__ = ["linear_recurrence", "mlp_recurrence"]


def mlp_recurrence(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None = None) -> Tensor:
    """Solve h_0 = c_0, z_t = relu((k_t ∘ h_{t-1}) W_in + b_in), h_t = z_t W_out + c_t for t = 1..T.

    Args:
        c: (T+1, B, S) the initial state c_0 and what is added at every step.
        w_in: (S, H).
        b_in: (H,).
        w_out: (H, S).
        keep: Bool (T, B, 1). Where it is False k_t = 0: step t starts from the zero state, whatever
            h_{t-1} was, NaN included.

    Returns:
        h: (T+1, B, S), differentiable to every order in every floating-point argument.

    Raises:
        ValueError: shapes that do not fit, or another dtype or device than that of c.
    """
    states, batch, state = sizes("c", c, "T+1, B, S")
    _, hidden = sizes("w_in", w_in, "S, H")
    check_operands(c, w_in=(w_in, (state, hidden)), b_in=(b_in, (hidden,)), w_out=(w_out, (hidden, state)))
    check_operands(c, keep=(keep, (states - 1, batch, 1)))
    h: Tensor
    h, _ = _MLPRecurrence.apply(c, w_in, b_in, w_out, keep)
    return h


def linear_recurrence(
    f: Tensor,
    a: Tensor | None,
    z: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    keep: Tensor | None = None,
    *,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Solve h_0 = f_0, p_t = ((k_t ∘ h_{t-1}) W_in + a_t) ∘ relu'(z_t), h_t = p_t W_out + f_t for t = 1..T.

    This is `mlp_recurrence` linearised where its hidden activations are z, or the adjoint of that.

    Args:
        f: (T+1, B, S) the initial state f_0 and what is added at every step.
        a: (T, B, H) what is added before the slope at every step; None: nothing.
        z: (T, B, H) whose signs give the slopes relu'(z_t), 1 or 0; has no derivative.
        w_in: (S, H).
        w_out: (H, S).
        keep: Bool (T, B, 1), as for `mlp_recurrence`.
        adjoint: solve from the other end, with transposed weights in each other's place:
            h_T = f_T, p_t = (h_t W_out^T + a_t) ∘ relu'(z_t), h_{t-1} = k_t ∘ (p_t W_in^T) + f_{t-1}.

    Returns:
        h: (T+1, B, S) and p: (T, B, H), differentiable to every order in f, a, w_in and w_out.

    Raises:
        ValueError: shapes that do not fit, or another dtype or device than that of f.
    """
    states, batch, state = sizes("f", f, "T+1, B, S")
    _, hidden = sizes("w_in", w_in, "S, H")
    of_steps = (states - 1, batch, hidden)
    check_operands(f, a=(a, of_steps), z=(z, of_steps), w_in=(w_in, (state, hidden)), w_out=(w_out, (hidden, state)))
    check_operands(f, keep=(keep, (states - 1, batch, 1)))
    h, p = _LinearRecurrence.apply(f, a, z, w_in, w_out, keep, adjoint)
    return h, p


# The loops over time, without derivatives. As operations of their own a trace records each as one node, whatever T is.


def _solve_mlp(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    results = empty_results(c, w_in.shape[-1])
    if native.run("mlp", (c, w_in, b_in, w_out, keep), results):
        return results
    h = time_major(c, w_in, copy=True)
    z = h.new_empty(len(h) - 1, *h.shape[1:-1], w_in.shape[-1])
    w_in, w_out, b_in = w_in.contiguous(), w_out.contiguous(), b_in.unsqueeze(-2).expand(z.shape[1:])
    h_at, z_at, keep_at = h.unbind(0), z.unbind(0), at_steps(keep, w_in)
    for t, z_t in enumerate(z_at):
        source = h_at[t] if keep_at is None else torch.where(keep_at[t], h_at[t], 0.0)
        _product(b_in, source, w_in, out=z_t).relu_()
        _product(h_at[t + 1], z_t, w_out, out=h_at[t + 1])
    return from_time_major(h, c), from_time_major(z, c)


def _solve_linear(
    f: Tensor, a: Tensor | None, z: Tensor, w_in: Tensor, w_out: Tensor, keep: Tensor | None, adjoint: bool
) -> tuple[Tensor, Tensor]:
    results, kernel = empty_results(f, z.shape[-1]), "linear_adjoint" if adjoint else "linear_forward"
    if native.run(kernel, (f, a, z, w_in, w_out, keep), results):
        return results
    first, second = (w_out.mT, w_in.mT) if adjoint else (w_in, w_out)
    h = time_major(f, w_in, copy=True)
    slope = time_major(z, w_in).sign()
    first, second = first.contiguous(), second.contiguous()
    p = torch.empty_like(slope) if a is None else time_major(a, w_in, copy=True)
    h_at, p_at, slope_at, keep_at = h.unbind(0), p.unbind(0), slope.unbind(0), at_steps(keep, w_in)
    steps = range(len(p_at))
    for t in reversed(steps) if adjoint else steps:
        source, target = (h_at[t + 1], h_at[t]) if adjoint else (h_at[t], h_at[t + 1])
        if keep_at is not None and not adjoint:
            source = torch.where(keep_at[t], source, 0.0)
        p_t = _product(None if a is None else p_at[t], source, first, out=p_at[t]).mul_(slope_at[t])
        if keep_at is not None and adjoint:
            target.add_(torch.where(keep_at[t], torch.matmul(p_t, second), 0.0))
        else:
            _product(target, p_t, second, out=target)
    return from_time_major(h, f), from_time_major(p, f)


def _product(start: Tensor | None, left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """Write start + left @ right into `out`, for (B, S) or (G, B, S)."""
    if start is None:
        return torch.matmul(left, right, out=out)
    if left.dim() == 2:
        return torch.addmm(start, left, right, out=out)
    return torch.baddbmm(start, left, right, out=out)


define_operation(
    "mlp_recurrence(Tensor c, Tensor w_in, Tensor b_in, Tensor w_out, Tensor? keep) -> (Tensor, Tensor)",
    _solve_mlp,
    lambda c, w_in, *others: empty_results(c, w_in.shape[-1]),
)
define_operation(
    "linear_recurrence(Tensor f, Tensor? a, Tensor z, Tensor w_in, Tensor w_out, Tensor? keep, bool adjoint)"
    " -> (Tensor, Tensor)",
    _solve_linear,
    lambda f, a, z, *others: empty_results(f, z.shape[-1]),
)


# In the two Functions sequences may have a leading axis G, (G, T, B, S), and then weights too, (G, S, H). Their vmap
# rules fold a mapped axis into these, so that the loop over time never sees more.


@with_signature
class _MLPRecurrence(Function):
    @staticmethod
    def forward(c: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        h, z = torch.ops.ssmrl.mlp_recurrence(c, w_in, b_in, w_out, keep)
        return h, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, w_in, _, w_out, keep = inputs
        ctx.save_for_backward(w_in, w_out, keep, *output)
        ctx.save_for_forward(w_in, w_out, keep, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        w_in, w_out, keep, h, z = ctx.saved_tensors
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h
        adjoint, p = _LinearRecurrence.apply(grad_h, grad_z, z, w_in, w_out, keep, True)
        source, target = sources(h, keep), targets(adjoint)
        return (
            adjoint,
            sum_of_outer_products(source, p, w_in),
            sum_of_rows(p, w_in),
            sum_of_outer_products(z, target, w_out),
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, dc: Tensor | None, dw_in: Tensor | None, db_in: Tensor | None, dw_out: Tensor | None, dkeep: None
    ) -> tuple[Tensor, Tensor]:
        w_in, w_out, keep, h, z = ctx.saved_tensors
        a = None if dw_in is None else matmul(sources(h, keep), dw_in)
        a = add(a, None if db_in is None else over_steps(db_in).expand_as(z))
        drive = None if dw_out is None else pad_to_targets(matmul(z, dw_out), adjoint=False)
        df = add(dc, drive)
        dh, dz = _LinearRecurrence.apply(torch.zeros_like(h) if df is None else df, a, z, w_in, w_out, keep, False)
        return dh, dz

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        c, w_in, b_in, w_out, keep = operands
        c_dim, w_in_dim, b_in_dim, w_out_dim, keep_dim = in_dims
        fold = Fold(info.batch_size, c, c_dim, (w_in, b_in, w_out), (w_in_dim, b_in_dim, w_out_dim))
        results = _MLPRecurrence.apply(
            fold.sequence(c, c_dim),
            fold.weight(w_in, w_in_dim),
            fold.weight(b_in, b_in_dim),
            fold.weight(w_out, w_out_dim),
            fold.optional(keep, keep_dim),
        )
        return fold.unfold(*results)


@with_signature
class _LinearRecurrence(Function):
    @staticmethod
    def forward(
        f: Tensor, a: Tensor | None, z: Tensor, w_in: Tensor, w_out: Tensor, keep: Tensor | None, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        h, p = torch.ops.ssmrl.linear_recurrence(f, a, z, w_in, w_out, keep, adjoint)
        return h, p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, z, w_in, w_out, keep, ctx.adjoint = inputs
        ctx.save_for_backward(z, w_in, w_out, keep, *output)
        ctx.save_for_forward(z, w_in, w_out, keep, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_p: Tensor | None) -> tuple[Tensor | None, ...]:
        z, w_in, w_out, keep, h, p = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h
        other_h, other_p = _LinearRecurrence.apply(grad_h, grad_p, z, w_in, w_out, keep, not ctx.adjoint)
        if ctx.adjoint:
            (h, p), (mu, q) = (other_h, other_p), (h, p)
        else:
            mu, q = other_h, other_p
        return (
            other_h,
            other_p if needs[1] else None,
            None,
            sum_of_outer_products(sources(h, keep), q, w_in) if needs[3] else None,
            sum_of_outer_products(p, targets(mu), w_out) if needs[4] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        df: Tensor | None,
        da: Tensor | None,
        dz: None,
        dw_in: Tensor | None,
        dw_out: Tensor | None,
        *others: None,
    ) -> tuple[Tensor, Tensor]:
        z, w_in, w_out, keep, h, p = ctx.saved_tensors
        if ctx.adjoint:
            a = None if dw_out is None else matmul(targets(h), dw_out.mT)
            drive = None if dw_in is None else matmul(p, dw_in.mT)
            drive = drive if drive is None or keep is None else torch.where(keep, drive, 0.0)
        else:
            a = None if dw_in is None else matmul(sources(h, keep), dw_in)
            drive = None if dw_out is None else matmul(p, dw_out)
        df = add(df, None if drive is None else pad_to_targets(drive, ctx.adjoint))
        df = torch.zeros_like(h) if df is None else df
        dh, dp = _LinearRecurrence.apply(df, add(a, da), z, w_in, w_out, keep, ctx.adjoint)
        return dh, dp

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        f, a, z, w_in, w_out, keep, adjoint = operands
        f_dim, a_dim, z_dim, w_in_dim, w_out_dim, keep_dim, _ = in_dims
        fold = Fold(info.batch_size, f, f_dim, (w_in, w_out), (w_in_dim, w_out_dim))
        results = _LinearRecurrence.apply(
            fold.sequence(f, f_dim),
            fold.optional(a, a_dim),
            fold.sequence(z, z_dim),
            fold.weight(w_in, w_in_dim),
            fold.weight(w_out, w_out_dim),
            fold.optional(keep, keep_dim),
            adjoint,
        )
        return fold.unfold(*results)
