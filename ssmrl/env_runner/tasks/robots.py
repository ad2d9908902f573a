"""What the families of robots share: their environments' ids, and a family of one robot."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.tasks.family import Draw, TaskFamily
from ssmrl.env_runner.tasks.registration import register

__all__ = ["ROBOT_NAMES", "check_robot", "register_robot", "robot_family"]

ROBOT_NAMES = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")

_MODULE = "ssmrl.env_runner.robots.make"
_WEIGHTS = ("scale", "bonus", "control_cost", "contact_cost", "contact_limit")


def register_robot(
    robot: str, suffix: str = "", factory: Callable[..., TaskFamily] | None = None, **kwargs: Any
) -> None:
    """Register `ssmrl/{robot}{suffix}-v4` and `-v5`: with the settings and the horizon of a family, or Gymnasium's."""
    for version in (4, 5):
        settings, horizon = kwargs, 1000
        if factory is not None:
            family = factory(version=version)
            settings, horizon = {**kwargs, **family.settings}, family.horizon or horizon
        register(f"ssmrl/{robot}{suffix}-v{version}", _MODULE, horizon=horizon, robot=f"{robot}-v{version}", **settings)


def check_robot(robot: str) -> None:
    """Raise ValueError unless there are families of this robot."""
    if robot not in ROBOT_NAMES:
        raise ValueError(f"`robot` must be one of {[*ROBOT_NAMES]}; got {robot!r}.")


def robot_family(
    name: str,
    robot: str,
    suffix: str,
    draw: Draw,
    *,
    version: int,
    horizon: int,
    source: str,
    frame_skip: int | None,
    task_blind_reward: float | None = None,
    oracle_reward: float | None = None,
    **settings: Any,
) -> TaskFamily:
    """Return the family of a robot's environments.

    Args:
        name, draw, horizon, source: of the family.
        robot, suffix, version: of the environments' id.
        frame_skip: simulation steps of one step, at least 1. None: Gymnasium's.
        task_blind_reward, oracle_reward: the family's reference returns, per step. None: there is no formula.
        **settings: weights of the reward, and arguments of Gymnasium's class; numbers among them must be finite.
    """
    check_robot(robot)
    if version not in (4, 5):
        raise ValueError(f"`version` must be 4 or 5; got {version}.")
    horizon = require_integer("horizon", horizon, 1)
    if frame_skip is not None:
        settings["frame_skip"] = require_integer("frame_skip", frame_skip, 1)
    for key, value in settings.items():
        _check_number(key, value)
    task_blind, oracle = (None if r is None else horizon * r for r in (task_blind_reward, oracle_reward))
    return TaskFamily(name, f"ssmrl/{robot}{suffix}-v{version}", draw, horizon, settings, source, task_blind, oracle)


def _check_number(name: str, value: Any) -> None:
    if name in _WEIGHTS and not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number; got {value!r}.")
    # Infinite, the limit of what contacts cost is none.
    if isinstance(value, Real) and not (math.isfinite(value) or (name == "contact_limit" and value == math.inf)):
        raise ValueError(f"`{name}` must be finite; got {value}.")
