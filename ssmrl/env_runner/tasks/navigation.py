"""Go to a point in the plane that is not observed.

    p' = p + scale · clip(a, -1, 1)        d = ‖p' - goal‖
    r = -d, or where the reward is sparse 1 - d within `radius` of the goal and 0 elsewhere

Letters: B rows, R rows in which an episode begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.tasks.array_simulation import Arrays, Step, makers
from ssmrl.env_runner.tasks.canvas import BLUE, GREY, RED, Canvas
from ssmrl.env_runner.tasks.family import Draw, TaskFamily, of_two_sets
from ssmrl.env_runner.tasks.parameters import FINITE, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["Navigation", "navigation", "sparse_navigation"]

_ID, _SPARSE_ID = "ssmrl/Navigation-v0", "ssmrl/SparseNavigation-v0"


@dataclass(frozen=True)
class Navigation:
    """A point that starts at 0 and observes its position, float32 (2,); the task is `goal`, (2,).

    Args:
        scale: how far an action of 1 moves it, along each axis.
        tolerance: an episode ends where the goal is less than that far along each axis. 0: it never does.
        radius: of the sparse reward. None: the reward is dense.
    """

    scale: float = 0.1
    tolerance: float = 0.01
    radius: float | None = None

    parameters = {"goal": Parameter((0.3, 0.4), FINITE)}  # noqa: RUF012
    seconds = 0.1

    def __post_init__(self) -> None:
        _require_positive("scale", self.scale)
        if not 0 <= self.tolerance < np.inf:
            raise ValueError(f"`tolerance` must be at least 0 and finite; got {self.tolerance}.")
        if self.radius is not None:
            _require_positive("radius", self.radius)

    @property
    def observation_space(self) -> Box:
        """The plane."""
        return Box(-np.inf, np.inf, (2,), np.float32)

    @property
    def action_space(self) -> Box:
        """A part of `scale` along each axis."""
        return Box(-1.0, 1.0, (2,), np.float32)

    def derive(self, values: Arrays) -> Arrays:
        """Return the goals, (B, 2)."""
        return values

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return positions of 0, (R, 2)."""
        return {"position": np.zeros((len(generators), 2))}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Move by actions (B, 2)."""
        position = state["position"] + self.scale * np.clip(actions, -1.0, 1.0).astype(np.float64)
        away = position - derived["goal"]
        distance = np.hypot(away[:, 0], away[:, 1])
        reward = -distance if self.radius is None else np.where(distance <= self.radius, 1.0 - distance, 0.0)
        return Step({"position": position}, reward, (np.abs(away) < self.tolerance).all(axis=1), {})

    def observe(self, state: Arrays) -> NDArray[np.float32]:
        """Return the positions, float32 (B, 2)."""
        return state["position"].astype(np.float32)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the start, the goal and the point."""
        goal, position = values["goal"], state["position"]
        size = 1.2 * float(max(np.abs(goal).max(), np.abs(position).max(), self.scale))
        canvas = Canvas((-size, -size), (size, size))
        canvas.disc((0.0, 0.0), 0.02 * size, GREY)
        canvas.disc(goal, 0.04 * size if self.radius is None else self.radius, RED)
        canvas.disc(position, 0.04 * size, BLUE)
        return canvas.pixels


def navigation(
    *, half_width: float = 0.5, scale: float = 0.1, tolerance: float = 0.01, horizon: int = 100
) -> TaskFamily:
    """Go to goal ~ U[-half_width, half_width]²: r = -distance.

    The defaults are MAML's (Finn et al. 2017, `point_env_randgoal.py` of https://github.com/cbfinn/maml_rl): its
    policies act in [-1, 1], of which a wrapper makes moves of at most 0.1 along each axis. An episode ends where both
    coordinates are within 0.01 of the goal's.

    `oracle_return` is the expectation of going to the goal at full speed along each axis, and `task_blind_return`
    that of staying at the start; both are exact.
    """
    _require_positive("half_width", half_width)
    horizon = require_integer("horizon", horizon, 1)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return {"goal": tuple(generator.uniform(-half_width, half_width, 2).tolist())}

    settings = {"scale": scale, "tolerance": tolerance}
    Navigation(**settings)
    return TaskFamily(
        "navigation",
        _ID,
        draw,
        horizon,
        settings,
        "MAML",
        task_blind_return=-_return_of_staying(half_width, tolerance, horizon),
        oracle_return=-_cost_of_going(half_width, scale, horizon),
    )


def sparse_navigation(
    *, num_goals: int | None = 100, radius: float = 0.2, scale: float = 0.1, horizon: int = 20
) -> TaskFamily:
    """Go to a goal on the half circle of radius 1: r = 1 - distance within `radius` of it, 0 elsewhere.

    Nothing ends an episode.

    The defaults are PEARL's sparse point robot (Rakelly et al. 2019, `point_robot.py` of
    https://github.com/katerakelly/oyster), with its reward of evaluation: 100 goals at equal angles, shuffled by the
    seed 1337, of which 80 are for training and 20 for the test.

    `oracle_return` is the mean over the goals of going there at full speed along each axis. There is no formula for
    the best that is blind to the task; waiting at one point of the half circle gives about 1.7, never leaving the
    start 0.

    Args:
        num_goals: at least 5, of which the last fifth is the test. None: angles ~ U[0, π] in both (VariBAD, Zintgraf
            et al. 2020, whose horizon is 100).
    """
    horizon = require_integer("horizon", horizon, 1)
    if num_goals is None:
        angles = np.pi * (np.arange(10_000) + 0.5) / 10_000
        draw: Draw = _of_any_angle
    else:
        num_goals = require_integer("num_goals", num_goals, 5)
        angles = np.linspace(0.0, np.pi, num_goals)
        draw = _of_angles(angles)
    settings = {"radius": radius, "scale": scale, "tolerance": 0.0}
    Navigation(**settings)
    return TaskFamily(
        "sparse-navigation",
        _SPARSE_ID,
        draw,
        horizon,
        settings,
        "PEARL",
        oracle_return=_sparse_return(angles, radius, scale, horizon),
    )


def _of_any_angle(generator: np.random.Generator, split: str) -> dict[str, Any]:
    angle = generator.uniform(0.0, np.pi)
    return {"goal": (float(np.cos(angle)), float(np.sin(angle)))}


def _of_angles(angles: NDArray[np.float64]) -> Draw:
    goals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.random.RandomState(1337).shuffle(goals)
    tasks = [{"goal": tuple(goal)} for goal in goals.tolist()]
    num_train = len(tasks) - len(tasks) // 5
    return of_two_sets(tasks[:num_train], tasks[num_train:])


def _mean_distance(half_width: float) -> float:
    """Return E‖g‖ of g ~ U[-h, h]²: h (√2 + asinh 1) / 3."""
    return half_width * float(np.sqrt(2) + np.arcsinh(1)) / 3


def _return_of_staying(half_width: float, tolerance: float, horizon: int) -> float:
    """Return the expected sum of distances at the start; goals within the tolerance of it are paid for once."""
    near = min(tolerance, half_width)
    return horizon * _mean_distance(half_width) - (horizon - 1) * (near / half_width) ** 2 * _mean_distance(near)


def _cost_of_going(half_width: float, scale: float, horizon: int) -> float:
    """Return the expected sum of distances where both axes are gone along at full speed.

    After t steps, (max(X - t s, 0), max(Y - t s, 0)) is left of (X, Y) ~ U[0, h]². With c = h - t s, both are
    positive on a square of c², where the distance integrates to c³ (√2 + asinh 1) / 3, and one of them on two
    rectangles of c (h - c).
    """
    left = np.maximum(half_width - scale * np.arange(1, horizon + 1), 0.0)
    integral = left**2 * _mean_distance(1.0) * left + (half_width - left) * left**2
    return float(integral.sum()) / half_width**2


def _sparse_return(angles: NDArray[np.float64], radius: float, scale: float, horizon: int) -> float:
    """Return the mean over goals at these angles of what going there at full speed gives."""
    goal = np.abs(np.stack([np.cos(angles), np.sin(angles)]))
    left = np.maximum(goal[..., None] - scale * np.arange(1, horizon + 1), 0.0)
    distance = np.hypot(left[0], left[1])
    return float(np.where(distance <= radius, 1.0 - distance, 0.0).sum(axis=-1).mean())


def _require_positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be positive and finite; got {value}.")


make, make_batch = makers(Navigation)
register(_ID, __name__, horizon=100)
register(_SPARSE_ID, __name__, horizon=20, radius=0.2, tolerance=0.0, goal=(0.0, 1.0))
register_family("navigation", navigation)
register_family("sparse-navigation", sparse_navigation)
