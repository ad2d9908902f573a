"""When a policy resets: sequences of losses by hand, against the definitions, and under vmap."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import vmap

from ssmrl.adaptation import Observed, ResetPolicy, reset_at_episode_end, reset_every, reset_on_rise
from ssmrl.adaptation.tree import tree_leaves, tree_map

f64 = partial(torch.tensor, dtype=torch.float64)
nan, inf = float("nan"), float("inf")


def run(policy, losses, begins=None):
    """At which updates, counted from 0, a policy resets."""
    state = policy.init(f64(0.0))
    resets = []
    for t, loss in enumerate(losses):
        reset, state = policy.update(Observed(f64(loss), torch.tensor(bool(begins and begins[t]))), state)
        assert reset.dtype is torch.bool
        assert reset.shape == ()
        resets += [t] if bool(reset) else []
    return resets


def test_every_second_update_by_hand():
    assert run(reset_every(2), [1.0] * 7) == [2, 4, 6]


@given(number=st.integers(1, 6), count=st.integers(0, 20))
def test_there_are_that_many_updates_between_two_resets(number, count):
    assert run(reset_every(number), [nan] * count) == list(range(number, count, number))


def test_it_resets_where_an_episode_begins_and_nowhere_else():
    assert run(reset_at_episode_end(), [1.0, inf, nan, 1.0], begins=[1, 0, 0, 1]) == [0, 3]


# The rise. With fast = 0.5 the first four updates after a reset are left alone.


def test_the_means_of_the_rise_by_hand():
    # Slow mean of 1, 1, 1, 1 is 1; then the loss l moves the fast one from sums 1.875 / 1.875 to
    # (0.9375 + l) / 1.9375, which is above 2 · 1 if l > 2.9375.
    policy = reset_on_rise(2.0, fast=0.5, slow=0.1)
    assert run(policy, [1.0, 1.0, 1.0, 1.0, 2.937]) == []
    assert run(policy, [1.0, 1.0, 1.0, 1.0, 2.938]) == [4]


def test_the_slow_mean_weighs_its_losses_by_hand():
    # Losses 0, 0, 0, 2 with slow = 0.25: (2) / (1 + 0.75 + 0.5625 + 0.421875) = 2 / 2.734375; and the fast sum is 2,
    # weight 1.875, so l trips 3 times the slow mean if (1 + l) / 1.9375 > 6 / 2.734375.
    bound = 6 / 2.734375 * 1.9375 - 1
    policy = reset_on_rise(3.0, fast=0.5, slow=0.25)
    assert run(policy, [0.0, 0.0, 0.0, 2.0, bound - 1e-9]) == []
    assert run(policy, [0.0, 0.0, 0.0, 2.0, bound + 1e-9]) == [4]


@pytest.mark.parametrize("fast", [0.5, 0.25, 0.1, 2 / 3])
def test_nothing_happens_in_the_first_updates_and_then_at_once(fast):
    first = round(2 / fast)
    policy = reset_on_rise(2.0, fast=fast, slow=0.01)
    for at in range(1, first + 3):
        losses = [1e-6] * at + [1e6]
        assert run(policy, losses) == ([at] if at >= first else [])


def test_nothing_happens_in_the_first_two_updates_if_the_fast_mean_is_the_newest_loss():
    assert run(reset_on_rise(2.0, fast=1.0, slow=0.01), [1.0, 1e6]) == []


def test_after_a_reset_the_means_begin_anew():
    # The second stretch is at a level that the first one would call a rise, and is left alone, as is its like.
    policy = reset_on_rise(3.0, fast=0.5, slow=0.02)
    assert run(policy, [1.0] * 6 + [50.0] * 8 + [1.0] * 4 + [1000.0]) == [6, 18]


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_loss_that_is_not_finite_resets_at_once_and_leaves_no_trace(bad):
    policy = reset_on_rise(3.0)
    _, state = policy.update(Observed(f64(bad), torch.tensor(False)), policy.init(f64(0.0)))
    assert [leaf.item() for leaf in tree_leaves(state)] == [0.0] * 5
    assert run(policy, [bad] + [1.0] * 5 + [bad, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]) == [0, 6, 12]


def by_definition(losses, ratio, fast, slow):
    """The means as the docstring has them, over the losses since the last reset."""
    resets: list[int] = []
    seen: list[float] = []

    def mean(values, w):
        weights = [(1 - w) ** j for j in range(len(values))]
        return sum(a * b for a, b in zip(weights, reversed(values), strict=True)) / sum(weights)

    for t, loss in enumerate(losses):
        rose = False
        if math.isfinite(loss) and len(seen) >= round(2 / fast):
            short, long = mean([*seen, loss], fast), ratio * mean(seen, slow)
            assume(abs(short - long) > 1e-9)
            rose = short > long
        if rose or not math.isfinite(loss):
            resets, seen = [*resets, t], []
        else:
            seen.append(loss)
    return resets


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(
        st.one_of(st.floats(0.01, 2), st.floats(2, 100), st.sampled_from([nan, inf])), min_size=7, max_size=25
    ),
    ratio=st.floats(1.1, 5),
    fast=st.sampled_from([0.5, 0.4, 0.8]),
    slow=st.sampled_from([0.02, 0.2, 0.39]),
)
def test_it_resets_exactly_where_the_definition_says(losses, ratio, fast, slow):
    assert run(reset_on_rise(ratio, fast=fast, slow=slow), losses) == by_definition(losses, ratio, fast, slow)


POLICIES = {
    "every": reset_every(3),
    "episode end": reset_at_episode_end(),
    "rise": reset_on_rise(2.0, fast=0.5, slow=0.1),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_vmap_over_streams_equals_a_loop(policy):
    losses = f64([[1, 1, 1, 1, 9, 1, 1, 1, 1], [1, nan, 1, 1, 1, 1, 9, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    begins = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0], [0] * 9, [1, 0, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    states = tree_map(lambda leaf: leaf.expand(3), policy.init(f64(0.0)))
    found: list[list[int]] = [[], [], []]
    for t in range(9):
        reset, states = vmap(policy.update)(Observed(losses[:, t], begins[:, t]), states)
        for row in range(3):
            found[row] += [t] if bool(reset[row]) else []
    assert found == [run(policy, losses[row].tolist(), begins[row].tolist()) for row in range(3)]


def test_the_state_has_the_dtype_of_the_loss():
    state = reset_on_rise().init(torch.zeros((), dtype=torch.float32))
    _, state = reset_on_rise().update(Observed(torch.tensor(2.0), torch.tensor(False)), state)
    assert {leaf.dtype for leaf in state[:-1]} == {torch.float32}


def test_losses_below_zero_are_compared_too():
    assert run(reset_on_rise(2.0), [-1.0] * 12) == []
    assert run(reset_on_rise(2.0, fast=0.9, slow=0.1), [-1.0] * 8 + [1.0]) == [8]


def test_a_policy_says_what_stays_in_the_window():
    assert reset_at_episode_end(keep=1).keep == 1
    assert reset_on_rise(keep=0).keep == 0
    assert reset_on_rise(keep=None).keep is None
    assert reset_at_episode_end().keep is reset_every(1).keep is None
    assert isinstance(reset_every(1), ResetPolicy)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: reset_every(0), ValueError, "num_updates must be at least 1; got 0"),
        (lambda: reset_every(-2), ValueError, "num_updates must be >= 0; got -2"),
        (lambda: reset_every(2.0), TypeError, r"num_updates must be an integer >= 0; got 2\.0"),  # type: ignore[arg-type]
        (lambda: reset_at_episode_end(keep=-1), ValueError, "keep must be >= 0; got -1"),
        (lambda: reset_at_episode_end(keep=1.5), TypeError, r"keep must be an integer >= 0; got 1\.5"),  # type: ignore[arg-type]
        (lambda: reset_on_rise(keep=-1), ValueError, "keep must be >= 0; got -1"),
        (lambda: reset_on_rise(keep=True), TypeError, "keep must be an integer >= 0; got True"),
        (lambda: reset_on_rise(1.0), ValueError, r"ratio must be > 1; got 1\.0"),
        (lambda: reset_on_rise(nan), ValueError, "ratio must be finite and >= 0; got nan"),
        (lambda: reset_on_rise("3"), TypeError, "ratio must be a number >= 0; got '3'"),  # type: ignore[arg-type]
        (lambda: reset_on_rise(fast=0.1, slow=0.1), ValueError, r"0 < slow < fast <= 1; got slow=0\.1, fast=0\.1"),
        (lambda: reset_on_rise(slow=0.0), ValueError, r"0 < slow < fast <= 1; got slow=0\.0, fast=0\.5"),
        (lambda: reset_on_rise(fast=1.5), ValueError, r"0 < slow < fast <= 1; got slow=0\.02, fast=1\.5"),
        (lambda: reset_on_rise(slow=-0.1), ValueError, r"slow must be finite and >= 0; got -0\.1"),
        (lambda: reset_on_rise(fast=None), TypeError, "fast must be a number >= 0; got None"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
