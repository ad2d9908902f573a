"""What the laws in test_scan.py leave open about the perceptron: its values."""

from __future__ import annotations

import torch
from torch.func import grad

from ssmrl.core.perceptron import linear_perceptron, perceptron


def column(*values):
    return torch.tensor(values).view(1, len(values), 1)


W_IN, B_IN, W_OUT = torch.tensor([[3.0]]), torch.tensor([-1.0]), torch.tensor([[0.5]])


def test_two_rows_by_hand():
    # z = relu(2·3 - 1) = 5, y = 5·0.5 + 1 = 3.5; z = relu(-2·3 - 1) = 0, y = 0 + 2 = 2
    y = perceptron(column(2.0, -2.0), column(1.0, 2.0), W_IN, B_IN, W_OUT)
    assert y.flatten().tolist() == [3.5, 2.0]
    # p = 2·3 + 2 = 8, y = 8·0.5 = 4; a slope of 0
    y, p = linear_perceptron(column(2.0, 2.0), column(2.0, 2.0), column(5.0, 0.0), W_IN, W_OUT)
    assert (y.flatten().tolist(), p.flatten().tolist()) == ([4.0, 0.0], [8.0, 0.0])


def test_nan_is_not_hidden():
    solve = lambda w: perceptron(column(torch.nan), column(0.0), w, B_IN, W_OUT).sum()  # noqa: E731
    assert solve(W_IN).isnan()
    assert grad(solve)(W_IN).isnan().all()
