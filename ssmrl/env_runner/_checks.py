"""Checks that several modules of this sub-package share."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.spaces import Box, Discrete

__all__ = ["require_array_space", "require_integer"]


def require_integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int, or raise TypeError (not an integer) or ValueError (too small)."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")
    return int(value)


def require_array_space(name: str, space: Space[Any]) -> None:
    """Raise TypeError unless `space` is a Box or a Discrete, whose elements are one array."""
    if not isinstance(space, (Box, Discrete)):
        raise TypeError(
            f"`{name}` must be a Box or a Discrete space; got {space}: flatten it first "
            "(gymnasium.wrappers.FlattenObservation, or an action wrapper)."
        )
