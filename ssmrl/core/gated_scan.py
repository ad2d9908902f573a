"""Recurrences of gated cells (GRU, LSTM), differentiable to every order, with their own vmap rule.

Letters: T steps, B sequences, S width of a block; n state blocks, m product blocks, k input blocks; G groups.

A gated cell is elementwise around one matrix product: v_t = cell(v_{t-1}, u_t, x_t), u_t = h_{t-1} W + b, where the
state v is n blocks of width S, the first of which is h. Linearised, it is

    u_t = h_{t-1} W + e_t,   v_t = A_t v_{t-1} + D_t u_t + f_t

with elementwise block coefficients A_t (n × n) and D_t (n × m). The adjoint of that is a recurrence of the mirrored
form, and the adjoint of the mirrored one is the first again. The products u are a second output, which derivatives read
instead of computing them again: docs/recurrence.md has the derivation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, pad

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

__all__ = ["GatedCell", "RecurrentWeights", "define_cell", "gated_linear_recurrence", "gated_recurrence"]


class GatedCell(Protocol):
    """The elementwise part of a cell; pure functions of tensors with any leading axes."""

    name: str
    """Of its operation `torch.ops.ssmrl.<name>_recurrence`, which `define_cell` makes."""
    blocks: tuple[int, int, int]
    """n, m and k: of the state, of the product and of the input."""

    def step(self, v: Tensor, u: Tensor, x: Tensor) -> Tensor:
        """The next state (..., n·S), of the state (..., n·S), the product (..., m·S) and the input (..., k·S)."""

    def linearise(self, v: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of `step` by v, u and x: (..., n·n·S), (..., n·m·S), (..., n·k·S), blocks in row-major order."""


def gated_recurrence(cell: GatedCell, start: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    """Solve v_0 = start, v_t = cell.step(k_t v_{t-1}, (k_t h_{t-1}) W + b, x_t) for t = 1..T.

    Args:
        cell: the elementwise part.
        start: (1, B, n·S) the initial state.
        x: (T, B, k·S) the inputs of every step.
        w: (S, m·S).
        b: (m·S,).
        keep: Bool (T, B, 1); where it is False k_t = 0: step t starts from the zero state. None: 1 everywhere.

    Returns:
        v: (T+1, B, n·S), differentiable to every order in every floating-point argument.

    Raises:
        ValueError: shapes that do not fit each other, or another dtype or device than that of x.
    """
    n, m, k = cell.blocks
    steps, batch, _ = sizes("x", x, "T, B, k·S")
    width, _ = sizes("w", w, "S, m·S")
    check_operands(x, start=(start, (1, batch, n * width)), x=(x, (steps, batch, k * width)), w=(w, (width, m * width)))
    check_operands(x, b=(b, (m * width,)), keep=(keep, (steps, batch, 1)))
    v: Tensor
    v, _ = _Gated.apply(cell, start, x, w, b, keep)
    return v


def gated_linear_recurrence(
    f: Tensor, e: Tensor | None, a: Tensor, d: Tensor, w: Tensor, keep: Tensor | None = None, *, adjoint: bool = False
) -> tuple[Tensor, Tensor]:
    """Solve v_0 = f_0, u_t = (k_t h_{t-1}) W + e_t, v_t = A_t k_t v_{t-1} + D_t u_t + f_t for t = 1..T, or the adjoint.

    Args:
        f: (T+1, B, n·S) the initial state f_0 and the input of every step.
        e: (T, B, m·S) what is added to the products; None: nothing.
        a: (T, B, n·n·S) the coefficients A_1..A_T.
        d: (T, B, n·m·S) the coefficients D_1..D_T.
        w: (S, m·S).
        keep: Bool (T, B, 1), as for `gated_recurrence`.
        adjoint: solve v_T = f_T, u_t = D_t^T v_t + e_t, v_{t-1} = k_t (A_t^T v_t + P u_t W^T) + f_{t-1}, where P puts a
            block in the place of h.

    Returns:
        v: (T+1, B, n·S) and u: (T, B, m·S), differentiable to every order in every floating-point argument.

    Raises:
        ValueError: shapes that do not fit each other, or another dtype or device than that of f.
    """
    states, batch, of_state = sizes("f", f, "T+1, B, n·S")
    width, of_product = sizes("w", w, "S, m·S")
    if width == 0 or of_state % width or of_product % width:
        raise ValueError(
            f"f and w must have whole blocks of width S = {width}; got {tuple(f.shape)} and {tuple(w.shape)}."
        )
    n, m = of_state // width, of_product // width
    of_steps = (states - 1, batch)
    check_operands(
        f, e=(e, (*of_steps, of_product)), a=(a, (*of_steps, n * of_state)), d=(d, (*of_steps, n * of_product))
    )
    check_operands(f, w=(w, (width, m * width)), keep=(keep, (*of_steps, 1)))
    v, u = _GatedLinear.apply(f, e, a, d, w, keep, adjoint)
    return v, u


# The loops over time, without derivatives. As operations of their own a trace records each as one node, whatever T is.


def _solve_linear(
    f: Tensor, e: Tensor | None, a: Tensor, d: Tensor, w: Tensor, keep: Tensor | None, adjoint: bool
) -> tuple[Tensor, Tensor]:
    width, m = w.shape[-2], w.shape[-1] // w.shape[-2]
    results, kernel = empty_results(f, m * width), "gated_adjoint" if adjoint else "gated_forward"
    if native.run(kernel, (f, e, a, d, w, keep), results):
        return results
    w = w.mT if adjoint else w
    v, w = time_major(f, w, copy=True), w.contiguous()
    a_at, d_at = time_major(a, w).unbind(0), time_major(d, w).unbind(0)
    e_at, keep_at = at_steps(e, w), at_steps(keep, w)
    steps = range(len(v) - 1)
    u_at = [v.new_empty(0)] * len(steps)
    for t in reversed(steps) if adjoint else steps:
        if adjoint:
            u_at[t] = _mix_transposed(d_at[t], v[t + 1], width)
            u_at[t] = u_at[t] if e_at is None else u_at[t] + e_at[t]
            into = _mix_transposed(a_at[t], v[t + 1], width)
            _h(into, width).add_(torch.matmul(u_at[t], w))
            v[t].add_(into if keep_at is None else torch.where(keep_at[t], into, 0.0))
        else:
            source = v[t] if keep_at is None else torch.where(keep_at[t], v[t], 0.0)
            u_at[t] = torch.matmul(_h(source, width), w)
            u_at[t] = u_at[t] if e_at is None else u_at[t].add_(e_at[t])
            v[t + 1].add_(_mix(a_at[t], source, width)).add_(_mix(d_at[t], u_at[t], width))
    return from_time_major(v, f), from_time_major(torch.stack(u_at), f) if u_at else results[1]


define_operation(
    "gated_linear_recurrence(Tensor f, Tensor? e, Tensor a, Tensor d, Tensor w, Tensor? keep, bool adjoint)"
    " -> (Tensor, Tensor)",
    _solve_linear,
    lambda f, e, a, d, w, *others: empty_results(f, w.shape[-1]),
)


def define_cell(cell: GatedCell) -> None:
    """Make the loop over time of a cell an operation of its own, so that `gated_recurrence` takes it."""

    def describe(start: Tensor, x: Tensor, w: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *groups, steps, batch, _ = x.shape
        return x.new_empty(*groups, steps + 1, batch, start.shape[-1]), x.new_empty(*groups, steps, batch, w.shape[-1])

    def solve(start: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        width, results = w.shape[-2], describe(start, x, w)
        if native.run(cell.name, (start, x, w, b, keep), results):
            return results
        bias, w = b.unsqueeze(-2), w.contiguous()
        v_at, x_at = [time_major(start, w)[0]], time_major(x, w).unbind(0)
        keep_at = at_steps(keep, w)
        u_at = []
        for t in range(len(x_at)):
            source = v_at[t] if keep_at is None else torch.where(keep_at[t], v_at[t], 0.0)
            u_at.append(torch.matmul(_h(source, width), w).add_(bias))
            v_at.append(cell.step(source, u_at[t], x_at[t]))
        u = from_time_major(torch.stack(u_at), start) if u_at else results[1]
        return from_time_major(torch.stack(v_at), start), u

    schema = f"{cell.name}_recurrence(Tensor start, Tensor x, Tensor w, Tensor b, Tensor? keep) -> (Tensor, Tensor)"
    define_operation(schema, solve, describe)


@with_signature
class _Gated(Function):
    @staticmethod
    def forward(
        cell: GatedCell, start: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        v, u = getattr(torch.ops.ssmrl, f"{cell.name}_recurrence")(start, x, w, b, keep)
        return v, u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.cell, _, x, w, _, keep = inputs
        ctx.save_for_backward(x, w, keep, *output)
        ctx.save_for_forward(x, w, keep, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, keep, v, u = ctx.saved_tensors
        width, source = w.shape[-2], sources(v, keep)
        a, d, e = ctx.cell.linearise(source, u, x)
        grad_v = torch.zeros_like(v) if grad_v is None else grad_v
        adjoint, grad_u = _GatedLinear.apply(grad_v, grad_u, a, d, w, keep, True)
        return (
            None,
            adjoint[..., :1, :, :],
            _mix_transposed(e, targets(adjoint), width) if ctx.needs_input_grad[2] else None,
            sum_of_outer_products(_h(source, width), grad_u, w),
            sum_of_rows(grad_u, w),
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        cell: None,
        dstart: Tensor | None,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        dkeep: None,
    ) -> tuple[Tensor, Tensor]:
        x, w, keep, v, u = ctx.saved_tensors
        width, source = w.shape[-2], sources(v, keep)
        a, d, e = ctx.cell.linearise(source, u, x)
        du = add(
            None if dw is None else matmul(_h(source, width), dw),
            None if db is None else over_steps(db).expand_as(u),
        )
        dstart = torch.zeros_like(v[..., :1, :, :]) if dstart is None else dstart
        drive = torch.zeros_like(targets(v)) if dx is None else _mix(e, dx, width)
        dv, du = _GatedLinear.apply(torch.cat([dstart, drive], dim=-3), du, a, d, w, keep, False)
        return dv, du

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        cell, start, x, w, b, keep = operands
        _, start_dim, x_dim, w_dim, b_dim, keep_dim = in_dims
        fold = Fold(info.batch_size, x, x_dim, (w, b), (w_dim, b_dim))
        results = _Gated.apply(
            cell,
            fold.sequence(start, start_dim),
            fold.sequence(x, x_dim),
            fold.weight(w, w_dim),
            fold.weight(b, b_dim),
            fold.optional(keep, keep_dim),
        )
        return fold.unfold(*results)


@with_signature
class _GatedLinear(Function):
    @staticmethod
    def forward(
        f: Tensor, e: Tensor | None, a: Tensor, d: Tensor, w: Tensor, keep: Tensor | None, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        v, u = torch.ops.ssmrl.gated_linear_recurrence(f, e, a, d, w, keep, adjoint)
        return v, u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, a, d, w, keep, ctx.adjoint = inputs
        ctx.save_for_backward(a, d, w, keep, *output)
        ctx.save_for_forward(a, d, w, keep, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        a, d, w, keep, *solution = ctx.saved_tensors
        width, needs = w.shape[-2], ctx.needs_input_grad
        grad_v = torch.zeros_like(solution[0]) if grad_v is None else grad_v
        other = _GatedLinear.apply(grad_v, grad_u, a, d, w, keep, not ctx.adjoint)
        (v, u), (mu, q) = (other, solution) if ctx.adjoint else (solution, other)
        source, target = sources(v, keep), targets(mu)
        return (
            other[0],
            other[1] if needs[1] else None,
            _outer(target, source, width) if needs[2] else None,
            _outer(target, u, width) if needs[3] else None,
            sum_of_outer_products(_h(source, width), q, w) if needs[4] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        df: Tensor | None,
        de: Tensor | None,
        da: Tensor | None,
        dd: Tensor | None,
        dw: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor]:
        a, d, w, keep, v, u = ctx.saved_tensors
        width = w.shape[-2]
        if ctx.adjoint:
            target = targets(v)
            de = add(de, None if dd is None else _mix_transposed(dd, target, width))
            drive = None if da is None else _mix_transposed(da, target, width)
            into_h = None if dw is None else matmul(u, dw.mT)
            drive = add(drive, None if into_h is None else pad(into_h, (0, target.shape[-1] - width)))
            drive = drive if drive is None or keep is None else torch.where(keep, drive, 0.0)
        else:
            source = sources(v, keep)
            de = add(de, None if dw is None else matmul(_h(source, width), dw))
            drive = None if da is None else _mix(da, source, width)
            drive = add(drive, None if dd is None else _mix(dd, u, width))
        df = add(df, None if drive is None else pad_to_targets(drive, ctx.adjoint))
        df = torch.zeros_like(v) if df is None else df
        dv, du = _GatedLinear.apply(df, de, a, d, w, keep, ctx.adjoint)
        return dv, du

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        f, e, a, d, w, keep, adjoint = operands
        f_dim, e_dim, a_dim, d_dim, w_dim, keep_dim, _ = in_dims
        fold = Fold(info.batch_size, f, f_dim, (w,), (w_dim,))
        results = _GatedLinear.apply(
            fold.sequence(f, f_dim),
            fold.optional(e, e_dim),
            fold.sequence(a, a_dim),
            fold.sequence(d, d_dim),
            fold.weight(w, w_dim),
            fold.optional(keep, keep_dim),
            adjoint,
        )
        return fold.unfold(*results)


def _h(v: Tensor, width: int) -> Tensor:
    """The first block of a state."""
    return v if v.shape[-1] == width else v[..., :width]


def _mix(coefficients: Tensor, right: Tensor, width: int) -> Tensor:
    """Elementwise block matrix times block vector: (..., n·m·S), (..., m·S) -> (..., n·S)."""
    lead, m = right.shape[:-1], right.shape[-1] // width
    n = coefficients.shape[-1] // right.shape[-1]
    if n == m == 1:
        return coefficients * right
    product = coefficients.reshape(*lead, n, m, width) * right.reshape(*lead, 1, m, width)
    return product.sum(-2).reshape(*lead, n * width)


def _mix_transposed(coefficients: Tensor, left: Tensor, width: int) -> Tensor:
    """Transposed elementwise block matrix times block vector: (..., n·m·S), (..., n·S) -> (..., m·S)."""
    lead, n = left.shape[:-1], left.shape[-1] // width
    m = coefficients.shape[-1] // left.shape[-1]
    product = coefficients.reshape(*lead, n, m, width) * left.reshape(*lead, n, 1, width)
    return (product.sum(-3) if n > 1 else product).reshape(*lead, m * width)


def _outer(left: Tensor, right: Tensor, width: int) -> Tensor:
    """Elementwise block outer product: (..., n·S), (..., m·S) -> (..., n·m·S)."""
    lead, n, m = left.shape[:-1], left.shape[-1] // width, right.shape[-1] // width
    product = left.reshape(*lead, n, 1, width) * right.reshape(*lead, 1, m, width)
    return product.reshape(*lead, n * m * width)


class RecurrentWeights(nn.Module):
    """The weights of a one-layer `nn.GRU` or `nn.LSTM`, under their names and with their initialisation U(±1/√S)."""

    def __init__(
        self, input_dim: int, state_dim: int, num_gates: int, device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        shapes = {"weight_ih_l0": (input_dim,), "weight_hh_l0": (state_dim,), "bias_ih_l0": (), "bias_hh_l0": ()}
        for name, shape in shapes.items():
            weight = torch.empty(num_gates * state_dim, *shape, device=device, dtype=dtype)
            nn.init.uniform_(weight, -(state_dim**-0.5), state_dim**-0.5)
            self.register_parameter(name, nn.Parameter(weight))
        self.weight_ih_l0: Tensor
        self.weight_hh_l0: Tensor
        self.bias_ih_l0: Tensor
        self.bias_hh_l0: Tensor

    def run(self, cell: GatedCell, x: Tensor, v: Tensor, reset: Tensor | None) -> Tensor:
        """All states (T+1, B, n·S) from the state v (B, n·S) over a step x (B, D), T = 1, or a sequence (B, T, D)."""
        if x.dim() == 2:
            x, reset = x.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
        batch_size, num_steps, input_dim = x.shape
        x = x.transpose(0, 1).reshape(num_steps * batch_size, input_dim)
        gates = linear(x, self.weight_ih_l0, self.bias_ih_l0).view(num_steps, batch_size, len(self.bias_ih_l0))
        keep = None if reset is None else ~reset.T[:, :, None]
        return gated_recurrence(cell, v[None], gates, self.weight_hh_l0.T, self.bias_hh_l0, keep)

    @staticmethod
    def like_input(y: Tensor, x: Tensor) -> Tensor:
        """Outputs (T·B, O), time first, as (B, O) for a step x (B, D) or (B, T, O) for a sequence (B, T, D)."""
        if x.dim() == 2:
            return y
        return y.view(x.shape[1], x.shape[0], y.shape[-1]).transpose(0, 1)
