from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import best_prediction, changing, linear_system, noise_floor

A, B = ((0.5, 0.2), (0.0, 0.8)), ((1.0,), (-2.0,))


def record(family: Any, tasks: Any, num_steps: int, seed: int = 0) -> Any:
    """Observations (T + 1, N, D), actions (T, N, M), rewards (T, N) and noises (T, N, D) of random actions."""
    environment = Environment(family, tasks=tasks, seed=seed)
    x = [environment.reset()[0]]
    u, rewards, noises = [], [], []
    environment.action_space.seed(seed)
    for _ in range(num_steps):
        u.append(environment.action_space.sample())
        observation, reward, _, _, info = environment.step(u[-1])
        x.append(observation)
        rewards.append(reward)
        noises.append(info["noise"])
    return np.array(x), np.array(u), np.array(rewards), np.array(noises)


def test_a_step_without_noise_is_the_equation():
    env = linear_system(state_dim=2, noise=0.0).make({"A": A, "B": B})
    assert env.reset(seed=0)[0].tolist() == [0.0, 0.0]
    assert env.step(np.array([0.5], np.float32))[0].tolist() == [0.5, -1.0]
    observation, reward, terminated, *_ = env.step(np.array([3.0], np.float32))  # clipped to 1
    np.testing.assert_allclose(observation, [0.25 - 0.2 + 1.0, -0.8 - 2.0])
    assert reward == pytest.approx(-(1.05**2) - 2.8**2)
    assert not terminated


def test_the_best_prediction_misses_by_the_noise_that_the_info_tells():
    family = linear_system(horizon=400)
    tasks = family.sample(20, seed=0)
    x, u, rewards, noises = record(family, tasks, 400)
    a, b = (np.array([task[name] for task in tasks]) for name in ("A", "B"))
    errors = np.array([x[t + 1] - best_prediction(a, b, x[t], u[t]) for t in range(400)])
    np.testing.assert_allclose(errors, noises, atol=1e-12)
    assert np.square(errors).mean() == pytest.approx(noise_floor(0.1), rel=4 * (2 / errors.size) ** 0.5)
    assert noise_floor(0.1) == pytest.approx(0.01)
    np.testing.assert_allclose(rewards, -np.square(x[1:]).sum(-1))
    # Of a row, of its components and of its steps, the noises have nothing to do with each other.
    for first, second in (
        (noises[1:], noises[:-1]),
        (noises[:, 1:], noises[:, :-1]),
        (noises[..., 1:], noises[..., :-1]),
    ):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / first.size**0.5


def test_drawn_systems_are_stable_and_rotate_uniformly():
    family = linear_system()
    matrices = np.array([task["A"] for task in family.sample(2000, seed=0)])
    radius = np.abs(np.linalg.eigvals(matrices))
    np.testing.assert_allclose(radius, radius[:, :1] * np.ones(4), rtol=1e-6)  # A Aᵀ = ρ² I
    assert 0.7 <= radius.min() < 0.701
    assert 0.949 < radius.max() <= 0.95
    q = matrices / radius[:, :1, None]
    np.testing.assert_allclose(q @ q.transpose(0, 2, 1), np.broadcast_to(np.eye(4), q.shape), atol=1e-9)
    # Under Haar's measure entries have mean 0 and variance 1/4, and the trace has mean 0 and variance 1.
    np.testing.assert_allclose(q.mean(axis=0), 0, atol=4 * 0.5 / 2000**0.5)
    np.testing.assert_allclose(q.var(axis=0), 0.25, rtol=0.12)
    trace = np.trace(q, axis1=1, axis2=2)
    np.testing.assert_allclose([trace.mean(), trace.var()], [0, 1], atol=0.12)


def test_inputs_have_the_gain_and_states_a_variance_around_one():
    family = linear_system()
    tasks = family.sample(200, seed=0)
    gains = np.array([task["B"] for task in tasks])
    assert gains.std() == pytest.approx(0.75, rel=0.1)
    x, *_ = record(family, tasks, 200)
    assert 0.5 < x[50:].var() < 1.5


def test_a_system_can_switch_in_the_middle_of_an_episode():
    family = changing(linear_system(noise=0.0), [3])
    tasks = family.sample(2, seed=0)
    x, u, *_ = record(family, tasks, 6)
    for t in range(6):
        now = [task if t < 3 else task["changes"][3] for task in tasks]
        a, b = (np.array([task[name] for task in now]) for name in ("A", "B"))
        np.testing.assert_allclose(x[t + 1], best_prediction(a, b, x[t], u[t]), atol=1e-12)


def test_arguments_give_the_shapes():
    family = linear_system(state_dim=3, input_dim=2)
    task = family.sample(1, seed=0)[0]
    assert np.shape(task["A"]) == (3, 3)
    assert np.shape(task["B"]) == (3, 2)
    env = family.make(task)
    assert env.observation_space.shape == (3,)
    assert env.action_space.shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": (0.9, 0.7)}, "`radius` must be two numbers with 0 <= low <= high < 1; got"),
        ({"radius": (0.9, 1.0)}, "`radius` must be two numbers with 0 <= low <= high < 1; got"),
        ({"gain": -1.0}, r"`gain` must be at least 0 and finite; got -1\.0"),
        ({"noise": np.nan}, "`noise` must be at least 0 and finite; got nan"),
        ({"state_dim": 0}, "`state_dim` must be at least 1; got 0"),
        ({"input_dim": 0}, "`input_dim` must be at least 1; got 0"),
        ({"horizon": 0}, "`horizon` must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_system(**arguments)


def test_bad_matrices_are_refused():
    with pytest.raises(ValueError, match=r"`A` must have shape \(4, 4\); got \(2, 2\)"):
        linear_system().make({"A": A})
    with pytest.raises(ValueError, match="`B` must be finite"):
        linear_system(state_dim=1).make({"B": ((np.inf,),)})
