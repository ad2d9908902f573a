"""A robot with a joint, or a leg, that does not obey: its controls are 0, and cost nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from ssmrl.env_runner.tasks.family import TaskFamily, of_two_sets
from ssmrl.env_runner.tasks.registration import register_family
from ssmrl.env_runner.tasks.robots import check_robot, robot_family

__all__ = ["disabled"]

_ACTUATORS = {"HalfCheetah": 6, "Hopper": 3, "Walker2d": 6, "Humanoid": 17}
# Of GrBAL's legs 0 to 3, in this order: hip and ankle.
_ANT_LEGS = ((2, 3), (4, 5), (6, 7), (0, 1))


def disabled(
    robot: str, *, version: int = 5, horizon: int = 1000, frame_skip: int | None = None, **settings: Any
) -> TaskFamily:
    """One joint of HalfCheetah, Hopper, Walker2d or Humanoid disabled, or one leg of Ant; Gymnasium's reward and end.

    The split is that of GrBAL (Nagabandi et al. 2019, https://github.com/iclavera/learning_to_adapt) for
    HalfCheetah and Ant: joint 0, or the last leg, is met in the test only; Hopper, Walker2d and Humanoid follow the
    former. Differences: GrBAL's frame skip is 1, its HalfCheetah's control cost 0.05 (here arguments, `frame_skip`
    and `ctrl_cost_weight`), and its Ant's leg also shrinks.
    """
    check_robot(robot)
    if robot == "Ant":
        train, test = _ANT_LEGS[:3], _ANT_LEGS[3:]
        draw = of_two_sets([{"disabled": leg} for leg in train], [{"disabled": leg} for leg in test])
    else:
        joints = [{"disabled": joint} for joint in range(_ACTUATORS[robot])]
        draw = of_two_sets(joints[1:], joints[:1])
    return robot_family(
        f"{robot.lower()}-disabled",
        robot,
        "",
        draw,
        version=version,
        horizon=horizon,
        source="GrBAL",
        frame_skip=frame_skip,
        **settings,
    )


for _robot in ("Ant", *_ACTUATORS):
    register_family(f"{_robot.lower()}-disabled", partial(disabled, _robot))
