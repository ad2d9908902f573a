"""The inner loop against hand-computed values, torch.optim, finite differences and loops over tasks."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torchopt import pytree

from ssmrl.adaptation import adapt

# TorchOpt's moments use an operation that torch.func maps with a slow fallback, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

f64 = partial(torch.tensor, dtype=torch.float64)


def scheduled_adam(lr):
    rate = torchopt.transform.scale_by_schedule(lambda count: -lr / (1.0 + count))
    return torchopt.chain(torchopt.transform.scale_by_adam(eps_root=1e-6), rate)


OPTIMIZERS: dict[str, Any] = {
    "sgd": torchopt.sgd,
    "sgd with weight decay": partial(torchopt.sgd, weight_decay=0.1),
    "sgd with a schedule": lambda lr: torchopt.sgd(lambda count: lr / (1.0 + count)),
    "momentum": partial(torchopt.sgd, momentum=0.9),
    "nesterov": partial(torchopt.sgd, momentum=0.9, nesterov=True),
    "adam": partial(torchopt.adam, eps_root=1e-6),
    "adamw": partial(torchopt.adamw, eps_root=1e-6),
    "adamax": torchopt.adamax,
    "radam": torchopt.radam,
    "rmsprop": torchopt.rmsprop,
    "adagrad": torchopt.adagrad,
    "adadelta": torchopt.adadelta,
    "chain of adam and a schedule": scheduled_adam,
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def copied(tree):
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def identical(ours, theirs):
    leaves, others = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def regression(seed=0):
    """A small two-layer network in float64: its parameters, 3 tasks of 4 rows each, and its loss on one task."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)

    def loss(p, x, y):
        return (functional_call(model, p, (x,)) - y).square().mean()

    return params, x, y, loss


def squared_distance(target):
    return lambda theta: (theta - target).square().sum()


def test_two_sgd_steps_on_a_parabola_by_hand():
    # d/dθ (θ - 3)² = 2(θ - 3): θ = 1 has gradient -4, so θ = 1 + 0.25·4 = 2 has -2, so θ = 2.5.
    adapted = adapt(squared_distance(3.0), f64(1.0), optimizer=torchopt.sgd(0.25), num_steps=2)
    assert adapted.params == 2.5
    assert adapted.losses.tolist() == [4.0, 1.0]


def test_two_momentum_steps_on_a_parabola_by_hand():
    # v = -4, θ = 2; then v = 0.5·(-4) - 2 = -4, θ = 3.
    adapted = adapt(squared_distance(3.0), f64(1.0), optimizer=torchopt.sgd(0.25, momentum=0.5), num_steps=2)
    assert adapted.params == 3.0
    assert adapted.losses.tolist() == [4.0, 1.0]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_the_derivative_through_k_sgd_steps_on_a_parabola_by_hand(num_steps):
    # θ_K - c = (1 - 2α)^K (θ_0 - c)
    derivative = grad(
        lambda theta: adapt(squared_distance(3.0), theta, optimizer=torchopt.sgd(0.1), num_steps=num_steps).params
    )
    close(derivative(f64(1.0)), f64(0.8**num_steps))


@over_optimizers
def test_zero_steps_are_the_identity(make):
    params, x, y, loss = regression()
    adapted = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=make(0.1), num_steps=0)
    assert identical(adapted.params, params)
    assert adapted.losses.shape == (0,)


@over_optimizers
def test_zero_steps_return_a_state_to_start_from(make):
    params, x, y, loss = regression()
    go = partial(adapt, lambda p: loss(p, x[0], y[0]), params, optimizer=make(0.1))
    start = go(num_steps=0).optimizer_state
    assert identical(go(num_steps=2, optimizer_state=start), go(num_steps=2))
    carried = go(num_steps=2).optimizer_state
    assert identical(go(num_steps=0, optimizer_state=carried).optimizer_state, carried)


@pytest.mark.parametrize("make", [m for m in OPTIMIZERS.values() if m is not scheduled_adam])
def test_rate_zero_is_the_identity(make):
    params, x, y, loss = regression()
    adapted = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=make(0.0), num_steps=3)
    assert identical(adapted.params, params)


@over_optimizers
def test_every_optimizer_lowers_the_loss(make):
    params, x, y, loss = regression()
    losses = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=make(0.01), num_steps=4).losses
    assert (losses[1:] < losses[:-1]).all()


@pytest.fixture
def float64_by_default():
    """TorchOpt's Adam corrects its bias in the default dtype: in float32 the first step is off by 3e-5."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torchopt.sgd(0.1), partial(torch.optim.SGD, lr=0.1)),
        (torchopt.sgd(0.1, weight_decay=0.3), partial(torch.optim.SGD, lr=0.1, weight_decay=0.3)),
        (torchopt.sgd(0.1, momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        (torchopt.sgd(0.1, momentum=0.9, nesterov=True), partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
        (torchopt.adam(0.1), partial(torch.optim.Adam, lr=0.1)),
        (torchopt.adamw(0.1, weight_decay=0.3), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)),
        (torchopt.rmsprop(0.1), partial(torch.optim.RMSprop, lr=0.1)),
    ],
    ids=["sgd", "weight decay", "momentum", "nesterov", "adam", "adamw", "rmsprop"],
)
def test_five_steps_equal_torch_optim(ours, theirs):
    params, x, y, loss = regression()
    adapted = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=ours, num_steps=5)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = theirs(leaves.values())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(leaves, x[0], y[0])
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    close(adapted.params, {name: p.detach() for name, p in leaves.items()}, tolerance=1e-10)
    close(adapted.losses, torch.stack(losses), tolerance=1e-10)


@over_optimizers
def test_it_changes_nothing_that_it_is_given(make):
    params, x, y, loss = regression()
    optimizer = make(0.1)
    state = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=optimizer, num_steps=2).optimizer_state
    before = copied((params, state, x, y))
    go = partial(adapt, lambda p: loss(p, x[1], y[1]), params, optimizer=optimizer, num_steps=3, optimizer_state=state)
    first = copied(go())
    assert identical((params, state, x, y), before)
    assert identical(go(), first)


@over_optimizers
def test_two_calls_that_carry_the_optimizer_state_equal_one(make):
    params, x, y, loss = regression()
    go = partial(adapt, lambda p: loss(p, x[0], y[0]), optimizer=make(0.05))
    whole = go(params, num_steps=5)
    first = go(params, num_steps=2)
    second = go(first.params, num_steps=3, optimizer_state=first.optimizer_state)
    assert identical(second.params, whole.params)
    assert identical(second.optimizer_state, whole.optimizer_state)
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)


def test_losses_are_those_before_each_step():
    params, x, y, loss = regression()
    go = partial(adapt, lambda p: loss(p, x[0], y[0]), params, optimizer=torchopt.sgd(0.1))
    before_each = [loss(go(num_steps=k).params, x[0], y[0]) for k in range(4)]
    assert torch.equal(go(num_steps=4).losses, torch.stack(before_each))


@over_optimizers
def test_vmap_over_tasks_with_shared_params_equals_a_loop(make):
    params, x, y, loss = regression()
    optimizer = make(0.1)

    def query_loss(p, x, y):
        adapted = adapt(lambda q: loss(q, x[:2], y[:2]), p, optimizer=optimizer, num_steps=3)
        return loss(adapted.params, x[2:], y[2:]), adapted.params, adapted.losses

    mapped = vmap(query_loss, in_dims=(None, 0, 0))(params, x, y)
    each = [query_loss(params, x[i], y[i]) for i in range(3)]
    close(mapped, pytree.tree_map(lambda *leaves: torch.stack(leaves), *each))
    meta_gradient = grad(lambda p: vmap(query_loss, in_dims=(None, 0, 0))(p, x, y)[0].mean())(params)
    loop = grad(lambda p: sum(query_loss(p, x[i], y[i])[0] for i in range(3)) / 3)(params)
    close(meta_gradient, loop, tolerance=1e-10)


@over_optimizers
def test_vmap_with_shared_optimizer_state_equals_a_loop(make):
    params, x, y, loss = regression()
    optimizer = make(0.1)
    state = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=optimizer, num_steps=2).optimizer_state

    def carried_on(x, y):
        go = partial(adapt, lambda p: loss(p, x, y), params, optimizer=optimizer, optimizer_state=state)
        return go(num_steps=3).params

    each = [carried_on(x[i], y[i]) for i in range(3)]
    close(vmap(carried_on)(x, y), pytree.tree_map(lambda *leaves: torch.stack(leaves), *each))


@pytest.mark.parametrize("shared", ["nothing", "params", "data", "state", "params and data"])
def test_vmap_over_any_of_params_data_and_optimizer_state_equals_a_loop(shared):
    params, x, y, loss = regression()
    optimizer = OPTIMIZERS["adam"](0.1)
    many: dict[str, Tensor] = {name: torch.stack([p, p + 0.1, p - 0.2]) for name, p in params.items()}

    def run(p, state, x, y):
        return adapt(lambda q: loss(q, x, y), p, optimizer=optimizer, num_steps=2, optimizer_state=state)

    states = vmap(run, in_dims=(0, None, 0, 0))(many, None, x, y).optimizer_state
    data_axis = None if "data" in shared else 0
    axes: Any = (None if "params" in shared else 0, None if shared == "state" else 0, data_axis, data_axis)
    args = (many, states, x, y)
    given = [arg if axis == 0 else pytree.tree_map(lambda t: t[0], arg) for arg, axis in zip(args, axes, strict=True)]
    mapped = vmap(run, in_dims=axes)(*given)
    for i in range(3):
        one = [pytree.tree_map(lambda t: t[i], a) if axis == 0 else a for a, axis in zip(given, axes, strict=True)]  # noqa: B023
        close(pytree.tree_map(lambda t: t[i], mapped), run(*one))  # noqa: B023


def central_differences(function, at, step=1e-6):
    result = torch.zeros_like(at)
    for i in range(at.numel()):
        offset = torch.zeros_like(at).view(-1)
        offset[i] = step
        offset = offset.view_as(at)
        result.view(-1)[i] = (function(at + offset) - function(at - offset)) / (2 * step)
    return result


@over_optimizers
def test_the_derivative_through_the_steps_equals_finite_differences(make):
    params, x, y, loss = regression()
    optimizer = make(0.1)

    def after(first_layer):
        start = {**params, "0.weight": first_layer}
        return loss(adapt(lambda q: loss(q, x[0], y[0]), start, optimizer=optimizer, num_steps=3).params, x[1], y[1])

    close(grad(after)(params["0.weight"]), central_differences(after, params["0.weight"]), tolerance=1e-6)


def test_what_the_loss_closes_over_is_differentiated():
    params, x, y, loss = regression()

    def after(weights):
        def weighted(p):
            return weights[0] * loss(p, x[0], y[0]) + weights[1] * p["2.bias"].square().sum()

        return loss(adapt(weighted, params, optimizer=OPTIMIZERS["adam"](0.1), num_steps=3).params, x[1], y[1])

    close(grad(after)(f64([1.0, 0.5])), central_differences(after, f64([1.0, 0.5])), tolerance=1e-6)


def test_a_carried_optimizer_state_is_differentiated():
    params, x, y, loss = regression()
    optimizer = torchopt.sgd(0.1, momentum=0.9)
    state = adapt(lambda p: loss(p, x[0], y[0]), params, optimizer=optimizer, num_steps=1).optimizer_state
    leaves, structure = pytree.tree_flatten(state)

    def after(moment):
        carried = pytree.tree_unflatten(structure, [moment, *leaves[1:]])
        go = partial(adapt, lambda p: loss(p, x[0], y[0]), params, optimizer=optimizer, num_steps=2)
        return loss(go(optimizer_state=carried).params, x[1], y[1])

    close(grad(after)(leaves[0]), central_differences(after, leaves[0]), tolerance=1e-6)


@over_optimizers
def test_first_order_changes_the_derivative_and_not_the_value(make):
    params, x, y, loss = regression()
    go = partial(adapt, lambda p: loss(p, x[0], y[0]), optimizer=make(0.1), num_steps=3)
    assert identical(go(params, first_order=True), go(params))
    derivative = jacrev(lambda w: go({**params, "0.bias": w}, first_order=True).params["0.bias"])(params["0.bias"])
    decay = {"sgd with weight decay": 0.1, "adamw": 0.01}.get(
        next(name for name, m in OPTIMIZERS.items() if m is make), 0.0
    )
    close(derivative, (1 - 0.1 * decay) ** 3 * torch.eye(3, dtype=torch.float64))


class _Weights(NamedTuple):
    a: Tensor
    b: Any


@pytest.mark.parametrize(
    "params",
    [
        f64([1.0, 2.0]),
        (f64(1.0), f64([2.0])),
        [f64(1.0), {"x": f64([2.0])}],
        OrderedDict(b=f64(1.0), a=f64(2.0)),
        _Weights(f64(1.0), (f64([2.0, 3.0]),)),
    ],
    ids=["tensor", "tuple", "list of dict", "OrderedDict", "NamedTuple"],
)
def test_params_are_any_pytree_and_keep_their_structure(params):
    def loss(p: Any) -> Tensor:
        return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(p)]).sum()

    adapted = adapt(loss, params, optimizer=torchopt.sgd(0.25), num_steps=1).params
    assert type(adapted) is type(params)
    assert identical(adapted, pytree.tree_map(lambda leaf: 0.5 * leaf, params))


@settings(max_examples=20, deadline=None)
@given(
    theta=st.lists(st.floats(-10, 10), min_size=1, max_size=4),
    rate=st.floats(0, 1),
    steps=st.integers(0, 6),
    split=st.integers(0, 6),
)
def test_any_split_of_sgd_steps_follows_the_closed_form(theta, rate, steps, split):
    start, split = f64(theta), min(split, steps)
    go = partial(adapt, squared_distance(1.0), optimizer=torchopt.sgd(rate))
    first = go(start, num_steps=split)
    second = go(first.params, num_steps=steps - split, optimizer_state=first.optimizer_state)
    close(second.params, 1 + (1 - 2 * rate) ** steps * (start - 1), tolerance=1e-9)


@pytest.mark.parametrize(
    "optimizer", [None, 0.1, torchopt.SGD([torch.zeros(1)], 0.1), torch.optim.SGD([torch.zeros(1)], 0.1), torchopt.sgd]
)
def test_what_is_no_gradient_transformation_is_refused(optimizer):
    with pytest.raises(TypeError, match=r"optimizer must be a TorchOpt gradient transformation, .* got \w+\."):
        adapt(squared_distance(1.0), f64(0.0), optimizer=optimizer, num_steps=1)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps must be >= 0; got -1"):
        adapt(squared_distance(1.0), f64(0.0), optimizer=torchopt.sgd(0.1), num_steps=-1)


def test_steps_that_are_no_integer_are_refused():
    with pytest.raises(TypeError, match=r"num_steps must be an integer >= 0; got 1\.5"):
        adapt(squared_distance(1.0), f64(0.0), optimizer=torchopt.sgd(0.1), num_steps=1.5)  # type: ignore[arg-type]


# Where nothing is differentiated, autograd alone makes the gradients.


@over_optimizers
def test_without_grad_mode_the_numbers_are_the_same(make):
    params, x, y, loss = regression()
    go = partial(adapt, optimizer=make(0.1))
    expected = go(lambda p: loss(p, x[0], y[0]), params, num_steps=4)
    learned: dict[str, Tensor] = {name: nn.Parameter(p) for name, p in params.items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        for start in (params, learned):
            with context:
                found = go(lambda p: loss(p, x[0], y[0]), start, num_steps=4)
                first = go(lambda p, x, y: loss(p, x, y), start, x[0], y[0], num_steps=1)
                rest = go(
                    lambda p: loss(p, x[0], y[0]), first.params, num_steps=3, optimizer_state=first.optimizer_state
                )
            for result in (found, rest):
                close((result.params, result.optimizer_state), (expected.params, expected.optimizer_state))
            close(found.losses, expected.losses)
            leaves: list[Any] = pytree.tree_leaves(found)  # type: ignore[arg-type]
            assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert all(p.grad is None for p in learned.values())


@over_optimizers
def test_without_grad_mode_it_changes_nothing_that_it_is_given(make):
    params, x, y, loss = regression()
    with torch.no_grad():
        go = partial(adapt, lambda p: loss(p, x[0], y[0]), optimizer=make(0.1), num_steps=2)
        state = go(params).optimizer_state
        before = copied((params, state, x, y))
        go(params, optimizer_state=state)
    assert identical((params, state, x, y), before)
    assert not any(p.requires_grad for p in params.values())


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"recompute": 1}, {"mixed_mode": True}])
def test_without_grad_mode_every_option_gives_the_same_numbers(options):
    params, x, y, loss = regression()
    go = partial(adapt, loss, params, x[0], y[0], optimizer=OPTIMIZERS["adam"](0.1), num_steps=3)
    with torch.no_grad():
        found = go(**options)
    close((found.params, found.losses), (go().params, go().losses))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transforms_without_grad_mode_see_what_they_see_with_it(mode):
    params, x, y, loss = regression()

    def after(p, x, y):
        return loss(adapt(lambda q: loss(q, x, y), p, optimizer=torchopt.adam(0.1), num_steps=2).params, x, y)

    mapped = vmap(after, in_dims=(None, 0, 0))
    for function in (mapped, lambda p, x, y: grad(lambda p: mapped(p, x, y).sum())(p)):
        expected = function(params, x, y)
        with mode():
            close(function(params, x, y), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_loss_that_does_not_depend_on_the_params_leaves_them(mode):
    elsewhere = f64(3.0).requires_grad_()
    go = partial(adapt, params={"a": f64([1.0, 2.0]), "b": f64(1.0)}, optimizer=torchopt.sgd(0.5), num_steps=2)
    for loss in (lambda p: f64(3.0), lambda p: elsewhere * 1.0, lambda p: p["a"].detach().sum()):
        with mode():
            adapted = go(loss)
        assert adapted.losses.tolist() == [3.0, 3.0]
        assert {name: p.tolist() for name, p in adapted.params.items()} == {"a": [1.0, 2.0], "b": 1.0}
    with mode():  # one of two: a = 1 and 2 go by -0.5 · 1, twice, and b stays
        adapted = go(lambda p: p["a"].sum() * 1.0)
    assert {name: p.tolist() for name, p in adapted.params.items()} == {"a": [0.0, 1.0], "b": 1.0}


@over_optimizers
def test_without_grad_mode_params_that_a_loss_does_not_use_have_gradient_zero(make):
    # Not none: weight decay, for one, moves them.
    go = partial(adapt, params={"a": f64([1.0, 2.0]), "b": f64(1.0)}, optimizer=make(0.1), num_steps=3)
    expected = go(lambda p: p["a"].square().sum())
    with torch.no_grad():
        found = go(lambda p: p["a"].square().sum())
    close((found.params, found.optimizer_state), (expected.params, expected.optimizer_state))


def test_what_else_a_loss_depends_on_gets_no_gradient():
    elsewhere = f64(3.0).requires_grad_()
    with torch.no_grad():
        adapted = adapt(lambda p: elsewhere * p.square(), f64(1.0), optimizer=torchopt.sgd(0.1), num_steps=2)
    close(adapted.params, f64((1 - 2 * 3.0 * 0.1) ** 2))
    assert elsewhere.grad is None


@pytest.mark.parametrize("what", ["data", "params"])
def test_without_grad_mode_tensors_that_inference_mode_made_are_taken(what):
    # A rollout under inference mode, and adaptation outside it; with grad mode it works.
    with torch.inference_mode():
        made = f64([1.0, 2.0])
    data, params = (made, f64([0.5, 0.5])) if what == "data" else (f64([1.0, 2.0]), made)
    go = partial(adapt, lambda p: (p * data).square().sum(), params, optimizer=torchopt.sgd(0.1), num_steps=2)
    expected = go().params
    with torch.no_grad():
        close(go().params, expected)


@pytest.mark.parametrize(
    "mode",
    [torch.enable_grad, torch.no_grad],
)
def test_a_loss_with_an_axis_is_refused(mode):
    with mode(), pytest.raises(RuntimeError, match=r"[Ee]xpected .*scalar"):
        adapt(lambda p: p.square().sum()[None], f64([1.0]), optimizer=torchopt.sgd(0.1), num_steps=1)
