"""Normalised residual dynamics as planners use them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmrl import MLP
from ssmrl.meta_rl import dynamics_data, dynamics_scales, model_step

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
