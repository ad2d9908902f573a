"""The guard: its excess by hand, the bound that it promises, and the size of steps."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from ssmrl.adaptation import Guard
from ssmrl.adaptation.guard import GuardState
from ssmrl.adaptation.tree import tree_map

f64 = partial(torch.tensor, dtype=torch.float64)
nan, inf = float("nan"), float("inf")


def run(guard, losses, anchor_losses, state=None):
    """Whether it goes back at every transition, and the states after them."""
    state = guard.init(f64(0.0), ()) if state is None else state
    backs, states = [], []
    for loss, anchor_loss in zip(losses, anchor_losses, strict=True):
        back, state = guard.watch(state, f64(loss), f64(anchor_loss), ())
        backs.append(bool(back))
        states.append(state)
    return backs, states


# The excess.


def test_the_excess_by_hand():
    # Against an anchor at 1 the excess is 0.5, max(0, -0.25) = 0, 1.5, 2 and 2.25, above 2 mean losses; then anew.
    losses = [1.5, 0.25, 2.5, 1.5, 1.25, 1.5]
    backs, states = run(Guard(allowance=2.0), losses, [1.0] * 6)
    assert [state.excess.item() for state in states] == [0.5, 0.0, 1.5, 2.0, 0.0, 0.5]
    assert backs == [False, False, False, False, True, False]


def test_the_mean_loss_of_the_anchor_by_hand():
    # With memory 0.5 the anchor's 2 and 5 have the mean (0.5 · 2 + 5) / 1.5 = 4, and the excess is 2, then 2 + l - 5.
    guard = Guard(allowance=1.0, memory=0.5)
    assert run(guard, [4.0, 7.0], [2.0, 5.0])[0] == [False, False]
    assert run(guard, [4.0, 7.001], [2.0, 5.0])[0] == [False, True]


sequences = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=4, max_size=25)


@settings(max_examples=80, deadline=None)
@given(pairs=sequences, allowance=st.floats(0.1, 5), memory=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_over_any_stretch_the_cost_is_bounded_by_its_resets(pairs, allowance, memory):
    """Σ (l - a) <= (R + 1) · allowance · m + R · l_max, of the largest mean loss m and loss in a stretch with R resets.

    Up to a reset the excess was within the allowance before the last transition, which adds at most its loss; and after
    the last reset it is within it once more.
    """
    losses, anchor_losses = [loss for loss, _ in pairs], [anchor for _, anchor in pairs]
    backs, _ = run(Guard(allowance=allowance, memory=memory), losses, anchor_losses)
    means = [
        sum(memory ** (t - j) * anchor_losses[j] for j in range(t + 1)) / sum(memory**j for j in range(t + 1))
        for t in range(len(pairs))
    ]
    for start in range(len(pairs)):
        for end in range(start + 1, len(pairs) + 1):
            cost = sum(losses[start:end]) - sum(anchor_losses[start:end])
            resets = sum(backs[start:end])
            bound = (resets + 1) * allowance * max(means[start:end]) + resets * max(losses[start:end])
            assert cost <= bound + 1e-9


@settings(max_examples=30, deadline=None)
@given(pairs=sequences)
def test_a_model_that_is_never_worse_is_never_sent_back(pairs):
    backs, states = run(Guard(allowance=0.1), [min(pair) for pair in pairs], [max(pair) for pair in pairs])
    assert not any(backs)
    assert states[-1].excess == 0
    assert states[-1].scale == 1


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_loss_that_is_not_finite_goes_back_and_leaves_no_trace(bad):
    guard = Guard(allowance=2.0)
    backs, states = run(guard, [1.5, bad, 2.5, 1.6], [1.0] * 4)
    assert backs == [False, True, False, True]
    assert [state.excess.item() for state in states] == [0.5, 0.0, 1.5, 0.0]
    assert [state.scale.item() for state in states] == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("bad", [nan, inf])
def test_an_anchor_s_loss_that_is_not_finite_compares_nothing_and_leaves_no_trace(bad):
    guard = Guard(allowance=2.0, memory=0.5)
    backs, states = run(guard, [2.5, 100.0, 1.5, 1.1], [1.0, bad, 1.0, 1.0])
    assert [state.excess.item() for state in states[:3]] == [1.5, 1.5, 2.0]
    assert backs == [False, False, False, True]
    assert [float(state.anchor_sum / state.weight) for state in states] == [1.0] * 4


def test_without_memory_too_an_unknown_loss_of_the_anchor_compares_nothing():
    assert run(Guard(allowance=2.0, memory=0.0), [2.0, 2.0], [1.0, nan])[0] == [False, False]


def test_a_loss_beside_an_unknown_one_of_the_anchor_still_has_to_be_finite():
    assert run(Guard(), [1.0, nan], [1.0, nan])[0] == [False, True]


def test_the_anchor_s_hidden_state_is_carried_as_it_is():
    guard, before, after = Guard(), (f64([1.0]),), (f64([2.0]),)
    state = guard.init(torch.zeros(()), before)
    assert state.anchor_hidden is before
    assert guard.watch(state, torch.tensor(1.0), torch.tensor(1.0), after)[1].anchor_hidden is after
    assert {value.dtype for value in state[:4]} == {torch.float32}


def test_losses_below_zero_are_judged_too():
    guard = Guard(rise=0.1)
    back, _ = guard.watch(guard.init(f64(0.0), ()), f64(-1.0), f64(-1.0), ())
    assert not back
    assert guard.judge(f64(-1.0), f64(-0.95))
    assert not guard.judge(f64(-1.0), f64(-0.85))


# The size of steps.


def rescaled(guard, scale, tried, stands):
    state = GuardState(f64(0.3), f64(0.2), f64(0.1), f64(scale), anchor_hidden=())
    after = guard.rescaled(state, torch.tensor(tried), torch.tensor(stands))
    assert after[:3] == state[:3]
    return after.scale.item()


def test_steps_by_hand():
    guard = Guard(backoff=0.25, recovery=1.5)
    assert rescaled(guard, 0.5, True, True) == 0.75
    assert rescaled(guard, 0.75, True, True) == 1.0  # never above
    assert rescaled(guard, 0.5, True, False) == 0.125
    assert rescaled(guard, 0.5, False, True) == rescaled(guard, 0.5, False, False) == 0.5


def test_a_reset_takes_the_step_down():
    _, states = run(Guard(allowance=1.0, backoff=0.25), [9.0, 1.0, 9.0], [1.0] * 3)
    assert [state.scale.item() for state in states] == [0.25, 0.25, 0.0625]


@pytest.mark.parametrize(("backoff", "recovery"), [(0.5, 1.1), (0.1, 1.05)])
def test_after_a_reset_it_takes_that_many_good_updates_to_come_back(backoff, recovery):
    guard = Guard(allowance=1.0, backoff=backoff, recovery=recovery)
    state = run(guard, [9.0], [1.0])[1][0]
    for _ in range(math.ceil(math.log(1 / backoff) / math.log(recovery)) - 1):
        state = guard.rescaled(state, torch.tensor(True), torch.tensor(True))
        assert state.scale < 1
    assert guard.rescaled(state, torch.tensor(True), torch.tensor(True)).scale == 1


@settings(max_examples=30, deadline=None)
@given(events=st.lists(st.sampled_from(["back", "stands", "rolled back"]), max_size=20))
def test_whatever_happens_the_steps_are_never_larger_than_full(events):
    guard = Guard(backoff=0.5, recovery=1.3)
    state, expected = guard.init(f64(0.0), ()), 1.0
    for event in events:
        if event == "back":
            _, state = guard.watch(state, f64(nan), f64(1.0), ())
        else:
            state = guard.rescaled(state, torch.tensor(True), torch.tensor(event == "stands"))
        expected = min(1.0, 1.3 * expected) if event == "stands" else 0.5 * expected
        assert float(state.scale) == pytest.approx(expected, rel=1e-12)
        assert state.scale <= 1


@pytest.mark.parametrize(
    ("rise", "before", "after", "stands"),
    [
        (0.0, 1.0, 1.0, True),
        (0.0, 1.0, 1.0 + 1e-12, False),
        (0.5, 2.0, 3.0, True),
        (0.5, 2.0, 3.001, False),
        (0.0, 0.0, 0.0, True),
        (9.0, 1.0, nan, False),
        (9.0, nan, 1.0, False),
        (9.0, 1.0, inf, False),
    ],
)
def test_an_update_stands_if_the_loss_on_its_data_does_not_rise(rise, before, after, stands):
    assert bool(Guard(rise=rise).judge(f64(before), f64(after))) is stands


def test_vmap_over_streams_equals_a_loop():
    losses = f64([[1.5, 0.5, 4.0, 1.0], [1.0, nan, 1.0, 2.5], [9.0, 9.0, 0.5, 1.0]])
    anchor_losses = f64([[1.0, 1.0, 1.0, 2.0], [1.0, 1.0, nan, 1.0], [0.5, 1.0, 1.0, 1.0]])
    guard = Guard(allowance=2.0, memory=0.9, recovery=1.2)
    expected = [run(guard, losses[i].tolist(), anchor_losses[i].tolist()) for i in range(3)]
    states = tree_map(lambda leaf: leaf.expand(3), guard.init(f64(0.0), ()))
    for t in range(4):
        backs, states = vmap(guard.watch)(states, losses[:, t], anchor_losses[:, t], ())
        assert backs.tolist() == [each[0][t] for each in expected]
        for found, *ones in zip(states[:4], *(each[1][t][:4] for each in expected), strict=True):
            assert torch.equal(found, torch.stack(ones))
    tried, stands = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    mapped = vmap(guard.rescaled)(states, tried, stands).scale
    each = [guard.rescaled(expected[i][1][-1], tried[i], stands[i]).scale for i in range(3)]
    assert torch.equal(mapped, torch.stack(each))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rise": -0.1}, ValueError, r"rise must be finite and >= 0; got -0\.1"),
        ({"rise": "0"}, TypeError, "rise must be a number >= 0; got '0'"),
        ({"allowance": 0}, ValueError, "allowance must be > 0; got 0"),
        ({"allowance": inf}, ValueError, "allowance must be finite and >= 0; got inf"),
        ({"backoff": 0.0}, ValueError, "backoff must be > 0; got 0"),
        ({"backoff": 1.1}, ValueError, r"backoff must be at most 1; got 1\.1"),
        ({"recovery": 0.9}, ValueError, r"recovery must be at least 1; got 0\.9"),
        ({"recovery": nan}, ValueError, "recovery must be finite and >= 0; got nan"),
        ({"memory": 1.0}, ValueError, r"memory must be below 1; got 1\.0"),
        ({"memory": -0.5}, ValueError, r"memory must be finite and >= 0; got -0\.5"),
        ({"memory": None}, TypeError, "memory must be a number >= 0; got None"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Guard(**options)
