"""The choice of an optimizer, and the checks of its settings."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torchopt
from torch.func import grad, vmap

from ssmrl.adaptation import adapt, clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    check_optimizer,
    check_rate,
    sgd_unless_given,
)

f64 = partial(torch.tensor, dtype=torch.float64)
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


# What TorchOpt lacks


def step(optimizer, gradient, count=1):
    state = optimizer.init(gradient)
    for _ in range(count):
        updates, state = optimizer.update(gradient, state, params=gradient, inplace=False)
    return updates


def test_a_gradient_above_the_norm_is_scaled_to_it_and_one_below_is_left():
    gradient = {"a": f64([3.0, 0.0]), "b": f64([[4.0]])}
    scaled = step(clip_by_global_norm(1.0), gradient)
    torch.testing.assert_close(scaled, {"a": f64([0.6, 0.0]), "b": f64([[0.8]])})
    assert torch.equal(step(clip_by_global_norm(5.1), gradient)["a"], gradient["a"])
    assert torch.equal(step(clip_by_global_norm(1.0), f64([0.0])), f64([0.0]))


def test_a_clipped_nan_stays_nan():
    assert torch.isnan(step(clip_by_global_norm(1.0), f64([float("nan"), 1.0]))).any()


def half(x, theta):
    """θ'x²/2 per element, whose gradient is θx."""
    return 0.5 * (theta * x.square()).sum()


def after_one_step(clip, theta, start):
    optimizer = torchopt.chain(clip, torchopt.sgd(0.1))
    return adapt(half, start, theta, optimizer=optimizer, num_steps=1).params.sum()


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_the_derivative_through_a_clipped_step_equals_finite_differences(limit):
    theta, start = f64([1.0, 2.0]), f64([3.0, -1.0])
    derivative = grad(partial(after_one_step, clip_by_global_norm(limit)), argnums=(0, 1))(theta, start)
    for i, at in enumerate((theta, start)):
        for j in range(2):
            e = torch.zeros(2, dtype=torch.float64)
            e[j] = 1e-6
            moved = [(theta + s * e, start) if at is theta else (theta, start + s * e) for s in (1, -1)]
            high, low = (after_one_step(clip_by_global_norm(limit), *m) for m in moved)
            assert derivative[i][j] == pytest.approx(float(high - low) / 2e-6, abs=1e-8)


def test_torchopt_s_own_clip_has_a_wrong_derivative_which_ours_has_not():
    # One parameter: a clipped step has the same length whatever the size of the gradient, so its derivative is 0.
    def slope(clip):
        theta = f64([2.0]).requires_grad_()
        gradient = theta * 3.0
        state = clip.init(gradient)
        clipped, _ = clip.update(gradient, state, params=gradient, inplace=False)
        return float(torch.autograd.grad(clipped.sum(), theta)[0])

    assert slope(clip_by_global_norm(1.0)) == pytest.approx(0.0, abs=1e-12)
    assert slope(torchopt.clip.clip_grad_norm(1.0)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm must be"):
        clip_by_global_norm(max_norm)


def test_rates_scale_their_parameters_and_their_steps_in_turn():
    gradient = {"a": f64([1.0, 2.0]), "b": f64([4.0])}
    one = step(scale_by_learning_rates({"a": f64([0.1, 0.2]), "b": f64(0.5)}), gradient)
    torch.testing.assert_close(one, {"a": f64([-0.1, -0.4]), "b": f64([-2.0])})
    per_step = scale_by_learning_rates(f64([1.0, 10.0]), per_step=True)
    assert [step(per_step, f64(1.0), count=n).item() for n in (1, 2, 3)] == [-1.0, -10.0, -10.0]


def test_rates_begin_where_they_are_told():
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float64)}
    rates = learning_rates(params, 0.1, num_steps=5, per_element=True)
    assert {name: (tuple(r.shape), r.dtype) for name, r in rates.items()} == {
        "a": ((5, 2, 3), torch.float32),
        "b": ((5, 4), torch.float64),
    }
    assert all(r.requires_grad and (r == torch.tensor(0.1, dtype=r.dtype)).all() for r in rates.values())
    assert learning_rates(params, 0.1)["a"].shape == ()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: scale_by_learning_rates(0.1), TypeError, "rates must be a tensor or a pytree of tensors; got float"),
        (lambda: scale_by_learning_rates({}), TypeError, "rates must be a tensor or a pytree of tensors; got dict"),
        (
            lambda: scale_by_learning_rates(f64(1.0), per_step=True),
            ValueError,
            "rates must have an axis of at least one",
        ),
        (lambda: learning_rates({}, -0.1), ValueError, "rate must be finite and >= 0"),
        (lambda: learning_rates({}, 0.1, num_steps=0), ValueError, "num_steps must be None or at least 1"),
        (
            lambda: step(scale_by_learning_rates([f64(1.0), f64(1.0)]), [f64(1.0)] * 3),
            ValueError,
            "one for each of the 3 parameters; got 2",
        ),
        (
            lambda: step(scale_by_learning_rates(f64([1.0, 2.0])), f64([[1.0], [2.0]])),
            ValueError,
            r"rates must broadcast .* shape \(2,\) for a parameter of shape \(2, 1\)",
        ),
    ],
)
def test_bad_rates_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_momentum_in_a_second_run_starts_as_in_the_first():
    # TorchOpt remembers outside its state that it was called, and then dampens the first gradient of every later run.
    optimizer = torchopt.sgd(1.0, momentum=0.9, dampening=0.5)
    go = partial(adapt, lambda x: 2.0 * x, optimizer=optimizer, num_steps=1)
    assert [go(f64(0.0)).params.item() for _ in range(3)] == [-2.0] * 3


def test_a_state_carried_to_a_new_optimizer_goes_on_as_with_the_old():
    def make():
        return torchopt.sgd(0.1, momentum=0.9)

    go = partial(adapt, lambda x: x.square())
    first = go(f64(1.0), optimizer=make(), num_steps=2)
    ours = go(first.params, optimizer=make(), num_steps=2, optimizer_state=first.optimizer_state)
    assert torch.equal(ours.params, go(f64(1.0), optimizer=make(), num_steps=4).params)


def test_adam_corrects_its_bias_in_double():
    adapted = adapt(lambda x: 3.0 * x, f64(1.0), optimizer=torchopt.adam(0.1, eps=0.0), num_steps=1)
    assert float(adapted.params) == pytest.approx(0.9, abs=1e-15)
    assert (
        adapt(lambda x: 3 * x, torch.tensor(1.0), optimizer=torchopt.adam(0.1), num_steps=3).params.dtype
        == torch.float32
    )


def test_the_derivative_of_an_adam_step_where_the_gradient_is_zero_is_that_on_both_sides():
    def after(scale):  # gradient = scale: a first step is scale / (|scale| + eps), whose slope at 0 is 1 / eps
        return adapt(lambda x: scale * x, f64(0.0), optimizer=torchopt.adam(1.0, eps=0.5), num_steps=1).params

    assert float(grad(after)(f64(0.0))) == pytest.approx(-2.0)
    assert float(grad(after)(f64(1e-9))) == pytest.approx(-2.0, rel=1e-6)


def test_rates_go_by_name_whatever_the_order_of_the_parameters():
    params = OrderedDict(w=f64(1.0), b=f64(1.0))
    scaled = step(scale_by_learning_rates({"w": f64(1.0), "b": f64(0.0)}), params)
    assert (scaled["w"], scaled["b"]) == (-1.0, 0.0)
    with pytest.raises(ValueError, match=r"rates must have the keys of the parameters, \['w', 'b'\]; got \['a', 'c'\]"):
        step(scale_by_learning_rates({"a": f64(1.0), "c": f64(0.0)}), params)


@pytest.mark.parametrize("options", [{}, {"recompute": 1}, {"mixed_mode": True}])
@pytest.mark.parametrize("make", [torchopt.transform.scale_by_adam, lambda: torchopt.transform.trace(0.9)])
def test_vmap_over_rates_alone_equals_a_loop(make, options):
    def after(rate):
        optimizer = torchopt.chain(make(), scale_by_learning_rates(rate))
        return adapt(lambda x: (x**2).sum(), f64([1.0, 2.0]), optimizer=optimizer, num_steps=3, **options).params

    rates = f64([0.1, 0.2, 0.3])
    torch.testing.assert_close(vmap(after)(rates), torch.stack([after(rate) for rate in rates]))
