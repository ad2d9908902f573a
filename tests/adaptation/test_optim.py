"""The choice of an optimizer, and the checks of its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchopt

from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    check_optimizer,
    check_rate,
    sgd_unless_given,
)

NAMES = {"name": "inner_optimizer", "rate_name": "inner_lr"}


def test_without_an_optimizer_it_is_sgd_at_the_rate():
    optimizer = sgd_unless_given(None, 0.5, **NAMES)
    gradient = torch.tensor([2.0, -4.0])
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), inplace=False)
    assert updates.tolist() == [-1.0, 2.0]


def test_an_optimizer_that_is_given_is_used_itself():
    adam = torchopt.adam(0.1)
    assert sgd_unless_given(adam, DEFAULT_LEARNING_RATE, **NAMES) is adam


def test_a_rate_beside_an_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"inner_lr = 0\.5 would be ignored: inner_optimizer has a rate of its own"):
        sgd_unless_given(torchopt.adam(0.1), 0.5, **NAMES)


def test_a_bad_rate_is_refused_also_beside_an_optimizer():
    with pytest.raises(ValueError, match=r"inner_lr must be finite and >= 0; got -0\.5"):
        sgd_unless_given(torchopt.adam(0.1), -0.5, **NAMES)


@pytest.mark.parametrize("optimizer", ["adam", 0.1, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_another_kind_of_optimizer_is_refused(optimizer):
    kind = type(optimizer).__name__
    with pytest.raises(TypeError, match=rf"inner_optimizer must be a TorchOpt gradient transformation.*; got {kind}"):
        sgd_unless_given(optimizer, DEFAULT_LEARNING_RATE, **NAMES)


@pytest.mark.parametrize("optimizer", [torchopt.sgd(0.1), torchopt.chain(torchopt.adam(0.1), torchopt.nan_to_num(0.0))])
def test_every_gradient_transformation_passes(optimizer):
    check_optimizer("optimizer", optimizer)


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1e-8, np.float64(0.1)])
def test_finite_rates_from_zero_pass(rate):
    check_rate("rate", rate)


@pytest.mark.parametrize("rate", [-1, -1e-9, float("nan"), float("inf"), -float("inf")])
def test_negative_and_non_finite_rates_are_refused(rate):
    with pytest.raises(ValueError, match=rf"outer_lr must be finite and >= 0; got {rate}"):
        check_rate("outer_lr", rate)


@pytest.mark.parametrize("rate", ["0.1", None, True, torch.tensor(0.1)])
def test_a_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(TypeError, match="outer_lr must be a number >= 0; got "):
        check_rate("outer_lr", rate)


@pytest.mark.parametrize("steps", [0, 7, np.int64(7), torch.tensor(7)])
def test_integers_from_zero_are_numbers_of_steps(steps):
    checked = check_num_steps("num_steps", steps)
    assert type(checked) is int
    assert checked == steps


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="inner_steps must be >= 0; got -3"):
        check_num_steps("inner_steps", -3)


@pytest.mark.parametrize("steps", [1.0, "1", None])
def test_a_number_of_steps_that_is_no_integer_is_refused(steps):
    with pytest.raises(TypeError, match="inner_steps must be an integer >= 0; got "):
        check_num_steps("inner_steps", steps)
