"""Trees of any kind: what is there, and whether it is finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from ssmrl.adaptation.tree import all_finite, all_finite_on_host, dot, is_there, tree_leaves, tree_map

over_ways = pytest.mark.parametrize("finite", [all_finite, all_finite_on_host])


class _Pair(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize("nothing", [(), [], {}, ((), {}), _Pair((), ())])
def test_a_tree_without_leaves_is_not_there(nothing):
    assert not is_there(nothing)


@pytest.mark.parametrize("something", [torch.zeros(()), torch.zeros(0), ((), {"x": torch.zeros(1)}), _Pair((), 0)])
def test_a_tree_with_a_leaf_is_there_whatever_its_value(something):
    assert is_there(something)


def test_a_map_keeps_the_structure_and_takes_trees_in_parallel():
    first = _Pair(torch.tensor(1.0), {"x": [torch.tensor(2.0), ()]})
    second = _Pair(torch.tensor(10.0), {"x": [torch.tensor(20.0), ()]})
    mapped = tree_map(torch.add, first, second)
    assert type(mapped) is _Pair
    assert mapped.b["x"][1] == ()
    assert [leaf.item() for leaf in tree_leaves(mapped)] == [11.0, 22.0]


@over_ways
@given(
    leaf=st.integers(0, 2), place=st.integers(0, 3), bad=st.sampled_from([float("nan"), float("inf"), -float("inf")])
)
def test_one_number_that_is_not_finite_anywhere_is_found(finite, leaf, place, bad):
    leaves = [torch.ones(4) for _ in range(3)]
    tree = {"x": (leaves[0], {"y": leaves[1]}), "z": [leaves[2], torch.arange(3), ()]}
    assert bool(finite(tree))
    leaves[leaf][place] = bad
    found: Tensor = finite(tree)
    assert found.shape == ()
    assert found.dtype is torch.bool
    assert not bool(found)


@over_ways
def test_numbers_that_overflow_when_they_are_summed_are_finite(finite):
    assert bool(finite(torch.tensor([3e38, 3e38])))
    assert bool(finite((torch.tensor([3e38, 3e38]), torch.tensor([-3e38, -3e38]))))
    assert not bool(finite(torch.tensor([3e38, 3e38, torch.nan])))


@over_ways
@pytest.mark.parametrize("tree", [(), torch.arange(3), (torch.tensor([True]), {})])
def test_what_holds_no_floating_point_numbers_is_finite(finite, tree):
    assert bool(finite(tree))


@over_ways
def test_leaves_of_several_dtypes_are_looked_at_together(finite):
    assert bool(finite((torch.ones(2), torch.ones(2, dtype=torch.float64))))
    assert not bool(finite((torch.ones(2), torch.tensor([float("nan")], dtype=torch.float64))))


def test_vmap_says_it_of_every_stream():
    numbers = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [float("inf"), 0.0]])
    assert vmap(lambda row, count: all_finite((row, count)))(numbers, torch.arange(3)).tolist() == [True, False, False]


@over_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_and_smallest_numbers_of_a_dtype_are_finite(finite, dtype):
    limits = torch.finfo(dtype)
    assert bool(finite(torch.tensor([limits.max, -limits.max, limits.tiny, -0.0], dtype=dtype)))
    assert bool(finite((torch.empty(0, dtype=dtype), {})))
    assert not bool(finite((torch.empty(0, dtype=dtype), torch.tensor(-float("inf"), dtype=dtype))))


def test_the_product_of_vectors_in_pieces_is_that_of_the_whole():
    left = (torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]]))
    right = (torch.tensor([5.0, 6.0]), torch.tensor([[7.0], [8.0]]))
    assert float(dot(left, right)) == 1 * 5 + 2 * 6 + 3 * 7 + 4 * 8
    with pytest.raises(ValueError, match="shorter"):
        dot(left, right[:1])
