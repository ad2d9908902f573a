"""Distributions against their formulas, against torch.distributions, and against quadrature."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import distributions
from torch.distributions import transforms
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.utils._pytree import tree_map

from ssmrl.meta_rl import Categorical, Gaussian, TanhGaussian

f64 = partial(torch.tensor, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(policy):
    """The same distribution of torch.distributions."""
    if isinstance(policy, Categorical):
        return distributions.Categorical(logits=policy.logits)
    base: distributions.Distribution
    base = distributions.Normal(policy.mean, policy.log_std.exp().expand(policy.mean.shape))
    if isinstance(policy, TanhGaussian):
        base = distributions.TransformedDistribution(base, [transforms.TanhTransform()])
    return distributions.Independent(base, 1)


def pair(kind, lead=(5, 4)):
    """Two distributions of a kind, noise, and actions of the first."""
    first, second = (
        kind(normal(*lead, 3, seed=s))
        if kind is Categorical
        else kind(normal(*lead, 3, seed=s), 0.3 * normal(*lead, 3, seed=s + 9))
        for s in (1, 2)
    )
    noise = normal(*lead, 3, seed=3)
    return first, second, noise, first.sample(noise)


over_kinds = pytest.mark.parametrize("kind", [Gaussian, TanhGaussian, Categorical])


# By hand.


def test_a_gaussian_by_hand():
    policy = Gaussian(f64([1.0, 2.0]), f64([0.0, math.log(2.0)]))
    # z = [1, -1]: -½ - ½ - log 2 - log 2π
    assert float(policy.log_prob(f64([2.0, 0.0]))) == pytest.approx(-1 - math.log(2) - math.log(2 * math.pi))
    assert float(policy.entropy()) == pytest.approx(math.log(2) + math.log(2 * math.pi) + 1)
    # log ½ + (4 + 1) / 2 - ½ for the second component, 0 for the first
    other = Gaussian(f64([1.0, 1.0]), f64([0.0, 0.0]))
    assert float(policy.kl(other)) == pytest.approx(-math.log(2) + 2.0)
    assert policy.sample(f64([3.0, -1.0])).tolist() == [4.0, 0.0]
    assert policy.mode().tolist() == [1.0, 2.0]


def test_a_categorical_by_hand():
    policy, even = Categorical(f64([math.log(3.0), 0.0])), Categorical(f64([7.0, 7.0]))  # ¾ and ¼; ½ and ½
    assert float(policy.log_prob(torch.tensor(0))) == pytest.approx(math.log(0.75))
    assert float(policy.log_prob(torch.tensor(1))) == pytest.approx(math.log(0.25))
    assert float(even.entropy()) == pytest.approx(math.log(2))
    assert float(policy.kl(even)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert int(policy.mode()) == 0
    assert int(policy.sample(f64([0.0, 1.0]))) == 0
    assert int(policy.sample(f64([0.0, 1.2]))) == 1  # log 3 < 1.2


def test_a_squashed_gaussian_by_hand():
    policy = TanhGaussian(f64([0.0]), f64([0.0]))
    action = math.tanh(0.5)
    expected = -0.125 - 0.5 * math.log(2 * math.pi) - math.log(1 - action**2)
    assert float(policy.log_prob(f64([action]))) == pytest.approx(expected)
    assert float(policy.sample(f64([0.5]))) == pytest.approx(action)
    assert float(TanhGaussian(f64([0.5]), f64([0.0])).mode()) == pytest.approx(action)


# Against others.


@over_kinds
def test_log_probabilities_are_those_of_torch_distributions(kind):
    policy, _, _, action = pair(kind)
    torch.testing.assert_close(policy.log_prob(action), reference(policy).log_prob(action))


@pytest.mark.parametrize("kind", [Gaussian, Categorical])
def test_entropies_are_those_of_torch_distributions(kind):
    policy = pair(kind)[0]
    torch.testing.assert_close(policy.entropy(), reference(policy).entropy())


@over_kinds
def test_divergences_are_those_of_torch_distributions(kind):
    policy, other, _, _ = pair(kind)
    torch.testing.assert_close(policy.kl(other), distributions.kl_divergence(reference(policy), reference(other)))
    torch.testing.assert_close(policy.kl(policy), torch.zeros(5, 4, dtype=torch.float64))


def test_a_squashed_density_integrates_to_1_and_has_its_divergence():
    policy, other = TanhGaussian(f64([0.3]), f64([-0.5])), TanhGaussian(f64([-0.2]), f64([0.1]))
    u = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    a = u.tanh()[:, None]
    density = vmap(policy.log_prob)(a).exp() * (1 - a[:, 0].square())  # da = (1 - a²) du
    assert float(torch.trapezoid(density, u)) == pytest.approx(1, abs=1e-9)
    gap = vmap(policy.log_prob)(a) - vmap(other.log_prob)(a)
    assert float(torch.trapezoid(density * gap, u)) == pytest.approx(float(policy.kl(other)), abs=1e-9)


def test_gumbel_noise_draws_the_probabilities():
    policy, size = Categorical(f64([0.0, 1.0, -1.0, float("-inf")])), 200_000
    uniform = torch.rand(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = Categorical(policy.logits.expand(size, 4)).sample(-(-uniform.log()).log())
    frequency = drawn.bincount(minlength=4) / size
    torch.testing.assert_close(frequency.double(), policy.logits.softmax(-1), atol=0.005, rtol=0)  # 4.5 deviations


# Derivatives and vmap.


def parameters(kind, policy):
    return tuple(p.clone().requires_grad_() for p in policy)


@over_kinds
def test_derivatives_are_finite_differences_to_second_order(kind):
    policy, other, noise, action = pair(kind, (2,))

    def run(*params):
        ours = kind(*params)
        results = [ours.log_prob(action), ours.kl(other), other.kl(ours)]
        if kind is not TanhGaussian:
            results.append(ours.entropy())
        if kind is not Categorical:
            results.append(ours.sample(noise))
        if kind is TanhGaussian:
            results += ours.sample_and_log_prob(noise)
        return tuple(results)

    assert torch.autograd.gradcheck(run, parameters(kind, policy), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, parameters(kind, policy), check_fwd_over_rev=True)


@over_kinds
def test_vmap_of_derivatives_is_a_loop_in_every_mode(kind):
    policy, other, _, action = pair(kind, (5,))

    def run(policy, other, action):
        values = (policy.log_prob(action), policy.kl(other), other.kl(policy))
        return sum(values) if kind is TanhGaussian else sum(values) + policy.entropy()

    for transform in (jacrev, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        of = transform(run)
        mapped = vmap(of)(policy, other, action)
        alone = [of(kind(*(p[i] for p in policy)), kind(*(p[i] for p in other)), action[i]) for i in range(len(action))]
        torch.testing.assert_close(mapped, tree_map(lambda *each: torch.stack(each), *alone))


@over_kinds
def test_a_distribution_comes_back_from_vmap(kind):
    policy, _, noise, action = pair(kind)
    made = vmap(lambda *params: kind(*params))(*policy)
    assert type(made) is kind
    torch.testing.assert_close(vmap(kind.sample)(policy, noise), action)
    torch.testing.assert_close(vmap(kind.log_prob)(policy, action), policy.log_prob(action))


@pytest.mark.parametrize("kind", [Gaussian, TanhGaussian])
def test_one_deviation_serves_all(kind):
    mean, log_std = normal(5, 4, 3), f64([0.1, -0.2, 0.3])
    one, each = kind(mean, log_std), kind(mean, log_std.expand(5, 4, 3))
    action = one.sample(normal(5, 4, 3, seed=1))
    torch.testing.assert_close(one.log_prob(action), each.log_prob(action))
    torch.testing.assert_close(one.kl(each), torch.zeros(5, 4, dtype=torch.float64))
    if kind is Gaussian:
        assert one.entropy().shape == (5, 4)
        torch.testing.assert_close(one.entropy(), each.entropy())


# Where numbers are extreme.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_action_has_a_finite_log_density(dtype):
    policy = TanhGaussian(torch.tensor([3.0], dtype=dtype), torch.tensor([0.0], dtype=dtype))
    assert policy.log_prob(torch.tensor([1.0], dtype=dtype)).isfinite()
    assert policy.log_prob(torch.tensor([-1.0], dtype=dtype)).isfinite()
    # log(1 - tanh² 25) = 2 log 2 - 50, where 1 - tanh² 25 itself is 0
    action, log_prob = policy.sample_and_log_prob(torch.tensor([22.0], dtype=dtype))
    assert float(action) == 1.0
    assert float(log_prob) == pytest.approx(-242 - 0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 50)


def test_both_log_densities_of_a_squashed_action_agree():
    policy, _, noise, _ = pair(TanhGaussian)
    action, log_prob = policy.sample_and_log_prob(noise)
    torch.testing.assert_close(action, policy.sample(noise))
    torch.testing.assert_close(log_prob, policy.log_prob(action))


def test_a_choice_that_is_ruled_out_has_no_part():
    out, full = f64([0.0, 1.0, float("-inf")]), f64([0.0, 1.0])
    policy, without = Categorical(out), Categorical(full)
    torch.testing.assert_close(policy.entropy(), without.entropy())
    # p = (p_0, p_1, 0) against q = softmax(1, 1, 0): the third choice only takes its share of q.
    p, q = full.softmax(-1), f64([1.0, 1.0, 0.0]).softmax(-1)
    divergence = policy.kl(Categorical(f64([1.0, 1.0, 0.0])))
    torch.testing.assert_close(divergence, (p * (p / q[:2]).log()).sum())
    assert float(policy.kl(policy)) == 0
    assert policy.log_prob(torch.tensor(2)) == -math.inf
    assert int(policy.sample(f64([0.0, 0.0, 1e6]))) == 1
    for of in (lambda x: Categorical(x).entropy(), lambda x: Categorical(x).log_prob(torch.tensor(1))):
        torch.testing.assert_close(jacrev(of)(out)[:2], jacrev(of)(full))
        torch.testing.assert_close(hessian(of)(out)[:2, :2], hessian(of)(full))


# Errors.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian(normal(5, 1), f64([0.0])).log_prob(normal(5)), r"`action` must have the shape \(5, 1\)"),
        (lambda: TanhGaussian(normal(5, 1), f64([0.0])).log_prob(normal(5)), r"`action` must have the shape \(5, 1\)"),
        (lambda: Categorical(normal(5, 3)).log_prob(torch.zeros(5, 1).long()), r"`action` must have the shape \(5,\)"),
        (lambda: Categorical(normal(5, 3)).log_prob(torch.zeros(5)), "`action` must hold integers; got torch.float32"),
        (lambda: Gaussian(normal(5, 2), f64([0.0])).sample(normal(2)), r"`noise` must have the shape \(5, 2\)"),
        (lambda: Categorical(normal(5, 2)).sample(normal(2)), r"`noise` must have the shape \(5, 2\)"),
        (lambda: Gaussian(normal(5, 2), f64([0.0])).kl(Gaussian(normal(2), f64([0.0]))), "`other` must have the shape"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_divergence_from_another_kind_is_refused():
    with pytest.raises(TypeError, match="`other` must be a Gaussian; got TanhGaussian"):
        Gaussian(normal(2), normal(2)).kl(TanhGaussian(normal(2), normal(2)))  # type: ignore[arg-type]
