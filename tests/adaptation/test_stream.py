"""What every setting of AdaptationConfig does to one stream, on an Adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from ssmrl import AdaptationConfig, Adapter, StateSpaceModel, adapt
from ssmrl.adaptation import (
    Guard,
    Outcome,
    Reset,
    ResetPolicy,
    Window,
    fisher_information,
    reset_at_episode_end,
    reset_every,
    reset_on_rise,
)
from ssmrl.adaptation.live import LiveModel
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.stream import begin, update
from ssmrl.adaptation.tree import tree_leaves

D, O, S, B = 3, 2, 4, 2  # noqa: E741


def setting(seed=0, rows=B):
    torch.manual_seed(seed)
    model = StateSpaceModel(S, D, O, hidden_dim=6).double()
    return model, [torch.randn(9, rows, width, dtype=torch.float64) for width in (D, O)]


def scalar(w=1.0):
    """Y = w x."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, w)
    return model


def one(value):
    return torch.tensor([[value]], dtype=torch.float64)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def follow(model, config, data, resets=None, **how):
    """Updates of a live loop, and the weights after each."""
    adapter = Adapter(model, config, **how)
    state = model.init_hidden(data[0].shape[1])
    done, after = [], []
    for t, (x, y) in enumerate(zip(*data, strict=True)):
        mask = None if resets is None else resets[t]
        done.append(adapter.update(x, y, state, reset=mask))
        after.append(weights(model))
        with torch.no_grad():
            state = model(x, state, mask)[1]
    return done, after


# Every setting changes the result, and its neutral value does not.

SETTINGS: dict[str, Any] = {
    "adapted": "output_mlp",
    "max_grad_norm": 0.1,
    "max_distance": 0.05,
    "anchor_strength": 2.0,
    "average": 0.5,
    "from_anchor": True,
    "every": 2,
    "window": Window(3),
    "reset": reset_every(2),
    "guard": Guard(allowance=0.01),
}
NEUTRAL: dict[str, Any] = {
    "adapted": ["state_mlp", "state_input", "output_mlp", "output_input"],
    "max_grad_norm": 1e9,
    "max_distance": 1e9,
    "anchor_strength": 1e-300,
    "window": Window(1),
    "reset": reset_every(1000),
    "guard": Guard(rise=1e9, allowance=1e9),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_the_weights(name):
    (plain, data), (other, _) = setting(), setting()
    follow(plain, AdaptationConfig(0.05, 2), data)
    follow(other, AdaptationConfig(0.05, 2, **{name: SETTINGS[name]}), data)
    assert not same(weights(plain), weights(other))


@pytest.mark.parametrize("name", NEUTRAL)
def test_where_a_setting_has_nothing_to_do_it_does_nothing(name):
    (plain, data), (other, _) = setting(), setting()
    ours, _ = follow(plain, AdaptationConfig(0.05, 2), data)
    theirs, _ = follow(other, AdaptationConfig(0.05, 2, **{name: NEUTRAL[name]}), data)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == pytest.approx(list(b), rel=1e-9)
    torch.testing.assert_close(weights(plain), weights(other), rtol=1e-9, atol=1e-9)


# What they do, by hand.


def test_the_numbers_of_an_update_by_hand():
    # y = wx, w = 1, x = 2, target 4: loss 4, gradient -8, w = 1 + 8/16 = 1.5, loss 1.
    model = scalar()
    done = Adapter(model, AdaptationConfig(1 / 16, 1)).update(one(2.0), one(4.0), None)
    assert done == (4.0, 1.0, 1, 0.5, 0.5, Outcome.ADAPTED, Reset.NONE)


def test_a_clipped_gradient_is_as_long_as_allowed():
    model = scalar()
    done = Adapter(model, AdaptationConfig(0.25, 1, max_grad_norm=2.0)).update(one(2.0), one(4.0), None)
    assert done.step_norm == pytest.approx(0.25 * 2.0, rel=1e-12)


def test_a_pull_to_the_anchor_by_hand():
    # w_1 = 1 + 8/16 = 1.5; then gradient 2·(3 - 4)·2 + λ(1.5 - 1) = -4 + 2·0.5 = -3, w_2 = 1.5 + 3/16.
    model = scalar()
    adapter = Adapter(model, AdaptationConfig(1 / 16, 2, anchor_strength=2.0))
    adapter.update_step(one(2.0), one(4.0), None)
    assert model.weight.item() == pytest.approx(1.5 + 3 / 16, rel=1e-12)


def test_importance_weighs_the_pull():
    # Of two equal weights the one with importance 0 is not pulled back: without data only the pull is left.
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    importance = {"weight": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    config = AdaptationConfig(0.1, 1, anchor_strength=1.0, importance=importance)
    adapter = Adapter(model, config)
    with torch.no_grad():
        model.weight.fill_(1.0)
    adapter.update_step(torch.zeros(1, 2, dtype=torch.float64), one(0.0), None)
    torch.testing.assert_close(model.weight, torch.tensor([[0.9, 1.0]], dtype=torch.float64))


def test_fisher_information_of_the_model_is_an_importance():
    model, (xs, ys) = setting()

    def loss(params, x, y):
        return mse_loss(functional_call(model, params, (x[None],))[0], y[None])

    fisher = fisher_information(loss, weights(model), xs[0], ys[0])
    free, held = copy.deepcopy(model), copy.deepcopy(model)
    follow(free, AdaptationConfig(0.05, 3), (xs, ys))
    follow(held, AdaptationConfig(0.05, 3, anchor_strength=5.0, importance=fisher), (xs, ys))
    anchor = weights(model)
    moved = [sum((w - anchor[n]).square().mul(fisher[n]).sum() for n, w in weights(m).items()) for m in (free, held)]
    assert moved[1] < moved[0]


def test_an_average_is_what_is_written_into_the_model():
    # Weights 1.5, then from 1.5 with gradient -4: 1.75; averages with decay 1/2: 1.25 and 1.5.
    model = scalar()
    adapter = Adapter(model, AdaptationConfig(1 / 16, 1, average=0.5))
    seen = []
    for _ in range(2):
        adapter.update_step(one(2.0), one(4.0), None)
        seen.append(model.weight.item())
    assert seen == [1.25, 1.5]


def test_from_the_anchor_an_update_forgets_those_before_it():
    (model, (xs, ys)), (twin, _) = setting(), setting()
    config = AdaptationConfig(num_steps=3, optimizer=torchopt.adam(0.05), from_anchor=True)
    follow(model, config, (xs, ys))
    Adapter(twin, config).update_step(xs[-1], ys[-1], _state_before_last(model, config, (xs, ys)))
    assert same(weights(model), weights(twin))


def _state_before_last(model, config, data):
    """The state that `follow` had before the last transition."""
    replay, _ = setting()
    adapter, state = Adapter(replay, config), replay.init_hidden(B)
    for x, y in list(zip(*data, strict=True))[:-1]:
        adapter.update_step(x, y, state)
        with torch.no_grad():
            state = replay(x, state)[1]
    return state


def test_every_third_call_adapts():
    model, data = setting()
    done, after = follow(model, AdaptationConfig(0.05, 2, every=3), data)
    assert [d.num_steps for d in done] == [0, 0, 2] * 3
    assert [d.outcome for d in done[:3]] == [Outcome.WAITING, Outcome.WAITING, Outcome.ADAPTED]
    assert done[0].loss == done[0].loss_after > 0
    assert same(after[2], after[3])
    assert not same(after[1], after[2])


@settings(max_examples=25, deadline=None)
@given(radius=st.floats(0.001, 1.0), rate=st.floats(0.01, 1.0), adam=st.booleans(), seed=st.integers(0, 99))
def test_the_trust_region_holds_at_every_rate(radius, rate, adam, seed):
    model, data = setting(seed)
    optimizer = torchopt.adam(rate) if adam else torchopt.sgd(rate)
    config = AdaptationConfig(num_steps=2, optimizer=optimizer, max_distance=radius, max_grad_norm=10.0)
    for done in follow(model, config, data)[0]:
        assert done.distance <= radius * (1 + 1e-9)


# Windows.


@pytest.mark.parametrize("burn_in", [0, 2])
def test_a_window_is_the_inner_loop_on_its_transitions(burn_in):
    """With no update until the end, so that the recorded states are those of the weights that it begins with."""
    model, (xs, ys) = setting()
    config = AdaptationConfig(num_steps=3, optimizer=torchopt.sgd(0.1), window=Window(4, burn_in=burn_in), every=9)
    twin = copy.deepcopy(model)
    early, x, y = xs[5 - burn_in : 5].transpose(0, 1), xs[5:].transpose(0, 1), ys[5:].transpose(0, 1)
    with torch.no_grad():
        recorded = twin(xs[: 5 - burn_in].transpose(0, 1))[1]

    def loss(params):
        constant = {name: p.detach() for name, p in params.items()}
        start = functional_call(twin, constant, (early, recorded))[1] if burn_in else recorded
        return mse_loss(functional_call(twin, params, (x, start))[0], y)

    adapted = adapt(loss, weights(twin), optimizer=torchopt.sgd(0.1), num_steps=3)
    done, _ = follow(model, config, (xs, ys))
    assert done[-1].loss == pytest.approx(adapted.losses[0].item(), rel=1e-12)
    torch.testing.assert_close(weights(model), dict(adapted.params), rtol=1e-12, atol=1e-12)


def test_burn_in_brings_the_state_up_to_date_and_without_it_the_recorded_one_is_taken():
    model, (xs, ys) = setting()
    recorded, _ = follow(copy.deepcopy(model), AdaptationConfig(0.1, 2, window=Window(3)), (xs, ys))
    burned, _ = follow(copy.deepcopy(model), AdaptationConfig(0.1, 2, window=Window(3, burn_in=2)), (xs, ys))
    assert [d.loss for d in recorded[:4]] == [d.loss for d in burned[:4]]  # not there yet
    assert recorded[5].loss != burned[5].loss


def test_a_window_waits_for_its_minimum():
    model, data = setting()
    done, after = follow(model, AdaptationConfig(0.05, 2, window=Window(5, minimum=4)), data)
    assert [d.outcome for d in done[:5]] == [Outcome.WAITING] * 3 + [Outcome.ADAPTED] * 2
    assert same(after[2], weights(setting()[0]))


def test_an_episode_that_begins_in_the_window_begins_from_the_initial_state():
    """What came before it, in another row or an earlier episode, does not matter to its losses."""
    model, (xs, ys) = setting(rows=1)
    resets = torch.zeros(9, 1, dtype=torch.bool)
    resets[6] = True
    config = AdaptationConfig(num_steps=1, optimizer=torchopt.sgd(0.1), window=Window(3), every=9)
    whole, _ = follow(copy.deepcopy(model), config, (xs, ys), resets)
    config = AdaptationConfig(num_steps=1, optimizer=torchopt.sgd(0.1), window=Window(3), every=3)
    alone, _ = follow(copy.deepcopy(model), config, (xs[6:], ys[6:]))
    assert whole[-1].loss == pytest.approx(alone[-1].loss, rel=1e-12)
    assert whole[-1].loss_after == pytest.approx(alone[-1].loss_after, rel=1e-12)


# Resets.


def test_reset_every_n_goes_back_before_the_next_update():
    model, data = setting()
    anchor = weights(model)
    config = AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05), reset=reset_every(3))
    done, after = follow(model, config, data)
    assert [d.reset for d in done] == [Reset.NONE] * 3 + [Reset.POLICY, Reset.NONE, Reset.NONE] * 2
    # A fresh optimizer too: as an adapter that is made now.
    twin = copy.deepcopy(model)
    for name, p in twin.named_parameters():
        p.data.copy_(anchor[name])
    state = model.init_hidden(B)
    replay, _ = setting()
    with torch.no_grad():
        for t in range(3):
            for name, p in replay.named_parameters():
                p.data.copy_(after[t][name])
            state = replay(data[0][t], state)[1]
    Adapter(twin, config).update_step(data[0][3], data[1][3], state)
    assert same(weights(twin), after[3])


def test_reset_at_the_end_of_an_episode():
    model, data = setting()
    resets = torch.zeros(9, B, dtype=torch.bool)
    resets[4, 1] = True
    done, _ = follow(model, AdaptationConfig(0.05, 2, reset=reset_at_episode_end()), data, resets)
    assert [d.reset for d in done] == [Reset.NONE] * 4 + [Reset.POLICY] + [Reset.NONE] * 4


def test_reset_when_the_error_says_so_and_the_window_forgets_the_other_regime():
    model, (xs, ys) = setting()
    ys = ys.clone()
    ys[6:] += 30
    policy = reset_on_rise(3.0, fast=0.9, slow=0.1, keep=1)
    done, _ = follow(model, AdaptationConfig(0.01, 1, window=Window(5), reset=policy), (xs, ys))
    assert [d.reset for d in done[:7]] == [Reset.NONE] * 6 + [Reset.POLICY]
    # The loss of the window is that of its one transition, under the anchor: far above all that came before.
    assert done[6].loss > 500


def test_a_policy_of_ones_own():
    threshold = ResetPolicy(lambda like: (), lambda observed, state: (observed.loss > 5.0, state))
    model = scalar()
    adapter = Adapter(model, AdaptationConfig(1 / 16, 1, reset=threshold))
    assert adapter.update(one(2.0), one(4.0), None).reset is Reset.NONE
    assert adapter.update(one(2.0), one(9.0), None).reset is Reset.POLICY
    assert model.weight.item() == 1.0 + (9 - 2) * 2 * 2 / 16


# The guard.


def test_an_update_that_makes_its_own_loss_worse_is_rolled_back_with_the_optimizer():
    model, (xs, ys) = setting()
    config = AdaptationConfig(num_steps=2, optimizer=torchopt.sgd(0.05, momentum=0.9), guard=Guard(allowance=1e9))
    adapter = Adapter(model, config)
    adapter.update_step(xs[0], ys[0], None)
    before, moments = weights(model), adapter.snapshot().stream.optimizer_state  # type: ignore[union-attr]
    done = adapter.update(xs[1], ys[1] * 1e3, None)  # its gradient times the rate is far too much
    assert done.outcome is Outcome.LOSS_ROSE
    assert (done.num_steps, done.step_norm, done.loss_after) == (0, 0.0, done.loss)
    assert same(weights(model), before)
    after = adapter.snapshot().stream.optimizer_state  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*map(tree_leaves, (moments, after)), strict=True))
    assert adapter.counts.rolled_back == 1  # type: ignore[union-attr]


def test_steps_are_smaller_after_a_rollback_and_grow_again():
    # y = wx with x = 2: w <- w - rate · 8 (w - target / 2). At rate 0.3 it overshoots, by a factor |1 - 2.4| = 1.4, at
    # half of it 1 - 1.2 = -0.2 is left of the distance.
    model = scalar()
    config = AdaptationConfig(0.3, 1, guard=Guard(allowance=1e9, backoff=0.5, recovery=2.0))
    adapter = Adapter(model, config)
    outcomes, seen = [], []
    for _ in range(4):
        outcomes.append(adapter.update(one(2.0), one(4.0), None).outcome)
        seen.append(model.weight.item() - 2)
    assert outcomes == [Outcome.LOSS_ROSE, Outcome.ADAPTED, Outcome.LOSS_ROSE, Outcome.ADAPTED]
    assert seen == pytest.approx([-1.0, 0.2, 0.2, -0.04], rel=1e-9)


@pytest.mark.parametrize(("allowance", "reset"), [(1.0, Reset.GUARD), (1.2, Reset.NONE)])
def test_the_anchor_comes_back_once_it_had_been_better_by_the_allowance(allowance, reset):
    # From w = 1 two steps halve the distance to w = 4 twice: 3.25. Then targets of the anchor: the loss is
    # (2·3.25 - 2)² = 20.25, that of the anchor is 0, and its mean of 36 and 0 is 36·0.99 / 1.99 = 17.9.
    model = scalar()
    adapter = Adapter(model, AdaptationConfig(1 / 16, 2, guard=Guard(allowance=allowance)))
    adapter.update_step(one(2.0), one(8.0), None)
    assert model.weight.item() == 3.25
    assert adapter.update(one(2.0), one(2.0), None).reset is reset
    assert (model.weight.item() == 1.0) == (reset is Reset.GUARD)


def test_with_a_guard_bad_data_are_skipped_and_nothing_changes():
    model, (xs, ys) = setting()
    config = AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05), guard=Guard(), window=Window(3))
    adapter = Adapter(model, config)
    adapter.update_step(xs[0], ys[0], None)
    before, held = weights(model), adapter.snapshot().stream
    x = xs[1].clone()
    x[0, 0] = torch.nan
    done = adapter.update(x, ys[1], None)
    assert (done.outcome, done.num_steps) == (Outcome.BAD_DATA, 0)
    assert same(weights(model), before)
    after = adapter.snapshot().stream
    assert held is not None
    assert after is not None
    assert after.counts.bad_data == 1
    for a, b in zip(tree_leaves(held[:-1]), tree_leaves(after[:-1]), strict=True):
        assert torch.equal(a, b)


def test_with_a_guard_steps_that_explode_are_no_error():
    model, (xs, ys) = setting()
    before = weights(model)
    done = Adapter(model, AdaptationConfig(1e200, 2, guard=Guard())).update(xs[0], ys[0], None)
    assert done.outcome is Outcome.NOT_FINITE
    assert same(weights(model), before)


@settings(max_examples=15, deadline=None)
@given(rate=st.floats(0.5, 50.0), seed=st.integers(0, 99), adam=st.booleans())
def test_a_guarded_model_is_not_much_worse_than_its_anchor_at_any_rate(rate, seed, adam):
    """On a world without anything to learn, where the anchor is right but for noise."""
    torch.manual_seed(seed)
    model, _ = setting(seed, rows=1)
    anchor = copy.deepcopy(model)
    guard = Guard(allowance=3.0)
    optimizer = torchopt.adam(rate) if adam else torchopt.sgd(rate)
    adapter = Adapter(model, AdaptationConfig(num_steps=2, optimizer=optimizer, guard=guard, window=Window(4)))
    state = anchor_state = model.init_hidden(1)
    lost, allowed, resets = 0.0, [], 0
    for _ in range(60):
        x = torch.randn(1, D, dtype=torch.float64)
        with torch.no_grad():
            right, anchor_next = anchor(x, anchor_state)
            prediction, after = model(x, state)
        y = right + 0.1 * torch.randn(1, O, dtype=torch.float64)
        excess = (mse_loss(prediction, y) - mse_loss(right, y)).item()
        lost += max(excess, 0)
        allowed.append(excess)
        done = adapter.update(x, y, state)
        resets += done.reset is Reset.GUARD
        state, anchor_state = after, anchor_next
    # Every reset comes as soon as the sum is above the allowance, so that the last transition before it goes beyond it.
    assert lost <= (resets + 1) * (3.0 * 0.05 + max(allowed)) + 1e-9


# Snapshots and blocks.


def test_a_snapshot_is_restored_bit_for_bit_with_all_that_is_carried():
    model, (xs, ys) = setting()
    config = AdaptationConfig(
        num_steps=2, optimizer=torchopt.adam(0.05), window=Window(3), guard=Guard(), average=0.5, reset=reset_every(4)
    )
    adapter = Adapter(model, config)
    for t in range(4):
        adapter.update_step(xs[t], ys[t], None)
    snapshot = adapter.snapshot()
    runs = []
    for _ in range(3):
        done = [adapter.update(xs[t], ys[t], None) for t in range(4, 9)]
        runs.append((done, weights(model)))
        adapter.restore(snapshot)
        assert same(weights(model), snapshot.weights)
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_leaves_the_model_as_it_was(fails):
    model, (xs, ys) = setting()
    before = weights(model)
    adapter = Adapter(model, AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05)))
    first = adapter.update(xs[0], ys[0], None)
    adapter.reset()
    try:
        with adapter as same_adapter:
            assert same_adapter is adapter
            adapter.update_step(xs[0], ys[0], None)
            assert not same(weights(model), before)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same(weights(model), before)
    assert adapter.update(xs[0], ys[0], None) == first


def test_blocks_nest():
    model, (xs, ys) = setting()
    with Adapter(model) as adapter:
        adapter.update_step(xs[0], ys[0], None)
        outer = weights(model)
        with adapter:
            adapter.update_step(xs[1], ys[1], None)
        assert same(weights(model), outer)


def test_weights_that_someone_else_changed_are_adapted_from():
    model, (xs, ys) = setting()
    adapter = Adapter(model, AdaptationConfig(0.05, 1))
    adapter.update_step(xs[0], ys[0], None)
    other, _ = setting(seed=5)
    model.load_state_dict(other.state_dict())
    adapter.update_step(xs[1], ys[1], None)
    Adapter(other, AdaptationConfig(0.05, 1)).update_step(xs[1], ys[1], None)
    assert same(weights(model), weights(other))


# One vector for all parameters, where the optimizer allows it.


@pytest.mark.parametrize(
    ("optimizer", "alike"),
    [
        (torchopt.sgd(0.05, momentum=0.9, weight_decay=0.1), True),
        (torchopt.adamw(0.05), True),
        (torchopt.radam(0.05), True),
        (torchopt.rmsprop(0.05, centered=True), True),
        (torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adam(0.05)), True),
        (torchopt.adamw(0.05, mask={name: i % 2 == 0 for i, name in enumerate(weights(setting()[0]))}), False),
    ],
    ids=["sgd", "adamw", "radam", "rmsprop", "chain", "mask"],
)
def test_parameters_are_one_vector_only_where_that_is_the_same(optimizer, alike):
    model, (xs, ys) = setting()
    twin = copy.deepcopy(model)
    config = AdaptationConfig(num_steps=3, optimizer=optimizer)
    adapter = Adapter(model, config)
    assert isinstance(adapter.snapshot().weights, dict)
    assert isinstance(LiveModel(model, config, "cpu", mse_loss, for_one=True).read(), torch.Tensor) == alike
    adapter.update_step(xs[0], ys[0], None)
    by_hand = adapt(
        lambda p: mse_loss(functional_call(twin, p, (xs[0],))[0], ys[0]),
        weights(twin),
        optimizer=optimizer,
        num_steps=3,
    )
    torch.testing.assert_close(weights(model), dict(by_hand.params), rtol=1e-10, atol=1e-10)


# Bad settings, and bad input.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0; got 0"),
        ({"max_distance": -1.0}, ValueError, r"max_distance must be finite and >= 0; got -1\.0"),
        ({"anchor_strength": float("nan")}, ValueError, "anchor_strength must be finite"),
        ({"average": 1.0}, ValueError, r"average must be below 1; got 1\.0"),
        ({"average": 0}, ValueError, "average must be > 0; got 0"),
        ({"importance": {}}, ValueError, "importance would be ignored: anchor_strength is 0"),
        ({"every": 0}, ValueError, "every must be at least 1; got 0"),
        ({"window": 5}, TypeError, "window must be a Window or None; got 5"),
        ({"reset": "never"}, TypeError, "reset must be a ResetPolicy or None; got 'never'"),
        ({"guard": True}, TypeError, "guard must be a Guard or None; got True"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        AdaptationConfig(**settings)


def test_importance_of_other_names_is_refused():
    config = AdaptationConfig(anchor_strength=1.0, importance={"weights": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"importance must have the names of the parameters that adapt, \['weight'\]"):
        Adapter(scalar(), config)


def test_parameters_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"'head' chooses none of the trainable parameters of Linear: weight"):
        Adapter(scalar(), AdaptationConfig(adapted="head"))


def test_a_window_that_was_begun_keeps_its_shapes():
    model, (xs, ys) = setting()
    adapter = Adapter(model, AdaptationConfig(window=Window(3)))
    adapter.update_step(xs[0], ys[0], None)
    with pytest.raises(ValueError, match=r"x must have the shapes that it had when .* \[\(2, 3\)\]; got"):
        adapter.update_step(xs[0, :1], ys[0, :1], None)
    adapter.reset()
    adapter.update_step(xs[0, :1], ys[0, :1], None)


def test_a_mask_that_does_not_fit_is_refused():
    model, (xs, ys) = setting()
    with pytest.raises(ValueError, match=r"reset must be Bool of shape \(2,\) to match x; got torch.float32"):
        Adapter(model).update_step(xs[0], ys[0], None, reset=torch.zeros(2))
    with pytest.raises(TypeError, match=r"reset must be a Bool tensor of shape .*; got list"):
        Adapter(model).update_step(xs[0], ys[0], None, reset=[True, False])  # type: ignore[arg-type]


def test_a_reset_forgets_the_state_that_is_given():
    (model, (xs, ys)), (twin, _) = setting(), setting()
    state = torch.randn(B, S, dtype=torch.float64)
    ours = Adapter(model).update(xs[0], ys[0], state, reset=True)
    theirs = Adapter(twin).update(xs[0], ys[0], torch.zeros_like(state))
    assert list(ours) == pytest.approx(list(theirs), rel=1e-12)
    assert Adapter(model).update(xs[0], ys[0], state, reset=False).loss != theirs.loss


@torch.no_grad()
def test_a_call_that_is_told_not_to_adapt_waits():
    model, (xs, ys) = setting()
    rules = LiveModel(model, AdaptationConfig(), "cpu", mse_loss, for_one=True).rules
    data = xs[0], ys[0], model.init_hidden(B), ()
    after, report = update(rules, begin(rules, *data), *data, adapting=False)
    assert report.outcome == Outcome.WAITING
    assert [int(count) for count in after.counts] == [1, 0, 1, 0, 0, 0]
    assert torch.equal(after.params, rules.anchor)
