"""What TorchOpt's functional optimizers lack: clipping, tensor rates, state that is all in the state, checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from numbers import Real
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor, nn
from torchopt import pytree
from torchopt.base import GradientTransformation

__all__ = [
    "check_num_steps",
    "check_optimizer",
    "check_positive",
    "check_rate",
    "clip_by_global_norm",
    "closure",
    "first_call_flags",
    "learned_tensors",
    "learning_rates",
    "reached",
    "scale_by_learning_rates",
    "sgd_unless_given",
    "treats_elements_alike",
    "with_first_call",
    "with_tensor_counts",
    "with_tensors",
]

DEFAULT_LEARNING_RATE = 0.01


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """A transformation g -> g min(1, max_norm / ‖g‖), with ‖g‖² the sum of squares over all leaves.

    Exact derivatives on both sides of the bound, and no value read on the host. (`torchopt.clip.clip_grad_norm` takes
    the norm without a graph, so that a derivative through its step is wrong, and fails under `vmap`.)

    Args:
        max_norm: > 0.

    Raises:
        TypeError, ValueError: max_norm is not a finite number > 0.
    """
    check_positive("max_norm", max_norm)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del params, inplace  # nothing is written in place, which is allowed either way
        leaves: list[Tensor] = pytree.tree_leaves(updates)
        square = reduce(torch.add, [leaf.square().sum() for leaf in leaves])
        above = square > max_norm**2
        # The norm only where it is taken, since the derivative of a square root at 0 is infinite.
        factor = torch.where(above, max_norm / torch.where(above, square, 1.0).sqrt(), 1.0)
        return pytree.tree_map(lambda leaf: leaf * factor.to(leaf.dtype), updates), state

    return GradientTransformation(lambda params: (), update)


class LearningRatesState(NamedTuple):
    """State of `scale_by_learning_rates`."""

    rates: Any
    """The rates, so that whoever maps or differentiates over the optimizer's state does so over them."""
    step: int
    """How many steps were taken."""


def scale_by_learning_rates(rates: Any, *, per_step: bool = False) -> GradientTransformation:
    """A transformation g -> -rates ∘ g, with rates that are tensors and can be meta-learned.

    By itself it is gradient descent: with one rate for every element Meta-SGD (Li et al. 2017,
    https://arxiv.org/abs/1707.09835), with one for every tensor and step the rates of MAML++ (Antoniou et al. 2019,
    https://arxiv.org/abs/1810.09502). In a `torchopt.chain` it takes the place of a fixed rate, after
    `scale_by_adam()` for instance. `learning_rates` makes rates to begin with.

    Args:
        rates: a tensor for all parameters, or a pytree with the parameters' structure; every tensor broadcasts to its
            parameter. Rates may be negative, as learned ones sometimes are.
        per_step: every tensor has a leading axis, and step k = 0, 1, … takes its entry k; later steps the last.

    Raises:
        TypeError, ValueError: rates without tensors, or, at the first update, that do not fit the parameters.
    """
    leaves = pytree.tree_leaves(rates)
    if not leaves or not all(isinstance(rate, Tensor) for rate in leaves):
        raise TypeError(f"rates must be a tensor or a pytree of tensors; got {type(rates).__name__}.")
    if per_step and any(rate.dim() == 0 or len(rate) == 0 for rate in leaves):
        raise ValueError("rates must have an axis of at least one step before every other, since per_step is True.")

    def init(params: Any) -> LearningRatesState:
        return LearningRatesState(rates, 0)

    def update(
        updates: Any, state: LearningRatesState, *, params: Any = None, inplace: bool = True
    ) -> tuple[Any, LearningRatesState]:
        del params, inplace
        gradients, structure = pytree.tree_flatten(updates)
        at: list[Tensor] = pytree.tree_leaves(_keyed_like(state.rates, updates))
        if len(at) not in (1, len(gradients)):
            raise ValueError(
                f"rates must be one tensor, or one for each of the {len(gradients)} parameters; got {len(at)}."
            )
        if per_step:
            at = [_at_step(rate, state.step) for rate in at]
        at = at * len(gradients) if len(at) == 1 else at
        scaled = [_scale(gradient, rate) for gradient, rate in zip(gradients, at, strict=True)]
        return pytree.tree_unflatten(structure, scaled), LearningRatesState(state.rates, state.step + 1)

    return GradientTransformation(init, update)


def _at_step(rate: Tensor, step: Any) -> Tensor:
    last = len(rate) - 1
    if isinstance(step, Tensor):  # by indexing, PyTorch 2.6 would ask a mapped step for its value
        return rate.index_select(0, step.clamp(max=last).reshape(1)).squeeze(0)
    return rate[min(step, last)]


def _keyed_like(rates: Any, updates: Any) -> Any:
    """Rates with the keys of mappings in the order that the updates have them."""
    if isinstance(rates, Tensor):
        return rates
    if isinstance(updates, Mapping) and isinstance(rates, Mapping):
        if updates.keys() != rates.keys():
            raise ValueError(f"rates must have the keys of the parameters, {list(updates)}; got {list(rates)}.")
        return type(updates)((key, _keyed_like(rates[key], updates[key])) for key in updates)  # type: ignore[call-arg]
    return rates


def _scale(gradient: Any, rate: Tensor) -> Tensor:
    update: Tensor = -rate * gradient
    if update.shape != gradient.shape:
        raise ValueError(
            f"rates must broadcast to their parameters; got one of shape {tuple(rate.shape)} for a parameter of shape "
            f"{tuple(gradient.shape)}."
        )
    return update


def learning_rates(
    params: Mapping[str, Tensor], rate: float, *, num_steps: int | None = None, per_element: bool = False
) -> dict[str, nn.Parameter]:
    """Rates to be meta-learned, for `scale_by_learning_rates`: leaves for the outer optimizer.

    Args:
        params: name -> parameter that adapts.
        rate: where all of them begin.
        num_steps: one rate for each of this many steps, for `per_step=True`; None: the same for every step.
        per_element: one rate for every element of a parameter, as in Meta-SGD; else one for every parameter, as in
            MAML++.

    Returns:
        Name -> () or the parameter's shape, after an axis of num_steps if given.
    """
    check_rate("rate", rate)
    steps = () if num_steps is None else (check_num_steps("num_steps", num_steps),)
    if steps == (0,):
        raise ValueError("num_steps must be None or at least 1; got 0.")
    return {
        name: nn.Parameter(
            torch.full((*steps, *(p.shape if per_element else ())), rate, dtype=p.dtype, device=p.device)
        )
        for name, p in params.items()
    }


def with_tensor_counts(optimizer: GradientTransformation) -> GradientTransformation:
    """`optimizer`, with step counts that TorchOpt keeps as Python numbers as tensors: every stream can have its own."""

    def init(params: Any) -> Any:
        device = pytree.tree_leaves(params)[0].device
        return pytree.tree_map(
            lambda leaf: torch.tensor(leaf, device=device) if type(leaf) is int else leaf, optimizer.init(params)
        )

    return GradientTransformation(init, optimizer.update)


def with_first_call(optimizer: GradientTransformation) -> GradientTransformation:
    """`optimizer`, with what momentum keeps outside its state in it: that it was never called.

    A first call is another one where there is dampening. Both are made, and the one that the state asks for is taken.
    """
    flags = first_call_flags(optimizer, that_matter=True)
    if not flags:
        return optimizer

    def init(params: Any) -> Any:
        return optimizer.init(params), torch.ones((), dtype=torch.bool, device=pytree.tree_leaves(params)[0].device)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del inplace
        inner, first = state
        ways = []
        for is_first in (True, False):
            for flag in flags:
                flag.cell_contents = is_first
            copy = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inner)
            ways.append(optimizer.update(updates, copy, params=params, inplace=False))
        updates, inner = pytree.tree_map(
            lambda a, b: torch.where(first, a, b) if isinstance(a, Tensor) else a,
            *ways,  # type: ignore[arg-type]
        )
        return updates, (inner, torch.zeros_like(first))

    return GradientTransformation(init, update)


def learned_tensors(optimizer: GradientTransformation, params: Any) -> list[Tensor]:
    """Tensors that an optimizer brings into its state and that require a gradient, such as learned rates."""
    leaves = pytree.tree_leaves(optimizer.init(pytree.tree_map(Tensor.detach, params)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def with_tensors(
    optimizer: GradientTransformation, tensors: Sequence[Tensor], others: Sequence[Tensor]
) -> GradientTransformation:
    """`optimizer` with other tensors in place of those that it brings into its state, to be differentiated in them."""
    replacement = {id(tensor): other for tensor, other in zip(tensors, others, strict=True)}

    def init(params: Any) -> Any:
        return pytree.tree_map(lambda leaf: replacement.get(id(leaf), leaf), optimizer.init(params))

    return GradientTransformation(init, optimizer.update)


def treats_elements_alike(optimizer: GradientTransformation) -> bool:
    """Whether all parameters may be one vector to it: it is built of TorchOpt's transformations, without masks.

    They treat every element alike, or take a norm over all of them. What is not TorchOpt's may look at names.
    """
    functions, values = reached(optimizer)
    known = ("torchopt.", "optree.", "torch.", "_operator")
    clip: Any = clip_by_global_norm(1.0)
    ours = {clip.update.__qualname__, clip.init.__qualname__}
    return all(
        (f"{function.__module__}.".startswith(known) and "masked" not in function.__qualname__)
        or (function.__module__ == __name__ and function.__qualname__ in ours)
        for function in functions
    ) and not any(isinstance(value, (dict, list, Tensor)) or callable(value) for value in values)


def first_call_flags(optimizer: Any, *, that_matter: bool = False) -> list[CellType]:
    """Where TorchOpt's momentum keeps, outside its state, that it was never called; if asked, only with dampening."""
    flags = []
    for function in reached(optimizer)[0]:
        cells = closure(function)
        matters = not that_matter or bool(cells["dampening"].cell_contents) if "dampening" in cells else True
        if "first_call" in cells and matters:
            flags.append(cells["first_call"])
    return flags


def closure(function: FunctionType) -> dict[str, CellType]:
    """What a function closes over, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def reached(optimizer: Any) -> tuple[list[FunctionType], list[Any]]:
    """The functions that a transformation is made of, and the other values that they close over."""
    functions: list[FunctionType] = []
    values: list[Any] = []
    todo = [optimizer]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (tuple, list)):  # a transformation is a tuple of two functions
            todo += [*item, *getattr(item, "transformations", ())]
        elif isinstance(item, FunctionType):
            functions.append(item)
            todo += [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]  # set ones
        else:
            values.append(item)
    return functions, values


def sgd_unless_given(
    optimizer: GradientTransformation | None, learning_rate: float, *, name: str, rate_name: str
) -> GradientTransformation:
    """`optimizer` itself, or `torchopt.sgd(learning_rate)` where it is None.

    Raises:
        TypeError: the optimizer is not a TorchOpt gradient transformation.
        ValueError: a bad rate, or a rate beside an optimizer that would not use it.
    """
    check_rate(rate_name, learning_rate)
    if optimizer is None:
        return torchopt.sgd(learning_rate)
    check_optimizer(name, optimizer)
    if learning_rate != DEFAULT_LEARNING_RATE:
        raise ValueError(
            f"{rate_name} = {learning_rate} would be ignored: {name} has a rate of its own; give one of the two."
        )
    return optimizer


def check_optimizer(name: str, optimizer: Any) -> None:
    """Refuse what is not a TorchOpt gradient transformation."""
    if not isinstance(optimizer, GradientTransformation):
        raise TypeError(
            f"{name} must be a TorchOpt gradient transformation, such as torchopt.sgd(0.01); "
            f"got {type(optimizer).__name__}."
        )


def check_rate(name: str, rate: Any) -> None:
    """Refuse a learning rate that is not a finite number >= 0."""
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"{name} must be a number >= 0; got {rate!r}.")
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"{name} must be finite and >= 0; got {rate}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a finite number > 0."""
    check_rate(name, value)
    if value == 0:
        raise ValueError(f"{name} must be > 0; got 0.")


def check_num_steps(name: str, num_steps: Any) -> int:
    """Refuse a number of steps that is not an integer >= 0."""
    if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__"):
        raise TypeError(f"{name} must be an integer >= 0; got {num_steps!r}.")
    steps = operator.index(num_steps)
    if steps < 0:
        raise ValueError(f"{name} must be >= 0; got {steps}.")
    return steps
