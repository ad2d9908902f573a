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
    sum_of_rows,
    targets,
    time_major,
)

N, G, T, B, S, H = 2, 3, 4, 5, 6, 7


@pytest.mark.parametrize(("groups", "weight_groups"), [((), ()), ((G,), (G,)), ((G,), ())])
@pytest.mark.parametrize("weight_dim", [None, 0, 1])
@pytest.mark.parametrize("dim", [None, 0, 2])
def test_a_product_of_folded_operands_is_the_product_of_every_slice(groups, weight_groups, weight_dim, dim):
    weight_shape = (*weight_groups, S, H)
    weights = torch.randn(weight_shape) if weight_dim is None else torch.randn(N, *weight_shape).movedim(0, weight_dim)
    sequences = torch.randn(*groups, T, B, S) if dim is None else torch.randn(N, *groups, T, B, S).movedim(0, dim)
    fold = Fold(N, sequences, dim, (weights,), (weight_dim,))
    product = matmul(fold.sequence(sequences, dim), fold.weight(weights, weight_dim))
    (unfolded, again), (out_dim, _) = fold.unfold(product, 2 * product)
    assert torch.equal(again, 2 * unfolded)
    for i in range(N):
        sequence = sequences if dim is None else sequences.select(dim, i)
        weight = weights if weight_dim is None else weights.select(weight_dim, i)
        expected = sequence @ weight.unsqueeze(-3)
        torch.testing.assert_close(unfolded.select(out_dim, i), expected)


def test_a_mapped_axis_becomes_groups_unless_they_have_weights_and_it_has_none():
    sequence, weight = torch.randn(N, T, B, S), torch.randn(S, H)
    shared = Fold(N, sequence, 0, (weight,), (None,))
    assert shared.weight(weight, None) is weight
    assert shared.sequence(sequence, 0).shape == (N, T, B, S)
    own = Fold(N, sequence, 0, (weight.expand(N, S, H),), (0,))
    assert own.sequence(sequence, 0).shape == (N, T, B, S)
    of_groups = Fold(N, torch.randn(N, G, T, B, S), 0, (weight.expand(G, S, H),), (None,))
    assert of_groups.sequence(torch.randn(N, G, T, B, S), 0).shape == (G, T, N * B, S)
    assert of_groups.optional(None, None) is None


@pytest.mark.parametrize("shared", [True, False])
def test_sums_go_over_steps_batch_and_groups_that_share_a_weight(shared):
    left, right = torch.randn(G, T, B, S), torch.randn(G, T, B, H)
    weight = torch.empty(S, H) if shared else torch.empty(G, S, H)
    to = "" if shared else "g"
    expected = torch.einsum(f"gtbs,gtbh->{to}sh", left, right)
    torch.testing.assert_close(sum_of_outer_products(left, right, weight), expected, rtol=1e-4, atol=1e-5)
    expected = torch.einsum(f"gtbh->{to}h", right)
    torch.testing.assert_close(sum_of_rows(right, weight), expected, rtol=1e-4, atol=1e-5)


def test_time_major_is_contiguous_and_a_copy_where_asked():
    sequence, weight = torch.randn(T, B, S), torch.empty(S, H)
    assert time_major(sequence, weight).data_ptr() == sequence.data_ptr()
    copy = time_major(sequence, weight, copy=True)
    assert torch.equal(copy, sequence)
    assert copy.data_ptr() != sequence.data_ptr()
    groups = torch.randn(G, T, B, S)
    for copied in (False, True):
        own = time_major(groups, weight.expand(G, S, H), copy=copied)
        assert torch.equal(own, groups.movedim(1, 0))
        shared = time_major(groups, weight, copy=copied)
        assert torch.equal(shared, groups.movedim(1, 0).reshape(T, G * B, S))
        for x in (own, shared):
            assert x.is_contiguous()
            assert torch.equal(from_time_major(x, groups), groups)


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
    torch.testing.assert_close(add(x, x), 2 * x)


def test_an_operation_is_one_node_of_a_trace():
    define_operation("test_add_one(Tensor x) -> Tensor", lambda x: (x * 2 + 2) / 2, torch.empty_like)
    graph = make_fx(lambda x: torch.ops.ssmrl.test_add_one(x))(torch.zeros(3))
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == [
        "ssmrl.test_add_one.default"
    ]
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.ops.ssmrl.test_add_one(torch.ones(2, device="meta")).shape == (2,)
