"""Transformer: against torch's own encoder layers, its window, its positions, its cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssmrl.core import Transformer, TransformerState

D, O, M = 3, 2, 8  # noqa: E741


def make(window=4, num_layers=2, **options):
    torch.manual_seed(0)
    return Transformer(M, D, O, hidden_dim=12, num_layers=num_layers, num_heads=2, window=window, **options).double()


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def sinusoids(positions, width):
    """PE(p)_{2i} = sin(p / 10000^{2i/M}), PE(p)_{2i+1} = cos(p / 10000^{2i/M}), entry by entry."""
    waves = [
        [(math.sin, math.cos)[j % 2](p / 10_000 ** ((j - j % 2) / width)) for j in range(width)] for p in positions
    ]
    return torch.tensor(waves, dtype=torch.float64)


def reference(model, x, positions=None):
    """torch.nn.TransformerEncoderLayer with the model's weights, under a causal mask of a band."""
    steps = x.shape[1]
    z = model.input(x) + sinusoids(range(steps) if positions is None else positions, model.model_dim)
    t, s = torch.arange(steps)[:, None], torch.arange(steps)
    forbidden = (s > t) | (s < t - model.window)
    for ours in model.layers:
        layer = nn.TransformerEncoderLayer(
            model.model_dim, model.num_heads, model.hidden_dim, dropout=0.0, batch_first=True, norm_first=True
        ).double()
        pairs = {
            "self_attn.in_proj_": ours.queries_keys_values,
            "self_attn.out_proj.": ours.attention_out,
            "linear1.": ours.hidden,
            "linear2.": ours.out,
            "norm1.": ours.attention_norm,
            "norm2.": ours.feed_forward_norm,
        }
        layer.load_state_dict({f"{name}{key}": v for name, m in pairs.items() for key, v in m.state_dict().items()})
        with sdpa_kernel(SDPBackend.MATH):  # the only one with a second derivative
            z = layer(z, src_mask=forbidden)
    return model.output(z)


def test_the_size_for_17_inputs_and_6_outputs_is_399622_parameters():
    model = Transformer(model_dim=128, input_dim=17, output_dim=6)
    assert sum(p.numel() for p in model.parameters()) == 399_622


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_sequence_equals_torch_s_encoder_under_a_banded_mask(window, num_layers):
    model, x = make(window, num_layers), randn(3, 20, D)
    with torch.no_grad():  # biases and norms that do something
        for i, p in enumerate(model.parameters()):
            p.add_(0.2 * randn(*p.shape, seed=i))
    close(model(x)[0], reference(model, x))


def test_the_second_derivative_equals_that_of_torch_s_encoder():
    model, x = make(), randn(2, 9, D)

    def curvature(function):
        first = torch.autograd.grad(function(model, x).pow(2).sum(), tuple(model.parameters()), create_graph=True)
        return torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), tuple(model.parameters()))

    ours = curvature(lambda model, x: model(x)[0])
    # The layers of the reference hold copies, so its parameters are ours only through functions of x: compare there.
    x.requires_grad_()

    def in_x(function):
        (first,) = torch.autograd.grad(function(model, x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    close(in_x(lambda model, x: model(x)[0]), in_x(reference))
    assert all(g.isfinite().all() and g.norm() > 0 for g in ours)


def test_cached_steps_equal_the_full_pass_over_many_windows():
    model, x = make(window=7), randn(2, 60, D)
    full = reference(model, x)
    state, steps = model.init_hidden(2), []
    for t in range(60):
        y, state = model(x[:, t], state)
        steps.append(y)
    close(torch.stack(steps, 1), full)
    close(model(x[:, :33])[1].keys, model(x[:, 20:33], model(x[:, :20])[1])[1].keys)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_output_depends_on_the_window_of_every_layer_and_on_nothing_older(num_layers):
    model, x = make(window=3, num_layers=num_layers), randn(1, 12, D).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0][0, 10].sum(), x)
    sees = (gradient[0] != 0).all(-1).tolist()
    oldest = 10 - 3 * num_layers
    assert sees == [oldest <= t <= 10 for t in range(12)]
    assert (gradient[0, :oldest] == 0).all()


def test_positions_are_sines_and_cosines_of_the_steps_since_the_start():
    model = make()
    wide = model._position_encoding(torch.tensor([[0, 1, 5000]]))
    close(wide[0], sinusoids([0, 1, 5000], M))
    assert wide[0, 0].tolist() == [0, 1] * (M // 2)


def test_positions_count_from_the_start_of_the_episode():
    model, x = make(window=3), randn(2, 10, D)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 4] = reset[0, 7] = True
    y, state = model(x, None, reset)
    assert state.position.tolist() == [3, 10]
    assert model(x[:, 0], state)[1].position.tolist() == [4, 11]
    assert model(x[:, 0], state, torch.tensor([False, True]))[1].position.tolist() == [4, 1]
    close(y[0, 4:7], reference(model, x[:1, 4:7])[0])
    close(y[0, 7:], reference(model, x[:1, 7:])[0])
    late = state._replace(position=torch.tensor([3, 100]))
    close(
        model(x[1:, 0], TransformerState(*(s[1:] for s in state)))[0],
        reference(model, torch.cat([x[1:], x[1:, :1]], 1))[:, 10],
    )
    assert (model(x[:, 0], late)[0] - model(x[:, 0], state)[0]).abs().amax(1).gt(1e-6).tolist() == [False, True]


def test_bfloat16_tells_late_positions_apart():
    model = make().bfloat16()
    assert not torch.equal(*model._position_encoding(torch.tensor([1000, 1001])))


def test_what_the_position_says_is_not_there_is_not_read():
    model, x = make(window=4), randn(1, 2, D)
    _, state = model(x)
    noise = state._replace(keys=state.keys.clone(), values=state.values.clone())
    assert (state.keys[:, :, :2] == 0).all()
    assert (state.keys[:, :, 2:] != 0).all()
    noise.keys[:, :, :2] = 7.0
    noise.values[:, :, :2] = math.nan
    ours, theirs = model(x, noise), model(x, state)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


def test_nan_in_the_cache_is_seen_until_it_leaves_the_window():
    model, x = make(window=3, num_layers=1), randn(1, 8, D)
    _, state = model(x[:, :2])
    state.values[0, 0, -1] = math.nan
    y, last = model(x, state)
    assert y[0].isnan().all(-1).tolist() == [True] * 3 + [False] * 5
    assert last.values.isfinite().all()


def test_a_step_leaves_the_state_it_was_given_alone():
    model, x = make(), randn(2, 3, D)
    _, state = model(x)
    copies = [s.clone() for s in state]
    model(x[:, 0], state, torch.tensor([True, False]))
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


def test_the_initial_state_is_an_empty_cache_at_position_zero():
    keys, values, position = make(window=5).init_hidden(3)
    assert torch.equal(keys, torch.zeros(3, 2, 5, M, dtype=torch.float64))
    assert torch.equal(values, keys)
    assert values.data_ptr() != keys.data_ptr()
    assert torch.equal(position, torch.zeros(3, dtype=torch.int64))


def test_the_defaults_are_two_layers_four_heads_width_512_and_a_window_of_64():
    assert Transformer(8, D, O).constructor_arguments == {
        "model_dim": 8,
        "input_dim": D,
        "output_dim": O,
        "hidden_dim": 512,
        "num_layers": 2,
        "num_heads": 4,
        "window": 64,
    }


def test_the_heads_change_the_output():
    one, two = Transformer(M, D, O, num_heads=1), Transformer(M, D, O, num_heads=2)
    two.load_state_dict(one.state_dict())
    x = torch.randn(1, 5, D)
    assert (one(x)[0] - two(x)[0]).abs().max() > 1e-4


@pytest.mark.parametrize(("model_dim", "num_heads"), [(6, 4), (9, 3)], ids=["no multiple of the heads", "odd"])
def test_a_width_that_cannot_be_split_is_refused(model_dim, num_heads):
    with pytest.raises(
        ValueError, match=f"model_dim must be even.* multiple of num_heads = {num_heads}; got {model_dim}"
    ):
        Transformer(model_dim, D, O, num_heads=num_heads)


@pytest.mark.parametrize(
    "name", ["model_dim", "input_dim", "output_dim", "hidden_dim", "num_layers", "num_heads", "window"]
)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sizes_that_are_not_positive_integers_are_refused(name, value):
    sizes = {"model_dim": 8, "input_dim": 2, "output_dim": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {value!r}"):
        Transformer(**sizes)


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="hidden_state must be a TransformerState; got Tensor"):
        make()(randn(2, D), randn(2, 4))


@pytest.mark.parametrize(
    ("position", "got"),
    [
        (torch.zeros(2, dtype=torch.int32), r"torch.int32 \(2,\)"),
        (torch.zeros(3, dtype=torch.int64), r"torch.int64 \(3,\)"),
        (0, "int"),
    ],
)
def test_a_bad_position_is_refused(position, got):
    model = make()
    state = model.init_hidden(2)._replace(position=position)
    with pytest.raises(ValueError, match=rf"position must be .* torch.int64 and shape \(2,\); got {got}"):
        model(randn(2, D), state)


def test_values_of_another_window_are_refused():
    model = make(window=4)
    state = model.init_hidden(2)
    with pytest.raises(ValueError, match=r"hidden_state.values must have shape \(2, 2, 4, 8\).*got \(2, 2, 3, 8\)"):
        model(randn(2, D), state._replace(values=state.values[:, :, 1:]))


def test_weights_are_made_on_the_device():
    assert all(p.is_meta for p in make(device="meta").parameters())
