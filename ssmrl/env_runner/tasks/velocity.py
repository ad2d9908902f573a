"""Run at a velocity: HalfCheetah, Ant and Walker2d.

r = bonus - abs(v_x - target) - control_cost · ‖a‖² - contact_cost · ‖f‖²
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.registration import register_family
from ssmrl.env_runner.tasks.robots import register_robot, robot_family

__all__ = ["ant_velocity", "halfcheetah_velocity", "walker2d_velocity"]


def halfcheetah_velocity(
    *,
    low: float = 0.0,
    high: float = 3.0,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    control_cost: float = 0.05,
) -> TaskFamily:
    """HalfCheetah at a velocity ~ U[low, high] m/s: r = -abs(v_x - target) - control_cost · ‖a‖².

    The defaults are those of PEARL (Rakelly et al. 2019, https://github.com/katerakelly/oyster), of VariBAD and,
    its horizon of 100 apart, of ProMP. MAML (Finn et al. 2017) has U[0, 2] and a frame skip of 1.
    """
    weights = {"control_cost": control_cost}
    return _family("HalfCheetah", "PEARL", low, high, version, horizon, frame_skip, 0.0, weights)


def ant_velocity(
    *,
    low: float = 0.0,
    high: float = 3.0,
    version: int = 5,
    horizon: int = 200,
    frame_skip: int | None = None,
    control_cost: float = 0.005,
    contact_cost: float = 0.0005,
    bonus: float = 1.05,
) -> TaskFamily:
    """Ant at a velocity ~ U[low, high] m/s, bonus 1 + 0.05; it ends where the torso is not between 0.2 and 1 m high.

    The formula is MAML's (Finn et al. 2017, https://github.com/cbfinn/maml_rl), whose controls are 150 times ours
    and divided by that in the cost; its frame skip is 1 at a simulation step of 0.02 s, Gymnasium's 5 at 0.01 s.
    """
    weights = {"control_cost": control_cost, "contact_cost": contact_cost}
    return _family("Ant", "MAML", low, high, version, horizon, frame_skip, bonus, weights)


def walker2d_velocity(
    *,
    low: float = 0.0,
    high: float = 10.0,
    version: int = 5,
    horizon: int = 100,
    frame_skip: int | None = 8,
    control_cost: float = 0.001,
    bonus: float = 15.0,
) -> TaskFamily:
    """Walker2d at a velocity ~ U[low, high] m/s, bonus 15; an episode ends where Gymnasium's does.

    The definition is ProMP's (Rothfuss et al. 2019, https://github.com/jonasrothfuss/ProMP), frame skip 8 included.
    """
    return _family("Walker2d", "ProMP", low, high, version, horizon, frame_skip, bonus, {"control_cost": control_cost})


def _family(
    robot: str,
    source: str,
    low: float,
    high: float,
    version: int,
    horizon: int,
    frame_skip: int | None,
    bonus: float,
    weights: dict[str, float],
) -> TaskFamily:
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(f"`low` and `high` must be finite, and low at most high; got {low} and {high}.")

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return {"velocity": float(generator.uniform(low, high))}

    return robot_family(
        f"{robot.lower()}-vel",
        robot,
        "Vel",
        draw,
        version=version,
        horizon=horizon,
        source=source,
        frame_skip=frame_skip,
        bonus=bonus,
        # The best constant velocity is the median; what starting and the controls cost comes on top of both.
        task_blind_reward=bonus - (high - low) / 4,
        oracle_reward=bonus,
        **weights,
    )


for _robot, _factory in (
    ("HalfCheetah", halfcheetah_velocity),
    ("Ant", ant_velocity),
    ("Walker2d", walker2d_velocity),
):
    register_robot(_robot, "Vel", _factory, paid_for="velocity", velocity=1.0)
    register_family(f"{_robot.lower()}-vel", _factory)
