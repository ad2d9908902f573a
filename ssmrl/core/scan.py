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


# In the two Functions all operands, or none, may have a leading axis G: weights (G, S, H), sequences
# (G, T, B, S). Their vmap rules fold the mapped axis into B where the weights are shared and into G
# where they are not, so that the loop over time never sees more than these axes.


class _LinearRecurrence(Function):
    @staticmethod
    def forward(f: Tensor, w_in: Tensor, d: Tensor, w_out: Tensor, reverse: bool) -> Tensor:
        h, d = _time_major(f), _time_major(d)
        w_in, w_out = w_in.contiguous(), w_out.contiguous()
        h_at, d_at = h.unbind(0), d.unbind(0)
        steps = range(len(d_at))
        for t in reversed(steps) if reverse else steps:
            source, target = (h_at[t + 1], h_at[t]) if reverse else (h_at[t], h_at[t + 1])
            _add_product(target, torch.matmul(source, w_in).mul_(d_at[t]), w_out)
        return h.movedim(0, -3).contiguous()

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
        source, _ = _sources_and_targets(h, ctx.reverse)
        _, target = _sources_and_targets(adjoint, ctx.reverse)
        e = _matmul(source, w_in)
        k = _matmul(target, w_out.mT)
        return (
            adjoint,
            _sum_of_outer_products(source, d * k) if needs[1] else None,
            e * k if needs[2] else None,
            _sum_of_outer_products(d * e, target) if needs[3] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, df: Tensor, dw_in: Tensor, dd: Tensor, dw_out: Tensor, no_tangent: None) -> Tensor:
        w_in, d, w_out, h = ctx.saved_tensors
        source, _ = _sources_and_targets(h, ctx.reverse)
        e = _matmul(source, w_in)
        drive = _matmul(_matmul(source, dw_in) * d + e * dd, w_out) + _matmul(e * d, dw_out)
        df = df + _pad_to_targets(drive, ctx.reverse)
        return linear_recurrence(df, w_in, d, w_out, reverse=ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        f, w_in, d, w_out, reverse = operands
        f_dim, w_in_dim, d_dim, w_out_dim, _ = in_dims
        fold = _Fold(info.batch_size, (w_in, w_out), (w_in_dim, w_out_dim))
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
        h = _time_major(c)
        w_in, w_out, b_in = w_in.contiguous(), w_out.contiguous(), b_in.unsqueeze(-2)
        h_at = h.unbind(0)
        keep_at = None if keep is None else _time_major(keep).unbind(0)
        for t in range(len(h_at) - 1):
            source = h_at[t] if keep_at is None else torch.where(keep_at[t], h_at[t], 0.0)
            _add_product(h_at[t + 1], torch.matmul(source, w_in).add_(b_in).relu_(), w_out)
        return h.movedim(0, -3).contiguous()

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
        _, target = _sources_and_targets(adjoint, reverse=False)
        grad_a = _matmul(target, w_out.mT) * slope
        return (
            adjoint,
            _sum_of_outer_products(source, grad_a),
            grad_a.sum((-3, -2)),
            _sum_of_outer_products(z, target),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dc: Tensor, dw_in: Tensor, db_in: Tensor, dw_out: Tensor, no_tangent: None) -> Tensor:
        w_in, b_in, w_out, keep, h = ctx.saved_tensors
        source, z, slope, d = _linearise(h, w_in, b_in, keep)
        da = _matmul(source, dw_in) + db_in[..., None, None, :]
        drive = _matmul(da * slope, w_out) + _matmul(z, dw_out)
        return linear_recurrence(dc + _pad_to_targets(drive, reverse=False), w_in, d, w_out)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        c, w_in, b_in, w_out, keep = operands
        c_dim, w_in_dim, b_in_dim, w_out_dim, keep_dim = in_dims
        fold = _Fold(info.batch_size, (w_in, b_in, w_out), (w_in_dim, b_in_dim, w_out_dim))
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
    source, _ = _sources_and_targets(h, reverse=False)
    if keep is not None:
        source = torch.where(keep, source, 0.0)
    z = (_matmul(source, w_in) + b_in[..., None, None, :]).relu()
    # Piecewise constant, so cut out of every graph; sign is 5x faster than a comparison and a cast.
    slope = z.detach().sign()
    return source, z, slope, slope if keep is None else slope * keep


def _sources_and_targets(h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """States that steps 1..T start from and those that they lead to, (T, B, S) each."""
    early, late = h[..., :-1, :, :], h[..., 1:, :, :]
    return (late, early) if reverse else (early, late)


def _pad_to_targets(drive: Tensor, reverse: bool) -> Tensor:
    """(T, B, S) -> (T+1, B, S): zero where the recurrence starts."""
    return torch.nn.functional.pad(drive, (0, 0, 0, 0, 0, 1) if reverse else (0, 0, 0, 0, 1, 0))


def _time_major(sequence: Tensor) -> Tensor:
    """A contiguous copy with time first: small batched products are up to 8x faster on contiguous operands."""
    return sequence.movedim(-3, 0).clone(memory_format=torch.contiguous_format)


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to target, in place, for (B, S) or (G, B, S)."""
    if target.dim() == 2:
        target.addmm_(left, right)
    else:
        target.baddbmm_(left, right)


def _matmul(sequence: Tensor, weight: Tensor) -> Tensor:
    """(T, B, S) @ (S, H) -> (T, B, H) as one product with T folded into B."""
    product = torch.matmul(_fold_time(sequence), weight)
    return product.reshape(*sequence.shape[:-1], weight.shape[-1])


def _sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over T and B of left^T right: (T, B, S), (T, B, H) -> (S, H)."""
    return torch.matmul(_fold_time(left).mT, _fold_time(right))


def _fold_time(sequence: Tensor) -> Tensor:
    """(T, B, S) -> (T·B, S). A reshape, since `is_grads_batched` has no rule for `flatten`."""
    *groups, steps, batch, width = sequence.shape
    return sequence.reshape(*groups, steps * batch, width)


class _Fold:
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

    def sequence(self, sequence: Tensor, dim: int | None) -> Tensor:
        sequence = self._front(sequence, dim)
        if not self.into_groups:
            return sequence.movedim(0, -3).flatten(-3, -2)
        return sequence.flatten(0, 1) if self.has_groups else sequence

    def unfold(self, h: Tensor) -> tuple[Tensor, int]:
        """The result with the vmapped axis restored, and where it is."""
        if not self.into_groups:
            return h.unflatten(-2, (self.size, h.shape[-2] // self.size)), h.dim() - 2
        if not self.has_groups:
            return h, 0
        return h.unflatten(0, (self.size, h.shape[0] // self.size)), 0
