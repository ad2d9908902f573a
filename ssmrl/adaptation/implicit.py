"""Implicit differentiation through adaptation that is held near where it started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, vjp
from torchopt.base import GradientTransformation

from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.optim import check_num_steps, check_optimizer, check_positive
from ssmrl.adaptation.recompute import of_some, refuse_captured, scatter, taken_apart
from ssmrl.adaptation.tree import dot

__all__ = ["Solver", "adapt_implicitly", "conjugate_gradient", "neumann_series"]

Vector = tuple[Tensor, ...]
Solver = Callable[[Callable[[Vector], Vector], Vector], Vector]
"""(A, b) -> x with A x = b, for a symmetric A given as a function."""


def adapt_implicitly(
    loss_fn: Callable[..., Tensor],
    params: Any,
    *args: Any,
    optimizer: GradientTransformation,
    num_steps: int,
    strength: float,
    solver: Solver,
) -> Any:
    """Minimise loss(φ) + λ/2 ‖φ - θ‖² from φ = θ, differentiated as if the minimum φ* were reached:

        dφ*/dθ = (I + H/λ)^{-1},    dφ*/da = -(λI + H)^{-1} ∂²loss/∂φ∂a,    H = ∂²loss/∂φ².

    Nothing of the path is stored, and its length costs no memory. Rajeswaran, Finn, Kakade, Levine 2019,
    "Meta-Learning with Implicit Gradients", https://arxiv.org/abs/1909.04630, whose λ is `strength`. The error is
    that of the minimum and of the solver: as both converge, the derivative does.

    Args:
        loss_fn: `(params, *args) -> scalar` loss. It must close over nothing that is differentiated or mapped.
        params: θ, a pytree of floating-point tensors.
        *args: what `loss_fn` takes after the parameters.
        optimizer: a TorchOpt gradient transformation, for the minimum; rates in it get no derivative, as the minimum
            does not depend on them.
        num_steps: its steps.
        strength: λ > 0.
        solver: `conjugate_gradient(...)` or `neumann_series(...)`, for the linear system of the derivative.

    Returns:
        φ, in the structure of `params`.

    Raises:
        TypeError, ValueError: as `adapt`; a strength that is not a finite number > 0.
    """
    check_positive("strength", strength)
    check_optimizer("optimizer", optimizer)
    num_steps = check_num_steps("num_steps", num_steps)
    start, structure = taken_apart(params)
    others, arguments = taken_apart(args)
    count = len(start)

    def loss(*tensors: Tensor) -> Tensor:
        return loss_fn(structure.tree(tensors[:count]), *arguments.tree(tensors[count:]))

    def regularised(at: Vector, theta: Vector, *others: Tensor) -> Tensor:
        distance = [(a - t).square().sum() for a, t in zip(at, theta, strict=True)]
        return loss(*at, *others) + 0.5 * strength * torch.stack(distance).sum()

    def minimum(*tensors: Tensor) -> Vector:
        theta = tensors[:count]
        adapted = adapt(regularised, theta, theta, *tensors[count:], optimizer=optimizer, num_steps=num_steps)
        result: Vector = adapted.params
        return result

    refuse_captured(loss, *start, *others, loser="the implicit derivative")
    return structure.tree(_Minimum.apply(minimum, loss, strength, solver, count, *start, *others))


def conjugate_gradient(num_steps: int) -> Solver:
    """Conjugate gradients from zero: exact after as many steps as A has distinct eigenvalues, A positive definite.

    Args:
        num_steps: at most so many, at least 1; a system that is solved before stays as it is.
    """
    if check_num_steps("num_steps", num_steps) < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")

    def solve(product: Callable[[Vector], Vector], b: Vector) -> Vector:
        x = tuple(torch.zeros_like(t) for t in b)
        residual = direction = b
        square = dot(residual, residual)
        for _ in range(num_steps):
            image = product(direction)
            step = _ratio(square, dot(direction, image))
            x = _add(x, step, direction)
            residual = _add(residual, -step, image)
            next_square = dot(residual, residual)
            direction = _add(residual, _ratio(next_square, square), direction)
            square = next_square
        return x

    return solve


def neumann_series(num_steps: int) -> Solver:
    """The solution x = Σ_{j ≤ num_steps} (I - A)^j b, which converges where every eigenvalue of A is between 0 and 2.

    Lorraine, Vicol, Duvenaud 2020, https://arxiv.org/abs/1911.02590. Here A = I + H/λ: λ must be above
    every eigenvalue of H in size.
    """
    check_num_steps("num_steps", num_steps)

    def solve(product: Callable[[Vector], Vector], b: Vector) -> Vector:
        x = term = b
        for _ in range(num_steps):
            term = tuple(t - p for t, p in zip(term, product(term), strict=True))
            x = tuple(a + t for a, t in zip(x, term, strict=True))
        return x

    return solve


class _Minimum(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        minimum: Callable[..., Vector], loss: Any, strength: float, solver: Solver, count: int, *tensors: Tensor
    ) -> Vector:
        return tuple(t.clone() for t in minimum(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Vector) -> None:
        _, ctx.loss, ctx.strength, ctx.solver, ctx.count, *tensors = inputs
        ctx.save_for_backward(*output, *tensors[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        count, at = ctx.count, ctx.saved_tensors
        needed = [i for i in range(len(at) - count) if ctx.needs_input_grad[5 + count + i]]
        moved = [*range(count), *(count + i for i in needed)]

        def gradient(*some: Tensor) -> Vector:
            """∇_φ loss as a function of φ, and of the other arguments that need a derivative."""
            result: Vector = of_some(grad(ctx.loss, argnums=tuple(range(count))), at, moved)(*some)
            return result

        # H is symmetric, so that a pullback is a product with it; the graph of the gradient serves them all.
        pullback = vjp(gradient, *(at[i] for i in moved))[1]

        def product(vector: Vector) -> Vector:
            return tuple(v + h / ctx.strength for v, h in zip(vector, pullback(vector), strict=False))

        solution = ctx.solver(product, tuple(cotangents))
        mixed = pullback(solution)[count:]
        of_others = scatter([-m / ctx.strength for m in mixed], needed, len(at) - count)
        return None, None, None, None, None, *solution, *of_others


def _add(x: Vector, step: Tensor, direction: Vector) -> Vector:
    return tuple(a + step * d for a, d in zip(x, direction, strict=True))


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Quotient top / bottom, and 0 where there is nothing left to solve."""
    solved = top == 0
    return torch.where(solved, 0.0, top / torch.where(solved, 1.0, bottom))
