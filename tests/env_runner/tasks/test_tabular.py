from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import optimal_return, tabular_mdp

MEANS = ((1.0, 2.0), (3.0, 4.0))
TRANSITIONS = (((0.0, 1.0), (0.25, 0.75)), ((1.0, 0.0), (0.5, 0.5)))


def two_states(**kwargs: Any) -> Any:
    return tabular_mdp(states=2, actions=2, horizon=20_000, **kwargs)


def test_rewards_are_of_the_state_before_and_states_follow_the_transitions():
    env = two_states(noise=0.0).make({"means": MEANS, "transitions": TRANSITIONS})
    state, _ = env.reset(seed=0)
    assert state == 0
    assert env.step(0)[:2] == (1, 1.0)
    assert env.step(0)[:2] == (0, 3.0)
    generator = np.random.default_rng(0)
    counts = np.zeros((2, 2, 2))
    state = 0
    for action in generator.integers(2, size=8000):
        following, reward, terminated, *_ = env.step(action)
        assert reward == MEANS[state][action]
        assert not terminated
        counts[state, action, following] += 1
        state = int(following)
    observed = counts / counts.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(observed, TRANSITIONS, atol=4 * 0.5 / 1000**0.5)
    np.testing.assert_array_equal(observed == 0, np.array(TRANSITIONS) == 0)


def test_the_noise_of_rewards_is_normal_and_independent_of_the_transitions():
    env = two_states().make({"means": np.zeros((2, 2)), "transitions": np.full((2, 2, 2), 0.5)})
    env.reset(seed=1)
    steps = [env.step(0)[:2] for _ in range(8000)]
    states, rewards = (np.array(x, np.float64) for x in zip(*steps, strict=True))
    moments = [(rewards**k).mean() for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.25)
    for lag, power in product((0, 1), (1, 2)):
        assert abs(np.corrcoef(rewards[: 8000 - lag] ** power, states[lag:])[0, 1]) < 4 / 8000**0.5
    assert abs(np.corrcoef(rewards[1:], rewards[:-1])[0, 1]) < 4 / 8000**0.5


def test_the_observation_is_the_state():
    assert tabular_mdp(states=7).make(tabular_mdp(states=7).sample(1, 0)[0]).observation_space == Discrete(7)


def test_tasks_are_tuples_of_floats_drawn_from_the_published_distributions():
    tasks = tabular_mdp().sample(300, seed=0)
    assert type(tasks[0]["means"][0][0]) is type(tasks[0]["transitions"][0][0][0]) is float
    means, transitions = (np.array([task[name] for task in tasks]) for name in ("means", "transitions"))
    assert (means.shape, transitions.shape) == ((300, 10, 5), (300, 10, 5, 10))
    np.testing.assert_allclose([means.mean(), means.std()], 1, atol=0.04)
    np.testing.assert_allclose(transitions.sum(axis=-1), 1)
    # Each of the ten is Beta(1, 9), of mean 0.1 and variance 9 / 1100.
    np.testing.assert_allclose(transitions.var(), 9 / 1100, rtol=0.03)
    np.testing.assert_allclose(transitions.mean(axis=(0, 1, 2)), 0.1, atol=0.004)


# References


def test_the_optimal_return_is_that_of_a_process_done_by_hand():
    # One step: the better action, 2. Two: 1 + 4 by the first action, 2 + 0.25 · 2 + 0.75 · 4 = 5.5 by the second.
    assert [optimal_return(MEANS, TRANSITIONS, horizon) for horizon in (0, 1, 2)] == [0.0, 2.0, 5.5]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_optimal_return_is_the_best_of_all_policies(seed):
    generator = np.random.default_rng(seed)
    means, transitions = generator.normal(size=(2, 2)), generator.dirichlet(np.ones(2), (2, 2))
    best = -np.inf
    for policy in product(range(2), repeat=6):  # an action for every one of 3 steps and 2 states
        value = np.zeros(2)
        for step in (2, 1, 0):
            action = np.array(policy[2 * step : 2 * step + 2])
            value = means[np.arange(2), action] + transitions[np.arange(2), action] @ value
        best = max(best, value[0])
    assert optimal_return(means, transitions, 3) == pytest.approx(best)


def test_the_references_are_what_policies_get():
    family = tabular_mdp()
    tasks = family.sample(3000, seed=0)
    environment = Environment(family, tasks=tasks, seed=0)
    means, transitions = (np.array([task[name] for task in tasks]) for name in ("means", "transitions"))
    value = np.zeros((3000, 10))
    policy: list[Any] = []
    for _ in range(10):
        q = means + np.einsum("nsat,nt->nsa", transitions, value)
        policy.insert(0, q.argmax(-1))
        value = q.max(-1)
    optimal = np.array([optimal_return(task["means"], task["transitions"], 10) for task in tasks])
    assert optimal.mean() == pytest.approx(21.82, abs=4 * optimal.std() / 3000**0.5)
    for blind in (False, True):
        state, _ = environment.reset(seed=1)
        total = np.zeros(3000)
        for step in range(10):
            action = np.zeros(3000, np.int64) if blind else policy[step][np.arange(3000), state]
            state, reward, *_ = environment.step(action)
            total += reward
        error = 4 * (total if blind else total - optimal).std() / 3000**0.5
        assert total.mean() == pytest.approx(family.task_blind_return if blind else optimal.mean(), abs=error)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tabular_mdp(states=0), "`states` must be at least 1; got 0"),
        (lambda: tabular_mdp(actions=0), "`actions` must be at least 1; got 0"),
        (lambda: tabular_mdp(horizon=0), "`horizon` must be at least 1; got 0"),
        (lambda: tabular_mdp(noise=-1.0), r"`noise` must be at least 0 and finite; got -1\.0"),
        (lambda: two_states().make({"means": ((1.0,),)}), r"`means` must have shape \(2, 2\); got \(1, 1\)"),
        (
            lambda: two_states().make({"transitions": np.full((2, 2, 2), 0.4)}),
            "`transitions` must be probabilities whose last axis sums to 1; got",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
