from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ssmrl.env_runner import Environment, Trajectory, collect_episodes, first_episodes, pack_valid, rollout

MODES = ["NextStep", "SameStep", "Disabled"]


def make_trajectory(valid: Tensor, ended: Tensor) -> Trajectory:
    """The observation of step t of row b is (b + 1, t + 1); terminations where `ended`; rewards t + 1."""
    rows, times = torch.meshgrid(*(torch.arange(1.0, n + 1) for n in valid.shape), indexing="ij")
    place, none = torch.stack([rows, times], dim=-1), torch.zeros_like(valid)
    return Trajectory(place, times.long(), times, place, ended, none, none, valid)


def flags(*rows: str) -> Tensor:
    return torch.tensor([[character == "x" for character in row] for row in rows])


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    count = shape[0] * shape[1]
    drawn = draw(st.lists(st.sampled_from("vve-!"), min_size=count, max_size=count))
    valid = torch.tensor([character in "ve" for character in drawn]).reshape(shape)
    ended = torch.tensor([character in "e!" for character in drawn]).reshape(shape)
    return make_trajectory(valid, ended)


def still(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    return torch.zeros(len(reset), 2), None


# Packing


def test_valid_steps_move_to_the_front_and_zeros_follow():
    packed = pack_valid(make_trajectory(flags("x.x..", ".xxx."), flags("..x..", "...x.")))
    assert packed.reward.tolist() == [[1, 3, 0], [2, 3, 4]]
    assert packed.action.tolist() == [[1, 3, 0], [2, 3, 4]]
    assert packed.observation[0].tolist() == [[1, 1], [1, 3], [0, 0]]
    assert packed.terminated.tolist() == [[False, True, False], [False, False, True]]
    assert packed.valid.tolist() == [[True, True, False], [True, True, True]]
    assert packed.observation.dtype == torch.float32
    assert packed.action.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(trajectories())
def test_packing_keeps_every_valid_step_of_a_row_in_order_and_nothing_else(trajectory):
    packed = pack_valid(trajectory)  # Ends in steps that are not valid ("!") are none.
    for a, b in zip(packed, trajectory, strict=True):
        for row, valid in enumerate(trajectory.valid):
            count = int(valid.sum())
            assert_close(a[row, :count], b[row][valid], rtol=0, atol=0)
            assert not a[row, count:].any()
    assert packed.valid.shape[1] == trajectory.valid.sum(dim=1).max()
    for a, b in zip(pack_valid(packed), packed, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@settings(max_examples=100, deadline=None)
@given(trajectories(), st.integers(1, 3))
def test_the_first_episodes_are_the_valid_steps_up_to_that_many_ends(trajectory, num_episodes):
    found = first_episodes(trajectory, num_episodes)
    for row in range(len(trajectory.valid)):
        expected, ends = [], 0
        for t in range(trajectory.valid.shape[1]):
            if trajectory.valid[row, t] and ends < num_episodes:
                expected.append(t + 1)
                ends += int(trajectory.terminated[row, t])
        assert found.action[row][found.valid[row]].tolist() == expected


# Collecting


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_episodes", [1, 2])
def test_each_row_has_its_first_episodes_and_is_not_stepped_longer_than_needed(scripted, mode, num_episodes):
    environment = Environment([scripted((2, -4)), scripted((-3, 1))], autoreset_mode=mode)
    done: list[int] = []
    trajectory = collect_episodes(still, environment, num_episodes, 50, progress=done.append)
    assert trajectory.valid.sum(dim=1).tolist() == ([2, 3] if num_episodes == 1 else [6, 4])
    steps = {1: 3, 2: 6 + (mode == "NextStep")}[num_episodes]
    assert done == [1] * steps
    first, second = (trajectory.reward * trajectory.valid).tolist()
    assert first == ([1, 2, 0] if num_episodes == 1 else [1, 2, 1, 2, 3, 4])
    assert second == ([1, 2, 3] if num_episodes == 1 else [1, 2, 3, 1, 0, 0])
    assert (trajectory.terminated | trajectory.truncated).sum(dim=1).tolist() == [num_episodes] * 2
    assert trajectory.terminated[0, 1]
    assert trajectory.truncated[1, 2]
    assert trajectory.reset.int().sum(dim=1).tolist() == [1, 1]  # One trial.
    assert trajectory.next_observation[1, 2].tolist() == [0, 3, 0]


def test_episodes_of_one_length_are_a_rollout_of_that_length(scripted):
    makers = [scripted((-5,))] * 3
    episodes = collect_episodes(still, Environment(makers), 1, 5, dtype=torch.float64)
    expected, _ = rollout(still, Environment(makers), 5, dtype=torch.float64)
    assert episodes.valid.all()
    for a, b in zip(episodes, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_its_arguments_reach_the_rollout():
    seen: list[Any] = []

    def policy(observation, hidden_state, reset):
        seen.append((tuple(observation.shape), hidden_state, reset.all().item(), observation[0, 0].item()))
        return torch.zeros(len(reset), 1, dtype=observation.dtype), "later"

    environment = Environment("Pendulum-v1", 2, max_episode_steps=2)
    trajectory = collect_episodes(
        policy, environment, 1, 2, hidden_state="first", seed=7, previous=True, dtype=torch.float64
    )
    assert [line[:3] for line in seen] == [((2, 3 + 1 + 2), "first", True), ((2, 6), "later", False)]
    assert seen[0][3] == environment.reset(seed=7)[0][0, 0] == trajectory.observation[0, 0, 0]
    assert trajectory.reward.dtype == torch.float64


def test_a_row_that_does_not_end_in_time_is_named(scripted):
    environment = Environment([scripted((2,)), scripted((5,)), scripted((1,))])
    with pytest.raises(ValueError, match="1 episodes within `max_steps` = 4 steps; row 1 ended 0: raise it, or limit"):
        collect_episodes(still, environment, 1, 4)
    for arguments, name in (((0, 4), "num_episodes"), ((1, 0), "max_steps")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
            collect_episodes(still, environment, *arguments)
    with pytest.raises(ValueError, match="`num_episodes` must be at least 1; got 0"):
        first_episodes(make_trajectory(flags("x"), flags("x")), 0)
