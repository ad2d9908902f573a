"""Losses against hand-computed values, PyTorch's own, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical
from torch.func import grad, vmap
from torch.nn import functional

from ssmrl.adaptation import (
    entropy_loss,
    mask_input,
    masked_reconstruction_loss,
    mse_loss,
    next_observation_and_reward_loss,
    next_observation_loss,
)


def test_mse_by_hand():
    loss = mse_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    assert loss.shape == ()
    assert loss == (4 + 9) / 4


def test_the_gradient_of_mse_by_hand():
    # d/dy mean (y - t)² = 2(y - t)/n
    gradient = grad(mse_loss)(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0]))
    assert gradient.tolist() == [-2.0, 3.0]


shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@given(output=shapes, target=shapes)
def test_shapes_that_differ_are_refused_and_never_broadcast(output, target):
    if output == target:
        assert mse_loss(torch.zeros(output), torch.ones(target)) == 1
    else:
        with pytest.raises(ValueError, match="The target must have the shape of the model's output"):
            mse_loss(torch.zeros(output), torch.ones(target))


def test_the_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"model's output, \(4, 1\); got \(4,\)"):
        mse_loss(torch.zeros(4, 1), torch.zeros(4))


def test_vmap_over_tasks_equals_a_loop():
    output, target = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    each = torch.stack([mse_loss(output[i], target[i]) for i in range(3)])
    torch.testing.assert_close(vmap(mse_loss)(output, target), each)


# What a stream provides by itself.


def random64(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_next_observation_by_hand():
    # Errors 2 and 3 in units of 1 and 2: (4 + 9/4) / 2
    output, came, scale = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([1.0, 2.0])
    assert next_observation_loss(output, came) == (4 + 9) / 2
    assert next_observation_loss(output, came, scale=scale) == (4 + 9 / 4) / 2


def test_the_scale_makes_the_loss_blind_to_units():
    output, came, scale = random64(4, 5, 3), random64(4, 5, 3, seed=1), random64(3, seed=2).exp()
    units = torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(
        next_observation_loss(units * output, units * came, scale=units * scale),
        next_observation_loss(output, came, scale=scale),
    )


def test_next_observation_and_reward_by_hand():
    # Observation errors 2 and 3, reward error 4: 13/2 + w · 16
    output, target = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 5.0, 4.0]])
    assert next_observation_and_reward_loss(output, target) == 6.5 + 16
    assert next_observation_and_reward_loss(output, target, reward_weight=0.25) == 6.5 + 4
    assert next_observation_and_reward_loss(output, target, reward_weight=0) == 6.5
    scale = torch.tensor([1.0, 2.0])
    assert next_observation_and_reward_loss(output, target, scale=scale) == (4 + 9 / 4) / 2 + 16


def test_the_reward_weighs_the_same_however_many_components_an_observation_has():
    output = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], requires_grad=True)
    next_observation_and_reward_loss(output, torch.zeros(1, 5), reward_weight=3.0).backward()
    assert output.grad is not None
    assert output.grad.tolist() == [[0.0, 0.0, 0.0, 0.0, 6.0]]


# Masked reconstruction.


def test_masking_by_hand():
    x, hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [False, False]])
    masked, target = mask_input(x, hidden)
    assert masked.tolist() == [[0.0, 2.0], [3.0, 4.0]]
    assert target.tolist() == [[1.0, 2.0, 1.0, 0.0], [3.0, 4.0, 0.0, 0.0]]


def test_what_is_hidden_does_not_reach_the_model_even_if_it_is_not_finite():
    masked, _ = mask_input(torch.tensor([float("nan"), 1.0]), torch.tensor([True, False]))
    assert masked.tolist() == [0.0, 1.0]


def test_reconstruction_by_hand():
    _, target = mask_input(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]]))
    assert masked_reconstruction_loss(torch.tensor([[0.0, 9.0], [1.0, 1.0]]), target) == (1 + 4 + 9) / 3


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_reconstruction_is_the_mse_of_what_is_hidden_and_blind_to_the_rest(seed, share):
    x, output = random64(3, 2, 4, seed=seed), random64(3, 2, 4, seed=seed + 100).requires_grad_()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    loss = masked_reconstruction_loss(output, mask_input(x, hidden)[1])
    if hidden.any():
        torch.testing.assert_close(loss, functional.mse_loss(output[hidden], x[hidden]))
    else:
        assert loss == 0
    loss.backward()
    assert output.grad is not None
    assert (output.grad[~hidden] == 0).all()


# Entropy.


def test_the_entropy_of_a_fair_coin_and_of_certainty():
    assert float(entropy_loss(torch.zeros(3, 2))) == pytest.approx(math.log(2))
    assert float(entropy_loss(torch.tensor([[200.0, 0.0]]))) == pytest.approx(0.0, abs=1e-30)


@given(seed=st.integers(0, 99), classes=st.integers(1, 5))
def test_the_entropy_equals_torch_distributions(seed, classes):
    logits = 5 * random64(2, 3, classes, seed=seed)
    torch.testing.assert_close(entropy_loss(logits), Categorical(logits=logits).entropy().mean())


def test_the_entropy_takes_no_notice_of_a_shift_of_logits():
    logits = random64(4, 3)
    torch.testing.assert_close(entropy_loss(logits + 1e4), entropy_loss(logits), rtol=1e-9, atol=0)


def test_a_class_that_is_masked_out_has_no_entropy():
    masked = torch.tensor([0.0, 1.0, -torch.inf])
    torch.testing.assert_close(entropy_loss(masked), entropy_loss(masked[:2]))
    torch.testing.assert_close(grad(entropy_loss)(masked)[:2], grad(entropy_loss)(masked[:2]))
    assert grad(entropy_loss)(masked)[2] == 0


# All of them.

SCALE, TARGET = random64(3, seed=9).exp(), random64(2, 3, seed=1)
HIDDEN = torch.tensor([[True, False, True], [False, False, True]])
LOSSES = {
    "mse": lambda output: mse_loss(output, TARGET),
    "next observation": lambda output: next_observation_loss(output, TARGET, scale=SCALE),
    "and reward": lambda output: next_observation_and_reward_loss(output, TARGET, reward_weight=0.3, scale=SCALE[:2]),
    "reconstruction": lambda output: masked_reconstruction_loss(output, mask_input(TARGET, HIDDEN)[1]),
    "entropy": entropy_loss,
}
over_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@over_losses
def test_two_derivatives_equal_finite_differences(loss):
    output = random64(2, 3, seed=3).requires_grad_()
    assert gradcheck(loss, output, check_forward_ad=True)
    assert gradgradcheck(loss, output, check_fwd_over_rev=True)


@over_losses
def test_vmap_over_streams_and_its_gradient_equal_a_loop(loss):
    outputs = random64(4, 2, 3, seed=4)
    for function in (loss, grad(loss)):
        torch.testing.assert_close(vmap(function)(outputs), torch.stack([function(output) for output in outputs]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: next_observation_loss(torch.zeros(4, 3), torch.zeros(4, 1)),
            r"model's output, \(4, 3\); got \(4, 1\)",
        ),
        (
            lambda: next_observation_loss(torch.zeros(4, 3), torch.zeros(4, 3), scale=torch.ones(2)),
            r"scale must have shape \(O,\) = \(3,\); got \(2,\)",
        ),
        (
            lambda: next_observation_loss(torch.zeros(4, 3), torch.zeros(4, 3), scale=torch.ones(())),
            r"scale must have shape \(O,\) = \(3,\); got \(\)",
        ),
        (
            lambda: next_observation_and_reward_loss(torch.zeros(4, 1), torch.zeros(4, 1)),
            r"must hold an observation and a reward, \(..., O \+ 1\); got \(4, 1\)",
        ),
        (
            lambda: next_observation_and_reward_loss(torch.zeros(4, 3), torch.zeros(4, 2)),
            r"model's output, \(4, 2\); got \(4, 1\)",
        ),
        (
            lambda: next_observation_and_reward_loss(torch.zeros(4, 3), torch.zeros(4, 3), reward_weight=-1.0),
            r"reward_weight must be finite and >= 0; got -1\.0",
        ),
        (
            lambda: next_observation_and_reward_loss(torch.zeros(4, 3), torch.zeros(4, 3), scale=torch.ones(3)),
            r"scale must have shape \(O,\) = \(2,\); got \(3,\)",
        ),
        (
            lambda: mask_input(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"hidden must be Bool of the shape of x, \(2, 3\); got torch.float32, \(2, 3\)",
        ),
        (
            lambda: mask_input(torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)),
            r"hidden must be Bool of the shape of x, \(2, 3\); got torch.bool, \(3,\)",
        ),
        (
            lambda: masked_reconstruction_loss(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"The target must be of mask_input, of shape \(2, 6\); got \(2, 3\)",
        ),
        (
            lambda: masked_reconstruction_loss(torch.zeros(2, 3), torch.zeros(6)),
            r"The target must be of mask_input, of shape \(2, 6\); got \(6,\)",
        ),
        (lambda: entropy_loss(torch.zeros(2, 3), torch.zeros(2)), "entropy_loss takes no target: give y = None"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_a_loss_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="reward_weight must be a number >= 0; got '1'"):
        next_observation_and_reward_loss(torch.zeros(4, 3), torch.zeros(4, 3), reward_weight="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: next_observation_loss(torch.zeros(4, 3), torch.zeros(4, 1), scale=torch.ones(3)),
        lambda: next_observation_and_reward_loss(torch.zeros(4, 4), torch.zeros(4, 2), scale=torch.ones(3)),
    ],
)
def test_with_a_scale_too_a_target_is_never_broadcast(make):
    with pytest.raises(ValueError, match="The target must have the shape of the model's output"):
        make()
