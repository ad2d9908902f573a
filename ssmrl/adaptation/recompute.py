"""Derivatives for less memory: recomputation and mixed-mode differentiation, as functions of functions.

Plain reverse mode stores what every inner step computed until the meta-gradient has passed through it. The functions
made here store their arguments alone, and do the work again, or in another order, when a derivative asks for it. They
give the same numbers, to every order, and compose with `grad`, `vmap`, `jvp` and each other, which
`torch.utils.checkpoint` does not.

What they differentiate has to be an argument: a tensor that the function closes over is a constant to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.func import grad, jvp, vjp, vmap
from torchopt import pytree

__all__ = ["a_transform_is_active", "autograd_gradient", "mixed_mode_grad_and_value", "recomputed", "refuse_captured"]

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, whose derivative runs it again instead of storing what it computed on its way.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174.

    Args:
        function: pytrees of tensors -> a pytree of tensors. A pure function of its arguments: a tensor that it closes
            over is a constant, whose derivative is lost, and random numbers that it draws are others when it runs
            again. Leaves that are no tensors pass through as they are.
    """

    def run(*arguments: Any) -> Result:
        tensors, arguments_structure = taken_apart(arguments)
        results: list[_Structure] = []

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            outputs, structure = taken_apart(function(*arguments_structure.tree(tensors)))
            results.append(structure)
            # Counts too as floating-point numbers, exact to 2^53: autograd wants results that could have a derivative.
            return tuple(t if t.is_floating_point() or t.is_complex() else t.double() for t in outputs)

        outputs = _Recomputed.apply(of_tensors, *tensors)
        structure = results[0]
        result: Result = structure.tree([o.to(t) for o, t in zip(outputs, structure.dtypes, strict=True)])
        return result

    return run


def mixed_mode_grad_and_value(loss_fn: Callable[..., Tensor]) -> Callable[..., tuple[Any, Tensor]]:
    """`torch.func.grad_and_value(loss_fn)`, whose own derivative is taken by forward mode over reverse mode.

    For cotangents v of the gradient ∇_θ L and c of the value L, the derivative in θ and every other argument a is

        d/dε ∇_{θ,a} L(θ + εv, a) + c ∇_{θ,a} L(θ, a),

    one `jvp` of a gradient: no graph of a gradient is ever stored. Kemaev, Calian, Zintgraf, Farquhar, van Hasselt
    2025, "Scalable Meta-Learning via Mixed-Mode Differentiation", https://arxiv.org/abs/2505.00793.

    Args:
        loss_fn: `(params, *args) -> scalar`; params a pytree of floating-point tensors. A pure function of its
            arguments: a tensor that it closes over is a constant, whose derivative is lost; it must draw no random
            numbers.
    """

    def run(params: Any, *arguments: Any) -> tuple[Any, Tensor]:
        at, params_structure = taken_apart(params)
        others, arguments_structure = taken_apart(arguments)
        count = len(at)

        def loss(*tensors: Tensor) -> Tensor:
            return loss_fn(params_structure.tree(tensors[:count]), *arguments_structure.tree(tensors[count:]))

        *gradient, value = _MixedModeGradient.apply(loss, count, *at, *others)
        return params_structure.tree(gradient), value

    return run


def refuse_captured(function: Callable[..., Any], *arguments: Any, loser: str = "mixed_mode and recompute") -> None:
    """Refuse a function that closes over a tensor whose derivative, or axis under `vmap`, would be lost.

    It is run once on plain copies of its arguments, the first along every mapped axis: what then still has a derivative
    or a mapped axis came in by another way. A function that draws random numbers is refused too, since it would draw
    others when it is run again.

    Args:
        loser: what would lose it, for the error.

    Raises:
        ValueError: there is such a tensor, or random numbers are drawn.
    """
    tensors, structure = taken_apart(arguments)
    before = torch.get_rng_state()
    results, _ = taken_apart(function(*structure.tree([_plain(t).clone() for t in tensors])))
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise ValueError(
            f"loss_fn draws random numbers, which would be others when {loser} run it again; draw them before, and "
            f"pass them as one of *args."
        )
    if any(map(_is_tracked, results)):
        raise ValueError(
            f"loss_fn or the optimizer closes over a tensor that is differentiated or mapped by vmap, which {loser} "
            f"would lose; pass it to adapt as one of *args, which loss_fn then takes after params, or detach it."
        )


def _plain(tensor: Tensor) -> Tensor:
    """Without a graph and without mapped axes, of each of which the first entry is taken."""
    transforms = torch._C._functorch
    while transforms.is_functorch_wrapped_tensor(tensor):
        axis = transforms.maybe_get_bdim(tensor) if transforms.is_batchedtensor(tensor) else None
        tensor = transforms.get_unwrapped(tensor)
        tensor = tensor if axis is None else tensor.select(axis, 0)
    return forward_ad.unpack_dual(tensor).primal.detach() if forward_ad._current_level >= 0 else tensor.detach()


def _is_tracked(tensor: Tensor) -> bool:
    transforms = torch._C._functorch
    while True:
        if tensor.requires_grad or transforms.is_batchedtensor(tensor) or _has_tangent(tensor):
            return True
        if not transforms.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = transforms.get_unwrapped(tensor)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class _Structure:
    """What a pytree is beside its tensors."""

    def __init__(self, leaves: list[Any], structure: Any) -> None:
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._structure = structure
        self.dtypes = [leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)]

    def tree(self, tensors: Any) -> Any:
        """The pytree with these tensors in their places."""
        rest = iter(tensors)
        return pytree.tree_unflatten(self._structure, [next(rest) if o is None else o[0] for o in self._others])


def taken_apart(tree: Any) -> tuple[list[Tensor], _Structure]:
    """The tensors of a pytree, and the rest of it, which holds none of them."""
    leaves, structure = pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Structure(leaves, structure)


class _Recomputed(Function):
    """The results of a function of tensors, which are tensors; only its arguments are stored."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        # A result that is an argument as it came would be one tensor with two histories.
        return tuple(out.view_as(out) if any(out is t for t in tensors) else out for out in function(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        at, function = [tensors[i] for i in needed], of_some(ctx.function, tensors, needed)
        if _is_last_derivative():
            with torch.enable_grad():
                at = [t.detach().requires_grad_() for t in at]
                moving = [(o, c) for o, c in zip(function(*at), cotangents, strict=True) if o.requires_grad]
            if not moving:
                return (None,) * (1 + len(tensors))
            gradient = torch.autograd.grad([o for o, _ in moving], at, [c for _, c in moving], allow_unused=True)
        else:
            gradient = vjp(function, *at)[1](cotangents)
        return None, *scatter(gradient, needed, len(tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _jvp_of(ctx.function, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *tensors: Tensor) -> tuple[Any, Any]:
        are_mapped: list[bool] = []

        def mapped(*tensors: Tensor) -> tuple[Tensor, ...]:
            def one(*tensors: Tensor) -> tuple[Tensor, ...]:
                results = function(*tensors)
                are_mapped[:] = map(_is_mapped_here, results)
                return tuple(results)

            results = vmap(one, in_dims=tuple(in_dims[1:]), randomness=info.randomness)(*tensors)
            return tuple(r if m else r[0] for r, m in zip(results, are_mapped, strict=True))

        results = _Recomputed.apply(mapped, *tensors)
        return results, tuple(0 if m else None for m in are_mapped)


class _MixedModeGradient(Function):
    """Gradients in the first `count` tensors, and the loss; leading axes in all of them where `vmap` mapped it."""

    @staticmethod
    def forward(loss: Callable[..., Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        if a_transform_is_active():
            return _gradient_and_value(loss, count, *tensors)
        with torch.enable_grad():
            at = [t.detach().requires_grad_() for t in tensors[:count]]
            value = loss(*at, *tensors[count:])
            gradient = autograd_gradient(value.sum(), at)
        return *gradient, value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        derivative = _derivative_of_gradient(ctx.loss, ctx.count, tensors, cotangents, needed)
        return None, None, *scatter(derivative, needed, len(tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _jvp_of(partial(_gradient_and_value, ctx.loss, ctx.count), ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, loss: Any, count: int, *tensors: Tensor) -> tuple[Any, tuple[int, ...]]:
        # A gradient each, so parameters each, also where they are shared.
        params = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors[:count], in_dims[2 : 2 + count], strict=True)
        ]
        dims = (0,) * count + tuple(in_dims[2 + count :])
        mapped = vmap(loss, in_dims=dims, randomness=info.randomness)
        return _MixedModeGradient.apply(mapped, count, *params, *tensors[count:]), (0,) * (count + 1)


def autograd_gradient(value: Tensor, at: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of a scalar by autograd itself; zeros in what it does not depend on, which may be all of it."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in at)
    return torch.autograd.grad(value, at, materialize_grads=True)


def _gradient_and_value(loss: Callable[..., Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradient of the sum of a mapped loss in the first `count` tensors, and the loss."""

    def total(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(*tensors)
        return value.sum(), value

    gradient, value = grad(total, argnums=tuple(range(count)), has_aux=True)(*tensors)
    return *gradient, value


def _derivative_of_gradient(
    loss: Callable[..., Tensor], count: int, tensors: Any, cotangents: Any, needed: list[int]
) -> Any:
    """d/dε ∇L(θ + εv, a) + c ∇L(θ, a), with ∇ in the tensors that need it: θ the first `count`; (v, c) cotangents.

    That is d/dε ∇((1 + εc) L(θ + εv, a)).
    """
    *direction, of_value = cotangents
    # Forward mode cannot take parameters that are one tensor under many indices, as they are in a first step.
    tensors = (*(t.contiguous() for t in tensors[:count]), *tensors[count:])

    def weighted(weight: Tensor, *tensors: Tensor) -> Tensor:
        return (weight * loss(*tensors)).sum()

    def gradient(weight: Tensor, *params: Tensor) -> Any:
        at = (*params, *tensors[count:])
        function = of_some(partial(weighted, weight), at, needed)
        return grad(function, argnums=tuple(range(len(needed))))(*(at[i] for i in needed))

    try:
        if not _is_last_derivative():
            primals = (torch.ones_like(of_value), *tensors[:count])
            return jvp(gradient, primals, (of_value, *direction))[1]
        with forward_ad.dual_level(), torch.enable_grad():
            at = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
            at[:count] = [forward_ad.make_dual(t, v) for t, v in zip(at[:count], direction, strict=True)]
            weight = forward_ad.make_dual(torch.ones_like(of_value), of_value)
            total = weighted(weight, *at)
            if not total.requires_grad:
                return [torch.zeros_like(tensors[i]) for i in needed]
            first = torch.autograd.grad(total, [at[i] for i in needed], materialize_grads=True)
            along = [forward_ad.unpack_dual(g).tangent for g in first]
            return [torch.zeros_like(g) if t is None else t for g, t in zip(first, along, strict=True)]
    except RuntimeError as error:
        if "ZeroTensors are immutable" not in str(error):
            raise
        raise RuntimeError(
            "mixed_mode takes the derivative of a gradient by forward mode, for which PyTorch's mse_loss with "
            'reduction="mean" has a defect (its issue 123996); take ssmrl.mse_loss, or the mean of squares '
            "written out."
        ) from error


def _is_last_derivative() -> bool:
    """Whether a backward pass is PyTorch's own, with nothing that differentiates through it."""
    return not torch.is_grad_enabled() and not a_transform_is_active()


def a_transform_is_active() -> bool:
    """Whether derivatives must be torch.func's, and not autograd's own, which cost a layer of Python less."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _is_mapped_here(tensor: Tensor) -> bool:
    transforms = torch._C._functorch
    level = transforms.maybe_current_level()
    return bool(transforms.is_batchedtensor(tensor) and transforms.maybe_get_level(tensor) == level)


def _jvp_of(function: Callable[..., Any], at: Any, tangents: Any) -> tuple[Tensor, ...]:
    moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
    primals, along = tuple(at[i] for i in moved), tuple(tangents[i] for i in moved)
    return tuple(jvp(of_some(function, at, moved), primals, along)[1])


def of_some(function: Callable[..., Any], at: Any, places: list[int]) -> Callable[..., Any]:
    """`function` of the arguments in these places, with the others as they are in `at`."""

    def of_these(*some: Tensor) -> Any:
        arguments = list(at)
        for place, value in zip(places, some, strict=True):
            arguments[place] = value
        return function(*arguments)

    return of_these


def scatter(values: Any, places: list[int], count: int) -> list[Tensor | None]:
    scattered: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        scattered[place] = value
    return scattered
