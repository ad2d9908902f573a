"""The pull to an anchor, the trust region and the Fisher information: by hand, against autograd and differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torchopt import pytree

from ssmrl.adaptation import adapt, distance, fisher_information, pull_to_anchor, trust_region

# TorchOpt's moments use an operation that torch.func maps with a slow fallback, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

f64 = partial(torch.tensor, dtype=torch.float64)
OPTIMIZERS = {"sgd": torchopt.sgd(0.1), "adam": torchopt.adam(0.1, eps_root=1e-6)}
over_optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def step(transformation, updates, params):
    return transformation.update(updates, transformation.init(params), params=params, inplace=False)[0]


def random_like(tree, seed):
    g = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda leaf: torch.randn(leaf.shape, generator=g, dtype=torch.float64), tree)


def tree():
    return {"layer": (torch.zeros(2, 3), torch.zeros(3)), "scale": torch.zeros(())}


# The pull.


def test_a_pulled_gradient_by_hand():
    # g + λ F (θ - θ_a) = 2 + 0.5 · 4 · (3 - 1), and without importance 2 + 0.5 · (3 - 1)
    assert step(pull_to_anchor(f64(1.0), 0.5, f64(4.0)), f64(2.0), f64(3.0)) == 6.0
    assert step(pull_to_anchor(f64(1.0), 0.5), f64(2.0), f64(3.0)) == 3.0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_pull_adds_the_gradient_of_the_penalty(weighted):
    params, anchor, gradient = (random_like(tree(), seed) for seed in range(3))
    importance = pytree.tree_map(torch.square, random_like(tree(), 3)) if weighted else None
    weights = importance or pytree.tree_map(torch.ones_like, anchor)

    def penalty(p):
        return sum(
            0.7 / 2 * (f * (t - a).square()).sum()
            for t, a, f in zip(*map(pytree.tree_leaves, (p, anchor, weights)), strict=True)
        )

    pulled = step(pull_to_anchor(anchor, 0.7, importance), gradient, params)
    close(pulled, pytree.tree_map(torch.add, gradient, grad(penalty)(params)))


def test_a_pull_of_no_strength_changes_no_bit():
    params, anchor, gradient = (random_like(tree(), seed) for seed in range(3))
    close(step(pull_to_anchor(anchor, 0), gradient, params), gradient, tolerance=0)


def test_at_the_anchor_nothing_pulls():
    anchor, gradient = random_like(tree(), 0), random_like(tree(), 1)
    close(step(pull_to_anchor(anchor, 5.0), gradient, anchor), gradient, tolerance=0)


def test_a_pulled_descent_ends_where_the_penalized_loss_is_least():
    # (θ - 3)² + λ/2 F (θ - 1)² is least at (2 · 3 + λF · 1) / (2 + λF), with λF = 6: at 12 / 8
    optimizer = torchopt.chain(pull_to_anchor(f64(1.0), 2.0, f64(3.0)), torchopt.sgd(0.1))
    adapted = adapt(lambda theta: (theta - 3.0).square(), f64(1.0), optimizer=optimizer, num_steps=100)
    close(adapted.params, f64(1.5))


# The trust region.


def test_a_step_too_far_ends_on_the_bound_straight_ahead_by_hand():
    # From (1, 1) by (5, 7), the anchor at (0, 4): (6, 4) ahead of the anchor in two leaves, of norm √52; then r/√52.
    params, updates, anchor = ((f64(v[0]), f64([v[1]])) for v in ((1.0, 1.0), (5.0, 7.0), (0.0, 4.0)))
    factor = 2 / 52**0.5
    first, second = step(trust_region(anchor, 2.0), updates, params)
    close((1 + first, 1 + second), (f64(6 * factor), f64([4 + 4 * factor])))


def test_the_norm_is_over_all_leaves():
    # Every leaf alone is inside r = 4.5, both together are at 5.
    zero, updates = (f64(0.0), f64([0.0])), (f64(3.0), f64([4.0]))
    close(step(trust_region(zero, 4.5), updates, zero), (f64(2.7), f64([3.6])))


vectors = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(f64)


@settings(max_examples=60, deadline=None)
@given(params=vectors, updates=vectors, anchor=vectors, radius=st.floats(1e-3, 30))
def test_any_step_ends_within_the_radius_wherever_it_begins(params, updates, anchor, radius):
    def split(v):
        return {"a": v[:2], "b": v[2]}

    moved = step(trust_region(split(anchor), radius), split(updates), split(params))
    after = params + torch.cat([moved["a"], moved["b"][None]])
    assert (after - anchor).norm() <= radius + 1e-13
    direct = params + updates - anchor
    if direct.norm() > radius:  # and straight ahead
        close(after, anchor + direct / direct.norm() * radius, tolerance=1e-11)


@settings(max_examples=60, deadline=None)
@given(params=vectors, updates=vectors, anchor=vectors, more=st.floats(1.001, 3))
def test_a_step_that_ends_inside_changes_no_bit(params, updates, anchor, more):
    radius = more * float((params + updates - anchor).norm()) + 1e-6
    assert torch.equal(step(trust_region(anchor, radius), updates, params), updates)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_stays_so(bad):
    moved = step(trust_region(f64([0.0, 0.0]), 1.0), f64([bad, 1.0]), f64([0.0, 0.0]))
    assert not torch.isfinite(moved).all()


@pytest.mark.parametrize("radius", [0.5, 100.0])
def test_the_derivatives_through_the_trust_region_equal_finite_differences(radius):
    def ahead(params, updates, anchor):
        return params + step(trust_region(anchor, radius), updates, params)

    inputs = [random_like(torch.zeros(3), seed).requires_grad_() for seed in range(3)]
    outside = (inputs[0] + inputs[1] - inputs[2]).norm() > radius
    assert bool(outside) == (radius == 0.5)
    assert gradcheck(ahead, inputs, check_forward_ad=True)
    assert gradgradcheck(ahead, inputs)


def test_the_derivative_at_the_anchor_is_the_identity():
    at = f64([1.0, 2.0])
    derivative = torch.func.jacrev(lambda u: step(trust_region(at, 1.0), u, at))(f64([0.0, 0.0]))
    close(derivative, torch.eye(2, dtype=torch.float64))


def test_vmap_over_steps_on_both_sides_of_the_bound_equals_a_loop():
    params, updates, anchor = random_like(torch.zeros(3, 2), 0), f64([[0.1], [3.0], [-9.0]]), f64([0.1, 0.2])

    def end(p, u):
        return (p + step(trust_region(anchor, 2.0), u * p, p)).sin().sum()

    for function in (end, grad(end), grad(end, argnums=1)):
        close(
            vmap(function)(params, updates), torch.stack([function(*row) for row in zip(params, updates, strict=True)])
        )
    far = [(p + u * p - anchor).norm() > 2.0 for p, u in zip(params, updates, strict=True)]
    assert any(far)
    assert not all(far)


# Both around an optimizer, in the inner loop.


def chained(optimizer, anchor, radius, strength=0.5):
    importance = torch.ones_like(anchor) + torch.arange(len(anchor))
    return torchopt.chain(pull_to_anchor(anchor, strength, importance), optimizer, trust_region(anchor, radius))


def curved(theta):
    return (theta - 3.0).pow(4).sum() + theta.prod()


@over_optimizers
@pytest.mark.parametrize("radius", [0.15, 100.0])
def test_both_derivatives_through_adaptation_from_an_anchor_equal_finite_differences(optimizer, radius):
    def after(theta, shift):
        anchor = theta + shift  # meta-learned, and where adaptation begins, nearly
        return adapt(curved, theta, optimizer=chained(optimizer, anchor, radius), num_steps=3).params

    inputs = (f64([2.0, 2.5]).requires_grad_(), f64([0.01, -0.02]).requires_grad_())
    moved = (after(*inputs) - inputs[0] - inputs[1]).norm()
    assert bool(moved < radius - 1e-3) == (radius == 100.0)
    assert gradcheck(after, inputs)
    assert gradgradcheck(after, inputs)


@over_optimizers
@settings(max_examples=15, deadline=None)
@given(start=vectors, radius=st.floats(0.01, 5), steps=st.integers(1, 6))
def test_after_any_number_of_steps_the_weights_are_within_the_radius(optimizer, start, radius, steps):
    adapted = adapt(
        lambda theta: (theta - 3.0).square().sum(),
        start,
        optimizer=chained(optimizer, start, radius),
        num_steps=steps,
    )
    assert distance(adapted.params, start) <= radius + 1e-12


@over_optimizers
def test_vmap_of_anchored_adaptation_over_tasks_equals_a_loop(optimizer):
    anchor = f64([0.5, -0.5])

    def after(target):
        loss = lambda theta: (theta - target).square().sum()  # noqa: E731
        return adapt(loss, anchor, optimizer=chained(optimizer, anchor, 0.2), num_steps=3).params

    targets = f64([[0.6, -0.5], [9.0, 1.0], [-3.0, 2.0]])
    close(vmap(after)(targets), torch.stack([after(target) for target in targets]))


# Distance and Fisher information.


def test_the_distance_by_hand():
    assert distance({"a": f64([1.0, 3.0]), "b": f64(5.0)}, {"a": f64([0.0, 1.0]), "b": f64(3.0)}) == 3.0


def half_square(w, x, y):
    return 0.5 * ((w * x).sum() - y).square()


def test_the_fisher_information_of_a_linear_model_by_hand():
    # The gradient of ½(wx - y)² is (wx - y) x: with w = 2 it is (2 - 1) · 1 and (6 - 8) · 3, so F = (1 + 36) / 2,
    # not the square of their mean, 2.5² = 6.25.
    information = fisher_information(half_square, f64([2.0]), f64([[1.0], [3.0]]), f64([1.0, 8.0]))
    assert information.tolist() == [18.5]


def test_the_fisher_information_is_the_mean_over_samples_one_by_one():
    params = random_like({"w": torch.zeros(3), "b": torch.zeros(())}, 0)
    data = random_like({"x": torch.zeros(5, 3), "y": torch.zeros(5)}, 1)

    def loss(p, sample):
        return half_square(p["w"], sample["x"], sample["y"] - p["b"])

    each = [grad(loss)(params, pytree.tree_map(lambda leaf, i=i: leaf[i], data)) for i in range(5)]
    expected = pytree.tree_map(lambda *g: torch.stack(g).square().mean(0), *each)
    close(fisher_information(loss, params, data), expected)


@pytest.mark.parametrize("data", [(), (torch.zeros(0, 2), torch.zeros(0)), (torch.zeros(()),)])
def test_fisher_information_of_no_samples_is_refused(data):
    with pytest.raises(ValueError, match="data must hold tensors with a leading axis of at least one sample"):
        fisher_information(half_square, torch.zeros(2), *data)


# Errors.

ANCHOR = {"a": torch.zeros(2), "b": torch.zeros(3)}
ONES = {"a": torch.ones(2), "b": torch.ones(3)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pull_to_anchor(ANCHOR, -1.0), ValueError, r"strength must be finite and >= 0; got -1\.0"),
        (lambda: pull_to_anchor(ANCHOR, float("nan")), ValueError, "strength must be finite and >= 0; got nan"),
        (lambda: pull_to_anchor(ANCHOR, "1"), TypeError, "strength must be a number >= 0; got '1'"),  # type: ignore[arg-type]
        (
            lambda: pull_to_anchor(ANCHOR, 1.0, {"a": ONES["a"], "c": ONES["b"]}),
            ValueError,
            r"importance must have the structure of the parameters: .*got key\(s\): \['a', 'c'\]",
        ),
        (
            lambda: pull_to_anchor(ANCHOR, 1.0, {"a": ONES["a"], "b": ONES["a"]}),
            ValueError,
            r"importance must have the shapes of the parameters; got \(2,\) for \(3,\)",
        ),
        (
            lambda: pull_to_anchor(ANCHOR, 1.0, {"a": ONES["a"], "b": 1.0}),
            ValueError,
            r"importance must have the shapes of the parameters; got float for \(3,\)",
        ),
        (
            lambda: pull_to_anchor(ANCHOR, 1.0, {"a": ONES["a"], "b": -ONES["b"]}),
            ValueError,
            "importance must be finite and not negative",
        ),
        (
            lambda: pull_to_anchor(ANCHOR, 1.0, {"a": ONES["a"], "b": torch.inf * ONES["b"]}),
            ValueError,
            "importance must be finite and not negative",
        ),
        (lambda: trust_region(ANCHOR, 0), ValueError, "max_distance must be > 0; got 0"),
        (lambda: trust_region(ANCHOR, -1.0), ValueError, r"max_distance must be finite and >= 0; got -1\.0"),
        (lambda: trust_region(ANCHOR, float("inf")), ValueError, "max_distance must be finite and >= 0; got inf"),
        (lambda: trust_region(ANCHOR, True), TypeError, "max_distance must be a number >= 0; got True"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_importance_of_zero_is_legal_and_pulls_nothing():
    pulled = step(pull_to_anchor(f64([1.0, 1.0]), 2.0, f64([0.0, 1.0])), f64([0.5, 0.5]), f64([4.0, 4.0]))
    assert pulled.tolist() == [0.5, 6.5]
