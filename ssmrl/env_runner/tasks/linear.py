"""Linear systems, whose best predictor is known.

    x' = A x + B u + noise · w,   w ~ N(0, I)        r = -‖x'‖²

Letters: N rows (B is a matrix here), R rows in which an episode begins, D components of x, M of u.
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
from ssmrl.env_runner.tasks.canvas import BLUE, Canvas
from ssmrl.env_runner.tasks.draws import new_keys, normal
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.parameters import FINITE, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family
from ssmrl.env_runner.tasks.tabular import nested

__all__ = ["Linear", "best_prediction", "linear_system", "noise_floor"]

_ID = "ssmrl/LinearSystem-v0"


@dataclass(frozen=True)
class Linear:
    """A system whose task is the matrices `A`, (D, D), and `B`, (D, M); it starts at 0, and nothing ends it.

    The observation is x, float64 (D,); the action is u, float32 (M,), clipped to ±1. The info of a step has what the
    noise added to x' under "noise", (D,): the error that no predictor can avoid.

    Args:
        state_dim: D.
        input_dim: M.
        noise: deviation of each component of the noise.
    """

    state_dim: int = 4
    input_dim: int = 1
    noise: float = 0.1

    seconds = 0.1

    def __post_init__(self) -> None:
        require_integer("state_dim", self.state_dim, 1)
        require_integer("input_dim", self.input_dim, 1)
        noise_floor(self.noise)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The two matrices."""
        decay, drive = 0.9 * np.eye(self.state_dim), np.ones((self.state_dim, self.input_dim))
        return {"A": Parameter(decay, FINITE), "B": Parameter(drive, FINITE)}

    @property
    def observation_space(self) -> Box:
        """Where x is."""
        return Box(-np.inf, np.inf, (self.state_dim,), np.float64)

    @property
    def action_space(self) -> Box:
        """Where u is."""
        return Box(-1.0, 1.0, (self.input_dim,), np.float32)

    def derive(self, values: Arrays) -> Arrays:
        """Return the matrices, (N, D, D) and (N, D, M)."""
        return values

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return the keys of the rows' random numbers and how many steps were made, (R,), and x = 0, (R, D)."""
        key = new_keys(generators)
        return {"key": key, "count": np.zeros_like(key), "x": np.zeros((len(key), self.state_dim))}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Drive the systems by actions (N, M)."""
        key, count = state["key"], state["count"]
        noise = self.noise * normal(key, count, self.state_dim)
        with np.errstate(over="ignore", invalid="ignore"):  # Of an unstable system: the reward tells.
            x = best_prediction(derived["A"], derived["B"], state["x"], actions) + noise
            reward = -np.square(x).sum(axis=1)
        following = {"key": key, "count": count + np.uint64(1), "x": x}
        return Step(following, reward, np.zeros(len(key), np.bool_), {"noise": noise})

    def observe(self, state: Arrays) -> NDArray[np.float64]:
        """Return x, (N, D)."""
        return state["x"].copy()

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the components of x as bars, between -4 and 4."""
        canvas = Canvas((0.0, -self.state_dim / 2), (float(self.state_dim), self.state_dim / 2))
        canvas.bars(np.clip(state["x"] / 4, -1, 1) * self.state_dim / 2, [BLUE] * self.state_dim)
        return canvas.pixels


def best_prediction(
    A: NDArray[np.float64], B: NDArray[np.float64], x: NDArray[np.float64], u: NDArray[Any]
) -> NDArray[np.float64]:
    """Return A x + B clip(u, -1, 1), (N, D): the expectation of x', which no prediction is better than.

    Args:
        A: (N, D, D), B: (N, D, M), x: (N, D), u: (N, M).
    """
    inputs = np.clip(np.asarray(u, np.float64), -1.0, 1.0)
    # Sums over the last axis, not matrix products: BLAS's order of summation may depend on the number of rows.
    prediction: NDArray[np.float64] = (A * x[:, None]).sum(axis=-1) + (B * inputs[:, None]).sum(axis=-1)
    return prediction


def noise_floor(noise: float) -> float:
    """Return the mean squared error, per component of x', of the best predictor: noise²."""
    if not 0 <= noise < np.inf:
        raise ValueError(f"`noise` must be at least 0 and finite; got {noise}.")
    return noise**2


def linear_system(
    *,
    state_dim: int = 4,
    input_dim: int = 1,
    noise: float = 0.1,
    radius: tuple[float, float] = (0.7, 0.95),
    gain: float = 0.75,
    horizon: int | None = 200,
) -> TaskFamily:
    """A = ρ Q with ρ ~ U[radius] and Q orthogonal, Haar distributed; B ~ N(0, gain²).

    All eigenvalues of A have the modulus ρ < 1. With the defaults, which are those of
    `benchmarks/adaptation_systems.py`, and u ~ U[-1, 1], the components of x have a variance around 1, and
    `noise_floor(noise)` is 0.01. `changing(family, steps)` has the system switch.
    """
    if len(radius) != 2 or not 0 <= radius[0] <= radius[1] < 1:
        raise ValueError(f"`radius` must be two numbers with 0 <= low <= high < 1; got {radius}.")
    if not 0 <= gain < np.inf:
        raise ValueError(f"`gain` must be at least 0 and finite; got {gain}.")
    horizon = None if horizon is None else require_integer("horizon", horizon, 1)
    Linear(state_dim, input_dim, noise)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        q, r = np.linalg.qr(generator.standard_normal((state_dim, state_dim)))
        haar = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)  # Without these signs Q is not uniform (Mezzadri 2007).
        a = generator.uniform(*radius) * haar
        b = gain * generator.standard_normal((state_dim, input_dim))
        return {"A": nested(a), "B": nested(b)}

    settings = {"state_dim": state_dim, "input_dim": input_dim, "noise": noise}
    return TaskFamily("linear-system", _ID, draw, horizon, settings, "ssmrl")


make, make_batch = makers(Linear)
register(_ID, __name__, horizon=200)
register_family("linear-system", linear_system)
