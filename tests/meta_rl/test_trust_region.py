"""Trust-region steps: where the answer is known in closed form, and through adaptation."""

from __future__ import annotations

import math

import pytest
import torch
import torchopt
from torch.func import hessian, vmap

from ssmrl import adapt
from ssmrl.meta_rl import trust_region_step

F = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
G = torch.tensor([1.0, -3.0], dtype=torch.float64)
START = torch.tensor([0.3, 0.7], dtype=torch.float64)


def linear(params):
    return G @ params["w"]


def quadratic(params):
    away = params["w"] - START
    return away @ F @ away / 2


def test_the_step_is_the_natural_gradient_to_the_edge_of_the_region():
    done = trust_region_step(linear, quadratic, {"w": START}, max_divergence=0.02, damping=0.0)
    natural = torch.linalg.solve(F, G)
    assert done.fraction >= 0.8  # at the edge rounding decides
    expected = START - done.fraction * math.sqrt(2 * 0.02 / float(G @ natural)) * natural
    torch.testing.assert_close(done.params["w"], expected, rtol=1e-10, atol=0)
    assert float(done.divergence) == pytest.approx(0.02 * done.fraction**2)
    assert float(done.divergence) <= 0.02
    assert float(done.loss_after) == pytest.approx(float(G @ expected))


def test_the_line_search_keeps_the_divergence_within_the_bound():
    def steeper(params):  # 10 times its second-order expansion far away
        near = quadratic(params)
        return near + 1e4 * near**2

    done = trust_region_step(linear, steeper, {"w": START}, max_divergence=0.02)
    assert 0 < done.fraction < 1
    assert float(done.divergence) <= 0.02
    assert float(done.loss_after) < float(done.loss)
    once_less = trust_region_step(linear, steeper, {"w": START}, max_divergence=0.02, num_shrinks=0)
    assert once_less.fraction == 0
    assert once_less.params["w"] is START


def test_a_step_that_does_not_help_is_not_made():
    def rising(params):
        return linear(params) + 1e6 * quadratic(params)

    done = trust_region_step(rising, quadratic, {"w": START}, max_divergence=10.0, num_shrinks=3)
    assert done.fraction == 0
    assert float(done.divergence) == 0
    torch.testing.assert_close(done.params["w"], START, rtol=0, atol=0)


def test_at_a_minimum_nothing_moves():
    done = trust_region_step(quadratic, quadratic, {"w": START})
    assert done.fraction == 0
    assert done.params["w"] is START


def test_through_adaptation_it_uses_the_explicit_fisher_matrix():
    """The mean divergence after one step of adaptation on every one of 5 tasks, against its Hessian written out."""
    generator = torch.Generator().manual_seed(0)
    tasks = torch.randn(5, 4, 2, generator=generator, dtype=torch.float64)
    start = torch.randn(2, generator=generator, dtype=torch.float64)

    def adapted(w, task):
        inner = lambda p: torch.tanh(task @ p).sum()  # noqa: E731
        return adapt(inner, w, optimizer=torchopt.sgd(0.1), num_steps=1).params

    before = vmap(adapted, (None, 0))(start, tasks).detach()

    def divergence(w):
        return (vmap(adapted, (None, 0))(w, tasks) - before).square().sum() / 10

    def loss(w):
        return torch.sin(vmap(adapted, (None, 0))(w, tasks)).mean()

    done = trust_region_step(loss, divergence, start, max_divergence=1e-6, damping=0.0)
    fisher = hessian(divergence)(start)
    gradient = torch.func.grad(loss)(start)
    natural = torch.linalg.solve(fisher, gradient)
    expected = start - math.sqrt(2e-6 / float(gradient @ natural)) * done.fraction * natural
    torch.testing.assert_close(done.params, expected, rtol=1e-9, atol=1e-12)
    assert done.fraction > 0.5


def test_the_curvature_can_be_that_of_something_cheaper():
    def round_one(params):
        return (params["w"] - START).square().sum() / 2

    done = trust_region_step(linear, quadratic, {"w": START}, curvature_fn=round_one, max_divergence=0.02, damping=0.0)
    moved = done.params["w"] - START
    torch.testing.assert_close(moved / moved.norm(), -G / G.norm())  # the plain gradient, where F is the identity
    assert float(done.divergence) <= 0.02


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_divergence": 0.0}, "max_divergence must be"),
        ({"shrink": 1.0}, "shrink must be between 0 and 1; got 1.0"),
        ({"damping": -1.0}, "damping must be at least 0 and finite; got -1.0"),
        ({"num_cg_steps": 0}, "num_steps must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        trust_region_step(linear, quadratic, {"w": START}, **settings)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="must be finite; the loss is nan"):
        trust_region_step(lambda p: linear(p) * math.nan, quadratic, {"w": START})
