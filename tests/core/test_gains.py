"""A model with input gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from ssmrl import AdaptationConfig, StreamAdapter
from ssmrl.core import GRU, StateSpaceModel, WithInputGains, functional_forward


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5)])
def test_gains_scale_the_last_inputs_about_the_origin(shape):
    torch.manual_seed(0)
    origin, gain = torch.tensor([0.5, -1.0]), torch.tensor([0.3, -2.0])
    model = WithInputGains(GRU(4, 5, 1), 2, origin)
    x = torch.randn(*shape)
    output, state = functional_forward(model, {"gain": gain}, x)
    scaled = torch.cat([x[..., :3], origin + gain * (x[..., 3:] - origin)], dim=-1)
    inner: Any = model.model
    expected, expected_state = inner(scaled, inner.init_hidden(3))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, expected_state)


def test_a_gain_of_0_is_an_input_at_the_origin():
    model = WithInputGains(nn.Linear(3, 1), 2, torch.tensor([0.5, -1.0]))
    x = torch.randn(4, 3)
    at_rest = torch.cat([x[:, :1], torch.tensor([0.5, -1.0]).expand(4, 2)], dim=-1)
    found, _ = functional_forward(model, {"gain": torch.zeros(2)}, x)
    torch.testing.assert_close(found, model.model(at_rest))


def test_without_a_change_of_gains_the_model_is_as_it_was():
    torch.manual_seed(0)
    inner = StateSpaceModel(4, 5, 2)
    x = torch.randn(3, 7, 5)
    model = WithInputGains(inner, 2, torch.randn(2))
    assert torch.equal(model(x)[0], inner(x)[0])
    always = torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(model(x, inner.init_hidden(3), reset=always)[0][:, 3], inner(x[:, 3])[0])
    assert not hasattr(WithInputGains(nn.Linear(3, 1), 1), "init_hidden")
    assert {"gain", "model.state_input.weight"} <= dict(model.named_parameters()).keys()


def test_derivatives_to_second_order_and_over_stacked_gains():
    torch.manual_seed(0)
    model = WithInputGains(StateSpaceModel(3, 4, 2, hidden_dim=5).double(), 2, torch.randn(2).double()).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)

    def loss(gain):
        return functional_forward(model, {"gain": gain}, x)[0].square().mean()

    gain = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, gain)
    assert torch.autograd.gradgradcheck(loss, gain)
    several = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(loss))(several), torch.stack([grad(loss)(one) for one in several]))


def test_streams_find_the_actuator_that_is_dead():
    """Everything else that was learned stays: one number in each stream moves, and to 0."""
    torch.manual_seed(0)
    model = WithInputGains(nn.Linear(3, 2), 2)
    streams = StreamAdapter(model, AdaptationConfig(adapted="gain", learning_rate=0.5, num_steps=1), num_streams=2)
    inner: Any = model.model
    for _ in range(300):
        x = torch.randn(2, 3)
        works = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])  # of each stream another action has no effect
        with torch.no_grad():
            y = inner(x * works)
        streams.update_step(x, y, None)
    found = streams.in_use()[0]["gain"]
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=0.02, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_gains must be a positive integer; got 0"):
        WithInputGains(nn.Linear(2, 1), 0)
    with pytest.raises(ValueError, match=r"origin must have shape \(2,\); got \(3,\)"):
        WithInputGains(nn.Linear(2, 1), 2, torch.zeros(3))
    with pytest.raises(ValueError, match="at least 3 features, one for every gain; got 2"):
        WithInputGains(nn.Linear(2, 1), 3)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="must have parameters; Tanh has none"):
        WithInputGains(nn.Tanh(), 1)
