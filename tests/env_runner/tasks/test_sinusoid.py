from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import sinusoid


def mean_return(family: Any, tasks: Any, predict: Any) -> Any:
    """The mean return and its standard error; `predict(x, amplitude, phase)` is (N,)."""
    environment = Environment(family, tasks=tasks, seed=0, out_of_bounds="clip")
    amplitude, phase = (np.array([task[name] for task in tasks]) for name in ("amplitude", "phase"))
    observation, _ = environment.reset()
    total = np.zeros(len(tasks))
    for _ in range(family.horizon):
        prediction = predict(observation[:, 0].astype(np.float64), amplitude, phase)
        observation, reward, *_ = environment.step(prediction[:, None].astype(np.float32))
        total += reward
    return total.mean(), total.std() / len(tasks) ** 0.5


def test_the_reward_is_the_squared_error_and_the_target_is_seen_a_step_later():
    env = sinusoid().make({"amplitude": 2.0, "phase": 0.5})
    (x, previous), _ = env.reset(seed=0)
    assert previous == 0
    for prediction in (0.0, 1.5, 7.0):
        (x_next, y), reward, terminated, *_ = env.step(np.array([prediction], np.float32))
        assert y == pytest.approx(2 * np.sin(float(x) - 0.5), rel=1e-5)
        assert reward == pytest.approx(-((prediction - y) ** 2), rel=1e-5)
        assert not terminated
        assert x_next != x
        x = x_next


def test_inputs_are_uniform_and_independent():
    family = sinusoid(horizon=200)
    environment = Environment(family, tasks=family.sample(50, seed=0), seed=0)
    seen = [environment.reset()[0]]
    seen += [environment.step(np.zeros((50, 1), np.float32))[0] for _ in range(199)]
    x = np.array(seen)[..., 0]
    assert np.abs(x).max() <= 5
    counts, _ = np.histogram(x, 10, (-5, 5))
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # the 0.999 quantile of χ² with 9 degrees of freedom
    for first, second in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / first.size**0.5


def test_tasks_have_mamls_ranges():
    tasks = sinusoid().sample(3000, seed=0)
    amplitude, phase = (np.array([task[name] for task in tasks]) for name in ("amplitude", "phase"))
    assert 0.1 <= amplitude.min() < 0.11
    assert 4.99 < amplitude.max() <= 5.0
    assert 0 <= phase.min() < 0.005
    assert np.pi - 0.005 < phase.max() <= np.pi
    np.testing.assert_allclose([amplitude.mean(), phase.mean()], [2.55, np.pi / 2], rtol=0.05)


def test_the_task_blind_return_is_the_best_function_of_the_input_alone():
    family = sinusoid()
    tasks = family.sample(4000, seed=0)
    mean, error = mean_return(family, tasks, lambda x, a, p: -2 * 2.55 * np.cos(x) / np.pi)
    assert family.task_blind_return == pytest.approx(mean, abs=4 * error)
    assert family.task_blind_return == pytest.approx(-20 * 3.006, abs=0.02)  # 3.006: measured for docs of the sinusoid
    assert mean_return(family, tasks, lambda x, a, p: 0 * x)[0] < mean
    small = sinusoid(amplitude=(1.0, 2.0), horizon=5)
    mean, error = mean_return(small, small.sample(4000, seed=0), lambda x, a, p: -2 * 1.5 * np.cos(x) / np.pi)
    assert small.task_blind_return == pytest.approx(mean, abs=4 * error)


def test_the_oracle_makes_no_error():
    family = sinusoid()
    mean, _ = mean_return(family, family.sample(50, seed=0), lambda x, a, p: a * np.sin(x - p))
    assert mean == pytest.approx(family.oracle_return, abs=1e-9)


@pytest.mark.parametrize("amplitude", [(2.0, 1.0), (-1.0, 1.0), (0.1, 6.0)])
def test_bad_ranges_are_refused(amplitude):
    with pytest.raises(ValueError, match=r"`amplitude` must be two numbers with 0 <= low <= high <= 5\.0; got"):
        sinusoid(amplitude=amplitude)


@pytest.mark.parametrize(
    ("task", "message"),
    [({"amplitude": 5.1}, r"`amplitude` must be in \[0, 5\]; got 5\.1"), ({"phase": np.inf}, "`phase` must be finite")],
)
def test_bad_tasks_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        sinusoid().make(task)
