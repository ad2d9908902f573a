"""How tasks are checked, stacked by shape, and given their initial states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmrl.core import MLPState
from ssmrl.meta_rl import Task
from ssmrl.meta_rl.tasks import expand_state, group_tasks

LIKE = torch.zeros(1)

batches = st.integers(1, 3)
shapes = st.tuples(batches, st.integers(1, 3), batches, st.integers(1, 3))


def make_task(batch=3, steps=4, query_batch=None, query_steps=None):
    query = (query_batch or batch, query_steps or steps)
    return Task(
        torch.randn(batch, steps, 2), torch.randn(batch, steps, 1), torch.randn(*query, 2), torch.randn(*query, 1)
    )


def stacked(tasks):
    return Task(*(torch.stack(field) for field in zip(*tasks, strict=True)))


@settings(max_examples=30, deadline=None)
@given(drawn=st.lists(shapes, min_size=1, max_size=6))
def test_groups_hold_every_task_once_with_those_of_its_shape(drawn):
    tasks = [make_task(*shape) for shape in drawn]
    groups = group_tasks(tasks, None, LIKE)
    assert sorted(i for group in groups for i in group.indices) == list(range(len(tasks)))
    assert len(groups) == len(set(drawn))
    for group in groups:
        for ours, theirs in zip(group.tasks, stacked([tasks[i] for i in group.indices]), strict=True):
            assert torch.equal(ours, theirs)


def test_a_stack_is_one_group_as_it_is():
    stack = stacked([make_task(), make_task()])
    (group,) = group_tasks(tuple(stack), None, LIKE)
    assert group.indices == [0, 1]
    assert all(ours is theirs for ours, theirs in zip(group.tasks, stack, strict=True))
    assert group.initial_state is None
    assert group.state_axis is None


def test_four_tasks_in_a_tuple_are_a_list_and_not_a_stack():
    tasks = tuple(make_task() for _ in range(4))
    (group,) = group_tasks(tasks, None, LIKE)
    assert group.indices == [0, 1, 2, 3]


def test_tasks_with_labels_of_another_dtype_are_a_group_of_their_own():
    x, y = torch.randn(3, 2), torch.zeros(3)
    groups = group_tasks([(x, y, x, y), (x, y.long(), x, y.long())], None, LIKE)
    assert [group.indices for group in groups] == [[0], [1]]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_batch_one_or_the_tasks_batch_is_shared_as_it_is(rows):
    state = torch.randn(rows, 5)
    (group,) = group_tasks([make_task(), make_task()], state, LIKE)
    assert group.initial_state is state
    assert group.state_axis is None


class _Pair(NamedTuple):
    a: Tensor
    b: Any


@pytest.mark.parametrize("state", [(), {}, MLPState()])
def test_a_state_without_tensors_is_shared_by_tasks_of_every_batch(state):
    groups = group_tasks([make_task(3), make_task(2, query_batch=4)], state, LIKE)
    assert [group.initial_state for group in groups] == [state, state]
    assert [group.state_axis for group in groups] == [None, None]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(batches, min_size=2, max_size=5))
def test_a_state_of_the_sum_is_split_in_the_order_of_the_tasks(sizes):
    rows = torch.arange(sum(sizes))
    groups = group_tasks([make_task(size) for size in sizes], _Pair(rows, [rows[:, None]]), LIKE)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for group in groups:
        assert group.state_axis == 0
        assert type(group.initial_state) is _Pair
        for i, index in enumerate(group.indices):
            assert torch.equal(group.initial_state.a[i], rows[owners == index])
            assert torch.equal(group.initial_state.b[0][i, :, 0], rows[owners == index])


def test_expand_state_repeats_batch_one_and_nothing_else():
    state = _Pair(torch.tensor([[1.0, 2.0]]), [torch.tensor([[3.0], [4.0]])])
    expanded = expand_state(state, 2)
    assert expanded.a.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert expanded.b[0] is state.b[0]
    assert expand_state(None, 2) is None


@pytest.mark.parametrize("rows", [2, 4, 7])
def test_a_state_of_any_other_batch_is_refused(rows):
    with pytest.raises(ValueError, match=rf"batch of 1 .* one of \[3\] .* the sum 6 .*; got {rows}\."):
        group_tasks([make_task(), make_task()], torch.zeros(rows, 5), LIKE)


@pytest.mark.parametrize(
    "state",
    [
        _Pair(torch.zeros(3, 1), torch.zeros(6, 1)),
        torch.tensor(0.0),
        0.0,
        np.zeros((3, 5)),
        _Pair(torch.zeros(3, 1), 3),
    ],
    ids=["two batches", "no batch", "a number", "an array", "a tensor and a number"],
)
def test_a_state_whose_leaves_disagree_or_are_no_tensors_is_refused(state):
    with pytest.raises(ValueError, match="got leaves that disagree, or no tensors"):
        group_tasks([make_task(), make_task()], state, LIKE)


def test_a_state_cannot_be_split_where_support_and_query_differ_in_batch():
    with pytest.raises(ValueError, match=r"whose support and query sets have the same one; got 6\."):
        group_tasks([make_task(3, 4, 2), make_task(3, 4, 2)], torch.zeros(6, 5), LIKE)


def test_a_state_of_the_tasks_batch_is_refused_where_tasks_differ_in_batch():
    with pytest.raises(ValueError, match=r"one of \[2, 3\] .* the sum 5 .*; got 3\."):
        group_tasks([make_task(3), make_task(2)], torch.zeros(3, 5), LIKE)


def test_what_is_no_sequence_of_tasks_is_refused():
    tasks: Any = iter([make_task()])
    with pytest.raises(TypeError, match=r"tasks must be a sequence of .* tuples, .*; got list_iterator"):
        group_tasks(tasks, None, LIKE)


@pytest.mark.parametrize(
    ("entry", "got"),
    [
        (torch.zeros(3, 2), r"Tensor\. A stack of tasks is a tuple of four tensors, not a list"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), "tuple of 2"),
        ([torch.zeros(3, 2)] * 5, "list of 5"),
        (None, "NoneType"),
    ],
)
def test_a_task_that_is_no_tuple_of_four_is_refused_by_its_index(entry, got):
    with pytest.raises(ValueError, match=rf"tasks\[1\] must be a tuple \(support_x, .*; got {got}\."):
        group_tasks([make_task(), entry], None, LIKE)


def test_a_stack_of_different_numbers_of_tasks_is_refused():
    a, b = stacked([make_task(), make_task()]), stacked([make_task()])
    with pytest.raises(ValueError, match="must hold the same number of tasks N; got 2 and 1"):
        group_tasks(Task(*a[:2], *b[2:]), None, LIKE)


def test_a_stack_without_a_task_axis_is_refused():
    x, y = torch.zeros(3, 2), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"support_x must have shape \(N, B, D\) or \(N, B, T, D\); got \(3, 2\)"):
        group_tasks(Task(x, y, x, y), None, LIKE)


def test_mismatched_targets_of_a_stack_are_refused():
    x, y = torch.zeros(2, 3, 2), torch.zeros(2, 4, 1)
    with pytest.raises(ValueError, match=r"query_y must begin with the axes \(2, 3\) of query_x"):
        group_tasks(Task(x, x, x, y), None, LIKE)
