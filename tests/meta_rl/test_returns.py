"""Returns and advantages against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from ssmrl.meta_rl import discounted_returns, generalized_advantages, lambda_returns, normalize_advantages

f64 = partial(torch.tensor, dtype=torch.float64)


def mask(text):
    return torch.tensor([c == "1" for c in text], dtype=torch.bool)


R, V, NEXT = f64([1.0, 2.0, 3.0, 4.0]), f64([0.5, 1.0, 1.5, 2.0]), f64([10.0, 20.0, 30.0, 40.0])
NO = mask("0000")


# By hand, γ = ½.


def test_discounted_returns_by_hand():
    run = partial(discounted_returns, R, gamma=0.5)
    assert run(None, NO, NO).tolist() == [3.25, 4.5, 5.0, 4.0]
    assert run(NEXT, NO, NO).tolist() == [5.75, 9.5, 15.0, 24.0]  # the row is cut: 4 + ½ 40
    assert run(NEXT, mask("0001"), NO).tolist() == [3.25, 4.5, 5.0, 4.0]
    assert run(NEXT, NO, mask("0001")).tolist() == [5.75, 9.5, 15.0, 24.0]


def test_returns_stop_at_the_end_of_an_episode():
    run = partial(discounted_returns, R, NEXT, gamma=0.5)
    assert run(mask("0101"), NO).tolist() == [2.0, 2.0, 5.0, 4.0]
    assert run(mask("0001"), mask("0100")).tolist() == [7.0, 12.0, 5.0, 4.0]  # 2 + ½ 20
    assert run(mask("0101"), mask("0100")).tolist() == [2.0, 2.0, 5.0, 4.0]  # an end of both kinds is a termination


def test_lambda_returns_by_hand():
    # G_3 = 4; G_2 = 3 + ½ (½ 30 + ½ 4); G_1 = 2 + ½ 20, truncated; G_0 = 1 + ½ (½ 10 + ½ 12)
    g = lambda_returns(R, NEXT, mask("0001"), mask("0100"), gamma=0.5, lam=0.5)
    assert g.tolist() == [6.5, 12.0, 11.5, 4.0]


def test_generalized_advantages_by_hand():
    # δ = [1 + 5 - ½, 2 + 10 - 1, 3 + 15 - 1½, 4 - 2]; A_2 = 16½ + ¼ 2; A_0 = 5½ + ¼ 11
    a = generalized_advantages(R, V, NEXT, mask("0001"), mask("0100"), gamma=0.5, lam=0.5)
    assert a.tolist() == [8.25, 11.0, 17.0, 2.0]


def test_normalized_advantages_by_hand():
    # mean 2, variance ((-1)² + 0 + 1²) / 3
    a = normalize_advantages(f64([1.0, 2.0, 99.0, 3.0]), mask("1101"))
    torch.testing.assert_close(a, f64([-(1.5**0.5), 0.0, 0.0, 1.5**0.5]))


# Against the definitions.


def by_definition(data, gamma, lam):
    """The λ-return as the λ-weighted mean of n-step returns, and GAE as that of n-step advantages, step by step."""
    reward, value, next_value, terminated, truncated, valid = data
    num_steps = len(reward)
    returns, advantages = [], []
    for t in range(num_steps):
        if not valid[t]:
            returns.append(0.0)
            advantages.append(0.0)
            continue
        n_step, total, last = [], 0.0, t
        for last in range(t, num_steps):
            total += gamma ** (last - t) * reward[last]
            rest = 0.0 if terminated[last] else gamma ** (last - t + 1) * next_value[last]
            n_step.append(total + rest)
            if terminated[last] or truncated[last] or last + 1 == num_steps or not valid[last + 1]:
                break
        weights = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
        returns.append(sum(w * g for w, g in zip(weights, n_step, strict=True)))
        deltas = [reward[k] + (0.0 if terminated[k] else gamma * next_value[k]) - value[k] for k in range(t, last + 1)]
        advantages.append(sum((gamma * lam) ** k * d for k, d in enumerate(deltas)))
    return returns, advantages


@settings(deadline=None, max_examples=60)
@given(
    masks=st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=17),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
def test_they_are_their_definitions(masks, gamma, lam, seed):
    terminated, truncated = (torch.tensor([m[i] == 0 for m in masks]) for i in (0, 1))
    valid = torch.tensor([m[2] > 0 for m in masks])
    r, v, after = torch.randn(3, len(masks), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    data = [x.tolist() for x in (r, v, after, terminated, truncated, valid)]
    expected = by_definition(data, gamma, lam)
    options = {"gamma": gamma, "lam": lam, "valid": valid}
    torch.testing.assert_close(lambda_returns(r, after, terminated, truncated, **options), f64(expected[0]))
    torch.testing.assert_close(generalized_advantages(r, v, after, terminated, truncated, **options), f64(expected[1]))


def rows(num_rows=4, num_steps=23, seed=0):
    """Random rows with ends of both kinds, a dummy step after each, and padding."""
    g = torch.Generator().manual_seed(seed)
    r, v, after = torch.randn(3, num_rows, num_steps, dtype=torch.float64, generator=g)
    end = torch.rand(num_rows, num_steps, generator=g) < 0.2
    terminated = end & (torch.rand(num_rows, num_steps, generator=g) < 0.5)
    valid = torch.cat([torch.ones(num_rows, 1, dtype=torch.bool), ~end[:, :-1]], 1)
    valid[0, 15:] = False
    return r, v, after, terminated, end & ~terminated, valid


# Identities.


def test_lambda_1_is_the_discounted_return():
    r, _, after, terminated, truncated, valid = rows()
    expected = discounted_returns(r, after, terminated, truncated, gamma=0.9, valid=valid)
    torch.testing.assert_close(lambda_returns(r, after, terminated, truncated, gamma=0.9, lam=1, valid=valid), expected)


def test_lambda_0_is_one_step():
    r, v, after, terminated, truncated, valid = rows()
    target = torch.where(valid, r + 0.9 * after * ~terminated, 0)
    torch.testing.assert_close(lambda_returns(r, after, terminated, truncated, gamma=0.9, lam=0, valid=valid), target)
    advantage = generalized_advantages(r, v, after, terminated, truncated, gamma=0.9, lam=0, valid=valid)
    torch.testing.assert_close(advantage, torch.where(valid, target - v, 0))


def test_an_advantage_is_the_lambda_return_minus_the_value_where_the_values_are_those_of_the_next_step():
    r, v, after, terminated, truncated, valid = rows()
    ends = terminated | truncated
    after = torch.where(ends, after, torch.cat([v[:, 1:], after[:, -1:]], 1))
    advantage = generalized_advantages(r, v, after, terminated, truncated, valid=valid)
    expected = lambda_returns(r, after, terminated, truncated, valid=valid) - v
    torch.testing.assert_close(advantage, torch.where(valid, expected, 0))


def test_vmap_is_a_batch_is_a_loop():
    r, v, after, terminated, truncated, valid = rows()

    def run(r, v, after, terminated, truncated, valid):
        return (
            lambda_returns(r, after, terminated, truncated, valid=valid),
            generalized_advantages(r, v, after, terminated, truncated, valid=valid),
            normalize_advantages(r, valid),
        )

    data = (r, v, after, terminated, truncated, valid)
    loop = [torch.stack(x) for x in zip(*(run(*row) for row in zip(*data, strict=True)), strict=True)]
    torch.testing.assert_close(list(vmap(run)(*data)), loop)
    torch.testing.assert_close(list(run(*data)[:2]), loop[:2])


def test_a_row_of_episodes_is_its_episodes_apart():
    r, v, after, terminated, truncated, valid = (x[1] for x in rows(seed=3))
    whole = generalized_advantages(r, v, after, terminated, truncated, valid=valid)
    ends = ((terminated | truncated) & valid).nonzero().flatten().tolist()
    assert len(ends) > 2
    start = 0
    for end in ends:
        part = slice(start, end + 1)
        ours = generalized_advantages(r[part], v[part], after[part], terminated[part], truncated[part])
        torch.testing.assert_close(whole[part], ours)
        start = end + 2  # the dummy step between them
    # Two episodes as one trial: the reward of the second counts for the first.
    trial = discounted_returns(R, None, mask("0001"), NO, gamma=0.5)
    assert trial[0] == discounted_returns(R, None, mask("0101"), NO, gamma=0.5)[0] + 0.25 * trial[2]


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_invalid_steps_contribute_nothing_whatever_they_hold(junk):
    r, v, after, terminated, truncated, valid = rows()
    bad = [torch.where(valid, x, junk) for x in (r, v, after)]
    bad[2] = torch.where(terminated, junk, bad[2])  # nor does the value after a termination
    for x in bad:
        x.requires_grad_()
    gamma = f64(0.9).requires_grad_()
    clean = generalized_advantages(r, v, after, terminated, truncated, gamma=0.9, valid=valid)
    ours = generalized_advantages(bad[0], bad[1], bad[2], terminated, truncated, gamma=gamma, valid=valid)
    torch.testing.assert_close(ours, clean)
    returns = lambda_returns(bad[0], bad[2], terminated, truncated, gamma=gamma, valid=valid)
    torch.testing.assert_close(returns, lambda_returns(r, after, terminated, truncated, gamma=0.9, valid=valid))
    assert (ours[~valid] == 0).all()
    assert (returns[~valid] == 0).all()
    normal = normalize_advantages(bad[0], valid)
    *gradients, of_gamma = torch.autograd.grad((ours + returns + normal).square().sum(), [*bad, gamma])
    assert of_gamma.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[~valid] == 0).all()


def test_ends_flagged_at_invalid_steps_do_not_count():
    r, v, after, terminated, truncated, valid = rows()
    ours = generalized_advantages(r, v, after, terminated | ~valid, truncated | ~valid, valid=valid)
    torch.testing.assert_close(ours, generalized_advantages(r, v, after, terminated, truncated, valid=valid))


def test_they_are_differentiable_in_everything_that_is_floating_point():
    r, v, after, terminated, truncated, valid = (x[:2, :9] for x in rows())
    gamma, lam = f64(0.9), f64(0.7)
    inputs = [x.clone().requires_grad_() for x in (r, v, after, gamma, lam)]

    def run(r, v, after, gamma, lam):
        options = {"gamma": gamma, "lam": lam, "valid": valid}
        a = generalized_advantages(r, v, after, terminated, truncated, **options)
        return a, lambda_returns(r, after, terminated, truncated, **options), normalize_advantages(a, valid)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_normalized_advantages_have_mean_0_and_variance_1_in_every_task():
    r, _, _, _, _, valid = rows()
    tasks = torch.stack([3 * r + 7, r.square()]), valid.expand(2, *valid.shape)
    for a in vmap(normalize_advantages)(*tasks):
        assert float(a[valid].mean()) == pytest.approx(0)
        assert float(a[valid].var(correction=0)) == pytest.approx(1)


def test_equal_advantages_normalize_to_0_with_a_derivative():
    assert normalize_advantages(torch.full((5,), 3.0)).tolist() == [0.0] * 5
    slope = grad(lambda x: normalize_advantages(x).square().sum())(torch.full((5,), 3.0))
    assert slope.tolist() == [0.0] * 5
    assert normalize_advantages(R, NO).tolist() == [0.0] * 4


def test_no_steps_give_nothing():
    empty, no = f64([]), mask("")
    assert generalized_advantages(empty, empty, empty, no, no).shape == (0,)
    assert normalize_advantages(empty).shape == (0,)


def test_float32_stays_float32():
    r, v, after, *masks, valid = (x.float() if x.is_floating_point() else x for x in rows())
    assert generalized_advantages(r, v, after, *masks, valid=valid).dtype is torch.float32
    assert lambda_returns(r, after, *masks, valid=valid).dtype is torch.float32
    assert normalize_advantages(r, valid).dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lambda_returns(R, NEXT[:3], NO, NO), r"`next_value` must have the shape .* = \(4,\) of `reward`"),
        (lambda: generalized_advantages(R, V[:, None], NEXT, NO, NO), r"`value` must have the shape .* got \(4, 1\)"),
        (lambda: discounted_returns(R, None, NO.double(), NO), "`terminated` must be Bool; got torch.float64"),
        (lambda: discounted_returns(R, None, NO, NO, gamma=1.1), r"gamma must be in \[0, 1\]; got 1.1"),
        (lambda: generalized_advantages(R, V, NEXT, NO, NO, lam=-0.1), r"lam must be in \[0, 1\]; got -0.1"),
        (lambda: lambda_returns(R, NEXT, NO, NO, lam=2), r"lam must be in \[0, 1\]; got 2"),
        (lambda: normalize_advantages(R, epsilon=0), "epsilon must be > 0; got 0"),
        (lambda: normalize_advantages(R, NO[:2]), "`valid` must have the shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
