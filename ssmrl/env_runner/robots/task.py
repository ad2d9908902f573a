"""What a robot's task is, checked: the parameters of its reward, its physics, and what changes in mid-episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmrl.env_runner.robots.physics import FACTORS, PHYSICS, actuator_mask, check_physics
from ssmrl.env_runner.robots.reward import Reward, check_reward_task
from ssmrl.env_runner.simulation import Task

if TYPE_CHECKING:
    import mujoco

__all__ = ["RobotTask", "factors_of", "parse_task", "report"]


class RobotTask(NamedTuple):
    """A task of a robot, or what changes in one."""

    reward: dict[str, Any]
    """The parameters of the reward."""
    physics: dict[str, Any]
    """The parameters of `ssmrl.env_runner.robots.physics`; those not in it are nominal."""
    changes: dict[int, dict[str, Any]]
    """After how many steps what changes."""

    def changed(self, values: Mapping[str, Any]) -> RobotTask:
        """Return the task with other values of some of its parameters."""
        reward = {name: values.get(name, value) for name, value in self.reward.items()}
        return RobotTask(reward, {**self.physics, **{n: v for n, v in values.items() if n in PHYSICS}}, self.changes)


def parse_task(model: mujoco.MjModel, reward: Reward | None, task: Task) -> RobotTask:
    """Check a task's names and values against the model and the reward.

    Raises:
        ValueError: a parameter is missing, unknown, or has a value that it cannot have.
    """
    names = () if reward is None else reward.forward.names
    changes = task.get("changes") or {}
    given = {name: value for name, value in task.items() if name != "changes" and value is not None}
    known = (*names, *PHYSICS)
    for values in (given, *changes.values()):
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"A task of this environment has the parameters {[*known]}; got {unknown[0]!r}.")
        check_physics(model, {name: value for name, value in values.items() if name in PHYSICS})
    if reward is not None:
        for values in ({}, *changes.values()):
            check_reward_task(reward.forward, {**given, **values})
    rewards = {name: np.asarray(given[name], np.float64) for name in names}
    physics = {name: value for name, value in given.items() if name in PHYSICS}
    return RobotTask(rewards, physics, {n: dict(values) for n, values in changes.items()})


def factors_of(tasks: Sequence[RobotTask]) -> list[str]:
    """Return which factors any of the tasks has, now or later."""
    return [
        name
        for name in FACTORS
        if any(name in task.physics or any(name in change for change in task.changes.values()) for task in tasks)
    ]


def report(task: RobotTask, num_actuators: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return a task as the info has it: every parameter an array, factors not given 1, `disabled` Bool (A,)."""
    shown: dict[str, NDArray[Any]] = {name: np.array(value, np.float64) for name, value in task.reward.items()}
    for name in names:
        shown[name] = np.array(task.physics.get(name, 1.0), np.float64)
    shown["disabled"] = ~actuator_mask(num_actuators, task.physics.get("disabled", ()))
    return shown
