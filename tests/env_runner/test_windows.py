from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ssmrl.env_runner import (
    Environment,
    Trajectory,
    Windows,
    cut_windows,
    policy_inputs,
    random_policy,
    rollout,
    split_support_query,
)


def make_trajectory(terminated: Tensor, truncated: Tensor, reset: Tensor, valid: Tensor) -> Trajectory:
    """The observation of step t of row b is (b, t)."""
    rows, times = torch.meshgrid(*(torch.arange(n) for n in valid.shape), indexing="ij")
    place = torch.stack([rows, times], dim=-1).float()
    return Trajectory(place, times, times.float(), place, terminated, truncated, reset, valid)


def flags(*rows: str) -> Tensor:
    return torch.tensor([[character == "x" for character in row] for row in rows])


def steps_of(windows: Windows) -> list[tuple[int, list[int]]]:
    return [(row, times) for row, times in zip(windows.row.tolist(), windows.data.action.tolist(), strict=True)]


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 20)))
    count = shape[0] * shape[1]

    def mask() -> Tensor:
        rate = draw(st.sampled_from([0, 1, 3]))
        drawn = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        return (torch.tensor(drawn) < rate).reshape(shape)

    return make_trajectory(mask(), mask(), mask(), ~mask())


def episodes_of(trajectory: Trajectory, row: int) -> list[list[int]]:
    """The valid steps of every episode, by a plain walk through the row."""
    episodes: list[list[int]] = [[]]
    for t in range(trajectory.valid.shape[1]):
        if trajectory.reset[row, t]:
            episodes.append([])
        if trajectory.valid[row, t]:
            episodes[-1].append(t)
        ended = trajectory.terminated[row, t] or trajectory.truncated[row, t]
        if ended or not trajectory.valid[row, t]:
            episodes.append([])
    return [episode for episode in episodes if episode]


# Cutting


def test_episodes_are_cut_from_their_start_and_the_remainder_is_dropped():
    none = flags("........", "........")
    trajectory = make_trajectory(
        terminated=flags("....x...", "........"),
        truncated=flags("........", "..x....."),
        reset=flags("x....x..", "x...x..."),
        valid=~flags("........", "...x...."),
    )
    assert steps_of(cut_windows(trajectory, 2)) == [
        (0, [0, 1]),
        (0, [2, 3]),
        (0, [5, 6]),
        (1, [0, 1]),
        (1, [4, 5]),
        (1, [6, 7]),
    ]
    assert steps_of(cut_windows(trajectory, 3)) == [
        (0, [0, 1, 2]),
        (0, [5, 6, 7]),
        (1, [0, 1, 2]),
        (1, [4, 5, 6]),
    ]
    assert steps_of(cut_windows(trajectory, 6)) == []
    everything = make_trajectory(none, none, none, ~none)
    assert steps_of(cut_windows(everything, 8)) == [(0, [*range(8)]), (1, [*range(8)])]
    assert cut_windows(everything, 9).data.observation.shape == (0, 9, 2)


def test_every_leaf_is_cut_alike():
    environment = Environment("Pendulum-v1", 2, max_episode_steps=5, seed=0)
    policy = random_policy(environment.single_action_space, 0)
    trajectory, _ = rollout(policy, environment, 17)
    windows = cut_windows(trajectory, 2)
    assert windows.num_rows == 2
    assert len(windows.row) == 2 * 6
    # An episode of 5 steps and the inserted one: windows begin at 0, 2, 6, 8, 12, 14.
    for m, start in enumerate([0, 2, 6, 8, 12, 14] * 2):
        for leaf, whole in zip(windows.data, trajectory, strict=True):
            assert_close(leaf[m], whole[windows.row[m], start : start + 2], rtol=0, atol=0)
    assert windows.data.reset[:, 0].tolist() == [True, False] * 6
    assert_close(windows.data.next_observation[:, 0], windows.data.observation[:, 1])


@settings(max_examples=200, deadline=None)
@given(trajectories(), st.integers(1, 6))
def test_windows_are_all_that_fits_into_episodes_and_nothing_else(trajectory, length):
    expected = [
        (row, episode[start : start + length])
        for row in range(len(trajectory.valid))
        for episode in episodes_of(trajectory, row)
        for start in range(0, len(episode) - length + 1, length)
    ]
    assert steps_of(cut_windows(trajectory, length)) == expected


@settings(max_examples=200, deadline=None)
@given(trajectories(), st.integers(1, 6))
def test_windows_are_valid_disjoint_and_within_one_episode(trajectory, length):
    row, data, _ = cut_windows(trajectory, length)
    assert data.valid.all()
    assert not (data.terminated | data.truncated)[:, :-1].any()
    assert not data.reset[:, 1:].any()
    assert (data.action.diff(dim=1) == 1).all()
    assert (data.observation[..., 0] == row[:, None]).all()
    steps = data.observation.reshape(-1, 2)
    assert len(steps) == len(steps.unique(dim=0))


def test_no_window_crosses_an_end_within_a_trial(counting):
    """With trials of 3 episodes `reset` is rare; the ends still cut, as in the same rollout without trials."""

    def policy(observation, hidden_state, reset):
        return torch.zeros(2, dtype=torch.int64), None

    for mode in ("NextStep", "SameStep", "Disabled"):
        cut = []
        for trial in (1, 3):
            environment = Environment([counting(4), counting(3, "truncated")], autoreset_mode=mode)
            trajectory, _ = rollout(policy, environment, 17, episodes_per_trial=trial)
            cut.append(cut_windows(trajectory, 2))
        plain, trials = cut
        assert (trials.data.observation[..., 0].diff(dim=1) == 0).all()
        assert_close(trials.data.observation, plain.data.observation, rtol=0, atol=0)
        assert 0 < trials.data.reset.sum() < plain.data.reset.sum()


def test_inputs_of_a_policy_that_saw_the_previous_step_are_cut_with_the_rest():
    environment = Environment("Pendulum-v1", 2, max_episode_steps=5, seed=0)
    trajectory, _ = rollout(random_policy(environment.single_action_space, 0), environment, 11, previous=True)
    inputs = policy_inputs(trajectory, environment.single_observation_space, environment.single_action_space)
    windows = cut_windows(trajectory._replace(observation=inputs), 4)
    assert windows.data.observation.shape == (4, 4, 3 + 1 + 2)
    assert_close(windows.data.observation[:, 1:, 3], windows.data.action[:, :-1, 0], rtol=0, atol=0)
    assert_close(windows.data.observation[:, 1:, 4], windows.data.reward[:, :-1], rtol=0, atol=0)


# Splitting


def numbered_windows(*counts: int) -> Windows:
    """`counts[b]` windows of 2 steps in row b, numbered from 0 over all rows."""
    number = torch.arange(sum(counts))[:, None].expand(-1, 2)
    mask = torch.zeros(number.shape, dtype=torch.bool)
    data = Trajectory(*[number] * 4, *[mask] * 4)
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Windows(row, data, len(counts))


def test_without_a_generator_windows_are_taken_in_time_order():
    support, query = split_support_query(numbered_windows(3, 5, 4), 1, 2)
    assert support.observation.tolist() == [[[0, 0]], [[3, 3]], [[8, 8]]]
    assert query.observation.tolist() == [[[1, 1], [2, 2]], [[4, 4], [5, 5]], [[9, 9], [10, 10]]]
    assert support.reset.shape == (3, 1, 2)


def test_shuffled_windows_still_go_to_their_rows():
    windows = numbered_windows(3, 4)
    order = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    shuffled = Windows(windows.row[order], Trajectory(*(x[order] for x in windows.data)), 2)
    support, query = split_support_query(shuffled, 2, 1)
    assert support.observation[..., 0].tolist() == [[0, 1], [6, 3]]
    assert query.observation[..., 0].tolist() == [[2], [5]]


@given(
    st.lists(st.integers(3, 7), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_draw_is_disjoint_and_stays_within_its_row(counts, num_support, seed):
    windows = numbered_windows(*counts)
    generator = torch.Generator().manual_seed(seed)
    support, query = split_support_query(windows, num_support, 1, generator=generator)
    drawn = torch.cat([support.observation, query.observation], dim=1)[..., 0]
    assert drawn.shape == (len(counts), num_support + 1)
    assert (windows.row[drawn] == torch.arange(len(counts))[:, None]).all()
    assert len(drawn.unique()) == drawn.numel()


def test_a_draw_is_a_function_of_the_generator_and_uses_every_window():
    def draw(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        support, query = split_support_query(numbered_windows(4), 1, 1, generator=generator)
        return [support.observation[0, 0, 0].item(), query.observation[0, 0, 0].item()]

    assert draw(0) == draw(0)
    assert {tuple(draw(seed)) for seed in range(200)} == {(a, b) for a in range(4) for b in range(4) if a != b}


# Errors


@pytest.mark.parametrize("counts", [(3, 2, 3), (3, 0, 3), (3, 1)])
def test_a_row_with_too_few_windows_is_named(counts):
    message = rf"num_support \+ num_query = 3 windows; row 1 has {counts[1]}"
    with pytest.raises(ValueError, match=message):
        split_support_query(numbered_windows(*counts), 2, 1)


def test_a_last_row_without_any_window_is_named():
    none = flags("....", "....")
    windows = cut_windows(make_trajectory(none, none, none, ~flags("....", "xxxx")), 2)
    with pytest.raises(ValueError, match="row 1 has 0"):
        split_support_query(windows, 1, 1)


def test_bad_arguments_are_refused():
    none = flags("....")
    trajectory = make_trajectory(none, none, none, ~none)
    with pytest.raises(ValueError, match="`length` must be at least 1; got 0"):
        cut_windows(trajectory, 0)
    with pytest.raises(TypeError, match=r"`length` must be an integer; got 2\.0"):
        cut_windows(trajectory, 2.0)  # type: ignore[arg-type]
    for arguments, name in (((0, 1), "num_support"), ((1, 0), "num_query")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
            split_support_query(numbered_windows(3), *arguments)
