"""Normalised residual dynamics as planners use them."""

from __future__ import annotations

import pytest
import torch
import torchopt
from torch import nn

from ssmrl import GRU, MLP, StateSpaceModel, mse_loss
from ssmrl.adaptation import adapt
from ssmrl.meta_rl import (
    dynamics_data,
    dynamics_scales,
    model_step,
    one_step_loss,
    open_loop_loss,
    predict_open_loop,
)

D, A = 2, 1


def transitions(seed=0, shape=(4, 10)):
    g = torch.Generator().manual_seed(seed)
    o, a, n = (3 + 2 * torch.randn(*shape, size, generator=g, dtype=torch.float64) for size in (D, A, D))
    return o, a, n, torch.randn(*shape, generator=g, dtype=torch.float64)


def test_inputs_and_targets_have_mean_0_and_deviation_1():
    o, a, n, r = transitions()
    x, y = dynamics_data(dynamics_scales(o, a, n, r), o, a, n, r)
    assert x.shape == (4, 10, D + A)
    assert y.shape == (4, 10, D + 1)
    for values in (x, y):
        flat = values.flatten(0, 1)
        torch.testing.assert_close(flat.mean(0), torch.zeros_like(flat[0]))
        torch.testing.assert_close(flat.std(0), torch.ones_like(flat[0]))


def test_scales_by_hand():
    o, n = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    scales = dynamics_scales(o, torch.tensor([[5.0], [5.0]]), n)
    assert (scales.observation.mean.item(), scales.change.mean.item()) == (1.0, 0.0)
    assert scales.observation.std.item() == scales.change.std.item() == pytest.approx(2**0.5)
    assert (scales.action.mean.item(), scales.action.std.item()) == (5.0, 1.0)  # it never varies
    assert (scales.reward.mean.item(), scales.reward.std.item()) == (0.0, 1.0)


class Perfect(nn.Module):
    """Knows the answer to the transitions it is asked for."""

    def __init__(self, y):
        super().__init__()
        self.register_buffer("y", y)

    def forward(self, x):
        return self.y


def test_a_perfect_model_steps_to_the_next_observation_at_the_cost_that_is_learned():
    o, a, n, r = transitions(shape=(10,))
    scales = dynamics_scales(o, a, n, r)
    _, y = dynamics_data(scales, o, a, n, r)
    cost, following, state = model_step(Perfect(y), scales)({}, (), o, a)
    torch.testing.assert_close(following, n)
    torch.testing.assert_close(cost, -r)
    assert state == ()


def test_a_known_cost_sees_what_was_projected():
    o, a, n, _ = transitions(shape=(10,))
    scales = dynamics_scales(o, a, n)
    _, y = dynamics_data(scales, o, a, n)
    step = model_step(
        Perfect(y), scales, lambda o, a, n: o[:, 0] + a[:, 0] + n[:, 1], project=lambda n: n.clamp(max=3.0)
    )
    cost, following, _ = step({}, (), o, a)
    torch.testing.assert_close(following, n.clamp(max=3.0))
    torch.testing.assert_close(cost, o[:, 0] + a[:, 0] + n[:, 1].clamp(max=3.0))


def test_a_model_with_other_outputs_is_refused():
    o, a, n, _ = transitions(shape=(10,))
    scales = dynamics_scales(o, a, n)
    model = MLP(D + A, D).double()
    with pytest.raises(ValueError, match="must have 3 outputs, 2 for an observation and one for the reward; got 2"):
        model_step(model, scales)({}, (), o, a)
    with pytest.raises(ValueError, match="must have 2 outputs, 2 for an observation; got 3"):
        model_step(MLP(D + A, 3).double(), scales, lambda o, a, n: o[:, 0])({}, (), o, a)


def test_data_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="at least two transitions; got 1"):
        dynamics_scales(torch.zeros(1, D), torch.zeros(1, A), torch.zeros(1, D))
    with pytest.raises(ValueError, match="action must be finite"):
        dynamics_scales(torch.zeros(3, D), torch.full((3, A), torch.nan), torch.zeros(3, D))


# Losses of sequences


def nothing(observation, action, following):
    return observation[:, 0]


def recurrent(make=GRU, steps=6):
    """A model, its step, what it predicts from its own predictions with these actions, and scales."""
    torch.manual_seed(0)
    model = make(4, D + A, D).double()
    scales = dynamics_scales(*transitions()[:3])
    step = model_step(model, scales, nothing)
    o, a, _, _ = transitions(seed=1, shape=(3, steps))
    return model, scales, step, o[:, 0], a


@pytest.mark.parametrize("make", [GRU, StateSpaceModel])
def test_open_loop_is_the_model_on_its_own_predictions(make):
    _, _, step, first, action = recurrent(make)
    state = torch.randn(3, 4, dtype=torch.float64)
    predicted, after = predict_open_loop(step, {}, state, first, action)
    o, h = first, state
    for t in range(action.shape[1]):
        _, o, h = step({}, h, o, action[:, t])
        torch.testing.assert_close(predicted[:, t], o)
    torch.testing.assert_close(after, h)


def test_a_model_without_a_state_predicts_open_loop():
    model = MLP(D + A, D).double()
    scales = dynamics_scales(*transitions()[:3])
    o, a, _, _ = transitions(shape=(3, 4))
    predicted, after = predict_open_loop(model_step(model, scales, nothing), {}, None, o[:, 0], a)
    assert predicted.shape == (3, 4, D)
    assert after == ()


def test_a_model_makes_no_error_on_what_it_predicted_and_some_on_anything_else():
    model, scales, step, first, action = recurrent()
    predicted, after = predict_open_loop(step, {}, model.init_hidden(3), first, action)
    observation = torch.cat([first[:, None], predicted[:, :-1]], 1)
    loss, state = one_step_loss(model, scales, {}, None, observation, action, predicted)
    assert loss < 1e-25
    torch.testing.assert_close(state, after)
    assert open_loop_loss(step, scales, {}, model.init_hidden(3), observation, action, predicted) < 1e-25

    other = predicted + scales.observation.std * torch.tensor([1.0, 3.0])  # (1 + 9) / 2
    loss = open_loop_loss(step, scales, {}, model.init_hidden(3), observation, action, other)
    assert loss.item() == pytest.approx(5.0)


def test_one_step_errors_of_a_sequence_are_those_of_its_parts_and_what_an_adapter_minimises():
    model, scales, _, _, _ = recurrent()
    o, a, n, _ = transitions()
    whole, after = one_step_loss(model, scales, {}, None, o, a, n)
    first, middle = one_step_loss(model, scales, {}, None, o[:, :4], a[:, :4], n[:, :4])
    second, end = one_step_loss(model, scales, {}, middle, o[:, 4:], a[:, 4:], n[:, 4:])
    torch.testing.assert_close(whole, 0.4 * first + 0.6 * second)
    torch.testing.assert_close(after, end)
    x, y = dynamics_data(scales, o, a, n)
    torch.testing.assert_close(whole, mse_loss(model(x)[0], y))


def test_the_derivative_of_an_open_loop_after_adaptation_is_that_of_finite_differences():
    model, scales, step, _, _ = recurrent(StateSpaceModel)
    o, a, n, _ = transitions(shape=(1, 9))
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(bias):
        params = {**named, "output_input.bias": bias}
        early, late = slice(0, 5), slice(5, 9)

        def inner(params):
            return one_step_loss(model, scales, params, None, o[:, early], a[:, early], n[:, early])[0]

        params = adapt(inner, params, optimizer=torchopt.sgd(0.05), num_steps=2).params
        _, state = one_step_loss(model, scales, params, None, o[:, early], a[:, early], n[:, early])
        return open_loop_loss(step, scales, params, state, o[:, late], a[:, late], n[:, late])

    bias = named["output_input.bias"].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, bias)
