from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.tasks.array_simulation import ArraySimulation
from ssmrl.env_runner.tasks.pendulum import PENDULUM_PHYSICS, Pendulum, squares

ROWS = 32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_it_is_gymnasiums_bit_for_bit(mode, dtype):
    native = BatchedEnv(ArraySimulation(Pendulum(), [{}] * ROWS), max_episode_steps=90, autoreset_mode=mode)
    makers = [lambda: gymnasium.make("Pendulum-v1", max_episode_steps=90)] * ROWS
    loop = SyncVectorEnv(makers, autoreset_mode=mode)
    np.testing.assert_array_equal(native.reset(seed=3)[0], loop.reset(seed=3)[0])
    generator = np.random.default_rng(0)
    for _ in range(400):
        action = generator.uniform(-3, 3, (ROWS, 1)).astype(dtype)  # out of bounds, too: both clip
        got, expected = native.step(action), loop.step(action)
        for a, b in zip(got[:4], expected[:4], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        states = [env.unwrapped.state for env in loop.envs]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(native.save()["simulation"]["state"]["motion"], states)


@pytest.mark.parametrize("options", [{"x_init": 0.3, "y_init": 2.0}, {"y_init": 0.1}, {}])
def test_options_bound_the_start_as_gymnasiums_do(options):
    native: Any = BatchedEnv(ArraySimulation(Pendulum(), [{}] * 2))
    env = gymnasium.make("Pendulum-v1")
    np.testing.assert_array_equal(native.reset(seed=0, options=options)[0][0], env.reset(seed=0, options=options)[0])
    with pytest.raises(ValueError, match="could not be converted"):
        native.reset(options={"x_init": "far"})


def test_squares_are_those_of_scalars_which_those_of_arrays_are_not():
    generator = np.random.default_rng(0)
    for dtype in (np.float64, np.float32):
        x: Any = generator.uniform(-8, 8, 50_000).astype(dtype)
        scalars = np.array([value**2 for value in x])
        np.testing.assert_array_equal(squares(x), scalars)
        assert squares(x).dtype == dtype
        np.testing.assert_allclose(squares(x), x * x, rtol=4 * float(np.finfo(dtype).eps))


@given(st.lists(st.floats(-1e3, 1e3), max_size=5), st.sampled_from([np.float32, np.float64]))
def test_a_square_is_that_of_a_scalar(values, dtype):
    x = np.array(values, dtype)
    assert squares(x).tolist() == [float(value**2) for value in x]


def test_the_parameters_are_gymnasiums():
    env: Any = gymnasium.make("Pendulum-v1").unwrapped
    assert {name: getattr(env, name) for name in PENDULUM_PHYSICS} == PENDULUM_PHYSICS
    assert {name: parameter.default for name, parameter in Pendulum.parameters.items()} == PENDULUM_PHYSICS
    assert (Pendulum().observation_space, Pendulum().action_space) == (env.observation_space, env.action_space)
    assert Pendulum().action_space is not Pendulum().action_space
