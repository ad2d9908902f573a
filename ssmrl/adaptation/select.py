"""Which parameters adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from torch import Tensor, nn

__all__ = ["Selector", "select", "split", "trainable_parameters"]

Selector: TypeAlias = str | nn.Module | Callable[[str, nn.Parameter], bool]
"""A name, a pattern, a module, or a predicate, as `select` takes them."""

Value = TypeVar("Value", bound=Tensor)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that require a gradient.

    Raises:
        ValueError: there are none.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient.")
    return params


def select(model: nn.Module, selectors: Selector | Iterable[Selector]) -> list[str]:
    """Names of the model's trainable parameters that one of the selectors chooses, in the model's order.

    With the last layer alone this is ANIL (Raghu et al. 2020, https://arxiv.org/abs/1909.09157), with a context
    CAVIA (`ssmrl.core.WithContext`).

    Args:
        model: the model.
        selectors: one or several of
            a name of a parameter, or of a module, all of whose parameters are meant: "readout", "readout.0.weight";
            a pattern of names with `*` and `?`, such as `"*.bias"`;
            a module of the model, all of whose parameters are meant;
            a predicate (name, parameter) -> bool.

    Raises:
        TypeError: a selector of another kind.
        ValueError: a selector that chooses nothing.
    """
    params = trainable_parameters(model)
    several = [selectors] if isinstance(selectors, (str, nn.Module)) or callable(selectors) else list(selectors)
    chosen: set[str] = set()
    for selector in several:
        names = {name for name, p in params.items() if _chooses(selector, name, p)}
        if not names:
            raise ValueError(
                f"{selector!r} chooses none of the trainable parameters of {type(model).__name__}: {', '.join(params)}."
            )
        chosen |= names
    if not chosen:
        raise ValueError("There must be at least one selector of parameters; got none.")
    return [name for name in params if name in chosen]


def _chooses(selector: Selector, name: str, p: nn.Parameter) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector) or name.startswith(f"{selector}.")
    if isinstance(selector, nn.Module):
        return any(p is other for other in selector.parameters())
    if callable(selector):
        return bool(selector(name, p))
    raise TypeError(
        f"A selector must be a name or pattern, a module, or a predicate (name, parameter) -> bool; "
        f"got {type(selector).__name__}."
    )


def split(params: Mapping[str, Value], names: Iterable[str]) -> tuple[dict[str, Value], dict[str, Value]]:
    """The parameters of these names, and the others."""
    chosen = set(names)
    return (
        {name: p for name, p in params.items() if name in chosen},
        {name: p for name, p in params.items() if name not in chosen},
    )
