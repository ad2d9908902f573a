"""Losses of a model that is planned with: sums of what they say, right to second order, and one task at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch.func import grad, vmap

from ssmrl import GRU, MLP, StateSpaceModel
from ssmrl.meta_rl import (
    Transitions,
    adaptive_planning_loss,
    dynamics_scales,
    model_step,
    one_step_loss,
    open_loop_loss,
    planning_loss,
)

D, A, T, H = 2, 1, 12, 3
MODELS: dict[str, Any] = {
    "ssm": lambda: StateSpaceModel(4, D + A, D, hidden_dim=6),
    "gru": lambda: GRU(4, D + A, D),
    "mlp": lambda: MLP(D + A, D, hidden_dim=6),
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def recorded(batch=3, seed=0, length=T):
    g = torch.Generator().manual_seed(seed)
    return Transitions(*(torch.randn(batch, length, size, generator=g, dtype=torch.float64) for size in (D, A, D)))


def parts(make=MODELS["ssm"]):
    torch.manual_seed(0)
    model = make().double()
    scales = dynamics_scales(*recorded(9, seed=9))
    step = model_step(model, scales, lambda o, a, n: o[:, 0])
    return model, step, scales, {name: p.detach() for name, p in model.named_parameters()}


def state_after(model, scales, params, data, state=None):
    return one_step_loss(model, scales, params, state, *data)[1]


@over_models
@pytest.mark.parametrize("starts", [(), (0,), (5,), (0, 4, T - H)])
def test_it_is_the_sum_of_its_parts(make, starts):
    model, step, scales, params = parts(make)
    data = recorded()
    found = planning_loss(model, step, scales, params, None, data, starts=starts, horizon=H)
    expected = one_step_loss(model, scales, params, None, *data)[0]
    aheads = []
    for start in starts:
        state = model.init_hidden(3) if start == 0 else state_after(model, scales, params, data.steps(0, start))
        aheads.append(open_loop_loss(step, scales, params, state, *data.steps(start, start + H)))
    if aheads:
        expected = expected + torch.stack(aheads).mean()
    torch.testing.assert_close(found, expected)


def test_the_order_of_starts_is_of_no_account():
    model, step, scales, params = parts()
    losses = [
        planning_loss(model, step, scales, params, None, recorded(), starts=starts, horizon=H)
        for starts in ((2, 7), (7, 2, 7))
    ]
    torch.testing.assert_close(*losses)


@over_models
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("head", [False, True], ids=["all", "head"])
def test_adapted_is_gradient_descent_on_the_window_written_out(make, begin, head):
    model, step, scales, named = parts(make)
    data, end, rate = recorded(1), begin + 4, 0.1
    first = next(iter(named))
    mine = {first: named[first]} if head else named
    shared = {name: p for name, p in named.items() if name not in mine}
    found = adaptive_planning_loss(
        model,
        step,
        scales,
        mine,
        data,
        begin=begin,
        window=4,
        horizon=H,
        optimizer=torchopt.sgd(rate),
        num_steps=2,
        shared=shared,
    )
    state = state_after(model, scales, named, data.steps(0, begin)) if begin else None
    past, future = data.steps(begin, end), data.steps(end, T)
    leaves = {name: p.clone().requires_grad_() for name, p in mine.items()}
    losses = []
    for k in range(3):
        if k != 1:  # before, and after the two steps
            weights = {**shared, **leaves}
            here = state_after(model, scales, weights, past, state)
            losses.append(planning_loss(model, step, scales, weights, here, future, starts=(0,), horizon=H))
        loss, _ = one_step_loss(model, scales, {**shared, **leaves}, state, *past)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        leaves = {
            name: (p - rate * g).detach().requires_grad_() for (name, p), g in zip(leaves.items(), grads, strict=True)
        }
    torch.testing.assert_close(found.unadapted, losses[0])
    torch.testing.assert_close(found.adapted, losses[1])


def test_without_steps_adapted_is_unadapted():
    model, step, scales, params = parts()
    found = adaptive_planning_loss(
        model, step, scales, params, recorded(1), begin=2, window=4, horizon=H, optimizer=torchopt.sgd(0.1), num_steps=0
    )
    assert found.unadapted == found.adapted


def total(model, step, scales, params, data):
    losses = adaptive_planning_loss(
        model, step, scales, params, data, begin=3, window=4, horizon=H, optimizer=torchopt.sgd(0.05), num_steps=2
    )
    return losses.unadapted + losses.adapted


@over_models
def test_the_meta_gradient_is_that_of_finite_differences(make):
    model, step, scales, params = parts(make)
    name = next(name for name in params if name.endswith("bias") or "bias" in name)

    def loss(bias):
        return total(model, step, scales, {**params, name: bias}, recorded(1))

    assert torch.autograd.gradcheck(loss, params[name].clone().requires_grad_())


@over_models
def test_mapped_over_tasks_it_is_a_loop_over_them(make):
    model, step, scales, params = parts(make)
    tasks = recorded(4)

    def one(params, task):
        return total(model, step, scales, params, Transitions(*(leaf[None] for leaf in task)))

    mapped = vmap(grad(one), (None, 0))(params, tasks)
    for n in range(4):
        alone = grad(one)(params, Transitions(*(leaf[n] for leaf in tasks)))
        for name in params:
            torch.testing.assert_close(mapped[name][n], alone[name])


def test_a_start_too_late_and_a_window_too_long_are_refused():
    model, step, scales, params = parts()
    with pytest.raises(ValueError, match="starts must be between 0 and 9: 3 of 12 steps follow; got 10"):
        planning_loss(model, step, scales, params, None, recorded(), starts=(10,), horizon=H)
    sgd = torchopt.sgd(0.1)
    for begin, window in ((0, 10), (6, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"at most the 12 steps .* got {begin} \\+ {window} \\+ 3"):
            adaptive_planning_loss(
                model,
                step,
                scales,
                params,
                recorded(1),
                begin=begin,
                window=window,
                horizon=H,
                optimizer=sgd,
                num_steps=1,
            )
