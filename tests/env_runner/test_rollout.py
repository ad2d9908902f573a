from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, flatdim
from gymnasium.vector import SyncVectorEnv, VectorWrapper
from gymnasium.wrappers import TransformObservation
from gymnasium.wrappers.vector import NormalizeReward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from ssmrl.env_runner import (
    Environment,
    RolloutCarry,
    Trajectory,
    action_features,
    derive_seed,
    normal_noise,
    pack_valid,
    per_task,
    policy_inputs,
    random_policy,
    rollout,
)

MODES = ["NextStep", "SameStep", "Disabled"]


def counting_policy(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """Count the steps since the last reset, modulo 3."""
    if hidden_state is None:
        hidden_state = torch.full(reset.shape, 99)
    count = torch.where(reset, 0, hidden_state)
    return count % 3, count + 1


def torque(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """Push Pendulum with a leaky sum of what was observed in this episode."""
    total = torch.zeros_like(observation) if hidden_state is None else hidden_state
    total = 0.5 * torch.where(reset[:, None], 0.0, total) + observation
    return torch.tanh(total.sum(dim=1, keepdim=True)), total


def two_rows(counting: Any, mode: str) -> Environment:
    """Row 0 terminates after 2 steps, row 1 is truncated after 3."""
    return Environment([counting(2), counting(3, "truncated")], 2, autoreset_mode=mode)


def valid_steps(trajectory: Trajectory, row: int) -> Trajectory:
    return Trajectory(*(leaf[row][trajectory.valid[row]] for leaf in trajectory))


def assert_equal(a: Any, b: Any) -> None:
    assert_close(a, b, rtol=0, atol=0)


# Hand-computed: episodes of 2 steps in row 0, of 3 steps in row 1


def test_next_step_marks_the_inserted_step_invalid(counting):
    trajectory, carry = rollout(counting_policy, two_rows(counting, "NextStep"), 6)
    row = Trajectory(*(leaf[0] for leaf in trajectory))
    assert row.observation.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert row.next_observation.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert row.action.tolist() == [0, 1, 2, 0, 1, 2]
    assert row.reward.tolist() == [10, 21, 0, 10, 21, 0]
    assert row.terminated.int().tolist() == [0, 1, 0, 0, 1, 0]
    assert not row.truncated.any()
    assert row.reset.int().tolist() == [1, 0, 0, 1, 0, 0]
    assert row.valid.int().tolist() == [1, 1, 0, 1, 1, 0]
    row = Trajectory(*(leaf[1] for leaf in trajectory))
    assert row.truncated.int().tolist() == [0, 0, 1, 0, 0, 0]
    assert not row.terminated.any()
    assert row.reset.int().tolist() == [1, 0, 0, 0, 1, 0]
    assert row.valid.int().tolist() == [1, 1, 1, 0, 1, 1]
    assert carry.observation.tolist() == [[2, 0], [1, 2]]
    assert carry.reset.tolist() == [True, False]
    assert carry.ended.tolist() == [False, False]


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_the_other_modes_go_from_a_final_observation_to_the_next_episode(counting, mode):
    trajectory, carry = rollout(counting_policy, two_rows(counting, mode), 5)
    row = Trajectory(*(leaf[0] for leaf in trajectory))
    assert row.observation.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    assert row.next_observation.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [2, 1]]
    assert row.action.tolist() == [0, 1, 0, 1, 0]
    assert row.reward.tolist() == [10, 21, 10, 21, 10]
    assert row.terminated.int().tolist() == [0, 1, 0, 1, 0]
    assert row.reset.int().tolist() == [1, 0, 1, 0, 1]
    row = Trajectory(*(leaf[1] for leaf in trajectory))
    assert row.next_observation.tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2]]
    assert row.truncated.int().tolist() == [0, 0, 1, 0, 0]
    assert not row.terminated.any()
    assert not trajectory.truncated[0].any()
    assert trajectory.valid.all()
    assert carry.observation.tolist() == [[2, 1], [1, 2]]
    assert not carry.reset.any()


def test_the_policy_is_told_where_an_episode_begins(counting):
    for mode in MODES:
        told: list[Tensor] = []

        def policy(observation, hidden_state, reset, tell=told.append):
            tell(reset)
            return torch.zeros(2, dtype=torch.int64), None

        trajectory, _ = rollout(policy, two_rows(counting, mode), 7)
        assert_equal(trajectory.reset, torch.stack(told, dim=1))
        assert_equal(trajectory.reset & trajectory.valid, trajectory.observation[..., 1] == 0)


# Identities


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_every_autoreset_mode_gives_the_same_valid_transitions(env_id):
    def lean(observation, hidden_state, reset):
        return (observation[:, 2] < 0).long(), None

    policy = torque if env_id == "Pendulum-v1" else lean
    runs = [
        rollout(policy, Environment(env_id, 3, max_episode_steps=17, autoreset_mode=mode), 60, seed=4)[0]
        for mode in MODES
    ]
    assert not runs[0].valid.all()
    assert runs[1].valid.all()
    assert runs[2].valid.all()
    for row in range(3):
        expected = valid_steps(runs[0], row)
        assert len(expected.reward) > 50
        for run in runs[1:]:
            for a, b in zip(valid_steps(run, row), expected, strict=True):
                assert_equal(a[: len(b)], b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [1, 2, 3, 4, 7])
def test_two_rollouts_are_one(counting, mode, split):
    whole, end = rollout(counting_policy, two_rows(counting, mode), 8)
    environment = two_rows(counting, mode)
    first, carry = rollout(counting_policy, environment, split)
    second, carry = rollout(counting_policy, environment, 8 - split, carry=carry)
    for a, b, c in zip(whole, first, second, strict=True):
        assert_equal(a, torch.cat([b, c], dim=1))
    for a, b in zip(end, carry, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_successors_are_the_next_observations_wherever_no_episode_begins(mode):
    environment = Environment("Pendulum-v1", 2, max_episode_steps=4, autoreset_mode=mode)
    trajectory, carry = rollout(torque, environment, 13, seed=0)
    following = torch.cat([trajectory.observation[:, 1:], carry.observation[:, None]], dim=1)
    begins = torch.cat([trajectory.reset[:, 1:], carry.reset[:, None]], dim=1)
    begins &= trajectory.valid
    assert begins.any() != (mode == "NextStep")
    assert_equal(trajectory.next_observation[~begins], following[~begins])
    assert not torch.isclose(trajectory.next_observation, following)[begins].all(dim=-1).any()


def test_the_seed_is_that_of_the_environment():
    environment = Environment("Pendulum-v1", 2, seed=3)
    a, _ = rollout(torque, environment, 5)
    b, _ = rollout(torque, environment, 5, seed=3)
    c, _ = rollout(torque, environment, 5, seed=4)
    assert_equal(a.observation, b.observation)
    assert not torch.isclose(a.observation, c.observation).any()
    assert_equal(a.observation[:, 0].numpy(), environment.reset(seed=3)[0])


def test_a_hidden_state_is_handed_to_the_policy_and_back(counting):
    def policy(observation, hidden_state, reset):
        assert hidden_state.pop(0) == "first"
        return torch.zeros(2, dtype=torch.int64), hidden_state

    state = ["first", "second"]
    _, carry = rollout(policy, two_rows(counting, "NextStep"), 1, hidden_state=state)
    assert carry.hidden_state == ["second"]


def test_progress_counts_the_steps(counting):
    done: list[int] = []
    rollout(counting_policy, two_rows(counting, "NextStep"), 5, progress=done.append)
    assert done == [1] * 5


def test_nothing_is_recorded_for_a_gradient():
    weight = torch.full((3, 1), 0.1, requires_grad=True)

    def policy(observation, hidden_state, reset):
        return observation @ weight, observation @ weight

    trajectory, carry = rollout(policy, Environment("Pendulum-v1", seed=0), 3)
    assert not any(leaf.requires_grad for leaf in trajectory)
    assert not carry.hidden_state.requires_grad


# What the policy is shown of the past, and what it keeps


SCRIPTS = st.lists(
    st.lists(st.integers(1, 4) | st.integers(-4, -1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3
)


def leaky(params: Tensor, x: Tensor, total: Any, reset: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Act on a leaky sum of all that was seen since the last reset, with noise; elementwise, so exact for any batch."""
    total = x.new_zeros(x.shape) if total is None else total
    total = 0.5 * torch.where(reset[:, None], 0.0, total) + x
    return torch.tanh(params * total[:, 1:3]) + noise, total


def noisy(num_rows: int) -> Any:
    """A policy with a state, noise of each row, and a parameter for each row as its own task."""
    return per_task(leaky, torch.linspace(-1, 1, num_rows + 2)[1:-1].double(), noise=normal_noise(5, 2))


def scripted_rollout(scripted: Any, scripts: Any, mode: str, num_steps: int, **options: Any) -> Any:
    environment = Environment([scripted(lengths) for lengths in scripts], autoreset_mode=mode)
    return rollout(noisy(len(scripts)), environment, num_steps, dtype=torch.float64, **options)


def test_the_previous_step_is_shown_and_only_a_trial_forgets(counting):
    """Row 0 has episodes of 2 steps and trials of 2 episodes: all inputs by hand."""
    x, o = True, False
    first = [  # observation, one-hot previous action, previous reward, end flag
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 10, 0],
        [1, 0, 0, 1, 0, 21, 1],
        [1, 1, 0, 0, 1, 12, 0],
        [2, 0, 0, 0, 0, 0, 0],
        [2, 1, 1, 0, 0, 10, 0],
    ]
    inserted = {2: [0, 2, 0, 1, 0, 21, 1], 4: [1, 2, 1, 0, 0, 20, 1]}
    for mode in MODES:
        told: list[Tensor] = []

        def policy(observation, hidden_state, reset, tell=told.append):
            tell(observation)
            return counting_policy(observation, hidden_state, reset)

        trajectory, _ = rollout(policy, two_rows(counting, mode), 8, previous=True, episodes_per_trial=2)
        row = valid_steps(trajectory, 0)
        assert row.reset.tolist()[:6] == [x, o, o, o, x, o]
        assert row.action.tolist()[:6] == [0, 1, 2, 0, 0, 1]
        assert row.terminated.tolist()[:6] == [o, x, o, x, o, x]
        assert row.observation.tolist()[:6] == [line[:2] for line in first]
        seen = torch.stack(told, dim=1)[0]
        assert seen[trajectory.valid[0]].tolist()[:6] == first
        second = torch.stack(told, dim=1)[1][trajectory.valid[1]]
        assert second[:5, -1].tolist() == [0, 0, 0, 1, 0]  # Row 1 is truncated after 3 steps.
        if mode == "NextStep":
            assert seen[~trajectory.valid[0]].tolist() == list(inserted.values())
            assert not trajectory.reset[~trajectory.valid].any()


@settings(max_examples=40, deadline=None)
@given(SCRIPTS, st.sampled_from(MODES), st.integers(2, 12), st.integers(1, 3), st.booleans(), st.data())
def test_two_rollouts_are_one_for_everything_that_is_carried(scripted, scripts, mode, num_steps, trial, previous, data):
    options = {"previous": previous, "episodes_per_trial": trial}
    split = data.draw(st.integers(1, num_steps - 1))
    whole, end = scripted_rollout(scripted, scripts, mode, num_steps, **options)
    environment = Environment([scripted(lengths) for lengths in scripts], autoreset_mode=mode)
    policy = noisy(len(scripts))
    first, carry = rollout(policy, environment, split, dtype=torch.float64, **options)
    second, last = rollout(policy, environment, num_steps - split, carry=carry, dtype=torch.float64, **options)
    for a, b, c in zip(whole, first, second, strict=True):
        assert_equal(a, torch.cat([b, c], dim=1))
    for a, b in zip(tree_leaves(end), tree_leaves(last), strict=True):
        assert_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(SCRIPTS, st.integers(1, 14), st.integers(1, 3), st.booleans())
def test_every_mode_gives_the_same_valid_steps_to_a_policy_that_remembers(
    scripted, scripts, num_steps, trial, previous
):
    options = {"previous": previous, "episodes_per_trial": trial}
    runs = [scripted_rollout(scripted, scripts, mode, num_steps, **options)[0] for mode in MODES]
    for row in range(len(scripts)):
        expected = valid_steps(runs[0], row)
        for run in runs[1:]:
            assert run.valid.all()
            for a, b in zip(run, expected, strict=True):
                assert_equal(a[row][: len(b)], b)


@settings(max_examples=40, deadline=None)
@given(SCRIPTS, SCRIPTS, st.sampled_from(MODES), st.integers(1, 3), st.data())
def test_what_happens_in_other_rows_changes_nothing_in_a_row(scripted, scripts, others, mode, trial, data):
    row = data.draw(st.integers(0, len(scripts) - 1))
    changed = [script if i == row else others[i % len(others)] for i, script in enumerate(scripts)]
    options = {"previous": True, "episodes_per_trial": trial}
    trajectory, carry = scripted_rollout(scripted, scripts, mode, 11, **options)
    beside, beside_carry = scripted_rollout(scripted, changed, mode, 11, **options)
    for a, b in zip(tree_leaves((trajectory, carry)), tree_leaves((beside, beside_carry)), strict=True):
        assert_equal(a[row], b[row])


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, st.sampled_from(MODES), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_policy_inputs_are_what_the_policy_saw(scripted, scripts, mode, trial, before, after):
    environment = Environment([scripted(lengths) for lengths in scripts], autoreset_mode=mode)
    spaces = environment.single_observation_space, environment.single_action_space
    told: list[Tensor] = []

    def policy(observation, hidden_state, reset):
        told.append(observation)
        return noisy(len(scripts))(observation, hidden_state, reset)

    options: dict[str, Any] = {"previous": True, "episodes_per_trial": trial, "dtype": torch.float64}
    first, carry = rollout(policy, environment, before, **options)
    second, _ = rollout(policy, environment, after, carry=carry, **options)
    seen = torch.stack(told, dim=1)
    assert seen.shape[2] == 3 + 2 + 2
    assert_equal(policy_inputs(first, *spaces), seen[:, :before])
    assert_equal(policy_inputs(second, *spaces, carry=carry), seen[:, before:])
    packed = policy_inputs(pack_valid(first), *spaces)
    for row, valid in enumerate(first.valid):
        assert_equal(packed[row, : valid.sum()], seen[row, :before][valid])


def test_a_state_without_the_rows_in_front_is_left_as_the_policy_returned_it(counting):
    """Only NEXT_STEP inserts steps; a counter that all rows share, and a list, go on through them."""

    def policy(observation, hidden_state, reset):
        state = (torch.zeros(()), torch.zeros(2), []) if hidden_state is None else hidden_state
        shared, own, kept = state
        return torch.zeros(2, dtype=torch.int64), (shared + 1, own + 1, [*kept, None])

    _, carry = rollout(policy, two_rows(counting, "NextStep"), 7)
    shared, own, kept = carry.hidden_state
    assert (shared.item(), own.tolist(), len(kept)) == (7, [7, 7], 7)  # The list grows: another structure.

    def steady(observation, hidden_state, reset):
        shared, own = (torch.zeros(()), torch.zeros(2)) if hidden_state is None else hidden_state
        return torch.zeros(2, dtype=torch.int64), (shared + 1, own + 1)

    _, carry = rollout(steady, two_rows(counting, "NextStep"), 7)
    shared, own = carry.hidden_state
    assert (shared.item(), own.tolist()) == (7, [5, 6])


def test_discrete_observations_are_one_hot_beside_the_previous_step(counting):
    def clock() -> gymnasium.Env[Any, Any]:
        return TransformObservation(counting(3)(), lambda seen: np.int64(seen[1]), Discrete(5))

    widths = set()

    def policy(observation, hidden_state, reset):
        widths.add((observation.shape, observation.dtype))
        return counting_policy(observation, hidden_state, reset)

    environment = Environment(clock, 2, autoreset_mode="SameStep")
    trajectory, _ = rollout(policy, environment, 4, previous=True)
    assert widths == {((2, 5 + 3 + 2), torch.float32)}
    inputs = policy_inputs(trajectory, Discrete(5), Discrete(3))
    assert inputs[0, :, :5].argmax(dim=1).tolist() == trajectory.observation[0].tolist() == [0, 1, 2, 0]


# Values and types


def test_floats_have_the_dtype_and_integers_stay(counting):
    environment = two_rows(counting, "NextStep")
    for dtype in (None, torch.float64):
        trajectory, carry = rollout(counting_policy, environment, 2, dtype=dtype)
        expected = dtype or torch.get_default_dtype()
        for leaf in (trajectory.observation, trajectory.next_observation, trajectory.reward):
            assert leaf.dtype == expected
        assert carry.observation.dtype == expected
        assert trajectory.action.dtype == torch.int64
        for leaf in (
            trajectory.terminated,
            trajectory.truncated,
            trajectory.reset,
            trajectory.valid,
        ):
            assert leaf.dtype == torch.bool


@pytest.mark.parametrize("mode", MODES)
def test_discrete_observations_are_integers(counting, mode):
    def clock() -> gymnasium.Env[Any, Any]:
        return TransformObservation(counting(3)(), lambda seen: np.int64(seen[1]), Discrete(5))

    environment = Environment(clock, 2, autoreset_mode=mode)
    trajectory, _ = rollout(counting_policy, environment, 4)
    first, second = trajectory.observation[0], trajectory.next_observation[0]
    assert first.dtype == second.dtype == torch.int64
    assert first.tolist() == [0, 1, 2, 3 if mode == "NextStep" else 0]
    assert second.tolist() == [1, 2, 3, 0 if mode == "NextStep" else 1]


def test_observations_keep_their_shape():
    def image() -> gymnasium.Env[Any, Any]:
        sevens, space = np.full((1, 2, 2), 7, np.uint8), Box(0, 255, (1, 2, 2), np.uint8)
        return TransformObservation(gymnasium.make("CartPole-v1"), lambda _: sevens, space)

    environment = Environment(image, 2)
    trajectory, _ = rollout(random_policy(environment.single_action_space, 0), environment, 3)
    assert trajectory.observation.shape == (2, 3, 1, 2, 2)
    assert trajectory.observation.dtype == torch.uint8


def test_the_recorded_action_is_the_one_that_the_environment_got():
    class Meddling(gymnasium.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.got: list[float] = []

        def step(self, action):
            self.got.append(float(action[0]))
            result = self.env.step(action)
            action.fill(99.0)
            return result

    meddling = Meddling(gymnasium.make("Pendulum-v1"))
    environment = Environment(lambda: meddling)
    buffer = torch.zeros(1, 1)

    def policy(observation, hidden_state, reset):
        buffer.add_(0.1)
        return buffer, None

    trajectory, _ = rollout(policy, environment, 3, seed=0)
    assert trajectory.action.dtype == torch.float32
    assert trajectory.action.flatten().tolist() == meddling.got


@pytest.mark.parametrize("mode", MODES)
def test_it_copies_what_a_vector_environment_reuses(counting, mode):
    makers = [counting(2), counting(3, "truncated")]
    reusing = SyncVectorEnv(makers, copy=False, autoreset_mode=mode)
    expected, _ = rollout(counting_policy, two_rows(counting, mode), 6, dtype=torch.float64)
    trajectory, _ = rollout(counting_policy, reusing, 6, dtype=torch.float64)
    for a, b in zip(trajectory, expected, strict=True):
        assert_equal(a, b)


def test_it_runs_on_gymnasiums_vector_environments_and_wrappers():
    vector = gymnasium.make_vec("Pendulum-v1", 2, vectorization_mode="sync")
    trajectory, _ = rollout(torque, vector, 3, seed=1)
    np.testing.assert_array_equal(trajectory.observation[:, 0], vector.reset(seed=1)[0])
    wrapped = NormalizeReward(Environment("Pendulum-v1", 2))
    assert rollout(torque, wrapped, 3, seed=1)[0].reward.isfinite().all()


# Random policy


def test_a_random_policy_is_reproducible_and_its_rows_independent_of_the_batch_size():
    space = Box(-2.0, 3.0, (2,), np.float32)
    runs = {}
    for batch_size, seed in [(2, 0), (5, 0), (2, 1)]:
        policy, state, actions = random_policy(space, seed), None, []
        for _ in range(4):
            reset = torch.zeros(batch_size, dtype=torch.bool)
            action, state = policy(torch.zeros(batch_size, 3), state, reset)
            actions.append(action)
        runs[batch_size, seed] = torch.stack(actions, dim=1)
    assert_equal(runs[2, 0], runs[5, 0][:2])
    assert not torch.isclose(runs[2, 0], runs[2, 1]).any()
    assert len(runs[5, 0].flatten().unique()) == 5 * 4 * 2


@pytest.mark.parametrize(
    ("space", "mean", "std"),
    [
        (Discrete(4, start=2), 3.5, 1.25**0.5),
        (Box(-2.0, 4.0, (1,), np.float32), 1.0, 6 / 12**0.5),
    ],
)
def test_a_random_policy_is_uniform(space, mean, std):
    action, _ = random_policy(space, 0)(torch.zeros(2000, 1), None, torch.ones(2000).bool())
    action = action.double()
    assert abs(action.mean().item() - mean) < 4 * std / 2000**0.5
    assert abs(action.std().item() - std) < 0.1 * std
    assert all(a.numpy().astype(space.dtype) in space for a in action)


def test_a_random_policys_streams_are_not_the_environments():
    environment = Environment("Pendulum-v1", 8, seed=0)
    environment.reset()
    space = environment.single_action_space
    action, _ = random_policy(space, 0)(torch.zeros(8, 3), None, torch.ones(8).bool())
    assert not np.isclose(environment.action_space.sample(), action.numpy()).any()
    for row in range(8):
        space.seed(derive_seed(0, row))
        assert not np.isclose(space.sample(), action[row].numpy()).any()


def test_a_random_rollout_goes_on_where_it_stopped():
    def environment():
        return Environment("CartPole-v1", 2, seed=0)

    policy = random_policy(Discrete(2), 3)
    whole, _ = rollout(policy, environment(), 20)
    same = environment()
    first, carry = rollout(policy, same, 9)
    second, _ = rollout(policy, same, 11, carry=carry)
    for a, b, c in zip(whole, first, second, strict=True):
        assert_equal(a, torch.cat([b, c], dim=1))


# Action features


def test_discrete_actions_become_one_hot():
    features = action_features(torch.tensor([[4, 6], [5, 4]]), Discrete(3, start=4))
    expected = [[[1.0, 0, 0], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]]
    assert_equal(features, torch.tensor(expected))


def test_box_actions_are_flattened():
    space = Box(-1, 1, (2, 3), np.float32)
    action = torch.arange(24, dtype=torch.float64).reshape(2, 2, 2, 3)
    features = action_features(action, space, dtype=torch.float64)
    assert_equal(features, torch.arange(24, dtype=torch.float64).reshape(2, 2, 6))
    assert action_features(action, space).dtype == torch.float32
    assert_equal(action_features(torch.ones(5), Box(-1, 1, (), np.float32)), torch.ones(5, 1))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,), np.float32)])
def test_action_features_have_flatdim_columns(space):
    action, _ = random_policy(space, 0)(torch.zeros(4, 1), None, torch.ones(4).bool())
    assert action_features(action, space).shape == (4, flatdim(space))


# Errors


@pytest.mark.parametrize(
    ("action", "space", "message"),
    [
        (torch.tensor([3]), Discrete(3), r"must hold integers of Discrete\(3\)"),
        (torch.tensor([-1]), Discrete(3), r"must hold integers of Discrete\(3\)"),
        (torch.tensor([1.0]), Discrete(3), r"must hold integers of Discrete\(3\)"),
        (torch.zeros(4, 3), Box(-1, 1, (2,)), r"shape \(\.\.\., \*\(2,\)\) .* got \(4, 3\)"),
        (torch.zeros(()), Box(-1, 1, (2,)), r"got \(\)"),
    ],
)
def test_actions_outside_the_space_have_no_features(action, space, message):
    with pytest.raises(ValueError, match=message):
        action_features(action, space)


def test_composite_spaces_are_refused(counting):
    with pytest.raises(TypeError, match="`space` must be a Box or a Discrete space; got Multi"):
        action_features(torch.zeros(1), MultiDiscrete([2, 2]))
    with pytest.raises(TypeError, match="`action_space` must be a Box or a Discrete"):
        random_policy(Dict({"a": Discrete(2)}), 0)

    def composite(name: str) -> Environment:
        env = counting(2)()
        setattr(env, name, Dict({"a": Discrete(2)}))
        return Environment(lambda: env)

    for name in ("observation_space", "action_space"):
        with pytest.raises(TypeError, match=f"`single_{name}` must be a Box or a Discrete"):
            rollout(counting_policy, composite(name), 1)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.tensor([0, 1]), TypeError, r"tuple \(action, hidden_state\); got Tensor"),
        ((torch.tensor([0]), None), ValueError, r"shape \(2,\); got \(1,\)"),
        ((torch.tensor([[0], [1]]), None), ValueError, r"shape \(2,\); got \(2, 1\)"),
        ((torch.tensor([0.0, 1.0]), None), TypeError, "must return integers for Discrete"),
        ((torch.tensor([True, False]), None), TypeError, "must return integers for Discrete"),
        ((torch.tensor([0, 3]), None), ValueError, "from 0 to 2; got 3 in row 1"),
    ],
)
def test_a_bad_action_of_the_policy_is_refused(counting, returned, error, message):
    with pytest.raises(error, match=message):
        rollout(lambda *_: returned, two_rows(counting, "NextStep"), 1)


def test_a_policy_that_returns_nan_is_refused():
    with pytest.raises(ValueError, match=r"must be finite; got \[nan\] in row 0"):
        rollout(lambda *_: (torch.tensor([[torch.nan]]), None), Environment("Pendulum-v1"), 1)


def test_bad_arguments_of_rollout_are_refused(counting):
    environment = two_rows(counting, "NextStep")
    with pytest.raises(ValueError, match="`num_steps` must be at least 1; got 0"):
        rollout(counting_policy, environment, 0)
    _, carry = rollout(counting_policy, environment, 1)
    extras: list[dict[str, Any]] = [{"seed": 1}, {"hidden_state": 1}]
    for extra in extras:
        with pytest.raises(ValueError, match="`carry` already holds"):
            rollout(counting_policy, environment, 1, carry=carry, **extra)
    with pytest.raises(ValueError, match="`episodes_per_trial` must be at least 1; got 0"):
        rollout(counting_policy, environment, 1, episodes_per_trial=0)
    second, _ = rollout(counting_policy, environment, 1, carry=carry)
    with pytest.raises(ValueError, match=r"`carry` must be .* row 0 begins in the middle of a trial; got None"):
        policy_inputs(second, environment.single_observation_space, environment.single_action_space)
    row = RolloutCarry(*(leaf[:1] for leaf in carry))
    with pytest.raises(ValueError, match="from an environment of 2 rows; got 1"):
        rollout(counting_policy, environment, 1, carry=row)
    unknown = VectorWrapper(environment)
    unknown.metadata = {}
    with pytest.raises(ValueError, match="must be an AutoresetMode; got None"):
        rollout(counting_policy, unknown, 1)
    with pytest.raises(ValueError, match="`seed` must be at least 0; got -1"):
        random_policy(Discrete(2), -1)
