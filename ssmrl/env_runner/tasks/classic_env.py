"""Gymnasium's CartPole or Pendulum with a task: one environment."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv

from ssmrl.env_runner.simulation import State, Task, check_tasks, load_generator, save_generator
from ssmrl.env_runner.tasks.cartpole import CartPole
from ssmrl.env_runner.tasks.parameters import Parameter, Parameters
from ssmrl.env_runner.tasks.pendulum import Pendulum

__all__ = ["ClassicEnv"]

_CLASSES: dict[str, tuple[Any, Mapping[str, Parameter]]] = {
    "CartPole-v1": (CartPoleEnv, CartPole.parameters),
    "Pendulum-v1": (PendulumEnv, Pendulum.parameters),
}


class ClassicEnv(gymnasium.Env[Any, Any]):
    """Gymnasium's environment, whose physical parameters are a task's.

    Args:
        env_id: "CartPole-v1" or "Pendulum-v1".
        task: values of the parameters, those not given nominal, and `changes`: `{n: values}` that hold once n
            steps have been made.
        changes_per_episode: count n from the start of each episode, instead of over the life of the environment.
        render_mode, **settings: of Gymnasium's class.

    The info of `reset`, and of the step after which the task has changed, has the task under `"task"`.

    Raises:
        ValueError: a parameter is unknown, or not positive and finite.
    """

    def __init__(self, env_id: str, task: Task, *, changes_per_episode: bool = False, **settings: Any) -> None:
        kind, self._known = _CLASSES[env_id]
        self._inner: Any = kind(**settings)
        self._inner.state = self._inner.steps_beyond_terminated = None  # Pendulum has not got them yet, or at all.
        self._per_episode = changes_per_episode
        self.metadata, self.render_mode = self._inner.metadata, self._inner.render_mode
        self.observation_space, self.action_space = self._inner.observation_space, self._inner.action_space
        self._defaults = dict(task)
        self.set_task({})

    @property
    def state(self) -> Any:
        """Gymnasium's: what moves, and how fast."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    def set_task(self, task: Task) -> None:
        """Give it another task; an episode that it is in the middle of goes on under it.

        What it does not give is as in the constructor.
        """
        (given,) = check_tasks([task], 1, self._defaults)
        self._parameters = Parameters(self._known, [given], per_episode=self._per_episode)
        self._given = given
        self._apply()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        if len(self._parameters.begin(np.arange(1))):
            self._apply()
        super().reset(seed=seed)
        self._inner.np_random = self.np_random
        observation, info = self._inner.reset(options=options)
        return observation, {**info, "task": self._task()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Make a step."""
        observation, reward, terminated, truncated, info = self._inner.step(action)
        if len(self._parameters.advance(None)):
            self._apply()
            info = {**info, "task": self._task()}
        return observation, reward, terminated, truncated, info

    def render(self) -> Any:
        """Return a frame, as the render mode has it."""
        return self._inner.render()

    def close(self) -> None:
        """Free what rendering holds."""
        self._inner.close()

    def save(self) -> State:
        """Return everything that its future depends on, as arrays and JSON values."""
        return {
            "task": copy.deepcopy(self._given),
            "steps": self._parameters.steps,
            "state": None if self._inner.state is None else self._inner.state.copy(),
            "beyond": self._inner.steps_beyond_terminated,
            "generator": save_generator(self.np_random),
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit."""
        self.set_task(state["task"])
        self._parameters.go_to(state["steps"])
        self._apply()
        self._inner.state = None if state["state"] is None else np.array(state["state"], np.float64)
        self._inner.steps_beyond_terminated = state["beyond"]
        self._inner.last_u = None  # The torque that Pendulum draws an arrow of.
        self.np_random = load_generator(state["generator"])

    def _task(self) -> dict[str, float]:
        return {name: float(value[0]) for name, value in self._parameters.values.items()}

    def _apply(self) -> None:
        for name, value in self._task().items():
            setattr(self._inner, name, value)
        if isinstance(self._inner, CartPoleEnv):  # It computes these two once, in its constructor.
            self._inner.total_mass = self._inner.masspole + self._inner.masscart
            self._inner.polemass_length = self._inner.masspole * self._inner.length
