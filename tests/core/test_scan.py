"""The recurrences against a loop that autograd differentiates step by step."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from ssmrl.core.scan import linear_recurrence, mlp_recurrence

T, B, S, H = 4, 2, 3, 5


def mlp_loop(c, w_in, b_in, w_out, keep=None):
    h = [c[0]]
    for t in range(len(c) - 1):
        source = h[-1] if keep is None else torch.where(keep[t], h[-1], 0.0)
        h.append((source @ w_in + b_in).relu() @ w_out + c[t + 1])
    return torch.stack(h)


def linear_loop(f, w_in, d, w_out, *, reverse=False):
    if reverse:
        return linear_loop(f.flip(0), w_in, d.flip(0), w_out).flip(0)
    h = [f[0]]
    for t in range(len(d)):
        h.append(((h[-1] @ w_in) * d[t]) @ w_out + f[t + 1])
    return torch.stack(h)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp_operands(steps=T):
    return randn(steps + 1, B, S, seed=0), randn(S, H, seed=1), randn(H, seed=2), randn(H, S, seed=3)


def linear_operands(steps=T):
    return randn(steps + 1, B, S, seed=0), randn(S, H, seed=1), randn(steps, B, H, seed=2), randn(H, S, seed=3)


KEEP = randn(T, B, 1, seed=4) > -0.5
CASES = {
    "mlp": (mlp_recurrence, mlp_loop, mlp_operands()),
    "mlp with resets": (
        functools.partial(mlp_recurrence, keep=KEEP),
        functools.partial(mlp_loop, keep=KEEP),
        mlp_operands(),
    ),
    "linear": (linear_recurrence, linear_loop, linear_operands()),
    "linear, reverse": (
        functools.partial(linear_recurrence, reverse=True),
        functools.partial(linear_loop, reverse=True),
        linear_operands(),
    ),
}
over_cases = pytest.mark.parametrize(("scan", "loop", "operands"), CASES.values(), ids=CASES.keys())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def scalar(function):
    """A scalar of every output entry, with no derivative that vanishes."""
    return lambda *operands: (function(*operands) ** 3).sum() / 100


def test_two_steps_by_hand():
    c = torch.tensor([2.0, 1.0, -1.0]).view(3, 1, 1)
    w_in, b_in, w_out = torch.tensor([[3.0]]), torch.tensor([-1.0]), torch.tensor([[0.5]])
    # h_1 = relu(2·3 - 1)·0.5 + 1 = 3.5; h_2 = relu(3.5·3 - 1)·0.5 - 1 = 3.75
    assert mlp_recurrence(c, w_in, b_in, w_out).flatten().tolist() == [2.0, 3.5, 3.75]
    d = torch.tensor([2.0, -1.0]).view(2, 1, 1)
    # h_1 = 2·3·2·0.5 + 1 = 7; h_2 = 7·3·(-1)·0.5 - 1 = -11.5
    assert linear_recurrence(c, w_in, d, w_out).flatten().tolist() == [2.0, 7.0, -11.5]
    # h_1 = -1·3·(-1)·0.5 + 1 = 2.5; h_0 = 2.5·3·2·0.5 + 2 = 9.5
    assert linear_recurrence(c, w_in, d, w_out, reverse=True).flatten().tolist() == [9.5, 2.5, -1.0]


@over_cases
def test_scan_equals_the_loop(scan, loop, operands):
    close(scan(*operands), loop(*operands))


@over_cases
def test_first_and_second_derivatives_equal_finite_differences(scan, loop, operands):
    inputs = [x.clone().requires_grad_() for x in operands]
    assert gradcheck(scan, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)
    assert gradgradcheck(scan, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@over_cases
def test_third_derivative_equals_that_of_the_loop(scan, loop, operands):
    def third(function):
        first = grad(scalar(function), argnums=1)
        second = grad(lambda *z: (first(*z) ** 2).sum(), argnums=1)
        return grad(lambda *z: (second(*z) ** 2).sum(), argnums=(0, 1, 2, 3))(*operands)

    for ours, theirs in zip(third(scan), third(loop), strict=True):
        close(ours / theirs.abs().max(), theirs / theirs.abs().max())


@over_cases
def test_reverse_over_forward_equals_forward_over_reverse(scan, loop, operands):
    first, *rest = operands
    tangent = randn(*first.shape, seed=9)

    def directional(function):
        f = scalar(function)
        return (
            jvp(lambda x: grad(f)(x, *rest), (first,), (tangent,))[1],
            grad(lambda x: jvp(lambda x: f(x, *rest), (x,), (tangent,))[1])(first),
        )

    expected, _ = directional(loop)
    for hvp in directional(scan):
        close(hvp, expected)


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    mapped=st.lists(st.booleans(), min_size=4, max_size=4),
    mapped_again=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_nested_vmap_of_the_second_derivative_equals_the_loop(case, mapped, mapped_again):
    """Whichever operands differ along the two mapped axes: none, some or all."""
    scan, loop, operands = CASES[case]
    mapped[0] = mapped_again[1] = True  # vmap wants one mapped operand at least
    inner = tuple(0 if m else None for m in mapped)
    outer = tuple(0 if m else None for m in mapped_again)
    stacked = []
    for x, m_inner, m_outer in zip(operands, mapped, mapped_again, strict=True):
        shape = ((3,) if m_outer else ()) + ((2,) if m_inner else ()) + x.shape
        stacked.append(x + 0.1 * randn(*shape, seed=len(shape)))

    def second(function):
        first = grad(scalar(function), argnums=(0, 1, 2, 3))
        norm = lambda *z: sum((g**2).sum() for g in first(*z))  # noqa: E731
        return vmap(vmap(grad(norm, argnums=(0, 1, 2, 3)), in_dims=inner), in_dims=outer)(*stacked)

    for ours, theirs in zip(second(scan), second(loop), strict=True):
        close(ours, theirs, tolerance=1e-9)


def test_vmapped_masks_differ_between_tasks():
    c, w_in, b_in, w_out = mlp_operands()
    keep = randn(3, T, B, 1, seed=7) > 0
    ours = vmap(lambda k: mlp_recurrence(c, w_in, b_in, w_out, k))(keep)
    close(ours, torch.stack([mlp_loop(c, w_in, b_in, w_out, k) for k in keep]))


def test_a_mask_forgets_nan_in_value_and_gradient():
    c, w_in, b_in, w_out = mlp_operands()
    c[0] = torch.nan
    keep = torch.ones(T, B, 1, dtype=torch.bool)
    keep[0] = False
    assert mlp_recurrence(c, w_in, b_in, w_out, keep)[1:].isfinite().all()
    gradient = grad(lambda w: mlp_recurrence(c, w, b_in, w_out, keep)[1:].sum())(w_in)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("make", [mlp_operands, linear_operands])
def test_no_steps_return_the_initial_state(make):
    scan = mlp_recurrence if make is mlp_operands else linear_recurrence
    operands = make(steps=0)
    close(scan(*operands), operands[0])
    assert grad(lambda *z: scan(*z).sum(), argnums=1)(*operands).abs().sum() == 0


def test_operands_are_left_alone():
    operands = linear_operands()
    copies = [x.clone() for x in operands]
    linear_recurrence(*operands, reverse=True)
    mlp_recurrence(*mlp_operands())
    assert all(torch.equal(x, y) for x, y in zip(operands, copies, strict=True))
