"""MAML for policies: the meta-gradient through inner steps on data of their own, against the same thing written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import nn
from torch.func import grad, vmap

from ssmrl.core import StateSpaceModel
from ssmrl.meta_rl import CategoricalHead, GaussianHead, PolicyBatch, PolicyLosses, PolicyModel
from ssmrl.meta_rl.policy_maml import adapt_policy, policy_meta_loss

KINDS = ("gaussian", "categorical", "recurrent")


def make(kind, *, seed=0):
    torch.manual_seed(seed)
    if kind == "gaussian":
        policy = PolicyModel(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), GaussianHead(2, log_std=-0.3))
    elif kind == "categorical":
        policy = PolicyModel(nn.Linear(3, 4), CategoricalHead(4))
    else:
        policy = PolicyModel(StateSpaceModel(4, 3, 2, hidden_dim=6), GaussianHead(2))
    policy = policy.double()
    return policy, PolicyLosses(policy), {name: p.detach() for name, p in policy.named_parameters()}


def batch_of(policy, losses, params, seed, *, episodes=3, steps=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(episodes, steps, 3, generator=generator, dtype=torch.float64)
    reset = torch.zeros(episodes, steps, dtype=torch.bool)
    reset[:, 0] = reset[0, 3] = True
    valid = torch.ones(episodes, steps, dtype=torch.bool)
    valid[1, 4] = False
    advantage = torch.randn(episodes, steps, generator=generator, dtype=torch.float64)
    empty = PolicyBatch(x, None, reset, valid, advantage, ())  # type: ignore[arg-type]
    old = losses.distribution(params, empty)
    if isinstance(policy.head, CategoricalHead):
        action = torch.randint(4, (episodes, steps), generator=generator)
    else:
        action = old.sample(torch.randn(episodes, steps, 2, generator=generator, dtype=torch.float64))
    old = type(old)(*(leaf.detach() for leaf in old))
    return empty._replace(action=action.detach(), old=old)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", ["surrogate", "clipped", "likelihood_ratio"])
def test_the_meta_gradient_is_that_of_steps_written_out(kind, outer):
    policy, losses, params = make(kind)
    batches = [batch_of(policy, losses, params, seed) for seed in range(3)]
    optimizer = torchopt.sgd(0.1)
    ours = grad(
        lambda p: policy_meta_loss(losses.likelihood_ratio, getattr(losses, outer), p, batches, optimizer=optimizer)
    )(params)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    adapted = dict(leaves)
    for batch in batches[:-1]:
        loss = losses.likelihood_ratio(adapted, batch)
        gradients = torch.autograd.grad(loss, [*adapted.values()], create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(adapted.items(), gradients, strict=True)}
    by_hand = torch.autograd.grad(getattr(losses, outer)(adapted, batches[-1]), [*leaves.values()])
    for (name, got), expected in zip(ours.items(), by_hand, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_agrees_with_finite_differences(kind):
    policy, losses, params = make(kind)
    batches = [batch_of(policy, losses, params, seed) for seed in range(2)]

    def loss(*leaves):
        p = dict(zip(params, leaves, strict=True))
        return policy_meta_loss(
            losses.surrogate,
            losses.surrogate,
            p,
            batches,
            optimizer=torchopt.sgd(0.2),
            before=lambda at, batch, k: 0.5 * losses.divergence(at, batch),
        )

    leaves = [p.clone().requires_grad_() for p in params.values()]
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-6)


def test_vmap_over_tasks_is_a_loop():
    policy, losses, params = make("gaussian")
    of_tasks = [[batch_of(policy, losses, params, 10 * n + k) for k in range(2)] for n in range(3)]
    stacked = [
        torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *step) for step in zip(*of_tasks, strict=True)
    ]

    def meta(batches):
        return policy_meta_loss(losses.likelihood_ratio, losses.surrogate, params, batches, optimizer=torchopt.sgd(0.1))

    torch.testing.assert_close(vmap(meta)(stacked), torch.stack([meta(batches) for batches in of_tasks]))


def test_what_is_added_before_the_steps_is_the_mean_over_them():
    policy, losses, params = make("gaussian")
    moved = {name: p + 0.1 for name, p in params.items()}
    batches = [batch_of(policy, losses, params, seed) for seed in range(3)]
    settings: dict[str, Any] = {"optimizer": torchopt.sgd(0.1)}
    weights = (0.5, 2.0)
    plain = policy_meta_loss(losses.surrogate, losses.surrogate, moved, batches, **settings)
    after = adapt_policy(losses.surrogate, moved, batches[:1], **settings)
    expected = (0.5 * losses.divergence(moved, batches[0]) + 2.0 * losses.divergence(after, batches[1])) / 2
    penalised = policy_meta_loss(
        losses.surrogate,
        losses.surrogate,
        moved,
        batches,
        before=lambda at, batch, k: weights[k] * losses.divergence(at, batch),
        **settings,
    )
    torch.testing.assert_close(penalised - plain, expected)
    assert float(expected) > 0
    assert float(losses.divergence(params, batches[0])) == pytest.approx(0, abs=1e-12)


def test_only_the_parameters_named_adapt_and_all_have_a_meta_gradient():
    policy, losses, params = make("gaussian")
    batches = [batch_of(policy, losses, params, seed) for seed in range(2)]
    settings: dict[str, Any] = {"optimizer": torchopt.sgd(0.5), "adapted": ["model.2.weight", "head.log_std"]}
    adapted = adapt_policy(losses.likelihood_ratio, params, batches[:1], **settings)
    changed = {name for name in params if not torch.equal(adapted[name], params[name])}
    assert changed == set(settings["adapted"])
    assert adapted.keys() == params.keys()

    def meta_loss(p):
        return policy_meta_loss(losses.likelihood_ratio, losses.surrogate, p, batches, **settings)

    gradient = grad(meta_loss)(params)
    assert all(float(g.abs().max()) > 0 for g in gradient.values())
    name, step = "model.0.weight", 1e-6
    bump = torch.zeros_like(params[name])
    bump[0, 0] = step
    up, down = (meta_loss({**params, name: params[name] + sign * bump}) for sign in (1, -1))
    torch.testing.assert_close(gradient[name][0, 0], (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_an_inner_step_raises_the_likelihood_of_what_was_better():
    policy, losses, params = make("categorical")
    batch = batch_of(policy, losses, params, 0)
    better = batch._replace(advantage=(batch.action == 1).double())
    adapted = adapt_policy(losses.likelihood_ratio, params, [better], optimizer=torchopt.sgd(1.0))
    one = torch.ones_like(batch.action)
    before, after = (losses.distribution(p, batch).log_prob(one)[batch.valid].mean() for p in (params, adapted))
    assert after > before


def test_first_order_cuts_the_second_derivative():
    policy, losses, params = make("gaussian")
    batches = [batch_of(policy, losses, params, seed) for seed in range(2)]

    def gradient(**options):
        return grad(
            lambda p: policy_meta_loss(
                losses.likelihood_ratio, losses.surrogate, p, batches, optimizer=torchopt.sgd(0.5), **options
            )
        )(params)

    exact, cut = gradient(), gradient(first_order=True)
    adapted = adapt_policy(losses.likelihood_ratio, params, batches[:1], optimizer=torchopt.sgd(0.5))
    by_hand = grad(losses.surrogate)(adapted, batches[1])
    assert any(not torch.allclose(exact[name], cut[name]) for name in exact)
    for name, expected in by_hand.items():
        torch.testing.assert_close(cut[name], expected)


def test_no_batches_are_refused():
    _, losses, params = make("gaussian")
    with pytest.raises(ValueError, match="at least the batch of the outer loss"):
        policy_meta_loss(losses.surrogate, losses.surrogate, params, [], optimizer=torchopt.sgd(0.1))
