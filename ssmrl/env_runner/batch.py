"""A vector environment whose rows are stepped by one native simulation, instead of a loop over environments.

Letters: B rows, D features of an observation, A action components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.simulation import (
    Simulation,
    State,
    Task,
    UnstableSimulationError,
    check_tasks,
    load_generator,
    save_generator,
)

__all__ = ["BatchedEnv"]


class BatchedEnv(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """B rows of a `Simulation` behind Gymnasium's vector interface.

    Observations, rewards, terminations, truncations and infos are those of a `SyncVectorEnv` over the single
    environments with the same seeds, in all three autoreset modes. Row i draws from `numpy` generator i alone.

    Args:
        simulation: the rows.
        max_episode_steps: truncate after that many steps. None: never.
        autoreset_mode: as Gymnasium's vector environments have it.
        defaults: parameters of every row's task that it does not give itself.
    """

    def __init__(
        self,
        simulation: Simulation,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        defaults: Task | None = None,
    ) -> None:
        if max_episode_steps is not None:
            max_episode_steps = require_integer("max_episode_steps", max_episode_steps, 1)
        self.simulation = simulation
        self._defaults = {} if defaults is None else dict(defaults)
        self._failed = False
        self.num_envs = len(simulation.tasks)
        self.max_episode_steps = max_episode_steps
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**simulation.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = simulation.single_observation_space
        self.single_action_space = simulation.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._generators: list[np.random.Generator] = []
        self._elapsed = np.zeros(self.num_envs, np.int64)
        # (B,) rows whose episode has ended and that have not begun another one.
        self._ended = np.zeros(self.num_envs, np.bool_)
        # What was returned last: rows that a `reset` leaves alone have it returned again.
        self._observation = np.zeros(0)

    @property
    def tasks(self) -> list[Task]:
        """The task of every row, defaults included."""
        return [*check_tasks(list(self.simulation.tasks))]

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every row another task: it needs a `reset` before the next `step` for its episodes to be of one task.

        Raises:
            ValueError, TypeError: there are not B of them, or one has a wrong name or value. Nothing has changed then.
        """
        self.simulation.set_tasks(check_tasks(tasks, self.num_envs, self._defaults))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode in every row, or in those of `options["reset_mask"]`, Bool (B,).

        Args:
            seed: one per row, or an integer: row i gets seed + i, as Gymnasium has it. None: streams continue; the
                first time they are not reproducible.
            options: what the single environments take, and the mask.
        """
        options = {} if options is None else dict(options)
        rows = options.pop("reset_mask", None)
        rows = np.ones(self.num_envs, np.bool_) if rows is None else np.asarray(rows)
        if rows.dtype != np.bool_ or rows.shape != (self.num_envs,):
            raise ValueError(
                f"`options['reset_mask']` must be Bool of shape ({self.num_envs},); got {rows.dtype} {rows.shape}."
            )
        seeds: Sequence[int | None]
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"`seed` must be an integer or hold one per row, {self.num_envs}; got {len(seeds)}.")
        if not self._generators:
            if not rows.all():
                raise ValueError("The first `reset` must reset every row.")
            self._generators = [seeding.np_random(s)[0] for s in seeds]
        else:
            for row in np.flatnonzero(rows).tolist():
                if seeds[row] is not None:
                    self._generators[row] = seeding.np_random(seeds[row])[0]
        info = self._begin(rows, options)
        if rows.all():
            self._failed = False
        observation = self.simulation.observe()
        if not rows.all():
            observation[~rows] = self._observation[~rows]
        self._observation = observation.copy()
        return observation, info

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step every row, or begin its next episode where the autoreset mode says so.

        Args:
            actions: (B,) or (B, A).

        Returns:
            Observations (B, D), rewards (B,), terminations (B,), truncations (B,) and Gymnasium's vector info.
        """
        if not self._generators:
            raise ValueError("`reset` must be called before the first `step`.")
        if self._failed:
            raise UnstableSimulationError("A row became unstable: reset all rows, or restore a state, before a step.")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._ended.any():
            raise ValueError(f"Row {np.flatnonzero(self._ended)[0]} has ended and must be reset before it is stepped.")
        waiting = self._ended if self._ended.any() else None
        info: dict[str, Any] = {}
        stepped = None
        if waiting is not None:
            stepped = ~waiting
            info = self._begin(waiting, {})
        try:
            reward, terminated, step_info = self.simulation.advance(np.asarray(actions), stepped)
        except UnstableSimulationError:
            self._failed = True
            raise
        if stepped is None:
            self._elapsed += 1
            present = np.ones(self.num_envs, np.bool_)
        else:
            self._elapsed += stepped
            reward, terminated, present = np.where(stepped, reward, 0.0), terminated & stepped, stepped
        truncated = np.zeros(self.num_envs, np.bool_)
        if self.max_episode_steps is not None:
            truncated = present & (self._elapsed >= self.max_episode_steps)
        ended = terminated | truncated
        observation = self.simulation.observe()
        _merge(info, step_info, present)
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            info = _of_last_steps(info, ended, observation)
            _merge(info, self._begin(ended, {}), ended)
            observation = self.simulation.observe()
        else:
            self._ended = ended
        self._observation = observation.copy()
        return observation, reward, terminated, truncated, info

    def save(self) -> State:
        """Return everything that the future of all rows depends on, as arrays and JSON values."""
        return {
            "tasks": self.tasks,
            "simulation": self.simulation.save(),
            "elapsed": self._elapsed.copy(),
            "ended": self._ended.copy(),
            "observation": self._observation.copy(),
            "generators": [save_generator(generator) for generator in self._generators],
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit; the environment must have been made with the same arguments."""
        if len(state["elapsed"]) != self.num_envs:
            raise ValueError(f"`state` must be of {self.num_envs} rows; got {len(state['elapsed'])}.")
        self.simulation.set_tasks(check_tasks(state["tasks"], self.num_envs))
        self.simulation.restore(state["simulation"])
        self._elapsed = np.array(state["elapsed"], np.int64)
        self._ended = np.array(state["ended"], np.bool_)
        self._failed = False
        self._observation = np.array(state["observation"])
        self._generators = [load_generator(saved) for saved in state["generators"]]

    def _begin(self, rows: NDArray[np.bool_], options: Mapping[str, Any]) -> dict[str, Any]:
        info = self.simulation.begin(np.flatnonzero(rows), self._generators, options)
        self._elapsed[rows] = 0
        self._ended = self._ended & ~rows
        merged: dict[str, Any] = {}
        _merge(merged, info, rows, compact=True)
        return merged


def _merge(info: dict[str, Any], new: Mapping[str, Any], rows: NDArray[np.bool_], *, compact: bool = False) -> None:
    """Put values of these rows into a vector info, as Gymnasium does: zeros elsewhere, and `_name` says which rows.

    Where `new` has a `_name` itself, only those of the rows have the value. `compact`: the values are of the rows only,
    else of all.
    """
    of_rows = rows, rows.all(), rows.any()
    for name, value in new.items():
        if name.startswith("_"):
            continue
        held, every, some = of_rows
        if "_" + name in new:
            held = rows & new["_" + name]
            every, some = held.all(), held.any()
        if not some:
            continue
        if isinstance(value, Mapping):
            _merge(info.setdefault(name, {}), value, held, compact=compact)
        elif every:
            info[name] = value
        else:
            if name not in info:
                info[name] = np.zeros((len(held), *value.shape[1:]), value.dtype)
            if compact:
                info[name][held] = value
            else:
                np.copyto(info[name], value, where=held.reshape(-1, *[1] * (value.ndim - 1)))
        mask = info.get("_" + name)
        info["_" + name] = held.copy() if mask is None else mask | held


def _of_last_steps(info: dict[str, Any], ended: NDArray[np.bool_], observation: NDArray[Any]) -> dict[str, Any]:
    """Move the info of rows that ended into `final_info`, and their observations into `final_obs`."""
    final_obs = np.full(len(ended), None, dtype=object)
    for row in np.flatnonzero(ended):
        final_obs[row] = observation[row]
    result: dict[str, Any] = {"final_obs": final_obs, "_final_obs": ended.copy()}
    final: dict[str, Any] = {}
    _merge(final, info, ended)
    result["final_info"], result["_final_info"] = final, ended.copy()
    _merge(result, info, ~ended)
    return result
