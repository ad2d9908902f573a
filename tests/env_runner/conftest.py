"""A tiny environment whose every number is known by heart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete


class Counting(gymnasium.Env[Any, Any]):
    """Observes (episode, step), both counted from 0; the reward is 10·step + action.

    An episode has `length` steps; its last one is terminated, or truncated.
    """

    def __init__(self, length: int, end: str = "terminated") -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Discrete(3)
        self.length, self.end = length, end
        self.episode, self.time = -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, self.time], np.float64), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        ended = self.time >= self.length
        observation = np.array([self.episode, self.time], np.float64)
        reward = 10.0 * self.time + float(action)
        return (
            observation,
            reward,
            ended and self.end == "terminated",
            ended and self.end == "truncated",
            {},
        )


@pytest.fixture
def counting() -> Callable[..., Callable[[], gymnasium.Env[Any, Any]]]:
    """`counting(length, end)` is a maker of that environment."""
    return partial(partial, Counting)


class Scripted(gymnasium.Env[Any, Any]):
    """Observes (episode, step, sum of the actions so far); the reward is step + action / 8.

    Episode e has `lengths[e % len(lengths)]` steps; a positive one is terminated, a negative one truncated.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.lengths = lengths
        self.state = np.array([-1.0, 0, 0])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = np.array([self.state[0] + 1, 0, 0])
        return self.state.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.state += [0, 1, action.sum()]
        length = self.lengths[int(self.state[0]) % len(self.lengths)]
        ended = bool(self.state[1] >= abs(length))
        return self.state.copy(), self.state[1] + action[0] / 8, ended and length > 0, ended and length < 0, {}


@pytest.fixture(scope="session")
def scripted() -> Callable[..., Callable[[], gymnasium.Env[Any, Any]]]:
    """`scripted(lengths)` is a maker of that environment."""
    return partial(partial, Scripted)
