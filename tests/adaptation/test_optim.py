"""The choice of an optimizer, and the checks of its settings."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torchopt
from torch.func import grad, vmap
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation import (
    adapt,
    clip_by_global_norm,
    learning_rates,
    pull_to_anchor,
    scale_by_learning_rates,
    trust_region,
)
from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    check_optimizer,
    check_positive,
    check_rate,
    sgd_unless_given,
    treats_elements_alike,
    with_first_call,
    with_tensor_counts,
)
from ssmrl.adaptation.updates import differentiable_update

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


@pytest.mark.parametrize("value", [1, 1e-9, np.float64(0.1)])
def test_finite_numbers_above_zero_are_positive(value):
    check_positive("radius", value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "radius must be > 0; got 0"),
        (0.0, ValueError, "radius must be > 0; got 0"),
        (-1, ValueError, "radius must be finite and >= 0; got -1"),
        (float("nan"), ValueError, "radius must be finite and >= 0; got nan"),
        ("1", TypeError, "radius must be a number >= 0; got '1'"),
        (True, TypeError, "radius must be a number >= 0; got True"),
    ],
)
def test_what_is_not_positive_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        check_positive("radius", value)


# Optimizers for many streams: counts and first calls in the state.


def run(optimizer, gradients, state=None):
    """The updates for a sequence of gradients, and the state after them."""
    start = torch.zeros_like(gradients[0])
    state = optimizer.init(start) if state is None else state
    update, updates = differentiable_update(optimizer), []
    for gradient in gradients:
        one, state = update(gradient, state, start, first=False)
        updates.append(one)
    return torch.stack(updates), state


def per_step_rates():
    return scale_by_learning_rates(f64([1.0, 10.0, 100.0]), per_step=True)


COUNTING = {
    "rates per step": per_step_rates,
    "schedule": lambda: torchopt.sgd(torchopt.schedule.polynomial_schedule(1.0, 0.1, 1.0, 3)),
    "adam": lambda: torchopt.adam(0.1),
    "adamax": lambda: torchopt.adamax(0.1),
    "adam and rates per step": lambda: torchopt.chain(torchopt.transform.scale_by_adam(), per_step_rates()),
}
over_counting = pytest.mark.parametrize("make", COUNTING.values(), ids=COUNTING.keys())
GRADIENTS = f64([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.1], [2.0, 0.2], [1.5, -0.3]])


@over_counting
def test_counts_as_tensors_change_no_update(make):
    counted, state = run(with_tensor_counts(make()), GRADIENTS)
    torch.testing.assert_close(counted, run(make(), GRADIENTS)[0], rtol=1e-12, atol=0)
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(state))


@over_counting
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_streams_with_counts_of_their_own_equal_a_loop(make):
    optimizer = with_tensor_counts(make())
    states = [run(optimizer, GRADIENTS[: 1 + age])[1] for age in range(4)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    gradients = GRADIENTS[:4].flip(0)
    update = differentiable_update(optimizer)
    mapped, _ = vmap(lambda g, s: update(g, s, torch.zeros_like(g), first=False))(gradients, stacked)
    each = [update(g, s, torch.zeros_like(g), first=False)[0] for g, s in zip(gradients, states, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-12, atol=0)


def test_a_step_that_is_a_tensor_takes_its_rate_and_later_ones_the_last_by_hand():
    transformation = with_tensor_counts(per_step_rates())
    updates, state = run(transformation, f64([1.0, 1.0, 1.0, 1.0, 1.0]))
    assert updates.tolist() == [-1.0, -10.0, -100.0, -100.0, -100.0]
    assert state.step.tolist() == 5
    steps = torch.tensor([2, 0, 7])
    mapped, after = vmap(lambda step: transformation.update(f64(1.0), state._replace(step=step), inplace=False))(steps)
    assert mapped.tolist() == [-100.0, -1.0, -100.0]
    assert after.step.tolist() == [3, 1, 8]


def dampened():
    return torchopt.sgd(0.1, momentum=0.9, dampening=0.5)


def by_torch(gradients):
    theta = torch.zeros_like(gradients[0]).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9, dampening=0.5)
    updates = []
    for gradient in gradients:
        before = theta.detach().clone()
        theta.grad = gradient.clone()
        optimizer.step()
        updates.append(theta.detach() - before)
    return torch.stack(updates)


def test_dampened_momentum_with_its_first_call_in_the_state_equals_torch_optim_every_time():
    optimizer = with_first_call(dampened())
    for _ in range(2):  # the second run is as the first
        torch.testing.assert_close(run(optimizer, GRADIENTS)[0], by_torch(GRADIENTS), rtol=1e-12, atol=1e-12)


def test_streams_that_take_turns_do_not_share_a_first_call():
    optimizer = with_first_call(dampened())
    first, state = run(optimizer, GRADIENTS[:2])
    other, _ = run(optimizer, GRADIENTS[3:])
    rest, _ = run(optimizer, GRADIENTS[2:], state)
    torch.testing.assert_close(torch.cat([first, rest]), by_torch(GRADIENTS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other, by_torch(GRADIENTS[3:]), rtol=1e-12, atol=1e-12)


def test_a_first_call_beside_later_ones_under_vmap_equals_a_loop():
    optimizer = with_first_call(dampened())
    old, new = run(optimizer, GRADIENTS[:2])[1], optimizer.init(GRADIENTS[0])
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), old, new)
    gradients = GRADIENTS[2:4]
    mapped, _ = vmap(lambda g, s: optimizer.update(g, s, params=g, inplace=False))(gradients, stacked)
    each = [optimizer.update(g, s, params=g, inplace=False)[0] for g, s in zip(gradients, (old, new), strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        dampened,
        lambda: torchopt.chain(torchopt.transform.trace(0.9, 0.5), torchopt.transform.scale_by_adam()),
        lambda: torchopt.chain(torchopt.transform.trace(0.9, 0.5), torchopt.transform.scale_by_rms()),
    ],
    ids=["alone", "before adam", "before rms"],
)
def test_with_a_first_call_in_the_state_the_state_before_is_left_as_it_was(make):
    optimizer = with_first_call(make())
    _, state = run(optimizer, GRADIENTS[:2])
    before = [leaf.clone() for leaf in pytree.tree_leaves(state)]
    after = optimizer.update(GRADIENTS[2], state, params=GRADIENTS[2], inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(before, pytree.tree_leaves(state), strict=True))
    again = optimizer.update(GRADIENTS[2], state, params=GRADIENTS[2], inplace=True)
    torch.testing.assert_close(again, after, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [torchopt.sgd(0.1), torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1)])
def test_an_optimizer_whose_first_call_is_no_other_is_left_as_it_is(optimizer):
    assert with_first_call(optimizer) is optimizer


# One vector for all parameters.

ALIKE = {
    "sgd": lambda: torchopt.sgd(0.1, weight_decay=0.3),
    "nesterov": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True),
    "dampened": dampened,
    "adam": lambda: torchopt.adam(0.1),
    "adamw": lambda: torchopt.adamw(0.1, weight_decay=0.3),
    "rmsprop": lambda: torchopt.rmsprop(0.1, centered=True),
    "adagrad": lambda: torchopt.adagrad(0.1),
    "adadelta": lambda: torchopt.adadelta(0.1),
    "radam": lambda: torchopt.radam(0.1),
    "a schedule of TorchOpt's": lambda: torchopt.sgd(torchopt.schedule.polynomial_schedule(1.0, 0.1, 1.0, 3)),
    "clipped": lambda: torchopt.chain(clip_by_global_norm(0.5), torchopt.adam(0.1)),
    "clipped by TorchOpt": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.sgd(0.1)),
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE.keys())
def test_what_treats_elements_alike_may_have_them_in_one_vector(make):
    assert treats_elements_alike(make())

    def loss(p):
        return (p["a"] - 3.0).square().sum() + (p["a"][0] * p["b"].sum()).sin()

    params = {"a": f64([0.5, -1.0]), "b": f64([[1.0, 2.0], [0.1, -2.0]])}
    vector = torch.cat([params["a"], params["b"].flatten()])
    adapted = adapt(loss, params, optimizer=make(), num_steps=4).params
    as_vector = adapt(lambda v: loss({"a": v[:2], "b": v[2:].view(2, 2)}), vector, optimizer=make(), num_steps=4).params
    torch.testing.assert_close(torch.cat([adapted["a"], adapted["b"].flatten()]), as_vector, rtol=1e-12, atol=1e-12)


def own(function):
    return GradientTransformation(torchopt.sgd(0.1).init, function)


class _ByName:
    """A transformation that adapts one parameter by its name."""

    def update(self, updates, state, *, params=None, inplace=True):
        return {name: u if name == "a" else 0 * u for name, u in updates.items()}, state


def _by_name(kept, updates, state, *, params=None, inplace=True):
    return {name: u if name == kept else 0 * u for name, u in updates.items()}, state


@pytest.mark.parametrize(
    "optimizer",
    [
        torchopt.adamw(0.1, mask={"a": True, "b": False}),
        torchopt.adamw(0.1, mask=lambda params: params),
        torchopt.adamw(0.1, mask=(True, False)),
        torchopt.transform.scale(f64([0.1, 0.2])),  # type: ignore[arg-type]
        scale_by_learning_rates({"a": f64(0.1), "b": f64(0.2)}),
        torchopt.chain(torchopt.transform.scale_by_adam(), scale_by_learning_rates(f64([0.1, 0.2]))),
        trust_region({"a": f64(0.1)}, 1.0),
        torchopt.chain(pull_to_anchor(f64([0.1]), 1.0), torchopt.sgd(0.1)),
        own(lambda updates, state, *, params=None, inplace=True: (updates, state)),
    ],
    ids=[
        "mask",
        "mask by a function",
        "mask in a tuple",
        "tensor",
        "rates",
        "rates in a chain",
        "trust region",
        "pull",
        "own",
    ],
)
def test_what_may_know_parameters_apart_does_not_pass_for_alike(optimizer):
    assert not treats_elements_alike(optimizer)


@pytest.mark.parametrize(
    "optimizer", [own(partial(_by_name, "a")), own(_ByName().update)], ids=["partial", "bound method"]
)
def test_nor_does_a_transformation_that_is_a_method_or_a_partial_function(optimizer):
    assert not treats_elements_alike(optimizer)
