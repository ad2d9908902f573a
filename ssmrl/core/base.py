"""The contract of a model with an explicit state, and its checks.

Letters: B sequences, T steps, D inputs, O outputs.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssmrl.core.serialization import read_model_file, write_model_file

__all__ = ["StateModel", "functional_forward"]

Self = TypeVar("Self", bound="StateModel")


class StateModel(nn.Module, ABC):
    """A sequence model whose state is an argument and a result.

    A state is a tensor or a NamedTuple of tensors with the batch on the leading axis, so that states are split
    by task, stream or environment by indexing. Laws, which every subclass keeps (tests/core/test_base.py):

    - a sequence equals its steps, for every split of T, with the same final state;
    - a reset equals a fresh start, and rows of a batch do not influence each other;
    - `vmap` over stacked parameters equals a loop over the models, to every order of derivative.

    Subclasses are final. Nothing in `ssmrl` asks for this class: any `nn.Module` with `init_hidden` and
    `forward(x, hidden_state) -> (output, next_state)`, or a stateless `forward(x) -> output`, works everywhere.
    """

    @abstractmethod
    def init_hidden(self, batch_size: int = 1) -> Any:
        """The state at the start of an episode, for `batch_size` rows."""

    @abstractmethod
    def forward(self, x: Tensor, hidden_state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """One step or one sequence.

        Args:
            x: (B, D) for one step, (B, T, D) for a sequence.
            hidden_state: the state before the first step; None means `init_hidden(B)`.
            reset: Bool (B,) or (B, T): where True, the state is forgotten before that input is consumed.

        Returns:
            The output, (B, O) or (B, T, O), and the state after the last step.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """

    @property
    @abstractmethod
    def constructor_arguments(self) -> dict[str, Any]:
        """The arguments that build this model again, `device` and `dtype` apart; values that JSON can hold."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and constructor arguments to `path`, in safetensors format, without pickle.

        The file appears whole or not at all: it is written beside `path`, flushed to disk, and renamed.
        """
        write_model_file(path, type(self).__name__, self.constructor_arguments, self.state_dict())

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """Read a model that `save` wrote, onto `device` (None: the CPU), in the dtype it was saved with.

        Raises:
            FileNotFoundError: there is no file at `path`.
            ValueError: the file is damaged, was not written by `save`, or holds another class.
        """
        arguments, tensors = read_model_file(path, cls.__name__)
        try:
            model = cls(**arguments, device="meta")  # draws no random numbers for weights that go
            model.load_state_dict(tensors, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)!r} does not fit this version of {cls.__name__}: {error}") from error
        return model.to("cpu" if device is None else device)


def initial_state(model: nn.Module, batch_size: int) -> Any:
    """Return what `init_hidden` gives, and None of a model without a state."""
    init_hidden: Any = getattr(model, "init_hidden", None)
    return None if init_hidden is None else init_hidden(batch_size)


def functional_forward(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    hidden_state: Any = None,
    *,
    reset: Tensor | None = None,
    truncate: int | None = None,
) -> tuple[Tensor, Any]:
    """`model(x, hidden_state)` with `params` in place of its own parameters and buffers, as a pure function.

    Args:
        model: a `StateModel`, or any module of its shape; one without a state is called as `model(x)`.
        params: name -> tensor, as in `named_parameters()` and `named_buffers()`; what is missing is taken from the
            model. A buffer that `forward` writes to is written in a copy: the model stays as it is.
        x: (B, D) or (B, T, D).
        hidden_state: None means `model.init_hidden(B)`, evaluated with `params`, so that an initial state that
            is a parameter is differentiated like every other; for a model without `init_hidden`, no state.
        reset: Bool (B,) or (B, T), as the contract has it: where True, the state is forgotten before that input. A
            model whose `forward` takes no `reset` is run step by step, from `init_hidden` where it is True.
        truncate: cut the derivative through the state every this many steps of a sequence, the first after so many;
            None: nowhere. The values are the same. It needs a model with a state and an output for every step.

    Returns:
        The output and the next state, which is None for a model that returns only an output.

    Raises:
        ValueError: the model has no parameter or buffer of a name in `params`, truncate is less than 1, or reset does
            not fit x.
    """
    if reset is not None:
        check_reset(reset, x)
    with _replaced(model, params):
        if truncate is None or x.dim() != 3 or x.shape[1] <= check_truncate(truncate):
            return _run(model, x, hidden_state, reset)
        outputs: list[Tensor] = []
        pieces = x.split(truncate, dim=1)
        resets: Any = [None] * len(pieces) if reset is None else reset.split(truncate, dim=1)
        for piece, mask in zip(pieces, resets, strict=True):
            state = _detached(hidden_state) if outputs else hidden_state
            output, hidden_state = _run(model, piece, state, mask)
            if hidden_state is None or output.shape[:2] != piece.shape[:2]:
                raise ValueError(
                    f"truncate needs a model with a state, and an output for every step; {type(model).__name__} gave "
                    f"{'no state' if hidden_state is None else f'an output of shape {tuple(output.shape)}'}."
                )
            outputs.append(output)
    return torch.cat(outputs, dim=1), hidden_state


@contextmanager
def _replaced(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with `params` in place of its own, wherever those are tied, and with copies in place of its buffers.

    As `torch.func.functional_call` does it, whose checks walk the model five times, longer than a small model runs; and
    which does not bring back the parameters of a module that the model holds under two names.
    """
    names: dict[int, str] = {}
    places = []
    buffers = {}
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, own in held.items():
                if own is not None:
                    name = names.setdefault(id(own), f"{path}.{key}" if path else key)
                    places.append((name, held, key, own))
                    if held is module._buffers:
                        buffers[name] = own
    unknown = params.keys() - set(names.values())
    if unknown:
        raise ValueError(f"params must hold names of the model's parameters; got {sorted(unknown)}.")
    copies = {name: params[name].clone() if name in params else own.detach().clone() for name, own in buffers.items()}
    values = {**params, **copies}
    places = [place for place in places if place[0] in values]
    try:
        for name, held, key, _ in places:
            held[key] = values[name]
        yield
    finally:
        for _, held, key, own in places:
            held[key] = own


def check_truncate(truncate: Any) -> int:
    """Refuse what is not a number of steps >= 1."""
    if not isinstance(truncate, int) or isinstance(truncate, bool) or truncate < 1:
        raise ValueError(f"truncate must be None or an integer >= 1; got {truncate!r}.")
    return truncate


def _detached(state: Any) -> Any:
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return torch.utils._pytree.tree_unflatten(detached, structure)


def _run(model: nn.Module, x: Tensor, hidden_state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
    """Any module as `forward(x, hidden_state, reset) -> (output, next_state)`."""
    if hidden_state is None and hasattr(model, "init_hidden"):
        hidden_state = _init_hidden(model, x.shape[0])
    if hidden_state is None:
        result = model(x, reset=reset) if reset is not None and _takes_reset(model) else model(x)
    elif reset is None or (x.dim() == 3 and x.shape[1] == 0):
        result = model(x, hidden_state)
    elif _takes_reset(model):
        result = model(x, hidden_state, reset=reset)
    else:
        return _run_steps(model, x, hidden_state, reset)
    return result if isinstance(result, tuple) else (result, None)


def _run_steps(model: nn.Module, x: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """What `reset` means, for a model that does not take it."""
    initial = _init_hidden(model, x.shape[0])
    steps, masks = ([x], [reset]) if x.dim() == 2 else (x.unbind(1), reset.unbind(1))
    outputs = []
    for step, mask in zip(steps, masks, strict=True):
        hidden_state = where_rows(mask, initial, hidden_state)
        output, hidden_state = model(step, hidden_state)
        outputs.append(output)
    return (outputs[0] if x.dim() == 2 else torch.stack(outputs, 1)), hidden_state


def _init_hidden(model: nn.Module, batch_size: int) -> Any:
    if not hasattr(model, "init_hidden"):
        raise ValueError(
            f"{type(model).__name__} must have init_hidden, the state after a reset, or a `reset` argument."
        )
    init_hidden: Callable[[int], Any] = model.init_hidden  # type: ignore[assignment]
    return init_hidden(batch_size)


def where_rows(rows: Tensor, true: Any, false: Any) -> Any:
    """Of two pytrees of tensors (B, ...) the rows of `true` where `rows`, Bool (B,), is True, else those of `false`."""

    def choose(a: Any, b: Any) -> Any:
        return torch.where(rows.view(-1, *[1] * (b.dim() - 1)), a, b) if isinstance(b, Tensor) else b

    return torch.utils._pytree.tree_map(choose, true, false)


def _takes_reset(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "reset" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_input(x: Tensor, input_dim: int, weight: Tensor) -> None:
    """Refuse an `x` that is not (B, D) or (B, T, D) with the model's width, dtype and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}.")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x must have shape (B, D) for a step or (B, T, D) for a sequence, with D = {input_dim}; "
            f"got {tuple(x.shape)}."
        )
    if x.shape[-1] != input_dim:
        raise ValueError(
            f"x must have {input_dim} features on its last axis, as the model's input_dim; "
            f"got {x.shape[-1]} in shape {tuple(x.shape)}."
        )
    check_dtype_and_device("x", x, weight)


def check_state_tensor(name: str, state: Any, shape: tuple[int, ...], weight: Tensor) -> None:
    """Refuse a state tensor that has not this shape and the model's dtype and device."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}; got {type(state).__name__}.")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to match x; got {tuple(state.shape)}.")
    check_dtype_and_device(name, state, weight)


def check_reset(reset: Tensor, x: Tensor) -> None:
    """Refuse a `reset` mask that is not Bool (B,) or (B, T), like x without its last axis."""
    shape = tuple(x.shape[:-1])
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Bool tensor of shape {shape}; got {type(reset).__name__}.")
    if reset.dtype != torch.bool:
        raise ValueError(f"reset must be of dtype torch.bool; got {reset.dtype}.")
    if tuple(reset.shape) != shape:
        axes = "(B,)" if len(shape) == 1 else "(B, T)"
        raise ValueError(f"reset must have shape {axes} = {shape} to match x; got {tuple(reset.shape)}.")
    if reset.device != x.device:
        raise ValueError(f"reset must be on {x.device}, as x is; got {reset.device}.")


def check_dtype_and_device(name: str, value: Tensor, weight: Tensor) -> None:
    """Refuse a tensor that is not of the dtype and on the device of the model's weights."""
    if value.dtype != weight.dtype:
        raise ValueError(f"{name} must be of dtype {weight.dtype}, as the model's weights are; got {value.dtype}.")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device}, where the model is; got {value.device}.")


def check_dimensions(**dimensions: int) -> None:
    """Refuse a constructor's sizes that are not positive integers."""
    for name, value in dimensions.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size that is not an integer >= 0."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 0:
        raise ValueError(f"batch_size must be an integer >= 0; got {batch_size!r}.")
