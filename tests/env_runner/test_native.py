"""Every family: a native batch is a loop over its environments, bit for bit; saved, restored, seeded."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from ssmrl.env_runner import Environment, changing, family_names, task_family

pytest.importorskip("mujoco.batch")

MODES = [mode.value for mode in AutoresetMode]
FAMILIES = family_names()
ROBOT_FAMILIES = [n for n in FAMILIES if n.split("-")[0] in ("halfcheetah", "hopper", "walker2d", "ant", "humanoid")]


def actions_of(environment, seed, steps):
    environment.action_space.seed(seed)
    return [copy.deepcopy(environment.action_space.sample()) for _ in range(steps)]


def run(environment, actions, infos=None):
    """All that a run returns, with ended rows reset by hand where nothing else does."""
    infos = [] if infos is None else infos
    seen: list[tuple[Any, ...]] = []
    for action in actions:
        observation, reward, terminated, truncated, info = environment.step(action)
        seen.append((observation, reward, terminated, truncated))
        infos.append(info)
        if "final_obs" in info:
            rows = np.flatnonzero(info["_final_obs"])
            seen[-1] += (np.stack([info["final_obs"][row] for row in rows]),)
        ended = terminated | truncated
        if environment.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            seen[-1] += (environment.reset(options={"reset_mask": ended})[0],)
    return seen


def require_same(first, second):
    assert len(first) == len(second)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert len(a) == len(b), step
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=f"step {step}")


def require_same_info(first, second, at=""):
    """Equal, but for the last bit of a distance: Gymnasium's norm of one vector is a dot product."""
    assert first.keys() == second.keys(), at
    for name, value in first.items():
        if isinstance(value, dict):
            require_same_info(value, second[name], f"{at}.{name}")
        elif name == "distance_from_origin":
            np.testing.assert_allclose(value, second[name], rtol=1e-15, err_msg=at)
        elif name != "final_obs":
            np.testing.assert_array_equal(value, second[name], err_msg=f"{at}.{name}")


def pair(name, rows, *, seed=0, **kwargs):
    family = task_family(name)
    tasks = family.sample(rows, seed=seed)
    made = [
        Environment(family, tasks=tasks, seed=seed, vectorization_mode=mode, out_of_bounds="clip", **kwargs)
        for mode in ("native", "sync")
    ]
    assert [environment.is_native for environment in made] == [True, False]
    return made


def require_native_equals_loop(name, rows, steps, seed, **kwargs):
    native, loop = pair(name, rows, seed=seed, **kwargs)
    (a, info), (b, loop_info) = native.reset(), loop.reset()
    require_same([(a,)], [(b,)])
    assert info.keys() >= {"task", "_task"}
    require_same_info(info, loop_info)
    actions = actions_of(native, seed, steps)
    infos: list[Any] = []
    loop_infos: list[Any] = []
    seen = run(native, actions, infos)
    require_same(seen, run(loop, actions, loop_infos))
    for step, (a, b) in enumerate(zip(infos, loop_infos, strict=True)):
        require_same_info(a, b, f"step {step}")
    assert any((step[2] | step[3]).any() for step in seen), "no episode ended"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_native_batch_is_a_loop_bit_for_bit(name, mode):
    require_native_equals_loop(name, 4, 17, 0, max_episode_steps=7, autoreset_mode=mode)


def test_64_rows_of_hundreds_of_steps_are_a_loop_bit_for_bit():
    require_native_equals_loop("walker2d-rand-params", 64, 250, 1)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.split("-")[-1] in ("vel", "dir", "angle", "goal")])
def test_an_id_without_settings_is_the_familys_environment(name):
    family = task_family(name)
    (task,) = family.sample(1, seed=0)
    ours = family.make(task)
    by_id: Any = gymnasium.make(family.env_id, **task)
    assert by_id.spec.max_episode_steps == family.horizon
    ours.reset(seed=0)
    by_id.reset(seed=0)
    action = ours.action_space.sample()
    for a, b in zip(ours.step(action)[:4], by_id.step(action)[:4], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ROBOT_FAMILIES)
def test_64_rows_of_1000_steps_are_a_loop_bit_for_bit(name, seed):
    require_native_equals_loop(name, 64, 1000, seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["native", "sync"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith(("hopper", "walker2d"))])
def test_restoring_in_another_environment_goes_on_bit_for_bit(name, kind, mode):
    family = changing(task_family(name), [2, 9])
    settings = {"max_episode_steps": 6, "vectorization_mode": kind, "out_of_bounds": "clip", "autoreset_mode": mode}
    environment = Environment(family, tasks=family.sample(3, seed=0), seed=0, **settings)
    environment.reset()
    actions = actions_of(environment, 0, 20)
    run(environment, actions[:8])
    state = environment.save()
    expected = run(environment, actions[8:])
    other = Environment(family, tasks=family.sample(3, seed=1), seed=5, **settings)
    other.reset()
    run(other, actions[:3])
    untouched = Environment(family, tasks=family.sample(3, seed=2), **settings)
    for restored in (environment, other, untouched):
        restored.restore(state)
        assert restored.tasks == environment.tasks
        require_same(run(restored, actions[8:]), expected)


@pytest.mark.parametrize("name", ["halfcheetah-vel", "ant-rand-params", "humanoid-dir", "hopper-mass"])
def test_a_row_depends_on_neither_the_others_nor_their_number(name):
    family = task_family(name)
    tasks = family.sample(6, seed=0)
    wide = Environment(family, tasks=tasks, seed=3, max_episode_steps=5)
    narrow = Environment(family, tasks=tasks[:2], seed=3, max_episode_steps=5)
    require_same([(wide.reset()[0][:2],)], [(narrow.reset()[0],)])
    actions = actions_of(wide, 0, 12)
    seen = [tuple(x[:2] for x in step) for step in run(wide, actions)]
    require_same(seen, run(narrow, [action[:2] for action in actions]))


@pytest.mark.filterwarnings("ignore:.*Box observation space m.*infinity")  # of every robot of Gymnasium's
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # of its pendulum
@pytest.mark.parametrize("name", FAMILIES)
def test_every_environment_passes_gymnasiums_check(name):
    family = task_family(name)
    env = family.make(family.sample(1, seed=0)[0])
    check_env(env.unwrapped, skip_render_check=True)
    assert "task" in env.reset(seed=0)[1]
    env.close()


def test_more_threads_give_the_same_numbers():
    family = task_family("walker2d-friction")
    tasks = family.sample(7, seed=0)
    runs = []
    for threads in (1, 2, 5):
        environment = Environment(family, tasks=tasks, seed=0, num_threads=threads)
        environment.reset()
        runs.append(run(environment, actions_of(environment, 0, 30)))
    require_same(runs[0], runs[1])
    require_same(runs[0], runs[2])
