"""MetaMAML against plain double loops over tasks and steps, finite differences and hand-computed values."""

from __future__ import annotations

import copy
import math
import shutil
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torchopt import pytree

from ssmrl.adaptation import AdaptationConfig, Adapter, learning_rates, mse_loss, scale_by_learning_rates
from ssmrl.core import MLP, LayerNorm, MLPState, StateSpaceModel, Transformer, TransformerState
from ssmrl.meta_rl import MetaMAML, Task

D, O, S, H = 2, 1, 2, 3  # noqa: E741
RATE = 0.1

randn = partial(torch.randn, dtype=torch.float64)
SGD = partial(torch.optim.SGD, lr=1.0)
ignore_slow_vmap = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


# The reference: written from the formulas, one task, one inner step and one time step after the other.


def forward(p, x, h):
    """h_t = MLP(h_{t-1}) + Linear(x_t), y_t = MLP(h_t) + Linear(x_t)."""

    def mlp(name, v):
        v = linear(v, p[f"{name}.hidden.weight"], p[f"{name}.hidden.bias"]).clamp(min=0)
        return linear(v, p[f"{name}.out.weight"], p[f"{name}.out.bias"])

    def step(x_t, h):
        h = mlp("state_mlp", h) + linear(x_t, p["state_input.weight"], p["state_input.bias"])
        return mlp("output_mlp", h) + linear(x_t, p["output_input.weight"], p["output_input.bias"]), h

    if x.dim() == 2:
        return step(x, h)[0]
    outputs = []
    for t in range(x.shape[1]):
        y_t, h = step(x[:, t], h)
        outputs.append(y_t)
    return torch.stack(outputs, 1)


def zeros(x):
    return torch.zeros(x.shape[0], S, dtype=x.dtype)


def mean_square(output, y):
    return ((output - y) ** 2).mean()


def loop(model, tasks, states=None, *, steps=1, first_order=False, forward=forward, loss=mean_square):
    """Query losses after plain SGD on each support set, and the gradient of their mean, by a double Python loop."""
    params = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    learned = {name: p for name, p in params.items() if p.requires_grad}
    losses = []
    for i, (support_x, support_y, query_x, query_y) in enumerate(tasks):
        start = [zeros(x) if states is None else states[i] for x in (support_x, query_x)]
        fast = dict(learned)
        for _ in range(steps):
            value = loss(forward({**params, **fast}, support_x, start[0]), support_y)
            gradients = torch.autograd.grad(value, tuple(fast.values()), create_graph=not first_order)
            fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
        losses.append(loss(forward({**params, **fast}, query_x, start[1]), query_y))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), tuple(learned.values()))
    return torch.stack(losses).detach(), dict(zip(learned, gradients, strict=True))


def meta_gradient(model, tasks, state=None, loss_fn=mse_loss, **options):
    """The loss and the gradient of one `meta_update`: the difference that SGD of rate 1 makes to a copy's weights."""
    model = copy.deepcopy(model)
    before = weights(model)
    options = {"inner_lr": RATE, **options}
    loss = MetaMAML(model, outer_optimizer=SGD(model.parameters()), **options).meta_update(tasks, state, loss_fn)
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def agree(ours, theirs, tolerance=1e-10):
    """Equal in loss, and in the gradient of every parameter, to `tolerance` of its norm."""
    loss, gradient = ours
    losses, reference = theirs
    assert loss == pytest.approx(float(losses.mean()), rel=tolerance)
    assert gradient.keys() == reference.keys()
    for name, g in reference.items():
        assert g.norm() > 1e-6, f"{name} has no gradient, so nothing is compared"
        assert (gradient[name] - g).norm() <= tolerance * g.norm(), name


def draw_task(batch=3, length: int | None = 4, query_batch=None, query_length: int | None = -1):
    query_batch = batch if query_batch is None else query_batch
    query_length = length if query_length == -1 else query_length
    support, query = [(b,) if t is None else (b, t) for b, t in ((batch, length), (query_batch, query_length))]
    return randn(*support, D), randn(*support, O), randn(*query, D), randn(*query, O)


def draw(*shapes, seed=0):
    """A model in float64 and one task of each shape."""
    torch.manual_seed(seed)
    model = StateSpaceModel(S, D, O, hidden_dim=H).double()
    with torch.no_grad():  # so that some units of every ReLU are on, whatever the seed
        model.state_mlp.hidden.bias.copy_(torch.tensor([1.0, 0.3, -0.1]))
        model.output_mlp.hidden.bias.copy_(torch.tensor([1.0, 0.3, -0.1]))
    return model, [draw_task(*shape) for shape in shapes]


def stacked(tasks):
    return tuple(torch.stack(field) for field in zip(*tasks, strict=True))


# The meta-gradient.


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("length", [None, 1, 4], ids=["one step", "sequence of 1", "sequence of 4"])
def test_the_meta_gradient_equals_a_plain_double_loop(length, steps, first_order):
    model, tasks = draw(*3 * [(3, length)])
    state = randn(3, S)
    ours = meta_gradient(model, tasks, state, inner_steps=steps, first_order=first_order)
    agree(ours, loop(model, tasks, 3 * [state], steps=steps, first_order=first_order))


@pytest.mark.parametrize("steps", [1, 5])
def test_first_and_second_order_differ_beyond_the_tolerance(steps):
    model, tasks = draw((3, 4), (3, 4))
    (_, second), (_, first) = (meta_gradient(model, tasks, inner_steps=steps, first_order=o) for o in (False, True))
    assert all((first[name] - second[name]).norm() > 1e-4 * second[name].norm() for name in first)


def finite_differences(maml, tensors, tasks, state=None, step=1e-6):
    """Slopes of evaluate(tasks).mean() in every element of `tensors`, which are changed in place and put back."""
    result = {}
    for name, p in tensors.items():
        flat, slope = p.data.view(-1), torch.empty(p.numel(), dtype=p.dtype)
        for i in range(p.numel()):
            value = flat[i].item()
            ends = []
            for offset in (step, -step):
                flat[i] = value + offset
                ends.append(maml.evaluate(tasks, state).mean().item())
            flat[i] = value
            slope[i] = (ends[0] - ends[1]) / (2 * step)
        result[name] = slope.view_as(p)
    return result


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_meta_gradient_equals_finite_differences_of_the_meta_loss(steps):
    model, tasks = draw((2, 3), (2, 3))
    state = randn(2, S)
    _, gradient = meta_gradient(model, tasks, state, inner_steps=steps)
    slopes = finite_differences(
        MetaMAML(model, inner_lr=RATE, inner_steps=steps), dict(model.named_parameters()), tasks, state
    )
    for name, slope in slopes.items():
        assert (gradient[name] - slope).norm() <= 1e-6 * max(1.0, slope.norm()), name


@ignore_slow_vmap
@pytest.mark.parametrize("make", [partial(torchopt.sgd, momentum=0.9), partial(torchopt.adam, eps_root=1e-6)])
def test_the_meta_gradient_through_any_inner_optimizer_equals_finite_differences(make):
    model, tasks = draw((2, 3), (2, 3))
    options = {"inner_optimizer": make(0.05), "inner_steps": 3}
    _, gradient = meta_gradient(model, tasks, inner_lr=0.01, **options)
    slopes = finite_differences(MetaMAML(model, **options), dict(model.named_parameters()), tasks)
    for name, slope in slopes.items():
        assert (gradient[name] - slope).norm() <= 1e-6 * max(1.0, slope.norm()), name


def test_one_meta_step_of_a_scalar_model_by_hand():
    # y = wx, x = 1. Support target 2: gradient 2(w - 2), so w' = w - 0.5(w - 2) = 1.5 at w = 1 and rate 1/4.
    # Query target 4: loss (1.5 - 4)² = 6.25, d/dw' = -5, dw'/dw = 0.5: second order -2.5, first order -5.
    one = torch.ones(1, 1)
    for first_order, step in ((False, 2.5), (True, 5.0)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        maml = MetaMAML(model, inner_lr=0.25, first_order=first_order, outer_optimizer=SGD(model.parameters()))
        assert maml.meta_update([(one, 2 * one, one, 4 * one)]) == 6.25
        assert model.weight.item() == 1 + step


# Lists, stacks, orders and shapes of tasks.

batches, lengths = st.integers(1, 3), st.none() | st.integers(1, 4)
shapes = st.tuples(batches, lengths, batches, lengths)


@settings(max_examples=15, deadline=None)
@given(
    tasks=st.lists(shapes, min_size=1, max_size=4),
    repeats=st.integers(1, 2),
    steps=st.integers(0, 2),
    first_order=st.booleans(),
    data=st.data(),
)
def test_ragged_tasks_in_any_order_equal_a_loop(tasks, repeats, steps, first_order, data):
    model, drawn = draw(*data.draw(st.permutations(repeats * tasks)), seed=data.draw(st.integers(0, 99)))
    losses, reference = loop(model, drawn, steps=steps, first_order=first_order)
    loss, gradient = meta_gradient(model, drawn, inner_steps=steps, first_order=first_order)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-10)
    for name, g in reference.items():
        assert (gradient[name] - g).norm() <= 1e-10 * max(1.0, g.norm()), name
    each = MetaMAML(model, inner_lr=RATE, inner_steps=steps).evaluate(drawn)
    torch.testing.assert_close(each, losses, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, count=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_a_stack_equals_the_list_in_any_order(shape, count, seed, data):
    model, tasks = draw(*count * [shape], seed=seed)
    order = data.draw(st.permutations(range(count)))
    permuted = [tasks[i] for i in order]
    maml = MetaMAML(model, inner_lr=RATE)
    losses = maml.evaluate(stacked(tasks))
    assert torch.equal(maml.evaluate(tasks), losses)
    torch.testing.assert_close(maml.evaluate(permuted), losses[list(order)], rtol=1e-12, atol=1e-12)
    loss, gradient = meta_gradient(model, stacked(tasks))
    for variant in (tasks, tuple(tasks), permuted, Task(*stacked(permuted))):
        again, other = meta_gradient(model, variant)
        assert again == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-12)


def test_a_ragged_list_equals_its_tasks_one_by_one():
    model, tasks = draw((3, 4), (1, 2, 4, 5), (3, None, 2, 4), (3, 4))
    loss, gradient = meta_gradient(model, tasks)
    each = [meta_gradient(model, [task]) for task in tasks]
    assert loss == pytest.approx(sum(one for one, _ in each) / 4, rel=1e-12)
    mean = {name: torch.stack([g[name] for _, g in each]).mean(0) for name in gradient}
    torch.testing.assert_close(gradient, mean, rtol=1e-10, atol=1e-12)


def test_tasks_may_be_lists_of_four():
    model, tasks = draw((3, 4), (3, 4))
    assert meta_gradient(model, [list(task) for task in tasks])[0] == meta_gradient(model, tasks)[0]


# Initial states.


def test_no_state_means_init_hidden():
    model, tasks = draw((3, 4), (2, 5))
    agree(meta_gradient(model, tasks), loop(model, tasks, [torch.zeros(3, S).double(), torch.zeros(2, S).double()]))


@pytest.mark.parametrize("as_stack", [False, True])
def test_a_state_of_batch_one_is_shared_by_every_row(as_stack):
    model, tasks = draw((3, 4), (3, 4))
    state = randn(1, S)
    ours = meta_gradient(model, stacked(tasks) if as_stack else tasks, state, inner_steps=2)
    agree(ours, loop(model, tasks, 2 * [state.expand(3, S)], steps=2))


def test_a_state_of_batch_one_is_shared_by_tasks_of_every_shape():
    model, tasks = draw((3, 4), (1, 2), (2, None))
    state = randn(1, S)
    agree(meta_gradient(model, tasks, state), loop(model, tasks, [state.expand(b, S) for b in (3, 1, 2)]))


@pytest.mark.parametrize("as_stack", [False, True])
def test_a_state_of_the_tasks_batch_is_shared_by_the_tasks(as_stack):
    model, tasks = draw((3, 4), (3, 4))
    state = randn(3, S)
    ours = meta_gradient(model, stacked(tasks) if as_stack else tasks, state, inner_steps=2)
    agree(ours, loop(model, tasks, 2 * [state], steps=2))


@pytest.mark.parametrize("as_stack", [False, True])
def test_a_state_of_the_sum_is_split_among_the_tasks(as_stack):
    model, tasks = draw((3, 4), (3, 4))
    state = randn(6, S)
    ours = meta_gradient(model, stacked(tasks) if as_stack else tasks, state, inner_steps=2)
    agree(ours, loop(model, tasks, [state[:3], state[3:]], steps=2))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(batches, min_size=2, max_size=5), data=st.data())
def test_a_state_of_the_sum_is_split_among_ragged_tasks_in_their_order(sizes, data):
    lengths_of = data.draw(st.lists(st.integers(1, 2), min_size=len(sizes), max_size=len(sizes)))
    model, tasks = draw(*zip(sizes, lengths_of, strict=True))
    state = randn(sum(sizes), S)
    losses, reference = loop(model, tasks, state.split(sizes))
    loss, gradient = meta_gradient(model, tasks, state)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-10)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


class _Pair(NamedTuple):
    a: Tensor
    b: Tensor


class _Two(nn.Module):
    """A model with two states, of different widths, in a container of any kind; x is (B, D)."""

    def __init__(self, make, parts):
        super().__init__()
        self.make, self.parts = make, parts
        self.linear = nn.Linear(D + O + 2, O)

    def init_hidden(self, batch_size=1):
        zero = partial(torch.zeros, dtype=self.linear.weight.dtype)
        return self.make(zero(batch_size, O), zero(batch_size, 2, 1))

    def forward(self, x, hidden_state):
        a, b = self.parts(hidden_state)
        assert a.shape == (x.shape[0], O)
        assert b.shape == (x.shape[0], 2, 1)
        a = torch.tanh(self.linear(torch.cat([x, a, b.flatten(1)], -1)))
        return a, self.make(a, b + a[:, None])


CONTAINERS: dict[str, Any] = {
    "NamedTuple": (_Pair, tuple),
    "tuple": (lambda a, b: (a, b), tuple),
    "list": (lambda a, b: [a, b], tuple),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda s: (s["a"], s["b"])),
    "nested": (lambda a, b: {"x": (a, [b])}, lambda s: (s["x"][0], s["x"][1][0])),
}


@pytest.mark.parametrize("rows", [None, 1, 3, 6])
@pytest.mark.parametrize(("make", "parts"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_a_state_is_any_container_of_tensors_shared_or_split(make, parts, rows):
    torch.manual_seed(0)
    model = _Two(make, parts).double()
    tasks = [draw_task(3, None) for _ in range(2)]
    a, b = (
        (torch.zeros(1, O).double(), torch.zeros(1, 2, 1).double())
        if rows is None
        else (randn(rows, O), randn(rows, 2, 1))
    )

    def forward(p, x, state):
        return torch.tanh(
            linear(torch.cat([x, state[0], state[1].flatten(1)], -1), p["linear.weight"], p["linear.bias"])
        )

    states = [(a[3:], b[3:]) if rows == 6 and i else (a[:3].expand(3, O), b[:3].expand(3, 2, 1)) for i in range(2)]
    ours = meta_gradient(model, tasks, None if rows is None else make(a, b), inner_steps=2)
    agree(ours, loop(model, tasks, states, steps=2, forward=forward))


def test_a_state_with_a_graph_is_detached():
    model, tasks = draw((3, 4), (3, 4))
    leaf = randn(3, S).requires_grad_()
    state = 2 * leaf
    agree(meta_gradient(model, tasks, state), loop(model, tasks, 2 * [state.detach()]))
    assert leaf.grad is None
    (gradient,) = torch.autograd.grad(state.sum(), leaf)
    assert torch.equal(gradient, torch.full_like(gradient, 2.0))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_state_in_the_outer_optimizer_is_learned(rows):
    model, tasks = draw((2, 3), (2, 3))
    state = randn(rows, S).requires_grad_()
    slope = finite_differences(MetaMAML(model, inner_lr=RATE), {"state": state}, tasks, state)["state"]
    before = state.detach().clone()
    state.grad = torch.ones_like(state)  # what lies around is not added
    maml = MetaMAML(model, RATE, outer_optimizer=SGD([*model.parameters(), state]))
    maml.meta_update(tasks, state)
    assert slope.norm() > 1e-3
    assert (before - state.detach() - slope).norm() <= 1e-6 * slope.norm()
    assert state.grad is None


class _LearnedStart(nn.Module):
    """A model whose state starts from a parameter."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.5]))
        self.linear = nn.Linear(D + 1, O)

    def init_hidden(self, batch_size=1):
        return self.start.expand(batch_size, 1)

    def forward(self, x, hidden_state):
        y = torch.tanh(self.linear(torch.cat([x, hidden_state], -1)))
        return y, y


def test_a_parameter_that_init_hidden_returns_is_adapted_and_meta_learned():
    torch.manual_seed(0)
    model = _LearnedStart().double()
    tasks = [draw_task(3, None) for _ in range(2)]

    def forward(p, x, _):
        h = p["start"].expand(x.shape[0], 1)
        return torch.tanh(linear(torch.cat([x, h], -1), p["linear.weight"], p["linear.bias"]))

    agree(meta_gradient(model, tasks, inner_steps=2), loop(model, tasks, steps=2, forward=forward))
    assert not torch.equal(MetaMAML(model, RATE).adapt_task(*tasks[0][:2])["start"], model.start)


# Models of every kind.


def test_a_linear_model_without_a_state():
    torch.manual_seed(0)
    model = nn.Linear(D, O).double()
    tasks = [draw_task(3, 4), draw_task(2, None)]
    reference = loop(model, tasks, steps=2, forward=lambda p, x, _: linear(x, p["weight"], p["bias"]))
    agree(meta_gradient(model, tasks, inner_steps=2), reference)


def network(p, x, _):
    return linear(torch.tanh(linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])


def sequential(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, O)).double()


def test_a_sequential_model_without_a_state():
    model, tasks = sequential(), [draw_task(3, None) for _ in range(3)]
    agree(meta_gradient(model, tasks, inner_steps=2), loop(model, tasks, steps=2, forward=network))


def test_an_mlp_with_its_empty_state_equals_the_loop():
    torch.manual_seed(0)
    model = MLP(D, O, hidden_dim=3).double()
    with torch.no_grad():  # so that units of both layers are on
        model.input.bias.fill_(0.5)
        model.hidden.bias.fill_(0.5)

    def forward(p, x, _):
        z = linear(x, p["input.weight"], p["input.bias"]).clamp(min=0)
        z = linear(z, p["hidden.weight"], p["hidden.bias"]).clamp(min=0)
        return linear(z, p["output.weight"], p["output.bias"])

    tasks = [draw_task(3, 4), draw_task(2, None)]
    reference = loop(model, tasks, steps=2, forward=forward)
    for state in (None, MLPState()):
        agree(meta_gradient(model, tasks, state, inner_steps=2), reference)
    x, y, *_ = tasks[0]
    maml = MetaMAML(model, RATE)
    assert same(maml.adapt_task(x, y, MLPState()), maml.adapt_task(x, y))


def test_a_state_with_counts_in_it_is_split_among_tasks_and_shared():
    torch.manual_seed(0)
    model = Transformer(4, D, O, hidden_dim=5, num_heads=2, window=2).double()
    maml, tasks = MetaMAML(model, RATE), [draw_task(2, 4), draw_task(2, 4)]
    states = [model(randn(2, steps, D))[1] for steps in (1, 5)]  # of different positions
    one_by_one = torch.cat([maml.evaluate([t], s) for t, s in zip(tasks, states, strict=True)])
    both = TransformerState(*(torch.cat(leaves) for leaves in zip(*states, strict=True)))
    torch.testing.assert_close(maml.evaluate(tasks, both), one_by_one)
    assert (maml.evaluate(tasks, states[0]) - one_by_one)[1].abs() > 1e-6
    torch.testing.assert_close(maml.evaluate(tasks, model.init_hidden(1)), maml.evaluate(tasks))
    loss, gradient = meta_gradient(model, tasks, both)
    assert loss == pytest.approx(float(one_by_one.mean()))
    assert all(g.isfinite().all() for g in gradient.values())


def test_frozen_parameters_stay_bit_identical_and_are_not_adapted():
    model, tasks = sequential(), [draw_task(3, None) for _ in range(3)]
    model[0].requires_grad_(False)
    agree(meta_gradient(model, tasks, inner_steps=2), loop(model, tasks, steps=2, forward=network))
    before = weights(model)
    maml = MetaMAML(model, RATE)
    for _ in range(3):
        maml.meta_update(tasks)
    after, fast = weights(model), maml.adapt_task(*tasks[0][:2])
    for name in before:
        frozen = name.startswith("0")
        assert torch.equal(before[name], after[name]) == frozen, name
        assert torch.equal(fast[name], after[name]) == frozen, name
    assert model[0].weight.grad is None


class _Counting(nn.Module):
    """Scales by a buffer and counts its calls in two others, in place and by assignment."""

    scale: Tensor
    calls: Tensor
    assigned: Tensor

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, O)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("assigned", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        self.assigned = self.assigned + 1
        return self.scale * self.linear(x)


def test_buffers_are_read_and_never_changed():
    torch.manual_seed(0)
    model = _Counting().double()
    tasks = [draw_task(3, None) for _ in range(2)]
    reference = loop(model, tasks, steps=2, forward=lambda p, x, _: 3 * linear(x, p["linear.weight"], p["linear.bias"]))
    agree(meta_gradient(model, tasks, inner_steps=2), reference)
    buffers = dict(model.named_buffers())
    maml = MetaMAML(model, RATE)
    maml.meta_update(tasks)
    maml.evaluate(tasks)
    maml.adapt_task(*tasks[0][:2])
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [buffer.item() for buffer in buffers.values()] == [3, 0, 0]


def test_tied_parameters_get_the_gradient_of_every_use():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(D, D, bias=False), nn.Tanh(), nn.Linear(D, D, bias=False)).double()
    model[2].weight = model[0].weight
    tasks = [(randn(3, D), randn(3, D), randn(3, D), randn(3, D)) for _ in range(2)]

    def forward(p, x, _):
        return linear(torch.tanh(linear(x, p["0.weight"])), p["0.weight"])

    agree(meta_gradient(model, tasks, inner_steps=2), loop(model, tasks, steps=2, forward=forward))
    maml = MetaMAML(model, RATE)
    maml.meta_update(tasks)
    assert model[2].weight is model[0].weight
    fast = maml.adapt_task(*tasks[0][:2])
    x = randn(4, D)
    torch.testing.assert_close(maml.functional_forward(x, None, fast)[0], forward(fast, x, None))


# Losses.


def test_the_loss_that_is_given_is_used():
    model, tasks = draw((3, 4), (3, 4))

    def absolute(output, y):
        return (output - y).abs().mean()

    ours = meta_gradient(model, tasks, None, absolute, inner_steps=2)
    agree(ours, loop(model, tasks, steps=2, loss=absolute))


def test_cross_entropy_on_integer_labels():
    torch.manual_seed(0)
    model = nn.Linear(D, 4).double()
    tasks = [(randn(5, D), torch.randint(4, (5,)), randn(3, D), torch.randint(4, (3,))) for _ in range(3)]

    def negative_log_likelihood(output, y):
        return -(output.log_softmax(-1)[torch.arange(len(y)), y]).mean()

    reference = loop(
        model, tasks, forward=lambda p, x, _: linear(x, p["weight"], p["bias"]), loss=negative_log_likelihood
    )
    agree(meta_gradient(model, tasks, None, cross_entropy), reference)
    agree(meta_gradient(model, stacked(tasks), None, cross_entropy), reference)


def test_parameters_of_the_loss_are_learned_with_the_model():
    model, tasks = draw((2, 3), (2, 3))
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def weighted(output, y):
        return weight * (output - y).square().mean() + weight.square()

    maml = MetaMAML(model, RATE, outer_optimizer=SGD([*model.parameters(), weight]))
    step = 1e-6
    ends = []
    for value in (2 + step, 2 - step):
        weight.data.fill_(value)
        ends.append(maml.evaluate(tasks, None, weighted).mean().item())
    weight.data.fill_(2.0)
    maml.meta_update(tasks, None, weighted)
    assert 2 - weight.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


# The outer step.


def test_the_returned_loss_is_the_mean_query_loss_before_the_outer_step():
    model, tasks = draw((3, 4), (2, 5), (3, 4))
    maml = MetaMAML(model, RATE)
    before = maml.evaluate(tasks)
    loss = maml.meta_update(tasks)
    assert type(loss) is float
    assert loss == before.mean().item()
    assert loss != maml.evaluate(tasks).mean().item()


def test_outer_steps_lower_the_meta_loss():
    model, tasks = draw((3, 4), (3, 4))
    maml = MetaMAML(model, RATE, outer_lr=0.01)
    losses = [maml.meta_update(tasks) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_step_of_the_default_adam_is_the_outer_rate_by_sign():
    model, tasks = draw((3, 4), (3, 4))
    _, gradient = meta_gradient(model, tasks)
    before = weights(model)
    MetaMAML(model, RATE, outer_lr=0.125).meta_update(tasks)
    for name, g in gradient.items():
        clear = g.abs() > 1e-4  # eps = 1e-8 is then below the tolerance
        step = (before[name] - weights(model)[name])[clear]
        torch.testing.assert_close(step, 0.125 * g[clear].sign(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("limit", [0.05, 1e9])
def test_max_grad_norm_scales_the_meta_gradient_to_that_norm(limit):
    model, tasks = draw((3, 4), (3, 4))
    _, whole = meta_gradient(model, tasks)
    _, clipped = meta_gradient(model, tasks, max_grad_norm=limit)
    norm = math.sqrt(sum(g.square().sum().item() for g in whole.values()))
    assert norm > 0.1
    scale = min(1.0, limit / (norm + 1e-6))
    for name, g in whole.items():
        torch.testing.assert_close(clipped[name], scale * g, rtol=1e-9, atol=1e-12)


@ignore_slow_vmap
def test_every_setting_changes_the_result():
    model, tasks = draw((3, 4), (3, 4))
    results = []
    variants: list[dict[str, Any]] = [
        {},
        {"inner_lr": 0.05},
        {"outer_lr": 0.01},
        {"first_order": True},
        {"inner_steps": 2},
        {"inner_optimizer": torchopt.adam(0.01, eps_root=1e-8)},
        {"outer_optimizer": torch.optim.SGD},
        {"max_grad_norm": 1e-9},  # Adam is blind to the scale, but not to one of the order of its eps
    ]
    for options in variants:
        twin = copy.deepcopy(model)
        if "outer_optimizer" in options:
            options = {"outer_optimizer": torch.optim.SGD(twin.parameters(), lr=0.01)}
        MetaMAML(twin, **options).meta_update(tasks)
        results.append(weights(twin)["output_input.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_defaults_are_one_step_of_sgd_at_0_01_under_adam_at_0_001():
    model, tasks = draw((3, 4), (3, 4))
    twin = copy.deepcopy(model)
    MetaMAML(model).meta_update(tasks)
    explicit: dict[str, Any] = {
        "inner_steps": 1,
        "inner_optimizer": torchopt.sgd(0.01),
        "outer_optimizer": torch.optim.Adam(twin.parameters(), lr=0.001),
    }
    MetaMAML(twin, **explicit).meta_update(tasks)
    assert same(weights(model), weights(twin))


def test_an_outer_optimizer_of_a_part_of_the_model_learns_that_part_and_leaves_no_gradient():
    model, tasks = draw((3, 4), (3, 4))
    before = weights(model)
    _, gradient = meta_gradient(model, tasks)
    maml = MetaMAML(model, RATE, outer_optimizer=SGD(model.output_input.parameters()))
    maml.meta_update(tasks)
    for name, value in weights(model).items():
        step = gradient[name] if name.startswith("output_input") else torch.zeros_like(value)
        torch.testing.assert_close(before[name] - value, step, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_lie_around_are_not_added():
    model, tasks = draw((3, 4), (3, 4))
    _, gradient = meta_gradient(model, tasks)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = weights(model)
    MetaMAML(model, RATE, outer_optimizer=SGD(model.parameters())).meta_update(tasks)
    torch.testing.assert_close({n: before[n] - v for n, v in weights(model).items()}, gradient, rtol=1e-9, atol=1e-12)


# evaluate, adapt_task, functional_forward, get_fast_weights.


def test_evaluate_changes_nothing():
    model, tasks = draw((3, 4), (2, 5))
    maml = MetaMAML(model, RATE)
    maml.meta_update(tasks)
    before, optimizer = weights(model), copy.deepcopy(maml.outer_optimizer.state_dict())
    losses = maml.evaluate(tasks, randn(1, S).requires_grad_())
    assert same(weights(model), before)
    assert identical(maml.outer_optimizer.state_dict(), optimizer)
    assert not losses.requires_grad
    assert all(p.grad is None for p in model.parameters())


def identical(ours, theirs):
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("steps", [None, 0, 1, 3])
def test_evaluate_takes_the_steps_it_is_told(steps):
    model, tasks = draw((3, 4), (2, 5))
    losses, _ = loop(model, tasks, steps=2 if steps is None else steps)
    ours = MetaMAML(model, RATE, inner_steps=2).evaluate(tasks, num_steps=steps)
    torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-12)


def test_evaluating_without_steps_is_the_loss_of_the_model_as_it_is():
    model, tasks = draw((3, 4), (2, 5))
    losses = MetaMAML(model).evaluate(tasks, num_steps=0)
    assert losses.tolist() == pytest.approx([mse_loss(model(q)[0], y).item() for _, _, q, y in tasks], rel=1e-14)


def test_evaluate_keeps_the_model_s_dtype_for_any_loss():
    model, tasks = draw((3, 4))
    single = [tuple(t.float() for t in task) for task in tasks]
    losses = MetaMAML(model.float()).evaluate(single, None, lambda o, y: mse_loss(o.double(), y.double()))
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_fast_weights_equal_a_manual_loop(steps, rows):
    model, [(x, y, _, _)] = draw((3, 4))
    state = None if rows is None else randn(rows, S)
    fast = {name: p.detach() for name, p in model.named_parameters()}
    for _ in range(steps):
        leaves = {name: p.clone().requires_grad_() for name, p in fast.items()}
        h = zeros(x) if state is None else state.expand(3, S)
        gradients = torch.autograd.grad(mean_square(forward(leaves, x, h), y), tuple(leaves.values()))
        fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    maml = MetaMAML(model, RATE, inner_steps=steps)
    for ours in (maml.adapt_task(x, y, state), MetaMAML(model, RATE).adapt_task(x, y, state, num_steps=steps)):
        torch.testing.assert_close(dict(ours), fast, rtol=1e-12, atol=1e-12)


def test_fast_weights_are_a_copy_without_a_graph():
    model, [(x, y, _, _)] = draw((3, 4))
    model.output_input.requires_grad_(False)
    before = weights(model)
    maml = MetaMAML(model, RATE)
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    state = randn(3, S).requires_grad_()
    for fast in (
        maml.get_fast_weights(),
        maml.adapt_task(x, y, state, num_steps=0),
        maml.adapt_task(x, y, state, lambda o, y: factor * mse_loss(o, y)),
    ):
        assert list(fast) == [name for name, _ in model.named_parameters()]
        assert not any(value.requires_grad for value in fast.values())
        for value in fast.values():
            value.fill_(7.0)
        assert same(weights(model), before)


def test_without_steps_fast_weights_are_the_model_s():
    model, [(x, y, _, _)] = draw((3, 4))
    maml = MetaMAML(model, RATE)
    assert same(maml.adapt_task(x, y, num_steps=0), maml.get_fast_weights())
    assert same(maml.get_fast_weights(), weights(model))


def test_fast_weights_and_the_query_loss_they_give_are_those_of_evaluate():
    model, tasks = draw((3, 4), (2, 5))
    maml = MetaMAML(model, RATE, inner_steps=3)
    each = []
    for support_x, support_y, query_x, query_y in tasks:
        fast = maml.adapt_task(support_x, support_y)
        each.append(mse_loss(maml.functional_forward(query_x, None, fast)[0], query_y))
    torch.testing.assert_close(maml.evaluate(tasks), torch.stack(each), rtol=1e-12, atol=1e-12)


@ignore_slow_vmap
def test_adapt_task_uses_the_inner_optimizer_as_the_adapter_does():
    model, [(x, y, _, _)] = draw((3, 4))
    h = randn(3, S)
    fast = MetaMAML(model, inner_optimizer=torchopt.adam(0.1), inner_steps=4).adapt_task(x, y, h)
    Adapter(model, AdaptationConfig(optimizer=torchopt.adam(0.1), num_steps=4)).update_step(x, y, h)
    torch.testing.assert_close(weights(model), dict(fast), rtol=1e-12, atol=1e-12)


def test_functional_forward_computes_with_the_weights_it_is_given():
    model, [(x, _, _, _)] = draw((3, 4))
    maml, h = MetaMAML(model), randn(3, S)
    doubled = {name: 2 * p for name, p in maml.get_fast_weights().items()}
    torch.testing.assert_close(maml.functional_forward(x, h, doubled)[0], forward(doubled, x, h))
    torch.testing.assert_close(maml.functional_forward(x, None, doubled)[0], forward(doubled, x, zeros(x)))


def test_functional_forward_without_weights_is_the_model():
    model, [(x, _, _, _)] = draw((3, 4))
    h = randn(3, S)
    (y, last), (y_model, last_model) = MetaMAML(model).functional_forward(x, h), model(x, h)
    assert torch.equal(y, y_model)
    assert torch.equal(last, last_model)
    assert MetaMAML(nn.Linear(D, O).double()).functional_forward(x, None)[1] is None


# Errors, after each of which the model and the outer optimizer are as before.


@pytest.fixture
def trained():
    """A learner that has made a step, so that its Adam has moments, and three tasks. What changed shows at the end."""
    model, tasks = draw(*3 * [(3, 4)])
    maml = MetaMAML(model, RATE)
    maml.meta_update(tasks)
    before, optimizer = weights(model), copy.deepcopy(maml.outer_optimizer.state_dict())
    yield maml, tasks
    assert same(weights(model), before)
    assert identical(maml.outer_optimizer.state_dict(), optimizer)
    assert all(p.grad is None for p in model.parameters())


def replaced(tasks, index, field, value):
    """The tasks with one field of one of them replaced."""
    spoiled = [list(task) for task in tasks]
    spoiled[index][field] = value
    return [tuple(task) for task in spoiled]


def test_no_tasks_are_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match="tasks must hold at least one task; got an empty sequence"):
        maml.meta_update([])
    with pytest.raises(ValueError, match="tasks must hold at least one task; got a stack of none"):
        maml.meta_update(tuple(t[:0] for t in stacked(tasks)))


def test_a_wrong_rank_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"tasks\[1\]\.query_x must have shape \(B, D\) or \(B, T, D\); got \(2,\)"):
        maml.meta_update(replaced(tasks, 1, 2, tasks[1][2][0, 0]))


def test_a_wrong_width_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match="x must have 2 features on its last axis"):
        maml.meta_update(replaced(tasks, 1, 0, randn(3, 4, D + 1)))


def test_a_wrong_width_of_targets_in_the_last_group_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"shape of the model's output, \(3, 4, 1\); got \(3, 4, 2\)"):
        maml.meta_update(replaced(tasks, 2, 3, randn(3, 4, O + 1)))


def test_mismatched_steps_are_refused(trained):
    maml, tasks = trained
    with pytest.raises(
        ValueError, match=r"tasks\[2\]\.support_y must begin with the axes \(3, 4\) of tasks\[2\]\.supp"
    ):
        maml.meta_update(replaced(tasks, 2, 1, randn(3, 5, O)))


def test_a_mismatched_batch_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"tasks\[0\]\.query_y must begin with the axes \(3, 4\)"):
        maml.meta_update(replaced(tasks, 0, 3, randn(2, 4, O)))


def test_a_wrong_dtype_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"tasks\[0\]\.support_x must be of dtype torch\.float64"):
        maml.meta_update(replaced(tasks, 0, 0, tasks[0][0].float()))


def test_a_wrong_device_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"tasks\[0\]\.query_y must be on cpu, where the model is; got meta"):
        maml.meta_update(replaced(tasks, 0, 3, tasks[0][3].to("meta")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("field", "name"), list(enumerate(Task._fields)))
def test_data_that_are_not_finite_are_refused_and_named(trained, field, name, bad):
    maml, tasks = trained
    spoiled = tasks[1][field].clone()
    spoiled[2, 3, 0] = bad
    changed = replaced(tasks, 1, field, spoiled)
    with pytest.raises(ValueError, match=rf"tasks\[1\]\.{name} must be finite; got {bad} at index \(2, 3, 0\)"):
        maml.meta_update(changed)
    with pytest.raises(ValueError, match=rf"{name} must be finite; got {bad} at index \(1, 2, 3, 0\)"):
        maml.meta_update(stacked(changed))


def test_a_state_of_a_wrong_batch_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"initial_hidden_state must have .* one of \[3\] .* sum 9 .*; got 4\."):
        maml.meta_update(tasks, randn(4, S))


def test_a_state_of_a_wrong_width_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"hidden_state must have shape \(3, 2\) to match x; got \(3, 3\)"):
        maml.meta_update(tasks, randn(3, S + 1))


def test_a_state_of_a_wrong_dtype_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match=r"hidden_state must be of dtype torch\.float64.*; got torch\.float32"):
        maml.meta_update(tasks, torch.zeros(3, S))


def test_a_state_on_a_wrong_device_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match="hidden_state must be on cpu, where the model is; got meta"):
        maml.meta_update(tasks, randn(3, S, device="meta"))


def test_a_meta_loss_that_is_not_finite_names_the_tasks(trained):
    maml, tasks = trained
    with pytest.raises(FloatingPointError, match=r"not finite for tasks \[1\]: \[inf\]; the model is untouched"):
        maml.meta_update(replaced(tasks, 1, 3, torch.full((3, 4, O), 1e200, dtype=torch.float64)))


def test_an_inner_rate_that_is_too_high_names_all_tasks():
    model, tasks = draw((3, 4), (2, 5), (3, 4))
    before = weights(model)
    maml = MetaMAML(model, inner_lr=1e200, inner_steps=3)
    with pytest.raises(FloatingPointError, match=r"not finite for tasks \[0, 1, 2\].*Lower the inner rate"):
        maml.meta_update(tasks)
    assert same(weights(model), before)
    assert not maml.outer_optimizer.state
    assert all(p.grad is None for p in model.parameters())


class _Root(nn.Module):
    """Has a finite value and an infinite slope where `root` is 0."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.ones(D))
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.scale * x + self.root.sqrt()


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_meta_gradient_that_is_not_finite_names_the_parameters(limit):
    torch.manual_seed(0)
    model = _Root()
    maml = MetaMAML(model, inner_steps=0, max_grad_norm=limit)
    task = (torch.randn(3, D), torch.randn(3, D), torch.randn(3, D), torch.randn(3, D))
    maml.meta_update([task])
    model.root.data.zero_()
    before, optimizer = weights(model), copy.deepcopy(maml.outer_optimizer.state_dict())
    with pytest.raises(
        FloatingPointError, match=r"meta-gradient is not finite \(norm \w+\) in \['root'\]; the model is u"
    ):
        maml.meta_update([task])
    assert same(weights(model), before)
    assert identical(maml.outer_optimizer.state_dict(), optimizer)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [torchopt.adam, torchopt.adamw, torchopt.rmsprop, torchopt.adagrad, torchopt.radam])
def test_a_gradient_that_is_exactly_zero_leaves_the_meta_gradient_finite(make):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x, y = torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)  # the second weight has no gradient
    before = weights(model)
    MetaMAML(model, inner_optimizer=make(0.1), inner_steps=7).meta_update([(x, y, x, y)])
    assert torch.isfinite(model.weight).all()
    assert not same(weights(model), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner_lr": -0.1}, ValueError, r"inner_lr must be finite and >= 0; got -0\.1"),
        ({"inner_lr": math.nan}, ValueError, "inner_lr must be finite and >= 0; got nan"),
        ({"outer_lr": -0.1}, ValueError, r"outer_lr must be finite and >= 0; got -0\.1"),
        ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm must be finite and >= 0; got -1\.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0"),
        ({"inner_steps": -1}, ValueError, "inner_steps must be >= 0; got -1"),
        ({"inner_steps": 1.5}, TypeError, r"inner_steps must be an integer >= 0; got 1\.5"),
        (
            {"inner_lr": 0.5, "inner_optimizer": torchopt.adam(0.1)},
            ValueError,
            r"inner_lr = 0\.5 would be ignored: inner_optimizer has a rate of its own",
        ),
        (
            {"outer_lr": 0.5, "outer_optimizer": SGD([torch.zeros(1)])},
            ValueError,
            r"outer_lr = 0\.5 would be ignored: outer_optimizer has a rate of its own",
        ),
        ({"inner_optimizer": SGD([torch.zeros(1)])}, TypeError, "inner_optimizer must be a TorchOpt grad.* got SGD"),
        ({"outer_optimizer": torchopt.sgd(0.1)}, TypeError, r"outer_optimizer must be a torch\.optim\.Optimizer; got "),
    ],
)
def test_a_bad_setting_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        MetaMAML(nn.Linear(1, 1), **options)


@pytest.mark.parametrize("outer", [None, SGD([torch.zeros(1)])])
def test_a_model_with_nothing_to_learn_is_refused(outer):
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        MetaMAML(nn.Linear(1, 1).requires_grad_(False), outer_optimizer=outer)


def test_adapt_task_refuses_bad_arguments_by_name(trained):
    maml, [(x, y, _, _), *_] = trained
    with pytest.raises(ValueError, match="num_steps must be >= 0; got -1"):
        maml.adapt_task(x, y, num_steps=-1)
    with pytest.raises(ValueError, match="num_steps must be >= 0; got -2"):
        maml.evaluate([(x, y, x, y)], num_steps=-2)
    with pytest.raises(ValueError, match=r"support_x must have shape \(B, D\) or \(B, T, D\); got \(1, 3, 4, 2\)"):
        maml.adapt_task(x[None], y[None])
    with pytest.raises(ValueError, match=r"support_y must begin with the axes \(3, 4\) of support_x"):
        maml.adapt_task(x, y[:2])
    with pytest.raises(ValueError, match=r"support_y must be finite; got nan at index \(0, 0, 0\)"):
        maml.adapt_task(x, y * torch.nan)
    with pytest.raises(ValueError, match=r"initial_hidden_state must have .*; got 2\."):
        maml.adapt_task(x, y, randn(2, S))


def test_an_outer_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"outer_optimizer must hold parameters of the model .*; it holds none"):
        MetaMAML(nn.Linear(2, 1), outer_optimizer=optimizer)


def test_a_state_that_is_not_finite_is_refused(trained):
    maml, tasks = trained
    with pytest.raises(ValueError, match="initial_hidden_state must be finite; got nan"):
        maml.meta_update(tasks, torch.full((1, S), torch.nan, dtype=torch.float64))


def test_a_meta_update_learns_where_gradients_are_off():
    model, tasks = draw((3, 4))
    before = weights(model)
    with torch.no_grad():
        MetaMAML(model).meta_update(tasks)
    assert not same(weights(model), before)


class _Scaled(nn.Module):
    """A model with a frozen parameter and a buffer that both matter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, O)
        self.frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x):
        return self.frozen * self.inner(x) + self.shift


def compiled_pair(make, compile="trace", **options):
    torch.manual_seed(0)
    model = make().double()
    twin = copy.deepcopy(model)
    return MetaMAML(model, **options), MetaMAML(twin, **options, compile=compile)


def same_after(eager, compiled, *arguments):
    assert eager.meta_update(*arguments) == pytest.approx(compiled.meta_update(*arguments), rel=1e-12)
    torch.testing.assert_close(weights(compiled.model), weights(eager.model), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not shutil.which("c++"), reason="TorchInductor needs a C++ compiler")
def test_an_update_compiled_by_inductor_equals_an_eager_one():
    eager, compiled = compiled_pair(lambda: StateSpaceModel(S, D, O, 4), compile=True, inner_steps=2)
    for seed in range(3):
        _, tasks = draw((3, 4), (3, 4), seed=seed)
        same_after(eager, compiled, tasks)
    assert len(compiled._traced) == 1


@pytest.mark.parametrize("value", ["inductor", None, 2])
def test_an_unknown_way_to_compile_is_refused(value):
    with pytest.raises(ValueError, match=r'compile must be True, False or "trace"; got'):
        MetaMAML(nn.Linear(D, O), compile=value)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("optimizer", [None, torchopt.sgd(0.1, momentum=0.9)])
def test_a_compiled_update_equals_an_eager_one(first_order, optimizer):
    make = lambda: StateSpaceModel(S, D, O, 4)  # noqa: E731
    eager, compiled = compiled_pair(make, inner_steps=2, first_order=first_order, inner_optimizer=optimizer)
    for seed in range(3):
        _, tasks = draw((3, 4), (3, 4), (2, 5), seed=seed)
        same_after(eager, compiled, tasks)
    assert len(compiled._traced) == 1


def test_a_compiled_update_takes_states_shared_or_split():
    eager, compiled = compiled_pair(lambda: StateSpaceModel(S, D, O, 4))
    _, tasks = draw((3, 4), (3, 4))
    for batch in (1, 3, 6, None):
        same_after(eager, compiled, tasks, None if batch is None else randn(batch, S))


def test_a_compiled_update_sees_what_changed_in_constants():
    eager, compiled = compiled_pair(_Scaled, inner_lr=0.1)
    _, tasks = draw((3, None), (3, None))
    same_after(eager, compiled, tasks)
    for maml in (eager, compiled):
        maml.model.frozen.data.fill_(-1.0)
        maml.model.shift = torch.tensor(3.0, dtype=torch.float64)
    same_after(eager, compiled, tasks)


def test_a_compiled_update_uses_the_loss_it_is_given():
    eager, compiled = compiled_pair(lambda: nn.Linear(D, O))
    _, tasks = draw((3, None))
    for loss_fn in (mse_loss, mean_square, lambda output, y: (output - y).abs().mean()):
        same_after(eager, compiled, tasks, None, loss_fn)


def test_a_compiled_learner_of_other_tensors_is_refused():
    model, extra = nn.Linear(D, O), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    _, tasks = draw((3, None))
    maml = MetaMAML(model, outer_optimizer=optimizer, compile=True)
    with pytest.raises(ValueError, match=r"compile=True differentiates .* alone; outer_optimizer must not hold other"):
        maml.meta_update([tuple(t.float() for t in task) for task in tasks])


@pytest.mark.parametrize("norm", [nn.LayerNorm(O), nn.InstanceNorm1d(O, affine=True)])
def test_norms_whose_second_derivative_torch_gets_wrong_are_refused(norm):
    model = nn.Sequential(nn.Linear(D, O), norm)
    with pytest.raises(ValueError, match=f"must not have {type(norm).__name__} with weights \\(1\\)"):
        MetaMAML(model)
    MetaMAML(model, first_order=True)
    MetaMAML(nn.Sequential(nn.Linear(D, O), nn.GroupNorm(1, O), LayerNorm(O)))


# Algorithms and memory as settings


OPTIONS: list[dict[str, Any]] = [
    {"mixed_mode": True},
    {"recompute": 1},
    {"recompute": 2, "mixed_mode": True},
    {"chunk_size": 1},
    {"chunk_size": 2, "recompute": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_meta_gradient_in_less_memory_is_the_same(options):
    model, tasks = draw(*[(3, 4)] * 3)
    reference = loop(model, tasks, steps=3)
    agree(meta_gradient(model, tasks, inner_steps=3, **options), reference)


@pytest.mark.parametrize("options", [{}, {"recompute": 1}, {"mixed_mode": True}], ids=str)
def test_a_learned_state_and_learned_rates_get_the_same_gradient_in_every_mode(options):
    model, tasks = draw(*[(3, 4)] * 2)
    rates = learning_rates(dict(model.named_parameters()), 0.1, num_steps=2)
    state = randn(1, S).requires_grad_()
    extra = [*rates.values(), state]

    def after(**options):
        start = [e.detach().clone() for e in extra]
        maml = MetaMAML(
            model,
            inner_steps=2,
            inner_optimizer=scale_by_learning_rates(rates, per_step=True),
            outer_optimizer=SGD([*model.parameters(), *extra]),
            **options,
        )
        before = weights(model)
        maml.meta_update(tasks, state)
        moved = [s - e.detach() for s, e in zip(start, extra, strict=True)]
        model.load_state_dict(before)
        with torch.no_grad():
            for e, s in zip(extra, start, strict=True):
                e.copy_(s)
        return torch.cat([m.flatten() for m in moved])

    reference = after()
    assert (reference != 0).all()
    torch.testing.assert_close(after(**options), reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after(compile="trace"), reference, rtol=1e-10, atol=1e-12)


def test_only_what_is_selected_adapts_and_all_is_meta_learned():
    model, tasks = draw((3, 4), (3, 4))
    fast = MetaMAML(model, RATE, adapted="output_mlp").adapt_task(*tasks[0][:2])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, fast[name])}
    assert changed
    assert all(name.startswith("output_mlp") for name in changed)

    def anil(params, tasks):
        losses = []
        for support_x, support_y, query_x, query_y in tasks:
            value = mean_square(forward(params, support_x, zeros(support_x)), support_y)
            head = {name: p for name, p in params.items() if name.startswith("output_mlp")}
            gradients = torch.autograd.grad(value, tuple(head.values()), create_graph=True)
            adapted = {name: p - RATE * g for (name, p), g in zip(head.items(), gradients, strict=True)}
            losses.append(mean_square(forward({**params, **adapted}, query_x, zeros(query_x)), query_y))
        return torch.stack(losses)

    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = anil(params, tasks)
    reference = (
        losses.detach(),
        dict(zip(params, torch.autograd.grad(losses.mean(), tuple(params.values())), strict=True)),
    )
    agree(meta_gradient(model, tasks, adapted="output_mlp"), reference)
    agree(meta_gradient(model, tasks, adapted=["output_mlp.*"], compile="trace"), reference)
    agree(meta_gradient(model, tasks, adapted=lambda name, p: "output_mlp" in name, recompute=1), reference)


@pytest.mark.parametrize("options", [{}, {"compile": "trace"}, {"recompute": 1}], ids=str)
def test_step_weights_sum_the_gradients_after_every_step(options):
    model, tasks = draw((3, 4), (3, 4))
    each = [loop(model, tasks, steps=k) for k in (1, 2)]
    reference = (
        0.3 * each[0][0] + 0.7 * each[1][0],
        {name: 0.3 * g + 0.7 * each[1][1][name] for name, g in each[0][1].items()},
    )
    agree(meta_gradient(model, tasks, inner_steps=2, step_weights=[0.3, 0.7], **options), reference)


def test_step_weights_may_change_between_updates():
    model, tasks = draw((3, 4), (3, 4))
    maml = MetaMAML(
        model, RATE, inner_steps=2, step_weights=[1.0, 0.0], outer_optimizer=SGD(model.parameters(), lr=0.0)
    )
    assert maml.meta_update(tasks) == pytest.approx(float(maml.evaluate(tasks, num_steps=1).mean()))
    maml.step_weights = [0.0, 1.0]
    assert maml.meta_update(tasks) == pytest.approx(float(maml.evaluate(tasks, num_steps=2).mean()))


def test_truncation_cuts_the_derivative_through_the_state_and_no_value():
    model, tasks = draw((3, 4), (3, 4))
    whole = meta_gradient(model, tasks)
    agree(meta_gradient(model, tasks, truncate=4), loop(model, tasks))
    cut = meta_gradient(model, tasks, truncate=2, inner_lr=0.0)
    zero = meta_gradient(model, tasks, inner_lr=0.0)
    assert cut[0] == pytest.approx(zero[0])
    assert not torch.allclose(cut[1]["state_mlp.out.weight"], zero[1]["state_mlp.out.weight"])
    torch.testing.assert_close(cut[1]["output_mlp.out.weight"], zero[1]["output_mlp.out.weight"])
    assert meta_gradient(model, tasks, truncate=1)[0] != pytest.approx(whole[0])

    def truncated(p, x, h):
        first, h = pieces(p, x[:, :2], h)
        return torch.cat([first, pieces(p, x[:, 2:], h.detach())[0]], 1)

    def pieces(p, x, h):
        outputs = []
        for t in range(x.shape[1]):
            outputs.append(forward(p, x[:, t], h))
            h = forward_state(p, x[:, t], h)
        return torch.stack(outputs, 1), h

    agree(meta_gradient(model, tasks, truncate=2), loop(model, tasks, forward=truncated))


def forward_state(p, x_t, h):
    z = linear(h, p["state_mlp.hidden.weight"], p["state_mlp.hidden.bias"]).clamp(min=0)
    return linear(z, p["state_mlp.out.weight"], p["state_mlp.out.bias"]) + linear(
        x_t, p["state_input.weight"], p["state_input.bias"]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapted": "head"}, ValueError, "'head' chooses none of the trainable parameters"),
        ({"step_weights": [1.0, 1.0]}, ValueError, r"step_weights must have shape \(K,\) = \(1,\).* got \(2,\)"),
        ({"first_order": True, "recompute": 1}, ValueError, "first_order stores no graph of a gradient"),
        ({"recompute": 0}, ValueError, "recompute must be None or at least 1; got 0"),
        ({"recompute": 1.5}, TypeError, "recompute must be an integer"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1; got 0"),
        ({"truncate": 0}, ValueError, "truncate must be None or an integer >= 1; got 0"),
        ({"mixed_mode": True, "compile": True}, ValueError, "mixed_mode needs compile=False"),
    ],
)
def test_a_bad_setting_of_algorithm_or_memory_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        MetaMAML(nn.Linear(D, O), **options)


def test_parameters_of_the_loss_cannot_be_learned_in_less_memory():
    model, tasks = draw((3, 4), (3, 4))
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    maml = MetaMAML(model, RATE, recompute=1, outer_optimizer=SGD([*model.parameters(), scale]))
    with pytest.raises(ValueError, match="closes over a tensor"):
        maml.meta_update(tasks, None, lambda output, y: (scale * output - y).square().mean())


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 3 + 1),
        ({"recompute": 1}, 1 + 3 + 1 + 3),  # the check for captured tensors, the steps, the query, the steps again
        ({"recompute": 3}, 1 + 3 + 1 + 3),
        ({"mixed_mode": True}, 1 + 3 + 1 + 3),
        ({"mixed_mode": True, "recompute": 2}, 1 + 3 + 1 + 3 + 3),
        ({"first_order": True}, 3 + 1),
        ({"chunk_size": 1}, 2 * (3 + 1)),
        ({"chunk_size": 2}, 3 + 1),
    ],
    ids=str,
)
def test_every_way_to_save_memory_evaluates_the_loss_as_often_as_it_says(options, calls):
    model, tasks = draw((3, 4), (3, 4))
    count = 0

    def counted(output, y):
        nonlocal count
        count += 1
        return mse_loss(output, y)

    MetaMAML(model, RATE, inner_steps=3, **options).meta_update(tasks, None, counted)
    assert count == calls


def test_evaluate_is_the_loss_after_the_last_step_whatever_the_step_weights():
    model, tasks = draw((3, 4), (3, 4))
    plain, weighted = (MetaMAML(model, RATE, inner_steps=2, step_weights=w) for w in (None, [3.0, 3.0]))
    assert torch.equal(plain.evaluate(tasks), weighted.evaluate(tasks))


def test_rates_that_nothing_would_learn_are_refused():
    model = nn.Linear(D, O)
    rates = learning_rates(dict(model.named_parameters()), 0.1)
    with pytest.raises(ValueError, match="has rates that require a gradient, which outer_optimizer does not hold"):
        MetaMAML(model, inner_optimizer=scale_by_learning_rates(rates))


def test_a_change_of_order_is_checked_as_at_the_start():
    maml = MetaMAML(nn.Sequential(nn.Linear(D, O), nn.LayerNorm(O)), first_order=True)
    with pytest.raises(ValueError, match="must not have LayerNorm"):
        maml.first_order = False
    maml = MetaMAML(nn.Linear(D, O), recompute=1)
    with pytest.raises(ValueError, match="first_order stores no graph"):
        maml.first_order = True


def test_truncating_a_model_without_a_state_is_refused():
    with pytest.raises(ValueError, match=r"truncate needs a model with a state, .* Linear gave no state"):
        MetaMAML(nn.Linear(D, O).double(), truncate=2).meta_update([draw_task(3, 4)])
