"""One environment that is a simulation of one row."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner.simulation import (
    Simulation,
    State,
    Task,
    UnstableSimulationError,
    check_tasks,
    load_generator,
    save_generator,
)

__all__ = ["Drawn", "OneRowEnv"]


@runtime_checkable
class Drawn(Protocol):
    """A simulation that can be looked at."""

    def frame(self, row: int) -> NDArray[np.uint8]:
        """Return a picture of a row, (H, W, 3)."""


class OneRowEnv(gymnasium.Env[Any, Any]):
    """A Gymnasium environment that is row 0 of a simulation of one row.

    Row i of a `BatchedEnv` over the same kind of simulation gives the same numbers, for the same seed.

    Args:
        simulation: of one row. Where it has a method `frame(row)`, the environment can be rendered.
        render_mode: "rgb_array", or None.

    The info of `reset`, and of the step after which the task has changed, has the task under `"task"`.

    Raises:
        ValueError: there are more rows, or they cannot be rendered that way.
    """

    def __init__(self, simulation: Simulation, *, render_mode: str | None = None) -> None:
        if len(simulation.tasks) != 1:
            raise ValueError(f"`simulation` must have one row; got {len(simulation.tasks)}.")
        modes = ["rgb_array"] if isinstance(simulation, Drawn) else []
        if render_mode is not None and render_mode not in modes:
            raise ValueError(f"`render_mode` must be None or one of {modes}; got {render_mode!r}.")
        self.simulation = simulation
        self.observation_space = simulation.single_observation_space
        self.action_space = simulation.single_action_space
        self.metadata = {**simulation.metadata, "render_modes": modes}
        self.render_mode = render_mode
        self._defaults = dict(simulation.tasks[0])

    def set_task(self, task: Task) -> None:
        """Give it another task; an episode that it is in the middle of goes on under it.

        What it does not give is as in the constructor.
        """
        self.simulation.set_tasks(check_tasks([task], 1, self._defaults))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        info = self.simulation.begin(np.arange(1), [self.np_random], {} if options is None else options)
        return self.simulation.observe()[0], _first(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Make a step; it is never truncated."""
        try:
            reward, terminated, info = self.simulation.advance(np.asarray(action)[None], None)
        except UnstableSimulationError as error:
            raise UnstableSimulationError(str(error), self) from None
        return self.simulation.observe()[0], float(reward[0]), bool(terminated[0]), False, _first(info)

    def render(self) -> Any:
        """Return a picture (H, W, 3). None: it has no render mode."""
        if self.render_mode is None or not isinstance(self.simulation, Drawn):
            return None
        return self.simulation.frame(0)

    def save(self) -> State:
        """Return everything that its future depends on, as arrays and JSON values."""
        return {
            "task": copy.deepcopy(dict(self.simulation.tasks[0])),
            "simulation": self.simulation.save(),
            "generator": save_generator(self.np_random),
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit; the environment must have been made with the same settings."""
        self.set_task(state["task"])
        self.simulation.restore(state["simulation"])
        self.np_random = load_generator(state["generator"])


def _first(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the info of row 0."""
    return {
        name: _first(value) if isinstance(value, Mapping) else value[0]
        for name, value in info.items()
        if not name.startswith("_")
    }
