"""A robot of Gymnasium with a task: one environment.

Letters: D features of an observation, A actuators.
"""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.robots.definitions import robot
from ssmrl.env_runner.robots.log import log_warnings
from ssmrl.env_runner.robots.physics import actuator_mask, model_fields, set_physics
from ssmrl.env_runner.robots.reward import Reward
from ssmrl.env_runner.robots.task import RobotTask, factors_of, parse_task, report
from ssmrl.env_runner.schedule import Schedule
from ssmrl.env_runner.simulation import (
    State,
    Task,
    UnstableSimulationError,
    check_tasks,
    load_generator,
    save_generator,
)

if TYPE_CHECKING:
    import mujoco

__all__ = ["RobotEnv", "is_unstable"]


class RobotEnv(gymnasium.Env[NDArray[np.float64], NDArray[np.float32]]):
    """A MuJoCo robot of Gymnasium, whose reward and physics are a task's.

    Without a task it is Gymnasium's environment.

    Args:
        env_id: `"HalfCheetah-v5"` and the like: Hopper, Walker2d, Ant, Humanoid; versions 4 and 5.
        reward: what it is paid for, whose parameters the task has. None: Gymnasium's own reward.
        task: parameters of the reward and of the physics (`ssmrl.env_runner.robots.physics.PHYSICS`), and `changes`:
            `{n: parameters}` that hold once n steps have been made.
        changes_per_episode: count n from the start of each episode, instead of over the life of the environment.
        frame_skip: simulation steps of one step. None: Gymnasium's.
        settings: of Gymnasium's class, `render_mode` among them.

    The info of `reset`, and of the step after which the task is another one, has the task under `"task"`.

    Raises:
        ValueError: the id or a parameter of the task is unknown, missing or out of range.
        UnstableSimulationError: in `step`, where the simulation's state is not finite any more.
    """

    def __init__(
        self,
        env_id: str,
        *,
        reward: Reward | None = None,
        task: Task | None = None,
        changes_per_episode: bool = False,
        frame_skip: int | None = None,
        **settings: Any,
    ) -> None:
        log_warnings()
        self._robot = robot(env_id)
        self._inner = self._robot.make(**settings)
        if frame_skip is not None:
            self._inner.frame_skip = require_integer("frame_skip", frame_skip, 1)
        self._settings = self._robot.settings(settings)
        self._reward = reward
        self._per_episode = changes_per_episode
        self.metadata = {**self._inner.metadata, "render_fps": round(1 / self._inner.dt)}
        self.render_mode = self._inner.render_mode
        self.observation_space, self.action_space = self._inner.observation_space, self._inner.action_space
        self._nominal = copy.copy(self._inner.model)
        self._data = _Rows(self._inner, self._robot.needs(self._settings, 1.0))
        self._defaults = {} if task is None else dict(task)
        self.set_task({})

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model, with the task's physics."""
        return self._inner.model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data."""
        return self._inner.data

    @property
    def frame_skip(self) -> int:
        """Simulation steps of one step."""
        frame_skip: int = self._inner.frame_skip
        return frame_skip

    def set_task(self, task: Task) -> None:
        """Give it another task; an episode that it is in the middle of goes on under it.

        What it does not give is as in the constructor.
        """
        (given,) = check_tasks([task], 1, self._defaults)
        self._task = parse_task(self._nominal, self._reward, given)
        self._given = given
        self._factors = factors_of([self._task])
        self._schedule = Schedule([self._task.changes], per_episode=self._per_episode)
        self._apply()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self._inner.np_random = self.np_random
        if len(self._schedule.begin(np.arange(1))):
            self._apply()
        observation, info = self._inner.reset(options=options)
        return observation, {**info, "task": self._report()}

    def step(self, action: Any) -> tuple[NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        """Make a step."""
        before = None if self._reward is None else self._robot.position(self._data.now(), self._settings)
        applied = action * self._mask if self._disabled else action
        observation, reward, terminated, truncated, info = self._inner.step(applied)
        if is_unstable(self._inner.data.warning.number[None])[0]:
            raise UnstableSimulationError(f"The simulation became unstable under the task {self._given}.", self)
        if self._reward is not None and before is not None:
            data = self._data.now()
            motion = self._robot.motion(data, self._settings, before, np.asarray(applied)[None], self._inner.dt)
            rewards, parts = self._reward(self._parameters, motion)
            reward = rewards[0]
            info = {name: value for name, value in info.items() if "reward" not in name}  # Gymnasium's own
            info |= {name: value[0] for name, value in parts.items()}
        if len(self._schedule.advance(None)):
            self._apply()
            info = {**info, "task": self._report()}
        return observation, reward, bool(terminated), truncated, info

    def render(self) -> Any:
        """Return a frame, as the render mode has it."""
        return self._inner.render()

    def close(self) -> None:
        """Free what rendering holds."""
        self._inner.close()

    def save(self) -> State:
        """Return everything that its future depends on, as arrays and JSON values."""
        import mujoco

        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self._inner.model, spec))
        mujoco.mj_getState(self._inner.model, self._inner.data, state, spec)
        data = self._inner.data
        return {
            "task": copy.deepcopy(self._given),
            "steps": self._schedule.steps.copy(),
            "physics": state,
            "positions": np.concatenate((data.xpos, data.xipos)),
            "generator": save_generator(self.np_random),
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit."""
        import mujoco

        self.set_task(state["task"])
        self._schedule.go_to(np.arange(1), state["steps"])
        self._apply()
        data = self._inner.data
        mujoco.mj_resetData(self._inner.model, data)
        physics = np.asarray(state["physics"], np.float64)
        mujoco.mj_setState(self._inner.model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        # Velocities are differences of positions that MuJoCo derived a simulation step before the state.
        data.xpos[:], data.xipos[:] = np.split(np.asarray(state["positions"]), 2)
        self.np_random = load_generator(state["generator"])

    def _current(self) -> RobotTask:
        return self._task.changed(self._schedule.values(0))

    def _apply(self) -> None:
        task = self._current()
        set_physics(self._inner.model, model_fields(self._nominal, task.physics, self._factors))
        self._mask = actuator_mask(self._nominal.nu, task.physics.get("disabled", ()))
        self._disabled = not self._mask.all()
        self._parameters = {name: np.asarray(value, np.float64)[None] for name, value in task.reward.items()}

    def _report(self) -> dict[str, Any]:
        return report(self._current(), self._nominal.nu, self._factors)


def is_unstable(warnings: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return in which rows MuJoCo found a state that is not finite, or huge; warnings (B, kinds) are its counters."""
    unstable: NDArray[np.bool_] = np.any(warnings[:, _bad_kinds()], axis=1)
    return unstable


@cache
def _bad_kinds() -> list[int]:
    import mujoco

    kinds = mujoco.mjtWarning
    return [int(k) for k in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC, kinds.mjWARN_BADCTRL)]


class _Rows:
    """The data of one simulation as those of a batch of one row."""

    def __init__(self, env: Any, fields: tuple[str, ...]) -> None:
        self._env, self._fields = env, ("qpos", "qvel", "ctrl", *fields)

    def now(self) -> SimpleNamespace:
        data = {name: getattr(self._env.data, name)[None] for name in self._fields}
        return SimpleNamespace(**data, mass=self._env.model.body_mass[None], init_qpos=self._env.init_qpos)
