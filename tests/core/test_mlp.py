"""MLP: its equation, its size, its empty state."""

from __future__ import annotations

import pytest
import torch

from ssmrl.core import MLP, MLPState


def test_the_size_for_17_inputs_and_6_outputs_is_19590_parameters():
    assert sum(p.numel() for p in MLP(input_dim=17, output_dim=6, hidden_dim=128).parameters()) == 19_590


def test_the_default_width_is_128():
    assert MLP(1, 1).constructor_arguments["hidden_dim"] == 128


def test_a_step_by_hand():
    model = MLP(input_dim=1, output_dim=1, hidden_dim=1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), (2.0, -1.0, 3.0, 0.5, -4.0, 0.25), strict=True):
            p.fill_(value)
    # -4·relu(3·relu(2·1 - 1) + 0.5) + 0.25 = -13.75;  relu(2·0.25 - 1) = 0, so -4·0.5 + 0.25 = -1.75
    assert model(torch.tensor([[[1.0], [0.25]]]))[0].flatten().tolist() == [-13.75, -1.75]
    assert model(torch.tensor([[1.0]]))[0].item() == -13.75


def test_both_layers_are_rectified():
    model = MLP(input_dim=1, output_dim=1, hidden_dim=1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), (1.0, 0.0, -1.0, 0.0, 1.0, 0.5), strict=True):
            p.fill_(value)
    # the second relu sees -1·relu(±1) = -1 or 0, and gives 0
    assert model(torch.tensor([[1.0], [-1.0]]))[0].flatten().tolist() == [0.5, 0.5]


def test_earlier_inputs_do_not_matter():
    model = MLP(3, 2)
    x = torch.randn(2, 5, 3)
    other = torch.cat([torch.randn(2, 4, 3), x[:, 4:]], 1)
    torch.testing.assert_close(model(x)[0][:, 4], model(other)[0][:, 4])


@pytest.mark.parametrize("batch_size", [0, 1, 4])
def test_the_state_is_empty_for_every_batch_and_stays_so(batch_size):
    model = MLP(3, 2)
    assert model.init_hidden(batch_size) == MLPState() == ()
    y, state = model(torch.randn(batch_size, 3), MLPState())
    assert y.shape == (batch_size, 2)
    assert type(state) is MLPState


@pytest.mark.parametrize("state", [torch.zeros(4, 2), (torch.zeros(4, 2),), {}, 0.0])
def test_a_state_that_is_not_empty_is_refused(state):
    with pytest.raises(TypeError, match=r"hidden_state must be the empty MLPState\(\) or None; got \w+"):
        MLP(3, 2)(torch.zeros(4, 3), state)


@pytest.mark.parametrize("name", ["input_dim", "output_dim", "hidden_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sizes_that_are_not_positive_integers_are_refused(name, value):
    sizes = {"input_dim": 2, "output_dim": 2, "hidden_dim": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {value!r}"):
        MLP(**sizes)


def test_weights_are_made_on_the_device():
    assert all(p.is_meta for p in MLP(2, 1, device="meta").parameters())
