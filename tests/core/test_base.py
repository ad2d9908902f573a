"""The laws of the contract, one suite over every model, and the functional call."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

from ssmrl.core import GRU, LSTM, MLP, DiagonalSSM, StateModel, StateSpaceModel, Transformer, functional_forward
from ssmrl.core.base import initial_state

D, O = 3, 2  # noqa: E741
MODELS = {
    "StateSpaceModel": partial(StateSpaceModel, 4, D, O, hidden_dim=5),
    "GRU": partial(GRU, 3, D, O),
    "LSTM": partial(LSTM, 3, D, O),
    "MLP": partial(MLP, D, O, hidden_dim=5),
    "Transformer": partial(Transformer, 4, D, O, hidden_dim=3, num_heads=2, window=2),
    "DiagonalSSM": partial(DiagonalSSM, 2, D, O, hidden_dim=3),
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())

sizes = st.fixed_dictionaries({"batch": st.integers(1, 4), "steps": st.integers(1, 7), "seed": st.integers(0, 999)})


def draw(make, batch, steps, seed):
    """A float64 model, a sequence (B, T, D), a random state and a random mask (B, T)."""
    torch.manual_seed(seed)
    model = make().double()
    x = torch.randn(batch, steps, D, dtype=torch.float64)
    _, state = model(torch.randn(batch, 3, D, dtype=torch.float64), model.init_hidden(batch))
    return model, x, tree(torch.Tensor.detach, state), torch.rand(batch, steps) < 0.3


def tree(function, *states):
    if isinstance(states[0], torch.Tensor):
        return function(*states)
    return type(states[0])(*(tree(function, *parts) for parts in zip(*states, strict=True)))


def leaves(state):
    return [state] if isinstance(state, torch.Tensor) else [leaf for part in state for leaf in leaves(part)]


def spoiled(state):
    """NaN in every number of a state, and nonsense in every count."""
    return tree(lambda s: torch.full_like(s, torch.nan if s.is_floating_point() else 10**6), state)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@over_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_states_and_outputs_have_the_dtype_and_device_that_were_asked_for(make, dtype):
    model = make(dtype=dtype)
    output, after = model(torch.randn(2, 5, D, dtype=dtype), model.init_hidden(2))
    floats = [leaf for leaf in leaves(after) if leaf.is_floating_point()]
    assert {t.dtype for t in [*model.parameters(), *model.buffers(), *floats, output]} == {dtype}
    assert {p.device.type for p in make(device="meta", dtype=dtype).parameters()} == {"meta"}


@over_models
@settings(max_examples=20, deadline=None)
@given(size=sizes, data=st.data())
def test_a_sequence_equals_its_steps_for_every_split(make, size, data):
    model, x, state, reset = draw(make, **size)
    split = data.draw(st.integers(0, size["steps"]))
    whole, last = model(x, state, reset)
    first_part, between = model(x[:, :split], state, reset[:, :split])
    second_part, last_of_parts = model(x[:, split:], between, reset[:, split:])
    close(torch.cat([first_part, second_part], 1), whole)
    close(last_of_parts, last)
    steps = []
    for t in range(size["steps"]):
        y, state = model(x[:, t], state, reset[:, t])
        steps.append(y)
    close(torch.stack(steps, 1), whole)
    close(state, last)


@over_models
@settings(max_examples=20, deadline=None)
@given(size=sizes, data=st.data())
def test_a_reset_equals_a_fresh_start(make, size, data):
    model, x, state, _ = draw(make, **size)
    at = data.draw(st.integers(0, size["steps"] - 1))
    row = data.draw(st.integers(0, size["batch"] - 1))
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[row, at] = True
    y, last = model(x, state, reset)
    fresh, fresh_last = model(x[row : row + 1, at:], None)
    close(y[row : row + 1, at:], fresh)
    close(tree(lambda s: s[row : row + 1], last), fresh_last)
    untouched, _ = model(x, state)
    others = torch.arange(size["batch"]) != row
    close(y[others], untouched[others])
    close(y[row, :at], untouched[row, :at])


@over_models
def test_a_reset_forgets_a_state_of_nan(make):
    model, x, state, _ = draw(make, batch=2, steps=3, seed=0)
    reset = torch.tensor([[True, False, False]] * 2)
    for steps in (slice(None), 0):
        y, last = model(x[:, steps], spoiled(state), reset[:, steps])
        fresh, fresh_last = model(x[:, steps])
        close(y, fresh)
        close(last, fresh_last)


@over_models
def test_a_reset_forgets_nan_in_the_derivative_of_a_state_and_in_earlier_inputs(make):
    model, x, state, _ = draw(make, batch=2, steps=4, seed=0)
    fresh, fresh_last = model(x[:, 2:])
    names = tuple(dict(model.named_parameters()))
    expected = torch.autograd.grad(fresh.sum(), tuple(model.parameters()))
    reset = torch.tensor([[False, False, True, False]] * 2)
    y, last = model(x[:, 2:], spoiled(state), reset[:, 2:])
    close(
        dict(zip(names, torch.autograd.grad(y.sum(), tuple(model.parameters())), strict=True)),
        dict(zip(names, expected, strict=True)),
    )
    x[:, 1] = torch.nan
    y, last = model(x, state, reset)
    close(y[:, 2:], fresh)
    close(last, fresh_last)


@over_models
@settings(max_examples=20, deadline=None)
@given(size=sizes, data=st.data())
def test_rows_do_not_influence_each_other(make, size, data):
    model, x, state, reset = draw(make, **size)
    order = torch.tensor(data.draw(st.permutations(range(size["batch"]))))
    y, last = model(x, state, reset)
    permuted, permuted_last = model(x[order], tree(lambda s: s[order], state), reset[order])
    close(permuted, y[order])
    close(permuted_last, tree(lambda s: s[order], last))
    bad = x.clone()
    bad[0] = torch.nan
    close(model(bad, state, reset)[0][1:], y[1:])


@over_models
@settings(max_examples=10, deadline=None)
@given(size=sizes, masked=st.booleans())
def test_vmap_over_stacked_parameters_equals_a_loop_over_models(make, size, masked):
    model, x, state, reset = draw(make, **size)
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for m in models:
            for p in m.parameters():
                p.add_(0.1 * torch.randn_like(p))
    params, _ = stack_module_state(models)
    mask = reset if masked else None

    def loss(p):
        y, _ = functional_call(model, p, (x, state, mask))
        return y.square().sum()

    second = lambda p: grad(lambda q: sum(g.square().sum() for g in grad(loss)(q).values()))(p)  # noqa: E731
    for function in (grad(loss), second):
        stacked = vmap(function)(params)
        for i in range(3):
            one = function({name: p[i] for name, p in params.items()})
            close({name: p[i] for name, p in stacked.items()}, one, tolerance=1e-9)


@over_models
def test_vmap_over_states_inputs_and_masks_equals_a_loop(make):
    model, *_ = draw(make, batch=1, steps=1, seed=3)
    x = torch.randn(3, 2, 4, D, dtype=torch.float64)
    reset = torch.rand(3, 2, 4) < 0.3
    states = [model(torch.randn(2, n, D, dtype=torch.float64))[1] for n in (1, 2, 6)]  # of different ages
    y, last = vmap(model)(x, tree(lambda *s: torch.stack(s), *states), reset)
    for i, state in enumerate(states):
        close((y[i], tree(lambda s, i=i: s[i], last)), model(x[i], state, reset[i]))


@over_models
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_equal_finite_differences(make, masked):
    model, x, state, reset = draw(make, batch=2, steps=3, seed=1)
    names = [name for name, _ in model.named_parameters()]
    floating = [leaf for leaf in leaves(state) if leaf.is_floating_point()]

    def function(x, *values):
        params = dict(zip(names, values, strict=False))
        rest = iter(values[len(names) :])
        start = tree(lambda s: next(rest) if s.is_floating_point() else s, state)
        y, last = functional_call(model, params, (x, start, reset if masked else None))
        return y, *(leaf for leaf in leaves(last) if leaf.is_floating_point())

    inputs = [v.detach().clone().requires_grad_() for v in (x, *model.parameters(), *floating)]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)
    # Entry by entry it takes a minute for the larger models; fast mode compares random projections of all entries.
    fast = sum(v.numel() for v in inputs) > 150
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=fast)


def slopes(function, params, step=1e-6):
    """The derivative of a scalar along a random direction of the parameters: by `grad`, and by finite differences."""
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    slope = sum((g * direction[name]).sum() for name, g in grad(function)(params).items())
    ahead, behind = (function({n: p + s * step * direction[n] for n, p in params.items()}) for s in (1, -1))
    return slope, (ahead - behind) / (2 * step)


@over_models
@pytest.mark.parametrize("mapped", [False, True])
def test_the_third_derivative_equals_finite_differences(make, mapped):
    """Along a random direction of the parameters; mapped: of the sum over two sequences, each under vmap."""
    model, x, state, _ = draw(make, batch=2, steps=4, seed=3)
    params = {name: p.detach() for name, p in model.named_parameters()}
    xs = torch.stack([x, 0.5 * x]) if mapped else x[None]

    def second(params, x):
        first = grad(lambda p: (functional_call(model, p, (x, state))[0] ** 3).sum())
        return sum((g**2).sum() for g in grad(lambda p: sum((g**2).sum() for g in first(p).values()))(params).values())

    found, expected = slopes(lambda p: vmap(second, in_dims=(None, 0))(p, xs).sum(), params)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@over_models
def test_the_meta_gradient_equals_finite_differences(make):
    """Through three SGD steps on two tasks, vmapped, along a random direction."""
    model, x, state, _ = draw(make, batch=2, steps=4, seed=4)
    params = {name: p.detach() for name, p in model.named_parameters()}
    xs, ys = torch.stack([x, 0.5 * x]), torch.randn(2, 2, 4, O, dtype=torch.float64)

    def task_loss(params, x, y):
        loss = lambda p: ((functional_call(model, p, (x, state))[0] - y) ** 2).mean()  # noqa: E731
        for _ in range(3):
            params = {name: params[name] - 0.1 * g for name, g in grad(loss)(params).items()}
        return loss(params)

    found, expected = slopes(lambda p: vmap(task_loss, in_dims=(None, 0, 0))(p, xs, ys).sum(), params)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@over_models
def test_forward_mode_agrees_with_reverse_mode(make):
    model, x, state, _ = draw(make, batch=2, steps=4, seed=2)
    tangent, cotangent = torch.randn_like(x), torch.randn(2, 4, O, dtype=torch.float64)
    function = lambda x: model(x, state)[0]  # noqa: E731
    forward = jvp(function, (x,), (tangent,))[1]
    pull_back = vjp(function, x)[1]
    close((forward * cotangent).sum(), (pull_back(cotangent)[0] * tangent).sum())


@over_models
def test_an_empty_batch_and_no_steps_are_legal(make):
    model = make()
    y, state = model(torch.empty(0, 4, D))
    assert y.shape == (0, 4, O)
    assert model(torch.empty(0, D), state)[0].shape == (0, O)
    start = model.init_hidden(2)
    y, state = model(torch.empty(2, 0, D), start)
    assert y.shape == (2, 0, O)
    close(state, start)


@over_models
def test_float32_and_bfloat16_run_and_keep_their_dtype(make):
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        x = torch.randn(2, 3, D, dtype=dtype)
        y, state = model(x)
        assert y.dtype == dtype
        for leaf in (*leaves(model.init_hidden()), *leaves(state)):
            assert leaf.dtype == (dtype if leaf.is_floating_point() else torch.int64)
        y.sum().backward()
        assert all(p.grad.dtype == dtype for p in model.parameters())


@over_models
def test_a_state_dict_makes_an_equal_model(make):
    model, other = make(), make()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, D)
    assert torch.equal(model(x)[0], other(x)[0])


@over_models
def test_bad_input_is_refused_in_one_sentence(make):
    model = make()
    x, state = torch.randn(4, 6, D), model.init_hidden(4)
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        model([1.0])
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\).*\(B, T, D\).*got \(3,\)"):
        model(x[0, 0])
    with pytest.raises(ValueError, match=r"x must have shape .* got \(1, 4, 6, 3\)"):
        model(x[None])
    with pytest.raises(ValueError, match=r"x must have 3 features on its last axis.*got 5 in shape \(4, 6, 5\)"):
        model(torch.randn(4, 6, 5))
    with pytest.raises(ValueError, match=r"x must be of dtype torch.float32.*got torch.float64"):
        model(x.double())
    with pytest.raises(ValueError, match=r"x must be on cpu, where the model is; got meta"):
        model(x.to("meta"))
    if leaves(state):
        with pytest.raises(ValueError, match=r"hidden_state.* must have shape \(4, .*got \(3, "):
            model(x, tree(lambda s: s[:3], state))
        with pytest.raises(ValueError, match=r"hidden_state.* must be of dtype torch.float32.*got torch.float64"):
            model(x, tree(torch.Tensor.double, state))
    with pytest.raises(ValueError, match=r"reset must have shape \(B, T\) = \(4, 6\) to match x; got \(6, 4\)"):
        model(x, state, torch.zeros(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset must have shape \(B,\) = \(4,\) to match x; got \(4, 1\)"):
        model(x[:, 0], state, torch.zeros(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset must be of dtype torch.bool; got torch.float32"):
        model(x, state, torch.zeros(4, 6))
    with pytest.raises(ValueError, match="batch_size must be an integer >= 0; got -1"):
        model.init_hidden(-1)


@over_models
def test_save_and_load_keep_weights_dtype_and_arguments(make, tmp_path):
    torch.manual_seed(0)
    model = make().double()
    model.save(tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.constructor_arguments == model.constructor_arguments
    assert all(p.requires_grad for p in loaded.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert torch.equal(loaded(x)[0], model(x)[0])


class _Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class _Foreign(nn.Module):
    """Somebody's own module, with a NamedTuple as its state and a learned start."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.5]))
        self.linear = nn.Linear(2, 1)

    def init_hidden(self, batch_size=1):
        return _Pair(self.start.expand(batch_size, 1), torch.zeros(batch_size, 1))

    def forward(self, x, hidden_state):
        a = torch.tanh(self.linear(torch.cat([x, hidden_state.a], -1)))
        return a, _Pair(a, hidden_state.b + a)


def test_functional_forward_replaces_parameters_and_leaves_the_model_alone():
    model = StateSpaceModel(4, D, O, 5)
    x, state = torch.randn(2, 6, D), torch.randn(2, 4)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    y, last = functional_forward(model, doubled, x, state)
    twin = copy.deepcopy(model)
    twin.load_state_dict(doubled)
    assert torch.equal(y, twin(x, state)[0])
    assert torch.equal(last, twin(x, state)[1])
    assert torch.equal(functional_forward(model, {}, x, state)[0], model(x, state)[0])


def test_functional_forward_refuses_names_that_the_model_has_not():
    with pytest.raises(ValueError, match=r"names of the model's parameters; got \['wight'\]"):
        functional_forward(nn.Linear(D, O), {"wight": torch.zeros(O, D)}, torch.zeros(1, D))


def test_functional_forward_leaves_buffers_as_they_are():
    model = nn.BatchNorm1d(D)
    before = copy.deepcopy(model.state_dict())
    y, _ = functional_forward(model, {"running_mean": torch.ones(D)}, torch.randn(4, D))
    assert y.mean(0).abs().max() < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functional_forward_differentiates_a_learned_initial_state():
    model = _Foreign()
    params = {name: p.detach() for name, p in model.named_parameters()}
    gradient = grad(lambda p: functional_forward(model, p, torch.ones(3, 1))[0].sum())(params)
    assert gradient["start"].abs() > 0


def test_functional_forward_calls_a_module_without_a_state():
    model = nn.Linear(D, O)
    x = torch.randn(2, D)
    y, state = functional_forward(model, {}, x)
    assert state is None
    assert torch.equal(y, model(x))


def test_state_model_is_an_interface():
    with pytest.raises(TypeError, match="abstract"):
        StateModel()  # type: ignore[abstract]


# The reset of a functional call.


@over_models
@pytest.mark.parametrize("steps", [None, 5])
def test_functional_forward_hands_the_reset_to_a_model_that_takes_it(make, steps):
    model, x, state, reset = draw(make, batch=4, steps=5, seed=7)
    reset[:, 0] = torch.tensor([True, False, True, False])
    if steps is None:
        x, reset = x[:, 0], reset[:, 0]
    close(functional_forward(model, {}, x, state, reset=reset), model(x, state, reset))
    close(functional_forward(model, {}, x, reset=reset), model(x, None, reset))
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    close(functional_forward(model, doubled, x, state, reset=reset), functional_call(model, doubled, (x, state, reset)))


class _Plain(nn.Module):
    """A model of ours, without its argument `reset`."""

    def __init__(self, model):
        super().__init__()
        self.own = model

    def init_hidden(self, batch_size=1):
        return self.own.init_hidden(batch_size)

    def forward(self, x, hidden_state):
        return self.own(x, hidden_state)


@over_models
@settings(max_examples=10, deadline=None)
@given(size=sizes, truncate=st.one_of(st.none(), st.integers(1, 4)), given_state=st.booleans())
def test_a_reset_between_steps_equals_that_of_a_model_that_takes_it(make, size, truncate, given_state):
    model, x, state, reset = draw(make, **size)
    run = lambda m, p: functional_forward(  # noqa: E731
        m, p, x, state if given_state else None, reset=reset, truncate=truncate
    )
    own = {name: p.detach() for name, p in model.named_parameters()}
    plain = {f"own.{name}": p for name, p in own.items()}
    close(run(_Plain(model), plain), run(model, own))
    found, expected = (
        grad(lambda p, m=m: run(m, p)[0].square().sum())(p) for m, p in ((_Plain(model), plain), (model, own))
    )
    close({name.removeprefix("own."): g for name, g in found.items()}, expected, tolerance=1e-10)


class _Sum(nn.Module):
    """Takes no reset: y = w h, h' = (h.a + x, h.b + 1), from a learned start; one step a call."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def init_hidden(self, batch_size=1):
        return _Pair(self.start.expand(batch_size, 1), torch.zeros(batch_size, dtype=torch.int64))

    def forward(self, x, hidden_state):
        assert x.dim() == 2
        after = _Pair(hidden_state.a + x, hidden_state.b + 1)
        return self.w * after.a, after


ROWS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]], dtype=torch.float64)[..., None]
AT = torch.tensor([[False, False, True, False], [True, False, False, True]])
HELD = _Pair(torch.tensor([[100.0], [1000.0]], dtype=torch.float64), torch.tensor([7, 8]))


def test_functional_forward_runs_a_model_without_a_reset_step_by_step_by_hand():
    # From 100: 101, 103; anew from 0.5: 3.5, 7.5. And from 0.5: 10.5, 30.5, 60.5; and 40.5. Twice that comes out.
    y, last = functional_forward(_Sum(), {}, ROWS, HELD, reset=AT)
    assert (y[..., 0] / 2).tolist() == [[101.0, 103.0, 3.5, 7.5], [10.5, 30.5, 60.5, 40.5]]
    assert last.a[:, 0].tolist() == [7.5, 40.5]
    assert last.b.tolist() == [2, 1]


def test_functional_forward_resets_one_step_of_a_model_without_a_reset_by_hand():
    y, last = functional_forward(_Sum(), {}, ROWS[:, 0], HELD, reset=torch.tensor([True, False]))
    assert (y[:, 0] / 2).tolist() == [1.5, 1010.0]
    assert last.b.tolist() == [1, 9]


def test_functional_forward_resets_to_a_start_of_these_parameters():
    params = {"start": torch.tensor([-3.0], dtype=torch.float64)}
    y, _ = functional_forward(_Sum(), params, ROWS, HELD, reset=AT)
    assert (y[..., 0] / 2).tolist() == [[101.0, 103.0, 0.0, 4.0], [7.0, 27.0, 57.0, 37.0]]
    # Two of eight outputs come from the start after the reset of row 0, and four of row 1, with w = 2 each.
    gradient = grad(lambda p: functional_forward(_Sum(), p, ROWS, HELD, reset=AT)[0].sum())(params)
    assert gradient["start"].tolist() == [12.0]


def test_functional_forward_forgets_a_state_of_nan_in_a_model_without_a_reset():
    spoilt = HELD._replace(a=torch.full_like(HELD.a, torch.nan))
    y, _ = functional_forward(_Sum(), {}, ROWS, spoilt, reset=AT)
    assert y[0, :2].isnan().all()
    assert torch.equal(y[0, 2:], functional_forward(_Sum(), {}, ROWS, HELD, reset=AT)[0][0, 2:])
    assert y[1].isfinite().all()


class _Keywords(_Sum):
    """Hands on what it does not know."""

    def forward(self, x, hidden_state, **options):
        if options:
            hidden_state = _Pair(torch.where(options["reset"][:, None], -1.0, hidden_state.a), hidden_state.b)
        return super().forward(x, hidden_state)


def test_functional_forward_gives_the_reset_to_a_model_that_takes_any_keyword():
    y, _ = functional_forward(_Keywords(), {}, ROWS[:, 0], HELD, reset=torch.tensor([True, False]))
    assert (y[:, 0] / 2).tolist() == [0.0, 1010.0]


@pytest.mark.parametrize("truncate", [1, 2, 3, 9])
@pytest.mark.parametrize("make", [MODELS["GRU"], MODELS["LSTM"], _Sum], ids=["GRU", "LSTM", "no reset argument"])
def test_functional_forward_truncates_between_resets_and_changes_no_value(make, truncate):
    model = make().double()
    torch.manual_seed(0)
    width = 1 if make is _Sum else D
    x, state = torch.randn(2, 4, width, dtype=torch.float64), model.init_hidden(2)
    whole = functional_forward(model, {}, x, state, reset=AT)
    close(functional_forward(model, {}, x, state, reset=AT, truncate=truncate), whole)


def test_the_derivative_is_cut_by_truncation_and_by_a_reset_by_hand():
    def derivative(truncate):
        def total(x):
            return functional_forward(_Sum(), {}, x, HELD, reset=AT, truncate=truncate)[0].sum()

        return (grad(total)(ROWS)[..., 0] / 2).tolist()

    # How many outputs every input reaches: up to the next reset, and with truncation up to the next cut.
    assert derivative(None) == [[2.0, 1.0, 2.0, 1.0], [3.0, 2.0, 1.0, 1.0]]
    assert derivative(3) == [[2.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 1.0]]
    assert derivative(2) == [[2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 1.0, 1.0]]
    assert derivative(1) == [[1.0] * 4] * 2


@pytest.mark.parametrize("make", [MODELS["LSTM"], _Sum], ids=["LSTM", "no reset argument"])
@pytest.mark.parametrize("truncate", [None, 2])
def test_functional_forward_with_a_reset_under_vmap_equals_a_loop(make, truncate):
    torch.manual_seed(0)
    model = make().double()
    width = 1 if make is _Sum else D
    x, reset = torch.randn(3, 2, 5, width, dtype=torch.float64), torch.rand(3, 2, 5) < 0.4
    states = [tree(lambda s, i=i: s + i, model.init_hidden(2)) for i in range(3)]
    params: dict[str, torch.Tensor] = {
        name: torch.stack([p.detach(), p.detach() + 0.1, p.detach() - 0.1]) for name, p in model.named_parameters()
    }

    def run(params, x, state, reset):
        return functional_forward(model, params, x, state, reset=reset, truncate=truncate)

    mapped = vmap(run)(params, x, tree(lambda *s: torch.stack(s), *states), reset)
    derivative = vmap(grad(lambda *args: run(*args)[0].square().sum()))
    gradients = derivative(params, x, tree(lambda *s: torch.stack(s), *states), reset)
    for i in range(3):
        one = {name: p[i] for name, p in params.items()}
        y, last = run(one, x[i], states[i], reset[i])
        close((mapped[0][i], tree(lambda s, i=i: s[i], mapped[1])), (y, last))
        expected = grad(lambda p, i=i: run(p, x[i], states[i], reset[i])[0].square().sum())(one)
        close({name: g[i] for name, g in gradients.items()}, expected)


def test_a_model_without_a_state_takes_no_notice_of_a_reset():
    model = nn.Linear(D, O)
    for x in (torch.randn(2, D), torch.randn(2, 4, D)):
        y, state = functional_forward(model, {}, x, reset=torch.ones(x.shape[:-1], dtype=torch.bool))
        assert state is None
        assert torch.equal(y, model(x))


class _NoStart(nn.Module):
    """A state that has to be given, and no way to begin."""

    def forward(self, x, hidden_state):
        return hidden_state + x, hidden_state + x


def test_a_state_that_cannot_begin_cannot_be_reset():
    x, state = torch.ones(2, 1), torch.ones(2, 1)
    assert functional_forward(_NoStart(), {}, x, state)[0].tolist() == [[2.0]] * 2
    with pytest.raises(ValueError, match=r"_NoStart must have init_hidden, the state after a reset, or a `reset` arg"):
        functional_forward(_NoStart(), {}, x, state, reset=torch.tensor([True, False]))


@pytest.mark.parametrize("make", [MODELS["GRU"], lambda: nn.Linear(D, O)], ids=["GRU", "Linear"])
@pytest.mark.parametrize("truncate", [None, 2])
@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (torch.zeros(6, 4, dtype=torch.bool), r"reset must have shape \(B, T\) = \(4, 6\) to match x; got \(6, 4\)"),
        (torch.zeros(4, dtype=torch.bool), r"reset must have shape \(B, T\) = \(4, 6\) to match x; got \(4,\)"),
        (torch.zeros(4, 6), "reset must be of dtype torch.bool; got torch.float32"),
        (torch.zeros(4, 6, dtype=torch.bool, device="meta"), "reset must be on cpu, as x is; got meta"),
    ],
)
def test_functional_forward_refuses_a_reset_that_does_not_fit(make, truncate, reset, message):
    with pytest.raises(ValueError, match=message):
        functional_forward(make(), {}, torch.zeros(4, 6, D), reset=reset, truncate=truncate)


class _Begins(nn.Module):
    """Takes a reset, and begins by itself where it is given no state."""

    def forward(self, x, hidden_state=None, reset=None):
        held = torch.zeros_like(x) if hidden_state is None else hidden_state
        after = (held if reset is None else torch.where(reset[:, None], -1.0, held)) + x
        return after, after


def test_a_model_that_takes_a_reset_gets_it_without_a_state_too():
    y, _ = functional_forward(_Begins(), {}, torch.ones(2, 1), reset=torch.tensor([True, False]))
    assert y.tolist() == [[0.0], [1.0]]


def test_no_steps_of_a_model_without_a_reset_are_legal():
    model, state = GRU(3, D, O), torch.randn(2, 3)
    y, last = functional_forward(_Plain(model), {}, torch.zeros(2, 0, D), state, reset=torch.zeros(2, 0).bool())
    assert y.shape == (2, 0, O)
    assert torch.equal(last, state)


def test_functional_forward_refuses_a_reset_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"reset must be a Bool tensor .*got bool"):
        functional_forward(_Sum(), {}, ROWS[:, 0], HELD, reset=True)  # type: ignore[arg-type]


# What a functional call leaves behind.


class _Tied(nn.Module):
    """y = (x Aᵀ) Aᵀ ∘ 2c, with one weight in two places, and one buffer in two."""

    factor: torch.Tensor

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D, bias=False)
        self.second = nn.Linear(D, D, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("factor", torch.ones(D))
        self.second.register_buffer("same", self.factor)

    def forward(self, x):
        self.factor.mul_(2)
        return self.second(self.first(x)) * self.second.same


class _Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(D, D)

    def forward(self, x):
        return self.b(self.a(x))


def held(model):
    """All tensors that the modules of a model hold, as the objects they are, and their values."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor), type(tensor), tensor.tolist()) for name, tensor in own]


@pytest.mark.parametrize("make", [_Tied, _Twice, *MODELS.values(), lambda: nn.BatchNorm1d(D)])
@pytest.mark.parametrize("fails", [False, True])
def test_functional_forward_leaves_every_tensor_of_the_model_in_its_place(make, fails):
    model = make()
    before = held(model)
    params = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    if fails:
        with pytest.raises(RuntimeError, match="after all"), _failing(model):
            functional_forward(model, params, torch.randn(4, D))
    else:
        functional_forward(model, params, torch.randn(4, D))
    assert held(model) == before


@contextmanager
def _failing(model):
    """Its calls raise when they are done."""

    def fail(*_):
        raise RuntimeError("after all")

    handle = model.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_functional_forward_puts_a_tied_weight_in_all_its_places():
    weight, x = torch.randn(D, D), torch.randn(4, D)

    def output(w):
        return functional_forward(_Tied(), {"first.weight": w}, x)[0]

    close(output(weight), 2 * x @ weight.T @ weight.T)
    expected = grad(lambda w: (2 * x @ w.T @ w.T).square().sum())(weight)
    close(grad(lambda w: output(w).square().sum())(weight), expected, tolerance=1e-5)
    with pytest.raises(ValueError, match=r"names of the model's parameters; got \['second.weight'\]"):
        functional_forward(_Tied(), {"second.weight": weight}, x)


def test_functional_forward_writes_to_no_buffer_that_it_is_given_and_differentiates_it():
    model, factor = _Tied(), torch.full((D,), 3.0)
    x = torch.randn(4, D)
    y, _ = functional_forward(model, {"factor": factor}, x)
    assert factor.tolist() == [3.0] * D
    close(y, 6 * model(x) / 2)
    gradient = grad(lambda f: functional_forward(_Tied(), {"factor": f}, x)[0].sum())(factor)
    assert gradient.abs().min() > 0


class _Counting(nn.Module):
    """Holds how often it was called, in a buffer that it replaces."""

    calls: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0.0))

    def init_hidden(self, batch_size=1):
        return torch.zeros(batch_size, 1)

    def forward(self, x, hidden_state):
        self.calls = self.calls + 1
        return x + self.calls, hidden_state


def test_a_buffer_that_forward_replaces_goes_on_over_the_pieces_of_a_sequence_and_then_is_as_before():
    model = _Counting()
    y, _ = functional_forward(model, {}, torch.zeros(1, 5, 1), truncate=2)
    assert y[0, :, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert model.calls == 0


def test_functional_forward_runs_the_hooks_of_the_model_once():
    model, seen = nn.Linear(D, O), []
    model.register_forward_pre_hook(lambda m, args: seen.append(type(m.weight)))
    functional_forward(model, {"weight": torch.zeros(O, D)}, torch.zeros(1, D))
    assert seen == [torch.Tensor]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its compiler does not follow context managers")
def test_functional_forward_compiles_in_one_graph():
    model = _Tied()
    params = {"first.weight": torch.randn(D, D)}
    x = torch.randn(4, D)
    compiled = torch.compile(lambda p, x: functional_forward(model, p, x)[0], backend="eager", fullgraph=True)
    before = held(model)
    close(compiled(params, x), functional_forward(model, params, x)[0])
    assert held(model) == before


def test_the_initial_state_of_a_module_without_one_is_none():
    assert initial_state(torch.nn.Linear(2, 2), 3) is None
    model = GRU(4, 2, 2)
    assert torch.equal(initial_state(model, 3), model.init_hidden(3))
