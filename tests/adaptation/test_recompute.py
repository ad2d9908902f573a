"""Recomputation and mixed mode: the same derivatives of every kind, stored less; captured tensors refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional

from ssmrl.adaptation import adapt, mixed_mode_grad_and_value, mse_loss, recomputed

f64 = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x**3 * y.sin()).sum() + (x * y).prod()


def test_a_recomputed_function_runs_again_for_its_derivative_and_only_then():
    calls = []

    def square(x):
        calls.append(x)
        return x.square()

    x = f64(3.0).requires_grad_()
    result = recomputed(square)(x)
    assert len(calls) == 1
    result.backward()
    assert len(calls) == 2
    assert x.grad == 6.0


def test_only_the_arguments_of_a_recomputed_function_are_stored():
    stored: list[Tensor] = []

    def many(x):
        for _ in range(10):
            x = x.sin().exp()
        return x

    x = randn(5).requires_grad_()

    def store(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda t: t):
        result = recomputed(many)(x)
    assert len(stored) == 1
    assert torch.equal(stored[0], x)
    gradient = torch.autograd.grad(result.sum(), x)[0]
    close(gradient, torch.autograd.grad(many(x).sum(), x)[0])


@pytest.mark.parametrize("derivative", [grad, jacrev, jacfwd, hessian, lambda f: grad(grad(lambda x, y: f(x, y)))])
def test_every_derivative_of_a_recomputed_function_is_its_own(derivative):
    torch.manual_seed(0)
    x, y = (randn(()), randn(())) if derivative not in (grad, jacrev, jacfwd, hessian) else (randn(3), randn(3))
    close(derivative(recomputed(cubic))(x, y), derivative(cubic)(x, y))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 0)])
def test_vmap_of_a_recomputed_function_equals_a_loop_with_its_derivative(dims):
    torch.manual_seed(0)
    x, y = (randn(3) if dim is None else randn(3, 3) for dim in dims)
    both = partial(vmap, in_dims=dims)
    close(both(grad_and_value(recomputed(cubic)))(x, y), both(grad_and_value(cubic))(x, y))
    total = lambda f: grad(lambda x, y: both(f)(x, y).sum(), argnums=(0, 1))  # noqa: E731
    close(total(recomputed(cubic))(x, y), total(cubic)(x, y))


def test_pytrees_integers_and_what_is_no_tensor_pass_through():
    def function(state, count, name):
        return {"state": (state[0] + 1.0, state[1]), "count": count + 1, "name": name, "same": state[0]}

    state, count = (randn(2).requires_grad_(), randn(3)), torch.tensor(2**53 - 2)
    result = recomputed(function)(state, count, "x")
    assert result["count"] == 2**53 - 1
    assert result["count"].dtype == torch.int64
    assert result["name"] == "x"
    (result["state"][0].sum() + 2 * result["same"].sum()).backward()
    close(state[0].grad, torch.full((2,), 3.0, dtype=torch.float64))


def test_an_integer_that_is_not_mapped_stays_so():
    shapes = []

    def function(x, count):
        return x * 2, count + 1

    def one(x):
        y, count = recomputed(function)(x, torch.tensor(1))
        shapes.append(torch._C._functorch.is_batchedtensor(count))
        return y + count

    close(vmap(one)(f64([1.0, 2.0])), f64([4.0, 6.0]))
    assert shapes == [False]


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return mse_loss((x @ params["a"]).tanh() @ params["b"], y)


def problem():
    torch.manual_seed(0)
    return {"a": randn(2, 3), "b": randn(3, 1)}, randn(4, 2), randn(4, 1)


def test_mixed_mode_gives_the_gradient_and_the_value():
    close(mixed_mode_grad_and_value(loss)(*problem()), grad_and_value(loss)(*problem()))


def scalar_of(function):
    """A number that depends on a gradient and a value."""

    def scalar(params, x, y):
        gradient, value = function(loss)(params, x, y)
        return gradient["a"].sin().sum() + gradient["b"].square().sum() + value**2

    return scalar


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("derivative", [grad, jacrev, jacfwd], ids=["grad", "jacrev", "jacfwd"])
def test_the_derivative_of_a_mixed_mode_gradient_in_any_argument_is_the_plain_one(derivative, argument):
    ours, theirs = (
        derivative(scalar_of(f), argnums=argument)(*problem()) for f in (mixed_mode_grad_and_value, grad_and_value)
    )
    close(ours, theirs)


def test_a_mixed_mode_gradient_is_differentiated_twice():
    params, x, y = problem()
    ours, theirs = (hessian(scalar_of(f), argnums=1)(params, x, y) for f in (mixed_mode_grad_and_value, grad_and_value))
    close(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("dims", [(None, 0, 0), (0, None, 0), (0, 0, None), (None, 0, None), (0, 0, 0)])
def test_nested_vmap_of_a_mixed_mode_gradient_equals_the_plain_one(dims):
    params, x, y = problem()
    more = lambda t: torch.stack([t, t + 0.1, t - 0.3])  # noqa: E731
    given: Any = (
        {name: more(p) if dims[0] == 0 else p for name, p in params.items()},
        *(more(t) if dim == 0 else t for t, dim in zip((x, y), dims[1:], strict=True)),
    )
    outer = (None, None, 0)

    def all_of(function):
        over = vmap(vmap(scalar_of(function), in_dims=dims), in_dims=outer)
        arguments = (*given[:2], more(given[2]))
        leaves = [p.clone().requires_grad_() for p in (*arguments[0].values(), *arguments[1:])]
        value = over(dict(zip(arguments[0], leaves, strict=False)), *leaves[len(arguments[0]) :]).sum()
        return value.detach(), torch.autograd.grad(value, leaves)

    close(all_of(mixed_mode_grad_and_value), all_of(grad_and_value), tolerance=1e-10)


def test_no_graph_of_a_mixed_mode_gradient_is_stored():
    params, x, y = problem()
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    gradient, _ = mixed_mode_grad_and_value(loss)(leaves, x, y)
    node = gradient["a"].grad_fn
    assert {id(t) for t in node.saved_tensors} == {id(t) for t in (*leaves.values(), x, y)}
    following = [name for name, _ in ((type(n).__name__, i) for n, i in node.next_functions)]
    assert set(following) <= {"AccumulateGrad", "NoneType"}


def test_forward_mode_of_both_is_the_plain_one():
    params, x, y = problem()
    tangents = (x.cos(),)
    for wrap in (lambda f: mixed_mode_grad_and_value(f), lambda f: recomputed(grad_and_value(f))):
        ours = jvp(lambda x: wrap(loss)(params, x, y), (x,), tangents)  # noqa: B023
        close(ours, jvp(lambda x: grad_and_value(loss)(params, x, y), (x,), tangents))


def test_pytorch_s_mse_loss_is_told_of_its_defect():
    params, x, y = problem()

    def torch_loss(params, x, y):
        return functional.mse_loss((x @ params["a"]).tanh() @ params["b"], y)

    with pytest.raises(RuntimeError, match=r"mixed_mode .* PyTorch's mse_loss .* take ssmrl\.mse_loss"):
        grad(lambda p: mixed_mode_grad_and_value(torch_loss)(p, x, y)[0]["a"].sum())(params)


MODES: list[dict[str, Any]] = [{"mixed_mode": True}, {"recompute": 1}, {"recompute": 2}]
over_modes = pytest.mark.parametrize("options", MODES, ids=str)


@over_modes
def test_a_captured_tensor_that_is_differentiated_is_refused(options):
    params, x, y = problem()
    steps: Any = partial(adapt, optimizer=torchopt.sgd(0.1), num_steps=2, **options)

    def closes_over(x):
        return steps(lambda p: loss(p, x, y), params).params["a"].sum()

    with pytest.raises(ValueError, match=r"closes over a tensor .* pass it to adapt as one of \*args"):
        grad(closes_over)(x)
    with pytest.raises(ValueError, match="closes over a tensor"):
        vmap(lambda x: steps(lambda p: loss(p, x, y), params).params["a"])(torch.stack([x, x]))
    with pytest.raises(ValueError, match="closes over a tensor"):
        closes_over(x.clone().requires_grad_())
    closes_over(x)  # a constant is what it is


@over_modes
def test_a_rate_captured_by_the_optimizer_is_refused(options):
    params, x, y = problem()

    def of_rate(rate):
        optimizer = torchopt.transform.scale(-rate)
        return adapt(loss, params, x, y, optimizer=optimizer, num_steps=2, **options).params["a"].sum()

    with pytest.raises(ValueError, match="loss_fn or the optimizer closes over a tensor"):
        grad(of_rate)(f64(0.1))


@over_modes
def test_a_bad_combination_is_refused(options):
    params, x, y = problem()
    with pytest.raises(
        ValueError, match="first_order stores no graph of a gradient, so mixed_mode and recompute would do"
    ):
        adapt(loss, params, x, y, optimizer=torchopt.sgd(0.1), num_steps=1, first_order=True, **options)


@pytest.mark.parametrize("recompute", [0, -1])
def test_a_group_of_no_steps_is_refused(recompute):
    params, x, y = problem()
    with pytest.raises(ValueError, match="recompute must be"):
        adapt(loss, params, x, y, optimizer=torchopt.sgd(0.1), num_steps=1, recompute=recompute)


@over_modes
def test_a_loss_that_draws_random_numbers_is_refused_and_the_generator_left_as_it_was(options):
    params, x, y = problem()

    def noisy(params, x, y):
        return loss(params, x + torch.randn_like(x), y)

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="loss_fn draws random numbers"):
        adapt(noisy, params, x, y, optimizer=torchopt.sgd(0.1), num_steps=1, **options)
    assert torch.equal(torch.get_rng_state(), before)


@over_modes
def test_a_captured_tensor_with_a_tangent_is_refused(options):
    params, x, y = problem()

    def closes_over(x):
        return adapt(lambda p: loss(p, x, y), params, optimizer=torchopt.sgd(0.1), num_steps=1, **options).params["a"]

    with pytest.raises(ValueError, match="closes over a tensor"):
        jvp(closes_over, (x,), (x,))


@over_modes
def test_a_loss_sees_no_values_that_the_caller_did_not_pass(options):
    params, x, y = problem()

    def positive(params, x, scale):
        assert (scale > 0).all()
        return loss(params, x, y) / scale.sum()

    adapt(positive, params, x, torch.ones(2), optimizer=torchopt.sgd(0.1), num_steps=1, **options)
    scales = torch.ones(3, 2)
    run = partial(adapt, positive, params, x, optimizer=torchopt.sgd(0.1), num_steps=1, **options)
    # Under vmap a value cannot be looked at, but the copy that is tried first can.
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda scale: run(scale).params["a"])(scales)


def test_what_does_not_depend_on_an_argument_has_no_derivative():
    x = f64(2.0).requires_grad_()
    recomputed(lambda x: x.detach() * 2 + 0 * x.new_ones(()))(x)
    y = recomputed(lambda x: (x.detach() * 2, x * 3))(x)
    (y[0] + y[1]).backward()
    assert x.grad == 3.0
    (recomputed(lambda x: x.detach() * 2)(x) + 0 * x).backward()
    assert x.grad == 3.0
    gradient, value = mixed_mode_grad_and_value(lambda p, x: x.square())(f64(1.0).requires_grad_(), x)
    assert gradient == 0.0
    (gradient + value.square()).backward()
    assert x.grad == 3.0 + 4 * 2.0**3


def test_complex_results_stay_complex():
    result = recomputed(torch.complex)(f64(1.0), f64(2.0))
    assert result == 1 + 2j
