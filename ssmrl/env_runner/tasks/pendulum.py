"""Gymnasium's Pendulum-v1, many rows at once: a rod that is to be swung up by a torque u.

    θ'' = 3 g sin θ / (2 l) + 3 u / (m l²)        r = -(θ² + 0.1 θ'² + 0.001 u²)

θ is 0 when it is upright; integrated by semi-implicit Euler. Letters: B rows, R rows in which an episode begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.envs.classic_control import PendulumEnv, utils
from numpy.typing import NDArray

from ssmrl.env_runner.tasks.array_simulation import Arrays, Step
from ssmrl.env_runner.tasks.canvas import GREY, RED, Canvas
from ssmrl.env_runner.tasks.parameters import POSITIVE, Parameter

__all__ = ["PENDULUM_PHYSICS", "Pendulum"]

PENDULUM_PHYSICS = {"g": 10.0, "m": 1.0, "l": 1.0}
"""Gymnasium's: m/s², kg, m."""

_PARAMETERS = {name: Parameter(value, POSITIVE) for name, value in PENDULUM_PHYSICS.items()}
_SECONDS, _MAX_SPEED, _MAX_TORQUE = 0.05, 8, 2.0


@dataclass(frozen=True)
class Pendulum:
    """Equal to Gymnasium's `PendulumEnv` bit for bit."""

    parameters = _PARAMETERS
    seconds = _SECONDS

    @property
    def observation_space(self) -> Space[Any]:
        """Gymnasium's."""
        return PendulumEnv().observation_space

    @property
    def action_space(self) -> Space[Any]:
        """Gymnasium's."""
        return PendulumEnv().action_space

    def derive(self, values: Arrays) -> Arrays:
        """Return the angular accelerations of gravity at sin θ = 1, and of a torque of 1."""
        g, m, length = values["g"], values["m"], values["l"]
        # The powers are Python's, which are not always l · l: see `squares`.
        inertia = m * np.array([x**2 for x in length.tolist()])
        return {"fall": 3 * g / (2 * length), "push": 3.0 / inertia}

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return angle and angular velocity, uniform in ±options["x_init"] and ±options["y_init"]."""
        given = options.get("x_init", np.pi), options.get("y_init", 1.0)
        high = np.array([utils.verify_number_and_cast(value) for value in given])
        motion = [generator.uniform(low=-high, high=high) for generator in generators]
        return {"motion": np.array(motion).reshape(-1, 2)}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Apply the torque actions[:, 0], clipped to ±2, whose type decides in which precision its part is computed."""
        angle, speed = state["motion"].T
        torque = np.clip(actions, -_MAX_TORQUE, _MAX_TORQUE)[:, 0]
        upright = ((angle + np.pi) % (2 * np.pi)) - np.pi
        upright_2, speed_2 = squares(np.stack([upright, speed]))
        cost = upright_2 + 0.1 * speed_2 + 0.001 * squares(torque)
        # A Python number times a float32 scalar is a float32 in NumPy 2, a float64 in NumPy 1.
        push = derived["push"].astype((1.0 * torque.dtype.type(1)).dtype)
        speed = speed + (derived["fall"] * np.sin(angle) + push * torque) * _SECONDS
        speed = np.clip(speed, -_MAX_SPEED, _MAX_SPEED)
        motion = np.stack([angle + speed * _SECONDS, speed], axis=1)
        return Step({"motion": motion}, -cost, np.zeros(len(motion), np.bool_), {})

    def observe(self, state: Arrays) -> NDArray[np.float32]:
        """Return cos θ, sin θ and the angular velocity, float32 (B, 3)."""
        angle, speed = state["motion"].T
        return np.stack([np.cos(angle), np.sin(angle), speed], axis=1).astype(np.float32)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the rod."""
        angle, length = float(state["motion"][0]), float(values["l"])
        reach = 1.1 * length
        canvas = Canvas((-reach, -reach), (reach, reach))
        tip = length * np.array([-np.sin(angle), np.cos(angle)])
        canvas.line((0.0, 0.0), tip, 0.1 * reach, RED)
        canvas.disc((0.0, 0.0), 0.03 * reach, GREY)
        return canvas.pixels


def squares(x: NDArray[Any]) -> NDArray[Any]:
    """Return x ** 2 as NumPy computes it for a scalar, element by element.

    Of an array NumPy makes x * x, of a scalar the C library's pow(x, 2), which differs in the last bit for about one
    number in a thousand, and Gymnasium squares scalars.
    """
    if x.dtype == np.float64:  # Python's own power is the same function, and as an array of objects it needs no loop.
        return (x.astype(object) ** 2).astype(np.float64)
    return np.array([value**2 for value in x], x.dtype)
