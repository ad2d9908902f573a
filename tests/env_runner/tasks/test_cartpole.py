from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.tasks.array_simulation import ArraySimulation
from ssmrl.env_runner.tasks.cartpole import CARTPOLE_PHYSICS, CartPole

ROWS = 32


@pytest.mark.parametrize("sutton_barto", [False, True])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_it_is_gymnasiums_bit_for_bit(mode, sutton_barto):
    dynamics = CartPole(sutton_barto_reward=sutton_barto)
    native = BatchedEnv(ArraySimulation(dynamics, [{}] * ROWS), max_episode_steps=25, autoreset_mode=mode)
    makers = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=25, sutton_barto_reward=sutton_barto)] * ROWS
    loop = SyncVectorEnv(makers, autoreset_mode=mode)
    np.testing.assert_array_equal(native.reset(seed=3)[0], loop.reset(seed=3)[0])
    native.action_space.seed(0)
    terminations = truncations = 0
    for _ in range(400):
        action = native.action_space.sample()
        got, expected = native.step(action), loop.step(action)
        for a, b in zip(got[:4], expected[:4], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        states = [env.unwrapped.state for env in loop.envs]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(native.save()["simulation"]["state"]["motion"], states)
        terminations += expected[2].sum()
        truncations += expected[3].sum()
    assert terminations > 100
    assert truncations > 20


def test_its_spaces_are_gymnasiums_and_not_shared():
    first, second = CartPole(), CartPole()
    env = gymnasium.make("CartPole-v1")
    assert (first.observation_space, first.action_space) == (env.observation_space, env.action_space)
    assert first.action_space is not second.action_space


@pytest.mark.parametrize("options", [{"low": -0.2, "high": 0.1}, {"low": 0.0}, {}])
def test_options_bound_the_start_as_gymnasiums_do(options):
    native: Any = BatchedEnv(ArraySimulation(CartPole(), [{}] * 2))
    env = gymnasium.make("CartPole-v1")
    np.testing.assert_array_equal(native.reset(seed=0, options=options)[0][0], env.reset(seed=0, options=options)[0])
    with pytest.raises(ValueError, match="Lower bound"):
        native.reset(options={"low": 1.0})


@pytest.mark.parametrize(("sutton_barto", "rewards"), [(False, [1, 1, 0, 0]), (True, [0, -1, -1, -1])])
def test_steps_after_a_fall_are_paid_for_as_gymnasium_pays_them(sutton_barto, rewards):
    simulation = ArraySimulation(CartPole(sutton_barto_reward=sutton_barto), [{}])
    simulation.begin(np.arange(1), [np.random.default_rng(0)], {})
    env: Any = gymnasium.make("CartPole-v1", sutton_barto_reward=sutton_barto).unwrapped
    env.reset(seed=0)
    env.state = np.array([0.0, 0.0, 0.2, 0.3])
    state = simulation.save()
    state["state"]["motion"] = env.state[None]
    simulation.restore(state)
    got = [float(simulation.advance(np.array([0]), None).reward[0]) for _ in rewards]
    with pytest.warns(UserWarning, match="already returned terminated"):
        expected = [env.step(0)[1] for _ in rewards]
    assert got == expected == rewards


def test_the_parameters_are_gymnasiums():
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    assert {name: getattr(env, name) for name in CARTPOLE_PHYSICS} == CARTPOLE_PHYSICS
    assert {name: parameter.default for name, parameter in CartPole.parameters.items()} == CARTPOLE_PHYSICS
