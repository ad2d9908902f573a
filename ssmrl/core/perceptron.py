"""The perceptron relu(x W_in + b) W_out + f as an operation, differentiable to every order, with its own vmap rule.

Letters: T steps, B sequences, S inputs, H hidden, O outputs, G groups.

The relations are those of `ssmrl.core.scan` without the recurrence: `linear_perceptron` is the perceptron linearised,
the backward pass of either is `linear_perceptron` with transposed weights, and the hidden activations are a second
output, which derivatives read. So nothing of width H is computed twice, and bias, slope and sums cost no pass through
memory.
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
    matmul,
    over_steps,
    sizes,
    sum_of_outer_products,
    sum_of_rows,
    with_signature,
)

__all__ = ["linear_perceptron", "perceptron"]


def perceptron(x: Tensor, f: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """Compute z = relu(x W_in + b_in), y = z W_out + f.

    Args:
        x: (T, B, S).
        f: (T, B, O).
        w_in: (S, H).
        b_in: (H,).
        w_out: (H, O).

    Returns:
        y: (T, B, O), differentiable to every order in every argument.

    Raises:
        ValueError: shapes that do not fit, or another dtype or device than that of x.
    """
    steps, batch, state = sizes("x", x, "T, B, S")
    hidden, outputs = sizes("w_out", w_out, "H, O")
    check_operands(x, f=(f, (steps, batch, outputs)), w_in=(w_in, (state, hidden)), b_in=(b_in, (hidden,)))
    check_operands(x, w_out=(w_out, (hidden, outputs)))
    y: Tensor
    y, _ = _Perceptron.apply(x, f, w_in, b_in, w_out)
    return y


def linear_perceptron(x: Tensor, a: Tensor | None, z: Tensor, w_1: Tensor, w_2: Tensor) -> tuple[Tensor, Tensor]:
    """Compute p = (x W_1 + a) ∘ relu'(z), y = p W_2: `perceptron` linearised where its hidden activations are z.

    Args:
        x: (T, B, S).
        a: (T, B, H); None: nothing.
        z: (T, B, H) whose signs give the slopes, 1 or 0; has no derivative.
        w_1: (S, H).
        w_2: (H, O).

    Returns:
        y: (T, B, O) and p: (T, B, H), differentiable to every order in x, a, w_1 and w_2.

    Raises:
        ValueError: shapes that do not fit, or another dtype or device than that of x.
    """
    steps, batch, state = sizes("x", x, "T, B, S")
    hidden, outputs = sizes("w_2", w_2, "H, O")
    of_steps = (steps, batch, hidden)
    check_operands(x, a=(a, of_steps), z=(z, of_steps), w_1=(w_1, (state, hidden)), w_2=(w_2, (hidden, outputs)))
    y, p = _LinearPerceptron.apply(x, a, z, w_1, w_2)
    return y, p


# Without derivatives, and for a trace one node each.


def _compute(x: Tensor, f: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    results = _describe(x, w_in, w_out)
    if native.run("perceptron", (x, f, w_in, b_in, w_out), results):
        return results
    z = (matmul(x, w_in) + over_steps(b_in)).relu_()
    return matmul(z, w_out) + f, z


def _compute_linear(x: Tensor, a: Tensor | None, z: Tensor, w_1: Tensor, w_2: Tensor) -> tuple[Tensor, Tensor]:
    results = _describe(x, w_1, w_2)
    if native.run("linear_perceptron", (x, a, z, w_1, w_2), results):
        return results
    p = matmul(x, w_1)
    p = (p if a is None else p + a) * z.sign()
    return matmul(p, w_2), p


def _describe(x: Tensor, w_1: Tensor, w_2: Tensor) -> tuple[Tensor, Tensor]:
    """Empty results."""
    return x.new_empty(*x.shape[:-1], w_2.shape[-1]), x.new_empty(*x.shape[:-1], w_1.shape[-1])


define_operation(
    "perceptron(Tensor x, Tensor f, Tensor w_in, Tensor b_in, Tensor w_out) -> (Tensor, Tensor)",
    _compute,
    lambda x, f, w_in, b_in, w_out: _describe(x, w_in, w_out),
)
define_operation(
    "linear_perceptron(Tensor x, Tensor? a, Tensor z, Tensor w_1, Tensor w_2) -> (Tensor, Tensor)",
    _compute_linear,
    lambda x, a, z, w_1, w_2: _describe(x, w_1, w_2),
)


# As in scan.py sequences may have a leading axis G, and then weights too.


@with_signature
class _Perceptron(Function):
    @staticmethod
    def forward(x: Tensor, f: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        y, z = torch.ops.ssmrl.perceptron(x, f, w_in, b_in, w_out)
        return y, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, w_in, _, w_out = inputs
        ctx.save_for_backward(x, w_in, w_out, output[1])
        ctx.save_for_forward(x, w_in, w_out, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, z = ctx.saved_tensors
        if grad_y is None:
            grad_y = z.new_zeros(*z.shape[:-1], w_out.shape[-1])
        grad_x, p = _LinearPerceptron.apply(grad_y, grad_z, z, w_out.mT, w_in.mT)
        return (
            grad_x,
            grad_y,
            sum_of_outer_products(x, p, w_in),
            sum_of_rows(p, w_in),
            sum_of_outer_products(z, grad_y, w_out),
        )

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        df: Tensor | None,
        dw_in: Tensor | None,
        db_in: Tensor | None,
        dw_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, w_in, w_out, z = ctx.saved_tensors
        a = None if dw_in is None else matmul(x, dw_in)
        a = add(a, None if db_in is None else over_steps(db_in).expand_as(z))
        dy, dz = _LinearPerceptron.apply(torch.zeros_like(x) if dx is None else dx, a, z, w_in, w_out)
        for term in (df, None if dw_out is None else matmul(z, dw_out)):
            dy = dy if term is None else dy + term
        return dy, dz

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        x, f, w_in, b_in, w_out = operands
        x_dim, f_dim, w_in_dim, b_in_dim, w_out_dim = in_dims
        fold = Fold(info.batch_size, x, x_dim, (w_in, b_in, w_out), (w_in_dim, b_in_dim, w_out_dim))
        results = _Perceptron.apply(
            fold.sequence(x, x_dim),
            fold.sequence(f, f_dim),
            fold.weight(w_in, w_in_dim),
            fold.weight(b_in, b_in_dim),
            fold.weight(w_out, w_out_dim),
        )
        return fold.unfold(*results)


@with_signature
class _LinearPerceptron(Function):
    @staticmethod
    def forward(x: Tensor, a: Tensor | None, z: Tensor, w_1: Tensor, w_2: Tensor) -> tuple[Tensor, Tensor]:
        y, p = torch.ops.ssmrl.linear_perceptron(x, a, z, w_1, w_2)
        return y, p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, z, w_1, w_2 = inputs
        ctx.save_for_backward(x, z, w_1, w_2, output[1])
        ctx.save_for_forward(x, z, w_1, w_2, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_p: Tensor | None) -> tuple[Tensor | None, ...]:
        x, z, w_1, w_2, p = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad_y is None:
            grad_y = z.new_zeros(*z.shape[:-1], w_2.shape[-1])
        grad_x, q = _LinearPerceptron.apply(grad_y, grad_p, z, w_2.mT, w_1.mT)
        return (
            grad_x,
            q if needs[1] else None,
            None,
            sum_of_outer_products(x, q, w_1) if needs[3] else None,
            sum_of_outer_products(p, grad_y, w_2) if needs[4] else None,
        )

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, da: Tensor | None, dz: None, dw_1: Tensor | None, dw_2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, z, w_1, w_2, p = ctx.saved_tensors
        da = add(da, None if dw_1 is None else matmul(x, dw_1))
        dy, dp = _LinearPerceptron.apply(torch.zeros_like(x) if dx is None else dx, da, z, w_1, w_2)
        return dy if dw_2 is None else dy + matmul(p, dw_2), dp

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        x, a, z, w_1, w_2 = operands
        x_dim, a_dim, z_dim, w_1_dim, w_2_dim = in_dims
        fold = Fold(info.batch_size, x, x_dim, (w_1, w_2), (w_1_dim, w_2_dim))
        results = _LinearPerceptron.apply(
            fold.sequence(x, x_dim),
            fold.optional(a, a_dim),
            fold.sequence(z, z_dim),
            fold.weight(w_1, w_1_dim),
            fold.weight(w_2, w_2_dim),
        )
        return fold.unfold(*results)
