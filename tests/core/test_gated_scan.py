"""What the laws in test_scan.py leave open about gated recurrences."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad

from ssmrl.core.gated_scan import gated_linear_recurrence, gated_recurrence
from ssmrl.core.gru import _GRUCell
from ssmrl.core.lstm import _LSTMCell

T, B, S = 3, 2, 2


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("keep", [None, torch.tensor([True, False, True]).view(T, 1, 1).expand(T, B, 1)])
def test_the_adjoint_is_the_adjoint(keep):
    """<g, v> + <r, u> = <μ, f> + <q, e> for every f, e, g and r, where (v, u) solves for f, e and (μ, q) for g, r."""
    n, m = 2, 4
    f, g = randn(T + 1, B, n * S, seed=0), randn(T + 1, B, n * S, seed=1)
    e, r = randn(T, B, m * S, seed=2), randn(T, B, m * S, seed=3)
    coefficients = randn(T, B, n * n * S, seed=4), randn(T, B, n * m * S, seed=5), randn(S, m * S, seed=6)
    v, u = gated_linear_recurrence(f, e, *coefficients, keep)
    mu, q = gated_linear_recurrence(g, r, *coefficients, keep, adjoint=True)
    torch.testing.assert_close((g * v).sum() + (r * u).sum(), (mu * f).sum() + (q * e).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cell", "n", "m"), [(_GRUCell(), 1, 3), (_LSTMCell(), 2, 4)], ids=["GRU", "LSTM"])
def test_no_steps_return_the_start(cell, n, m):
    start = randn(1, B, n * S, seed=0)
    x = torch.empty(0, B, m * S, dtype=torch.float64)
    w, b = randn(S, m * S, seed=1), randn(m * S, seed=2)
    assert torch.equal(gated_recurrence(cell, start, x, w, b, None), start)


def test_a_mask_forgets_nan_in_value_and_gradient():
    start, x = torch.full((1, B, S), torch.nan, dtype=torch.float64), randn(T, B, 3 * S, seed=1)
    w, b = randn(S, 3 * S, seed=2), randn(3 * S, seed=3)
    keep = torch.ones(T, B, 1, dtype=torch.bool)
    keep[0] = False
    solve = lambda w: gated_recurrence(_GRUCell(), start, x, w, b, keep)[1:].sum()  # noqa: E731
    assert solve(w).isfinite()
    assert grad(solve)(w).isfinite().all()
