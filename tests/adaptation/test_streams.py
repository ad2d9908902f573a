"""StreamAdapter: many streams at once are as many Adapters, and none touches another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssmrl import GRU, MLP, AdaptationConfig, Adapter, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import (
    Guard,
    Outcome,
    Reset,
    Window,
    entropy_loss,
    learning_rates,
    reset_at_episode_end,
    reset_every,
    reset_on_rise,
    scale_by_learning_rates,
)
from ssmrl.adaptation.tree import tree_leaves, tree_map
from ssmrl.core import functional_forward

N, D, O, S = 5, 3, 2, 4  # noqa: E741

CONFIGS: dict[str, AdaptationConfig] = {
    "sgd": AdaptationConfig(0.05, 3),
    "no steps": AdaptationConfig(0.05, 0),
    "adam": AdaptationConfig(num_steps=3, optimizer=torchopt.adam(0.02)),
    "adamax, a count that is a Python number": AdaptationConfig(num_steps=3, optimizer=torchopt.adamax(0.02)),
    "momentum": AdaptationConfig(num_steps=3, optimizer=torchopt.sgd(0.02, momentum=0.9, nesterov=True)),
    "dampening, a first call that is another one": AdaptationConfig(
        num_steps=3, optimizer=torchopt.sgd(0.02, momentum=0.9, dampening=0.3), reset=reset_every(4)
    ),
    "rates of every step": AdaptationConfig(
        num_steps=3,
        optimizer=scale_by_learning_rates(
            torch.tensor([0.1, 0.05, 0.02, 0.01, 0.005], dtype=torch.float64), per_step=True
        ),
    ),
    "clip": AdaptationConfig(0.1, 3, max_grad_norm=0.5),
    "trust region": AdaptationConfig(0.1, 3, max_distance=0.3),
    "pull": AdaptationConfig(0.1, 3, anchor_strength=0.5),
    "average": AdaptationConfig(0.1, 3, average=0.8),
    "from the anchor": AdaptationConfig(num_steps=3, optimizer=torchopt.adam(0.02), from_anchor=True),
    "every third": AdaptationConfig(0.1, 2, every=3),
    "every third, from the anchor": AdaptationConfig(0.1, 2, every=3, from_anchor=True),
    "head": AdaptationConfig(0.1, 2, adapted="output_mlp.out"),
    "window": AdaptationConfig(0.05, 3, window=Window(4, minimum=2)),
    "window with burn-in": AdaptationConfig(0.05, 3, window=Window(4, burn_in=3)),
    "at episode end": AdaptationConfig(0.05, 2, window=Window(4), reset=reset_at_episode_end(keep=1)),
    "every fourth": AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.02), reset=reset_every(4)),
    "on a rise": AdaptationConfig(0.05, 2, window=Window(5), reset=reset_on_rise(1.2, fast=0.9, slow=0.3, keep=2)),
    "guard": AdaptationConfig(0.6, 3, window=Window(4), guard=Guard(allowance=0.5)),
    "everything": AdaptationConfig(
        num_steps=2,
        optimizer=torchopt.adam(0.05),
        max_grad_norm=1.0,
        max_distance=0.5,
        anchor_strength=0.01,
        average=0.5,
        every=2,
        window=Window(4, minimum=2, burn_in=2),
        reset=reset_on_rise(1.5),
        guard=Guard(allowance=1.0),
    ),
}
over_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def model_of(kind: Any = StateSpaceModel) -> Any:
    torch.manual_seed(1)
    model = kind(S, D, O, hidden_dim=6) if kind is StateSpaceModel else kind(S, D, O)
    return model.double()


def recording(length=12, seed=0, streams=N):
    """Inputs, targets and masks of as many streams, (T, N, ...)."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(length, streams, D + O + 1, generator=generator, dtype=torch.float64)
    return 4 * draw[..., :D] - 2, 4 * draw[..., D:-1] - 2, draw[..., -1] < 0.15


def run(adapter, data, state=None):
    """Predictions and reports of a live loop, stacked."""
    results = []
    for x, y, first in zip(*data, strict=True):
        prediction, after = adapter(x, state, first)
        results.append((prediction, adapter.update(x, y, state, reset=first)))
        state = after
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def bits(tree, rows):
    """Leaves of a tree, (T, N, ...), of some streams."""
    return [leaf[:, rows] for leaf in tree_leaves(tree)]


def same(a, b):
    return all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in zip(a, b, strict=True))


# N streams are N Adapters.


@over_configs
@pytest.mark.parametrize("kind", [StateSpaceModel, GRU])
def test_n_streams_equal_n_adapters(kind, config):
    if kind is GRU and config.adapted:
        pytest.skip("the GRU has no such head")
    model = model_of(kind)
    xs, ys, firsts = recording()
    streams = StreamAdapter(model, config, N)
    adapters = [Adapter(copy.deepcopy(model), config) for _ in range(N)]
    state = model.init_hidden(N)
    for x, y, first in zip(xs, ys, firsts, strict=True):
        prediction, after = streams(x, state, first)
        report = streams.update(x, y, state, reset=first)
        for i, adapter in enumerate(adapters):
            row = slice(i, i + 1)
            alone = adapter.model(x[row], state[row], first[row])[0]
            torch.testing.assert_close(prediction[row], alone, rtol=1e-10, atol=1e-10)
            done = adapter.update(x[row], y[row], state[row], reset=first[row])
            ours = torch.stack([value[i].double() for value in report])
            theirs = torch.tensor([float(value) for value in done], dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)
        state = after
    for i, adapter in enumerate(adapters):
        assert streams.counts is not None
        assert [int(count[i]) for count in streams.counts] == list(adapter.counts or ())
        for name, value in streams.params(i).items():
            torch.testing.assert_close(value, adapter.model.get_parameter(name).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["every third", "every third, from the anchor", "window"])
def test_streams_that_are_out_of_step_report_what_adapters_do(name):
    """Where one adapts and another waits."""
    model, config = model_of(), CONFIGS[name]
    streams = StreamAdapter(model, config, N)
    adapters = [Adapter(copy.deepcopy(model), config) for _ in range(N)]
    for t, (x, y, _) in enumerate(zip(*recording(), strict=True)):
        if t in (4, 8):  # the first begins anew, and the second
            streams.reset(torch.arange(N) == t // 4 - 1)
            adapters[t // 4 - 1].reset()
        report = streams.update(x, y, model.init_hidden(N))
        for i, adapter in enumerate(adapters):
            done = adapter.update(x[i : i + 1], y[i : i + 1], model.init_hidden(1))
            ours = torch.stack([value[i].double() for value in report])
            theirs = torch.tensor([float(value) for value in done], dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_the_settings_that_these_tests_share_do_all_they_can():
    """The comparison above would be empty of what never happens in it."""
    happened = {}
    for name, config in CONFIGS.items():
        reports = run(StreamAdapter(model_of(), config, N), recording(), model_of().init_hidden(N))[1]
        happened[name] = (
            {Outcome(int(n)) for n in reports.outcome.unique()},
            {Reset(int(n)) for n in reports.reset.unique()},
        )
    assert Outcome.LOSS_ROSE in happened["guard"][0]
    assert Reset.GUARD in happened["guard"][1]
    assert Outcome.WAITING in happened["every third"][0]
    assert all(Reset.POLICY in happened[name][1] for name in ("at episode end", "every fourth", "on a rise"))


@pytest.mark.parametrize("length", [None, 6])
def test_a_sequence_of_every_stream(length):
    model = model_of()
    shape = (N,) if length is None else (N, length)
    x, y = torch.randn(*shape, D, dtype=torch.float64), torch.randn(*shape, O, dtype=torch.float64)
    streams = StreamAdapter(model, AdaptationConfig(0.05, 2, guard=Guard()), N)
    losses, steps = streams.update_step(x, y, None)
    for i in range(N):
        twin = copy.deepcopy(model)
        loss, taken = Adapter(twin, AdaptationConfig(0.05, 2, guard=Guard())).update_step(
            x[i : i + 1], y[i : i + 1], None
        )
        assert losses[i].item() == pytest.approx(loss, rel=1e-12)
        assert steps[i] == taken
        ours, _ = streams(x, None)
        torch.testing.assert_close(ours[i], twin(x[i : i + 1])[0][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: nn.Linear(D, O), lambda: MLP(D, O, hidden_dim=5)], ids=["Linear", "MLP"])
def test_a_model_without_a_state_streams_too(make):
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(N, D), torch.randn(N, O)
    streams = StreamAdapter(model, AdaptationConfig(0.1, 2, window=Window(3), guard=Guard()), N)
    for _ in range(4):
        before = streams(x)[0]
        streams.update_step(x, y, None)
    assert ((streams(x)[0] - y).square().mean(-1) < (before - y).square().mean(-1)).all()


def test_a_loss_without_targets():
    torch.manual_seed(0)
    model = nn.Linear(D, 4)
    x = torch.randn(N, D)
    streams = StreamAdapter(model, AdaptationConfig(0.5, 3, window=Window(2)), N, loss_fn=entropy_loss)
    for _ in range(3):
        report = streams.update(x, None, None)
    assert (report.loss_after < report.loss).all()
    assert (report.outcome == Outcome.ADAPTED).all()


# How it is run changes nothing.


@pytest.mark.parametrize("name", ["adam", "head", "everything", "dampening, a first call that is another one"])
@pytest.mark.parametrize("how", [{"chunk_size": 2}, {"compile": "trace"}, {"chunk_size": 3, "compile": "trace"}])
def test_chunks_and_traces_give_the_same_numbers(name, how):
    data, state = recording(), model_of().init_hidden(N)
    plain = run(StreamAdapter(model_of(), CONFIGS[name], N), data, state)
    other = run(StreamAdapter(model_of(), CONFIGS[name], N, **how), data, state)
    for ours, theirs in zip(tree_leaves(other), tree_leaves(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_a_compiled_update_gives_the_same_numbers():
    config = AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05), guard=Guard(), adapted="output_mlp.out")
    (xs, ys, firsts), state = recording(4), model_of().init_hidden(N)
    plain, compiled = (StreamAdapter(model_of(), config, N, compile=compile) for compile in (False, True))
    for x, y, first in zip(xs, ys, firsts, strict=True):
        ours, theirs = (adapter.update(x, y, state, reset=first) for adapter in (compiled, plain))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_traced_adapter_gives_the_same_numbers():
    (xs, ys, firsts), state = recording(streams=1), model_of().init_hidden(1)
    plain, traced = (Adapter(model_of(), CONFIGS["everything"], compile=compile) for compile in (False, "trace"))
    for x, y, first in zip(xs, ys, firsts, strict=True):
        ours, theirs = (adapter.update(x, y, state, reset=first) for adapter in (traced, plain))
        assert list(ours) == pytest.approx(list(theirs), rel=1e-10, abs=1e-10, nan_ok=True)
    for (_, a), (_, b) in zip(traced.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_update_step_is_update_with_less_to_say():
    data, state = recording(), model_of().init_hidden(N)
    for config in (CONFIGS["everything"], CONFIGS["adam"]):
        one, other = (StreamAdapter(model_of(), config, N) for _ in range(2))
        for x, y, first in zip(*data, strict=True):
            report = one.update(x, y, state, reset=first)
            loss, steps = other.update_step(x, y, state, reset=first)
            fine = report.outcome == Outcome.ADAPTED
            assert torch.equal(report.loss[fine], loss[fine])
            assert torch.equal(report.num_steps, steps)
        assert same(tree_leaves(one.params(2)), tree_leaves(other.params(2)))


def test_calls_in_between_evaluate_the_loss_once_and_adapt_in_no_stream():
    evaluations = []

    def loss(output, y):
        evaluations.append(1)
        return (output - y).square().mean()

    model, (xs, ys, _) = model_of(), recording()
    streams = StreamAdapter(model, AdaptationConfig(0.1, 4, every=3), N, loss_fn=loss)
    counts = []
    for x, y in zip(xs[:6], ys[:6], strict=True):
        evaluations.clear()
        losses, steps = streams.update_step(x, y, None)
        assert losses.isfinite().all()
        counts.append((len(evaluations), int(steps[0])))
    assert counts == [(1, 0), (1, 0), (4, 4)] * 2


def test_the_model_is_never_written_to():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    run(StreamAdapter(model, CONFIGS["everything"], N), recording(), model.init_hidden(N))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_adapt_is_read_from_the_model_and_held_once():
    model = model_of()
    streams = StreamAdapter(model, CONFIGS["head"], N)
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randn(N, O, dtype=torch.float64)
    streams.update_step(x, y, None)
    assert streams.params(0).keys() == {"output_mlp.out.weight", "output_mlp.out.bias"}
    before, _ = streams(x)
    with torch.no_grad():
        model.output_input.bias += 1
    torch.testing.assert_close(streams(x)[0], before + 1)


# No stream touches another.


def spoil(data, stream, when, how):
    """The same recording, in which one stream goes wrong at one time."""
    xs, ys, firsts = (t.clone() for t in data)
    if how == "a NaN":
        xs[when, stream, 1] = torch.nan
    elif how == "a NaN target":
        ys[when:, stream] = torch.nan
    elif how == "infinity":
        xs[when:, stream] = torch.inf
    elif how == "constant":
        xs[when:, stream], ys[when:, stream] = 0.5, 0.25
    elif how == "exploding":
        factor = 10.0 ** torch.arange(len(xs) - when, dtype=xs.dtype)[:, None]
        xs[when:, stream] *= factor**3
        ys[when:, stream] *= factor**9
    elif how == "abrupt":
        ys[when:, stream] = -3 * ys[when:, stream] + 5
    elif how == "episodes":
        firsts[when:, stream] = True
    return xs, ys, firsts


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["adam", "head", "window with burn-in", "on a rise", "guard", "everything", "average"]),
    stream=st.integers(0, N - 1),
    when=st.integers(0, 9),
    how=st.sampled_from(
        ["a NaN", "a NaN target", "infinity", "constant", "exploding", "abrupt", "episodes", "dropped", "reset"]
    ),
    chunk_size=st.sampled_from([None, 2]),
    seed=st.integers(0, 50),
)
def test_what_happens_in_one_stream_changes_no_bit_of_the_others(name, stream, when, how, chunk_size, seed):
    config, data, state = CONFIGS[name], recording(10, seed), model_of().init_hidden(N)
    quiet = StreamAdapter(model_of(), config, N, chunk_size=chunk_size)
    troubled = StreamAdapter(model_of(), config, N, chunk_size=chunk_size)
    spoiled = spoil(data, stream, when, how)
    one = torch.arange(N) == stream
    results = []
    for adapter, recorded in ((quiet, data), (troubled, spoiled)):
        h, rows = state, []
        for t, (x, y, first) in enumerate(zip(*recorded, strict=True)):
            if adapter is troubled and t == when and how in ("dropped", "reset"):
                adapter.drop(one) if how == "dropped" else adapter.reset(one)
            prediction, after = adapter(x, h, first)
            rows.append((prediction, adapter.update(x, y, h, reset=first)))
            h = after
        results.append(tree_map(lambda *leaves: torch.stack(leaves), *rows))
    others = [i for i in range(N) if i != stream]
    assert same(bits(results[0], others), bits(results[1], others))
    for i in others:
        assert same(tree_leaves(quiet.params(i)), tree_leaves(troubled.params(i)))
    assert all(torch.isfinite(value).all() for value in troubled.params(stream).values())


def test_data_that_are_not_finite_leave_their_stream_as_it_was():
    model, data = model_of(), recording()
    streams = StreamAdapter(model, CONFIGS["everything"], N)
    run(streams, data, model.init_hidden(N))
    before: Any = streams.snapshot().streams
    x, y, state = data[0][0].clone(), data[1][0].clone(), model.init_hidden(N)
    x[1, 0], y[2, 1], state[3, 2] = torch.nan, torch.inf, -torch.inf
    report = streams.update(x, y, state)
    assert (report.outcome[1:4] == Outcome.BAD_DATA).all()
    assert (report.num_steps[1:4] == 0).all()
    assert report.loss[1:4].isnan().all()
    after: Any = streams.snapshot().streams
    assert after.counts.bad_data.tolist() == [0, 1, 1, 1, 0]
    for ours, theirs in zip(
        tree_leaves(after._replace(counts=())), tree_leaves(before._replace(counts=())), strict=True
    ):
        assert torch.equal(ours[1:4], theirs[1:4])


def test_steps_that_explode_are_not_taken():
    model = model_of()
    x, y = torch.ones(N, D, dtype=torch.float64), torch.ones(N, O, dtype=torch.float64)
    y[2] = 1e200
    report = StreamAdapter(model, AdaptationConfig(0.01, 2), N).update(x, y, None)
    assert report.outcome.tolist() == [0, 0, Outcome.NOT_FINITE, 0, 0]
    assert report.num_steps.tolist() == [2, 2, 0, 2, 2]
    assert report.step_norm[2] == 0


# Streams come and go.


def test_reset_by_mask_is_a_fresh_stream():
    model, data, state = model_of(), recording(), model_of().init_hidden(N)
    for config in CONFIGS.values():
        streams, fresh = (StreamAdapter(model, config, N) for _ in range(2))
        run(streams, data, state)
        mask = torch.tensor([True, False, True, False, False])
        streams.reset(mask)
        ours, theirs = run(streams, data, state), run(fresh, data, state)
        assert same(bits(ours, mask), bits(theirs, mask))
        streams.reset()
        assert same(tree_leaves(run(streams, data, state)), tree_leaves(theirs))


def test_reset_brings_back_the_anchor_bit_for_bit():
    model = model_of()
    streams = StreamAdapter(model, CONFIGS["everything"], N)
    run(streams, recording(), model.init_hidden(N))
    streams.reset(torch.arange(N) == 1)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in streams.params(1).items())
    assert not all(torch.equal(value, model.get_parameter(name)) for name, value in streams.params(0).items())


def test_a_dropped_stream_stands_still_and_says_so():
    model, (xs, ys, firsts) = model_of(), recording()
    streams = StreamAdapter(model, CONFIGS["adam"], N)
    streams.update_step(xs[0], ys[0], None)
    before = streams.params(3)
    streams.drop(torch.arange(N) == 3)
    assert streams.active.tolist() == [True, True, True, False, True]
    report = streams.update(xs[1], ys[1], None, reset=firsts[1])
    assert report.outcome.tolist() == [0, 0, 0, Outcome.DROPPED, 0]
    assert report.loss[3].isnan()
    assert streams.counts is not None
    assert streams.counts.calls.tolist() == [2, 2, 2, 1, 2]
    assert all(torch.equal(value, before[name]) for name, value in streams.params(3).items())


@pytest.mark.parametrize("number", [1, 2, 4])
def test_new_streams_take_the_places_of_dropped_ones_and_then_new_ones(number):
    model, (xs, ys, firsts) = model_of(), recording(streams=N + 2)
    config = CONFIGS["everything"]
    streams = StreamAdapter(model, config, N)
    for x, y, first in zip(xs, ys, firsts, strict=True):
        streams.update_step(x[:N], y[:N], model.init_hidden(N), reset=first[:N])
    kept = streams.params(0)
    streams.drop(torch.tensor([False, True, False, True, False]))
    rows = streams.add(number)
    assert rows.tolist() == [1, 3, 5, 6][:number]
    total = N + max(0, number - 2)
    assert streams.num_streams == total
    assert all(torch.equal(value, kept[name]) for name, value in streams.params(0).items())
    fresh = StreamAdapter(model, config, total)
    for x, y, first in zip(xs, ys, firsts, strict=True):
        ours = streams.update(x[:total], y[:total], model.init_hidden(total), reset=first[:total])
        theirs = fresh.update(x[:total], y[:total], model.init_hidden(total), reset=first[:total])
        assert same([leaf[rows] for leaf in ours], [leaf[rows] for leaf in theirs])


def test_streams_can_be_added_before_anything_and_after_everything():
    x, y = torch.randn(3, D, dtype=torch.float64), torch.randn(3, O, dtype=torch.float64)
    streams = StreamAdapter(model_of(), CONFIGS["adam"], 1)
    assert streams.add(2).tolist() == [1, 2]
    streams.update_step(x, y, None)
    streams.drop(torch.ones(3, dtype=torch.bool))
    assert streams.add(3).tolist() == [0, 1, 2]
    assert streams.counts is None
    assert streams.active.all()


def test_a_snapshot_is_restored_bit_for_bit_and_again():
    model, data, state = model_of(), recording(), model_of().init_hidden(N)
    streams = StreamAdapter(model, CONFIGS["everything"], N)
    run(streams, data, state)
    snapshot = streams.snapshot()
    once = run(streams, data, state)
    streams.drop(torch.arange(N) == 0)
    for _ in range(2):
        streams.restore(snapshot)
        assert streams.active.all()
        assert same(tree_leaves(run(streams, data, state)), tree_leaves(once))


def test_a_mask_of_episodes_may_come_and_go():
    """A call without a mask is one in which no episode begins, also after calls with one, and before them."""
    model, (xs, ys, _) = model_of(), recording()
    config = AdaptationConfig(0.05, 2, window=Window(4))
    none = torch.zeros(N, dtype=torch.bool)
    some, all_of_them = (StreamAdapter(model, config, N) for _ in range(2))
    state = model.init_hidden(N)
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        ours = some.update(x, y, state, reset=none if t % 3 == 2 else None)
        assert same(ours, all_of_them.update(x, y, state, reset=none))


@pytest.mark.slow
def test_4096_streams_of_heads_are_small():
    model = StateSpaceModel(64, 32, 11, hidden_dim=128)
    config = AdaptationConfig(num_steps=5, optimizer=torchopt.adam(1e-3), adapted=["output_mlp.out", "output_input"])
    streams = StreamAdapter(model, config, 4096)
    streams.update_step(torch.randn(4096, 32), torch.randn(4096, 11), torch.randn(4096, 64))
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(streams.snapshot().streams))
    assert size < 0.1 * 2**30


# Bad input.


def live(config=None):
    return StreamAdapter(model_of(), config, N), torch.zeros(N, D, dtype=torch.float64), torch.zeros(N, O).double()


def test_a_wrong_number_of_rows_is_refused():
    streams, x, y = live()
    with pytest.raises(ValueError, match=r"x must have a row for each of 5 streams; got shape \(4, 3\)"):
        streams.update_step(x[:4], y[:4], None)
    with pytest.raises(ValueError, match=r"x must have a row for each of 5 streams"):
        streams(x[:4])


def test_a_state_of_a_wrong_number_of_rows_is_refused():
    streams, x, y = live()
    with pytest.raises(ValueError, match=r"hidden_state must have a row for each of 5 streams; got shape \(1, 4\)"):
        streams.update_step(x, y, torch.zeros(1, S, dtype=torch.float64))


def test_a_mask_of_another_shape_or_dtype_is_refused():
    streams, x, y = live()
    with pytest.raises(ValueError, match=r"reset must be Bool of shape \(5,\) to match x; got .* \(4,\)"):
        streams.update_step(x, y, None, reset=torch.zeros(4, dtype=torch.bool))
    for act in (streams.reset, streams.drop):
        with pytest.raises(ValueError, match=r"streams must be a Bool tensor of shape \(5,\); got torch.int64"):
            act(torch.tensor([0, 1, 1, 0, 0]))
    with pytest.raises(ValueError, match=r"streams must be a Bool tensor of shape \(5,\); got int"):
        streams.drop(3)


def test_sequences_in_a_window_are_refused():
    streams, x, y = live(AdaptationConfig(window=Window(3)))
    with pytest.raises(ValueError, match=r"With a window, x must be one step, of shape \(B, D\); got \(5, 2, 3\)"):
        streams.update_step(x[:, None].repeat(1, 2, 1), y[:, None].repeat(1, 2, 1), None)


def test_an_optimizer_that_decides_in_python_is_refused():
    with pytest.raises(ValueError, match=r"optimizer must keep all its state in tensors, .* torchopt\.radam does not"):
        StreamAdapter(model_of(), AdaptationConfig(optimizer=torchopt.radam(0.1)), N)


def test_numbers_of_streams_are_checked():
    with pytest.raises(ValueError, match="num_streams must be at least 1; got 0"):
        StreamAdapter(model_of(), None, 0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        StreamAdapter(model_of(), None, 2, chunk_size=0)
    with pytest.raises(TypeError, match="num_streams must be an integer"):
        StreamAdapter(model_of(), None, 2.5)  # type: ignore[arg-type]
    streams, _, _ = live()
    with pytest.raises(ValueError, match="number must be at least 1; got 0"):
        streams.add(0)
    with pytest.raises(IndexError, match="stream must be between 0 and 4; got 5"):
        streams.params(5)


def test_rates_by_name_are_an_optimizer_for_streams():
    model = model_of()
    rates = learning_rates(dict(model.named_parameters()), 0.05)
    config = AdaptationConfig(num_steps=2, optimizer=scale_by_learning_rates(rates))
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randn(N, O, dtype=torch.float64)
    ours = StreamAdapter(model, config, N).update(x, y, None)
    theirs = StreamAdapter(model, AdaptationConfig(0.05, 2), N).update(x, y, None)
    torch.testing.assert_close(ours.loss_after, theirs.loss_after)


def test_a_model_on_another_device_is_refused():
    with pytest.raises(ValueError, match="must be on device 'meta'; it is on 'cpu'"):
        StreamAdapter(model_of(), None, 2, "meta")


def test_the_next_state_is_that_of_the_model_and_none_where_there_is_none():
    streams, x, _ = live()
    _, state = streams(x)
    assert torch.equal(state, model_of()(x)[1])
    assert StreamAdapter(nn.Linear(D, O).double(), None, N)(x)[1] is None


# What others compute with


@pytest.mark.parametrize(
    "config", [CONFIGS["adam"], CONFIGS["head"], CONFIGS["average"]], ids=["all", "head", "average"]
)
def test_the_weights_in_use_predict_what_the_adapter_predicts(config):
    model = model_of()
    adapter = StreamAdapter(model, config, N)
    x, y, _ = recording(3)
    for t in range(3):
        mine, shared = adapter.in_use()
        assert not set(mine) & set(shared)
        assert {*mine, *shared} == {key for key, _ in model.named_parameters()}
        found = torch.func.vmap(
            lambda params, x, shared=shared: functional_forward(model, {**shared, **params}, x[None])[0][0]
        )(mine, x[t])
        torch.testing.assert_close(found, adapter(x[t])[0])
        for n in range(N):
            assert all(torch.equal(p[n], adapter.params(n)[key]) for key, p in mine.items())
        adapter.update_step(x[t], y[t], None)
