"""Planners find what they must, stream by stream, and say so where they cannot."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmrl import GRU, MLP, StateSpaceModel
from ssmrl.meta_rl import (
    BoxActions,
    DiscreteActions,
    Planner,
    cem,
    dynamics_scales,
    model_step,
    mppi,
    random_shooting,
    sequence_costs,
)
from ssmrl.meta_rl.action_sequences import ActionSpace

D, A, N = 3, 2, 4
BOX = BoxActions([-1.0, -1.0], [1.0, 1.0])
METHODS = {"random shooting": random_shooting, "cem": cem, "mppi": partial(mppi, temperature=0.05)}
over_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def integrator(params, hidden_state, observation, action):
    """O' = o + gain a, cost ‖o' - goal‖²."""
    following = observation + params["gain"] * action
    return (following - params["goal"]).square().sum(-1), following, hidden_state


# One stream


def test_costs_of_sequences_by_hand():
    params = {"gain": torch.tensor(1.0), "goal": torch.tensor([1.0])}
    actions = torch.tensor([[[1.0], [0.0]], [[0.5], [-0.5]]])
    costs = sequence_costs(integrator, params, (), torch.tensor([0.0]), actions)
    assert costs.tolist() == [0.0, 0.25 + 1.0]


def test_the_hidden_state_goes_on_within_a_sequence():
    def step(params, hidden_state, observation, action):
        return hidden_state[:, 0], observation, hidden_state + action

    costs = sequence_costs(step, {}, torch.tensor([10.0]), torch.zeros(1), torch.tensor([[[1.0], [2.0], [4.0]]]))
    assert costs.tolist() == [10.0 + 11.0 + 13.0]


def test_a_sequence_whose_cost_is_no_number_costs_infinitely_much():
    def step(params, hidden_state, observation, action):
        return torch.tanh(observation[:, 0]), observation / action, hidden_state

    actions = torch.tensor([[[1.0]], [[0.0]], [[float("nan")]]])
    costs = sequence_costs(step, {}, (), torch.tensor([2.0]), actions)
    assert costs.isinf().tolist() == [False, True, True]  # the second's cost is finite, its prediction is not


@pytest.mark.parametrize("make", [StateSpaceModel, GRU, MLP])
def test_costs_are_those_of_the_model_rolled_out_by_hand(make):
    torch.manual_seed(0)
    model = make(4, D + A, D) if make is not MLP else MLP(D + A, D)
    model = model.double()
    data = torch.randn(3, 50, D, dtype=torch.float64)
    scales = dynamics_scales(data[0], torch.randn(50, A, dtype=torch.float64), data[1])
    step = model_step(model, scales, lambda o, a, n: n.square().sum(-1) + a.sum(-1))
    observation, actions = torch.randn(D, dtype=torch.float64), torch.randn(5, 6, A, dtype=torch.float64)
    has_state = make is not MLP
    state: Any = torch.randn(4, dtype=torch.float64) if has_state else ()
    found = sequence_costs(step, dict(model.named_parameters()), state, observation, actions)
    for c in range(5):
        o, h, total = observation[None], state[None] if has_state else None, 0.0
        for t in range(6):
            a = actions[c, t][None]
            x = [(o - scales.observation.mean) / scales.observation.std, (a - scales.action.mean) / scales.action.std]
            y, h = model(torch.cat(x, -1), h)
            o = o + y * scales.change.std + scales.change.mean
            total = total + o.square().sum() + a.sum()
        torch.testing.assert_close(found[c], total)


def plans(method, costs, space: ActionSpace, *, horizon=3, rounds=8, candidates=400, seed=0):
    noise = space.noise((rounds, candidates, horizon, space.size), generator(seed), exponent=0.0)
    return method(costs, space, space.start(horizon), noise)


@over_methods
def test_a_quadratic_is_minimised(method):
    goal = torch.tensor([[0.3, -0.6], [0.9, 0.0], [-0.2, 0.5]])
    found = plans(method, lambda a: (a - goal).square().sum((1, 2)), BOX, candidates=4000)
    close = 0.5 if method is random_shooting else 0.15
    assert (found.plan.mean - goal).abs().max() < close
    assert found.cost < close


@over_methods
def test_an_optimum_outside_the_box_is_found_on_its_bound(method):
    found = plans(method, lambda a: -a[:, 0, 0] + a[:, 0, 1], BOX, horizon=1, candidates=2000)
    torch.testing.assert_close(found.plan.mean, torch.tensor([[1.0, -1.0]]), atol=0.1, rtol=0)
    assert bool((found.plan.mean.abs() <= 1.0).all())


@over_methods
def test_choices_are_found(method):
    goal = torch.tensor([2, 0, 1, 1])
    right = torch.nn.functional.one_hot(goal, 3).float()
    found = plans(method, lambda a: -(a * right).sum((1, 2)), DiscreteActions(3), horizon=4)
    assert torch.equal(found.plan.probabilities.argmax(-1), goal)
    assert found.cost == -4.0


@over_methods
def test_a_plan_in_double_precision_is_in_double_precision(method):
    space = BoxActions(*torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    found = plans(method, lambda a: (a - 0.3).square().sum((1, 2)), space)
    assert found.plan.mean.dtype == found.plan.scale.dtype == found.cost.dtype == torch.float64


def test_weights_of_mppi_by_hand():
    noise = torch.tensor([[[[0.0]], [[1.0]], [[-1.0]]]])
    space = BoxActions([-1.0], [1.0], initial_scale=1.0)
    found = mppi(lambda a: a[:, 0, 0] + 5.0, space, space.start(1), noise, temperature=0.5)
    weights = torch.tensor([0.0, -2.0, 2.0]).exp()
    torch.testing.assert_close(found.plan.mean, ((weights[1] - weights[2]) / weights.sum())[None, None])
    assert found.plan.scale.tolist() == [[1.0]]
    assert found.cost == 4.0


def test_elites_of_cem_by_hand():
    noise = torch.tensor([[[[0.4]], [[1.0]], [[-1.0]], [[0.0]]]])
    space = BoxActions([-1.0], [1.0], initial_scale=1.0)
    found = cem(lambda a: (a[:, 0, 0] - 0.1).abs(), space, space.start(1), noise, elites=0.5)
    torch.testing.assert_close(found.plan.mean, torch.tensor([[0.2]]))
    torch.testing.assert_close(found.plan.scale, torch.tensor([[0.2]]))


@over_methods
def test_candidates_that_are_not_finite_are_never_chosen(method):
    def costs(actions):
        first = actions[:, 0, 0]
        return torch.where(first > 0.0, torch.inf, -first)  # the best is 0, next to what is infinite

    found = plans(method, costs, BoxActions([-1.0], [1.0]), horizon=1, candidates=300)
    assert -0.4 < found.plan.mean.item() <= 0.0
    assert torch.isfinite(found.cost)


@over_methods
def test_without_a_finite_candidate_the_plan_stays_as_it_is(method):
    found = plans(method, lambda a: torch.full((len(a),), torch.inf), BOX)
    start = BOX.start(3)
    assert found.cost == torch.inf
    assert torch.equal(found.plan.mean, start.mean)
    assert torch.equal(found.plan.scale, start.scale)


def test_fewer_finite_candidates_than_elites_are_all_the_elites():
    noise = torch.tensor([[[[0.4]], [[1.0]], [[-1.0]], [[0.0]]]])
    space = BoxActions([-1.0], [1.0], initial_scale=1.0)
    found = cem(lambda a: torch.where(a[:, 0, 0] == 1.0, 0.0, torch.inf), space, space.start(1), noise, elites=0.75)
    assert found.plan.mean.tolist() == [[1.0]]
    assert found.plan.scale.tolist() == [[0.0]]


# Many streams


def streams(seed=0, number=N):
    g = generator(seed)
    params = {"gain": 0.5 + torch.rand(number, generator=g), "goal": torch.randn(number, A, generator=g)}
    return params, torch.randn(number, A, generator=g)


@over_methods
@settings(deadline=None, max_examples=10)
@given(chunk=st.sampled_from([None, 1, 3]), trace=st.booleans(), seed=st.integers(0, 99))
def test_n_streams_are_n_planners(method, chunk, trace, seed):
    params, observation = streams(seed)
    compile: Any = "trace" if trace else False
    planner = Planner(
        integrator, BOX, horizon=4, candidates=40, rounds=2, method=method, chunk_size=chunk, compile=compile
    )
    noise = planner.noise(N, generator(seed))
    plan = planner.init(N)
    for _ in range(2):  # the second call goes on with the plans of the first
        before = plan
        action, plan = planner(params, None, observation, before, noise)
        for n in range(N):
            one = {name: value[n] for name, value in params.items()}
            costs = partial(sequence_costs, integrator, one, (), observation[n])
            found = method(costs, BOX, type(before)(*(leaf[n] for leaf in before)), noise[n])
            torch.testing.assert_close(action[n], found.plan.mean[0])
            torch.testing.assert_close(plan.mean[n], BOX.shifted(found.plan).mean)


def test_compiled_planning_gives_the_same_actions():
    params, observation = streams()
    actions = []
    for compile in (False, True):
        planner = Planner(integrator, BOX, horizon=3, candidates=30, rounds=2, chunk_size=2, compile=compile)
        noise = planner.noise(N, generator())
        action, plan = planner(params, None, observation, planner.init(N), noise)
        actions.append([action, planner(params, None, observation, plan, noise)[0]])
    torch.testing.assert_close(actions[0], actions[1])


@pytest.mark.parametrize("space", [BOX, DiscreteActions(A)], ids=["box", "choices"])
def test_weights_that_are_shared_are_as_good_as_copies(space):
    torch.manual_seed(0)
    model = StateSpaceModel(4, D + A, D, hidden_dim=8)
    scales = dynamics_scales(torch.randn(9, D), torch.randn(9, A), torch.randn(9, D))
    step = model_step(model, scales, lambda o, a, n: n.square().sum(-1))
    planner = Planner(step, space, horizon=4, candidates=30, rounds=2)
    named = {name: p.detach() for name, p in model.named_parameters()}
    stacked = {name: p.expand(N, *p.shape) for name, p in named.items()}
    head = {name: p for name, p in stacked.items() if name.startswith("output_mlp")}
    rest = {name: p for name, p in named.items() if name not in head}
    noise = planner.noise(N, generator())
    state, observation = torch.randn(N, 4), torch.randn(N, D)
    found = [
        planner(mine, state, observation, planner.init(N), noise, shared=shared)[0]
        for mine, shared in ((stacked, None), ({}, named), (head, rest))
    ]
    assert found[0].shape == ((N, A) if space is BOX else (N,))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_planner_brings_every_stream_to_its_goal():
    params, observation = streams()
    params["goal"] = params["goal"].clamp(-1.5, 1.5)
    planner = Planner(integrator, BOX, horizon=4, candidates=200, rounds=6)
    plan, g = planner.init(N), generator()
    for _ in range(12):
        action, plan = planner(params, None, observation, plan, planner.noise(N, g))
        observation = observation + params["gain"][:, None] * action
    assert (observation - params["goal"]).abs().max() < 0.1


def test_a_reset_begins_the_plan_anew_in_its_row_alone():
    params, observation = streams()
    planner = Planner(integrator, BOX, horizon=3, candidates=20, rounds=1)
    noise = planner.noise(N, generator())
    _, plan = planner(params, None, observation, planner.init(N), noise)
    reset = torch.tensor([False, True, False, False])
    action, _ = planner(params, None, observation, plan, noise, reset=reset)
    fresh, _ = planner(params, None, observation, planner.init(N), noise)
    warm, _ = planner(params, None, observation, plan, noise)
    assert torch.equal(action[1], fresh[1])
    assert not torch.equal(fresh[1], warm[1])
    assert torch.equal(action[[0, 2, 3]], warm[[0, 2, 3]])


def test_planning_keeps_nothing_for_a_gradient():
    params, observation = streams()
    params["gain"].requires_grad_()
    planner = Planner(integrator, BOX, horizon=3, candidates=20, rounds=1)
    action, plan = planner(params, None, observation, planner.init(N), planner.noise(N, generator()))
    assert not action.requires_grad
    assert not plan.mean.requires_grad


# Errors


def test_a_model_that_is_not_finite_is_an_error_that_names_the_stream():
    params, observation = streams()
    params["gain"][2] = torch.nan
    planner = Planner(integrator, BOX, horizon=3, candidates=20, rounds=1)
    with pytest.raises(FloatingPointError, match="No candidate of stream 2 has a finite cost"):
        planner(params, None, observation, planner.init(N), planner.noise(N))


@pytest.mark.parametrize("name", ["horizon", "candidates", "rounds", "chunk_size"])
def test_numbers_are_checked(name):
    make: Any = partial(Planner, integrator, BOX)
    with pytest.raises(ValueError, match=f"{name} must be .*got (0|-1)"):
        make(**{"horizon": 2, name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        make(**{"horizon": 2, name: 1.5})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"observation": torch.zeros(A)}, r"observation must have shape \(N, D\)"),
        ({"observation": torch.zeros(0, A)}, r"N >= 1; got \(0, 2\)"),
        (
            {"hidden_state": torch.zeros(3, 5)},
            r"hidden_state must have a row for each of 4 .*; got shape \(3, 5\)",
        ),
        ({"params": {"gain": torch.zeros(3)}}, r"gain must have a row for each of 4 streams"),
        ({"noise": torch.zeros(N, 1, 20, 2, A)}, r"noise must have shape \(N, R, C, H, A\) = \(4, 1, 20, 3, 2\)"),
        ({"reset": torch.zeros(N)}, r"reset must be a Bool tensor of shape \(4,\)"),
        ({"plan": BOX.start(3)}, r"plan must have a row for each of 4 streams; got shape \(3, 2\)"),
    ],
)
def test_shapes_are_checked(change, match):
    params, observation = streams()
    planner = Planner(integrator, BOX, horizon=3, candidates=20, rounds=1)
    given = {"params": params, "hidden_state": None, "observation": observation, "plan": planner.init(N)}
    with pytest.raises(ValueError, match=match):
        planner(**{**given, "noise": planner.noise(N), **change})
