"""The loop of adaptive control is its parts, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssmrl import MLP, AdaptationConfig, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Window
from ssmrl.meta_rl import AdaptiveControl, BoxActions, Planner, dynamics_data, dynamics_scales, model_step

D, A, N = 2, 1, 3
NO, FIRST = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)


def parts(*, make=lambda: StateSpaceModel(4, D + A, D, hidden_dim=8), adapts=True, window=None, seed=0):
    torch.manual_seed(seed)
    model = make()
    scales = dynamics_scales(torch.randn(20, D), torch.randn(20, A), torch.randn(20, D))
    step = model_step(model, scales, lambda o, a, n: n.square().sum(-1))
    planner = Planner(step, BoxActions([-1.0], [1.0]), horizon=3, candidates=20, rounds=1)
    config = AdaptationConfig(0.05, 2, window=window)
    adapter = StreamAdapter(model, config, N) if adapts else None
    return planner, model, scales, adapter


def control(planner, model, scales, adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return AdaptiveControl(planner, model, scales, adapter=adapter, generator=generator)


def observations(steps, seed=1):
    return torch.randn(steps, N, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, Window(3)], ids=["newest", "window"])
def test_it_updates_the_state_adapts_and_plans(window):
    planner, model, scales, adapter = parts(window=window)
    policy = control(planner, model, scales, adapter)
    other = StreamAdapter(model, adapter.config, N)
    generator = torch.Generator().manual_seed(0)
    hidden, plan, state = model.init_hidden(N), planner.init(N), None
    before = action = torch.zeros(0)
    begins = FIRST
    for t, observation in enumerate(observations(5)):
        if t:
            x, y = dynamics_data(scales, before, action, observation)
            _, after = other(x, hidden)
            other.update_step(x, y, hidden, reset=begins)
            hidden, begins = after, NO
        mine, shared = other.in_use()
        expected, plan = planner(mine, hidden, observation, plan, planner.noise(N, generator), shared=shared)
        action, state = policy(observation, state, FIRST if t == 0 else NO)
        torch.testing.assert_close(action, expected)
        torch.testing.assert_close(state.hidden_state, hidden)
        before = observation
    assert bool((adapter.counts.calls == 4).all())


def test_without_an_adapter_only_the_state_knows():
    planner, model, scales, _ = parts(adapts=False)
    policy = control(planner, model, scales, None)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state: Any = None
    for t, observation in enumerate(observations(3)):
        _, state = policy(observation, state, FIRST if t == 0 else NO)
    assert not torch.equal(state.hidden_state, model.init_hidden(N))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_where_an_episode_begins_nothing_is_learned_and_the_state_is_fresh():
    planner, model, scales, adapter = parts(window=Window(3))
    policy = control(planner, model, scales, adapter)
    seen = observations(4)
    state: Any = None
    for t in range(3):
        _, state = policy(seen[t], state, FIRST if t == 0 else NO)
    weights = [adapter.params(n) for n in range(N)]
    ends = torch.tensor([False, True, False])
    action, state = policy(seen[3], state, ends)
    assert torch.equal(state.hidden_state[1], model.init_hidden(1)[0])
    assert not torch.equal(state.hidden_state[0], model.init_hidden(1)[0])
    changed = [any(not torch.equal(a, weights[n][k]) for k, a in adapter.params(n).items()) for n in range(N)]
    assert changed == [True, False, True]
    assert adapter.counts.calls.tolist() == [3, 3, 3]
    # It goes on from there as a fresh episode: the next transition is learned from.
    policy(seen[0], state, NO)
    assert any(not torch.equal(a, weights[1][k]) for k, a in adapter.params(1).items())
    assert torch.isfinite(action).all()


@pytest.mark.parametrize("make", [lambda: MLP(D + A, D), lambda: nn.Linear(D + A, D)], ids=["MLP", "a module"])
def test_a_model_without_a_state_works(make):
    planner, model, scales, adapter = parts(make=make)
    policy = control(planner, model, scales, adapter)
    state: Any = None
    for t, observation in enumerate(observations(3)):
        action, state = policy(observation, state, FIRST if t == 0 else torch.tensor([False, t == 2, False]))
    assert state.hidden_state == ()
    assert action.shape == (N, A)
    policy = control(planner, model, scales, None)
    _, state = policy(seen := observations(1)[0], None, FIRST)
    assert policy(seen, state, NO)[0].shape == (N, A)


def test_another_models_adapter_is_refused():
    planner, model, scales, _ = parts()
    _, _, _, adapter = parts(seed=1)
    with pytest.raises(ValueError, match="adapter must adapt the same model object"):
        control(planner, model, scales, adapter)


def test_a_stream_that_ran_away_begins_anew_and_is_counted():
    planner, model, scales, adapter = parts()
    policy = control(planner, model, scales, adapter)
    seen = observations(4)
    state: Any = None
    for t in range(3):
        _, state = policy(seen[t], state, FIRST if t == 0 else NO)
    assert state.restarts.tolist() == [0, 0, 0]
    hidden = state.hidden_state.clone()
    hidden[1] = torch.inf
    action, state = policy(seen[3], state._replace(hidden_state=hidden), NO)
    assert state.restarts.tolist() == [0, 1, 0]
    assert torch.isfinite(action).all()
    assert torch.equal(state.hidden_state[1], model.init_hidden(1)[0])
    for name, value in adapter.in_use()[0].items():
        assert torch.equal(value[1], model.get_parameter(name))
        assert not torch.equal(value[0], model.get_parameter(name))


def test_what_no_restart_can_mend_is_an_error_that_names_the_stream():
    for adapts in (True, False):
        planner, model, scales, adapter = parts(adapts=adapts)
        seen = observations(1)[0]
        seen[2, 0] = torch.nan
        with pytest.raises(FloatingPointError, match="No candidate of stream 2 has a finite cost"):
            control(planner, model, scales, adapter)(seen, None, FIRST)
