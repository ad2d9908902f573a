"""The cart-pole that is to be swung up: hand-computed rewards, an integration by SciPy, and what its tasks are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import cartpole_swingup, task_family
from ssmrl.env_runner.tasks.swingup import SWINGUP_PHYSICS, CartPoleSwingUp


def step(motion: Any, u: float, **physics: float) -> tuple[Any, float]:
    """The motion and the reward after a step of one row."""
    dynamics = CartPoleSwingUp()
    values = {name: np.array([value]) for name, value in {**SWINGUP_PHYSICS, **physics}.items()}
    after = dynamics.step({"motion": np.array([motion])}, np.array([[u]], np.float32), dynamics.derive(values))
    return after.state["motion"][0], float(after.reward[0])


def accelerations(motion: Any, force: float, g: float, cart: float, pole: float, half: float) -> Any:
    """The accelerations x'' and θ'' of Lagrange's equations for a cart and a uniform rod, as a linear system."""
    _, _, angle, omega = motion
    cosine, sine = np.cos(angle), np.sin(angle)
    mass = [[cart + pole, pole * half * cosine], [pole * half * cosine, 4 / 3 * pole * half**2]]
    return np.linalg.solve(mass, [force + pole * half * omega**2 * sine, pole * g * half * sine])


def test_it_moves_as_lagrange_s_equations_say():
    """A step of 0.05 s in five parts is first order: its error is that of a step of 0.01 s."""
    physics = {"gravity": 7.0, "masscart": 0.8, "masspole": 0.3, "length": 0.6}
    motion, u = np.array([0.3, -0.5, 2.0, 1.5]), 0.7

    def derivative(_: float, m: Any) -> Any:
        x, turn = accelerations(m, 10 * u, 7.0, 0.8, 0.3, 0.6)
        return [m[1], x, m[3], turn]

    exact = solve_ivp(derivative, (0, 0.05), motion, rtol=1e-10, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(step(motion, u, **physics)[0], exact, atol=0.02)
    moved = exact - motion
    assert np.linalg.norm(step(motion, u, **physics)[0] - exact) < 0.05 * np.linalg.norm(moved)


def test_energy_is_kept_without_a_force():
    motion = np.array([0.0, 0.5, 2.5, 0.0])
    cart, pole, half, g = (SWINGUP_PHYSICS[name] for name in ("masscart", "masspole", "length", "gravity"))

    def energy(m: Any) -> float:
        _, v, angle, omega = m
        kinetic = (cart + pole) * v**2 / 2 + 2 / 3 * pole * half**2 * omega**2 + pole * half * omega * v * np.cos(angle)
        return float(kinetic + pole * g * half * np.cos(angle))

    first = energy(motion)
    for _ in range(200):
        motion, _ = step(motion, 0.0)
        assert energy(motion) == pytest.approx(first, abs=0.02)


def test_the_reward_is_that_of_the_control_suite():
    # At rest and upright: 1, and 4/5 at full force, which is not at rest after it.
    assert step([0.0, 0.0, 0.0, 0.0], 0.0)[1] == pytest.approx(1.0)
    assert step([0.0, 0.0, np.pi, 0.0], 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert step([2.0, 0.0, 0.0, 0.0], 0.0)[1] == pytest.approx(0.55)  # (1 + 0.1) / 2 at the margin
    motion, reward = step([0.1, 0.2, 0.3, 0.4], 0.6)
    x, _, angle, omega = motion
    expected = (1 + np.cos(angle)) / 2 * (1 + 0.1 ** (x / 2) ** 2) / 2 * (1 + 0.1 ** (omega / 5) ** 2) / 2
    assert reward == pytest.approx(expected * (4 + 1 - np.float64(np.float32(0.6)) ** 2) / 5)


def test_it_hangs_at_the_start_and_an_action_out_of_bounds_is_clipped():
    environment = Environment(
        "cartpole-swingup", tasks=cartpole_swingup().sample(50, seed=0), seed=0, out_of_bounds="clip"
    )
    observation, _ = environment.reset()
    np.testing.assert_allclose(observation, np.tile([0, 0, -1, 0, 0], (50, 1)), atol=0.06)
    assert 0.005 < observation[:, 0].std() < 0.02
    motion = [0.0, 0.0, 2.0, 0.0]
    np.testing.assert_array_equal(step(motion, 5.0)[0], step(motion, 1.0)[0])


def test_a_heavier_cart_moves_less_and_a_task_says_so():
    light, heavy = (step([0.0, 0.0, np.pi, 0.0], 1.0, masscart=m)[0][0] for m in (1.0, 3.0))
    assert 0 < heavy < light / 2
    tasks = task_family("cartpole-swingup", spread=1.0).sample(200, seed=0)
    for name, nominal in SWINGUP_PHYSICS.items():
        values = np.array([task[name] for task in tasks]) / nominal
        assert values.min() > 1 / 1.5
        assert values.max() < 1.5
        assert values.std() > 0.1
    assert cartpole_swingup(spread=0.0).sample(1, seed=3) == [SWINGUP_PHYSICS]


@pytest.mark.parametrize(
    ("given", "match"), [({"base": 0.0}, "`base` must be positive"), ({"spread": -1.0}, "`spread`")]
)
def test_what_no_distribution_has_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        cartpole_swingup(**given)
