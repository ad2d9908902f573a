"""Which parameters adapt."""

from __future__ import annotations

import pytest
from torch import nn

from ssmrl.adaptation.select import trainable_parameters


def test_parameters_that_require_a_gradient_come_by_name_and_are_the_model_s_own():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    params = trainable_parameters(model)
    assert list(params) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert params["0.weight"] is model[0].weight


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert list(trainable_parameters(model)) == ["1.weight", "1.bias"]


def test_a_tied_parameter_comes_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(trainable_parameters(model)) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("model", [nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_model_with_nothing_to_adapt_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no parameter that requires a gradient"):
        trainable_parameters(model)
