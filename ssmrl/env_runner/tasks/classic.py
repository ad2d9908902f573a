"""CartPole and Pendulum with physics of their own: a task is a dict of physical parameters.

A task per row of an `Environment`:

    makers = [partial(make_with_physics, env_id, sample_physics(env_id, seed)) for seed in seeds]
    environment = Environment(makers)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from ssmrl.env_runner._checks import require_integer

__all__ = ["NOMINAL_PHYSICS", "make_with_physics", "sample_physics"]

NOMINAL_PHYSICS: dict[str, dict[str, float]] = {
    "CartPole-v1": {"gravity": 9.8, "masscart": 1.0, "masspole": 0.1, "length": 0.5},
    "Pendulum-v1": {"g": 10.0, "m": 1.0, "l": 1.0},
}
"""Gymnasium's values of the parameters that can differ, by environment id. Accelerations in m/s²,
masses in kg, lengths in m; the `length` of CartPole is half that of its pole."""


def sample_physics(env_id: str, seed: int, *, base: float = 1.5, spread: float = 2.0) -> dict[str, float]:
    """Draw a task: every parameter is nominal · base^u with its own u ~ U[-spread, spread].

    The scheme is that of the random-parameter MuJoCo tasks (D. Lee et al., rand_param_envs,
    https://github.com/dennisl88/rand_param_envs: masses · 1.5^U[-3, 3]).

    Args:
        env_id: "CartPole-v1" or "Pendulum-v1".
        seed: the task is a function of this integer.
        base: > 0.
        spread: ≥ 0; 0 is the nominal task.

    Returns:
        The value of every parameter in `NOMINAL_PHYSICS[env_id]`.
    """
    nominal = _nominal(env_id)
    seed = require_integer("seed", seed, 0)
    if not (math.isfinite(base) and base > 0):
        raise ValueError(f"`base` must be positive and finite; got {base}.")
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"`spread` must be at least 0 and finite; got {spread}.")
    exponents = np.random.default_rng(seed).uniform(-spread, spread, len(nominal))
    return {name: value * base ** float(u) for (name, value), u in zip(nominal.items(), exponents, strict=True)}


def make_with_physics(
    env_id: str,
    physics: Mapping[str, float],
    *,
    changes: Mapping[int, Mapping[str, float]] | None = None,
    **kwargs: Any,
) -> gymnasium.Env[Any, Any]:
    """Make the environment with these physical parameters; those not named stay nominal.

    Args:
        env_id: "CartPole-v1" or "Pendulum-v1".
        physics: values of parameters in `NOMINAL_PHYSICS[env_id]`, positive and finite.
        changes: `{n: other physics}`: parameters that change when the environment has made n ≥ 1 steps, in mid-episode
            where that is where it is; those not named stay as they are. Steps are counted over the life of the
            environment, across episodes and seeds; what a vector environment's autoreset does in place of a step is
            none. None: nothing ever changes.
        **kwargs: arguments of `gymnasium.make`.

    Returns:
        The environment. The info of its `reset`, and of the first step after a change, holds all parameters under
        `"task"`: those of the next step, and of that step. Of a vector environment, `info["task"][name]` is (B,), and
        `info["_task"]` tells for which rows.
    """
    nominal = _nominal(env_id)
    _check_physics("physics", env_id, physics)
    checked: dict[int, dict[str, float]] = {}
    for step, changed in ({} if changes is None else changes).items():
        _check_physics(f"changes[{step}]", env_id, changed)
        checked[require_integer("changes.keys()", step, 1)] = {k: float(v) for k, v in changed.items()}
    env = gymnasium.make(env_id, **kwargs)
    return _Physics(env, {**nominal, **{k: float(v) for k, v in physics.items()}}, checked)


class _Physics(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Sets the parameters of a simulator, changes them at given steps, and reports them in the info."""

    def __init__(
        self, env: gymnasium.Env[Any, Any], task: dict[str, float], changes: dict[int, dict[str, float]]
    ) -> None:
        super().__init__(env)
        self._changes = changes
        self._num_steps = 0
        self._set(task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._change()
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "task": dict(self._task)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        changed = self._change()
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._num_steps += 1
        info = {**info, "task": dict(self._task)} if changed else info
        return observation, reward, terminated, truncated, info

    def _change(self) -> bool:
        """Set what holds for the next step, and return whether it is another than before."""
        if self._num_steps not in self._changes:
            return False
        self._set({**self._task, **self._changes[self._num_steps]})
        return True

    def _set(self, task: dict[str, float]) -> None:
        self._task = task
        simulator: Any = self.env.unwrapped
        for name, value in task.items():
            setattr(simulator, name, value)
        if "masscart" in task:  # CartPole computes these two once, in its constructor
            simulator.total_mass = simulator.masspole + simulator.masscart
            simulator.polemass_length = simulator.masspole * simulator.length


def _check_physics(argument: str, env_id: str, physics: Mapping[str, float]) -> None:
    for name, value in physics.items():
        if name not in NOMINAL_PHYSICS[env_id]:
            raise ValueError(f"`{argument}` of {env_id} must be among {[*NOMINAL_PHYSICS[env_id]]}; got {name!r}.")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{argument}[{name!r}]` must be positive and finite; got {value}.")


def _nominal(env_id: str) -> dict[str, float]:
    if env_id not in NOMINAL_PHYSICS:
        raise ValueError(f"`env_id` must be one of {[*NOMINAL_PHYSICS]}; got {env_id!r}.")
    return NOMINAL_PHYSICS[env_id]
