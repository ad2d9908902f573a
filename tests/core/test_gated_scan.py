"""The gated recurrences against loops that autograd differentiates step by step, for one and for two state blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from ssmrl.core.gated_scan import gated_linear_recurrence, gated_recurrence
from ssmrl.core.gru import _GRUCell
from ssmrl.core.lstm import _LSTMCell

T, B, S = 3, 2, 2


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_loop(f, a, d, w, *, adjoint=False):
    width, n = w.shape[0], f.shape[-1] // w.shape[0]
    blocks = (*f.shape[1:-1], n, width)
    a = a.reshape(len(a), *blocks[:-2], n, n, width)
    d = d.reshape(len(d), *blocks[:-2], n, w.shape[1] // width, width)
    f = f.reshape(len(f), *blocks)
    if adjoint:
        v = [f[-1]]
        for t in reversed(range(len(a))):
            s = torch.einsum("bnms,bns->bms", d[t], v[0]).flatten(-2) @ w.T
            v.insert(0, f[t] + torch.einsum("bijs,bis->bjs", a[t], v[0]))
            v[0] = torch.cat([v[0][:, :1] + s[:, None], v[0][:, 1:]], 1)
    else:
        v = [f[0]]
        for t in range(len(a)):
            u = (v[-1][:, 0] @ w).reshape(blocks[0], -1, width)
            product = torch.einsum("bnms,bms->bns", d[t], u)
            v.append(f[t + 1] + torch.einsum("bijs,bjs->bis", a[t], v[-1]) + product)
    return torch.stack(v).flatten(-2)


def gated_loop(cell, start, x, w, b, keep):
    v = [start[0]]
    for t in range(len(x)):
        source = v[-1] if keep is None else torch.where(keep[t], v[-1], 0.0)
        v.append(cell.step(source, source[:, : w.shape[0]] @ w + b, x[t]))
    return torch.stack(v)


def with_cell(function, cell, keep):
    return lambda start, x, w, b: function(cell, start, x, w, b, keep)


KEEP = torch.tensor([[True, False], [False, True], [True, True]])[..., None]
CASES = {}
for name, cell, n, m in (("GRU", _GRUCell(), 1, 3), ("LSTM", _LSTMCell(), 2, 4)):
    operands = randn(1, B, n * S, seed=0), randn(T, B, m * S, seed=1), randn(S, m * S, seed=2), randn(m * S, seed=3)
    for label, keep in (("", None), (", resets", KEEP)):
        CASES[name + label] = with_cell(gated_recurrence, cell, keep), with_cell(gated_loop, cell, keep), operands
for n, m in ((1, 3), (2, 4)):
    coefficients = randn(T, B, n * n * S, seed=4), randn(T, B, n * m * S, seed=5), randn(S, m * S, seed=6)
    for label, adjoint in (("", False), (", adjoint", True)):
        CASES[f"linear {n}x{m}{label}"] = (
            functools.partial(gated_linear_recurrence, adjoint=adjoint),
            functools.partial(linear_loop, adjoint=adjoint),
            (randn(T + 1, B, n * S, seed=7), *coefficients),
        )
over_cases = pytest.mark.parametrize(("scan", "loop", "operands"), CASES.values(), ids=CASES.keys())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def scalar(function):
    return lambda *operands: (function(*operands) ** 3).sum() / 100


@over_cases
def test_scan_equals_the_loop(scan, loop, operands):
    close(scan(*operands), loop(*operands))


def test_the_adjoint_is_the_adjoint():
    """<g, solve(f)> = <solve_adjoint(g), f> for every f and g."""
    f, a, d, w = CASES["linear 2x4"][2]
    g = randn(*f.shape, seed=8)
    solved = gated_linear_recurrence(f, a, d, w)
    close((g * solved).sum(), (gated_linear_recurrence(g, a, d, w, adjoint=True) * f).sum())


@over_cases
def test_first_and_second_derivatives_equal_finite_differences(scan, loop, operands):
    inputs = [x.clone().requires_grad_() for x in operands]
    assert gradcheck(scan, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)
    assert gradgradcheck(scan, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@over_cases
def test_third_derivative_equals_that_of_the_loop(scan, loop, operands):
    def third(function):
        first = grad(scalar(function), argnums=2)
        second = grad(lambda *z: (first(*z) ** 2).sum(), argnums=2)
        return grad(lambda *z: (second(*z) ** 2).sum(), argnums=(0, 1, 2, 3))(*operands)

    for ours, theirs in zip(third(scan), third(loop), strict=True):
        close(ours / theirs.abs().max(), theirs / theirs.abs().max(), tolerance=1e-11)


@over_cases
def test_reverse_over_forward_equals_forward_over_reverse(scan, loop, operands):
    tangents = tuple(randn(*x.shape, seed=9) for x in operands)

    def directional(function):
        f = scalar(function)
        every = (0, 1, 2, 3)
        return (
            jvp(lambda *z: grad(f, argnums=every)(*z), operands, tangents)[1],
            grad(lambda *z: jvp(f, z, tangents)[1], argnums=every)(*operands),
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
    scan, loop, operands = CASES[case]
    mapped[0] = mapped_again[1] = True
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


def test_no_steps_return_the_start():
    for cell, n, m in ((_GRUCell(), 1, 3), (_LSTMCell(), 2, 4)):
        start = randn(1, B, n * S, seed=0)
        x = torch.empty(0, B, m * S, dtype=torch.float64)
        close(gated_recurrence(cell, start, x, randn(S, m * S, seed=1), randn(m * S, seed=2), None), start)


def test_a_mask_forgets_nan_in_value_and_gradient():
    _, _, (start, x, w, b) = CASES["GRU"]
    keep = torch.ones(T, B, 1, dtype=torch.bool)
    keep[0] = False
    solve = lambda w: gated_recurrence(_GRUCell(), torch.full_like(start, torch.nan), x, w, b, keep)[1:].sum()  # noqa: E731
    assert solve(w).isfinite()
    assert grad(solve)(w).isfinite().all()
