from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from ssmrl.env_runner import Environment, Trajectory, rollout, to_minari

DESCRIBED: dict[str, Any] = {
    "algorithm_name": "by heart",
    "author": "nobody",
    "author_email": "nobody@example.org",
    "code_permalink": "https://example.org",
    "description": "counted",
    "eval_env": "CartPole-v1",
}


def counted(counting: Any, num_steps: int, mode: str = "NextStep") -> tuple[Environment, Trajectory]:
    """Row 0 terminates after 2 steps, row 1 is truncated after 3."""
    environment = Environment([counting(2), counting(3, "truncated")], autoreset_mode=mode)

    def policy(observation, hidden_state, reset):
        return torch.tensor([1, 2]), None

    return environment, rollout(policy, environment, num_steps)[0]


@pytest.fixture
def minari(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


@pytest.mark.filterwarnings("ignore:env_spec is None:UserWarning")
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_data_set_holds_the_episodes_and_is_found_by_its_name(counting, minari, mode):
    environment, trajectory = counted(counting, 4, mode)
    spaces = environment.single_observation_space, environment.single_action_space
    tasks = [{"g": 9.0, "limb": np.array([1, 2])}, {"g": 10.0, "limb": np.array([3, 4])}]
    to_minari(trajectory, "test/counting-v0", *spaces, tasks=tasks, **DESCRIBED)
    dataset = minari.load_dataset("test/counting-v0")
    assert dataset.observation_space == spaces[0]
    assert dataset.action_space == spaces[1]
    assert dataset.storage.metadata["author"] == {"nobody"}
    cut = 1 if mode == "NextStep" else 2
    lengths = [2, cut, 3] + [1] * (mode != "NextStep")
    assert [len(episode.rewards) for episode in dataset] == lengths
    assert dataset.total_steps == sum(lengths)

    first, second, third = [*dataset][:3]
    assert first.observations.tolist() == [[0, 0], [0, 1], [0, 2]]
    assert first.observations.dtype == np.float64
    assert first.actions.tolist() == [1, 1]
    assert first.rewards.tolist() == [11, 21]
    assert first.terminations.tolist() == [False, True]
    assert first.truncations.tolist() == [False, False]
    assert first.infos["row"].tolist() == [0, 0, 0]
    assert first.infos["task"]["g"].tolist() == [9, 9, 9]
    assert second.observations.tolist() == [[1, 0], [1, 1], [1, 2]][: cut + 1]
    assert second.terminations[-1] == (mode != "NextStep")
    assert second.truncations[-1] == (mode == "NextStep")  # The rollout stopped there.
    assert third.observations[-1].tolist() == [0, 3]
    assert third.terminations.tolist() == [False] * 3
    assert third.truncations.tolist() == [False, False, True]
    assert third.infos["row"].tolist() == [1] * 4
    assert third.infos["task"]["limb"].tolist() == [[3, 4]] * 4
    assert not trajectory.truncated[0].any()  # What was given is left as it was.


def test_an_environment_that_is_named_comes_back_with_the_data(minari):
    environment = Environment("CartPole-v1", 2, seed=0)

    def policy(observation, hidden_state, reset):
        return torch.ones(2, dtype=torch.int64), None

    trajectory, _ = rollout(policy, environment, 30)
    spaces = environment.single_observation_space, environment.single_action_space
    dataset = to_minari(trajectory, "cartpole-v0", *spaces, env="CartPole-v1", **DESCRIBED)
    assert dataset.recover_environment().spec.id == "CartPole-v1"
    episode = dataset[0]
    assert episode.observations.dtype == np.float32
    assert "task" not in episode.infos
    np.testing.assert_array_equal(episode.observations[:-1], trajectory.observation[0, : len(episode.rewards)])
    assert all(observation in dataset.observation_space for observation in episode.observations)
    assert episode.terminations[-1]
    with pytest.raises(ValueError, match="already"):
        to_minari(trajectory, "cartpole-v0", *spaces, env="CartPole-v1", **DESCRIBED)


def test_tasks_are_one_for_each_row(counting, minari):
    environment, trajectory = counted(counting, 4)
    with pytest.raises(ValueError, match="one mapping for each of the 2 rows; got 1"):
        to_minari(trajectory, "a-v0", Box(-1, 1, (2,)), Discrete(3), tasks=[{}])
    with pytest.raises(TypeError, match="`action_space` must be a Box or a Discrete space"):
        to_minari(trajectory, "a-v0", environment.single_observation_space, None)  # type: ignore[arg-type]


def test_without_minari_it_says_what_to_install(counting, monkeypatch):
    environment, trajectory = counted(counting, 4)
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'`to_minari` needs Minari: pip install "ssmrl\[minari\]"'):
        to_minari(trajectory, "a-v0", environment.single_observation_space, environment.single_action_space)
