"""Run in a direction: HalfCheetah and Ant forwards or backwards, Ant and Humanoid at an angle.

r = scale · (d · v) + bonus - control_cost · ‖a‖² - min(contact_cost · ‖f‖², contact_limit)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssmrl.env_runner.tasks.family import Draw, TaskFamily, of_two_sets
from ssmrl.env_runner.tasks.registration import register_family
from ssmrl.env_runner.tasks.robots import register_robot, robot_family

__all__ = ["ant_angle", "ant_direction", "halfcheetah_direction", "humanoid_direction"]

_TWO_WAYS = ({"direction": -1.0}, {"direction": 1.0})


def halfcheetah_direction(
    *, version: int = 5, horizon: int = 200, frame_skip: int | None = None, control_cost: float = 0.05
) -> TaskFamily:
    """HalfCheetah forwards or backwards: r = d · v_x - control_cost · ‖a‖², d = ±1. Both are train and test tasks.

    The defaults are those of PEARL (https://github.com/katerakelly/oyster) and VariBAD; ProMP has a horizon of 100,
    MAML a frame skip of 1.
    """
    return robot_family(
        "halfcheetah-dir",
        "HalfCheetah",
        "Dir",
        of_two_sets(_TWO_WAYS, _TWO_WAYS),
        version=version,
        horizon=horizon,
        source="PEARL",
        frame_skip=frame_skip,
        control_cost=control_cost,
        task_blind_reward=0.0,
    )


def ant_direction(
    *,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    control_cost: float = 0.5,
    contact_cost: float = 0.0005,
    bonus: float = 1.0,
) -> TaskFamily:
    """Ant forwards or backwards: d = ±1. Both are train and test tasks.

    The defaults are those of ProMP and of PEARL with `forward_backward`, both from Gymnasium's Ant.
    """
    draw = of_two_sets(_TWO_WAYS, _TWO_WAYS)
    return _ant("ant-dir", "Dir", draw, version, horizon, frame_skip, control_cost, contact_cost, bonus)


def ant_angle(
    *,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    control_cost: float = 0.5,
    contact_cost: float = 0.0005,
    bonus: float = 1.0,
) -> TaskFamily:
    """Ant in the direction θ ~ U[0, 2π]; the defaults are PEARL's."""
    return _ant("ant-angle", "Angle", _angle, version, horizon, frame_skip, control_cost, contact_cost, bonus)


def humanoid_direction(
    *,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    scale: float = 1.25,
    control_cost: float = 0.1,
    contact_cost: float = 5e-7,
    contact_limit: float = 10.0,
    bonus: float = 5.0,
) -> TaskFamily:
    """Humanoid in the direction θ ~ U[0, 2π]; it ends where Gymnasium's does.

    The defaults are PEARL's: its 0.25 of the displacement over one simulation step is 1.25 of the velocity.
    """
    return robot_family(
        "humanoid-dir",
        "Humanoid",
        "Dir",
        _angle,
        version=version,
        horizon=horizon,
        source="PEARL",
        frame_skip=frame_skip,
        scale=scale,
        control_cost=control_cost,
        contact_cost=contact_cost,
        contact_limit=contact_limit,
        bonus=bonus,
        task_blind_reward=bonus,
    )


def _angle(generator: np.random.Generator, split: str) -> dict[str, Any]:
    return {"angle": float(generator.uniform(0.0, 2 * np.pi))}


def _ant(
    name: str,
    suffix: str,
    draw: Draw,
    version: int,
    horizon: int,
    frame_skip: int | None,
    control_cost: float,
    contact_cost: float,
    bonus: float,
) -> TaskFamily:
    return robot_family(
        name,
        "Ant",
        suffix,
        draw,
        version=version,
        horizon=horizon,
        source="PEARL",
        frame_skip=frame_skip,
        control_cost=control_cost,
        contact_cost=contact_cost,
        bonus=bonus,
        # The velocities' mean over the tasks is 0 for a policy that cannot tell them apart; standing costs nothing.
        task_blind_reward=bonus,
    )


register_robot("HalfCheetah", "Dir", halfcheetah_direction, paid_for="direction", direction=1.0)
register_robot("Ant", "Dir", ant_direction, paid_for="direction", direction=1.0)
register_robot("Ant", "Angle", ant_angle, paid_for="angle", angle=0.0)
register_robot("Humanoid", "Dir", humanoid_direction, paid_for="angle", angle=0.0)
register_family("halfcheetah-dir", halfcheetah_direction)
register_family("ant-dir", ant_direction)
register_family("ant-angle", ant_angle)
register_family("humanoid-dir", humanoid_direction)
