"""The loops in C++ against those in Python, over sizes that take every path of the small matrix product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmrl.core import native  # and with it all operations

pytestmark = pytest.mark.skipif(not native.is_available(), reason="built without a compiler")

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-12}


def arguments(
    kind, groups, steps, batch, state, hidden, dtype, *, resets=False, extra=False, shared=False, mirrored=False
):
    """Of the operation, in its order. `mirrored`: weights lie in memory column by column."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*groups, *shape, generator=generator, dtype=dtype)

    def weight(*shape):
        own = () if shared else groups
        w = shape[0] ** -0.5 * torch.randn(*own, *shape, generator=generator, dtype=dtype)
        return w.mT.contiguous().mT if mirrored and len(shape) == 2 else w

    keep = torch.rand(*groups, steps, batch, 1, generator=generator) > 0.3 if resets else None
    sequence = randn(steps + 1, batch, state)
    if kind == "mlp":
        return sequence, weight(state, hidden), weight(hidden), weight(hidden, state), keep
    a, z = randn(steps, batch, hidden) if extra else None, randn(steps, batch, hidden).relu()
    if kind == "linear":
        return sequence, a, z, weight(state, hidden), weight(hidden, state), keep
    if kind == "perceptron":
        x, f = randn(steps, batch, state), randn(steps, batch, 5)
        return x, f, weight(state, hidden), weight(hidden), weight(hidden, 5)
    if kind == "linear_perceptron":
        return randn(steps, batch, state), a, z, weight(state, hidden), weight(hidden, 5)
    if kind == "diagonal":
        return weight(2, state), randn(steps + 1, batch, 2 * state), keep
    n, m = {"gru": (1, 3), "lstm": (2, 4), "gated": (2, 3)}[kind]
    if kind == "gated":
        f, e = randn(steps + 1, batch, n * state), randn(steps, batch, m * state) if extra else None
        coefficients = 0.3 * randn(steps, batch, n * n * state), 0.3 * randn(steps, batch, n * m * state)
        return f, e, *coefficients, weight(state, m * state), keep
    w, b = weight(state, m * state), weight(m * state)
    return randn(1, batch, n * state), randn(steps, batch, m * state), w, b, keep


OPERATIONS = {
    "mlp": ("mlp_recurrence", ()),
    "linear": ("linear_recurrence", (False,)),
    "linear, adjoint": ("linear_recurrence", (True,)),
    "perceptron": ("perceptron", ()),
    "linear_perceptron": ("linear_perceptron", ()),
    "gated": ("gated_linear_recurrence", (False,)),
    "gated, adjoint": ("gated_linear_recurrence", (True,)),
    "diagonal": ("diagonal_recurrence", (False,)),
    "diagonal, adjoint": ("diagonal_recurrence", (True,)),
    "gru": ("gru_recurrence", ()),
    "lstm": ("lstm_recurrence", ()),
}


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(OPERATIONS)),
    groups=st.sampled_from([(), (1,), (3,)]),
    steps=st.integers(0, 4),
    batch=st.integers(0, 11),
    state=st.integers(1, 40),
    hidden=st.sampled_from([1, 5, 16, 31, 33, 130, 257]),
    dtype=st.sampled_from(sorted(TOLERANCES, key=str)),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("resets", "extra", "shared", "mirrored")}),
)
def test_equal_to_the_loops_in_python(kind, groups, steps, batch, state, hidden, dtype, options):
    name, flags = OPERATIONS[kind]
    operation = getattr(torch.ops.ssmrl, name)
    operands = arguments(kind.split(",")[0], groups, steps, batch, state, hidden, dtype, **options)
    ours = operation(*operands, *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "run", lambda *_, **__: False)
        theirs = operation(*operands, *flags)
    for x, y in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        assert x.shape == y.shape
        assert x.is_contiguous()
        scale = y.abs().max().clamp(min=1.0) if y.numel() else 1.0
        torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mlp", "diagonal", "diagonal, adjoint"])
def test_every_number_of_threads_gives_the_same_bits(kind, threads):
    name, flags = OPERATIONS[kind]
    operation = getattr(torch.ops.ssmrl, name)
    operands = arguments(kind.split(",")[0], (7,), 70, 13, 17, 33, torch.float32, resets=True)
    expected = as_tuple(operation(*operands, *flags))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(as_tuple(operation(*operands, *flags)), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gates_saturate_without_overflow_and_pass_nan_on(kind, dtype):
    """Sigmoid and tanh of ±1e4 are 0, 1 and ±1; of NaN, NaN."""
    start, x, w, b, keep = arguments(kind, (), 1, 4, 20, 0, dtype)
    x = 1e4 * x.sign()
    with pytest.MonkeyPatch.context() as patch:
        ours, _ = getattr(torch.ops.ssmrl, f"{kind}_recurrence")(start, x, w, b, keep)
        patch.setattr(native, "run", lambda *_, **__: False)
        theirs, _ = getattr(torch.ops.ssmrl, f"{kind}_recurrence")(start, x, w, b, keep)
    torch.testing.assert_close(ours, theirs)
    x[0, 2] = torch.nan
    ours, _ = getattr(torch.ops.ssmrl, f"{kind}_recurrence")(start, x, w, b, keep)
    assert ours[1, 2].isnan().all()
    assert ours[1, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gates_are_accurate_where_they_are_small(kind):
    """A step from 0 with tiny inputs is linear in them: no digits are lost in e^x - 1."""
    n, m = {"gru": (1, 3), "lstm": (2, 4)}[kind]
    start, w, b = torch.zeros(1, 1, n * 16), torch.zeros(16, m * 16), torch.zeros(m * 16)
    x = torch.full((1, 1, m * 16), 1e-6)
    ours, _ = getattr(torch.ops.ssmrl, f"{kind}_recurrence")(start, x, w, b, None)
    candidate = 0.5 * 1e-6 if kind == "gru" else 0.5 * (0.5 * 1e-6)  # (1 - z) n, and o tanh(i g)
    torch.testing.assert_close(ours[1, 0, :16], torch.full((16,), candidate), rtol=1e-5, atol=0)


def test_other_dtypes_run_in_python():
    operands = [None if x is None else x.bfloat16() for x in arguments("mlp", (), 3, 2, 4, 5, torch.float64)]
    h, z = torch.ops.ssmrl.mlp_recurrence(*operands)
    assert h.dtype == z.dtype == torch.bfloat16
    assert not native.run("mlp", operands, (h, z))
