"""Regression as an environment: predict y = amplitude · sin(x - phase) of inputs that come one after another.

    observation (x_t, y_{t-1}),  action a_t,  r_t = -(a_t - y_t)²

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
from ssmrl.env_runner.tasks.draws import new_keys, uniform
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.parameters import FINITE, Domain, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["Sinusoid", "sinusoid"]

_ID = "ssmrl/Sinusoid-v0"

_HALF_WIDTH = 5.0  # of inputs, and of targets: no amplitude is larger

_PARAMETERS = {
    "amplitude": Parameter(1.0, Domain(lambda value: 0 <= value <= _HALF_WIDTH, "in [0, 5]")),
    "phase": Parameter(0.0, FINITE),
}


@dataclass(frozen=True)
class Sinusoid:
    """A stream of x ~ U[-5, 5], whose task is `amplitude` and `phase`; nothing ends it.

    The observation is the next input and the target of the one before, float32 (2,), which is 0 at first; the action
    is the prediction, float32 (1,), and is taken as it is, out of bounds too.
    """

    parameters = _PARAMETERS
    seconds = 0.25

    @property
    def observation_space(self) -> Box:
        """An input and a target."""
        return Box(-_HALF_WIDTH, _HALF_WIDTH, (2,), np.float32)

    @property
    def action_space(self) -> Box:
        """A prediction."""
        return Box(-_HALF_WIDTH, _HALF_WIDTH, (1,), np.float32)

    def derive(self, values: Arrays) -> Arrays:
        """Return the parameters, (B,)."""
        return values

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return the keys of the rows' random numbers, how many inputs were drawn, the first one, and 0, all (R,)."""
        key = new_keys(generators)
        count = np.zeros_like(key)
        return {"key": key, "count": count, "x": _inputs(key, count), "y": np.zeros(len(key))}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Judge the predictions (B, 1), and go on to the next input."""
        key, count = state["key"], state["count"] + np.uint64(1)
        y = derived["amplitude"] * np.sin(state["x"] - derived["phase"])
        reward = -np.square(np.asarray(actions, np.float64)[:, 0] - y)
        following = {"key": key, "count": count, "x": _inputs(key, count), "y": y}
        return Step(following, reward, np.zeros(len(key), np.bool_), {})

    def observe(self, state: Arrays) -> NDArray[np.float32]:
        """Return x_t and y_{t-1}, float32 (B, 2)."""
        return np.stack([state["x"], state["y"]], axis=1).astype(np.float32)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the curve, the input, and the last target as a line."""
        canvas = Canvas((-_HALF_WIDTH, -_HALF_WIDTH), (_HALF_WIDTH, _HALF_WIDTH))
        x, y = float(state["x"]), float(state["y"])
        canvas.line((-_HALF_WIDTH, y), (_HALF_WIDTH, y), 0.05, GREY)
        for point in np.linspace(-_HALF_WIDTH, _HALF_WIDTH, 100):
            canvas.disc((float(point), float(values["amplitude"] * np.sin(point - values["phase"]))), 0.08, BLUE)
        canvas.disc((x, 0.0), 0.15, RED)
        return canvas.pixels


def _inputs(key: NDArray[np.uint64], count: NDArray[np.uint64]) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = _HALF_WIDTH * (2 * uniform(key, count, 1)[:, 0] - 1)
    return numbers


def sinusoid(*, amplitude: tuple[float, float] = (0.1, 5.0), horizon: int = 20) -> TaskFamily:
    """Amplitude ~ U[amplitude], phase ~ U[0, π]: MAML's regression (Finn et al. 2017), one input after another.

    The default horizon is its 10 examples to adapt to and 10 to be judged on. `task_blind_return` is the return of
    the best function of x alone, E[y | x] = -2 E[A] cos(x) / π; `oracle_return` is 0.
    """
    low, high = amplitude
    if not 0 <= low <= high <= _HALF_WIDTH:
        raise ValueError(f"`amplitude` must be two numbers with 0 <= low <= high <= {_HALF_WIDTH}; got {amplitude}.")
    horizon = require_integer("horizon", horizon, 1)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return {"amplitude": float(generator.uniform(low, high)), "phase": float(generator.uniform(0.0, np.pi))}

    # E[y² | x] = E[A²] / 2; and the mean of cos² over [-5, 5] is 1/2 + sin(10) / 20.
    mean, mean_of_square = (low + high) / 2, (low * low + low * high + high * high) / 3
    error = mean_of_square / 2 - (2 * mean / np.pi) ** 2 * (0.5 + np.sin(2 * _HALF_WIDTH) / (4 * _HALF_WIDTH))
    references = {"task_blind_return": -horizon * float(error), "oracle_return": 0.0}
    return TaskFamily("sinusoid", _ID, draw, horizon, {}, "MAML", **references)


make, make_batch = makers(Sinusoid)
register(_ID, __name__, horizon=20)
register_family("sinusoid", sinusoid)
