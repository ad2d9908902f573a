"""StateSpaceModel: its equation, its size, its constructor."""

from __future__ import annotations

import pytest
import torch

from ssmrl.core import StateSpaceModel


def test_the_published_size_has_52722_parameters():
    model = StateSpaceModel(state_dim=128, input_dim=17, output_dim=6, hidden_dim=128)
    assert sum(p.numel() for p in model.parameters()) == 52_722


def test_the_default_width_is_128():
    assert StateSpaceModel(2, 1, 1).constructor_arguments["hidden_dim"] == 128


def test_a_step_by_hand():
    model = StateSpaceModel(state_dim=1, input_dim=1, output_dim=1, hidden_dim=1)
    values = {
        "state_mlp.hidden.weight": 2.0,
        "state_mlp.hidden.bias": -1.0,
        "state_mlp.out.weight": 3.0,
        "state_mlp.out.bias": 0.5,
        "state_input.weight": 4.0,
        "state_input.bias": 0.25,
        "output_mlp.hidden.weight": 1.0,
        "output_mlp.hidden.bias": 1.0,
        "output_mlp.out.weight": -1.0,
        "output_mlp.out.bias": 2.0,
        "output_input.weight": 10.0,
        "output_input.bias": 0.125,
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(values[name])
    y, h = model(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    # h = 3·relu(2·1 - 1) + 0.5 + 4·0.5 + 0.25 = 5.75;  y = -relu(5.75 + 1) + 2 + 10·0.5 + 0.125 = 0.375
    assert h.item() == 5.75
    assert y.item() == 0.375
    y, h = model(torch.tensor([[[0.5]]]), torch.tensor([[1.0]]))
    assert (y.item(), h.item()) == (0.375, 5.75)


def test_the_initial_state_is_zero():
    assert torch.equal(StateSpaceModel(3, 1, 1).init_hidden(2), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["state_dim", "input_dim", "output_dim", "hidden_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sizes_that_are_not_positive_integers_are_refused(name, value):
    sizes = {"state_dim": 2, "input_dim": 2, "output_dim": 2, "hidden_dim": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {value!r}"):
        StateSpaceModel(**sizes)


def test_weights_are_made_on_the_device():
    assert StateSpaceModel(2, 1, 1, device="meta").state_input.weight.is_meta
