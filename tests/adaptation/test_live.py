"""A live model as the adapters see it: what is read from it, and what is written back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

from ssmrl import AdaptationConfig, StateSpaceModel
from ssmrl.adaptation.live import LiveModel
from ssmrl.adaptation.losses import mse_loss

HEAD = {"output_mlp.out.weight", "output_mlp.out.bias"}


def live(config=None, *, for_one=True, **settings):
    torch.manual_seed(0)
    model = StateSpaceModel(4, 3, 2, hidden_dim=6).double()
    model.register_buffer("unused", torch.ones(2))
    config = AdaptationConfig(**settings) if config is None else config
    return model, LiveModel(model, config, "cpu", mse_loss, for_one=for_one)


@pytest.mark.parametrize("for_one", [True, False])
def test_what_is_read_has_the_names_and_values_of_the_model_and_is_a_copy(for_one):
    model, adapting = live(for_one=for_one)
    params = adapting.read()
    named = adapting.named(params)
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in named.items())
    before = model.output_input.bias.detach().clone()
    with torch.no_grad():
        model.output_input.bias += 1
    assert torch.equal(adapting.named(params)["output_input.bias"], before)
    adapting.load(named)
    assert torch.equal(model.output_input.bias, before)


def test_what_does_not_adapt_is_the_rest_with_the_buffers_as_it_is_now():
    model, adapting = live(adapted="output_mlp.out")
    others = adapting.others()
    assert adapting.params.keys() == HEAD
    assert others.keys() == (dict(model.named_parameters()).keys() - HEAD) | {"unused"}
    with torch.no_grad():
        model.state_input.bias += 1
    assert torch.equal(adapting.others()["state_input.bias"], model.state_input.bias)


@pytest.mark.parametrize("for_one", [True, False])
def test_the_forward_takes_all_that_it_is_given(for_one):
    model, adapting = live(for_one=for_one, adapted="output_mlp.out")
    x, state = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    reset = torch.tensor([True, False])
    shifted = {name: value + 1 for name, value in adapting.others().items()}
    output, after = adapting.forward(shifted, adapting.read(), x, state, reset)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += name not in HEAD
    expected, next_state = model(x, state, reset)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(after, next_state)


def test_an_optimizer_for_many_keeps_a_count_for_each():
    _, adapting = live(for_one=False, optimizer=torchopt.adamax(0.1))
    leaves: list[Any] = torchopt.pytree.tree_leaves(adapting.rules.transformation().init(adapting.rules.anchor))
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    with pytest.raises(ValueError, match=r"optimizer must keep all its state in tensors, .* torchopt\.radam does not"):
        live(for_one=False, optimizer=torchopt.radam(0.1))
