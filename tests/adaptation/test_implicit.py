"""Implicit differentiation against closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchopt
from torch.func import grad, jacrev, vmap

from ssmrl.adaptation import adapt_implicitly, conjugate_gradient, neumann_series

f64 = partial(torch.tensor, dtype=torch.float64)
SGD = torchopt.sgd(0.02)


def quadratic(dim=4, seed=0):
    """½ φᵀAφ - bᵀφ with A positive definite; the proximal minimum is (A + λI)⁻¹ (b + λθ)."""
    torch.manual_seed(seed)
    root = torch.randn(dim, dim, dtype=torch.float64)
    a = root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)

    def loss(params, b):
        return 0.5 * params["x"] @ a @ params["x"] - b @ params["x"]

    theta, b = torch.randn(2, dim, dtype=torch.float64)
    return loss, a, {"x": theta}, b


def solve(loss, theta, b, strength=2.0, solver=None, steps=2000):
    solver = solver or conjugate_gradient(4)
    return adapt_implicitly(loss, theta, b, optimizer=SGD, num_steps=steps, strength=strength, solver=solver)["x"]


def test_the_minimum_and_its_derivatives_are_those_of_the_closed_form():
    loss, a, theta, b = quadratic()
    inverse = torch.linalg.inv(a + 2.0 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(solve(loss, theta, b), inverse @ (b + 2.0 * theta["x"]), rtol=1e-10, atol=1e-10)
    of_theta, of_b = jacrev(lambda t, b: solve(loss, t, b), argnums=(0, 1))(theta, b)
    torch.testing.assert_close(of_theta["x"], 2.0 * inverse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_b, inverse, rtol=1e-10, atol=1e-10)


def test_the_error_of_conjugate_gradients_falls_to_zero_with_their_number():
    loss, a, theta, b = quadratic()
    exact = 2.0 * torch.linalg.inv(a + 2.0 * torch.eye(4, dtype=torch.float64))
    solvers = [conjugate_gradient(n) for n in (1, 2, 3, 4, 12)]
    errors = [
        float((jacrev(lambda t: solve(loss, t, b, solver=s))(theta)["x"] - exact).norm())  # noqa: B023
        for s in solvers
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-3
    assert max(errors[3:]) < 1e-12


def test_the_error_of_a_neumann_series_falls_geometrically():
    loss, a, theta, b = quadratic()
    strength = 1.5 * float(torch.linalg.eigvalsh(a).max())
    exact = strength * torch.linalg.inv(a + strength * torch.eye(4, dtype=torch.float64))

    def error(terms):
        derivative = jacrev(lambda t: solve(loss, t, b, strength, neumann_series(terms)))(theta)
        return float((derivative["x"] - exact).norm())

    ratio = 1 / 1.5  # the largest eigenvalue of -H/λ
    assert error(20) == pytest.approx(error(10) * ratio**10, rel=0.05)
    assert error(200) < 1e-12


def test_the_derivative_does_not_depend_on_the_path():
    loss, _, theta, b = quadratic()

    def derivative(optimizer, steps):
        run = partial(adapt_implicitly, loss, solver=conjugate_gradient(6), strength=2.0)
        return jacrev(lambda t: run(t, b, optimizer=optimizer, num_steps=steps)["x"])(theta)["x"]

    slow, fast = derivative(torchopt.sgd(0.01), 4000), derivative(torchopt.sgd(0.05, momentum=0.5), 1000)
    torch.testing.assert_close(slow, fast, rtol=1e-10, atol=1e-10)


def test_vmap_over_tasks_with_a_shared_start_equals_a_loop():
    loss, _, theta, b = quadratic()
    tasks = torch.stack([b, b + 1, b - 0.5])
    run = partial(solve, steps=50)
    mapped = grad(lambda t, b: vmap(lambda b: run(loss, t, b))(b).square().sum(), argnums=(0, 1))(theta, tasks)
    loop = grad(lambda t, b: sum(run(loss, t, one).square().sum() for one in b), argnums=(0, 1))(theta, tasks)
    torch.testing.assert_close(mapped, loop, rtol=1e-12, atol=1e-12)


def test_no_steps_are_the_start_and_its_derivative_that_of_the_system_there():
    loss, a, theta, b = quadratic()
    assert torch.equal(solve(loss, theta, b, steps=0), theta["x"])
    derivative = jacrev(lambda t: solve(loss, t, b, steps=0))(theta)["x"]
    exact = 2.0 * torch.linalg.inv(a + 2.0 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(derivative, exact, rtol=1e-10, atol=1e-10)


def test_the_optimizer_and_the_strength_change_the_result():
    loss, _, theta, b = quadratic()
    run = partial(adapt_implicitly, loss, theta, b, solver=conjugate_gradient(4))
    base = run(optimizer=SGD, num_steps=3, strength=2.0)["x"]
    assert not torch.equal(base, run(optimizer=torchopt.sgd(0.01), num_steps=3, strength=2.0)["x"])
    assert not torch.equal(base, run(optimizer=SGD, num_steps=4, strength=2.0)["x"])
    assert not torch.equal(base, run(optimizer=SGD, num_steps=3, strength=1.0)["x"])


def test_a_captured_tensor_is_refused():
    loss, _, theta, b = quadratic()
    run = partial(adapt_implicitly, optimizer=SGD, num_steps=3, strength=2.0, solver=conjugate_gradient(2))
    with pytest.raises(ValueError, match="closes over a tensor"):
        grad(lambda b: run(lambda p: loss(p, b), theta)["x"].sum())(b)


@pytest.mark.parametrize(
    ("strength", "message"), [(0.0, "must be > 0; got 0"), (-1.0, r"must be finite and >= 0; got -1\.0")]
)
def test_a_strength_that_holds_nothing_is_refused(strength, message):
    loss, _, theta, b = quadratic()
    with pytest.raises(ValueError, match=f"strength {message}"):
        solve(loss, theta, b, strength)


@pytest.mark.parametrize("make", [conjugate_gradient, neumann_series])
def test_a_solver_of_a_negative_number_of_steps_is_refused(make):
    with pytest.raises(ValueError, match="num_steps must be >= 0; got -1"):
        make(-1)
