"""What the families of robots share: their environments' ids, and a family of one robot."""

from __future__ import annotations

from typing import Any

from ssmrl.env_runner.tasks.family import Draw, TaskFamily
from ssmrl.env_runner.tasks.registration import register

__all__ = ["ROBOT_NAMES", "register_robot", "robot_family"]

ROBOT_NAMES = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")

_MODULE = "ssmrl.env_runner.robots.make"


def register_robot(robot: str, suffix: str = "", **kwargs: Any) -> None:
    """Register `ssmrl/{robot}{suffix}-v4` and `-v5`, with Gymnasium's horizon."""
    for version in (4, 5):
        register(f"ssmrl/{robot}{suffix}-v{version}", _MODULE, horizon=1000, robot=f"{robot}-v{version}", **kwargs)


def robot_family(
    name: str, robot: str, suffix: str, draw: Draw, *, version: int, horizon: int, source: str, **kwargs: Any
) -> TaskFamily:
    """Return the family of a robot's environments; of `kwargs`, those that are None are left to the environment."""
    if version not in (4, 5):
        raise ValueError(f"`version` must be 4 or 5; got {version}.")
    references = {key: kwargs.pop(key, None) for key in ("task_blind_return", "oracle_return")}
    settings = {key: value for key, value in kwargs.items() if value is not None}
    return TaskFamily(name, f"ssmrl/{robot}{suffix}-v{version}", draw, horizon, settings, source, **references)
