"""Bandits: K arms, of which arm k pays 1 with probability p_k and 0 otherwise.

Letters: B rows, R rows in which an episode begins, K arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.tasks.array_simulation import Arrays, Step, makers
from ssmrl.env_runner.tasks.canvas import BLUE, RED, Canvas
from ssmrl.env_runner.tasks.draws import new_keys, uniform
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.parameters import UNIT_INTERVAL, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["Bandit", "bandit"]

_ID = "ssmrl/Bandit-v0"


@dataclass(frozen=True)
class Bandit:
    """A bandit whose task is `probabilities`, (K,); an action is the index of an arm.

    There is one state, so that the observation, 0 of Discrete(1), says nothing: what can be learned is in the rewards.

    Args:
        arms: K.
    """

    arms: int = 5

    seconds = 0.25

    def __post_init__(self) -> None:
        require_integer("arms", self.arms, 1)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The probabilities."""
        return {"probabilities": Parameter((0.5,) * self.arms, UNIT_INTERVAL)}

    @property
    def observation_space(self) -> Discrete:
        """The one state."""
        return Discrete(1)

    @property
    def action_space(self) -> Discrete:
        """The arms."""
        return Discrete(self.arms)

    def derive(self, values: Arrays) -> Arrays:
        """Return the probabilities, (B, K)."""
        return values

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return the keys of the rows' random numbers, how many steps were made, and the last arm, all (R,)."""
        key = new_keys(generators)
        return {"key": key, "count": np.zeros_like(key), "arm": np.full(len(key), -1)}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Pull the arms actions (B,)."""
        key, count, arm = state["key"], state["count"], np.array(actions, np.int64)
        probability = derived["probabilities"][np.arange(len(arm)), arm]
        reward = (uniform(key, count, 1)[:, 0] < probability).astype(np.float64)
        return Step({"key": key, "count": count + np.uint64(1), "arm": arm}, reward, np.zeros(len(arm), np.bool_), {})

    def observe(self, state: Arrays) -> NDArray[np.int64]:
        """Return 0, int64 (B,)."""
        return np.zeros(len(state["key"]), np.int64)

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the probabilities as bars, the arm last pulled in red."""
        canvas = Canvas((0.0, 0.0), (float(self.arms), 1.0 * self.arms))
        colors = [RED if arm == state["arm"] else BLUE for arm in range(self.arms)]
        canvas.bars(self.arms * values["probabilities"], colors)
        return canvas.pixels


def bandit(*, arms: int = 5, pulls: int = 10) -> TaskFamily:
    """K arms with p_k ~ U[0, 1], pulled N times, which is an episode.

    The definition is RL²'s (Duan et al. 2016, https://arxiv.org/abs/1611.02779), which has K 5, 10 and 50 and N 10,
    100 and 500. There every pull is an episode of its own, whose end the policy sees.

    `oracle_return` is that of pulling the best arm: N E[max p] = N K / (K + 1). `task_blind_return` is N / 2.
    """
    pulls = require_integer("pulls", pulls, 1)
    Bandit(arms)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        return {"probabilities": tuple(generator.uniform(0.0, 1.0, arms).tolist())}

    references = {"task_blind_return": pulls / 2, "oracle_return": pulls * arms / (arms + 1)}
    return TaskFamily("bandit", _ID, draw, pulls, {"arms": arms}, "RL²", **references)


make, make_batch = makers(Bandit)
register(_ID, __name__, horizon=10)
register_family("bandit", bandit)
