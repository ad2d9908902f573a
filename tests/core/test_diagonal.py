"""DiagonalSSM: against complex numbers and closed forms."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import gelu

from ssmrl.core import DiagonalSSM

D, O, S, H = 3, 2, 4, 5  # noqa: E741


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def pairs(z):
    """Complex (..., S) -> real (..., 2, S)."""
    return torch.stack([z.real, z.imag], -2)


def as_complex(x):
    return torch.complex(*x.unbind(-2))


def only_layer(model) -> Any:
    (layer,) = model.layers
    return layer


def discretised(model):
    """λ̄ (2, S) and B̄ (2, S, H) of the only layer."""
    (lambda_bar,), (b_bar,) = model._discretise()
    return lambda_bar, b_bar


def make(**options):
    torch.manual_seed(0)
    return DiagonalSSM(S, D, O, hidden_dim=H, **options).double()


def test_the_size_for_17_inputs_and_6_outputs_is_168710_parameters():
    # 17·128 + 128 + 2 (256 + 3·128 + 2·128·128 + 2·128·128 + 128 + 128·128 + 128) + 128·6 + 6
    model = DiagonalSSM(state_dim=128, input_dim=17, output_dim=6)
    assert sum(p.numel() for p in model.parameters()) == 168_710


def test_the_start_is_s4d_lin():
    torch.manual_seed(0)
    layer = only_layer(DiagonalSSM(4000, 1, 1, hidden_dim=2, num_layers=1))
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    torch.testing.assert_close(-layer.log_minus_re_lambda.exp(), torch.full((4000,), -0.5))
    assert layer.im_lambda[:3].tolist() == pytest.approx([0, math.pi, 2 * math.pi])
    dt = layer.log_dt.detach().exp()
    assert dt.min() == pytest.approx(0.001, rel=0.02)
    assert dt.max() == pytest.approx(0.1, rel=0.02)
    assert dt.log().mean().exp() == pytest.approx(0.01, rel=0.1)  # log-uniform: the middle is the geometric mean
    assert layer.b.detach().std() == pytest.approx((2 * 2) ** -0.5, rel=0.05)
    assert layer.c.detach().std() == pytest.approx((2 * 4000) ** -0.5, rel=0.05)


def test_zero_order_hold_by_hand():
    model = DiagonalSSM(1, 1, 1, hidden_dim=1, num_layers=1).double()
    layer = only_layer(model)
    with torch.no_grad():
        layer.log_minus_re_lambda.zero_()
        layer.im_lambda.zero_()
        layer.log_dt.fill_(math.log(math.log(2)))
        layer.b[:, 0, 0] = torch.tensor([3.0, -5.0])
    # λ = -1, Δ = log 2: λ̄ = 1/2, (λ̄ - 1)/λ = 1/2
    lambda_bar, b_bar = discretised(model)
    close(lambda_bar.flatten(), torch.tensor([0.5, 0.0], dtype=torch.float64))
    close(b_bar.flatten(), torch.tensor([1.5, -2.5], dtype=torch.float64))


def test_zero_order_hold_equals_that_of_complex_numbers():
    model = make(num_layers=1).requires_grad_(False)
    layer = only_layer(model)
    lambda_bar, b_bar = discretised(model)
    for n in range(S):
        eigenvalue = complex(-math.exp(layer.log_minus_re_lambda[n]), layer.im_lambda[n])
        bar = cmath.exp(eigenvalue * math.exp(layer.log_dt[n]))
        assert complex(*lambda_bar[:, n]) == pytest.approx(bar, rel=1e-12)
        for j in range(H):
            expected = (bar - 1) / eigenvalue * complex(*layer.b[:, n, j])
            assert complex(*b_bar[:, n, j]) == pytest.approx(expected, rel=1e-12)


def test_small_time_steps_do_not_cancel_in_float32():
    model = DiagonalSSM(4, 1, 1, hidden_dim=1, num_layers=1)
    nn.init.constant_(only_layer(model).log_dt, math.log(1e-6))
    narrow = discretised(model)[1]
    torch.testing.assert_close(narrow, discretised(model.double())[1].float(), rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_parameters_make_it_grow(seed):
    model = make(num_layers=1)
    layer = only_layer(model)
    with torch.no_grad():
        for i, p in enumerate((layer.log_minus_re_lambda, layer.im_lambda, layer.log_dt)):
            p.copy_(3 * randn(S, seed=seed + i))
    lambda_bar, _ = discretised(model)
    assert (lambda_bar.square().sum(0) < 1).all()


def test_a_known_system_is_reproduced():
    """λ, B, C, D, Δ chosen by hand; the outputs from the equations, in Python's complex numbers."""
    model = DiagonalSSM(2, 1, 1, hidden_dim=2, num_layers=1).double()
    layer = only_layer(model)
    eigenvalues, steps = [complex(-1.0, 2.0), complex(-0.25, -3.0)], [0.5, 0.125]
    b = [[complex(1, 2), complex(-1, 0.5)], [complex(0.5, -1), complex(2, 1)]]
    c = [[complex(0.3, 0.7), complex(-0.2, 0.4)], [complex(1.1, -0.6), complex(0.9, 0.8)]]
    d = [0.5, -1.5]
    gate, bias = [[0.2, -0.3], [0.6, 0.1]], [0.05, -0.4]

    def parameter(values):
        return torch.tensor(values, dtype=torch.float64)

    with torch.no_grad():
        model.input.weight.copy_(parameter([[2.0], [-1.0]]))
        model.input.bias.copy_(parameter([0.3, 0.1]))
        model.output.weight.copy_(parameter([[1.5, -0.5]]))
        model.output.bias.copy_(parameter([0.25]))
        layer.log_minus_re_lambda.copy_(parameter([math.log(-e.real) for e in eigenvalues]))
        layer.im_lambda.copy_(parameter([e.imag for e in eigenvalues]))
        layer.log_dt.copy_(parameter([math.log(dt) for dt in steps]))
        layer.b.copy_(parameter([[[z.real for z in row] for row in b], [[z.imag for z in row] for row in b]]))
        layer.c.copy_(parameter([[[z.real for z in row], [z.imag for z in row]] for row in c]))
        layer.d.copy_(parameter(d))
        layer.gate.weight.copy_(parameter(gate))
        layer.gate.bias.copy_(parameter(bias))

    inputs = [1.0, -0.5, 2.0, 0.25, -3.0]
    h, outputs = [0j, 0j], []
    for x in inputs:
        v = [2.0 * x + 0.3, -1.0 * x + 0.1]
        mean = sum(v) / 2
        deviation = math.sqrt(sum((w - mean) ** 2 for w in v) / 2 + 1e-5)
        u = [(w - mean) / deviation for w in v]
        bar = [cmath.exp(e * dt) for e, dt in zip(eigenvalues, steps, strict=True)]
        drive = [(bar[n] - 1) / eigenvalues[n] * (b[n][0] * u[0] + b[n][1] * u[1]) for n in range(2)]
        h = [bar[n] * h[n] + drive[n] for n in range(2)]
        pre = [2 * (c[j][0] * h[0] + c[j][1] * h[1]).real + d[j] * u[j] for j in range(2)]
        g = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in pre]
        s = [1 / (1 + math.exp(-(gate[j][0] * g[0] + gate[j][1] * g[1] + bias[j]))) for j in range(2)]
        v = [v[j] + g[j] * s[j] for j in range(2)]
        outputs.append(1.5 * v[0] - 0.5 * v[1] + 0.25)
    y, state = model(parameter(inputs).view(1, -1, 1))
    close(y.flatten(), parameter(outputs))
    close(as_complex(state)[0, 0], torch.tensor(h, dtype=torch.complex128))


def test_a_sequence_equals_its_equations_step_by_step():
    model = make()
    x, state = randn(2, 300, D, seed=5), randn(2, 2, 2, S, seed=6)
    reset = randn(2, 300, seed=7) > 1.5
    v, last = model.input(x), []
    layers: Any = model.layers
    for index, (layer, *discrete) in enumerate(zip(layers, *model._discretise(), strict=True)):
        u = layer.norm(v)
        lambda_bar, b_bar = as_complex(discrete[0]), as_complex(discrete[1].movedim(0, -2))
        c = as_complex(layer.c)
        h, g = as_complex(state[:, index]), []
        for t in range(300):
            h = lambda_bar * torch.where(reset[:, t, None], 0.0, h) + u[:, t].to(b_bar) @ b_bar.T
            g.append(gelu(2 * (h @ c.T).real + layer.d * u[:, t]))
        gated = torch.stack(g, 1)
        v = v + gated * torch.sigmoid(layer.gate(gated))
        last.append(pairs(h))
    y, after = model(x, state, reset)
    close(y, model.output(v), tolerance=1e-10)
    close(after, torch.stack(last, 1), tolerance=1e-10)


def test_the_initial_state_is_zero():
    assert torch.equal(make().init_hidden(3), torch.zeros(3, 2, 2, S, dtype=torch.float64))


def test_the_defaults_are_two_layers_of_128():
    arguments = DiagonalSSM(2, 1, 1).constructor_arguments
    assert (arguments["hidden_dim"], arguments["num_layers"]) == (128, 2)
    assert len(DiagonalSSM(2, 1, 1, num_layers=3).layers) == 3


@pytest.mark.parametrize("name", ["state_dim", "input_dim", "output_dim", "hidden_dim", "num_layers"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sizes_that_are_not_positive_integers_are_refused(name, value):
    sizes = {"state_dim": 2, "input_dim": 2, "output_dim": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {value!r}"):
        DiagonalSSM(**sizes)


def test_weights_are_made_on_the_device():
    assert all(p.is_meta for p in make(device="meta").parameters())
