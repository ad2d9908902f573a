"""The linear baseline against numpy.linalg.lstsq, and value functions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.func import vmap

from ssmrl.core import GRU, MLP
from ssmrl.meta_rl import (
    ValueNetwork,
    episode_step,
    fit_linear_baseline,
    linear_baseline,
    linear_features,
    value_loss,
)

f64 = partial(torch.tensor, dtype=torch.float64)


def task(num_tasks=1, episodes=6, num_steps=30, size=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    observation = torch.randn(num_tasks, episodes, num_steps, size, dtype=torch.float64, generator=g)
    returns = torch.randn(num_tasks, episodes, num_steps, dtype=torch.float64, generator=g)
    return observation, torch.arange(num_steps).expand(num_tasks, episodes, num_steps), returns


def ridge_by_lstsq(observation, returns, ridge):
    """Ridge regression on rllab's features as least squares with √λ I below them: no normal equations."""
    rows = []
    for episode in observation:
        o = np.clip(episode, -10, 10)
        s = np.arange(len(o))[:, None] / 100.0
        rows.append(np.hstack([o, o**2, s, s**2, s**3, np.ones_like(s)]))
    phi = np.vstack(rows)
    stacked = np.vstack([phi, np.sqrt(ridge) * np.eye(phi.shape[1])])
    target = np.concatenate([returns.ravel(), np.zeros(phi.shape[1])])
    return np.linalg.lstsq(stacked, target, rcond=None)[0]


def test_features_by_hand():
    features = linear_features(f64([[2.0, -30.0], [0.5, 1.0]]), torch.tensor([0, 200]))
    assert features.tolist() == [[2, -10, 4, 100, 0, 0, 0, 1], [0.5, 1, 0.25, 1, 2, 4, 8, 1]]


def test_a_fit_by_hand():
    # One feature differs from 0 beside the constant: with o = ±1, o² and 1 share the mean.
    observation, step, returns = f64([[1.0], [-1.0]]), torch.tensor([0, 0]), f64([5.0, 1.0])
    w = fit_linear_baseline(observation, step, returns, ridge=2.0)
    # o: 4 / (2 + 2); o² and 1: 6 / (2 + 2 + 2) each
    torch.testing.assert_close(w, f64([1.0, 1.0, 0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(linear_baseline(w, observation, step), f64([3.0, 1.0]))


@pytest.mark.parametrize("ridge", [1e-5, 1.0])
def test_a_fit_is_least_squares_of_numpy(ridge):
    observation, step, returns = (x[0] for x in task())
    w = fit_linear_baseline(observation, step, returns, ridge=ridge)
    expected = ridge_by_lstsq(observation.numpy(), returns.numpy(), ridge)
    torch.testing.assert_close(w, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_what_is_linear_in_the_features_is_found():
    observation, step, _ = (x[0] for x in task(seed=1))
    returns = 2 * observation[..., 0] - observation[..., 2].square() + (step / 100.0) ** 2 + 3
    w = fit_linear_baseline(observation, step, returns)
    torch.testing.assert_close(linear_baseline(w, observation, step), returns, atol=1e-3, rtol=0)
    # and at the observations after the steps, one later
    after, expected = observation.flip(0), 2 * observation[..., 0] - observation[..., 2].square()
    expected = expected.flip(0) + ((step + 1) / 100.0) ** 2 + 3
    torch.testing.assert_close(linear_baseline(w, after, step + 1), expected, atol=1e-3, rtol=0)


def test_vmap_over_tasks_is_a_loop():
    data = task(num_tasks=4)
    weights = vmap(fit_linear_baseline)(*data)
    for i in range(4):
        torch.testing.assert_close(weights[i], fit_linear_baseline(*(x[i] for x in data)))
    values = vmap(linear_baseline)(weights, *data[:2])
    torch.testing.assert_close(values[2], linear_baseline(weights[2], data[0][2], data[1][2]))


def test_invalid_steps_have_no_part_in_a_fit():
    observation, step, returns = (x[0] for x in task())
    valid = torch.ones_like(returns, dtype=torch.bool)
    valid[:, 20:] = False
    junk = torch.where(valid[..., None], observation, torch.nan), torch.where(valid, returns, torch.nan)
    w = fit_linear_baseline(junk[0], step, junk[1], valid=valid)
    torch.testing.assert_close(w, fit_linear_baseline(observation[:, :20], step[:, :20], returns[:, :20]))


def test_a_fit_to_nothing_predicts_0():
    observation, step, returns = (x[0] for x in task())
    w = fit_linear_baseline(observation, step, returns, valid=torch.zeros_like(returns, dtype=torch.bool))
    assert w.tolist() == [0.0] * 10


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_features_that_depend_on_each_other_have_a_finite_fit(scale):
    """Constant observations, copies of each other, a single step of time: the Gram matrix has rank 2 or so."""
    observation = scale * torch.ones(20, 100, 40, dtype=torch.float64)
    observation[:, 50:] *= -1
    step = torch.arange(100).expand(20, 100)
    w = fit_linear_baseline(observation, step, torch.randn(20, 100).double() + 5, ridge=1e-12)
    assert w.isfinite().all()
    assert float(linear_baseline(w, observation, step).mean()) == pytest.approx(5, abs=0.1)


def test_float32_data_are_fitted_in_float64():
    observation, step, returns = (x[0] for x in task())
    w = fit_linear_baseline(observation.float(), step, returns.float())
    assert w.dtype is torch.float64
    exact = linear_features(observation.float().double(), step)
    assert torch.equal(linear_features(observation.float(), step), exact)
    torch.testing.assert_close(w, fit_linear_baseline(observation, step, returns), rtol=1e-4, atol=1e-5)
    assert linear_baseline(w, observation.float(), step).dtype is torch.float32


def test_observations_may_be_integers():
    observation, step = torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.arange(3)
    w = fit_linear_baseline(observation, step, torch.tensor([0.5, 1.5, -0.7]))
    value = linear_baseline(w, observation, step)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, torch.tensor([0.5, 1.5, -0.7]), atol=1e-3, rtol=0)


def test_predictions_are_features_times_weights():
    observation, step, returns = (x[0] for x in task())
    w = fit_linear_baseline(observation, step, returns)
    torch.testing.assert_close(linear_baseline(w, observation, step), linear_features(observation, step) @ w)


def test_a_fit_is_differentiable():
    observation, step, returns = (x[0, :2, :5] for x in task())
    inputs = observation.clone().requires_grad_(), returns.clone().requires_grad_()
    run = lambda o, g: linear_baseline(fit_linear_baseline(o, step, g, ridge=0.1), o, step)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


def test_the_steps_of_an_episode_are_those_of_the_masks():
    ends = torch.zeros(1, 10, dtype=torch.bool)
    ends[0, 4] = True
    step = episode_step(ends, torch.zeros_like(ends))
    assert linear_features(torch.zeros(1, 10, 1), step)[0, :, 2].tolist() == [t % 5 / 100 for t in range(10)]


def test_a_value_network_is_its_model_without_the_last_axis():
    torch.manual_seed(0)
    model = MLP(3, 1)
    network, x = ValueNetwork(model), torch.randn(4, 7, 3)
    value, _ = network(x)
    torch.testing.assert_close(value, model(x)[0][..., 0])
    assert network(x[:, 0])[0].shape == (4,)


def test_a_value_network_remembers_as_its_model_does():
    torch.manual_seed(0)
    network = ValueNetwork(GRU(5, 3, 1))
    x, reset = torch.randn(4, 7, 3), torch.zeros(4, 7, dtype=torch.bool)
    reset[1, 3] = True
    whole, _ = network(x, network.init_hidden(4), reset)
    state, steps = network.init_hidden(4), []
    for t in range(7):
        value, state = network(x[:, t], state, reset[:, t])
        steps.append(value)
    torch.testing.assert_close(whole, torch.stack(steps, 1))


def test_the_value_loss_by_hand():
    value, target = f64([1.0, 2.0, float("nan")]).requires_grad_(), f64([3.0, 1.0, 0.0])
    loss = value_loss(value, target, torch.tensor([True, True, False]))
    assert float(loss.detach()) == 0.25 * (4 + 1)
    assert torch.autograd.grad(loss, value)[0].tolist() == [-1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_features(torch.zeros(5, 3), torch.zeros(4)), r"`step` must have the leading axes .* \(5, 3\)"),
        (lambda: linear_features(torch.zeros(5), torch.zeros(5)), r"`step` must have the leading axes .* \(5,\)"),
        (
            lambda: fit_linear_baseline(torch.zeros(5, 3), torch.zeros(5), torch.zeros(5, 1)),
            r"`step` must have the shape .* \(5, 1\) of `returns`",
        ),
        (
            lambda: fit_linear_baseline(torch.zeros(5, 3), torch.zeros(5), torch.zeros(5), ridge=0),
            "ridge must be > 0; got 0",
        ),
        (
            lambda: linear_baseline(torch.zeros(9), torch.zeros(5, 3), torch.zeros(5)),
            r"`weights` must have shape \(2 D \+ 4,\) = \(10,\); got \(9,\)",
        ),
        (lambda: ValueNetwork(MLP(3, 2))(torch.zeros(1, 3)), "`model` must have one output, the value; got 2"),
        (lambda: value_loss(torch.zeros(4, 5, 1), torch.zeros(4, 5)), "`target` must have the shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
