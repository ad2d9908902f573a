from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordVideo, RenderCollection

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.one_row import Drawn, OneRowEnv
from ssmrl.env_runner.simulation import Transition


class Walk:
    """A walk on 0, 1, ..., 9 whose step is the task's; the start is drawn, and 9 ends it."""

    def __init__(self, tasks: Any) -> None:
        self.single_observation_space: Any = Box(0.0, 9.0, (1,), np.float32)
        self.single_action_space: Any = Discrete(2)
        self.metadata: dict[str, Any] = {"render_fps": 10}
        self.set_tasks(tasks)
        self.place = np.zeros(len(tasks))

    def set_tasks(self, tasks: Any) -> None:
        self.tasks = list(tasks)

    def begin(self, rows: Any, generators: Any, options: Any) -> dict[str, Any]:
        for row in rows:
            self.place[row] = options.get("place", generators[row].integers(4))
        return {"task": {"step": np.array([self.tasks[row]["step"] for row in rows])}, "place": self.place[rows].copy()}

    def advance(self, actions: Any, rows: Any) -> Transition:
        moved = np.minimum(self.place + actions * [task["step"] for task in self.tasks], 9)
        self.place = moved if rows is None else np.where(rows, moved, self.place)
        return Transition(-self.place, self.place >= 9, {})

    def observe(self) -> Any:
        return self.place[:, None].astype(np.float32)

    def save(self) -> dict[str, Any]:
        return {"place": self.place.copy()}

    def restore(self, state: Any) -> None:
        self.place = np.array(state["place"])


class DrawnWalk(Walk):
    def frame(self, row: int) -> Any:
        image = np.zeros((8, 10, 3), np.uint8)
        image[:, int(self.place[row])] = 255
        return image


def make(**kwargs: Any) -> OneRowEnv:
    return OneRowEnv(DrawnWalk([{"step": 1.0}]), **kwargs)


@pytest.mark.filterwarnings("ignore:.*not having a spec")  # it has none outside Gymnasium's registry
@pytest.mark.parametrize("mode", [None, "rgb_array"])
def test_it_passes_gymnasiums_check_without_a_warning(mode):
    check_env(make(render_mode=mode))


def test_reset_and_step_are_row_0_of_the_simulation():
    env = make()
    observation, info = env.reset(seed=3)
    start = np.random.default_rng(np.random.SeedSequence(3)).integers(4)  # as Gymnasium seeds
    np.testing.assert_array_equal(observation, np.array([start], np.float32))
    assert info == {"task": {"step": 1.0}, "place": start}
    assert [type(x) for x in env.step(1)] == [np.ndarray, float, bool, bool, dict]
    observation, *rest = env.step(1)
    assert observation.tolist() == [start + 2]
    assert rest == [-start - 2, False, False, {}]


def test_options_reach_the_simulation_and_the_last_step_terminates():
    env = make()
    env.reset(seed=0, options={"place": 8})
    assert env.step(1)[1:3] == (-9.0, True)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_loop_of_them_is_a_batch(mode):
    tasks = [{"step": step} for step in (1.0, 2.0, 4.0)]
    batch = BatchedEnv(Walk(tasks), max_episode_steps=None, autoreset_mode=mode)
    loop = SyncVectorEnv([partial(OneRowEnv, Walk([task])) for task in tasks], autoreset_mode=mode)
    np.testing.assert_array_equal(batch.reset(seed=1)[0], loop.reset(seed=1)[0])
    ended = 0
    for _ in range(25):
        expected, got = loop.step(np.ones(3, np.int64)), batch.step(np.ones(3, np.int64))
        for a, b in zip(expected[:4], got[:4], strict=True):
            np.testing.assert_array_equal(a, b)
        ended += expected[2].sum()
    assert ended > 3


def test_a_restored_environment_goes_on_bit_for_bit():
    env = make()
    env.reset(seed=0)
    env.step(1)
    env.set_task({"step": 2.0})
    state = env.save()

    def future(env: OneRowEnv) -> list[Any]:
        seen = [float(env.step(1)[0][0]) for _ in range(3)]
        return seen + [float(env.reset()[0][0]) for _ in range(20)]

    expected = future(env)
    other = make()
    other.reset(seed=5)
    for restored in (env, other):
        restored.restore(state)
        assert future(restored) == expected


def test_a_given_task_holds_from_the_next_step_on():
    env = make()
    env.reset(options={"place": 0})
    env.set_task({"step": 3.0})
    assert env.step(1)[0].tolist() == [3.0]


def test_frames_are_those_of_the_simulation():
    env = make(render_mode="rgb_array")
    env.reset(options={"place": 4})
    frame = env.render()
    assert frame.dtype == np.uint8
    assert np.flatnonzero(frame[0, :, 0]).tolist() == [4]
    assert make().render() is None
    recorded: Any = RenderCollection(env)
    recorded.reset()
    recorded.step(1)
    assert len(recorded.render()) == 2


def test_videos_can_be_recorded(tmp_path):
    pytest.importorskip("moviepy")
    env = RecordVideo(make(render_mode="rgb_array"), str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    env.reset(seed=0)
    for _ in range(3):
        env.step(1)
    env.close()
    assert len([*(tmp_path / "videos").glob("*.mp4")]) == 1


def test_a_simulation_that_is_not_drawn_has_no_render_modes():
    env = OneRowEnv(Walk([{"step": 1.0}]))
    assert not isinstance(env.simulation, Drawn)
    assert env.metadata["render_modes"] == []
    assert make().metadata == {"render_fps": 10, "render_modes": ["rgb_array"]}


@pytest.mark.parametrize(
    ("simulation", "mode", "message"),
    [
        (Walk([{"step": 1.0}] * 2), None, "`simulation` must have one row; got 2"),
        (Walk([{"step": 1.0}]), "rgb_array", r"`render_mode` must be None or one of \[\]; got 'rgb_array'"),
        (DrawnWalk([{"step": 1.0}]), "human", r"`render_mode` must be None or one of \['rgb_array'\]; got 'human'"),
    ],
)
def test_bad_arguments_are_refused(simulation, mode, message):
    with pytest.raises(ValueError, match=message):
        OneRowEnv(simulation, render_mode=mode)
