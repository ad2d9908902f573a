"""What Gymnasium's registry calls: a robot's environment, or a native batch of them, from plain keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymnasium.vector import AutoresetMode

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.robots.definitions import robot as robot_of
from ssmrl.env_runner.robots.physics import PHYSICS
from ssmrl.env_runner.robots.reward import Angle, Direction, Forward, Goal, Reward, Velocity
from ssmrl.env_runner.robots.simulation import RobotSimulation
from ssmrl.env_runner.robots.single import RobotEnv
from ssmrl.env_runner.simulation import Task, check_tasks

__all__ = ["make", "make_batch"]

# By name, since a specification in Gymnasium's registry has to be expressible in JSON.
_FORWARD: dict[str, Forward] = {f.names[0]: f for f in (Velocity(), Direction(), Angle(), Goal())}
_OF_RENDERING = ("render_mode", "width", "height", "camera_id", "camera_name", "max_geom", "visual_options")
_OF_REWARD = ("scale", "bonus", "alive", "control_cost", "contact_cost", "contact_limit")


def make(robot: str, *, paid_for: str | None = None, **kwargs: Any) -> RobotEnv:
    """Make a `RobotEnv`.

    Args:
        robot: Gymnasium's id.
        paid_for: "velocity", "direction", "angle" or "goal". None: Gymnasium's own reward.
        **kwargs: arguments of `Reward`, parameters of the task, and settings of the environment.
    """
    reward, task, settings = _sorted(robot, paid_for, kwargs)
    return RobotEnv(robot, reward=reward, task=task, **settings)


def make_batch(
    num_envs: int,
    *,
    robot: str,
    paid_for: str | None = None,
    tasks: Sequence[Task] | None = None,
    max_episode_steps: int | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    **kwargs: Any,
) -> BatchedEnv:
    """Make a native batch of rows.

    Args:
        num_envs: B.
        tasks: of every row; what is missing in one is in `kwargs`. None: all rows have the task in `kwargs`.
        robot, paid_for, **kwargs: as `make` has them, and `num_threads`.
        max_episode_steps, autoreset_mode: of `BatchedEnv`.
    """
    num_threads = kwargs.pop("num_threads", None)
    reward, task, settings = _sorted(robot, paid_for, kwargs)
    rows = check_tasks([{}] * num_envs if tasks is None else tasks, num_envs, task)
    simulation = RobotSimulation(robot, rows, reward=reward, num_threads=num_threads, **settings)
    return BatchedEnv(simulation, max_episode_steps=max_episode_steps, autoreset_mode=autoreset_mode, defaults=task)


def _sorted(
    env_id: str, paid_for: str | None, kwargs: Mapping[str, Any]
) -> tuple[Reward | None, dict[str, Any], dict[str, Any]]:
    """Tell the arguments of the reward, the task's parameters and the environment's settings apart."""
    reward = None
    if paid_for is not None:
        weights = {name: kwargs[name] for name in _OF_REWARD if name in kwargs}
        reward = Reward(_FORWARD[paid_for], **weights)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_REWARD}
    names = (*PHYSICS, "changes", *(() if reward is None else reward.forward.names))
    task = {name: kwargs[name] for name in names if name in kwargs}
    settings = {name: value for name, value in kwargs.items() if name not in names}
    known = {*robot_of(env_id).settings({}), "frame_skip", "changes_per_episode", *_OF_RENDERING}
    for name in settings:
        if name not in known:
            raise ValueError(
                f"A task of this environment has the parameters {[*names]}; got {name!r}, which is none of the "
                f"settings {sorted(known)} either."
            )
    return reward, task, settings
