"""Many robots of Gymnasium stepped on native threads, a task per row.

Letters: B rows, D features of an observation, A actuators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.robots.definitions import robot
from ssmrl.env_runner.robots.log import log_warnings
from ssmrl.env_runner.robots.physics import FACTORS, model_fields
from ssmrl.env_runner.robots.reward import Reward
from ssmrl.env_runner.robots.single import is_unstable
from ssmrl.env_runner.robots.task import RobotTask, factors_of, parse_task, report
from ssmrl.env_runner.schedule import Schedule
from ssmrl.env_runner.simulation import Rows, State, Task, Transition, UnstableSimulationError

__all__ = ["RobotSimulation"]


class RobotSimulation:
    """B rows of a `RobotEnv` on `mujoco.batch`, equal to B of them bit for bit.

    Args:
        env_id, reward, changes_per_episode, frame_skip: as `RobotEnv` has them, for all rows.
        tasks: one per row.
        num_threads: that the rows are stepped on. None: one per CPU.
        settings: of Gymnasium's class.
    """

    def __init__(
        self,
        env_id: str,
        tasks: Sequence[Task],
        *,
        reward: Reward | None = None,
        changes_per_episode: bool = False,
        frame_skip: int | None = None,
        num_threads: int | None = None,
        **settings: Any,
    ) -> None:
        from mujoco import batch

        log_warnings()
        self._robot = robot(env_id)
        prototype = self._robot.make(**settings)
        if frame_skip is not None:
            prototype.frame_skip = require_integer("frame_skip", frame_skip, 1)
        num_threads = 0 if num_threads is None else require_integer("num_threads", num_threads, 1)
        self._settings = self._robot.settings(settings)
        self._reward, self._per_episode = reward, changes_per_episode
        self._frame_skip, self._dt = prototype.frame_skip, prototype.dt
        self._model, self._init = prototype.model, (prototype.init_qpos, prototype.init_qvel)
        self.single_observation_space = prototype.observation_space
        self.single_action_space = prototype.action_space
        self.metadata = {**prototype.metadata, "render_fps": round(1 / prototype.dt)}

        cost = self._robot.contact_cost(self._settings) if reward is None else reward.contact_cost
        fields = self._robot.needs(self._settings, cost)
        self._derived = bool(fields)
        # MuJoCo computes contact forces on request only, from what a row's simulation has at hand after a step.
        self._forces = "cfrc_ext" in fields
        self._batch = batch.Batch(self._model, len(tasks), num_threads, persistent=self._forces)
        self._data = SimpleNamespace(init_qpos=self._init[0], mass=self._model.body_mass[None])
        for name in ("qpos", "qvel", "ctrl", *fields):
            setattr(self._data, name, self._batch.bind(name))
        if self._forces:
            import mujoco

            self._scratch = mujoco.MjData(self._model)
            self._contacts = self._batch.bind("ncon")
            self._data.cfrc_ext = np.zeros((len(tasks), *self._scratch.cfrc_ext.shape))
        self._batch.reset()
        self._fresh = self._batch.state[0].copy()  # without noise, the same for all tasks
        self._position = self._robot.position(self._data, self._settings)
        self._written: set[str] = set()
        self.set_tasks(tasks)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every row another task."""
        self._tasks = [self._parsed(task, row) for row, task in enumerate(tasks)]
        self.tasks = list(tasks)
        self._reports: list[dict[str, NDArray[Any]]] = [{}] * len(tasks)
        self._factors = factors_of(self._tasks)
        self._schedule = Schedule([task.changes for task in self._tasks], per_episode=self._per_episode)
        self._apply(np.arange(len(tasks)))

    def begin(
        self, rows: NDArray[np.intp], generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> dict[str, NDArray[Any]]:
        """Begin an episode in these rows."""
        back = self._schedule.begin(rows)
        if len(back):
            self._apply(back)
        self._batch.state[rows] = self._fresh
        self._batch.warning[rows] = 0
        scale = self._settings["reset_noise_scale"]
        (init_qpos, init_qvel), data = self._init, self._data
        noise = np.empty((2, len(rows), len(init_qpos)))
        for n, row in enumerate(rows.tolist()):
            generator = generators[row]
            noise[0, n] = generator.uniform(-scale, scale, len(init_qpos))
            if self._robot.normal:
                noise[1, n, : len(init_qvel)] = scale * generator.standard_normal(len(init_qvel))
            else:
                noise[1, n, : len(init_qvel)] = generator.uniform(-scale, scale, len(init_qvel))
        data.qpos[rows] = init_qpos + noise[0]
        data.qvel[rows] = init_qvel + noise[1, :, : len(init_qvel)]
        if self._derived:  # it changes nothing else: the warm start of the solver stays 0 until a step is made
            self._batch.forward(rows)
        if self._forces:
            data.cfrc_ext[rows] = 0.0
        self._position[rows] = self._robot.position(data, self._settings)[rows]
        info: dict[str, Any] = {name: value[rows] for name, value in self._robot.info(data, None).items()}
        info["task"] = {name: value[rows] for name, value in self._now.items()}
        return info

    def advance(self, actions: NDArray[Any], rows: Rows | None) -> Transition:
        """Make a step of these rows, None: of all."""
        if self._disabled:
            actions = actions * self._mask
        data = self._data
        data.ctrl[:] = actions
        self._batch.step(rows, nstep=self._frame_skip)
        self._check_stable()
        if self._forces:
            self._compute_forces(rows)
        motion = self._robot.motion(data, self._settings, self._position, actions, self._dt)
        self._position = motion.position if rows is None else np.where(rows[:, None], motion.position, self._position)
        if self._reward is None:
            reward, parts = self._robot.reward(motion, self._settings)
        else:
            reward, parts = self._reward(self._now, motion)
        info: dict[str, Any] = {**self._robot.info(data, motion), **parts}
        terminated = self._robot.terminated(motion, self._settings)
        changed = self._schedule.advance(rows)
        if len(changed):
            self._apply(changed)
            info["task"] = {name: value.copy() for name, value in self._now.items()}
            info["_task"] = np.isin(np.arange(len(self.tasks)), changed)
        return Transition(reward, terminated, info)

    def observe(self) -> NDArray[Any]:
        """Return the observations (B, D)."""
        return self._robot.observe(self._data, self._settings)

    def save(self) -> State:
        """Return copies of everything that the future depends on, the tasks apart."""
        return {
            "physics": self._batch.state.copy(),
            "warning": self._batch.warning.copy(),
            "position": self._position.copy(),
            "steps": self._schedule.steps.copy(),
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit."""
        self._schedule.go_to(np.arange(len(self.tasks)), state["steps"])
        self._apply(np.arange(len(self.tasks)))
        self._batch.reset()
        self._batch.state[:] = state["physics"]
        self._batch.warning[:] = state["warning"]
        self._position = np.array(state["position"])

    def _parsed(self, task: Task, row: int) -> RobotTask:
        try:
            return parse_task(self._model, self._reward, task)
        except ValueError as error:
            raise ValueError(f"Row {row}: {error}") from None

    def _apply(self, rows: NDArray[np.intp]) -> None:
        """Set what the tasks of these rows are now: physics, disabled actuators and parameters of the reward."""
        tasks = [self._tasks[row].changed(self._schedule.values(row)) for row in rows]
        names = [name for name in FACTORS if name in self._factors or FACTORS[name] in self._written]
        self._written |= {FACTORS[name] for name in names}
        if names:
            targets = {FACTORS[name]: self._batch.expand(FACTORS[name]) for name in names}
            for row, task in zip(rows, tasks, strict=True):
                for field, value in model_fields(self._model, task.physics, names).items():
                    targets[field][row] = value
            self._batch.set_const(rows)
            if "body_mass" in targets:
                self._data.mass = targets["body_mass"]
        for row, task in zip(rows, tasks, strict=True):
            self._reports[row] = report(task, self._model.nu, self._factors)
        # Name -> (B, ...), as the info tells it; the reward's parameters and the mask are among it.
        self._now = {
            name: np.stack(np.broadcast_arrays(*(told[name] for told in self._reports))) for name in self._reports[0]
        }
        self._mask = ~self._now["disabled"]
        self._disabled = not self._mask.all()

    def _check_stable(self) -> None:
        unstable = is_unstable(self._batch.warning[:, :, 1])
        if unstable.any():
            row = int(np.flatnonzero(unstable)[0])
            self._batch.warning[unstable] = 0
            raise UnstableSimulationError(
                f"The simulation of row {row} became unstable under its task {self.tasks[row]}."
            )

    def _compute_forces(self, rows: Rows | None) -> None:
        import mujoco

        touching = self._contacts > 0
        stepped = slice(None) if rows is None else rows
        self._data.cfrc_ext[stepped] = 0.0
        for row in np.flatnonzero(touching if rows is None else touching & rows):
            self._batch.get_data(row, self._scratch)
            mujoco.mj_rnePostConstraint(self._model, self._scratch)
            self._data.cfrc_ext[row] = self._scratch.cfrc_ext
