"""MetaLearner: the outer loop for any loss of meta-parameters on a task."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ssmrl.adaptation import learning_rates, mse_loss, scale_by_learning_rates
from ssmrl.meta_rl import MetaLearner, post_adaptation_loss

SGD = partial(torch.optim.SGD, lr=1.0)
randn = partial(torch.randn, dtype=torch.float64)


def line(params, x, y):
    return mse_loss(x @ params["w"] + params["b"], y)


def meta_sgd(meta, task):
    """MAML on a line, with learned rates."""
    optimizer = scale_by_learning_rates(meta["rates"])
    support, query = (task["x"][:3], task["y"][:3]), (task["x"][3:], task["y"][3:])
    return post_adaptation_loss(line, meta["params"], support, query, optimizer=optimizer, num_steps=2)


def problem():
    torch.manual_seed(0)
    params = {"w": nn.Parameter(randn(2, 1)), "b": nn.Parameter(randn(1))}
    meta = {"params": params, "rates": learning_rates(params, 0.1, per_element=True)}
    return meta, {"x": randn(5, 6, 2), "y": randn(5, 6, 1)}


def leaves(meta):
    return [*meta["params"].values(), *meta["rates"].values()]


def gradients(meta, tasks):
    """Of the mean over tasks, by PyTorch alone."""
    losses = [meta_sgd(meta, {name: t[i] for name, t in tasks.items()}) for i in range(len(tasks["x"]))]
    mean = torch.stack(losses).mean()
    return float(mean.detach()), torch.autograd.grad(mean, leaves(meta))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": 5}, {"compile": "trace"}], ids=str)
def test_an_update_descends_the_exact_gradient_in_every_meta_parameter(options):
    meta, tasks = problem()
    before = [p.detach().clone() for p in leaves(meta)]
    loss, expected = gradients(meta, tasks)
    learner = MetaLearner(meta_sgd, meta, outer_optimizer=SGD(leaves(meta)), **options)
    torch.testing.assert_close(learner.losses(tasks).mean().item(), loss)
    assert learner.update(tasks) == pytest.approx(loss)
    for p, b, g in zip(leaves(meta), before, expected, strict=True):
        assert g.norm() > 1e-6
        torch.testing.assert_close(b - p.detach(), g, rtol=1e-10, atol=1e-12)
        assert p.grad is None


def test_the_gradient_is_clipped_to_its_norm():
    meta, tasks = problem()
    before = [p.detach().clone() for p in leaves(meta)]
    MetaLearner(meta_sgd, meta, outer_optimizer=SGD(leaves(meta)), max_grad_norm=0.1).update(tasks)
    square = sum(float((b - p.detach()).square().sum()) for b, p in zip(before, leaves(meta), strict=True))
    assert square**0.5 == pytest.approx(0.1, rel=1e-4)


def test_the_default_is_adam_at_the_outer_rate():
    meta, tasks = problem()
    before = meta["params"]["w"].detach().clone()
    MetaLearner(meta_sgd, meta, outer_lr=0.01).update(tasks)
    moved = (meta["params"]["w"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-4, atol=0)


def test_a_loss_that_is_not_finite_names_its_tasks_and_changes_nothing():
    meta, tasks = problem()
    before = [p.detach().clone() for p in leaves(meta)]
    tasks["y"][3] = 1e200
    with pytest.raises(FloatingPointError, match=r"not finite for tasks \[3\]"):
        MetaLearner(meta_sgd, meta).update(tasks)
    assert all(torch.equal(p, b) for p, b in zip(leaves(meta), before, strict=True))


def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing():
    root = nn.Parameter(torch.zeros(2))
    learner = MetaLearner(lambda meta, task: meta["root"].sqrt().sum() + 0 * task.sum(), {"root": root})
    with pytest.raises(FloatingPointError, match=r"meta-gradient is not finite .* \['leaf 0'\]"):
        learner.update(torch.zeros(3, 1))
    assert not root.any()


@pytest.mark.parametrize(
    "tasks", [{"x": torch.zeros(2, 1), "y": torch.zeros(3, 1)}, torch.zeros(0, 2), torch.zeros(()), {"x": 3.0}, {}]
)
def test_tasks_that_do_not_agree_are_refused(tasks):
    meta, _ = problem()
    with pytest.raises(ValueError, match="tasks must be a pytree of tensors with an axis of the same N >= 1"):
        MetaLearner(meta_sgd, meta).update(tasks)


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ({"w": torch.zeros(2)}, {}, ValueError, r"leaf tensors that require a gradient.* one of shape \(2,\) that is not"),
    ({"w": 1.0}, {}, ValueError, "leaf tensors that require a gradient"),
    ({}, {}, ValueError, "meta_params must hold at least one tensor"),
    (None, {"outer_lr": -1.0}, ValueError, "outer_lr must be finite and >= 0"),
    (None, {"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1; got 0"),
    (None, {"chunk_size": 1.5}, TypeError, "chunk_size must be an integer"),
    (None, {"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be finite and >= 0"),
    (None, {"compile": "fast"}, ValueError, 'compile must be True, False or "trace"'),
    (None, {"outer_optimizer": 3}, TypeError, "outer_optimizer must be a torch.optim.Optimizer; got int"),
    (None, {"outer_optimizer": SGD([nn.Parameter(torch.zeros(1))])}, ValueError, "it holds none"),
]


@pytest.mark.parametrize(("meta", "options", "error", "message"), BAD)
def test_bad_settings_are_refused(meta, options, error, message):
    meta = problem()[0] if meta is None else meta
    with pytest.raises(error, match=message):
        MetaLearner(meta_sgd, meta, **options)


def test_an_outer_optimizer_of_more_than_the_meta_parameters_is_refused():
    meta, _ = problem()
    optimizer = SGD([*leaves(meta), nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="outer_optimizer must hold no tensors but those of meta_params"):
        MetaLearner(meta_sgd, meta, outer_optimizer=optimizer)


def test_a_task_loss_that_is_no_scalar_is_refused():
    learner = MetaLearner(lambda meta, task: meta["w"] * task, {"w": nn.Parameter(torch.ones(5))})
    with pytest.raises(ValueError, match=r"task_loss must return a scalar for a task; got shape \(5,\)"):
        learner.update(torch.zeros(3, 5))
