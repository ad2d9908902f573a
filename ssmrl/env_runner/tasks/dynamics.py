"""Other physics, Gymnasium's reward: gravity, masses, damping, friction, or all parameters at random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ssmrl.env_runner.tasks.family import Draw, TaskFamily
from ssmrl.env_runner.tasks.registration import register_family
from ssmrl.env_runner.tasks.robots import ROBOT_NAMES, check_robot, register_robot, robot_family

__all__ = ["MODEL_SIZES", "one_parameter", "random_parameters"]

MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "HalfCheetah": (8, 9, 9),
    "Hopper": (5, 6, 5),
    "Walker2d": (8, 9, 8),
    "Ant": (14, 14, 14),
    "Humanoid": (14, 23, 18),
}
"""Bodies, degrees of freedom and geoms of every robot's model, so that tasks can be drawn without MuJoCo."""

_TRAIN = (0.75, 0.85, 1.0, 1.15, 1.25)
_TEST = (0.2, 0.3, 0.4, 0.5, 1.5, 1.6, 1.7, 1.8)


def _gravity(generator: np.random.Generator, split: str) -> float:
    return float(generator.uniform(0.5, 1.5))


def _of_sets(generator: np.random.Generator, split: str) -> float:
    return float(generator.choice(_TRAIN if split == "train" else _TEST))


def _friction(generator: np.random.Generator, split: str) -> float:
    return float(1.5 ** generator.uniform(-3.0, 3.0))


_DEFAULTS: dict[str, tuple[Callable[[np.random.Generator, str], float], str]] = {
    "gravity": (_gravity, "gym-extensions"),
    "mass": (_of_sets, "CaDM"),
    "damping": (_of_sets, "CaDM"),
    "friction": (_friction, "rand_param_envs"),
}


def one_parameter(
    robot: str,
    parameter: str,
    *,
    low: float | None = None,
    high: float | None = None,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    **settings: Any,
) -> TaskFamily:
    """One factor on a parameter of the whole model, Gymnasium's reward and end.

    Args:
        robot: `"HalfCheetah"`, `"Hopper"`, `"Walker2d"`, `"Ant"` or `"Humanoid"`.
        parameter: "gravity": U[0.5, 1.5], the range of gym-extensions' variants
            (https://github.com/Breakend/gym-extensions). "mass" and "damping": the sets of CaDM's HalfCheetah (K. Lee
            et al. 2020, https://github.com/younggyoseo/CaDM), 0.75 to 1.25 in training, and 0.2 to 0.5 and 1.5 to 1.8
            in the test. "friction": 1.5^U[-3, 3], the law of `random_parameters`, one factor for all.
        low, high: draw from U[low, high] instead, in both splits.
        **settings: of Gymnasium's environment, `ctrl_cost_weight` for instance.
    """
    check_robot(robot)
    if parameter not in [*_DEFAULTS]:
        raise ValueError(f"`parameter` must be one of {[*_DEFAULTS]}; got {parameter!r}.")
    draw_factor, source = _DEFAULTS[parameter]
    if (low is None) != (high is None):
        raise ValueError(f"`low` and `high` must be given together; got {low} and {high}.")
    if low is not None and high is not None and not 0 <= low <= high < np.inf:
        raise ValueError(f"`low` and `high` must be finite, 0 <= low <= high; got {low} and {high}.")

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        if low is None or high is None:
            return {parameter: draw_factor(generator, split)}
        return {parameter: float(generator.uniform(low, high))}

    name = f"{robot.lower()}-{parameter}"
    return _family(name, robot, draw, version, horizon, frame_skip, source, settings)


def random_parameters(
    robot: str,
    *,
    log_scale_limit: float = 3.0,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    **settings: Any,
) -> TaskFamily:
    """A factor on every element of masses, inertias, friction and damping by itself, Gymnasium's reward and end.

    1.5^U[-L, L] each, of damping 1.3^U[-L, L], L = `log_scale_limit`: D. Lee et al.,
    https://github.com/dennisl88/rand_param_envs, as PEARL and VariBAD use it. The model's other numbers are those
    of Gymnasium's, which differ from that repository's.
    """
    if not (np.isfinite(log_scale_limit) and log_scale_limit >= 0):
        raise ValueError(f"`log_scale_limit` must be at least 0 and finite; got {log_scale_limit}.")
    check_robot(robot)
    bodies, dofs, geoms = MODEL_SIZES[robot]
    laws = (("mass", 1.5, bodies), ("inertia", 1.5, 3 * bodies), ("friction", 1.5, 3 * geoms), ("damping", 1.3, dofs))

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        exponents = {name: generator.uniform(-log_scale_limit, log_scale_limit, size) for name, _, size in laws}
        return {name: tuple((base ** exponents[name]).tolist()) for name, base, _ in laws}

    name = f"{robot.lower()}-rand-params"
    return _family(name, robot, draw, version, horizon, frame_skip, "rand_param_envs", settings)


def _family(
    name: str,
    robot: str,
    draw: Draw,
    version: int,
    horizon: int,
    frame_skip: int | None,
    source: str,
    settings: dict[str, Any],
) -> TaskFamily:
    return robot_family(
        name, robot, "", draw, version=version, horizon=horizon, source=source, frame_skip=frame_skip, **settings
    )


for _robot in ROBOT_NAMES:
    register_robot(_robot)
    for _parameter in _DEFAULTS:
        register_family(f"{_robot.lower()}-{_parameter}", partial(one_parameter, _robot, _parameter))
    register_family(f"{_robot.lower()}-rand-params", partial(random_parameters, _robot))
