"""Surrogates by hand and by their identities; test_meta_policy_gradients.py has their expectations."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.func import grad, hessian, vmap

from ssmrl.meta_rl import (
    Categorical,
    Gaussian,
    clipped_surrogate_loss,
    dice_loss,
    discounted_returns,
    entropy_bonus,
    importance_ratio,
    kl_penalty,
    likelihood_ratio_loss,
    loaded_dice_loss,
    magic_box,
    masked_mean,
    surrogate_loss,
)

f64 = partial(torch.tensor, dtype=torch.float64)


def mask(text):
    return torch.tensor([c == "1" for c in text], dtype=torch.bool)


LOG2 = math.log(2)
OLD = f64([-1.0, -1.0, -1.0, -1.0])
NEW = OLD + f64([LOG2, -LOG2, LOG2, -LOG2])  # ratios 2, ½, 2, ½
A = f64([1.0, 1.0, -1.0, -1.0])
NO = mask("0000")


# By hand.


def test_masked_means_by_hand():
    x = f64([1.0, 2.0, float("nan"), 6.0])
    assert float(masked_mean(x, mask("1101"))) == 3.0
    assert float(masked_mean(x, mask("1101"), denominator=2)) == 4.5
    assert float(masked_mean(x, mask("1101"), denominator=f64(2.0))) == 4.5
    assert float(masked_mean(x[:2])) == 1.5
    assert float(masked_mean(x, NO)) == 0.0
    assert float(masked_mean(f64([]))) == 0.0


def test_importance_ratios_by_hand():
    torch.testing.assert_close(importance_ratio(NEW, OLD), f64([2.0, 0.5, 2.0, 0.5]))
    torch.testing.assert_close(importance_ratio(NEW, OLD, mask("1001")), f64([2.0, 1.0, 1.0, 0.5]))


def test_the_likelihood_ratio_loss_by_hand():
    advantage = f64([1.0, 2.0, 3.0, 4.0])
    assert float(likelihood_ratio_loss(OLD, advantage)) == 2.5
    assert float(likelihood_ratio_loss(OLD, advantage, mask("0110"))) == 2.5
    assert float(likelihood_ratio_loss(OLD, advantage, mask("0110"), denominator=10)) == 0.5
    assert grad(likelihood_ratio_loss)(OLD, advantage).tolist() == (-advantage / 4).tolist()


def test_the_surrogate_loss_by_hand():
    assert float(surrogate_loss(NEW, OLD, f64([1.0, 2.0, 3.0, 4.0]))) == pytest.approx(-(2 + 1 + 6 + 2) / 4)
    assert float(surrogate_loss(NEW, None, f64([1.0, 2.0, 3.0, 4.0]))) == pytest.approx(-10 / 4)


def test_the_clipped_surrogate_by_hand():
    # Only what makes the objective worse is not clipped: min(2, 1.2), min(½, 0.8), min(-2, -1.2), min(-½, -0.8)
    each = vmap(partial(clipped_surrogate_loss, clip=0.2))(*(x[:, None] for x in (NEW, OLD, A)))
    torch.testing.assert_close(each, -f64([1.2, 0.5, -2.0, -0.8]))
    # and only that has a gradient
    slope = grad(partial(clipped_surrogate_loss, clip=0.2, denominator=1))(NEW, OLD, A)
    torch.testing.assert_close(slope, -f64([0.0, 0.5, -2.0, 0.0]))
    assert float(clipped_surrogate_loss(NEW, OLD, A, clip=2.0)) == pytest.approx(float(surrogate_loss(NEW, OLD, A)))


def test_the_magic_box_by_hand():
    w = f64(3.0)
    assert float(magic_box(w)) == 1
    derivative = lambda w: magic_box(w) * w.square()  # noqa: E731
    # (e^(w - ⊥w) w²)' = w² + 2w, '' = w² + 4w + 2
    assert float(grad(derivative)(w)) == 15
    assert float(grad(grad(derivative))(w)) == 23


def test_the_dice_loss_by_hand():
    reward, log_prob = f64([1.0, 2.0, 4.0, 8.0]), f64([-1.0, -2.0, -3.0, -4.0])
    run = partial(dice_loss, log_prob, reward, gamma=0.5)
    assert float(run(None, NO, mask("0001"))) == -(1 + 1 + 1 + 1)
    assert float(run(None, mask("0101"), NO)) == -(1 + 1 + 4 + 4) / 2  # two episodes
    assert float(run(None, mask("0101"), NO, denominator=10)) == -1.0
    after = f64([9.0, 16.0, 9.0, 32.0])
    assert float(run(after, NO, mask("0101"))) == -(1 + 1 + 4 + 4 + 4 + 8) / 2  # + ¼ 16 and ¼ 32
    assert float(run(after, mask("0101"), NO)) == -5.0
    # d/dlog π_t = -γ^t G_t, and - γ^t (G_t - b_t) with a baseline
    slope = grad(lambda x: dice_loss(x, reward, None, mask("0001"), NO, gamma=0.5))(log_prob)
    assert slope.tolist() == [-4.0, -3.0, -2.0, -1.0]
    b = f64([1.0, 1.0, 1.0, 1.0])
    slope = grad(lambda x: dice_loss(x, reward, None, mask("0001"), NO, gamma=0.5, baseline=b))(log_prob)
    assert slope.tolist() == [-3.0, -2.5, -1.75, -0.875]
    # d²/dlog π_t dlog π_u = - the discounted rewards from max(t, u) on
    curvature = hessian(lambda x: dice_loss(x, reward, None, mask("0001"), NO, gamma=0.5))(log_prob)
    later = torch.maximum(torch.arange(4)[:, None], torch.arange(4))
    torch.testing.assert_close(curvature, (later - 4).double())


def test_the_loaded_dice_loss_by_hand():
    log_prob, advantage = f64([-1.0, -2.0, -3.0]), f64([1.0, 2.0, 4.0])
    no = mask("000")

    def run(x, lam, ends=no):
        return loaded_dice_loss(x, advantage, ends, no, gamma=0.5, lam=lam)

    assert float(run(log_prob, 0.5)) == 0
    assert grad(run)(log_prob, 0.5).tolist() == [-1.0, -1.0, -1.0]  # - γ^t A_t
    # - γ^t A_t (∂w_t/∂i ∂w_t/∂j - ∂v_t/∂i ∂v_t/∂j), w_t = Σ λ^(t-i) log π_i and v_t = w_t - log π_t
    expected = -f64([[1.0, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 1.0]])
    torch.testing.assert_close(hessian(run)(log_prob, 0.5), expected)
    # Two episodes: nothing goes from one to the other, t starts anew, and the sum is halved.
    torch.testing.assert_close(hessian(run)(log_prob, 0.5, mask("100")).diagonal(), -f64([0.5, 1.0, 1.0]))
    assert hessian(run)(log_prob, 0.5, mask("100"))[0, 1:].tolist() == [0.0, 0.0]


def test_bonus_and_penalty_by_hand():
    even, odd = Categorical(f64([[0.0, 0.0], [0.0, 50.0]])), Categorical(f64([[0.0, math.log(3)], [0.0, 50.0]]))
    assert float(entropy_bonus(even)) == pytest.approx(-LOG2 / 2)
    assert float(entropy_bonus(even, mask("10"))) == pytest.approx(-LOG2)
    assert float(entropy_bonus(even, mask("10"), denominator=4)) == pytest.approx(-LOG2 / 4)
    # KL(old ‖ new), old even: ½ log(½ / ¼) + ½ log(½ / ¾); the other way round it is another number.
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_penalty(odd, even)) == pytest.approx(expected / 2)
    assert float(kl_penalty(odd, even, mask("10"))) == pytest.approx(expected)
    assert float(kl_penalty(odd, even, mask("11"), denominator=1)) == pytest.approx(expected)
    assert float(kl_penalty(even, odd, mask("10"))) != pytest.approx(expected)


# Identities.


def steps(num_rows=3, num_steps=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    log_prob, old, advantage, after = torch.randn(4, num_rows, num_steps, dtype=torch.float64, generator=g)
    end = torch.rand(num_rows, num_steps, generator=g) < 0.25
    terminated = end & (torch.rand(num_rows, num_steps, generator=g) < 0.5)
    valid = torch.cat([torch.ones(num_rows, 1, dtype=torch.bool), ~end[:, :-1]], 1)
    valid[0, 7:] = False
    return log_prob, old, advantage, after, terminated, end & ~terminated, valid


def clipped(x, old, a, after, terminated, truncated, valid, **options):
    return clipped_surrogate_loss(x, old, a, valid, clip=0.3, **options)


def ratio(x, old, a, after, terminated, truncated, valid, **options):
    return surrogate_loss(x, old, a, valid, **options)


def low_variance(x, old, a, after, terminated, truncated, valid, **options):
    return surrogate_loss(x, None, a, valid, **options)


def likelihood(x, old, a, after, terminated, truncated, valid, **options):
    return likelihood_ratio_loss(x, a, valid, **options)


def dice(x, old, a, after, terminated, truncated, valid, gamma=0.9, **options):
    return dice_loss(x, a, after, terminated, truncated, valid, gamma=gamma, baseline=old, **options)


def loaded(x, old, a, after, terminated, truncated, valid, gamma=0.9, **options):
    return loaded_dice_loss(x, a, terminated, truncated, valid, gamma=gamma, lam=0.7, **options)


LOSSES = [clipped, ratio, low_variance, likelihood, dice, loaded]
over_losses = pytest.mark.parametrize("loss", LOSSES)


@over_losses
def test_vmap_of_derivatives_is_a_loop(loss):
    tasks = [torch.stack(x) for x in zip(steps(seed=0), steps(seed=1), strict=True)]
    for transform in (lambda f: f, grad, hessian):
        mapped = vmap(transform(loss))(*tasks)
        for i in range(2):
            torch.testing.assert_close(mapped[i], transform(loss)(*(x[i] for x in tasks)))


@over_losses
def test_a_task_is_the_sum_of_its_rows(loss):
    data = steps()
    rows = vmap(partial(loss, denominator=5.0))(*data)
    torch.testing.assert_close(loss(*data, denominator=5.0), rows.sum())


@over_losses
def test_episodes_in_a_row_are_episodes_apart(loss):
    *data, terminated, truncated, valid = (x[1] for x in steps(num_steps=25, seed=4))
    ends = ((terminated | truncated) & valid).nonzero().flatten().tolist()
    assert len(ends) > 3
    start, total = 0, 0.0
    pieces = []
    for end in ends:
        pieces.append(slice(start, end + 1))
        start = end + 2  # behind the dummy step
    pieces.append(slice(start, 25))
    masks = (terminated, truncated, valid)

    def apart(x):
        return sum(
            loss(x[p], *(d[p] for d in data[1:]), *(m[p] for m in masks), denominator=1.0)
            for p in pieces
            if x[p].numel()
        )

    def whole(x):
        return loss(x, *data[1:], *masks, denominator=1.0)

    total = whole(data[0])
    torch.testing.assert_close(total, apart(data[0]))
    torch.testing.assert_close(grad(whole)(data[0]), grad(apart)(data[0]))
    torch.testing.assert_close(hessian(whole)(data[0]), hessian(apart)(data[0]))


@over_losses
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_invalid_steps_contribute_nothing_whatever_they_hold(loss, junk):
    *data, terminated, truncated, valid = steps()
    bad = [torch.where(valid, x, junk) for x in data]
    masks = (terminated, truncated, valid)
    for transform in (lambda f: f, grad, hessian):
        torch.testing.assert_close(transform(loss)(*bad, *masks), transform(loss)(*data, *masks))


@pytest.mark.parametrize("loss", [dice, loaded])
def test_dice_differentiates_in_the_discount_whatever_invalid_steps_hold(loss):
    *data, terminated, truncated, valid = steps()
    bad = [torch.where(valid, x, torch.nan) for x in data]

    def slope(gamma, data):
        return grad(lambda x: loss(x, *data[1:], terminated, truncated, valid, gamma=gamma))(data[0]).square().sum()

    gamma = f64(0.9).requires_grad_()
    assert torch.autograd.gradcheck(partial(slope, data=data), gamma)
    torch.testing.assert_close(grad(slope)(gamma, bad), grad(slope)(gamma, data))
    of_loss = grad(lambda gamma: loss(*bad, terminated, truncated, valid, gamma=gamma))(f64(0.9))
    assert of_loss.isfinite()


@over_losses
def test_they_differentiate_in_the_advantage_too(loss):
    """So that what makes it can be learned."""
    data = steps()
    of_advantage = grad(loss, argnums=2)(*data)
    assert of_advantage.isfinite().all()
    assert (of_advantage[~data[-1]] == 0).all()
    # The value of loaded DiCE is 0 whatever the advantage; the derivative of its derivative is not.
    mixed = grad(lambda a: grad(loss)(*data[:2], a, *data[3:]).square().sum())(data[2])
    assert mixed.abs().sum() > 0


@pytest.mark.parametrize("loss", [dice, loaded])
def test_without_a_denominator_dice_is_the_mean_over_episodes(loss):
    data = steps()
    terminated, truncated, valid = data[-3:]
    begins = int(valid[:, 0].sum())
    for row in range(len(valid)):
        for t in range(1, valid.shape[1]):
            before = valid[row, t - 1] and not (terminated[row, t - 1] or truncated[row, t - 1])
            begins += bool(valid[row, t] and not before)
    slope = partial(grad(loss), *data)
    torch.testing.assert_close(slope(), slope(denominator=float(begins)))


def test_the_value_of_dice_is_minus_the_mean_discounted_return():
    log_prob, _, reward, after, terminated, truncated, valid = steps(num_rows=1, seed=2)
    returns = discounted_returns(reward, after, terminated, truncated, gamma=0.9, valid=valid)
    begins = torch.cat([valid[:, :1], valid[:, 1:] & ~valid[:, :-1]], 1)  # a dummy step is before every episode
    value = dice_loss(log_prob, reward, after, terminated, truncated, valid, gamma=0.9)
    torch.testing.assert_close(value, -returns[begins].mean())


def test_at_the_policy_that_acted_the_surrogates_have_one_gradient():
    log_prob, _, advantage, _, terminated, truncated, valid = steps()
    options = {"denominator": 1.0}
    expected = grad(likelihood_ratio_loss)(log_prob, advantage, valid, **options)
    for other in (
        lambda x: surrogate_loss(x, None, advantage, valid, **options),
        lambda x: surrogate_loss(x, log_prob, advantage, valid, **options),
        lambda x: clipped_surrogate_loss(x, log_prob, advantage, valid, **options),
        lambda x: loaded_dice_loss(x, advantage, terminated, truncated, valid, gamma=1.0, lam=0.3, **options),
    ):
        torch.testing.assert_close(grad(other)(log_prob), expected)


def test_loaded_dice_with_lambda_0_is_the_low_variance_surrogate():
    log_prob, _, advantage, _, terminated, truncated, valid = steps()

    def dice(x):
        return loaded_dice_loss(x, advantage, terminated, truncated, valid, gamma=1.0, lam=0, denominator=3.0)

    def other(x):
        return surrogate_loss(x, None, advantage, valid, denominator=3.0)

    for order in (grad, hessian, lambda f: hessian(lambda x: grad(f)(x).square().sum())):
        torch.testing.assert_close(order(dice)(log_prob), order(other)(log_prob))


def test_loaded_dice_with_lambda_1_has_the_derivatives_of_dice():
    log_prob, _, reward, after, terminated, truncated, valid = steps()
    returns = discounted_returns(reward, after, terminated, truncated, gamma=0.9, valid=valid)

    def ours(x):
        return loaded_dice_loss(x, returns, terminated, truncated, valid, gamma=0.9)

    def other(x):
        return dice_loss(x, reward, after, terminated, truncated, valid, gamma=0.9)

    for order in (grad, hessian, lambda f: hessian(lambda x: grad(f)(x).square().sum())):
        torch.testing.assert_close(order(ours)(log_prob), order(other)(log_prob))


def test_losses_of_a_policy_differentiate_in_its_parameters():
    noise = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old = Gaussian(torch.zeros(4, 2, dtype=torch.float64), f64([0.0, 0.0]))

    def loss(shift):
        policy = Gaussian(old.mean + shift, old.log_std - shift)
        clipped = clipped_surrogate_loss(policy.log_prob(old.sample(noise)), old.log_prob(old.sample(noise)), A)
        return clipped + 0.1 * entropy_bonus(policy) + 0.5 * kl_penalty(policy, old)

    assert torch.autograd.gradcheck(loss, f64([0.05, -0.03]).requires_grad_())
    assert torch.autograd.gradgradcheck(loss, f64([0.05, -0.03]).requires_grad_())


def test_float32_stays_float32():
    data = [x.float() if x.is_floating_point() else x for x in steps()]
    for loss in LOSSES:
        assert loss(*data).dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_mean(A, NO[:2]), "`valid` must have the shape"),
        (lambda: masked_mean(A, denominator=0), "denominator must be > 0; got 0"),
        (lambda: importance_ratio(NEW, OLD[:3]), "`old_log_prob` must have the shape"),
        (lambda: likelihood_ratio_loss(NEW[:, None], A), r"`advantage` must have the shape .* \(4, 1\) of `log_prob`"),
        (lambda: surrogate_loss(NEW, OLD, A[:3]), "`advantage` must have the shape"),
        (lambda: surrogate_loss(NEW, OLD[:3], A), "`old_log_prob` must have the shape"),
        (lambda: clipped_surrogate_loss(NEW, OLD, A[:3]), "`advantage` must have the shape"),
        (lambda: clipped_surrogate_loss(NEW, OLD, A, clip=0), "clip must be > 0; got 0"),
        (lambda: dice_loss(NEW, A[:3], None, NO, NO), "`reward` must have the shape"),
        (lambda: dice_loss(NEW, A, None, NO, NO.long()), "`truncated` must be Bool"),
        (lambda: dice_loss(NEW, A, None, NO, NO, baseline=A[:3]), "`baseline` must have the shape"),
        (lambda: dice_loss(NEW, A, None, NO, NO, gamma=2), r"gamma must be in \[0, 1\]; got 2"),
        (lambda: loaded_dice_loss(NEW, A, NO, NO[:2]), "`truncated` must have the shape"),
        (lambda: loaded_dice_loss(NEW, A, NO, NO, gamma=2), r"gamma must be in \[0, 1\]; got 2"),
        (lambda: loaded_dice_loss(NEW, A, NO, NO, lam=2), r"lam must be in \[0, 1\]; got 2"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
