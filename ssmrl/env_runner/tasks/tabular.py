"""Tabular Markov decision processes: S states, A actions, everything drawn at random.

    s' ~ P(s, a, ·)        r ~ N(mean(s, a), noise²)

Letters: B rows, R rows in which an episode begins, S states, A actions, H steps of an episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import ArrayLike, NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.tasks.array_simulation import Arrays, Step, makers
from ssmrl.env_runner.tasks.canvas import BLUE, RED, Canvas
from ssmrl.env_runner.tasks.draws import new_keys, normal, uniform
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.parameters import FINITE, Domain, Parameter
from ssmrl.env_runner.tasks.registration import register, register_family

__all__ = ["Tabular", "optimal_return", "tabular_mdp"]

_ID = "ssmrl/TabularMDP-v0"

_DISTRIBUTIONS = Domain(
    lambda value: bool((value >= 0).all() and np.allclose(value.sum(axis=-1), 1.0, rtol=0, atol=1e-8)),
    "probabilities whose last axis sums to 1",
)


@dataclass(frozen=True)
class Tabular:
    """A process whose task is `means`, (S, A), and `transitions`, (S, A, S); it starts in state 0, and nothing ends it.

    The observation is the state, of Discrete(S): `rollout` and Gymnasium's FlattenObservation make it one-hot.

    Args:
        states: S.
        actions: A.
        noise: deviation of the reward.
    """

    states: int = 10
    actions: int = 5
    noise: float = 1.0

    seconds = 0.25

    def __post_init__(self) -> None:
        require_integer("states", self.states, 1)
        require_integer("actions", self.actions, 1)
        if not 0 <= self.noise < np.inf:
            raise ValueError(f"`noise` must be at least 0 and finite; got {self.noise}.")

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The means of the rewards and the probabilities of the transitions."""
        shape = (self.states, self.actions)
        transitions = np.full((*shape, self.states), 1 / self.states)
        return {"means": Parameter(np.ones(shape), FINITE), "transitions": Parameter(transitions, _DISTRIBUTIONS)}

    @property
    def observation_space(self) -> Discrete:
        """The states."""
        return Discrete(self.states)

    @property
    def action_space(self) -> Discrete:
        """The actions."""
        return Discrete(self.actions)

    def derive(self, values: Arrays) -> Arrays:
        """Return the means, and the transitions summed up to every state but the last, (B, S, A, S - 1)."""
        return {"means": values["means"], "below": np.cumsum(values["transitions"], axis=-1)[..., :-1]}

    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """Return the keys of the rows' random numbers, how many steps were made, and the states, all (R,)."""
        key = new_keys(generators)
        return {"key": key, "count": np.zeros_like(key), "state": np.zeros(len(key), np.int64)}

    def step(self, state: Arrays, actions: NDArray[Any], derived: Arrays) -> Step:
        """Take the actions (B,)."""
        key, count = state["key"], state["count"]
        rows, before, action = np.arange(len(key)), state["state"], np.asarray(actions, np.int64)
        # Two of the numbers of a step are for the noise, the third for the transition.
        reward = derived["means"][rows, before, action] + self.noise * normal(key, np.uint64(2) * count, 1)[:, 0]
        chance = uniform(key, np.uint64(4) * count + np.uint64(2), 1)
        after = (chance >= derived["below"][rows, before, action]).sum(axis=1)
        following = {"key": key, "count": count + np.uint64(1), "state": after}
        return Step(following, reward, np.zeros(len(key), np.bool_), {})

    def observe(self, state: Arrays) -> NDArray[np.int64]:
        """Return the states, int64 (B,)."""
        return state["state"].copy()

    def frame(self, state: Arrays, values: Arrays) -> NDArray[np.uint8]:
        """Draw the best mean reward of every state as a bar, that of the present one in red."""
        best = values["means"].max(axis=1)
        size = max(float(np.abs(best).max()), 1.0)
        canvas = Canvas((0.0, -self.states / 2), (float(self.states), self.states / 2))
        colors = [RED if s == state["state"] else BLUE for s in range(self.states)]
        canvas.bars(self.states / 2 * best / size, colors)
        return canvas.pixels


def optimal_return(means: ArrayLike, transitions: ArrayLike, horizon: int) -> float:
    """Return the expected return of H steps from state 0 of the best policy that knows the process.

    V_H = 0, V_t(s) = max_a mean(s, a) + Σ_s' P(s, a, s') V_{t+1}(s').

    Args:
        means: (S, A), `transitions`: (S, A, S), as a task has them.
        horizon: H.
    """
    mean, probability = np.asarray(means, np.float64), np.asarray(transitions, np.float64)
    value = np.zeros(len(mean))
    for _ in range(require_integer("horizon", horizon, 0)):
        value = (mean + probability @ value).max(axis=1)
    return float(value[0])


def tabular_mdp(*, states: int = 10, actions: int = 5, horizon: int = 10, noise: float = 1.0) -> TaskFamily:
    """Mean rewards ~ N(1, 1), transitions ~ Dirichlet(1, ..., 1), rewards ~ N(mean, 1), from state 0.

    The definition is RL²'s (Duan et al. 2016, https://arxiv.org/abs/1611.02779; Osband et al. 2013), which has trials
    of 10 to 100 episodes. There is no formula for the oracle's return: `optimal_return` computes that of a task.
    """
    horizon = require_integer("horizon", horizon, 1)
    Tabular(states, actions, noise)

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        means = generator.normal(1.0, 1.0, (states, actions))
        transitions = generator.dirichlet(np.ones(states), (states, actions))
        return {"means": nested(means), "transitions": nested(transitions)}

    settings = {"states": states, "actions": actions, "noise": noise}
    # Whatever it does where, without the rewards its steps are worth 1 each.
    return TaskFamily("tabular-mdp", _ID, draw, horizon, settings, "RL²", task_blind_return=float(horizon))


def nested(array: NDArray[np.float64]) -> Any:
    """Return an array as tuples of tuples of floats, as a task has it."""
    return tuple(nested(a) for a in array) if array.ndim > 1 else tuple(array.tolist())


make, make_batch = makers(Tabular)
register(_ID, __name__, horizon=10)
register_family("tabular-mdp", tabular_mdp)
