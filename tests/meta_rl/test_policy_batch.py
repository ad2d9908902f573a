"""Batches of policy gradients, their advantages, and the losses of a policy on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from ssmrl.core import GRU
from ssmrl.env_runner import Trajectory
from ssmrl.meta_rl import (
    Categorical,
    CategoricalHead,
    GaussianHead,
    PolicyLosses,
    PolicyModel,
    fit_linear_baseline,
    linear_advantages,
    linear_baseline,
    normalize_advantages,
)


def steps(seed=0, *, episodes=4, length=6):
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(episodes, length + 1, 2, generator=generator, dtype=torch.float64)
    never = torch.zeros(episodes, length, dtype=torch.bool)
    first, last = never.clone(), never.clone()
    first[:, 0] = last[:, -1] = True
    return Trajectory(
        observation[:, :-1],
        torch.randn(episodes, length, 2, generator=generator, dtype=torch.float64),
        torch.randn(episodes, length, generator=generator, dtype=torch.float64),
        observation[:, 1:],
        never,
        last,
        first,
        ~never,
    )


def make(model=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)) if model is None else model
    policy = PolicyModel(model, GaussianHead(2)).double()
    return PolicyLosses(policy), {name: p.detach() for name, p in policy.named_parameters()}


def test_with_lambda_1_an_advantage_is_the_return_minus_the_baseline():
    one = steps()
    gamma, returns = 0.9, torch.zeros(4, 7, dtype=torch.float64)
    for t in reversed(range(6)):
        returns[:, t] = one.reward[:, t] + gamma * returns[:, t + 1]
    time = torch.arange(6).expand(4, 6)
    weights = fit_linear_baseline(one.observation, time, returns[:, :6])
    expected = returns[:, :6] - linear_baseline(weights, one.observation, time)
    torch.testing.assert_close(linear_advantages(one, gamma=gamma, normalize=False), expected)
    torch.testing.assert_close(linear_advantages(one, gamma=gamma), normalize_advantages(expected))


def test_what_is_cut_is_worth_what_the_baseline_says_unless_the_horizon_is_the_task():
    one = steps()
    ends = linear_advantages(one, lam=0.0, normalize=False)
    goes_on = linear_advantages(one, lam=0.0, normalize=False, horizon_ends=False)
    torch.testing.assert_close(ends[:, :-1], goes_on[:, :-1])
    time = torch.arange(6).expand(4, 6)
    returns = torch.zeros(4, 7, dtype=torch.float64)
    for t in reversed(range(6)):
        returns[:, t] = one.reward[:, t] + 0.99 * returns[:, t + 1]
    weights = fit_linear_baseline(one.observation, time, returns[:, :6])
    value = linear_baseline(weights, one.next_observation, time + 1)[:, -1]
    torch.testing.assert_close(goes_on[:, -1] - ends[:, -1], 0.99 * value)


def test_steps_that_are_no_steps_change_nothing():
    one = steps()
    longer = Trajectory(*(torch.cat([leaf, leaf[:, :2]], 1) for leaf in one))
    longer.reward[:, 6:] = longer.observation[:, 6:] = longer.next_observation[:, 6:] = torch.nan
    longer = longer._replace(valid=torch.cat([one.valid, ~one.valid[:, :2]], 1))
    torch.testing.assert_close(linear_advantages(longer)[:, :6], linear_advantages(one))


def test_a_batch_records_the_policy_that_acted():
    losses, params = make()
    one = steps()
    batch = losses.batch(params, one, linear_advantages(one))
    assert batch.x is one.observation
    assert float(losses.divergence(params, batch)) == pytest.approx(0, abs=1e-12)
    other = {name: p + 0.1 for name, p in params.items()}
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (batch.old, losses.distribution(other, batch)))
    )
    torch.testing.assert_close(losses.divergence(other, batch), kl.sum(-1).mean())
    seen = torch.randn(4, 6, 2, dtype=torch.float64)
    assert losses.batch(params, one, batch.advantage, seen).x is seen


def test_the_losses_have_the_same_gradient_at_the_policy_that_acted():
    losses, params = make(GRU(4, 2, 2))
    one = steps()
    batch = losses.batch(params, one, linear_advantages(one))
    reference = grad(losses.likelihood_ratio)(params, batch)
    for loss in (losses.surrogate, losses.low_variance, losses.clipped, losses.dice):
        for name, g in grad(loss)(params, batch).items():
            torch.testing.assert_close(g, reference[name], msg=name)


def test_away_from_it_only_the_surrogates_with_a_ratio_know_that():
    losses, params = make()
    one = steps()
    batch = losses.batch(params, one, linear_advantages(one))
    other = {name: p + 0.3 for name, p in params.items()}
    ratio = (losses.distribution(other, batch).log_prob(batch.action) - losses.old_log_prob(batch)).exp()
    torch.testing.assert_close(losses.surrogate(other, batch), -(ratio * batch.advantage).mean())
    gradients = [grad(loss)(other, batch)["head.log_std"] for loss in (losses.surrogate, losses.low_variance)]
    assert not torch.allclose(*gradients)
    torch.testing.assert_close(gradients[1], grad(losses.likelihood_ratio)(other, batch)["head.log_std"])


def test_dice_with_lambda_0_has_the_curvature_of_the_low_variance_surrogate():
    losses, params = make()
    one = steps()
    batch = losses.batch(params, one, linear_advantages(one))

    def curvature(loss):
        return torch.func.hessian(lambda p: loss({**params, "head.log_std": p}, batch))(params["head.log_std"])

    torch.testing.assert_close(curvature(lambda p, b: losses.dice(p, b, lam=0.0)), curvature(losses.low_variance))
    assert not torch.allclose(curvature(losses.dice), curvature(losses.low_variance))


def test_exploration_makes_what_was_worth_something_likelier():
    losses, params = make()
    one = steps()
    batch = losses.batch(params, one, linear_advantages(one))
    gain = torch.tensor(2.0, dtype=torch.float64)
    expected = -2 * losses.distribution(params, batch).log_prob(batch.action).mean()
    torch.testing.assert_close(losses.exploration(params, batch, gain), expected)


def test_vmap_over_tasks_is_a_loop():
    losses, params = make()
    tasks = [steps(seed) for seed in range(3)]
    stacked = Trajectory(*(torch.stack(leaves) for leaves in zip(*tasks, strict=True)))
    together = vmap(lambda one: losses.batch(params, one, linear_advantages(one)))(stacked)
    for n, one in enumerate(tasks):
        alone = losses.batch(params, one, linear_advantages(one))
        torch.testing.assert_close(together.advantage[n], alone.advantage)
        torch.testing.assert_close(together.old.mean[n], alone.old.mean)


def test_entropy_is_that_of_the_policy():
    policy = PolicyModel(nn.Linear(2, 3), CategoricalHead(3)).double()
    losses, one = PolicyLosses(policy), steps()
    one = one._replace(action=torch.zeros(4, 6, dtype=torch.int64))
    params = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}
    batch = losses.batch(params, one, linear_advantages(one))
    assert isinstance(batch.old, Categorical)
    torch.testing.assert_close(losses.entropy(params, batch), -torch.tensor(3.0, dtype=torch.float64).log())
