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


def make_with_physics(env_id: str, physics: Mapping[str, float], **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make the environment with these physical parameters; those not named stay nominal.

    Args:
        env_id: "CartPole-v1" or "Pendulum-v1".
        physics: values of parameters in `NOMINAL_PHYSICS[env_id]`, positive and finite.
        **kwargs: arguments of `gymnasium.make`.

    Returns:
        The environment. The info of its `reset` holds all parameters under `"task"`; of a vector
        environment, `info["task"][name]` is (B,).
    """
    nominal = _nominal(env_id)
    for name, value in physics.items():
        if name not in nominal:
            raise ValueError(f"`physics` of {env_id} must be among {[*nominal]}; got {name!r}.")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`physics[{name!r}]` must be positive and finite; got {value}.")
    env = gymnasium.make(env_id, **kwargs)
    simulator: Any = env.unwrapped
    for name, value in physics.items():
        setattr(simulator, name, float(value))
    if env_id == "CartPole-v1":
        simulator.total_mass = simulator.masspole + simulator.masscart
        simulator.polemass_length = simulator.masspole * simulator.length
    return _TaskInfo(env, {name: getattr(simulator, name) for name in nominal})


class _TaskInfo(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Reports the task in the info of every reset."""

    def __init__(self, env: gymnasium.Env[Any, Any], task: dict[str, float]) -> None:
        super().__init__(env)
        self._task = task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "task": dict(self._task)}


def _nominal(env_id: str) -> dict[str, float]:
    if env_id not in NOMINAL_PHYSICS:
        raise ValueError(f"`env_id` must be one of {[*NOMINAL_PHYSICS]}; got {env_id!r}.")
    return NOMINAL_PHYSICS[env_id]
