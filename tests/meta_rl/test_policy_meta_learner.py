"""PolicyMAML, and the outer steps of policy_outer: collecting, adapting, learning on a task that can be written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torchopt
from torch import nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from ssmrl.adaptation import learning_rates, scale_by_learning_rates
from ssmrl.core import StateSpaceModel
from ssmrl.meta_rl import (
    Collected,
    GaussianHead,
    GradientOuter,
    NonFinite,
    PolicyBatch,
    PolicyMAML,
    PolicyModel,
    TrustRegionOuter,
    adapt_policy,
    normalize_advantages,
    policy_meta_loss,
    policy_outer,
    trust_region_step,
)

TASKS, EPISODES, STEPS = 4, 6, 3


def make(*, recurrent=False, seed=0):
    torch.manual_seed(seed)
    model = (
        StateSpaceModel(3, 2, 1, hidden_dim=4)
        if recurrent
        else nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    )
    return PolicyModel(model, GaussianHead(1, log_std=-0.5)).double()


def collector(policy, *, seed=0, goals=None):
    """Targets: task n pays -(a - goal_n)²; what is seen says nothing of the goal."""
    goals = torch.linspace(-1, 1, TASKS, dtype=torch.float64) if goals is None else goals

    def collect(params, k):
        generator = torch.Generator().manual_seed(100 * seed + k)
        shape = (len(goals), EPISODES, STEPS)
        x = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(*shape, 1, generator=generator, dtype=torch.float64)
        reset = torch.zeros(shape, dtype=torch.bool)
        reset[..., 0] = True

        def of_task(params, x, noise, reset, goal):
            batch = PolicyBatch(x, None, reset, torch.ones_like(reset), None, ())  # type: ignore[arg-type]
            old = maml.losses.distribution(params, batch)
            action = old.sample(noise)
            reward = -(action[..., 0] - goal).square()
            return batch._replace(action=action, advantage=normalize_advantages(reward), old=old), reward.mean()

        with torch.no_grad():
            return vmap(of_task)(params, x, noise, reset, goals)

    maml = PolicyMAML(policy, torchopt.sgd(0.1))
    return collect


def task_of(collected, n):
    return tuple(tree_map(lambda leaf: leaf[n], batch) for batch in collected.batches)


@pytest.mark.parametrize("recurrent", [False, True])
def test_adaptation_is_that_of_every_task_by_itself(recurrent):
    policy = make(recurrent=recurrent)
    maml = PolicyMAML(policy, torchopt.adam(0.05, eps_root=1e-8), inner_steps=2)
    got = maml.collect(collector(policy), TASKS)
    assert got.returns.shape == (3, TASKS)
    adapted = maml.adapt(got.batches[:2])
    theta = {name: p.detach() for name, p in policy.named_parameters()}
    for n in range(TASKS):
        alone = adapt_policy(
            maml.losses.likelihood_ratio,
            theta,
            task_of(got, n)[:2],
            optimizer=torchopt.adam(0.05, eps_root=1e-8),
        )
        for name, p in alone.items():
            torch.testing.assert_close(adapted[name][n], p, msg=name)


def test_each_batch_is_collected_by_what_the_ones_before_it_gave():
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3), inner_steps=2)
    seen = []

    def collect(params, k):
        seen.append((k, params))
        return collector(policy)(params, k)

    got = maml.collect(collect, TASKS)
    assert [k for k, _ in seen] == [0, 1, 2]
    for k, params in seen[1:]:
        for name, p in maml.adapt(got.batches[:k]).items():
            assert torch.equal(params[name], p)
    assert maml.collect(collect, TASKS, num_steps=0).returns.shape == (1, TASKS)


def test_evaluation_is_what_is_collected_and_its_control_never_adapts():
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3), inner_steps=1)
    got = maml.evaluate(collector(policy), TASKS, num_updates=3)
    assert torch.equal(got.adapted.float(), maml.collect(collector(policy), TASKS, num_steps=3).returns.float())
    off = torch.stack([collector(policy)(maml.stacked(TASKS), k)[1] for k in range(4)])
    torch.testing.assert_close(got.control, off)
    alone = maml.evaluate(collector(policy), TASKS, control=False)
    assert alone.control is None
    assert alone.adapted.shape == (2, TASKS)


@pytest.mark.parametrize("options", [{}, {"divergence_weight": 0.7}, {"exploration_weight": 0.4}])
@pytest.mark.parametrize("compile", [False, "trace"])
def test_an_outer_step_follows_the_gradient_of_the_meta_loss(options, compile):
    policy = make()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    maml = PolicyMAML(policy, torchopt.sgd(0.2), inner_loss=None, inner_steps=2)
    got = maml.collect(collector(policy), TASKS)
    theta = {name: p + 0.05 for name, p in before.items()}  # away from the data, so that the penalty has a gradient
    policy.load_state_dict(theta)
    weights = {"divergence_weight": 0.0, **options}
    sgd = torch.optim.SGD(policy.parameters(), lr=1.0)
    outer = GradientOuter(maml, maml.losses.surrogate, outer_optimizer=sgd, num_steps=1, compile=compile, **weights)
    (loss,) = outer.step(got)
    gain = (got.returns[-1] - got.returns[-1].mean()) / got.returns[-1].std(correction=0)

    def meta_loss(p):
        total = torch.zeros((), dtype=torch.float64)
        for n in range(TASKS):

            def before(at, batch, k, n=n):
                return (
                    weights["divergence_weight"] * maml.losses.divergence(at, batch)
                    - options.get("exploration_weight", 0.0)
                    * (gain[n] * maml.losses.distribution(at, batch).log_prob(batch.action)).mean()
                )

            total = total + policy_meta_loss(
                maml.losses.likelihood_ratio,
                maml.losses.surrogate,
                p,
                task_of(got, n),
                optimizer=torchopt.sgd(0.2),
                before=before,
            )
        return total / TASKS

    expected = grad(meta_loss)(theta)
    assert loss == pytest.approx(float(meta_loss(theta)))
    for name, p in policy.named_parameters():
        torch.testing.assert_close(theta[name] - p.detach(), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_chunks_of_tasks_are_all_of_them():
    policies = [make(), make()]
    for policy, chunk in zip(policies, (None, 3), strict=True):
        maml = PolicyMAML(policy, torchopt.sgd(0.2))
        GradientOuter(maml, outer_lr=0.01, chunk_size=chunk).step(maml.collect(collector(policy), TASKS))
    for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_minibatches_of_tasks_are_steps_one_after_the_other():
    policies = [make(), make()]
    got = PolicyMAML(policies[0], torchopt.sgd(0.2)).collect(collector(policies[0]), TASKS)
    rules = [
        GradientOuter(
            PolicyMAML(policy, torchopt.sgd(0.2)),
            outer_optimizer=torch.optim.SGD(policy.parameters(), lr=0.3),
            num_steps=steps,
            num_minibatches=parts,
        )
        for policy, steps, parts in zip(policies, (2, 1), (2, 1), strict=True)
    ]
    assert len(rules[0].step(got)) == 4
    for _ in range(2):
        for half in (slice(0, 2), slice(2, 4)):
            batches = tree_map(lambda leaf, half=half: leaf[half], got.batches)
            rules[1].step(Collected(batches, got.returns[:, half]))
    for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="`num_minibatches` = 3 must divide the 4 tasks"):
        GradientOuter(PolicyMAML(policies[0], torchopt.sgd(0.2)), num_minibatches=3).step(got)
    with pytest.raises(ValueError, match="`num_minibatches` must be at least 1"):
        GradientOuter(PolicyMAML(policies[0], torchopt.sgd(0.2)), num_minibatches=0)


@pytest.mark.parametrize("outer", ["gradient", "trust region"])
def test_it_learns_to_adapt_where_nothing_can_be_known_before(outer):
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3), inner_loss=None)
    rule = GradientOuter(maml, outer_lr=0.02) if outer == "gradient" else TrustRegionOuter(maml, max_divergence=0.05)
    first = maml.collect(collector(policy, seed=99), TASKS).returns.mean(1)
    for i in range(40):
        rule.step(maml.collect(collector(policy, seed=i), TASKS))
    before, after = maml.collect(collector(policy, seed=99), TASKS).returns.mean(1)
    assert after > before + 0.2
    assert after > first[1] + 0.2


def test_the_trust_region_holds_through_adaptation_and_the_loss_falls():
    policy = make(recurrent=True)
    maml = PolicyMAML(policy, torchopt.sgd(0.3))
    got = maml.collect(collector(policy), TASKS)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    done = TrustRegionOuter(maml, max_divergence=0.02, curvature_share=0.5).step(got)
    assert done.fraction > 0
    assert float(done.loss_after) < float(done.loss)
    settings: dict[str, Any] = {"optimizer": torchopt.sgd(0.3)}
    theta = {name: p.detach() for name, p in policy.named_parameters()}
    assert any(not torch.equal(theta[name], before[name]) for name in theta)
    divergences = [
        policy_meta_loss(maml.losses.likelihood_ratio, maml.losses.divergence, theta, task_of(got, n), **settings)
        for n in range(TASKS)
    ]
    mean = torch.stack(divergences).mean()
    torch.testing.assert_close(mean, done.divergence)
    assert 0 < float(mean) <= 0.02


def test_the_share_of_the_curvature_changes_the_direction():
    after = []
    for share in (1.0, 0.3):
        policy = make()
        maml = PolicyMAML(policy, torchopt.sgd(0.3))
        TrustRegionOuter(maml, curvature_share=share).step(maml.collect(collector(policy), TASKS))
        after.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert not torch.allclose(after[0], after[1])


@pytest.mark.parametrize("inner_steps", [0, 1, 2])
def test_a_share_of_the_curvature_is_that_of_a_divergence_at_its_minimum(monkeypatch, inner_steps):
    """It is from the policies that fewer episodes adapt to: 0 there, and growing in every direction."""
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3), inner_steps=inner_steps)
    seen: list[Any] = []

    def step(loss_fn, divergence_fn, params, *, curvature_fn, **options):
        seen.append((curvature_fn, {name: p.clone() for name, p in params[0].items()}))
        return trust_region_step(loss_fn, divergence_fn, params, curvature_fn=curvature_fn, **options)

    monkeypatch.setattr(policy_outer, "trust_region_step", step)
    outer = TrustRegionOuter(maml, curvature_share=0.3)
    outer.step(maml.collect(collector(policy), TASKS))
    [(curvature, params)] = seen
    at = {name: p.requires_grad_() for name, p in params.items()}
    divergence = curvature((at, []))
    assert float(divergence.detach()) == pytest.approx(0.0, abs=1e-12)
    for slope in torch.autograd.grad(divergence, [*at.values()]):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    for name in at:
        moved = {other: p + 0.01 * (other == name) for other, p in at.items()}
        assert float(curvature((moved, [])).detach()) > 0


@pytest.mark.parametrize("outer", ["gradient", "trust region"])
def test_rates_are_learned(outer):
    policy = make()
    rates = learning_rates(dict(policy.named_parameters()), 0.1)
    maml = PolicyMAML(policy, scale_by_learning_rates(rates))
    assert len(maml.rates) == len(rates)
    rule = GradientOuter(maml, outer_lr=0.01) if outer == "gradient" else TrustRegionOuter(maml)
    rule.step(maml.collect(collector(policy), TASKS))
    assert all(float(rate.detach()) != 0.1 for name, rate in rates.items())


def test_only_what_is_named_adapts():
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3), adapted=policy.model[2])
    got = maml.collect(collector(policy), TASKS)
    adapted = maml.adapt(got.batches[:1])
    theta = dict(policy.named_parameters())
    assert adapted.keys() == theta.keys()
    changed = {name for name, p in adapted.items() if not torch.equal(p[0], theta[name])}
    assert changed == {"model.2.weight", "model.2.bias"}


def test_first_order_is_another_gradient_to_the_same_adaptation():
    after = []
    for first_order in (False, True):
        policy = make()
        maml = PolicyMAML(policy, torchopt.sgd(0.3), first_order=first_order)
        got = maml.collect(collector(policy), TASKS)
        GradientOuter(maml, outer_optimizer=torch.optim.SGD(policy.parameters(), lr=0.1), num_steps=1).step(got)
        after.append((got.returns, torch.cat([p.detach().flatten() for p in policy.parameters()])))
    assert torch.equal(after[0][0], after[1][0])
    assert not torch.allclose(after[0][1], after[1][1])


def test_without_inner_steps_it_is_ppo():
    policy = make()
    other = copy.deepcopy(policy)
    maml = PolicyMAML(policy, torchopt.sgd(0.3), inner_steps=0)
    got = maml.collect(collector(policy), TASKS)
    assert len(got.batches) == 1
    GradientOuter(maml, outer_optimizer=torch.optim.SGD(policy.parameters(), lr=0.5), num_steps=2, clip=0.1).step(got)
    plain = PolicyMAML(other, torchopt.sgd(0.3)).losses
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        params = dict(other.named_parameters())
        torch.stack([plain.clipped(params, task_of(got, n)[0], clip=0.1) for n in range(TASKS)]).mean().backward()
        optimizer.step()
    for a, b in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_that_is_not_finite_leaves_the_policy_alone():
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3))
    got = maml.collect(collector(policy), TASKS)
    bad = got.batches[1]._replace(advantage=torch.full_like(got.batches[1].advantage, torch.nan))
    before = copy.deepcopy(policy.state_dict())
    for rule in (GradientOuter(maml), TrustRegionOuter(maml)):
        with pytest.raises(FloatingPointError, match="finite"):
            rule.step(Collected((got.batches[0], bad), got.returns))
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())


def test_what_is_out_of_range_is_refused():
    policy = make()
    maml = PolicyMAML(policy, torchopt.sgd(0.3))
    with pytest.raises(TypeError, match="inner_optimizer must be a TorchOpt gradient transformation"):
        PolicyMAML(policy, torch.optim.SGD(policy.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        maml.adapt([])
    with pytest.raises(ValueError, match=r"returns of shape \(N,\) = \(4,\); got \(\)"):
        maml.collect(lambda params, k: (None, torch.tensor(0.0)), 4)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        GradientOuter(maml, num_steps=0)
    with pytest.raises(ValueError, match="divergence_weight"):
        GradientOuter(maml, divergence_weight=-1.0)
    with pytest.raises(ValueError, match="`curvature_share` must be above 0"):
        TrustRegionOuter(maml, curvature_share=0.0)
    with pytest.raises(ValueError, match="exploration_weight"):
        TrustRegionOuter(maml, exploration_weight=-1.0)


@pytest.mark.parametrize("kind", ["gradient", "trust region"])
def test_outer_steps_go_on_from_a_saved_state_to_the_same_bits_with_one_left_out(kind):
    nonfinite = NonFinite("skip", at_most=2)

    def start(seed) -> tuple[Any, PolicyMAML, Any]:
        policy = make(seed=seed)
        rates = learning_rates(dict(policy.named_parameters()), 0.1)
        maml = PolicyMAML(policy, torchopt.chain(scale_by_learning_rates(rates)))
        if kind == "trust region":
            return policy, maml, TrustRegionOuter(maml, max_divergence=0.02, nonfinite=nonfinite)
        adam = torch.optim.Adam([*policy.parameters(), *rates.values()], 0.01)
        return policy, maml, GradientOuter(maml, outer_optimizer=adam, num_steps=1, nonfinite=nonfinite)

    def steps(run, numbers):
        policy, maml, outer = run
        for n in numbers:
            collected = maml.collect(collector(policy, seed=n), TASKS)
            if n == 1:
                broken = collected.batches[-1]
                broken = broken._replace(advantage=torch.full_like(broken.advantage, torch.nan))
                collected = collected._replace(batches=(*collected.batches[:-1], broken))
            before = [p.detach().clone() for p in policy.parameters()]
            done = outer.step(collected)
            loss = float(done.loss) if kind == "trust region" else done[0]
            assert math.isnan(loss) == (n == 1)
            assert all(map(torch.equal, before, policy.parameters())) == (n == 1)

    whole, first, second = start(0), start(0), start(1)
    steps(whole, range(4))
    steps(first, range(2))
    second[2].load_state_dict(first[2].state_dict())
    steps(second, range(2, 4))
    assert all(map(torch.equal, whole[0].parameters(), second[0].parameters()))
    assert all(map(torch.equal, whole[1].rates, second[1].rates))
    assert second[2].left_out == whole[2].left_out == 1
