"""The recurrence with a complex diagonal transition, differentiable to every order, with its own vmap rule.

Letters: T steps, B sequences, S complex states, G groups with transitions of their own (tasks, under `vmap`).
A complex number is a pair of real ones on an axis of size 2; inside, states are (T+1, B, 2·S), first all real parts.

The adjoint of the recurrence is the same one from the other end with the conjugate transition, so it closes the family
by itself: every derivative is written with it and with products over all T at once. docs/recurrence.md has the
derivation.
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
    check_operands,
    define_operation,
    from_time_major,
    pad_to_targets,
    sizes,
    sources,
    targets,
    time_major,
    with_signature,
)

__all__ = ["diagonal_recurrence"]


def diagonal_recurrence(a: Tensor, f: Tensor, keep: Tensor | None = None, *, adjoint: bool = False) -> Tensor:
    """Solve h_0 = f_0, h_t = a ∘ (k_t h_{t-1}) + f_t for t = 1..T, with complex numbers as real pairs.

    Args:
        a: (2, S) real and imaginary parts. If its modulus is above 1, its powers up to the T-th must be finite: where
            the loop is not in C++, they are computed.
        f: (T+1, B, 2, S) the initial state f_0 and the input of every step.
        keep: Bool (T, B). Where it is False k_t = 0: step t starts from the zero state, whatever h_{t-1} was,
            NaN included.
        adjoint: solve from the other end, with the conjugate of a: h_T = f_T, h_{t-1} = k_t (a* ∘ h_t) + f_{t-1}.

    Returns:
        h: (T+1, B, 2, S), differentiable to every order in a and f.

    Raises:
        ValueError: shapes that do not fit, or another dtype or device than that of f.
    """
    states, batch, _, state = sizes("f", f, "T+1, B, 2, S")
    check_operands(f, f=(f, (states, batch, 2, state)), a=(a, (2, state)), keep=(keep, (states - 1, batch)))
    keep = None if keep is None else keep.unsqueeze(-1)
    h: Tensor = _Diagonal.apply(a, f.reshape(states, batch, 2 * state), keep, adjoint)
    return h.view(states, batch, 2, state)


# Without derivatives. As an operation of its own a trace records it as one node, whatever T is.


def _solve(a: Tensor, f: Tensor, keep: Tensor | None, adjoint: bool) -> Tensor:
    h = _like(a, f, keep, adjoint)
    if native.run("diagonal_adjoint" if adjoint else "diagonal_forward", (a, f, keep), (h,)):
        return h
    f_at = _pairs(time_major(f, a))
    keep_at = None if keep is None else time_major(keep, a).unsqueeze(-1)
    own = a if a.dim() == 2 else a[:, None]
    if adjoint:
        re, im = own.unbind(-2)
        own, f_at = torch.stack([re, -im], -2), f_at.flip(0)
        keep_at = None if keep_at is None else keep_at.flip(0)
    # An entry for f_0 too, which is not read.
    keep_at = None if keep_at is None else torch.cat([torch.ones_like(keep_at[:1]), keep_at])
    h_at = _solve_by_pairs(own, f_at, keep_at)
    return from_time_major((h_at.flip(0) if adjoint else h_at).flatten(-2), f)


def _solve_by_pairs(a: Tensor, f: Tensor, keep: Tensor | None) -> Tensor:
    """The solution in O(T) work and 2 log2 T rounds of operations on all T at once.

    Two steps of the recurrence are one step of another, with a² for a and a f_{2i} + f_{2i+1} for f: that one, half
    as long, gives every second h, and one more product gives the others (Blelloch 1990, "Prefix Sums and Their
    Applications", https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf).
    """
    if len(f) == 1:
        return f.clone()
    even, odd = f[0::2], f[1::2]
    num_pairs = len(odd)
    if keep is None:
        keep_odd = keep_even = keep_pair = None
    else:
        keep_odd, keep_even = keep[1::2], keep[2::2]
        keep_pair = keep[0::2][:num_pairs] & keep_odd
    h_odd = _solve_by_pairs(_multiply(a, a), _advance(a, even[:num_pairs], odd, keep_odd), keep_pair)
    h_even = torch.cat([even[:1], _advance(a, h_odd[: len(even) - 1], even[1:], keep_even)])
    pairs = torch.stack([h_even[:num_pairs], h_odd], 1).reshape(2 * num_pairs, *f.shape[1:])
    return pairs if len(even) == num_pairs else torch.cat([pairs, h_even[num_pairs:]])


def _advance(a: Tensor, h: Tensor, f: Tensor, keep: Tensor | None) -> Tensor:
    """One step, a ∘ (k h) + f."""
    return _multiply(a, h if keep is None else torch.where(keep, h, 0.0)) + f


def _like(a: Tensor, f: Tensor, keep: Tensor | None, adjoint: bool) -> Tensor:
    return torch.empty_like(f, memory_format=torch.contiguous_format)


define_operation("diagonal_recurrence(Tensor a, Tensor f, Tensor? keep, bool adjoint) -> Tensor", _solve, _like)


# In the Function sequences may have a leading axis G, (G, T, B, 2·S), and then a too, (G, 2, S). Its vmap rule folds a
# mapped axis into these.


@with_signature
class _Diagonal(Function):
    @staticmethod
    def forward(a: Tensor, f: Tensor, keep: Tensor | None, adjoint: bool) -> Tensor:
        h: Tensor = torch.ops.ssmrl.diagonal_recurrence(a, f, keep, adjoint)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, keep, ctx.adjoint = inputs
        ctx.save_for_backward(a, keep, output)
        ctx.save_for_forward(a, keep, output)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        a, keep, solution = ctx.saved_tensors
        other = _Diagonal.apply(a, grad_h, keep, not ctx.adjoint)
        h, mu = (other, solution) if ctx.adjoint else (solution, other)
        grad_a = _sum_of_conjugate_products(sources(h, keep), targets(mu), a) if ctx.needs_input_grad[0] else None
        return grad_a, other, None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, df: Tensor | None, *_: None) -> Tensor:
        a, keep, h = ctx.saved_tensors
        drive = None
        if da is not None and ctx.adjoint:
            drive = _times(da, targets(h), conjugate=True)
            drive = drive if keep is None else torch.where(keep, drive, 0.0)
        elif da is not None:
            drive = _times(da, sources(h, keep), conjugate=False)
        df = add(df, None if drive is None else pad_to_targets(drive, ctx.adjoint))
        dh: Tensor = _Diagonal.apply(a, torch.zeros_like(h) if df is None else df, keep, ctx.adjoint)
        return dh

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        a, f, keep, adjoint = operands
        a_dim, f_dim, keep_dim, _ = in_dims
        fold = Fold(info.batch_size, f, f_dim, (a,), (a_dim,))
        h = _Diagonal.apply(fold.weight(a, a_dim), fold.sequence(f, f_dim), fold.optional(keep, keep_dim), adjoint)
        (h,), (dim,) = fold.unfold(h)
        return h, dim


def _pairs(h: Tensor) -> Tensor:
    """(..., 2·S) -> (..., 2, S)."""
    return h.reshape(*h.shape[:-1], 2, h.shape[-1] // 2)


def _multiply(a: Tensor, h: Tensor, *, conjugate: bool = False) -> Tensor:
    """The complex product of (..., 2, S), or of its conjugate, and (..., 2, S)."""
    (a_re, a_im), (re, im) = a.unbind(-2), h.unbind(-2)
    if conjugate:
        return torch.stack([a_re * re + a_im * im, a_re * im - a_im * re], -2)
    return torch.stack([a_re * re - a_im * im, a_re * im + a_im * re], -2)


def _times(a: Tensor, h: Tensor, *, conjugate: bool) -> Tensor:
    """The product of (2, S), or (G, 2, S), or of its conjugate, and (T, B, 2·S)."""
    product = _multiply(a if a.dim() == 2 else a[:, None, None], _pairs(h), conjugate=conjugate)
    return product.reshape(h.shape)


def _sum_of_conjugate_products(left: Tensor, right: Tensor, a: Tensor) -> Tensor:
    """Sum of left* ∘ right over T, B and the groups that share a: (T, B, 2·S) -> (2, S), like a."""
    rows = (-1, *a.shape[-2:]) if a.dim() == 2 else (len(a), -1, *a.shape[-2:])
    return _multiply(left.reshape(rows), right.reshape(rows), conjugate=True).sum(-3)
