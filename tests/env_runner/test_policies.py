from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.testing import assert_close

from ssmrl.core import GRU
from ssmrl.env_runner import (
    Environment,
    PerTaskState,
    Trajectory,
    by_task,
    derive_seed,
    gumbel_noise,
    normal_noise,
    pack_valid,
    per_task,
    policy_inputs,
    rollout,
)


def linear(params: Any, observation: Tensor, hidden_state: Any, reset: Tensor, noise: Any) -> tuple[Tensor, Any]:
    mean = observation @ params["weight"] + params["bias"]
    return mean if noise is None else mean + 0.1 * noise, hidden_state


def linear_params(num_tasks: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_tasks, 3, 1, dtype=dtype, generator=generator)
    return {"weight": weight, "bias": torch.arange(num_tasks, dtype=dtype)[:, None]}


def test_every_row_is_decided_by_the_parameters_of_its_task():
    params = {"weight": torch.tensor([[[2.0]], [[3.0]]]), "bias": torch.tensor([[0.0], [100.0]])}
    observation = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    action, state = per_task(linear, params)(observation, None, torch.ones(6).bool())
    assert action.tolist() == [[2], [4], [6], [112], [115], [118]]
    assert state.hidden_state is None
    assert state.draws.tolist() == [1] * 6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(1, 9))
def test_it_equals_a_loop_over_the_tasks(num_tasks, num_rows, with_noise, num_steps):
    """A GRU per task, with its state, its resets and its noise, against the models called one by one."""
    generator = torch.Generator().manual_seed(num_tasks)
    models = [GRU(3, 2, 1).double() for _ in range(num_tasks)]
    params, _ = stack_module_state(models)
    noise = normal_noise(3, 1) if with_noise else None

    def policy_fn(params, observation, hidden_state, reset, noise):
        hidden_state = models[0].init_hidden(len(observation)) if hidden_state is None else hidden_state
        output, hidden_state = functional_call(models[0], params, (observation, hidden_state, reset))
        return (output if noise is None else output + noise), hidden_state

    policy, state = per_task(policy_fn, params, noise=noise), None
    hidden: list[Any] = [None] * num_tasks
    total = num_tasks * num_rows
    for n in range(num_steps):
        observation = torch.randn(total, 2, dtype=torch.float64, generator=generator)
        reset = torch.rand(total, generator=generator) < 0.3
        action, state = policy(observation, state, reset)
        expected = []
        for task, model in enumerate(models):
            rows = slice(task * num_rows, (task + 1) * num_rows)
            output, hidden[task] = model(observation[rows], hidden[task], reset[rows])
            expected.append(output)
        drawn = 0.0 if noise is None else noise(torch.full((total,), n))
        assert_close(action, torch.cat(expected) + drawn)
        assert_close(state.hidden_state, torch.cat(hidden))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_one_integer_reproduces_a_row_over_any_number_of_rows(mode):
    def run(num_tasks: int, seed: int) -> Trajectory:
        environment = Environment("Pendulum-v1", 2 * num_tasks, max_episode_steps=7, autoreset_mode=mode)
        params = {name: leaf[:num_tasks] for name, leaf in linear_params(5).items()}

        def policy_fn(*arguments: Any) -> tuple[Tensor, Any]:
            action, hidden_state = linear(*arguments)
            return 2 * torch.sigmoid(action), hidden_state

        policy = per_task(policy_fn, params, noise=normal_noise(seed, 1))
        return rollout(policy, environment, 20, seed=seed, dtype=torch.float64)[0]

    few, many, other = run(2, 0), run(5, 0), run(2, 1)
    for a, b in zip(few, many, strict=True):
        assert_close(a, b[:4])
    assert not torch.isclose(few.action, other.action).any()
    assert len(many.action[many.valid].unique()) == many.valid.sum()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("trial", [1, 2])
def test_a_sequence_model_over_the_packed_inputs_repeats_the_rollout(mode, trial):
    """RL²: what the policy did step by step, in any mode, a model over the sequence says again."""
    model = GRU(4, 3 + 1 + 2, 1).double()
    params = {name: p.detach()[None] for name, p in model.named_parameters()}

    def policy_fn(params, observation, hidden_state, reset, noise):
        hidden_state = model.init_hidden(len(observation)) if hidden_state is None else hidden_state
        return functional_call(model, params, (observation, hidden_state, reset))

    environment = Environment("Pendulum-v1", 3, max_episode_steps=5, autoreset_mode=mode, seed=0)
    trajectory, _ = rollout(
        per_task(policy_fn, params), environment, 23, previous=True, episodes_per_trial=trial, dtype=torch.float64
    )
    packed = pack_valid(trajectory)
    inputs = policy_inputs(packed, environment.single_observation_space, environment.single_action_space)
    output, _ = model(inputs, None, packed.reset)
    assert_close(output, packed.action)
    assert packed.reset.sum() < packed.truncated.sum() + 3 or trial == 1


def test_a_categorical_action_has_the_probabilities_of_its_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])

    def policy_fn(params, observation, hidden_state, reset, noise):
        return (params + noise).argmax(dim=-1), hidden_state

    rows = 20_000
    action, _ = per_task(policy_fn, logits, noise=gumbel_noise(0, 3))(
        torch.zeros(rows, 1), None, torch.ones(rows).bool()
    )
    share = torch.nn.functional.one_hot(action).reshape(2, -1, 3).float().mean(dim=1)
    assert_close(share, logits.softmax(dim=1), atol=4 * 0.5 / 10_000**0.5, rtol=0)


def test_the_noise_goes_on_with_the_carry_and_begins_anew_without():
    policy = per_task(linear, linear_params(1), noise=normal_noise(0, 1))
    reset = torch.ones(2).bool()
    observation = torch.zeros(2, 3)
    first, state = policy(observation, None, reset)
    second, _ = policy(observation, state, reset)
    again, _ = policy(observation, None, reset)
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.isclose(first, second).any()
    third, _ = policy(observation, PerTaskState(None, torch.tensor([0, 1])), reset)
    assert_close(third, torch.stack([first[0], second[1]]), rtol=0, atol=0)
    anew, _ = per_task(linear, linear_params(1), noise=normal_noise(derive_seed(0, 1), 1))(observation, None, reset)
    assert not torch.isclose(first, anew).any()


def test_a_given_hidden_state_is_split_among_the_tasks():
    def policy_fn(params, observation, hidden_state, reset, noise):
        return observation + hidden_state["h"], {"h": hidden_state["h"] * params}

    state = {"h": torch.tensor([[1.0], [2.0], [3.0], [4.0]])}
    action, after = per_task(policy_fn, torch.tensor([10.0, 100.0]))(torch.zeros(4, 1), state, torch.ones(4).bool())
    assert action.flatten().tolist() == [1, 2, 3, 4]
    assert after.hidden_state["h"].flatten().tolist() == [10, 20, 300, 400]


def test_observations_and_noise_have_the_dtype_of_the_parameters_and_integers_stay():
    seen = []

    def policy_fn(params, observation, hidden_state, reset, noise):
        seen.append((observation.dtype, noise.dtype))
        return noise[:, 0] + params, hidden_state

    single, double, integer = torch.float32, torch.float64, torch.int64
    for shown, params in [(single, double), (double, single), (integer, single)]:
        policy = per_task(policy_fn, torch.zeros(1, dtype=params), noise=normal_noise(0, 1))
        policy(torch.zeros(2, 3, dtype=shown), None, torch.ones(2).bool())
    assert seen == [(double, double), (single, single), (integer, single)]


def test_by_task_is_undone_by_flatten():
    trajectory = Trajectory(*(torch.arange(24).reshape(6, 4) + i for i in range(8)))
    tasks = by_task(trajectory, 2)
    assert tasks.reward[1, 0].tolist() == trajectory.reward[3].tolist()
    for leaf, whole in zip(tasks, trajectory, strict=True):
        assert leaf.shape == (2, 3, 4)
        assert_close(leaf.flatten(0, 1), whole, rtol=0, atol=0)


# Errors


@pytest.mark.parametrize(
    "params", [{}, {"a": torch.zeros(())}, {"a": torch.zeros(2), "b": torch.zeros(3)}, torch.zeros(0)]
)
def test_parameters_without_one_task_axis_are_refused(params):
    with pytest.raises(ValueError, match=r"`params` must hold tensors .* on one leading axis, \(N, \.\.\.\); got"):
        per_task(linear, params)


def test_rows_that_are_no_multiple_of_the_tasks_are_refused():
    with pytest.raises(ValueError, match="as many rows for each of the 2 tasks in `params`; got 3 rows"):
        per_task(linear, linear_params(2))(torch.zeros(3, 3), None, torch.ones(3).bool())
    with pytest.raises(ValueError, match="`num_tasks` must divide the number of rows, 3; got 2"):
        by_task(Trajectory(*[torch.zeros(3, 2)] * 8), 2)
    with pytest.raises(ValueError, match="`num_tasks` must be at least 1; got 0"):
        by_task(Trajectory(*[torch.zeros(3, 2)] * 8), 0)


def test_a_policy_fn_without_a_state_in_its_result_is_refused():
    policy = per_task(lambda params, observation, *rest: observation, torch.zeros(1))
    with pytest.raises(TypeError, match=r"`policy_fn` must return a tuple \(action, hidden_state\); got Tensor"):
        policy(torch.zeros(2, 1), None, torch.ones(2).bool())


def test_its_actions_are_checked_by_the_rollout(counting):
    environment = Environment(counting(2), 2)
    assert environment.single_action_space == Discrete(3)
    with pytest.raises(TypeError, match="must return integers"):
        rollout(per_task(lambda p, o, h, r, n: (o[:, 0], h), torch.zeros(1)), environment, 1)
    assert isinstance(environment.single_observation_space, Box)
