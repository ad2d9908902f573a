"""What a native batch of environments computes: one simulation of B rows, each with a task of its own.

Letters: B rows, D features of an observation, A action components.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import Space
from numpy.typing import NDArray

__all__ = [
    "Rows",
    "Simulation",
    "State",
    "Task",
    "Transition",
    "UnstableSimulationError",
    "check_tasks",
    "load_generator",
    "save_generator",
]

Task = Mapping[str, Any]
"""A task: arguments of an environment's constructor by name; numbers, or tuples of numbers."""

Rows = NDArray[np.bool_]
"""Bool (B,) which rows."""

State = dict[str, Any]
"""What a simulation or an environment is at an instant: arrays, and JSON's numbers, strings, lists and dicts."""


class Transition(NamedTuple):
    """What a step of every row gave; of a row that did not step, anything."""

    reward: NDArray[np.float64]
    """(B,)."""
    terminated: Rows
    """(B,)."""
    info: dict[str, NDArray[Any]]
    """Name -> (B, ...), as the single environment's info has it; and `_name`, Bool (B,), where not all rows have it."""


class Simulation(Protocol):
    """B rows of one kind of environment. It knows nothing of episodes, seeds and limits: its caller does."""

    @property
    def tasks(self) -> Sequence[Task]:
        """Of every row."""

    @property
    def single_observation_space(self) -> Space[Any]:
        """Of a row."""

    @property
    def single_action_space(self) -> Space[Any]:
        """Of a row."""

    @property
    def metadata(self) -> dict[str, Any]:
        """As Gymnasium's environments have it."""

    def begin(
        self, rows: NDArray[np.intp], generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> dict[str, NDArray[Any]]:
        """Begin an episode in these rows, each with draws from its own generator; return their info, (rows, ...)."""

    def advance(self, actions: NDArray[Any], rows: Rows | None) -> Transition:
        """Make a step of these rows, None: of all; the others stay as they are, and their actions are ignored.

        Raises:
            UnstableSimulationError: a row's state is not finite any more.
        """

    def observe(self) -> NDArray[Any]:
        """Return the observations (B, D), a new array."""

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every row another task; what it is in the middle of goes on under it."""

    def save(self) -> State:
        """Return copies of everything that the future depends on, the tasks apart."""

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit."""


class UnstableSimulationError(RuntimeError):
    """A simulation left what its physics can be computed for.

    Attributes:
        source: the single environment that it happened in, None of a batch, whose message names the row.
    """

    def __init__(self, message: str, source: Any = None) -> None:
        super().__init__(message)
        self.source = source


def check_tasks(
    tasks: Any, num_rows: int | None = None, defaults: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return deep copies of tasks as dicts, the steps of their `changes` as integers, which JSON makes strings.

    Args:
        tasks: a list of mappings.
        num_rows: how many there must be; None: any number.
        defaults: parameters of every task that it does not give itself.

    Raises:
        TypeError: it is not a list of mappings.
        ValueError: there are not `num_rows` of them.
    """
    if not isinstance(tasks, (list, tuple)):
        raise TypeError(f"`tasks` must be a list of tasks; got {type(tasks).__name__}.")
    if num_rows is not None and len(tasks) != num_rows:
        raise ValueError(f"`tasks` must hold one task per row, {num_rows}; got {len(tasks)}.")
    checked = []
    for row, task in enumerate(tasks):
        if not isinstance(task, Mapping):
            raise TypeError(f"`tasks[{row}]` must be a mapping of parameters; got {task!r}.")
        copied: dict[str, Any] = copy.deepcopy({**(defaults or {}), **task})
        changes = copied.get("changes")
        if changes is not None:
            if not isinstance(changes, Mapping) or not all(isinstance(c, Mapping) for c in changes.values()):
                raise TypeError(f"`tasks[{row}]['changes']` must be {{step: parameters}}; got {changes!r}.")
            copied["changes"] = {int(n) if isinstance(n, str) and n.isdigit() else n: c for n, c in changes.items()}
        checked.append(copied)
    return checked


def save_generator(generator: np.random.Generator) -> State:
    """Return where a generator of Gymnasium's stands, in JSON values."""
    return copy.deepcopy(dict(generator.bit_generator.state))


def load_generator(state: State) -> np.random.Generator:
    """Return a generator that stands where `save_generator` saw one."""
    generator = np.random.Generator(np.random.PCG64(0))
    generator.bit_generator.state = copy.deepcopy(state)
    return generator
