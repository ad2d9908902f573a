"""Swing up the pole that hangs from a cart, and balance it there, by a force on the cart.

    r = (1 + cos θ) / 2 · (1 + e(x / 2)) / 2 · (1 + e(θ' / 5)) / 2 · (5 - u²) / 5,   e(z) = 10^(-z²)

The equations of motion, with the force F = 10 u, are those of `cartpole`: θ is 0 when the pole is upright. Letters: B
rows, R rows in which an episode begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssmrl.env_runner.tasks.array_simulation import Arrays, Step, makers
from ssmrl.env_runner.tasks.canvas import BLUE, GREY, RED, Canvas
from ssmrl.env_runner.tasks.cartpole import accelerations, with_totals
from ssmrl.env_runner.tasks.draws import check_scatter, scattered
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.parameters import POSITIVE, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["SWINGUP_PHYSICS", "CartPoleSwingUp", "cartpole_swingup"]

SWINGUP_PHYSICS = {"gravity": 9.81, "masscart": 1.0, "masspole": 0.1, "length": 0.5}
"""m/s², kg, kg, and half the length of the pole in m."""

_ID, _HORIZON = "ssmrl/CartPoleSwingUp-v0", 200
_PARAMETERS = {name: Parameter(value, POSITIVE) for name, value in SWINGUP_PHYSICS.items()}
_FORCE, _SECONDS, _SUBSTEPS = 10.0, 0.05, 5


@dataclass(frozen=True)
class CartPoleSwingUp:
    """The physics of `CartPole` with a force from -10 to 10 N, 20 times a second; nothing ends an episode.

    The action is u, float32 (1,), clipped to ±1. The observation is x, x', cos θ, sin θ and θ', float32 (5,). A step is
    five of semi-implicit Euler.
    """

    parameters = _PARAMETERS
    seconds = _SECONDS

    @property
    def observation_space(self) -> Box:
        """Positions and velocities are not bounded."""
        high = np.array([np.inf, np.inf, 1.0, 1.0, np.inf], np.float32)
        return Box(-high, high)

    @property
    def action_space(self) -> Box:
        """A part of 10 N."""
        return Box(-1.0, 1.0, (1,), np.float32)

    def derive(self, values: Arrays) -> Arrays:
        """Return the total mass, and the mass of the pole times half its length, beside the parameters."""
        return with_totals(values)

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return x, x', θ and θ' near 0, 0, π and 0: with deviations of 0.01."""
        motion = [generator.normal((0.0, 0.0, np.pi, 0.0), 0.01) for generator in generators]
        return {"motion": np.array(motion).reshape(-1, 4)}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Push with actions (B, 1)."""
        u = np.clip(actions[:, 0].astype(np.float64), -1.0, 1.0)
        x, v, angle, omega = state["motion"].T
        for _ in range(_SUBSTEPS):
            acceleration, turn = accelerations(angle, omega, _FORCE * u, derived)
            v = v + _SECONDS / _SUBSTEPS * acceleration
            omega = omega + _SECONDS / _SUBSTEPS * turn
            x = x + _SECONDS / _SUBSTEPS * v
            angle = angle + _SECONDS / _SUBSTEPS * omega
        upright, centered, slow = (1 + np.cos(angle)) / 2, (1 + _bump(x / 2)) / 2, (1 + _bump(omega / 5)) / 2
        reward = upright * centered * slow * (5 - np.square(u)) / 5
        return Step({"motion": np.stack([x, v, angle, omega], axis=1)}, reward, np.zeros(len(x), np.bool_), {})

    def observe(self, state: Arrays) -> NDArray[np.float32]:
        """Return x, x', cos θ, sin θ and θ', float32 (B, 5)."""
        x, v, angle, omega = state["motion"].T
        return np.stack([x, v, np.cos(angle), np.sin(angle), omega], axis=1).astype(np.float32)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the cart and the pole."""
        x, _, angle, _ = state["motion"]
        length = 2 * values["length"]
        half = max(2.4, abs(float(x)) + 0.3, 1.1 * float(length))
        canvas = Canvas((-half, -half / 2), (half, half / 2))
        canvas.line((-half, 0.0), (half, 0.0), half / 120, GREY)
        canvas.line((x - 0.15, 0.0), (x + 0.15, 0.0), 0.2, BLUE)
        canvas.line((x, 0.0), (x + length * np.sin(angle), length * np.cos(angle)), half / 40, RED)
        return canvas.pixels


def cartpole_swingup(*, base: float = 1.5, spread: float = 2.0, horizon: int | None = _HORIZON) -> TaskFamily:
    """A cart-pole whose every parameter is nominal · base^u with its own u ~ U[-spread, spread], to be swung up.

    The reward, of at most 1 a step, and the start are those of cart-pole in the DeepMind Control Suite (Tassa et al.
    2018, https://arxiv.org/abs/1801.00690), whose limits of the track, friction and motor are not there, and whose
    control is 100 times a second. Parameters differ as those of `classic_physics`.

    Args:
        base: > 0.
        spread: ≥ 0; 0 is the nominal task.
        horizon: steps of 0.05 s.
    """
    check_scatter(base, spread)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return scattered(SWINGUP_PHYSICS, generator, base, spread)

    return TaskFamily("cartpole-swingup", _ID, draw, horizon, source="DeepMind Control Suite, rand_param_envs")


def _bump(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """10^(-z²): 1 at 0, 0.1 at ±1."""
    bump: NDArray[np.float64] = np.exp(-np.log(10.0) * np.square(z))
    return bump


make, make_batch = makers(CartPoleSwingUp)
register(_ID, __name__, horizon=_HORIZON)
register_family("cartpole-swingup", cartpole_swingup)
