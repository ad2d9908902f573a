"""Rewards of tasks that change what a robot is paid for, for all rows at once.

    r = forward(task, motion) + bonus - control_cost · ‖a‖² - contact_cost · ‖f‖²

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Angle", "Direction", "Goal", "Motion", "Reward", "Velocity"]

Array = NDArray[np.float64]


class Motion(NamedTuple):
    """What a robot did in a step, as Gymnasium's rewards measure it."""

    velocity: Array
    """(B, 1) along x, or (B, 2) in the plane, in m/s: over the whole step."""
    position: Array
    """(B, 1) or (B, 2) in m, after it."""
    control: Array
    """(B,) the squared norm of the controls."""
    contact: Array
    """(B,) the squared norm of the contact forces; 0 where none are computed."""
    healthy: NDArray[np.bool_]
    """(B,)."""


class Forward(Protocol):
    """The part of a reward that depends on the task."""

    @property
    def names(self) -> tuple[str, ...]:
        """The task's parameters."""

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> Array:
        """Return (B,), from parameters (B, ...)."""


@dataclass(frozen=True)
class Velocity:
    """-abs(v_x - velocity): run at that velocity in m/s."""

    names = ("velocity",)

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> Array:
        return -np.abs(motion.velocity[:, 0] - task["velocity"])


@dataclass(frozen=True)
class Direction:
    """d · v_x: run forwards (d = 1) or backwards (d = -1)."""

    names = ("direction",)

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> Array:
        return task["direction"] * motion.velocity[:, 0]


@dataclass(frozen=True)
class Angle:
    """cos(θ) v_x + sin(θ) v_y: run in the direction θ in radians."""

    names = ("angle",)

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> Array:
        velocity = motion.velocity
        return np.cos(task["angle"]) * velocity[:, 0] + np.sin(task["angle"]) * velocity[:, 1]


@dataclass(frozen=True)
class Goal:
    """- ‖p - g‖₁: go to the point g in m."""

    names = ("goal",)

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> Array:
        distance: Array = np.abs(motion.position - task["goal"]).sum(axis=-1)
        return -distance


@dataclass(frozen=True)
class Reward:
    """r = scale · forward(task, motion) + bonus + alive · healthy - control_cost · ‖a‖² - contact_cost · ‖f‖².

    Args:
        forward: the part that depends on the task.
        scale: of that part.
        bonus: of every step.
        alive: of every step in which the robot is healthy.
        control_cost: of the squared controls.
        contact_cost: of the squared contact forces, which of an Ant are clipped as in its Gymnasium environment.
        contact_limit: the most that contacts cost in a step.
    """

    forward: Forward
    scale: float = 1.0
    bonus: float = 0.0
    alive: float = 0.0
    control_cost: float = 0.0
    contact_cost: float = 0.0
    contact_limit: float = np.inf

    def __call__(self, task: Mapping[str, Array], motion: Motion) -> tuple[Array, dict[str, Array]]:
        """Return the rewards (B,) and their parts by name."""
        forward = self.scale * self.forward(task, motion)
        survive = self.bonus + self.alive * motion.healthy
        control = self.control_cost * motion.control
        contact = np.minimum(self.contact_cost * motion.contact, self.contact_limit)
        parts = {
            "reward_forward": forward,
            "reward_survive": survive,
            "reward_ctrl": -control,
            "reward_contact": -contact,
        }
        total: Array = forward + survive - (control + contact)
        return total, parts


def check_reward_task(forward: Forward, task: Mapping[str, Any]) -> None:
    """Raise ValueError where the task lacks a parameter of the reward, or has one that is not finite."""
    for name in forward.names:
        if name not in task:
            raise ValueError(f"A task of {type(forward).__name__.lower()} must have {name!r}; got {sorted(task)}.")
        value = np.asarray(task[name], np.float64)
        expected = (2,) if name == "goal" else ()
        if value.shape != expected or not np.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite, of shape {expected}; got {task[name]!r}.")
