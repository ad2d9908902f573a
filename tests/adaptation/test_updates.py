"""The call of an optimizer's update where nothing differentiates it: the numbers of the call that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch.fx.experimental.proxy_tensor import make_fx
from torchopt.base import GradientTransformation

from ssmrl.adaptation import adapt, clip_by_global_norm, trust_region
from ssmrl.adaptation import updates as module
from ssmrl.adaptation.updates import differentiable_update, plain_update

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: torchopt.sgd(0.1, weight_decay=0.1),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9, dampening=0.5),
    "adam": lambda: torchopt.adam(0.1),
    "adam, other settings": lambda: torchopt.adam(0.1, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.1, maximize=True),
    "adam, eps_root": lambda: torchopt.adam(0.1, eps_root=1e-3),
    "adam, scheduled": lambda: torchopt.adam(torchopt.schedule.polynomial_schedule(0.1, 0.01, 1.0, 5)),
    "adamw": lambda: torchopt.adamw(0.1),
    "scale_by_adam": torchopt.transform.scale_by_adam,
    "adam in a chain": lambda: torchopt.chain(clip_by_global_norm(1.0), torchopt.adam(0.1)),
    "adamax": lambda: torchopt.adamax(0.1),
    "radam": lambda: torchopt.radam(0.1),
    "rmsprop": lambda: torchopt.rmsprop(0.1),
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def trajectory(update, optimizer, gradients):
    """All updates, and the last state, for these gradients in turn."""
    params = torchopt.pytree.tree_map(torch.ones_like, gradients[0])
    state, updates = optimizer.init(params), []
    for step, gradient in enumerate(gradients):
        change, state = update(gradient, state, params, first=step == 0)
        updates.append(change)
    return updates, state


def gradients(dtype=torch.float64, count=6):
    """Trees with a matrix, a vector and a scalar, of sizes that differ by orders of magnitude; some are 0."""
    torch.manual_seed(0)

    def draw(k, *shape):
        return torch.randn(shape, dtype=torch.float64).mul(10.0 ** (2 - k)).relu().to(dtype)

    return [{"w": draw(k, 3, 4), "b": draw(k, 17), "s": draw(k)} for k in range(count)]


@over_optimizers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@torch.no_grad()
def test_the_plain_call_gives_the_numbers_of_the_differentiable_one(make, dtype, tolerance):
    found, expected = (
        trajectory(kind(optimizer), optimizer, gradients(dtype))
        for kind, optimizer in ((plain_update, make()), (differentiable_update, make()))
    )
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (OPTIMIZERS["adam"], 1),
        (OPTIMIZERS["adamw"], 1),
        (OPTIMIZERS["scale_by_adam"], 1),
        (OPTIMIZERS["adam in a chain"], 1),
        (OPTIMIZERS["adam, eps_root"], 0),
        (OPTIMIZERS["adamax"], 0),
        (lambda: torchopt.adam(0.1, use_accelerated_op=True), 0),
    ],
)
@torch.no_grad()
def test_adam_is_one_call_of_a_fused_kernel_where_that_is_the_same(make, times, monkeypatch):
    calls: list[None] = []
    kernel: Any = module.adam  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "adam", lambda *args, **options: calls.append(kernel(*args, **options)))
    optimizer = make()
    trajectory(plain_update(optimizer), optimizer, gradients(count=1))
    assert len(calls) == times


@torch.no_grad()
def test_a_gradient_that_is_not_contiguous_counts_as_its_copy():
    optimizer = torchopt.adam(0.1)
    for gradient in (torch.tensor(2.0).expand(5, 3), torch.arange(15.0).view(3, 5).T, torch.arange(30.0)[::2]):
        found, expected = (trajectory(plain_update(optimizer), optimizer, [g, g]) for g in (gradient, gradient.clone()))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=False)
        assert gradient.sum() == gradient.clone().sum()


@torch.no_grad()
def test_moments_that_are_not_contiguous_are_taken_too():
    weight = torch.randn(4, 3, dtype=torch.float64).T
    optimizer = torchopt.adam(0.1)
    gradient = torch.randn(3, 4, dtype=torch.float64)
    results = []
    for kind in (plain_update, differentiable_update):
        state, update = optimizer.init(weight), kind(optimizer)
        for step in range(3):
            change, state = update(gradient, state, weight, first=step == 0)
        results.append((change, state))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, check_stride=False)


@torch.no_grad()
def test_in_half_precision_adam_stays_torchopt_s_own():
    optimizer = torchopt.adam(0.1)
    tree = gradients(torch.bfloat16)
    found = trajectory(plain_update(optimizer), optimizer, tree)
    with module._ExactValues():
        expected = trajectory(lambda g, s, p, first: optimizer.update(g, s, params=p, inplace=False), optimizer, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_what_is_not_torchopt_s_own_has_its_powers_in_double():
    def correct(updates, state, *, params=None, inplace=True):
        return updates / (1 - 0.999**state), state + 1

    ours: Any = GradientTransformation(lambda params: torch.tensor(1), correct)
    for optimizer, state in ((ours, torch.tensor(1)), (torchopt.chain(ours), torch.tensor(1))):
        change, _ = plain_update(optimizer)(torch.ones(1, dtype=torch.float64), state, None, first=True)
        assert change.item() == pytest.approx(1000.0, rel=1e-12)  # in float32 it is 1000.05


@torch.no_grad()
def test_a_trace_holds_operations_and_no_fused_kernel():
    optimizer = torchopt.adam(0.1)

    def step(gradient):
        return plain_update(optimizer)(gradient, optimizer.init(gradient), gradient, first=True)[0]

    gradient = torch.randn(3)
    graph = make_fx(step)(gradient)
    assert not any("fused" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(gradient), step(gradient))


@over_optimizers
@pytest.mark.parametrize("options", [{}, {"recompute": 2}, {"mixed_mode": True}])
@torch.no_grad()
def test_a_state_that_is_carried_on_is_left_as_it_was(make, options):
    start, optimizer = torch.ones(3, dtype=torch.float64), make()

    def go(state=None, **options):
        return adapt(
            lambda p: p.pow(4).sum(), start, optimizer=optimizer, num_steps=3, optimizer_state=state, **options
        )

    carried = go().optimizer_state
    before = torchopt.pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, carried)
    first, second = go(carried, **options), go(carried)
    torch.testing.assert_close(carried, before, rtol=0, atol=0)
    torch.testing.assert_close(tuple(first), tuple(second), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_dampened_momentum_starts_anew_with_every_fresh_state():
    optimizer = torchopt.chain(clip_by_global_norm(1.0), torchopt.sgd(0.1, momentum=0.9, dampening=0.5))
    first, second = (trajectory(plain_update(optimizer), optimizer, gradients()) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@torch.no_grad()
def test_a_trust_region_after_adam_holds():
    optimizer = torchopt.chain(torchopt.adam(0.1), trust_region(torch.zeros(4), 0.5))
    adapted = adapt(lambda p: -p.sum(), torch.zeros(4), optimizer=optimizer, num_steps=10)
    assert adapted.params.norm().item() == pytest.approx(0.5)
