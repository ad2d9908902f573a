"""A model with context parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssmrl.core import GRU, WithContext, functional_forward
from ssmrl.meta_rl import MetaMAML


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2)])
def test_the_context_is_an_input_like_the_others(shape):
    torch.manual_seed(0)
    model = WithContext(GRU(4, 2 + 3, 1), 3)
    x = torch.randn(*shape)
    context = torch.randn(3)
    output, state = functional_forward(model, {"context": context}, x)
    wide = torch.cat([x, context.expand(*shape[:-1], 3)], dim=-1)
    inner: Any = model.model
    expected, expected_state = inner(wide, inner.init_hidden(3))
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)


def test_the_context_is_zero_at_first():
    model = WithContext(nn.Linear(5, 1), 3)
    x = torch.randn(4, 2)
    inner: Any = model.model
    torch.testing.assert_close(model(x), x @ inner.weight[:, :2].mT + inner.bias)


def test_a_model_without_a_state_stays_one():
    assert not hasattr(WithContext(nn.Linear(5, 1), 3), "init_hidden")


def test_adapting_the_context_alone_is_cavia():
    torch.manual_seed(0)
    model = WithContext(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), 3)
    outer = torch.optim.Adam(model.model.parameters(), lr=0.01)
    maml = MetaMAML(model, 0.5, outer_optimizer=outer, adapted="context", inner_steps=2)
    x = torch.randn(8, 10, 1)
    tasks = (x, x * torch.linspace(-1, 1, 8)[:, None, None], x, x * torch.linspace(-1, 1, 8)[:, None, None])
    fast = maml.adapt_task(tasks[0][0], tasks[1][0])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, fast[name])}
    assert changed == {"context"}
    first = maml.meta_update(tasks)
    for _ in range(50):
        last = maml.meta_update(tasks)
    assert last < 0.5 * first
    assert not model.context.any()


def test_a_context_without_parameters_is_refused():
    with pytest.raises(ValueError, match="context_dim must be a positive integer; got 0"):
        WithContext(nn.Linear(2, 1), 0)
