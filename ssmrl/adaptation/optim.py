"""What TorchOpt's functional optimizers need around them: checks, and the choice of the default."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torchopt
from torchopt.base import GradientTransformation

__all__ = ["check_num_steps", "check_optimizer", "check_rate", "sgd_unless_given"]

DEFAULT_LEARNING_RATE = 0.01


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


def check_num_steps(name: str, num_steps: Any) -> int:
    """Refuse a number of steps that is not an integer >= 0."""
    if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__"):
        raise TypeError(f"{name} must be an integer >= 0; got {num_steps!r}.")
    steps = operator.index(num_steps)
    if steps < 0:
        raise ValueError(f"{name} must be >= 0; got {steps}.")
    return steps
