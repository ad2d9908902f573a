"""Losses against hand-computed values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from ssmrl.adaptation import mse_loss


def test_mse_by_hand():
    loss = mse_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    assert loss.shape == ()
    assert loss == (4 + 9) / 4


def test_the_gradient_of_mse_by_hand():
    # d/dy mean (y - t)² = 2(y - t)/n
    gradient = grad(mse_loss)(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0]))
    assert gradient.tolist() == [-2.0, 3.0]


shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@given(output=shapes, target=shapes)
def test_shapes_that_differ_are_refused_and_never_broadcast(output, target):
    if output == target:
        assert mse_loss(torch.zeros(output), torch.ones(target)) == 1
    else:
        with pytest.raises(ValueError, match="The target must have the shape of the model's output"):
            mse_loss(torch.zeros(output), torch.ones(target))


def test_the_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"model's output, \(4, 1\); got \(4,\)"):
        mse_loss(torch.zeros(4, 1), torch.zeros(4))


def test_vmap_over_tasks_equals_a_loop():
    output, target = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    each = torch.stack([mse_loss(output[i], target[i]) for i in range(3)])
    torch.testing.assert_close(vmap(mse_loss)(output, target), each)
