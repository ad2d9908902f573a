"""When the tasks of rows change: `{n: what changes after n steps}` for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.simulation import Rows, Task

__all__ = ["Schedule"]

_NEVER = np.iinfo(np.int64).max


class Schedule:
    """Counts the steps of B rows, and says what each one's task is.

    What a row's task is depends on its changes and its number of steps alone, so that the number is all there is to
    save.

    Args:
        changes: of every row, `{n: values}`: those values hold from the moment that n >= 1 steps have been made. None:
            none ever does.
        per_episode: count from the start of every episode, which begins with the first values again. False: over the
            life of the row, across episodes.
    """

    def __init__(self, changes: Sequence[Mapping[int, Task] | None], *, per_episode: bool = False) -> None:
        self._changes = [
            {} if c is None else {require_integer("changes.keys()", n, 1): dict(c[n]) for n in sorted(c)}
            for c in changes
        ]
        self.per_episode = per_episode
        self.steps = np.zeros(len(changes), np.int64)
        self._some = any(self._changes)
        self._next = np.array([min(c, default=_NEVER) for c in self._changes], np.int64)

    def values(self, row: int) -> dict[str, Any]:
        """Return what has changed so far."""
        values: dict[str, Any] = {}
        for step, changed in self._changes[row].items():
            if step <= self.steps[row]:
                values.update(changed)
        return values

    def begin(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Note that an episode begins in these rows; return those of them whose task is another one now."""
        if not (self._some and self.per_episode):
            return rows[:0]
        back = rows[[self.steps[row] > 0 and bool(self._changes[row]) for row in rows]]
        self.go_to(rows, 0)
        return back

    def advance(self, rows: Rows | None) -> NDArray[np.intp]:
        """Count a step of these rows, None: of all; return those whose task is another one from now on."""
        if not self._some:
            return np.empty(0, np.intp)
        self.steps += 1 if rows is None else rows
        due = np.flatnonzero(self.steps == self._next if rows is None else (self.steps == self._next) & rows)
        self.go_to(due, self.steps[due])
        return due

    def go_to(self, rows: NDArray[np.intp], steps: Any) -> None:
        """Set how many steps these rows have made."""
        self.steps[rows] = steps
        for row in rows:
            self._next[row] = min((n for n in self._changes[row] if n > self.steps[row]), default=_NEVER)
