"""The physics that planners are given as the truth are those of the environments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmrl.env_runner import make_with_physics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def control_systems(import_benchmark) -> Any:
    return import_benchmark("control_systems")


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_of_control", ROOT / "examples" / "adaptive_control.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_of_control"] = module
    spec.loader.exec_module(module)
    return module


def assert_steps_agree(make, true_step, physics, seed):
    """Observations and rewards of an environment, and of a planner's `step` from the same observations."""
    environment = make(physics)
    environment.action_space.seed(seed)
    params = {name: torch.tensor(value, dtype=torch.float64) for name, value in physics.items()}
    observation, _ = environment.reset(seed=seed)
    for _ in range(40):
        action = environment.action_space.sample()
        after, reward, _, _, _ = environment.step(action)
        o, a = (torch.as_tensor(value, dtype=torch.float64)[None] for value in (observation, action))
        price, predicted, _ = true_step(params, (), o, a)
        torch.testing.assert_close(predicted[0], torch.as_tensor(after, dtype=torch.float64), rtol=1e-4, atol=2e-5)
        assert -price.item() == pytest.approx(float(reward), rel=1e-4, abs=2e-5)
        observation = after
    environment.close()


@pytest.mark.parametrize("name", ["pendulum", "cartpole"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_true_physics_are_the_environments(control_systems, name, seed):
    system = control_systems.SYSTEMS[name]
    make = {"pendulum": partial(make_with_physics, "Pendulum-v1"), "cartpole": control_systems.make_swingup}[name]
    assert_steps_agree(make, system.true_step, system.task(seed, 0, "test"), seed)


@pytest.mark.parametrize("name", ["pendulum", "cartpole"])
def test_what_is_possible_is_left_as_it_is_and_the_rest_brought_there(control_systems, name):
    system = control_systems.SYSTEMS[name]
    with system.environment([system.task(0, 0, "train")], [None], 10, 0) as environment:
        observation = torch.as_tensor(environment.reset(seed=0)[0], dtype=torch.float64)
    torch.testing.assert_close(system.project(observation), observation, atol=1e-6, rtol=0)
    angle = [0, 1] if name == "pendulum" else [2, 3]
    off = observation.clone()
    off[:, angle] *= 3.0
    torch.testing.assert_close(system.project(off), observation, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_examples_equations_are_gymnasiums(example, seed):
    physics = example.draw_physics(seed, 0, (2.0, 3.0))
    assert_steps_agree(partial(make_with_physics, "Pendulum-v1"), example.true_step, physics, seed)
    factors = [
        abs(torch.log(torch.tensor(physics[n] / v)) / torch.log(torch.tensor(1.5))) for n, v in example.NOMINAL.items()
    ]
    assert all(2.0 <= factor <= 3.0 for factor in factors)


@pytest.mark.parametrize(
    "name", ["pendulum", "cartpole", "cheetah_joint", "cheetah_gravity", "cheetah_mass", "ant_leg"]
)
def test_physics_of_the_test_are_outside_of_the_training(control_systems, name):
    system = control_systems.SYSTEMS[name]
    train, test = ([system.task(0, n, split) for n in range(50)] for split in ("train", "test"))
    for key in train[0]:
        inside, outside = ([task[key] for task in tasks] for tasks in (train, test))
        assert all(not min(inside) <= value <= max(inside) for value in outside)


@pytest.mark.parametrize(("name", "velocity"), [("cheetah_joint", 8), ("ant_leg", 13)])
def test_the_cost_of_a_robot_is_its_control_and_its_velocity(control_systems, name, velocity):
    pytest.importorskip("mujoco")
    system = control_systems.SYSTEMS[name]
    task = system.task(0, 0, "train")
    with system.environment([task] * 2, [None] * 2, 20, 0) as environment:
        observation, _ = environment.reset(seed=0)
        environment.action_space.seed(0)
        for _ in range(5):
            action = environment.action_space.sample()
            action[:, list(task["disabled"]) if name == "ant_leg" else task["disabled"]] = 0.0
            after, _, _, _, info = environment.step(action)
            o, a, n = (torch.as_tensor(value, dtype=torch.float64) for value in (observation, action, after))
            expected = -torch.as_tensor(info["reward_ctrl"], dtype=torch.float64) - n[:, velocity]
            if name == "ant_leg":
                expected -= torch.sigmoid(20 * (n[:, 0] - 0.2)) * torch.sigmoid(20 * (1.0 - n[:, 0]))
            torch.testing.assert_close(system.cost(o, a, n), expected, rtol=1e-5, atol=1e-5)
            # It is forwards that is paid for: where the robot got to is what it is about to run, on average.
            assert abs(info["x_velocity"] - after[:, velocity]).max() < 3.0
            observation = after
    away = n.clone()
    away[:, 0] = 41.0
    assert (system.cost(o, a, system.project(away)) > 90.0).all()
