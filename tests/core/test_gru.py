"""GRU against `torch.nn.GRU`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from ssmrl.core import GRU

D, S, O, B, T = 3, 4, 2, 2, 5  # noqa: E741


@pytest.fixture
def pair():
    torch.manual_seed(0)
    theirs: Any = nn.GRU(D, S, batch_first=True).double()
    ours: Any = GRU(S, D, O).double()
    ours.rnn.load_state_dict(theirs.state_dict())
    return ours, theirs


def forward(pair: Any, x: Any, h: Any) -> Any:
    """Outputs and last states of both, theirs with our readout."""
    ours, theirs = pair
    h_all, last = theirs(x, h[None])
    return ours(x, h), (linear(h_all, ours.readout.weight, ours.readout.bias), last[0])


def test_the_published_size_has_57222_parameters():
    assert sum(p.numel() for p in GRU(state_dim=128, input_dim=17, output_dim=6).parameters()) == 57_222


def test_outputs_and_states_equal_those_of_pytorch(pair):
    x, h = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, S, dtype=torch.float64)
    for ours, theirs in zip(*forward(pair, x, h), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_first_and_second_derivatives_equal_those_of_pytorch(pair):
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, S, dtype=torch.float64, requires_grad=True)
    ours, theirs = pair
    found = []
    for (y, last), model in zip(forward(pair, x, h), (ours.rnn, theirs), strict=True):
        inputs = [x, h, *(getattr(model, name) for name, _ in ours.rnn.named_parameters())]
        first = torch.autograd.grad((y**3).sum() + (last**2).sum(), inputs, create_graph=True)
        squares: Any = sum((g**2).sum() for g in first)
        second = torch.autograd.grad(squares, inputs)
        found.append([*first, *second])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_a_step_equals_pytorchs_cell(pair):
    ours, theirs = pair
    cell: Any = nn.GRUCell(D, S).double()
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in theirs.state_dict().items()})
    x, h = torch.randn(B, D, dtype=torch.float64), torch.randn(B, S, dtype=torch.float64)
    torch.testing.assert_close(ours(x, h)[1], cell(x, h), rtol=1e-12, atol=1e-12)


def test_the_initialisation_is_that_of_pytorch():
    torch.manual_seed(0)
    bound = 0.1
    for name, p in GRU(state_dim=100, input_dim=50, output_dim=1).rnn.named_parameters():
        assert p.abs().max() <= bound, name
        assert p.abs().max() > 0.9 * bound, name
        assert abs(p.std().item() - bound / 3**0.5) < 0.01, name


@pytest.mark.parametrize("name", ["state_dim", "input_dim", "output_dim"])
def test_sizes_that_are_not_positive_integers_are_refused(name):
    sizes: dict[str, Any] = {"state_dim": 2, "input_dim": 2, "output_dim": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got 0"):
        GRU(**sizes)
