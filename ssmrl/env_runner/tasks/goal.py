"""Go to a point: Ant.

r = bonus - ‖p - g‖₁ - control_cost · ‖a‖² - contact_cost · ‖f‖²
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.registration import register_family
from ssmrl.env_runner.tasks.robots import register_robot, robot_family

__all__ = ["ant_goal"]


def ant_goal(
    *,
    radius: float = 3.0,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    control_cost: float = 0.1,
    contact_cost: float = 0.0005,
    bonus: float = 0.0,
) -> TaskFamily:
    """Ant to a goal that is uniform on the disc of `radius` m around the start; the position is observed, and
    nothing ends it.

    The defaults are those of ProMP and PEARL. MAML's has goals in a square and a bonus of 4.05.
    """
    if not (np.isfinite(radius) and radius > 0):
        raise ValueError(f"`radius` must be positive and finite; got {radius}.")

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        distance, angle = radius * np.sqrt(generator.uniform()), generator.uniform(0.0, 2 * np.pi)
        return {"goal": (float(distance * np.cos(angle)), float(distance * np.sin(angle)))}

    return robot_family(
        "ant-goal",
        "Ant",
        "Goal",
        draw,
        version=version,
        horizon=horizon,
        source="PEARL",
        frame_skip=frame_skip,
        control_cost=control_cost,
        contact_cost=contact_cost,
        bonus=bonus,
        terminate_when_unhealthy=False,
        exclude_current_positions_from_observation=False,
        # Staying at the start: the mean of |x| + |y| over the disc is 8 R / 3π.
        task_blind_reward=bonus - 8 * radius / (3 * np.pi),
    )


register_robot("Ant", "Goal", ant_goal, paid_for="goal", goal=(1.0, 0.0))
register_family("ant-goal", ant_goal)
