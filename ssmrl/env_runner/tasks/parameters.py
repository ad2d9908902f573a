"""Parameters of tasks as arrays with a leading axis of rows, which change when a task says so.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner.schedule import Schedule
from ssmrl.env_runner.simulation import Rows, Task

__all__ = ["FINITE", "POSITIVE", "UNIT_INTERVAL", "Domain", "Parameter", "Parameters"]


class Domain(NamedTuple):
    """What values a parameter can have."""

    holds: Callable[[NDArray[np.float64]], Any]
    """Of an array of its shape: whether it is one of them."""
    words: str
    """The same in words, for an error."""


FINITE = Domain(lambda value: np.isfinite(value).all(), "finite")
POSITIVE = Domain(lambda value: (np.isfinite(value) & (value > 0)).all(), "positive and finite")
UNIT_INTERVAL = Domain(lambda value: ((value >= 0) & (value <= 1)).all(), "in [0, 1]")


class Parameter(NamedTuple):
    """A parameter of an environment's tasks: a number, or an array of them."""

    default: Any
    """Its value where a task does not give it, and its shape."""
    domain: Domain


class Parameters:
    """The parameters of B rows' tasks.

    A task is a dict of values by name, and `changes`: `{n: values}` that hold once n steps have been made.

    Args:
        known: what a task can give.
        tasks: of every row.
        per_episode: count n from the start of each episode. False: over the life of the row.

    Attributes:
        values: name -> float64 (B, ...): what holds for the next step.

    Raises:
        ValueError, TypeError: a name is unknown or a value is not of its parameter's domain. The message names
            the row where there are several.
    """

    def __init__(self, known: Mapping[str, Parameter], tasks: Sequence[Task], *, per_episode: bool = False) -> None:
        self._first: list[dict[str, NDArray[np.float64]]] = []
        changes: list[dict[int, dict[str, NDArray[np.float64]]]] = []
        for row, task in enumerate(tasks):
            where = f"Row {row}: " if len(tasks) > 1 else ""
            given = {name: value for name, value in task.items() if name != "changes"}
            later: Mapping[int, Task] = task.get("changes") or {}
            self._first.append(_defaults(known) | _checked(known, given, where))
            changes.append({n: _checked(known, values, f"{where}`changes[{n}]`: ") for n, values in later.items()})
        self._schedule = Schedule(changes, per_episode=per_episode)
        self.values = {name: np.stack([first[name] for first in self._first]) for name in known}

    @property
    def steps(self) -> NDArray[np.int64]:
        """(B,) how many steps the rows have made, as far as their changes count them."""
        return self._schedule.steps.copy()

    def begin(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Note that an episode begins in these rows; return those whose values are other ones now."""
        return self._update(self._schedule.begin(rows))

    def advance(self, rows: Rows | None) -> NDArray[np.intp]:
        """Count a step of these rows, None: of all; return those whose values are other ones from now on."""
        return self._update(self._schedule.advance(rows))

    def go_to(self, steps: Any) -> None:
        """Be where `steps` (B,) were made."""
        rows = np.arange(len(self._first))
        self._schedule.go_to(rows, np.asarray(steps))
        self._update(rows)

    def report(self, rows: Any) -> dict[str, NDArray[np.float64]]:
        """Return copies of the values of these rows, (len(rows), ...)."""
        return {name: value[rows].copy() for name, value in self.values.items()}

    def _update(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        for row in rows:
            for name, value in (self._first[row] | self._schedule.values(int(row))).items():
                self.values[name][row] = value
        return rows


def _defaults(known: Mapping[str, Parameter]) -> dict[str, NDArray[np.float64]]:
    return {name: np.asarray(parameter.default, np.float64) for name, parameter in known.items()}


def _checked(known: Mapping[str, Parameter], given: Mapping[str, Any], where: str) -> dict[str, NDArray[np.float64]]:
    """Return the given values as arrays, each of its parameter's shape and domain."""
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where}A task of this environment has the parameters {[*known]}; got {name!r}.")
        shape, domain = np.shape(known[name].default), known[name].domain
        try:
            array = np.array(value, np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{where}`{name}` must be numbers of shape {shape}; got {value!r}.") from None
        if array.shape != shape:
            raise ValueError(f"{where}`{name}` must have shape {shape}; got {array.shape}.")
        if not domain.holds(array):
            raise ValueError(f"{where}`{name}` must be {domain.words}; got {value}.")
        values[name] = array
    return values
