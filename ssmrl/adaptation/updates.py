"""How an optimizer's update is called: to be mapped and differentiated, or plainly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import CellType
from typing import Any, TypeAlias

import torch
import torchopt
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode
from torchopt import pytree
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from torchopt.combine import chain_flat

from ssmrl.adaptation.optim import closure, first_call_flags, reached

__all__ = ["differentiable_update", "plain_update"]

Update: TypeAlias = Callable[..., tuple[Any, Any]]
"""(gradient, state, params, first) -> (updates, state); `first`: the state is fresh from the optimizer's `init`."""


def differentiable_update(optimizer: GradientTransformation) -> Update:
    """`optimizer.update` made safe to map and to differentiate."""
    return _in_mode(optimizer, first_call_flags(optimizer), _ExactArithmetic)


def plain_update(optimizer: GradientTransformation) -> Update:
    """`optimizer.update` where it is neither mapped nor differentiated: the same numbers, with less around them.

    It uses up the state that it is given: moments may be written in place.
    """
    # A trace is of operations that a compiler can fuse by itself.
    optimizer, others = _with_fused_adam(optimizer) if get_proxy_mode() is None else (optimizer, [optimizer.update])
    functions, values = reached(others)
    takes_powers = any(map(callable, values)) or any(f.__module__ not in _WITHOUT_POWERS for f in functions)
    return _in_mode(optimizer, first_call_flags(others), _ExactValues if takes_powers else nullcontext)


def _in_mode(
    optimizer: GradientTransformation, flags: list[CellType], mode: Callable[[], AbstractContextManager[Any]]
) -> Update:
    def update(gradient: Any, state: Any, params: Any, *, first: bool) -> tuple[Any, Any]:
        for flag in flags:
            flag.cell_contents = first
        with mode():
            result: tuple[Any, Any] = optimizer.update(gradient, state, params=params, inplace=False)
        return result

    return update


class _ExactArithmetic(TorchFunctionMode):
    """Operations of TorchOpt's optimizers, so written that every derivative of them exists and is exact.

    - A square root has derivative 0 at 0, where it would be infinite and meet a factor 0: NaN. The derivative of a step
      g / (sqrt(g²) + eps) at g = 0 then is what it is on both sides of 0, 1 / eps.
    - `addcmul` is a product and a sum, since it has no rule for `vmap`.
    - decay ** count, for Adam's bias correction, is computed in double: in float32 1 - 0.999 is off by 1e-5 of it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(function, function)
        return replacement(*args, **(kwargs or {}))


class _ExactValues(TorchFunctionMode):
    """The part of `_ExactArithmetic` that matters where there are no derivatives: powers in double."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__rpow__:
            return _rpow(*args)
        if function is Tensor.div:
            return _div(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _sqrt(x: Tensor) -> Tensor:
    zero = x == 0  # not x > 0, which would hide NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _addcmul(x: Tensor, left: Tensor, right: Tensor, *, value: float = 1) -> Tensor:
    return x + value * left * right


def _div(x: Tensor, divisor: Any, **options: Any) -> Tensor:
    # A divisor without axes does not change the dtype of x, unless x has no axes either.
    return torch.div(x, divisor.to(x.dtype) if isinstance(divisor, Tensor) else divisor, **options)


def _rpow(exponent: Tensor, base: Any) -> Any:
    return base ** (exponent if exponent.is_floating_point() else exponent.double())


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    Tensor.sqrt: _sqrt,
    Tensor.sqrt_: _sqrt,
    Tensor.addcmul: _addcmul,
    Tensor.addcmul_: _addcmul,
    Tensor.div: _div,
    Tensor.__rpow__: _rpow,
}


# Adam where nothing differentiates, maps or traces it.

_ADAM = torchopt.transform.scale_by_adam().update.__code__  # type: ignore[attr-defined]
_FLAT_CHAIN = chain_flat(torchopt.transform.scale(1.0)).update.__code__  # type: ignore[attr-defined]
_WITHOUT_POWERS = {
    "optree.ops",
    "ssmrl.adaptation.anchor",
    "ssmrl.adaptation.optim",
    "ssmrl.adaptation.stream",
    "torchopt.alias.utils",
    "torchopt.base",
    "torchopt.combine",
    "torchopt.transform.add_decayed_weights",
    "torchopt.transform.scale",
    "torchopt.transform.trace",
    "torchopt.transform.utils",
}
"""Modules none of whose functions raises a number to a power that is a tensor."""


def _with_fused_adam(optimizer: GradientTransformation) -> tuple[GradientTransformation, list[Any]]:
    """`optimizer` with `_fused` where its chains hold `scale_by_adam`, and the updates that stay as they are."""
    update: Any = optimizer.update
    code = getattr(update, "__code__", None)
    if isinstance(optimizer, ChainedGradientTransformation):
        parts, others = zip(*map(_with_fused_adam, optimizer.transformations), strict=True)
        return ChainedGradientTransformation(*parts), [*chain.from_iterable(others)]
    if code is _FLAT_CHAIN:
        inner, others = _with_fused_adam(closure(update)["inner"].cell_contents)
        return chain_flat(inner), others
    if code is _ADAM:
        b1, b2, eps, eps_root = (closure(update)[name].cell_contents for name in ("b1", "b2", "eps", "eps_root"))
        if eps_root == 0:  # the kernel has none
            return _fused(optimizer, b1, b2, eps), []
    return optimizer, [update]


def _fused(scale_by_adam: GradientTransformation, b1: float, b2: float, eps: float) -> GradientTransformation:
    """TorchOpt's `scale_by_adam` by PyTorch's own kernel, which passes over memory once instead of ten times."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, structure = pytree.tree_flatten(updates)
        if not all(g.dtype in (torch.float32, torch.float64) and g.device.type in ("cpu", "cuda") for g in gradients):
            with _ExactValues():
                result: tuple[Any, Any] = scale_by_adam.update(updates, state, params=params, inplace=inplace)
            return result
        mu, nu, counts = map(pytree.tree_leaves, state)
        # The kernel takes all memory to be contiguous, and reads beside it if it is not.
        gradients, mu, nu = ([t.contiguous() for t in part] for part in (gradients, mu, nu))
        # Adam's step from 0, at a rate of -1, is what `scale_by_adam` makes of the gradient.
        steps = [torch.zeros_like(g) for g in gradients]
        adam(
            steps,
            gradients,
            mu,
            nu,
            [],
            [count.float() for count in counts],
            fused=True,
            amsgrad=False,
            beta1=b1,
            beta2=b2,
            lr=-1.0,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        after = (pytree.tree_unflatten(structure, part) for part in (mu, nu, [count + 1 for count in counts]))
        return pytree.tree_unflatten(structure, steps), type(state)(*after)

    return GradientTransformation(scale_by_adam.init, update)
