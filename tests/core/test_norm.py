"""LayerNorm against PyTorch's, whose second derivative is right without vmap."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from ssmrl.core import LayerNorm


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def meta_loss(module, params, x):
    loss = lambda p: (functional_call(module, p, (x @ p["mix"],)) ** 3).mean()  # noqa: E731
    adapted = {name: params[name] - 0.1 * g for name, g in grad(loss)(params).items()}
    return (functional_call(module, adapted, (x @ adapted["mix"],)) ** 2).mean()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
def test_value_and_vmapped_meta_gradient_equal_those_of_torch_in_a_loop(options):
    ours, theirs = LayerNorm(5, dtype=torch.float64, **options), nn.LayerNorm(5, dtype=torch.float64, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    params = {name: randn(5, seed=i) for i, (name, _) in enumerate(ours.named_parameters())} | {
        "mix": randn(5, 5, seed=9)
    }
    x = randn(2, 3, 5, seed=8)
    torch.testing.assert_close(functional_call(ours, params, (x,)), functional_call(theirs, params, (x,)))
    found = grad(lambda p: vmap(lambda x: meta_loss(ours, p, x))(x).sum())(params)
    expected = grad(lambda p: meta_loss(theirs, p, x[0]) + meta_loss(theirs, p, x[1]))(params)
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-11)
