from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from ssmrl.env_runner import (
    Environment,
    RunningMoments,
    Trajectory,
    by_task,
    init_moments,
    init_reward_scale,
    normalize,
    random_policy,
    rollout,
    scale_rewards,
    update_moments,
)


def rewards(reward: list[list[float]], *, terminated: str = "", truncated: str = "", invalid: str = "") -> Trajectory:
    """A trajectory of one row with these rewards; the strings mark its steps with x."""
    values = torch.tensor(reward, dtype=torch.float64)

    def mask(marks: str) -> Tensor:
        return torch.tensor([[c == "x" for c in (marks or "." * values.shape[1])]]).expand(values.shape)

    return Trajectory(
        values, values, values, values, mask(terminated), mask(truncated), mask("").clone(), ~mask(invalid)
    )


def random_trajectory(num_rows: int, num_steps: int, seed: int) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)

    def mask(rate: float) -> Tensor:
        return torch.rand(num_rows, num_steps, generator=generator) < rate

    values = torch.randn(num_rows, num_steps, dtype=torch.float64, generator=generator)
    valid = ~mask(0.2)
    return Trajectory(values, values, values, values, mask(0.2), mask(0.2), mask(0.1) & valid, valid)


def assert_moments_equal(a: RunningMoments, b: RunningMoments, rtol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, rtol=rtol, atol=0)


# Moments


def test_moments_by_hand():
    moments = update_moments(init_moments(total=0), torch.tensor([1.0, 3.0]))
    assert [leaf.item() for leaf in moments] == [2, 2, 1]
    moments = update_moments(moments, torch.tensor([[5.0, 700.0]]), torch.tensor([[True, False]]))
    assert moments.total == 3
    assert moments.mean == 3
    assert_close(moments.var, torch.tensor(8 / 3, dtype=torch.float64))
    prior = update_moments(init_moments((2,), total=2.0), torch.tensor([[3.0, 0.0]]))
    assert prior.mean.tolist() == [1, 0]
    assert_close(prior.var, torch.tensor([(2 + 9 * 2 / 3) / 3, 2 / 3], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.floats(-1e3, 1e3), st.integers(0, 2**20))
def test_batches_have_the_moments_of_all_that_is_not_masked(sizes, offset, seed):
    """Against NumPy over everything at once; what is masked is NaN, and batches may be empty."""
    generator = torch.Generator().manual_seed(seed)
    moments, kept = init_moments((2,), total=0), []
    for size in sizes:
        x = torch.randn(size, 3, 2, dtype=torch.float64, generator=generator) + offset
        mask = torch.rand(size, 3, generator=generator) < 0.5
        x[~mask] = math.nan
        kept.append(x[mask])
        moments = update_moments(moments, x, mask)
    data = torch.cat(kept).numpy()
    assert moments.total == len(data)
    if len(data):
        np.testing.assert_allclose(moments.mean, data.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.var, data.var(axis=0), rtol=1e-9, atol=1e-9)
    else:
        assert_moments_equal(moments, init_moments((2,), total=0))


def test_moments_are_float64_where_float32_would_lose_the_variance():
    x = (torch.tensor([1.0, 2.0, 3.0]) + 1e6).repeat(1000)
    moments = init_moments(total=0)
    for piece in x.split(7):
        moments = update_moments(moments, piece)
    assert moments.mean.dtype == moments.var.dtype == torch.float64
    assert_close(moments.var.item(), 2 / 3, rtol=1e-6, atol=0)


def test_vmap_keeps_tasks_apart():
    """Moments per task equal a loop; a change in one task reaches no other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 2, generator=generator)
    mask = torch.rand(3, 4, 5, generator=generator) < 0.5
    start = RunningMoments(*(leaf.expand(3, *leaf.shape) for leaf in init_moments((2,))))
    moments = vmap(update_moments)(start, x, mask)
    for task in range(3):
        alone = update_moments(init_moments((2,)), x[task], mask[task])
        assert_moments_equal(RunningMoments(*(leaf[task] for leaf in moments)), alone)
        assert_close(vmap(normalize)(moments, x)[task], normalize(alone, x[task]))
    x[1] = math.nan
    after = vmap(update_moments)(start, x, mask)
    for a, b in zip(after, moments, strict=True):
        assert_close(a[[0, 2]], b[[0, 2]], rtol=0, atol=0)


def test_normalize_by_hand():
    moments = RunningMoments(torch.tensor(1.0), torch.tensor([1.0, 0.0]).double(), torch.tensor([4.0, 0.0]).double())
    x = torch.tensor([[5.0, 0.0], [1.0, 2.0]])
    assert normalize(moments, x).tolist() == [[2, 0], [0, 10]]
    assert normalize(moments, x, clip=1.0).tolist() == [[1, 0], [0, 1]]
    assert_close(normalize(moments, x, epsilon=1.0, clip=math.inf)[1, 1].item(), 2.0)
    assert normalize(moments, x).dtype == torch.float32
    assert normalize(moments, x.double()).dtype == torch.float64
    assert normalize(moments, x.long()).tolist() == [[2, 0], [0, 10]]


def test_observations_are_normalised_as_gymnasium_does_it():
    """Gymnasium's wrapper takes in and normalises every batch of observations, step by step."""
    environment = Environment("Pendulum-v1", 3, max_episode_steps=6)
    policy = random_policy(environment.single_action_space, 0)
    raw, _ = rollout(policy, environment, 25, seed=1, dtype=torch.float64)
    wrapped = NormalizeObservation(Environment("Pendulum-v1", 3, max_episode_steps=6))
    theirs, _ = rollout(policy, wrapped, 25, seed=1)
    moments = init_moments((3,))
    for t in range(25):
        moments = update_moments(moments, raw.observation[:, t])
        mine = normalize(moments, raw.observation[:, t], clip=math.inf)
        assert_close(mine.float(), theirs.observation[:, t], rtol=1e-4, atol=1e-4)


# Rewards


def test_rewards_by_hand():
    """γ = 1/2; the returns are 2, 1 + 2; after the end 4; a masked step; 6 + 4 / 2."""
    trajectory = rewards([[2.0, 2.0, 4.0, 99.0, 6.0]], terminated=".x.x.", invalid="...x.")
    scaled, state = scale_rewards(init_reward_scale(1, total=0), trajectory, discount=0.5, epsilon=1e-2, clip=9.0)
    returns = np.array([2.0, 3.0, 4.0, 8.0])
    std = [math.sqrt(returns[: n + 1].var() + 1e-2) for n in range(4)]
    expected = [[9.0, 2 / std[1], 4 / std[2], 0.0, 6 / std[3]]]
    assert_close(scaled, torch.tensor(expected, dtype=torch.float64))
    assert state.discounted_return.tolist() == [8]
    assert state.moments.total == 4


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_either_end_ends_the_return_after_its_own_reward(end):
    trajectory = rewards([[1.0, 2.0, 3.0]], **{end: ".x."})
    _, state = scale_rewards(init_reward_scale(1, total=0), trajectory, discount=0.5)
    returns = np.array([1.0, 2.5, 3.0])
    assert_close(state.moments.mean.item(), returns.mean())
    assert_close(state.moments.var.item(), returns.var())


def test_a_rollout_that_began_anew_begins_its_return_anew():
    _, state = scale_rewards(init_reward_scale(1), rewards([[1.0, 2.0]]))
    assert state.discounted_return.item() == 2.99
    begun = rewards([[5.0]])
    begun.reset[:, 0] = True
    assert scale_rewards(state, begun)[1].discounted_return.item() == 5
    assert scale_rewards(state, rewards([[5.0]]))[1].discounted_return.item() == 5 + 0.99 * 2.99


@pytest.mark.skipif(gymnasium.__version__.startswith("1.1."), reason="its NormalizeReward does something else")
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rewards_of_truncated_episodes_are_scaled_as_gymnasium_does_it(mode):
    """Gymnasium's wrapper with SAME_STEP is the reference for all three modes."""
    wrapped = NormalizeReward(
        Environment("Pendulum-v1", 3, max_episode_steps=6, autoreset_mode=AutoresetMode.SAME_STEP), gamma=0.9
    )

    def policy(observation, hidden_state, reset):
        return observation[:, :1], None

    theirs, _ = rollout(policy, wrapped, 20, seed=1, dtype=torch.float64)
    environment = Environment("Pendulum-v1", 3, max_episode_steps=6, autoreset_mode=mode)
    mine, _ = rollout(policy, environment, 20, seed=1, dtype=torch.float64)
    scaled, _ = scale_rewards(init_reward_scale(3), mine, discount=0.9, clip=math.inf)
    for row, valid in enumerate(mine.valid):
        count = int(valid.sum())
        assert_close(scaled[row][valid], theirs.reward[row, :count], rtol=1e-6, atol=1e-6)
        assert not scaled[row][~valid].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 10), st.integers(0, 2**20), st.data())
def test_two_batches_of_rewards_are_one(num_rows, num_steps, seed, data):
    whole = random_trajectory(num_rows, num_steps, seed)
    split = data.draw(st.integers(1, num_steps - 1))
    expected, end = scale_rewards(init_reward_scale(num_rows), whole)
    first, state = scale_rewards(init_reward_scale(num_rows), Trajectory(*(leaf[:, :split] for leaf in whole)))
    second, state = scale_rewards(state, Trajectory(*(leaf[:, split:] for leaf in whole)))
    assert_close(torch.cat([first, second], dim=1), expected, rtol=0, atol=0)
    assert_moments_equal(state.moments, end.moments, rtol=0)
    assert_close(state.discounted_return, end.discounted_return, rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 2**20))
def test_rows_share_moments_but_not_returns_and_tasks_share_nothing(num_tasks, num_rows, num_steps, seed):
    """Ends, masks and NaN behind a mask in other rows do not touch a row's return; another task touches nothing."""
    trajectory = random_trajectory(num_tasks * num_rows, num_steps, seed)
    other = random_trajectory(num_tasks * num_rows, num_steps, seed + 1)
    mixed = Trajectory(*(leaf.clone() for leaf in other))
    for a, b in zip(mixed, trajectory, strict=True):
        a[:num_rows] = b[:num_rows]
    mixed.reward[~mixed.valid] = math.nan
    start = init_reward_scale(len(trajectory.valid))
    _, state = scale_rewards(start, trajectory)
    _, beside = scale_rewards(start, mixed)
    assert_close(state.discounted_return[:num_rows], beside.discounted_return[:num_rows], rtol=0, atol=0)
    assert beside.moments.mean.isfinite()

    zero = init_reward_scale(num_rows)
    tasks = torch.utils._pytree.tree_map(lambda leaf: leaf.expand(num_tasks, *leaf.shape), zero)
    scaled, _ = vmap(scale_rewards)(tasks, by_task(mixed, num_tasks))
    alone, _ = scale_rewards(zero, Trajectory(*(leaf[:num_rows] for leaf in trajectory)))
    assert_close(scaled[0], alone)


def test_the_scaled_rewards_have_the_dtype_of_the_rewards():
    trajectory, _ = rollout(random_policy(gymnasium.make("CartPole-v1").action_space, 0), Environment("CartPole-v1"), 4)
    scaled, state = scale_rewards(init_reward_scale(1), trajectory)
    assert scaled.dtype == torch.float32
    assert state.discounted_return.dtype == torch.float64


# Errors


def test_shapes_that_do_not_fit_are_refused():
    moments = init_moments((2,))
    with pytest.raises(ValueError, match=r"`x` must have the shape \(\.\.\., \*\(2,\)\); got \(4, 3\)"):
        update_moments(moments, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"`mask` must have the shape \(4,\) of `x` without D; got \(4, 2\)"):
        update_moments(moments, torch.zeros(4, 2), torch.ones(4, 2).bool())
    with pytest.raises(ValueError, match=r"got \(\)"):
        update_moments(moments, torch.zeros(()))
