"""Folding a vmapped axis away and back again."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ssmrl.core.axes import (
    Fold,
    add,
    define_operation,
    from_time_major,
    matmul,
    pad_to_targets,
    sources,
    sum_of_outer_products,
    targets,
    time_major,
)

N, G, T, B, S, H = 2, 3, 4, 5, 6, 7


@pytest.mark.parametrize("groups", [(), (G,)])
@pytest.mark.parametrize("weight_dim", [None, 0, 1])
@pytest.mark.parametrize("dim", [None, 0, 2])
def test_a_product_of_folded_operands_is_the_product_of_every_slice(groups, weight_dim, dim):
    weights = torch.randn(*groups, S, H) if weight_dim is None else torch.randn(N, *groups, S, H).movedim(0, weight_dim)
    sequences = torch.randn(*groups, T, B, S) if dim is None else torch.randn(N, *groups, T, B, S).movedim(0, dim)
    fold = Fold(N, (weights,), (weight_dim,))
    product = matmul(fold.sequence(sequences, dim), fold.weight(weights, weight_dim))
    (unfolded, again), (out_dim, _) = fold.unfold(product, 2 * product)
    assert torch.equal(again, 2 * unfolded)
    for i in range(N):
        sequence = sequences if dim is None else sequences.select(dim, i)
        weight = weights if weight_dim is None else weights.select(weight_dim, i)
        expected = sequence @ weight.unsqueeze(-3)
        torch.testing.assert_close(unfolded.select(out_dim, i), expected)


def test_shared_weights_stay_one_product_and_batched_ones_become_groups():
    sequence, weight = torch.randn(N, T, B, S), torch.randn(S, H)
    shared = Fold(N, (weight,), (None,))
    assert shared.weight(weight, None) is weight
    assert shared.sequence(sequence, 0).shape == (T, N * B, S)
    own = Fold(N, (weight.expand(N, S, H),), (0,))
    assert own.sequence(sequence, 0).shape == (N, T, B, S)


def test_outer_products_are_summed_over_steps_and_batch():
    left, right = torch.randn(G, T, B, S), torch.randn(G, T, B, H)
    torch.testing.assert_close(
        sum_of_outer_products(left, right), torch.einsum("gtbs,gtbh->gsh", left, right), rtol=1e-4, atol=1e-5
    )


def test_time_major_is_contiguous_and_a_copy_where_asked():
    sequence = torch.randn(T, B, S)
    assert time_major(sequence).data_ptr() == sequence.data_ptr()
    copy = time_major(sequence, copy=True)
    assert torch.equal(copy, sequence)
    assert copy.data_ptr() != sequence.data_ptr()
    groups = torch.randn(G, T, B, S)
    for copy in (time_major(groups), time_major(groups, copy=True)):
        assert torch.equal(copy, groups.movedim(1, 0))
        assert copy.is_contiguous()
    assert torch.equal(from_time_major(time_major(groups)), groups)


def test_sources_and_targets_of_steps():
    h = torch.arange(4.0).view(4, 1, 1)
    assert sources(h, None).flatten().tolist() == [0.0, 1.0, 2.0]
    assert sources(h, torch.tensor([True, False, True]).view(3, 1, 1)).flatten().tolist() == [0.0, 0.0, 2.0]
    assert targets(h).flatten().tolist() == [1.0, 2.0, 3.0]
    assert pad_to_targets(targets(h), adjoint=False).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert pad_to_targets(targets(h), adjoint=True).flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


def test_nothing_adds_nothing():
    x = torch.ones(2)
    assert add(None, None) is None
    assert add(x, None) is x
    assert add(None, x) is x
    assert torch.equal(add(x, x), 2 * x)


def test_an_operation_is_one_node_of_a_trace():
    define_operation("test_add_one(Tensor x) -> Tensor", lambda x: (x * 2 + 2) / 2, torch.empty_like)
    graph = make_fx(lambda x: torch.ops.ssmrl.test_add_one(x))(torch.zeros(3))
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == [
        "ssmrl.test_add_one.default"
    ]
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.ops.ssmrl.test_add_one(torch.ones(2, device="meta")).shape == (2,)
