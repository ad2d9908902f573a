"""All operations with derivatives of their own (the scans and perceptron.py) against plain autograd."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from ssmrl.core import native
from ssmrl.core.diagonal_scan import diagonal_recurrence
from ssmrl.core.gated_scan import gated_linear_recurrence, gated_recurrence
from ssmrl.core.gru import _GRUCell
from ssmrl.core.lstm import _LSTMCell
from ssmrl.core.perceptron import linear_perceptron, perceptron
from ssmrl.core.scan import linear_recurrence, mlp_recurrence

T, B, S, H, OUT = 3, 2, 2, 3, 4
KEEP = torch.tensor([[True, False], [False, True], [True, True]])[..., None]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------ step by step, from the docstrings


def forget(keep, t, x):
    return x if keep is None else torch.where(keep[t], x, 0.0)


def mlp_loop(c, w_in, b_in, w_out, *, keep=None):
    h = [c[0]]
    for t in range(len(c) - 1):
        h.append((forget(keep, t, h[-1]) @ w_in + b_in).relu() @ w_out + c[t + 1])
    return torch.stack(h)


def linear_loop(f, a, w_in, w_out, *, z, keep=None, adjoint=False):
    h, slope = [f[-1 if adjoint else 0]], (z > 0).to(z.dtype)
    p: list[torch.Tensor] = []
    for t in reversed(range(len(a))) if adjoint else range(len(a)):
        if adjoint:
            p.insert(0, (h[0] @ w_out.T + a[t]) * slope[t])
            h.insert(0, forget(keep, t, p[0] @ w_in.T) + f[t])
        else:
            p.append((forget(keep, t, h[-1]) @ w_in + a[t]) * slope[t])
            h.append(p[-1] @ w_out + f[t + 1])
    return torch.stack(h), torch.stack(p)


def gated_loop(start, x, w, b, *, cell, keep=None):
    v = [start[0]]
    for t in range(len(x)):
        source = forget(keep, t, v[-1])
        v.append(cell.step(source, source[:, : w.shape[0]] @ w + b, x[t]))
    return torch.stack(v)


def gated_linear_loop(f, e, a, d, w, *, keep=None, adjoint=False):
    width, m = w.shape[0], w.shape[1] // w.shape[0]
    n = f.shape[-1] // width
    a, d = a.unflatten(-1, (n, n, width)), d.unflatten(-1, (n, m, width))
    v = [f[-1 if adjoint else 0]]
    u: list[torch.Tensor] = []
    for t in reversed(range(len(a))) if adjoint else range(len(a)):
        if adjoint:
            target = v[0].unflatten(-1, (n, width))
            u.insert(0, torch.einsum("bnms,bns->bms", d[t], target).flatten(-2) + e[t])
            into = torch.einsum("bijs,bis->bjs", a[t], target)
            into = torch.cat([into[:, :1] + (u[0] @ w.T)[:, None], into[:, 1:]], 1).flatten(-2)
            v.insert(0, forget(keep, t, into) + f[t])
        else:
            source = forget(keep, t, v[-1])
            u.append(source[:, :width] @ w + e[t])
            product = torch.einsum("bnms,bms->bns", d[t], u[-1].unflatten(-1, (m, width)))
            state = torch.einsum("bijs,bjs->bis", a[t], source.unflatten(-1, (n, width)))
            v.append((state + product).flatten(-2) + f[t + 1])
    return torch.stack(v), torch.stack(u)


def diagonal_loop(f, a, *, keep=None, adjoint=False):
    a, f = torch.complex(*a), torch.complex(*f.unbind(-2))
    h, steps = [f[-1 if adjoint else 0]], range(len(f) - 1)
    for t in reversed(steps) if adjoint else steps:
        if adjoint:
            h.insert(0, forget(keep, t, a.conj() * h[0]) + f[t])
        else:
            h.append(a * forget(keep, t, h[-1]) + f[t + 1])
    return torch.stack([torch.stack(h).real, torch.stack(h).imag], -2)


def plain_perceptron(x, f, w_in, b_in, w_out):
    return (x @ w_in + b_in).relu() @ w_out + f


def plain_linear_perceptron(x, a, w_1, w_2, *, z):
    p = (x @ w_1 + a) * (z > 0)
    return p @ w_2, p


# ---------------------------------------------------------------------------------------------------------------- cases


def mlp_operands(steps=T):
    return randn(steps + 1, B, S, seed=0), randn(S, H, seed=1), randn(H, seed=2), randn(H, S, seed=3)


def linear_operands(steps=T):
    return randn(steps + 1, B, S, seed=0), randn(steps, B, H, seed=2), randn(S, H, seed=1), randn(H, S, seed=3)


def gated_operands(n, m):
    return randn(1, B, n * S, seed=0), randn(T, B, m * S, seed=1), randn(S, m * S, seed=2), randn(m * S, seed=3)


def gated_linear_operands(n, m):
    sequences = randn(T + 1, B, n * S, seed=7), randn(T, B, m * S, seed=8)
    return *sequences, randn(T, B, n * n * S, seed=4), randn(T, B, n * m * S, seed=5), randn(S, m * S, seed=6)


def diagonal_operands(steps=T):
    return randn(steps + 1, B, 2, S, seed=0), randn(2, S, seed=1)


def perceptron_operands():
    w_in, b_in, w_out = randn(S, H, seed=1), randn(H, seed=2), randn(H, OUT, seed=3)
    return randn(T, B, S, seed=0), randn(T, B, OUT, seed=4), w_in, b_in, w_out


def linear_perceptron_operands():
    return randn(T, B, S, seed=0), randn(T, B, H, seed=4), randn(S, H, seed=1), randn(H, OUT, seed=3)


def linear_perceptron_with_z(x, a, w_1, w_2, *, z):
    return linear_perceptron(x, a, z, w_1, w_2)


def with_z(f, a, w_in, w_out, *, z, keep=None, adjoint=False):
    return linear_recurrence(f, a, z, w_in, w_out, keep, adjoint=adjoint)


def with_flat_mask(f, a, *, keep=None, adjoint=False):
    return diagonal_recurrence(a, f, None if keep is None else keep[..., 0], adjoint=adjoint)


def with_cell(start, x, w, b, *, cell, keep=None):
    return gated_recurrence(cell, start, x, w, b, keep)


CASES: dict[str, Any] = {}
Z = randn(T, B, H, seed=9).relu()
for label, options in (("", {}), (", resets", {"keep": KEEP})):
    CASES[f"mlp{label}"] = mlp_recurrence, mlp_loop, mlp_operands(), options
    for name, n, m, cell in (("GRU", 1, 3, _GRUCell()), ("LSTM", 2, 4, _LSTMCell())):
        CASES[name + label] = with_cell, gated_loop, gated_operands(n, m), {"cell": cell, **options}
    for direction, adjoint in (("", False), (", adjoint", True)):
        way = {"adjoint": adjoint, **options}
        CASES[f"diagonal{direction}{label}"] = with_flat_mask, diagonal_loop, diagonal_operands(), way
        CASES[f"linear{direction}{label}"] = with_z, linear_loop, linear_operands(), {"z": Z, **way}
        for n, m in ((1, 3), (2, 4)):
            case = gated_linear_recurrence, gated_linear_loop, gated_linear_operands(n, m), way
            CASES[f"gated linear {n}x{m}{direction}{label}"] = case


CASES["perceptron"] = perceptron, plain_perceptron, perceptron_operands(), {}
CASES["linear perceptron"] = linear_perceptron_with_z, plain_linear_perceptron, linear_perceptron_operands(), {"z": Z}


@contextlib.contextmanager
def loops_in(language):
    """Time loops in C++, if they are there, or in Python."""
    with contextlib.nullcontext() if language == "C++" else mock.patch.object(native, "run", return_value=False):
        yield


over_cases = pytest.mark.parametrize("case", CASES)
in_both_languages = pytest.mark.usefixtures("_language")


def of_case(case):
    """The recurrence and the loop, as functions of the operands that have a derivative, and the operands."""
    scan, loop, operands, options = CASES[case]
    return functools.partial(scan, **options), functools.partial(loop, **options), operands


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def scalar(function):
    """A scalar of every output entry, with no derivative that vanishes."""
    return lambda *operands: sum((output**3).sum() for output in as_tuple(function(*operands))) / 100


# ----------------------------------------------------------------------------------------------------------------- laws


@in_both_languages
@over_cases
def test_scan_equals_the_loop(case):
    scan, loop, operands = of_case(case)
    for ours, theirs in zip(as_tuple(scan(*operands)), as_tuple(loop(*operands)), strict=True):
        close(ours, theirs)


@in_both_languages
@over_cases
def test_first_and_second_derivatives_equal_finite_differences(case):
    scan, _, operands = of_case(case)
    inputs = [x.clone().requires_grad_() for x in operands]
    assert gradcheck(scan, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)
    assert gradgradcheck(scan, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@in_both_languages
@over_cases
def test_third_derivative_equals_that_of_the_loop(case):
    scan, loop, operands = of_case(case)
    every = tuple(range(len(operands)))

    def third(function):
        weight = min(2, len(operands) - 1)
        first = grad(scalar(function), argnums=weight)
        second = grad(lambda *z: (first(*z) ** 2).sum(), argnums=weight)
        return grad(lambda *z: (second(*z) ** 2).sum(), argnums=every)(*operands)

    for ours, theirs in zip(third(scan), third(loop), strict=True):
        close(ours / theirs.abs().max(), theirs / theirs.abs().max(), tolerance=1e-11)


@in_both_languages
@over_cases
def test_reverse_over_forward_equals_forward_over_reverse(case):
    scan, loop, operands = of_case(case)
    tangents = tuple(randn(*x.shape, seed=9) for x in operands)
    every = tuple(range(len(operands)))

    def directional(function):
        f = scalar(function)
        return (
            jvp(lambda *z: grad(f, argnums=every)(*z), operands, tangents)[1],
            grad(lambda *z: jvp(f, z, tangents)[1], argnums=every)(*operands),
        )

    expected, _ = directional(loop)
    for hvp in directional(scan):
        close(hvp, expected)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    language=st.sampled_from(["C++", "Python"]),
    mapped=st.lists(st.booleans(), min_size=5, max_size=5),
    mapped_again=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_nested_vmap_of_the_second_derivative_equals_the_loop(case, language, mapped, mapped_again):
    """Whichever operands differ along the two mapped axes: none, some or all."""
    scan, loop, operands = of_case(case)
    mapped[0] = mapped_again[1] = True  # vmap wants one mapped operand at least
    inner, outer = (tuple(0 if m else None for m in ms[: len(operands)]) for ms in (mapped, mapped_again))
    stacked = []
    for x, m_inner, m_outer in zip(operands, inner, outer, strict=True):
        shape = ((3,) if m_outer == 0 else ()) + ((2,) if m_inner == 0 else ()) + x.shape
        stacked.append(x + 0.1 * randn(*shape, seed=len(shape)))
    every = tuple(range(len(operands)))

    def second(function):
        first = grad(scalar(function), argnums=every)
        norm = lambda *z: sum((g**2).sum() for g in first(*z))  # noqa: E731
        return vmap(vmap(grad(norm, argnums=every), in_dims=inner), in_dims=outer)(*stacked)

    with loops_in(language):
        for ours, theirs in zip(second(scan), second(loop), strict=True):
            close(ours, theirs, tolerance=1e-9)


@over_cases
def test_operands_are_left_alone(case):
    scan, _, operands = of_case(case)
    copies = [x.clone() for x in operands]
    scan(*operands)
    assert all(torch.equal(x, y) for x, y in zip(operands, copies, strict=True))


@over_cases
def test_operands_that_do_not_fit_are_refused(case):
    """Loops in C++ would read beside them."""
    scan, _, operands = of_case(case)
    mask = scan.keywords.get("keep")
    for i, x in enumerate(operands):
        wider = torch.cat([x, x[..., :1]], -1)
        fits = case == "linear perceptron" and i == 3  # more outputs
        for wrong in ([] if fits else [wider]) + [x[None], x.float(), x.to("meta")]:
            with pytest.raises(ValueError, match=r"must (be of shape|have whole blocks)"):
                scan(*operands[:i], wrong, *operands[i + 1 :])
    if mask is not None:
        for wrong in (torch.cat([mask, mask[:1]]), torch.cat([mask, mask[:, :1]], 1), mask.double()):
            with pytest.raises(ValueError, match="keep must be of shape"):
                scan(*operands, keep=wrong)


@pytest.mark.parametrize("recurrence", [mlp_recurrence, linear_recurrence, diagonal_recurrence])
def test_a_recurrence_has_a_state_at_least(recurrence):
    operands = {
        mlp_recurrence: mlp_operands(),
        linear_recurrence: (*linear_operands()[:2], Z, *linear_operands()[2:]),
        diagonal_recurrence: diagonal_operands()[::-1],
    }[recurrence]
    none = [x[:0] if x.shape[0] == T + 1 else x for x in operands]
    with pytest.raises(ValueError, match=r"must be of shape \(T\+1, B"):
        recurrence(*none)


# ----------------------------------------------------------------------------------------------------- of scan.py alone


@in_both_languages
def test_two_steps_by_hand():
    c = torch.tensor([2.0, 1.0, -1.0]).view(3, 1, 1)
    w_in, b_in, w_out = torch.tensor([[3.0]]), torch.tensor([-1.0]), torch.tensor([[0.5]])
    # z_1 = relu(2·3 - 1), h_1 = z_1·0.5 + 1 = 3.5; z_2 = relu(3.5·3 - 1), h_2 = z_2·0.5 - 1 = 3.75
    assert mlp_recurrence(c, w_in, b_in, w_out).flatten().tolist() == [2.0, 3.5, 3.75]
    a, z = torch.tensor([2.0, -1.0]).view(2, 1, 1), torch.tensor([0.5, 0.0]).view(2, 1, 1)
    # p_1 = 2·3 + 2 = 8, h_1 = 8·0.5 + 1 = 5; p_2 = 0, h_2 = -1
    h, p = linear_recurrence(c, a, z, w_in, w_out)
    assert (h.flatten().tolist(), p.flatten().tolist()) == ([2.0, 5.0, -1.0], [8.0, 0.0])
    # h_2 = -1, p_2 = 0, h_1 = 1; p_1 = 1·0.5 + 2 = 2.5, h_0 = 2.5·3 + 2 = 9.5
    h, p = linear_recurrence(c, a, z, w_in, w_out, adjoint=True)
    assert (h.flatten().tolist(), p.flatten().tolist()) == ([9.5, 1.0, -1.0], [2.5, 0.0])


def test_vmapped_masks_differ_between_tasks():
    c, w_in, b_in, w_out = mlp_operands()
    keep = randn(3, T, B, 1, seed=7) > 0
    ours = vmap(lambda k: mlp_recurrence(c, w_in, b_in, w_out, k))(keep)
    close(ours, torch.stack([mlp_loop(c, w_in, b_in, w_out, keep=k) for k in keep]))


@in_both_languages
def test_a_mask_forgets_nan_in_value_and_gradient():
    c, w_in, b_in, w_out = mlp_operands()
    c[0] = torch.nan
    keep = torch.ones(T, B, 1, dtype=torch.bool)
    keep[0] = False
    assert mlp_recurrence(c, w_in, b_in, w_out, keep)[1:].isfinite().all()
    gradient = grad(lambda w: mlp_recurrence(c, w, b_in, w_out, keep)[1:].sum())(w_in)
    assert gradient.isfinite().all()


@in_both_languages
def test_nan_without_a_mask_is_not_hidden():
    c, w_in, b_in, w_out = mlp_operands()
    c[0] = torch.nan
    assert mlp_recurrence(c, w_in, b_in, w_out).isnan().all()
    assert grad(lambda w: mlp_recurrence(c, w, b_in, w_out).sum())(w_in).isnan().all()


@in_both_languages
def test_no_steps_return_the_initial_state():
    c, *weights = mlp_operands(steps=0)
    close(mlp_recurrence(c, *weights), c)
    f, a, w_in, w_out = linear_operands(steps=0)
    h, p = linear_recurrence(f, a, a, w_in, w_out)
    close(h, f)
    assert p.shape == (0, B, H)
    assert grad(lambda w: mlp_recurrence(c, w, *weights[1:]).sum())(w_in).abs().sum() == 0
