"""Which parameters adapt."""

from __future__ import annotations

import pytest
from torch import nn

from ssmrl.adaptation.select import select, split, trainable_parameters


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


def network():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        ("4", ["4.weight", "4.bias"]),
        ("4.weight", ["4.weight"]),
        ("*.bias", ["0.bias", "4.bias"]),
        ("?.weight", ["0.weight", "4.weight"]),
        (["4.bias", "0"], ["0.weight", "0.bias", "4.bias"]),
        (lambda name, p: p.dim() == 2, ["0.weight", "4.weight"]),
        ((lambda name, p: name.startswith("0"), "4.bias"), ["0.weight", "0.bias", "4.bias"]),
    ],
)
def test_names_patterns_and_predicates_choose_trainable_parameters_in_order(selectors, names):
    assert select(network(), selectors) == names


def test_a_module_chooses_its_parameters():
    model = network()
    assert select(model, model[4]) == ["4.weight", "4.bias"]
    assert select(model, [model[0], "4.bias"]) == ["0.weight", "0.bias", "4.bias"]


@pytest.mark.parametrize("selectors", ["head", "2", ["0", "head"], lambda name, p: False, []])
def test_a_selector_that_chooses_nothing_is_refused(selectors):
    with pytest.raises(
        ValueError, match=r"chooses none of the trainable parameters of Sequential: 0\.weight|at least one"
    ):
        select(network(), selectors)


def test_a_selector_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"A selector must be a name or pattern, a module, or a predicate .* got int"):
        select(network(), [3])  # type: ignore[list-item]


def test_a_split_keeps_every_parameter_once():
    params = trainable_parameters(network())
    chosen, others = split(params, ["4.bias", "0.bias"])
    assert (list(chosen), list(others)) == (["0.bias", "4.bias"], ["0.weight", "4.weight"])
    assert chosen["4.bias"] is params["4.bias"]
