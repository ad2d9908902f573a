from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Discrete

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import bandit


def play(family: Any, tasks: Any, arms: Any) -> Any:
    """(N,) total rewards of an episode in which every row pulls its arm (N,)."""
    environment = Environment(family, tasks=tasks, seed=0)
    environment.reset()
    steps = [environment.step(arms) for _ in range(family.horizon)]
    assert steps[-1][3].all()
    return np.sum([step[1] for step in steps], axis=0)


def test_arms_pay_one_with_their_probability():
    env: Any = bandit(arms=3).make({"probabilities": (0.0, 0.3, 1.0)}, max_episode_steps=20_000)
    env.reset(seed=0)
    rewards = {arm: [env.step(arm)[1] for _ in range(2000)] for arm in range(3)}
    assert set(rewards[0]) == {0.0}
    assert set(rewards[2]) == {1.0}
    assert set(rewards[1]) == {0.0, 1.0}
    assert np.mean(rewards[1]) == pytest.approx(0.3, abs=4 * (0.21 / 2000) ** 0.5)
    assert abs(np.corrcoef(rewards[1][1:], rewards[1][:-1])[0, 1]) < 0.09


def test_rewards_of_an_episode_differ_from_those_of_the_next_and_of_another_row():
    family = bandit(arms=1, pulls=64)
    environment = Environment(family, tasks=[{"probabilities": (0.5,)}] * 2, seed=0)
    environment.reset()
    rewards = np.array([environment.step(np.zeros(2, np.int64))[1] for _ in range(129)])
    first, second = rewards[:64].T.tolist(), rewards[65:].T.tolist()
    assert len({*map(tuple, [*first, *second])}) == 4


def test_the_observation_says_nothing():
    env = bandit().make({})
    assert env.observation_space == Discrete(1)
    assert env.reset(seed=0)[0] == 0
    assert {int(env.step(arm)[0]) for arm in range(5)} == {0}


def test_probabilities_are_uniform():
    values = np.array([task["probabilities"] for task in bandit(arms=10).sample(500, seed=0)])
    assert values.shape == (500, 10)
    counts, _ = np.histogram(values, 10, (0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # the 0.999 quantile of χ² with 9 degrees of freedom


@pytest.mark.parametrize(("arms", "pulls"), [(5, 10), (2, 50)])
def test_the_references_are_what_the_best_and_any_arm_give(arms, pulls):
    family = bandit(arms=arms, pulls=pulls)
    tasks = family.sample(4000, seed=0)
    best = np.array([np.argmax(task["probabilities"]) for task in tasks])
    for choice, reference in ((best, family.oracle_return), (np.zeros(4000, np.int64), family.task_blind_return)):
        returns = play(family, tasks, choice)
        assert reference == pytest.approx(returns.mean(), abs=4 * returns.std() / 4000**0.5)
    assert family.oracle_return == pulls * arms / (arms + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bandit(arms=0), "`arms` must be at least 1; got 0"),
        (lambda: bandit(pulls=0), "`pulls` must be at least 1; got 0"),
        (lambda: bandit().make({"probabilities": (0.5,) * 4}), r"`probabilities` must have shape \(5,\); got \(4,\)"),
        (lambda: bandit(arms=1).make({"probabilities": (1.5,)}), r"`probabilities` must be in \[0, 1\]; got \(1\.5,\)"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
