"""A simulation of B rows from pure functions on arrays, and what Gymnasium's registry calls for it.

Letters: B rows, R rows in which an episode begins, D features of an observation, A action components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from gymnasium import Space
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.one_row import OneRowEnv
from ssmrl.env_runner.simulation import (
    Rows,
    State,
    Task,
    Transition,
    UnstableSimulationError,
    check_tasks,
)
from ssmrl.env_runner.tasks.parameters import Parameter, Parameters

__all__ = ["ArraySimulation", "Arrays", "Dynamics", "Step", "make_rows", "makers"]

Arrays = dict[str, NDArray[Any]]
"""Name -> (B, ...)."""


class Step(NamedTuple):
    """What a step of B rows gave."""

    state: Arrays
    """The next state: new arrays."""
    reward: NDArray[np.float64]
    """(B,)."""
    terminated: Rows
    """(B,)."""
    info: Arrays


class Dynamics(Protocol):
    """An environment as pure functions of the state of B rows and of the parameters of their tasks.

    A dataclass, whose fields are the settings that rows share. What a row gives must not depend on which rows are
    beside it.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters of its tasks."""

    @property
    def observation_space(self) -> Space[Any]:
        """Of one row."""

    @property
    def action_space(self) -> Space[Any]:
        """Of one row."""

    @property
    def seconds(self) -> float:
        """Of one step, when it is looked at."""

    def derive(self, values: Arrays) -> Arrays:
        """Return what `step` needs of the parameters (B, ...); it is called again when they change."""

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return the states (R, ...) at which episodes begin, each with draws from its own generator."""

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Make a step with the actions (B,) or (B, A)."""

    def observe(self, state: Arrays) -> NDArray[Any]:
        """Return the observations (B, D) or (B,), a new array."""

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Return a picture (H, W, 3) of one row, whose state and parameters these are, without the leading axis."""


class ArraySimulation:
    """A `Simulation` of rows whose environment is `dynamics`.

    Args:
        tasks: one per row: values of the parameters of `dynamics`, and `changes`: `{n: values}` that hold once n
            steps have been made.
        changes_per_episode: count n from the start of each episode, instead of over the life of the row.
    """

    def __init__(self, dynamics: Dynamics, tasks: Sequence[Task], *, changes_per_episode: bool = False) -> None:
        self.dynamics = dynamics
        self.single_observation_space, self.single_action_space = dynamics.observation_space, dynamics.action_space
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / dynamics.seconds)}
        self._per_episode = changes_per_episode
        self.set_tasks(tasks)
        some = [np.random.default_rng(0)] * len(tasks)
        self._state = dynamics.start(some, {})

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every row another task; what it is in the middle of goes on under it."""
        self._parameters = Parameters(self.dynamics.parameters, tasks, per_episode=self._per_episode)
        self.tasks: list[Task] = list(tasks)
        self._derived = self.dynamics.derive(self._parameters.values)

    def begin(
        self, rows: NDArray[np.intp], generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Begin an episode in these rows."""
        if len(self._parameters.begin(rows)):
            self._derived = self.dynamics.derive(self._parameters.values)
        begun = self.dynamics.start([generators[row] for row in rows], options)
        for name, value in self._state.items():
            value[rows] = begun[name]
        return {"task": self._parameters.report(rows)}

    def advance(self, actions: NDArray[Any], rows: Rows | None) -> Transition:
        """Make a step of these rows, None: of all."""
        step = self.dynamics.step(self._state, actions, self._derived)
        finite = np.isfinite(step.reward)
        if rows is None:
            self._state = step.state
        else:
            finite |= ~rows
            for name, value in self._state.items():
                value[rows] = step.state[name][rows]
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            of_row = f" of row {row}" if len(self.tasks) > 1 else ""
            raise UnstableSimulationError(f"The reward{of_row} is not finite under its task {self.tasks[row]}.")
        info: dict[str, Any] = dict(step.info)
        changed = self._parameters.advance(rows)
        if len(changed):
            self._derived = self.dynamics.derive(self._parameters.values)
            info["task"] = self._parameters.report(slice(None))
            info["_task"] = np.isin(np.arange(len(self.tasks)), changed)
        return Transition(step.reward, step.terminated, info)

    def observe(self) -> NDArray[Any]:
        """Return the observations (B, D) or (B,)."""
        return self.dynamics.observe(self._state)

    def frame(self, row: int) -> NDArray[np.uint8]:
        """Return a picture of a row, (H, W, 3)."""
        state, values = ({k: v[row] for k, v in arrays.items()} for arrays in (self._state, self._parameters.values))
        return self.dynamics.frame(state, values)

    def save(self) -> State:
        """Return copies of everything that the future depends on, the tasks apart."""
        return {"steps": self._parameters.steps, "state": {k: v.copy() for k, v in self._state.items()}}

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit."""
        self._parameters.go_to(state["steps"])
        self._derived = self.dynamics.derive(self._parameters.values)
        self._state = {name: np.array(state["state"][name], value.dtype) for name, value in self._state.items()}


def makers(kind: Callable[..., Dynamics]) -> tuple[Callable[..., OneRowEnv], Callable[..., BatchedEnv]]:
    """Return `make` and `make_batch` of dynamics, for `ssmrl.env_runner.tasks.registration.register`.

    Their keyword arguments are the parameters of the task, `changes`, `changes_per_episode` and the fields of `kind`.
    """

    def make(*, render_mode: str | None = None, **kwargs: Any) -> OneRowEnv:
        dynamics, task, settings = sort_arguments(kind, kwargs)
        return OneRowEnv(ArraySimulation(dynamics, [task], **settings), render_mode=render_mode)

    def make_batch(
        num_envs: int,
        *,
        tasks: Sequence[Task] | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **kwargs: Any,
    ) -> BatchedEnv:
        return make_rows(kind, num_envs, tasks, max_episode_steps, autoreset_mode, kwargs)

    return make, make_batch


def make_rows(
    kind: Callable[..., Dynamics],
    num_envs: int,
    tasks: Sequence[Task] | None,
    max_episode_steps: int | None,
    autoreset_mode: AutoresetMode | str,
    kwargs: Mapping[str, Any],
) -> BatchedEnv:
    """Make a native batch of `num_envs` rows; what is missing in a row's task is in `kwargs`, beside the settings."""
    dynamics, task, settings = sort_arguments(kind, kwargs)
    rows = check_tasks([{}] * num_envs if tasks is None else tasks, num_envs, task)
    simulation = ArraySimulation(dynamics, rows, **settings)
    return BatchedEnv(simulation, max_episode_steps=max_episode_steps, autoreset_mode=autoreset_mode, defaults=task)


def sort_arguments(
    kind: Callable[..., Dynamics], kwargs: Mapping[str, Any]
) -> tuple[Dynamics, dict[str, Any], dict[str, Any]]:
    """Tell the settings of the dynamics, the parameters of the task and the settings of the simulation apart."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    dynamics = kind(**{name: value for name, value in kwargs.items() if name in names})
    rest = {name: value for name, value in kwargs.items() if name not in names}
    settings = {name: rest.pop(name) for name in ("changes_per_episode",) if name in rest}
    for name in rest:
        if name not in dynamics.parameters and name != "changes":
            raise ValueError(
                f"This environment has the parameters {[*dynamics.parameters]} and the settings {names}; got {name!r}."
            )
    return dynamics, rest, settings
