"""The window against a Python deque, and its loss against the model run by hand, step by step."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional

from ssmrl.adaptation import Window, entropy_loss, mse_loss
from ssmrl.adaptation.tree import tree_leaves, tree_map
from ssmrl.adaptation.window import empty_buffer, keep_newest, push, window_loss
from ssmrl.core import GRU, LSTM, StateSpaceModel, functional_forward

B, D, O = 2, 3, 2  # noqa: E741
MODELS: dict[str, Any] = {
    "StateSpaceModel": lambda: StateSpaceModel(4, D, O, 5),
    "GRU": lambda: GRU(3, D, O),
    "LSTM": lambda: LSTM(3, D, O),  # its state is a NamedTuple
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def model_and_params(make, seed=0):
    torch.manual_seed(seed)
    model = make().double()
    return model, {name: p.detach() for name, p in model.named_parameters()}


def forward_of(model):
    """As an adapter calls the window: () for a state or a mask that there is not."""

    def forward(params, x, hidden, reset):
        state = None if isinstance(hidden, tuple) and not hidden else hidden
        output, after = functional_forward(model, params, x, state, reset=reset if isinstance(reset, Tensor) else None)
        return output, () if after is None else after

    return forward


def transition(model, g, *, masked=True, rows=B):
    """Random x, y, recorded state and mask: a state that no weights give shows where it is used."""
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    hidden = tree_map(lambda leaf: draw(leaf.shape), model.init_hidden(rows))
    return draw(rows, D), draw(rows, O), hidden, torch.rand(rows, generator=g) < 0.3 if masked else ()


def stream(model, count, seed=0, *, masked=True):
    g = torch.Generator().manual_seed(seed)
    return [transition(model, g, masked=masked) for _ in range(count)]


def filled(window, transitions):
    buffer = empty_buffer(window, *transitions[0])
    for one in transitions:
        buffer = push(buffer, *one)
    return buffer


def root_loss(output, target):
    """Not linear in the squares, so that the mean over steps differs from one over everything."""
    return (1 + (output - target).square().sum()).sqrt()


def by_hand(window, transitions, model, params, loss_fn=root_loss):
    """The mean loss over the newest transitions, step by step from the state that the window's docstring names."""
    transitions = list(transitions)[-window.capacity :]
    inside = transitions[-window.length :]
    early = transitions[: len(transitions) - len(inside)]
    hidden = inside[0][2]
    if window.burn_in and len(early) == window.burn_in:
        hidden = early[0][2]
        for x, _, _, reset in early:
            mask = reset if isinstance(reset, Tensor) else None
            _, hidden = functional_call(model, tree_map(Tensor.detach, params), (x, hidden, mask))
        hidden = tree_map(Tensor.detach, hidden)
    losses = []
    for x, y, _, reset in inside:
        output, hidden = functional_call(model, params, (x, hidden, reset if isinstance(reset, Tensor) else None))
        losses.append(loss_fn(output, y))
    return torch.stack(losses).mean()


# The buffer.

sizes = st.fixed_dictionaries({"length": st.integers(1, 4), "burn_in": st.integers(0, 3)})
operations = st.lists(st.one_of(st.just("push"), st.tuples(st.integers(0, 8), st.booleans())), max_size=14)


@settings(max_examples=60, deadline=None)
@given(size=sizes, todo=operations, masked=st.booleans())
def test_the_buffer_is_a_queue_of_the_last_transitions(size, todo, masked):
    window = Window(**size)
    model, _ = model_and_params(MODELS["LSTM"])
    coming = iter(stream(model, len(todo) + 1, masked=masked))
    buffer, queue = empty_buffer(window, *next(coming)), deque[Any](maxlen=window.capacity)
    for item in todo:
        if isinstance(item, str):
            one = next(coming)
            buffer = push(buffer, *one)
            queue.append(one)
        else:
            number, where = item
            buffer = keep_newest(buffer, number, torch.tensor(where))
            for _ in range(max(len(queue) - number, 0) if where else 0):
                queue.popleft()
        assert buffer.filled == len(queue)
        for place, held in enumerate(queue):
            now = tree_leaves(tree_map(lambda leaf, at=place: leaf[:, at], tuple(buffer[:4])))
            assert all(torch.equal(a, b) for a, b in zip(now, tree_leaves(held), strict=True))


def test_a_push_leaves_the_buffer_before_it_as_it_was():
    model, _ = model_and_params(MODELS["GRU"])
    before = filled(Window(2), stream(model, 3))
    copies = [leaf.clone() for leaf in tree_leaves(before)]
    push(before, *stream(model, 1, seed=1)[0])
    keep_newest(before, 1, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(copies, tree_leaves(before), strict=True))


def test_the_buffer_keeps_dtypes_of_labels_and_of_masks():
    buffer = push(
        empty_buffer(Window(2), torch.zeros(B, D), torch.zeros(B, dtype=torch.int64), (), torch.zeros(B).bool()),
        torch.ones(B, D),
        torch.tensor([4, 5]),
        (),
        torch.tensor([True, False]),
    )
    assert buffer.y.tolist() == [[4, 4], [5, 5]]  # the newest transition also stands where there is none yet
    assert buffer.reset.tolist() == [[True, True], [False, False]]
    assert buffer.hidden == ()
    assert buffer.filled == 1


def test_places_that_do_not_count_leave_the_derivative_alone():
    """The root of a loss of 0, say, has none there."""
    window = Window(3)
    transition = (torch.ones(1, 2), torch.ones(1, 1), (), ())
    buffer = push(empty_buffer(window, *transition), *transition)

    def loss(p):
        def forward(p, x, hidden, reset):
            return x @ p, ()

        return window_loss(window, buffer, forward, lambda o, y: (o - y).square().sum().sqrt(), p)

    assert torch.func.grad(loss)(torch.ones(2, 1)).tolist() == [[1.0], [1.0]]


# The loss.


@over_models
@settings(max_examples=20, deadline=None)
@given(size=sizes, count=st.integers(1, 9), keep=st.integers(1, 8), masked=st.booleans(), seed=st.integers(0, 99))
def test_the_loss_and_its_gradient_equal_the_model_run_by_hand(make, size, count, keep, masked, seed):
    window = Window(**size)
    model, params = model_and_params(make, seed)
    transitions = stream(model, count, seed, masked=masked)
    buffer = keep_newest(filled(window, transitions), keep, torch.tensor(True))
    ours = grad_and_value(lambda p: window_loss(window, buffer, forward_of(model), root_loss, p))(params)
    kept = transitions[-window.capacity :][-keep:]
    close(ours, grad_and_value(lambda p: by_hand(window, kept, model, p))(params), tolerance=1e-10)


class Sum(nn.Module):
    """y = w h and h' = h + x, forgotten at a reset: losses by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=torch.float64)

    def forward(self, x: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() == 3:
            hidden_state = hidden_state[:, None] + x.cumsum(1)
            return self.w * hidden_state, hidden_state[:, -1]
        return self.w * (hidden_state + x), hidden_state + x


def sums(window, transitions, w=1.0):
    """The loss of `Sum` on transitions (x, recorded state, whether an episode begins), with targets 0; one row."""
    f64 = partial(torch.tensor, dtype=torch.float64)
    model = Sum()
    buffer = filled(window, [(f64([[x]]), f64([[0.0]]), f64([[h]]), torch.tensor([r])) for x, h, r in transitions])
    return float(window_loss(window, buffer, forward_of(model), lambda o, y: o.sum(), {"w": f64([w])}))


def test_without_burn_in_it_starts_from_the_recorded_state_by_hand():
    # The last two of three: 20 + 2 and then 22 + 3, whatever was recorded later.
    assert sums(Window(2), [(1.0, 10.0, False), (2.0, 20.0, False), (3.0, 999.0, False)]) == (22 + 25) / 2


def test_with_burn_in_the_state_comes_through_the_transitions_before_the_window_by_hand():
    # From the 10 that was recorded two before the window: 10 + 1 + 2, and then + 3 and + 4.
    transitions = [(1.0, 10.0, False), (2.0, 20.0, False), (3.0, 30.0, False), (4.0, 40.0, False)]
    assert sums(Window(2, burn_in=2), transitions) == (16 + 20) / 2


def test_until_the_burn_in_is_there_the_recorded_state_is_taken_by_hand():
    transitions = [(1.0, 10.0, False), (2.0, 20.0, False), (3.0, 30.0, False)]
    assert sums(Window(2, burn_in=2), transitions) == (22 + 25) / 2
    assert sums(Window(2, burn_in=1), transitions) == (13 + 16) / 2


def test_episodes_that_begin_in_the_burn_in_and_in_the_window_are_forgotten_there_by_hand():
    transitions = [(1.0, 10.0, False), (2.0, 20.0, True), (3.0, 30.0, False), (4.0, 40.0, True)]
    assert sums(Window(2, burn_in=2), transitions) == (5 + 4) / 2
    assert sums(Window(3), transitions) == (2 + 5 + 4) / 3


@over_models
def test_burn_in_is_exact_where_an_episode_begins_within_it(make):
    window = Window(2, burn_in=3)
    model, params = model_and_params(make)
    transitions = stream(model, 5, masked=False)
    transitions = [(*one[:3], torch.full((B,), t == 1)) for t, one in enumerate(transitions)]
    loss = partial(window_loss, window, forward=forward_of(model), loss_fn=root_loss, params=params)
    state = model.init_hidden(B)
    for x, _, _, _ in transitions[1:3]:
        _, state = functional_call(model, params, (x, state))
    exact = by_hand(Window(2), [(*transitions[3][:2], state, ()), (*transitions[4][:2], state, ())], model, params)
    close(loss(buffer=filled(window, transitions)), exact)
    spoiled = [(x, y, tree_map(lambda leaf: leaf + 100.0, h), r) for x, y, h, r in transitions]
    close(loss(buffer=filled(window, spoiled)), exact)


@over_models
def test_there_is_no_gradient_through_the_burn_in(make):
    window = Window(2, burn_in=2)
    model, params = model_and_params(make)
    buffer = filled(window, stream(model, 4, masked=False))

    def loss(params, x, hidden):
        return window_loss(window, buffer._replace(x=x, hidden=hidden), forward_of(model), root_loss, params)

    of_x, of_hidden = grad(loss, argnums=(1, 2))(params, buffer.x, buffer.hidden)
    assert (of_x[:, :2] == 0).all()
    assert (of_x[:, 2:] != 0).any(-1).all()
    assert all((leaf == 0).all() for leaf in tree_leaves(of_hidden))


@pytest.mark.parametrize("burn_in", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_window_not_yet_full_is_a_mean_over_what_is_there(count, burn_in):
    window = Window(5, minimum=1, burn_in=burn_in)
    model, params = model_and_params(MODELS["GRU"])
    transitions = stream(model, count)
    ours = window_loss(window, filled(window, transitions), forward_of(model), root_loss, params)
    close(ours, by_hand(Window(count), transitions, model, params))


def test_an_empty_window_has_loss_0_and_no_gradient():
    window = Window(3, burn_in=1)
    model, params = model_and_params(MODELS["GRU"])
    buffer = keep_newest(filled(window, stream(model, 3)), 0, torch.tensor(True))
    gradient, value = grad_and_value(lambda p: window_loss(window, buffer, forward_of(model), root_loss, p))(params)
    assert value == 0
    assert all((leaf == 0).all() for leaf in gradient.values())


def test_without_targets_the_loss_is_of_the_output_alone():
    window = Window(3)
    model, params = model_and_params(MODELS["GRU"])
    transitions = [(x, (), hidden, reset) for x, _, hidden, reset in stream(model, 2)]
    ours = window_loss(window, filled(window, transitions), forward_of(model), entropy_loss, params)
    expected = by_hand(window, [(x, None, h, r) for x, _, h, r in transitions], model, params, entropy_loss)
    close(ours, expected)


def test_targets_may_be_labels():
    window = Window(3)
    model, params = model_and_params(MODELS["GRU"])
    labels = [torch.tensor([0, 1]), torch.tensor([1, 1])]
    data = stream(model, 2, masked=False)
    transitions = [(x, y, h, ()) for (x, _, h, _), y in zip(data, labels, strict=True)]
    ours = window_loss(window, filled(window, transitions), forward_of(model), functional.cross_entropy, params)
    close(ours, by_hand(window, transitions, model, params, functional.cross_entropy))


@pytest.mark.parametrize("burn_in", [0, 2])
def test_a_model_without_a_state_is_a_mean_over_its_steps(burn_in):
    window = Window(2, burn_in=burn_in)
    model = nn.Linear(D, O).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    data = [(x, y, (), ()) for x, y, _, _ in stream(GRU(1, D, O), 5)]
    ours = window_loss(window, filled(window, data), forward_of(model), mse_loss, params)
    close(ours, torch.stack([mse_loss(model(x), y) for x, y, _, _ in data[-2:]]).mean())


@pytest.mark.parametrize("burn_in", [0, 2])
def test_vmap_over_streams_of_different_ages_equals_a_loop(burn_in):
    window = Window(3, burn_in=burn_in)
    model, params = model_and_params(MODELS["LSTM"])
    buffers = [filled(window, stream(model, count, seed=count)) for count in (1, 4, 7)]
    new = [stream(model, 1, seed=20 + i)[0] for i in range(3)]
    dropped = torch.tensor([True, False, True])
    many: dict[str, Tensor] = {name: torch.stack([p, p + 0.1, p - 0.1]) for name, p in params.items()}

    def after(buffer, one, where, params):
        buffer = keep_newest(push(buffer, *one), 3, where)
        return grad_and_value(lambda p: window_loss(window, buffer, forward_of(model), root_loss, p))(params), buffer

    stacked = tree_map(lambda *leaves: torch.stack(leaves), *buffers), tree_map(lambda *t: torch.stack(t), *new)
    mapped, held = vmap(after)(*stacked, dropped, many)
    for i in range(3):
        one, alone = after(buffers[i], new[i], dropped[i], {name: p[i] for name, p in many.items()})
        close(tree_map(lambda leaf, i=i: leaf[i], mapped), one)
        for ours, theirs in zip(tree_leaves(held), tree_leaves(alone), strict=True):
            assert torch.equal(ours[i], theirs)


# Settings.


def test_the_capacity_is_the_window_and_what_runs_before_it():
    assert Window(4, burn_in=3).capacity == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1; got 0"),
        ({"length": -1}, ValueError, "length must be >= 0; got -1"),
        ({"length": 2.0}, TypeError, r"length must be an integer >= 0; got 2\.0"),
        ({"length": True}, TypeError, "length must be an integer >= 0; got True"),
        ({"length": 3, "minimum": 0}, ValueError, "minimum must be between 1 and length = 3; got 0"),
        ({"length": 3, "minimum": 4}, ValueError, "minimum must be between 1 and length = 3; got 4"),
        ({"length": 3, "minimum": None}, TypeError, "minimum must be an integer >= 0; got None"),
        ({"length": 3, "burn_in": -1}, ValueError, "burn_in must be >= 0; got -1"),
        ({"length": 3, "burn_in": "1"}, TypeError, "burn_in must be an integer >= 0; got '1'"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Window(**options)
