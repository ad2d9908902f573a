"""The algorithms of the MAML family against their formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchopt
from torch.func import grad

from ssmrl.adaptation import adapt, conjugate_gradient, scale_by_learning_rates
from ssmrl.meta_rl import implicit_loss, multi_step_loss, post_adaptation_loss, reptile_loss

f64 = partial(torch.tensor, dtype=torch.float64)
SGD = torchopt.sgd(0.1)


def loss(theta, target):
    """(θ - c)², whose gradient steps are θ - c -> 0.8 (θ - c) at rate 0.1."""
    return (theta - target).square()


def scaled(theta, scale, target):
    return (scale * theta - target).square()


def test_maml_by_hand():
    # θ_2 = c + 0.64 (θ - c): for θ = 1, c = 3, q = 2 the loss is (1.72 - 2)², its slope 2 · (-0.28) · 0.64.
    run = partial(post_adaptation_loss, loss, support=(f64(3.0),), query=(f64(2.0),), optimizer=SGD, num_steps=2)
    assert float(run(f64(1.0))) == pytest.approx(0.28**2)
    assert float(grad(run)(f64(1.0))) == pytest.approx(-0.56 * 0.64)
    assert float(grad(partial(run, first_order=True))(f64(1.0))) == pytest.approx(-0.56)


def test_what_is_shared_is_learned_and_does_not_adapt():
    run = partial(post_adaptation_loss, scaled, support=(f64(3.0),), query=(f64(2.0),), optimizer=SGD, num_steps=1)

    def of_scale(scale):
        return run(f64(1.0), shared=(scale,))

    # θ_1 = 1 - 0.2 s (s - 3); the loss is (s θ_1 - 2)².
    at = f64(1.5).requires_grad_()
    expected = (at * (1 - 0.2 * at * (at - 3)) - 2).square()
    assert float(of_scale(f64(1.5))) == pytest.approx(float(expected.detach()))
    assert float(grad(of_scale)(f64(1.5))) == pytest.approx(float(torch.autograd.grad(expected, at)[0]))


@pytest.mark.parametrize("options", [{}, {"recompute": 1}, {"mixed_mode": True}, {"first_order": True}])
@pytest.mark.parametrize("optimizer", [SGD, torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1)])
def test_the_multi_step_loss_is_the_weighted_sum_of_the_losses_after_every_step(optimizer, options):
    weights = f64([0.5, 0.2, 0.3])

    def each(theta):
        after = [
            post_adaptation_loss(loss, theta, (f64(3.0),), (f64(2.0),), optimizer=optimizer, num_steps=k, **options)
            for k in (1, 2, 3)
        ]
        return weights @ torch.stack(after)

    def ours(theta):
        return multi_step_loss(loss, theta, (f64(3.0),), (f64(2.0),), weights=weights, optimizer=optimizer, **options)

    assert float(ours(f64(1.0))) == pytest.approx(float(each(f64(1.0))))
    assert float(grad(ours)(f64(1.0))) == pytest.approx(float(grad(each)(f64(1.0))))


def test_rates_for_every_step_take_their_turn_through_a_multi_step_loss():
    optimizer = scale_by_learning_rates(f64([0.1, 0.5]), per_step=True)
    # θ - c: -2, then · 0.8 = -1.6, then · 0 = 0.
    run = partial(multi_step_loss, loss, f64(1.0), (f64(3.0),), (f64(3.0),), optimizer=optimizer)
    assert float(run(weights=f64([1.0, 0.0]))) == pytest.approx(1.6**2)
    assert float(run(weights=f64([0.0, 1.0]))) == pytest.approx(0.0)


@pytest.mark.parametrize("weights", [f64(1.0), f64([]), f64([[1.0]])])
def test_weights_of_a_wrong_shape_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights must have shape \(K,\)"):
        multi_step_loss(loss, f64(1.0), (f64(3.0),), (f64(2.0),), weights=weights, optimizer=SGD)


def test_the_implicit_gradient_of_a_parabola_is_the_closed_form():
    # argmin (φ - c)² + (λ/2) (φ - θ)² = (2c + λθ) / (2 + λ)
    run = partial(
        implicit_loss, loss, support=(f64(3.0),), query=(f64(2.0),), optimizer=SGD, num_steps=500, strength=1.0
    )
    slope = grad(partial(run, solver=conjugate_gradient(1)))(f64(1.0))
    assert float(slope) == pytest.approx(2 * (7 / 3 - 2) / 3)


def test_the_gradient_of_the_reptile_loss_is_the_way_that_adaptation_went():
    theta = {"a": f64([1.0, 2.0]), "b": f64(0.5)}

    def both(p, target):
        return (p["a"].sum() * p["b"] - target).square()

    gradient = grad(partial(reptile_loss, both, support=(f64(3.0),), optimizer=SGD, num_steps=4))(theta)
    adapted = adapt(both, theta, f64(3.0), optimizer=SGD, num_steps=4).params
    torch.testing.assert_close(gradient, {name: theta[name] - adapted[name] for name in theta})


def test_reptile_without_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        reptile_loss(loss, f64(1.0), (f64(3.0),), optimizer=SGD, num_steps=0)
