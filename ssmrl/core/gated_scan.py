"""Recurrences of gated cells (GRU, LSTM), differentiable to every order, with their own vmap rule.

Letters: T steps, B sequences, S width of a block; n state blocks, m product blocks, k input blocks; G groups.

A gated cell is elementwise around one matrix product: v_t = cell(v_{t-1}, u_t, x_t), u_t = h_{t-1} W + b, where the
state v is n blocks of width S, the first of which is h. Linearised, it is

    v_t = A_t v_{t-1} + D_t (h_{t-1} W) + f_t

with elementwise block coefficients A_t (n × n) and D_t (n × m). The adjoint of that is a recurrence of the mirrored
form, and the adjoint of the mirrored one is the first again: docs/recurrence.md has the derivation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, pad

from ssmrl.core.axes import (
    Fold,
    define_operation,
    from_time_major,
    matmul,
    sources_and_targets,
    sum_of_outer_products,
    time_major,
)

__all__ = ["GatedCell", "RecurrentWeights", "define_cell", "gated_linear_recurrence", "gated_recurrence"]


class GatedCell(Protocol):
    """The elementwise part of a cell; pure functions of tensors with any leading axes."""

    name: str
    """Of its operation `torch.ops.ssmrl.<name>_recurrence`, which `define_cell` makes."""

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
    """
    v: Tensor = _Gated.apply(cell, start, x, w, b, keep)
    return v


def gated_linear_recurrence(f: Tensor, a: Tensor, d: Tensor, w: Tensor, *, adjoint: bool = False) -> Tensor:
    """Solve v_0 = f_0, v_t = A_t v_{t-1} + D_t (h_{t-1} W) + f_t for t = 1..T, or the adjoint of that.

    Args:
        f: (T+1, B, n·S) the initial state f_0 and the input of every step.
        a: (T, B, n·n·S) the coefficients A_1..A_T.
        d: (T, B, n·m·S) the coefficients D_1..D_T.
        w: (S, m·S).
        adjoint: solve μ_T = f_T, μ_{t-1} = A_t^T μ_t + P (D_t^T μ_t) W^T + f_{t-1}, where P puts h into its block.

    Returns:
        v or μ: (T+1, B, n·S), differentiable to every order in every tensor argument.
    """
    v: Tensor = _GatedLinear.apply(f, a, d, w, adjoint)
    return v


def _solve_linear(f: Tensor, a: Tensor, d: Tensor, w: Tensor, adjoint: bool) -> Tensor:
    v, width = time_major(f, copy=True), w.shape[-2]
    w = (w.mT if adjoint else w).contiguous()
    v_at, a_at, d_at = v.unbind(0), time_major(a).unbind(0), time_major(d).unbind(0)
    steps = range(len(a_at))
    if adjoint:
        for t in reversed(steps):
            v_at[t].add_(_mix_transposed(a_at[t], v_at[t + 1], width))
            _h(v_at[t], width).add_(torch.matmul(_mix_transposed(d_at[t], v_at[t + 1], width), w))
    else:
        for t in steps:
            u = torch.matmul(_h(v_at[t], width), w)
            v_at[t + 1].add_(_mix(a_at[t], v_at[t], width)).add_(_mix(d_at[t], u, width))
    return from_time_major(v)


# An operation of its own, so that a trace records the loop over time as one node.
define_operation(
    "gated_linear_recurrence(Tensor f, Tensor a, Tensor d, Tensor w, bool adjoint) -> Tensor",
    _solve_linear,
    lambda f, *others: torch.empty_like(f, memory_format=torch.contiguous_format),
)


class _GatedLinear(Function):
    @staticmethod
    def forward(f: Tensor, a: Tensor, d: Tensor, w: Tensor, adjoint: bool) -> Tensor:
        v: Tensor = torch.ops.ssmrl.gated_linear_recurrence(f, a, d, w, adjoint)
        return v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, a, d, w, ctx.adjoint = inputs
        ctx.save_for_backward(a, d, w, output)
        ctx.save_for_forward(a, d, w, output)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        a, d, w, solution = ctx.saved_tensors
        width, needs = w.shape[-2], ctx.needs_input_grad
        other = gated_linear_recurrence(grad_v, a, d, w, adjoint=not ctx.adjoint)
        v, mu = (other, solution) if ctx.adjoint else (solution, other)
        source, _ = sources_and_targets(v, reverse=False)
        _, target = sources_and_targets(mu, reverse=False)
        h = _h(source, width)
        return (
            other,
            _outer(target, source, width) if needs[1] else None,
            _outer(target, matmul(h, w), width) if needs[2] else None,
            sum_of_outer_products(h, _mix_transposed(d, target, width)) if needs[3] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, df: Tensor, da: Tensor, dd: Tensor, dw: Tensor, no_tangent: None) -> Tensor:
        a, d, w, solution = ctx.saved_tensors
        width = w.shape[-2]
        source, target = sources_and_targets(solution, reverse=False)
        if ctx.adjoint:
            into_h = matmul(_mix_transposed(dd, target, width), w.mT) + matmul(_mix_transposed(d, target, width), dw.mT)
            drive = _mix_transposed(da, target, width) + pad(into_h, (0, target.shape[-1] - width))
        else:
            h = _h(source, width)
            drive = _mix(da, source, width) + _mix(dd, matmul(h, w), width) + _mix(d, matmul(h, dw), width)
        drive = pad(drive, (0, 0, 0, 0, 0, 1) if ctx.adjoint else (0, 0, 0, 0, 1, 0))
        return gated_linear_recurrence(df + drive, a, d, w, adjoint=ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        *tensors, w, adjoint = operands
        fold = Fold(info.batch_size, (w,), (in_dims[3],))
        f, a, d = (fold.sequence(x, dim) for x, dim in zip(tensors, in_dims[:3], strict=True))
        v = gated_linear_recurrence(f, a, d, fold.weight(w, in_dims[3]), adjoint=adjoint)
        return fold.unfold(v)


def define_cell(cell: GatedCell) -> None:
    """Make the loop over time of a cell an operation of its own, so that `gated_recurrence` takes it."""

    def solve(start: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
        width, bias, w = w.shape[-2], b.unsqueeze(-2), w.contiguous()
        v_at, x_at = [time_major(start)[0]], time_major(x).unbind(0)
        keep_at = None if keep is None else time_major(keep).unbind(0)
        for t in range(len(x_at)):
            source = v_at[t] if keep_at is None else torch.where(keep_at[t], v_at[t], 0.0)
            v_at.append(cell.step(source, torch.matmul(_h(source, width), w).add_(bias), x_at[t]))
        return torch.stack(v_at, dim=-3)

    def describe(start: Tensor, x: Tensor, *others: Any) -> Tensor:
        *groups, steps, batch, _ = x.shape
        return x.new_empty(*groups, steps + 1, batch, start.shape[-1])

    schema = f"{cell.name}_recurrence(Tensor start, Tensor x, Tensor w, Tensor b, Tensor? keep) -> Tensor"
    define_operation(schema, solve, describe)


class _Gated(Function):
    @staticmethod
    def forward(cell: GatedCell, start: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
        v: Tensor = getattr(torch.ops.ssmrl, f"{cell.name}_recurrence")(start, x, w, b, keep)
        return v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.cell, _, *tensors = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, keep, v = ctx.saved_tensors
        width = w.shape[-2]
        source, a, d, e = _linearise(ctx.cell, v, x, w, b, keep)
        adjoint = gated_linear_recurrence(grad_v, *_masked(a, d, keep), w, adjoint=True)
        _, target = sources_and_targets(adjoint, reverse=False)
        grad_u = _mix_transposed(d, target, width)
        return (
            None,
            adjoint[..., :1, :, :],
            _mix_transposed(e, target, width),
            sum_of_outer_products(_h(source, width), grad_u),
            grad_u.sum((-3, -2)),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, cell: None, dstart: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dkeep: None) -> Tensor:
        x, w, b, keep, v = ctx.saved_tensors
        width = w.shape[-2]
        source, a, d, e = _linearise(ctx.cell, v, x, w, b, keep)
        du = matmul(_h(source, width), dw) + db[..., None, None, :]
        drive = torch.cat([dstart, _mix(d, du, width) + _mix(e, dx, width)], dim=-3)
        return gated_linear_recurrence(drive, *_masked(a, d, keep), w)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        cell, start, x, w, b, keep = operands
        _, start_dim, x_dim, w_dim, b_dim, keep_dim = in_dims
        fold = Fold(info.batch_size, (w, b), (w_dim, b_dim))
        v = gated_recurrence(
            cell,
            fold.sequence(start, start_dim),
            fold.sequence(x, x_dim),
            fold.weight(w, w_dim),
            fold.weight(b, b_dim),
            None if keep is None else fold.sequence(keep, keep_dim),
        )
        return fold.unfold(v)


def _linearise(
    cell: GatedCell, v: Tensor, x: Tensor, w: Tensor, b: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At all steps: the source state k_t v_{t-1}, and the cell's derivatives by state, product and input."""
    source, _ = sources_and_targets(v, reverse=False)
    if keep is not None:
        source = torch.where(keep, source, 0.0)
    u = matmul(_h(source, w.shape[-2]), w) + b[..., None, None, :]
    return source, *cell.linearise(source, u, x)


def _masked(a: Tensor, d: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Coefficients of the step from v_{t-1} instead of k_t v_{t-1}."""
    return (a, d) if keep is None else (a * keep, d * keep)


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

    def __init__(self, input_dim: int, state_dim: int, num_gates: int, device: torch.device | str) -> None:
        super().__init__()
        shapes = {"weight_ih_l0": (input_dim,), "weight_hh_l0": (state_dim,), "bias_ih_l0": (), "bias_hh_l0": ()}
        for name, shape in shapes.items():
            weight = torch.empty(num_gates * state_dim, *shape, device=device)
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
