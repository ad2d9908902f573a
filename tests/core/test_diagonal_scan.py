"""diagonal_recurrence against complex numbers and a plain loop; test_scan.py has its derivatives and its adjoint."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ssmrl.core import diagonal_recurrence, native
from ssmrl.core.diagonal_scan import _solve_by_pairs

S = 4


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def pairs(z):
    """Complex (..., S) -> real (..., 2, S)."""
    return torch.stack([z.real, z.imag], -2)


def as_complex(x):
    return torch.complex(*x.unbind(-2))


def loop(a, f, keep=None):
    """h_t = a ∘ (k_t h_{t-1}) + f_t, step by step, with torch's complex numbers."""
    a, f = as_complex(a), as_complex(f)
    h = [f[0]]
    for t in range(1, len(f)):
        h.append(a * (h[-1] if keep is None else torch.where(keep[t - 1, :, None], h[-1], 0.0)) + f[t])
    return pairs(torch.stack(h))


def operands(steps, seed=0, batch=2):
    modulus, angle = 0.5 + 0.5 * randn(S, seed=seed).sigmoid(), 3 * randn(S, seed=seed + 1)
    keep = randn(steps, batch, seed=seed + 3) > -0.5
    return pairs(torch.polar(modulus, angle)), randn(steps + 1, batch, 2, S, seed=seed + 2), keep


in_both_languages = pytest.mark.usefixtures("_language")


@in_both_languages
def test_three_steps_by_hand():
    i = torch.tensor([[0.0], [1.0]])
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]).view(4, 1, 2, 1)
    # h = 1, i·1 + 1 = 1 + i, i(1 + i) = -1 + i, i(-1 + i) + 2i = -1 + i
    expected = [[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]]
    assert diagonal_recurrence(i, f).view(4, 2).tolist() == expected
    keep = torch.tensor([[True], [False], [True]])
    # h = 1, 1 + i, 0, 2i
    assert diagonal_recurrence(i, f, keep).view(4, 2).tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 2.0]]


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(0, 40), seed=st.integers(0, 999), masked=st.booleans(), native_too=st.booleans())
def test_the_recurrence_equals_the_loop_for_every_length(steps, seed, masked, native_too):
    a, f, keep = operands(steps, seed)
    keep = keep if masked else None
    with contextlib.nullcontext() if native_too else mock.patch.object(native, "run", return_value=False):
        close(diagonal_recurrence(a, f, keep), loop(a, f, keep))


@in_both_languages
@pytest.mark.parametrize("adjoint", [False, True])
def test_no_steps_are_a_copy(adjoint):
    a, f, _ = operands(0)
    h = diagonal_recurrence(a, f, adjoint=adjoint)
    assert torch.equal(h, f)
    assert h.data_ptr() != f.data_ptr()


@in_both_languages
def test_a_thousand_steps_equal_the_loop():
    a, f, keep = operands(1000)
    close(diagonal_recurrence(a, f, keep), loop(a, f, keep), tolerance=1e-10)


def test_the_solution_is_the_sum_of_the_powers():
    a, f, _ = operands(20)
    h = as_complex(diagonal_recurrence(a, f))
    t = 20 - torch.arange(21)
    close(h[-1], (as_complex(a) ** t[:, None, None] * as_complex(f)).sum(0))


@in_both_languages
@pytest.mark.parametrize("at", range(5))
def test_a_mask_forgets_nan_in_value_and_derivative(at):
    a, f, _ = operands(6)
    keep = torch.ones(6, 2, dtype=torch.bool)
    keep[at] = False
    f[: at + 1] = torch.nan
    close(diagonal_recurrence(a, f, keep)[at + 1 :], diagonal_recurrence(a, f[at + 1 :]))
    f[:at] = 0.0  # a product of steps that are all before the mask has no finite derivative, here as everywhere
    a.requires_grad_()
    h = diagonal_recurrence(a, f, keep)[at + 1 :]
    (gradient,) = torch.autograd.grad(h.sum(), a)
    close(gradient, torch.autograd.grad(diagonal_recurrence(a, f[at + 1 :]).sum(), a)[0])


class _Work(TorchDispatchMode):
    """Counts operations that compute, and the numbers that they write."""

    def __init__(self):
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.numbers += result.numel()
        return result


def test_twice_the_steps_are_twice_the_work_and_a_constant_number_of_operations_more():
    def work(steps):
        a, f, _ = operands(steps, batch=16)
        with _Work() as counted:
            _solve_by_pairs(a, f, None)
        return counted

    short, middle, long = work(255), work(511), work(1023)
    assert long.numbers / middle.numbers == pytest.approx(2, rel=0.02)
    assert long.operations - middle.operations == middle.operations - short.operations
    assert long.operations < 300  # a loop has more than 1023
