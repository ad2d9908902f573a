"""Derivatives of the surrogates against exact ones, on a tabular MDP of which every trajectory can be enumerated.

Two states and an absorbing end, two actions, three steps; an episode that has not ended by then is truncated, and worth
the value of the state it stopped in. The exact return comes from dynamic programming, and knows nothing of
trajectories; the expectation of a surrogate is its sum over all of them, weighted with their probabilities.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torchopt
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

from ssmrl.adaptation import adapt
from ssmrl.meta_rl import (
    Categorical,
    MetaLearner,
    clipped_surrogate_loss,
    dice_loss,
    discounted_returns,
    episode_step,
    generalized_advantages,
    likelihood_ratio_loss,
    loaded_dice_loss,
    surrogate_loss,
)

f64 = partial(torch.tensor, dtype=torch.float64)

GAMMA, HORIZON, RATE = 0.9, 3, 0.7
START = f64([0.6, 0.4])
TRANSITION = f64([[[0.7, 0.1, 0.2], [0.1, 0.8, 0.1]], [[0.8, 0.1, 0.1], [0.1, 0.5, 0.4]]])  # [s, a, s'], 2 is the end
REWARD = f64([[[0.0, -0.5, 1.0], [0.3, 0.8, -1.0]], [[-0.7, 1.5, 0.2], [2.0, 3.0, 1.0]]])
VALUE = f64([-0.8, 2.3, 0.0])  # where an episode is truncated; any function of the state is a baseline
THETA = f64([[0.4, -0.3], [-0.1, 0.6]])


def pi(theta):
    """(s, a)."""
    return theta.softmax(-1)


# Exactly, by dynamic programming.


def q_values(theta):
    """(T, s, a): expected discounted returns from step t on."""
    after = VALUE
    qs: list[Tensor] = []
    for _ in range(HORIZON):
        q = (TRANSITION * (REWARD + GAMMA * after)).sum(-1)
        qs.insert(0, q)
        after = torch.cat([(pi(theta) * q).sum(-1), f64([0.0])])
    return torch.stack(qs)


def expected_return(theta):
    """J(θ)."""
    return START @ (pi(theta) * q_values(theta)[0]).sum(-1)


def occupancies(theta):
    """(T, s): the probability of being in a state at step t."""
    at, steps = START, []
    for _ in range(HORIZON):
        steps.append(at)
        at = torch.einsum("s,sa,saz->z", at, pi(theta), TRANSITION)[:2]
    return torch.stack(steps)


def curvature_parts(theta):
    """H1, H2 and H12 of the module docstring of `ssmrl.meta_rl.losses`, each (4, 4)."""

    def log_pi(theta):
        return theta.log_softmax(-1)

    weight = torch.einsum("t,ts,sa->tsa", GAMMA ** torch.arange(3.0).double(), occupancies(theta), pi(theta))
    q, score = q_values(theta), jacrev(log_pi)(theta).flatten(2)
    h1 = torch.einsum("tsa,tsa,sai,saj->ij", weight, q, score, score)
    h2 = torch.einsum("tsa,tsa,saij->ij", weight, q, hessian(log_pi)(theta).reshape(2, 2, 4, 4))
    h12 = torch.einsum("tsa,sai,tsaj->ij", weight, score, jacrev(q_values)(theta).flatten(3))
    return h1, h2, h12


# By enumeration.


class Paths(NamedTuple):
    """All trajectories, each (M, T); what comes after an end is invalid, and NaN where that can be."""

    state: Tensor
    action: Tensor
    reward: Tensor
    next_value: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor


def enumerate_paths():
    """All trajectories, and the part (M,) of their probability that is not the policy's."""
    paths, chances = [], []

    def extend(state, chance, steps):
        if len(steps) == HORIZON or state == 2:
            padding = [(0, 0, float("nan"), float("nan"), False, False, False)] * (HORIZON - len(steps))
            paths.append(steps + padding)
            chances.append(chance)
            return
        for action in range(2):
            for after in range(3):
                ended = after == 2
                cut = len(steps) + 1 == HORIZON and not ended
                step = (state, action, float(REWARD[state, action, after]), float(VALUE[after]), ended, cut, True)
                extend(after, chance * float(TRANSITION[state, action, after]), [*steps, step])

    for state in range(2):
        extend(state, float(START[state]), [])
    columns = [torch.tensor([[step[i] for step in path] for path in paths]) for i in range(7)]
    return Paths(*(c.double() if c.is_floating_point() else c for c in columns)), f64(chances)


PATHS, CHANCES = enumerate_paths()


def log_probs(theta, path):
    return Categorical(theta[path.state]).log_prob(path.action)


def probabilities(theta):
    """(M,)."""
    return CHANCES * torch.where(PATHS.valid, log_probs(theta, PATHS), 0.0).sum(-1).exp()


def expectation(loss, theta):
    """E_τ loss(θ, τ) over trajectories of π_θ, as a constant: what many samples would give, as ⊥ would see it."""
    return probabilities(theta).detach() @ vmap(loss, in_dims=(None, 0))(theta, PATHS)


def discounted(path, advantage):
    """γ^t A_t, whose gradient is that of the discounted return."""
    return GAMMA ** episode_step(path.terminated, path.truncated, path.valid).double() * advantage


def returns(path):
    masks = path.terminated, path.truncated
    return discounted_returns(path.reward, path.next_value, *masks, gamma=GAMMA, valid=path.valid)


def any_baseline(path):
    return f64([0.7, 2.0])[path.state]


def advantages(path):
    """With λ = 1 those of GAE have no bias, whatever the values."""
    value = any_baseline(path)
    after = torch.where(path.terminated | path.truncated, path.next_value, value.roll(-1, -1))
    masks = path.terminated, path.truncated
    return generalized_advantages(path.reward, value, after, *masks, gamma=GAMMA, lam=1, valid=path.valid)


def likelihood_ratio(theta, path, advantage=returns):
    return likelihood_ratio_loss(log_probs(theta, path), discounted(path, advantage(path)), path.valid, denominator=1)


def low_variance(theta, path, advantage=returns):
    return surrogate_loss(log_probs(theta, path), None, discounted(path, advantage(path)), path.valid, denominator=1)


def ratio(theta, path, advantage=returns):
    log_prob, a = log_probs(theta, path), discounted(path, advantage(path))
    return surrogate_loss(log_prob, log_probs(THETA, path), a, path.valid, denominator=1)


def clipped(theta, path, advantage=returns):
    log_prob, a = log_probs(theta, path), discounted(path, advantage(path))
    return clipped_surrogate_loss(log_prob, log_prob.detach(), a, path.valid, denominator=1)


def dice(theta, path, baseline=None):
    b = None if baseline is None else baseline(path)
    masks = path.terminated, path.truncated, path.valid
    return dice_loss(log_probs(theta, path), path.reward, path.next_value, *masks, gamma=GAMMA, baseline=b)


def loaded(theta, path, advantage=returns, lam=1.0):
    masks = path.terminated, path.truncated, path.valid
    return loaded_dice_loss(log_probs(theta, path), advantage(path), *masks, gamma=GAMMA, lam=lam)


SURROGATES = {
    "likelihood ratio": likelihood_ratio,
    "likelihood ratio, baseline": partial(likelihood_ratio, advantage=advantages),
    "low variance": low_variance,
    "low variance, baseline": partial(low_variance, advantage=advantages),
    "ratio": ratio,
    "clipped": clipped,
    "DiCE": dice,
    "DiCE, baseline": partial(dice, baseline=any_baseline),
    "loaded DiCE": loaded,
    "loaded DiCE, baseline": partial(loaded, advantage=advantages),
    "loaded DiCE, λ = 0": partial(loaded, lam=0.0),
    "loaded DiCE, λ = ½, baseline": partial(loaded, advantage=advantages, lam=0.5),
}
UNBIASED = ["DiCE", "DiCE, baseline", "loaded DiCE", "loaded DiCE, baseline"]


def matrix(h):
    return h.reshape(4, 4)


# The ground that the rest stands on.


def test_the_trajectories_are_all_there():
    assert len(CHANCES) == 2 * (2 + 4 * (2 + 4 * 6))
    for theta in (THETA, -2 * THETA):
        assert float(probabilities(theta).sum()) == pytest.approx(1)
        torch.testing.assert_close(probabilities(theta) @ returns(PATHS)[:, 0], expected_return(theta))
    assert PATHS.terminated.any()
    assert PATHS.truncated.any()
    assert PATHS.reward.isnan().any()


def test_the_exact_curvature_is_the_sum_of_its_parts():
    h1, h2, h12 = curvature_parts(THETA)
    torch.testing.assert_close(matrix(hessian(expected_return)(THETA)), h1 + h2 + h12 + h12.mT)
    for part in (h1, h2, h12):
        assert part.abs().max() > 0.05  # so that a surrogate that lacks it is seen to


# First derivatives.


@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_of_every_surrogate_is_exact_on_average(name):
    ours = grad(partial(expectation, SURROGATES[name]))(THETA)
    torch.testing.assert_close(ours, -grad(expected_return)(THETA))


def test_truncation_that_is_taken_for_termination_gives_another_gradient():
    def cut_off(path):
        ends = path.terminated | path.truncated
        return discounted_returns(path.reward, None, ends, path.truncated, gamma=GAMMA, valid=path.valid)

    ours = grad(partial(expectation, partial(likelihood_ratio, advantage=cut_off)))(THETA)
    assert (ours + grad(expected_return)(THETA)).abs().max() > 0.05


# Second derivatives, and DiCE's third.


@pytest.mark.parametrize("name", UNBIASED)
def test_the_hessian_of_dice_is_exact_on_average(name):
    ours = hessian(partial(expectation, SURROGATES[name]))(THETA)
    torch.testing.assert_close(ours, -hessian(expected_return)(THETA))


@pytest.mark.parametrize("name", UNBIASED)
def test_the_third_derivative_of_dice_is_exact_on_average(name):
    ours = jacrev(hessian(partial(expectation, SURROGATES[name])))(THETA)
    torch.testing.assert_close(ours, -jacrev(hessian(expected_return))(THETA))


def test_the_hessian_of_the_likelihood_ratio_lacks_all_but_h2():
    _, h2, _ = curvature_parts(THETA)
    torch.testing.assert_close(matrix(hessian(partial(expectation, likelihood_ratio))(THETA)), -h2)


@pytest.mark.parametrize("name", ["low variance", "low variance, baseline", "ratio", "loaded DiCE, λ = 0"])
def test_the_hessian_of_promps_surrogate_lacks_h12(name):
    h1, h2, _ = curvature_parts(THETA)
    torch.testing.assert_close(matrix(hessian(partial(expectation, SURROGATES[name]))(THETA)), -(h1 + h2))


def test_a_baseline_changes_the_hessian_of_the_likelihood_ratio_alone():
    without, with_one = (
        hessian(partial(expectation, SURROGATES[f"likelihood ratio{b}"]))(THETA) for b in ("", ", baseline")
    )
    assert (without - with_one).abs().max() > 0.05


def test_a_row_of_two_episodes_gives_the_same_derivatives():
    """Every trajectory beside another one in a row, with a dummy step between them."""
    other = torch.randperm(len(CHANCES), generator=torch.Generator().manual_seed(0))
    dummy = [torch.zeros_like(x[:, :1]) for x in PATHS]
    pairs = Paths(*(torch.cat([x, d, x[other]], 1) for x, d in zip(PATHS, dummy, strict=True)))

    def mean(loss, weights):
        def of(theta):
            first = vmap(loss, in_dims=(None, 0))(theta, PATHS)
            together = vmap(loss, in_dims=(None, 0))(theta, pairs)
            return weights @ first, weights @ first[other], weights @ together

        return of

    weights = probabilities(THETA)
    for loss in (dice, loaded):
        for order in (jacrev, hessian):
            one, two, together = order(mean(loss, weights))(THETA)
            torch.testing.assert_close(together, (one + two) / 2)


# How much an estimate from one trajectory varies: exactly, too.


def spread(loss, order):
    """Σ over components of the variance of a derivative of one trajectory's surrogate."""
    each = vmap(order(loss), in_dims=(None, 0))(THETA, PATHS).flatten(1)
    p = probabilities(THETA)
    return float((p @ each.square() - (p @ each).square()).sum())


def exact_values(path):
    """V_t(s_t) of π_θ."""
    t = episode_step(path.terminated, path.truncated, path.valid)
    return (pi(THETA) * q_values(THETA)).sum(-1)[t, path.state]


def exact_advantages(path):
    return torch.where(path.valid, returns(path) - exact_values(path), 0.0)


def test_a_baseline_lowers_the_variance_of_both_derivatives_of_loaded_dice():
    ours = partial(loaded, advantage=exact_advantages)
    assert spread(ours, grad) < 0.8 * spread(loaded, grad)
    assert spread(ours, hessian) < 0.95 * spread(loaded, hessian)


def test_a_baseline_of_dice_lowers_the_variance_of_the_first_derivative_alone():
    ours = partial(dice, baseline=exact_values)
    assert spread(ours, grad) == pytest.approx(spread(partial(loaded, advantage=exact_advantages), grad))
    assert spread(ours, hessian) > 1.1 * spread(partial(loaded, advantage=exact_advantages), hessian)


def test_promps_surrogate_trades_bias_for_variance():
    lower, full = (spread(partial(f, advantage=exact_advantages), hessian) for f in (low_variance, loaded))
    assert lower < 0.3 * full


# Meta-gradients, through the library's inner loop.


def adapted_return(theta):
    """J(θ + α ∇J(θ))."""
    return expected_return(theta + RATE * grad(expected_return)(theta))


def meta_loss(theta, inner, outer, **options):
    """E outer(θ', τ') with τ' from π_θ' and θ' = θ - α ∇ E inner(θ, τ) with τ from π_θ."""
    adapted = adapt(partial(expectation, inner), theta, optimizer=torchopt.sgd(RATE), num_steps=1, **options)
    return expectation(outer, adapted.params)


def through(curvature):
    """(I + α C) ∇J(θ'): the meta-gradient of an inner loop with an exact gradient and the curvature C."""
    after = grad(expected_return)(THETA + RATE * grad(expected_return)(THETA))
    return (after.flatten() + RATE * curvature @ after.flatten()).reshape(2, 2)


@pytest.mark.parametrize("options", [{}, {"mixed_mode": True}, {"recompute": 1}])
@pytest.mark.parametrize("outer", ["DiCE", "likelihood ratio", "clipped"])
@pytest.mark.parametrize("inner", UNBIASED)
def test_the_meta_gradient_through_dice_is_exact(inner, outer, options):
    ours = grad(meta_loss)(THETA, SURROGATES[inner], SURROGATES[outer], **options)
    torch.testing.assert_close(ours, -grad(adapted_return)(THETA))


@pytest.mark.parametrize("options", [{}, {"mixed_mode": True}])
@pytest.mark.parametrize("outer", ["DiCE", "likelihood ratio", "clipped"])
def test_the_meta_gradient_of_maml_has_the_bias_of_h2(outer, options):
    _, h2, _ = curvature_parts(THETA)
    ours = grad(meta_loss)(THETA, likelihood_ratio, SURROGATES[outer], **options)
    torch.testing.assert_close(ours, -through(h2))
    assert (ours + grad(adapted_return)(THETA)).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"mixed_mode": True}])
@pytest.mark.parametrize("inner", ["low variance", "low variance, baseline", "ratio"])
def test_the_meta_gradient_of_promp_has_the_bias_of_h1_and_h2(inner, options):
    h1, h2, h12 = curvature_parts(THETA)
    ours = grad(meta_loss)(THETA, SURROGATES[inner], clipped, **options)
    torch.testing.assert_close(ours, -through(h1 + h2))
    exact = -grad(adapted_return)(THETA)
    torch.testing.assert_close(exact, -through(h1 + h2 + h12 + h12.mT))
    assert (ours - exact).abs().max() > 0.01


@pytest.mark.parametrize("inner", SURROGATES)
def test_the_first_order_meta_gradient_is_the_gradient_after_adaptation(inner):
    ours = grad(meta_loss)(THETA, SURROGATES[inner], likelihood_ratio, first_order=True)
    torch.testing.assert_close(ours, -through(torch.zeros(4, 4, dtype=torch.float64)))


def test_the_second_derivative_of_the_adapted_return_is_exact_with_dice_inside_and_outside():
    ours = hessian(meta_loss)(THETA, dice, dice)
    torch.testing.assert_close(ours, -hessian(adapted_return)(THETA))


def test_two_inner_steps_of_dice_are_exact():
    def exact(theta):
        for _ in range(2):
            theta = theta + RATE * grad(expected_return)(theta)
        return expected_return(theta)

    def ours(theta):
        inner = partial(expectation, dice)
        return expectation(dice, adapt(inner, theta, optimizer=torchopt.sgd(RATE), num_steps=2).params)

    torch.testing.assert_close(grad(ours)(THETA), -grad(exact)(THETA))


@pytest.mark.parametrize("inner", ["likelihood ratio", "low variance", "DiCE", "loaded DiCE, baseline"])
def test_a_recorded_meta_gradient_is_the_same(inner):
    """⊥ stays a constant for both derivatives when MetaLearner records the operations."""

    def task_loss(theta, scale):
        return scale * meta_loss(theta, SURROGATES[inner], clipped)

    scales, after = f64([1.0, 3.0]), []
    for compile_ in (False, "trace"):
        theta = THETA.clone().requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=0.1)
        MetaLearner(task_loss, theta, outer_optimizer=optimizer, compile=compile_).update(scales)
        after.append(theta.detach())
    torch.testing.assert_close(after[0], after[1])
    expected = THETA - 0.1 * 2 * grad(meta_loss)(THETA, SURROGATES[inner], clipped)
    torch.testing.assert_close(after[0], expected)


def test_vmap_over_tasks_is_a_loop():
    thetas = torch.stack([THETA, -THETA, THETA.flip(0)])
    for inner in (likelihood_ratio, low_variance, dice, loaded):
        of = partial(grad(meta_loss), inner=inner, outer=clipped)
        torch.testing.assert_close(vmap(of)(thetas), torch.stack([of(theta) for theta in thetas]))
