from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import navigation, sparse_navigation, task_family
from ssmrl.env_runner.tasks.family import TaskFamily


def episode_returns(family: TaskFamily, tasks: Any, policy: Any) -> Any:
    """(N,) the return of the first episode of every task; the policy sees position and goal, (N, 2) each."""
    environment = Environment(family, tasks=tasks, seed=0)
    goals = np.array([task["goal"] for task in tasks])
    observation, _ = environment.reset()
    total, alive = np.zeros(len(tasks)), np.ones(len(tasks), np.bool_)
    for _ in range(family.horizon or 0):
        observation, reward, terminated, truncated, _ = environment.step(policy(observation, goals))
        total += np.where(alive, reward, 0.0)
        alive &= ~(terminated | truncated)
    assert not alive.any()
    return total


def stay(position: Any, goal: Any) -> Any:
    return np.zeros_like(position)


def go(position: Any, goal: Any) -> Any:
    return np.clip((goal - position) / 0.1, -1, 1).astype(np.float32)


# Steps


def test_a_step_moves_by_a_tenth_of_the_clipped_action_and_costs_the_distance():
    env = navigation().make({"goal": (0.3, 0.4)})
    assert env.reset(seed=0)[0].tolist() == [0.0, 0.0]
    observation, reward, terminated, *_ = env.step(np.array([0.0, 0.0], np.float32))
    assert (observation.tolist(), reward, terminated) == ([0.0, 0.0], -0.5, False)
    observation, reward, *_ = env.step(np.array([0.5, -7.0], np.float32))
    np.testing.assert_allclose(observation, [0.05, -0.1], rtol=1e-6)
    assert reward == pytest.approx(-((0.25**2 + 0.5**2) ** 0.5))


@pytest.mark.parametrize(
    ("goal", "ended"), [((0.0099, -0.0099), True), ((0.0, 0.0101), False), ((-0.0101, 0.0), False)]
)
def test_an_episode_ends_within_a_hundredth_along_both_axes(goal, ended):
    env = navigation().make({"goal": goal})
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[2] == ended


@pytest.mark.parametrize(("distance", "reward"), [(0.0, 1.0), (0.15, 0.85), (0.199, 0.801), (0.201, 0.0), (1.0, 0.0)])
def test_the_sparse_reward_is_one_less_the_distance_within_a_fifth(distance, reward):
    env = sparse_navigation().make({"goal": (0.0, distance)})
    env.reset(seed=0)
    _, got, terminated, *_ = env.step(np.zeros(2, np.float32))
    assert got == pytest.approx(reward)
    assert not terminated


def test_the_scale_is_how_far_an_action_of_one_moves():
    env = navigation(scale=0.25).make({"goal": (1.0, 1.0)})
    env.reset(seed=0)
    assert env.step(np.ones(2, np.float32))[0].tolist() == [0.25, 0.25]


# Tasks


def test_goals_fill_the_square():
    goals = np.array([task["goal"] for task in navigation().sample(2000, seed=0)])
    assert np.abs(goals).max() <= 0.5
    assert (np.abs(goals).max(axis=0) > 0.499).all()
    np.testing.assert_allclose(goals.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(goals.var(axis=0), 1 / 12, rtol=0.06)


def test_sparse_goals_are_pearls():
    family = sparse_navigation()
    train, test = ({task["goal"] for task in family.sample(3000, seed=0, split=split)} for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (80, 20, 0)
    goals = np.array(sorted(train | test, key=lambda goal: -goal[0]))
    np.testing.assert_allclose(np.hypot(*goals.T), 1)
    np.testing.assert_allclose(np.arctan2(goals[:, 1], goals[:, 0]), np.linspace(0, np.pi, 100), atol=1e-7)
    # Their list, shuffled as they do it, begins with these: numpy.random.seed(1337); numpy.random.shuffle(goals).
    state = np.random.RandomState(1337)
    expected = np.stack([np.cos(np.linspace(0, np.pi, 100)), np.sin(np.linspace(0, np.pi, 100))], axis=1)
    state.shuffle(expected)
    assert {tuple(goal) for goal in expected[80:].tolist()} == test


def test_sparse_goals_can_be_of_any_angle():
    goals = np.array([task["goal"] for task in sparse_navigation(num_goals=None).sample(2000, seed=0)])
    angles = np.arctan2(goals[:, 1], goals[:, 0])
    assert 0 <= angles.min() < 0.01
    assert np.pi - 0.01 < angles.max() <= np.pi
    np.testing.assert_allclose([angles.mean(), angles.var()], [np.pi / 2, np.pi**2 / 12], rtol=0.06)


# References


@pytest.mark.parametrize(
    "arguments", [{}, {"half_width": 0.33, "scale": 0.07, "horizon": 6}, {"half_width": 1.0, "horizon": 4}]
)
def test_the_references_are_what_staying_and_going_give(arguments):
    family = navigation(**arguments)
    tasks = family.sample(4000, seed=0)
    scale = arguments.get("scale", 0.1)
    for policy, reference in (
        (stay, family.task_blind_return),
        (lambda p, g: np.clip((g - p) / scale, -1, 1), family.oracle_return),
    ):
        returns = episode_returns(family, tasks, policy)
        assert reference == pytest.approx(returns.mean(), abs=4 * returns.std() / 4000**0.5)


def test_the_references_are_the_published_ones():
    assert navigation().task_blind_return == pytest.approx(-38.26, abs=0.005)
    assert navigation().oracle_return == pytest.approx(-0.506, abs=0.001)
    assert sparse_navigation().oracle_return == pytest.approx(13.37, abs=0.01)


def test_going_straight_to_sparse_goals_gives_the_oracles_return():
    family = sparse_navigation()
    tasks = [{"goal": (np.cos(a), np.sin(a))} for a in np.linspace(0, np.pi, 100)]
    # Goals on the axes are 0.2 away after 8 steps, where rounding decides over a reward of 0.8.
    assert episode_returns(family, tasks, go).mean() == pytest.approx(family.oracle_return, abs=3 * 0.8 / 100 + 1e-4)
    continuous = sparse_navigation(num_goals=None)
    tasks = [{"goal": (np.cos(a), np.sin(a))} for a in np.pi * (np.arange(1000) + 0.5) / 1000]
    assert episode_returns(continuous, tasks, go).mean() == pytest.approx(continuous.oracle_return, abs=2e-2)


def test_arguments_are_settings_of_the_environment():
    assert task_family("navigation", scale=0.2, horizon=7).settings == {"scale": 0.2, "tolerance": 0.01}
    assert task_family("navigation", horizon=7).horizon == 7
    assert task_family("sparse-navigation", radius=0.3).settings["radius"] == 0.3


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (navigation, {"half_width": 0.0}, r"`half_width` must be positive and finite; got 0\.0"),
        (navigation, {"scale": -0.1}, r"`scale` must be positive and finite; got -0\.1"),
        (navigation, {"tolerance": -1.0}, r"`tolerance` must be at least 0 and finite; got -1\.0"),
        (navigation, {"horizon": 0}, "`horizon` must be at least 1; got 0"),
        (sparse_navigation, {"radius": 0.0}, r"`radius` must be positive and finite; got 0\.0"),
        (sparse_navigation, {"num_goals": 4}, "`num_goals` must be at least 5; got 4"),
    ],
)
def test_bad_arguments_are_refused(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


@pytest.mark.parametrize("goal", [(0.1,), (0.1, np.nan)])
def test_bad_goals_are_refused(goal):
    with pytest.raises(ValueError, match="`goal` must "):
        navigation().make({"goal": goal})
