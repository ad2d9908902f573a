"""Gymnasium's CartPole-v1, many rows at once: a cart that is pushed left or right, so that a pole on it stays upright.

    θ'' = (g sin θ - cos θ (F + m l θ'² sin θ) / M) / (l (4/3 - m cos² θ / M))
    x'' = (F + m l θ'² sin θ) / M - m l θ'' cos θ / M

with M the mass of cart and pole, m that of the pole and l half its length (Florian 2007, "Correct equations for the
dynamics of the cart-pole system"), integrated by Euler's method. Letters: B rows, R rows in which an episode begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.envs.classic_control import CartPoleEnv, utils
from numpy.typing import NDArray

from ssmrl.env_runner.tasks.array_simulation import Arrays, Step
from ssmrl.env_runner.tasks.canvas import BLUE, GREY, RED, Canvas
from ssmrl.env_runner.tasks.parameters import POSITIVE, Parameter

__all__ = ["CARTPOLE_PHYSICS", "CartPole", "accelerations", "with_totals"]

CARTPOLE_PHYSICS = {"gravity": 9.8, "masscart": 1.0, "masspole": 0.1, "length": 0.5}
"""Gymnasium's: m/s², kg, kg, and half the length of the pole in m."""

_PARAMETERS = {name: Parameter(value, POSITIVE) for name, value in CARTPOLE_PHYSICS.items()}
_FORCE, _SECONDS = 10.0, 0.02
_MAX_POSITION, _MAX_ANGLE = 2.4, 12 * 2 * np.pi / 360


@dataclass(frozen=True)
class CartPole:
    """Equal to Gymnasium's `CartPoleEnv` bit for bit: every operation is the same one, in the same order.

    Args:
        sutton_barto_reward: -1 for falling and 0 else, in place of 1 for every step until it falls.
    """

    sutton_barto_reward: bool = False

    parameters = _PARAMETERS
    seconds = _SECONDS

    @property
    def observation_space(self) -> Space[Any]:
        """Gymnasium's."""
        return CartPoleEnv().observation_space

    @property
    def action_space(self) -> Space[Any]:
        """Gymnasium's."""
        return CartPoleEnv().action_space

    def derive(self, values: Arrays) -> Arrays:
        """Return the total mass, and the mass of the pole times half its length, beside the parameters."""
        return with_totals(values)

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return position, velocity, angle and angular velocity, each uniform in options["low"] to options["high"]."""
        low, high = utils.maybe_parse_reset_bounds(dict(options), -0.05, 0.05)
        motion = [generator.uniform(low=low, high=high, size=(4,)) for generator in generators]
        return {"motion": np.array(motion).reshape(-1, 4), "fallen": np.zeros(len(motion), np.bool_)}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Push to the right where the action is 1."""
        x, v, angle, omega = state["motion"].T
        acceleration, turn = accelerations(angle, omega, np.where(actions == 1, _FORCE, -_FORCE), derived)
        motion = np.empty_like(state["motion"])
        motion[:, 0] = x = x + _SECONDS * v
        motion[:, 1] = v + _SECONDS * acceleration
        motion[:, 2] = angle = angle + _SECONDS * omega
        motion[:, 3] = omega + _SECONDS * turn
        terminated = (np.abs(x) > _MAX_POSITION) | (np.abs(angle) > _MAX_ANGLE)
        # As Gymnasium has it: the step that falls is still worth 1, and those after it, which no caller should make, 0.
        if self.sutton_barto_reward:
            reward = np.where(terminated, -1.0, 0.0)
        else:
            reward = np.where(terminated & state["fallen"], 0.0, 1.0)
        return Step({"motion": motion, "fallen": state["fallen"] | terminated}, reward, terminated, {})

    def observe(self, state: Arrays) -> NDArray[np.float32]:
        """Return the motion, float32 (B, 4)."""
        return state["motion"].astype(np.float32)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the cart and the pole."""
        x, _, angle, _ = state["motion"]
        length = 2 * values["length"]
        canvas = Canvas((-2.4, -0.4), (2.4, 2.0))
        canvas.line((-2.4, 0.0), (2.4, 0.0), 0.02, GREY)
        canvas.line((x - 0.15, 0.0), (x + 0.15, 0.0), 0.2, BLUE)
        canvas.line((x, 0.0), (x + length * np.sin(angle), length * np.cos(angle)), 0.06, RED)
        return canvas.pixels


def with_totals(values: Arrays) -> Arrays:
    """Return the parameters with M, the `total` mass, and m l, the `moment`."""
    pole = values["masspole"]
    return {**values, "total": pole + values["masscart"], "moment": pole * values["length"]}


def accelerations(
    angle: NDArray[Any], omega: NDArray[Any], force: NDArray[Any], derived: Arrays
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return x'' and θ'', (B,) each, at θ, θ' and F, with the parameters and totals of `with_totals`."""
    total, moment, pole = derived["total"], derived["moment"], derived["masspole"]
    cosine, sine = np.cos(angle), np.sin(angle)
    push = (force + moment * np.square(omega) * sine) / total
    turn = (derived["gravity"] * sine - cosine * push) / (
        derived["length"] * (4.0 / 3.0 - pole * np.square(cosine) / total)
    )
    return push - moment * turn * cosine / total, turn
