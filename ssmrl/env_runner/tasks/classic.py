"""CartPole and Pendulum with physics of their own: a task is a dict of physical parameters.

    family = task_family("pendulum-physics")
    environment = Environment(family, tasks=family.sample(20, seed=0))

A task per row of an `Environment` of makers:

    makers = [partial(make_with_physics, env_id, sample_physics(env_id, seed)) for seed in seeds]
    environment = Environment(makers)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.simulation import Task
from ssmrl.env_runner.tasks.array_simulation import Dynamics, make_rows
from ssmrl.env_runner.tasks.cartpole import CARTPOLE_PHYSICS, CartPole
from ssmrl.env_runner.tasks.classic_env import ClassicEnv
from ssmrl.env_runner.tasks.draws import check_scatter, scattered
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.pendulum import PENDULUM_PHYSICS, Pendulum
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["NOMINAL_PHYSICS", "classic_physics", "make_with_physics", "sample_physics"]

NOMINAL_PHYSICS: dict[str, dict[str, float]] = {"CartPole-v1": CARTPOLE_PHYSICS, "Pendulum-v1": PENDULUM_PHYSICS}
"""Gymnasium's values of the parameters that can differ, by environment id. Accelerations in m/s²,
masses in kg, lengths in m; the `length` of CartPole is half that of its pole."""

_KINDS: dict[str, type[Dynamics]] = {"CartPole-v1": CartPole, "Pendulum-v1": Pendulum}
_HORIZONS = {"CartPole-v1": 500, "Pendulum-v1": 200}


def classic_physics(env_id: str, *, base: float = 1.5, spread: float = 3.0, horizon: int | None = None) -> TaskFamily:
    """CartPole or Pendulum, whose every parameter is nominal · base^u with its own u ~ U[-spread, spread].

    The scheme is that of the random-parameter robots (`random_parameters`). Published studies train on 20 tasks and
    test on 5: `sample(20, seed)` and `sample(5, seed, "test")`.

    Args:
        env_id: "CartPole-v1" or "Pendulum-v1".
        base: > 0.
        spread: ≥ 0; 0 is the nominal task.
        horizon: None: Gymnasium's, 500 and 200.
    """
    nominal = _nominal(env_id)
    check_scatter(base, spread)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return scattered(nominal, generator, base, spread)

    name = f"{env_id.split('-')[0].lower()}-physics"
    horizon = _HORIZONS[env_id] if horizon is None else horizon
    # CartPole pays 1 for every step that it does not fall in.
    oracle = float(horizon) if env_id == "CartPole-v1" else None
    return TaskFamily(name, f"ssmrl/{env_id}", draw, horizon, source="rand_param_envs", oracle_return=oracle)


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
    check_scatter(base, spread)
    return scattered(nominal, np.random.default_rng(seed), base, spread)


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
    _nominal(env_id)
    _check_physics("physics", env_id, physics)
    for step, changed in ({} if changes is None else changes).items():
        _check_physics(f"changes[{step}]", env_id, changed)
    arguments: dict[str, Any] = {**physics, **kwargs}
    return _TellsAfterwards(gymnasium.make(f"ssmrl/{env_id}", changes=changes, **arguments))


def make(gym_id: str, **kwargs: Any) -> ClassicEnv:
    """Make a `ClassicEnv`: the keyword arguments are the parameters of the task, its `changes`, and settings."""
    names = [*_nominal(gym_id), "changes"]
    task = {name: value for name, value in kwargs.items() if name in names}
    return ClassicEnv(gym_id, task, **{name: value for name, value in kwargs.items() if name not in names})


def make_batch(
    num_envs: int,
    *,
    gym_id: str,
    tasks: Sequence[Task] | None = None,
    max_episode_steps: int | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    **kwargs: Any,
) -> BatchedEnv:
    """Make a native batch of rows; what is missing in a row's task is in `kwargs`."""
    return make_rows(_KINDS[gym_id], num_envs, tasks, max_episode_steps, autoreset_mode, kwargs)


class _TellsAfterwards(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Tells a change of the task in the info of the step that it first holds in, not of the one before."""

    _task: dict[str, float] | None = None

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        told = {} if self._task is None else {"task": self._task}
        self._task = info.get("task")
        return observation, reward, terminated, truncated, {**{k: v for k, v in info.items() if k != "task"}, **told}


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


for _env_id, _horizon in _HORIZONS.items():
    register(f"ssmrl/{_env_id}", __name__, horizon=_horizon, gym_id=_env_id)
    register_family(f"{_env_id.split('-')[0].lower()}-physics", partial(classic_physics, _env_id))
