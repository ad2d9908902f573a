"""The checks of data: what passes, and what each refusal says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmrl.adaptation.checks import check_finite, check_pair, check_reset_mask, check_state

LIKE = torch.zeros(1)
check = partial(check_pair, "x", y_name="y", like=LIKE)

sizes = st.integers(1, 4)


@given(leading=st.lists(sizes, min_size=1, max_size=2), features=sizes, rest=st.lists(sizes, max_size=2))
def test_targets_follow_the_leading_axes_of_the_inputs(leading, features, rest):
    check(x=torch.zeros(*leading, features), y=torch.zeros(*leading, *rest))
    check(x=torch.zeros(2, *leading, features), y=torch.zeros(2, *leading, *rest), stacked=True)


@given(leading=st.lists(sizes, min_size=1, max_size=2), axis=st.integers(0, 1), more=sizes)
def test_a_mismatch_of_batch_or_steps_is_refused(leading, axis, more):
    wrong = list(leading)
    wrong[axis % len(leading)] += more
    with pytest.raises(ValueError, match=r"y must begin with the axes .* of x .*; got shape"):
        check(x=torch.zeros(*leading, 3), y=torch.zeros(*wrong, 2))


def test_the_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"y must begin with the axes \(4, 6\) of x .* got shape \(4, 5, 2\)"):
        check(x=torch.zeros(4, 6, 3), y=torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match=r"y must begin with the axes \(4, 6\) of x .* got shape \(4,\)"):
        check(x=torch.zeros(4, 6, 3), y=torch.zeros(4))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2, 2)])
def test_a_wrong_rank_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\) or \(B, T, D\); got"):
        check(x=torch.zeros(shape), y=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2, 2, 2)])
def test_a_stack_of_a_wrong_rank_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(N, B, D\) or \(N, B, T, D\); got"):
        check(x=torch.zeros(shape), y=torch.zeros(shape), stacked=True)


def test_labels_may_be_integers():
    check(x=torch.zeros(4, 3), y=torch.zeros(4, dtype=torch.int64))


def test_a_wrong_dtype_is_refused_and_named():
    with pytest.raises(ValueError, match=r"x must be of dtype torch.float32, .* got torch.float64"):
        check(x=torch.zeros(4, 3).double(), y=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"y must be of dtype torch.float32, .* got torch.float16"):
        check(x=torch.zeros(4, 3), y=torch.zeros(4, 3).half())


def test_a_wrong_device_is_refused_and_named():
    with pytest.raises(ValueError, match="x must be on cpu, where the model is; got meta"):
        check(x=torch.zeros(4, 3, device="meta"), y=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="y must be on cpu, where the model is; got meta"):
        check(x=torch.zeros(4, 3), y=torch.zeros(4, 3, device="meta"))


def test_what_is_no_tensor_is_refused_and_named():
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        check(x=[[1.0]], y=torch.zeros(1, 1))
    with pytest.raises(TypeError, match="y must be a tensor; got NoneType"):
        check(x=torch.zeros(1, 1), y=None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@given(row=st.integers(0, 2), column=st.integers(0, 3))
def test_the_first_value_that_is_not_finite_is_named(bad, row, column):
    value = torch.zeros(3, 4)
    value[row, column] = bad
    with pytest.raises(ValueError, match=rf"x must be finite; got {bad} at index \({row}, {column}\)"):
        check_finite("x", value)


def test_finite_values_and_integers_pass():
    check_finite("x", torch.tensor([0.0, 3.4e38, -1e-45]))
    check_finite("y", torch.tensor([1, 2]))
    check_finite("x", torch.empty(0))


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (4, 0, 3)])
def test_an_empty_batch_and_no_steps_are_refused(shape):
    with pytest.raises(ValueError, match="x must hold at least one sequence and one step; got shape"):
        check(x=torch.zeros(shape), y=torch.zeros(shape))
    with pytest.raises(ValueError, match="x must hold at least one sequence and one step; got shape"):
        check(x=torch.zeros(2, *shape), y=torch.zeros(2, *shape), stacked=True)


def test_a_state_of_any_container_is_checked_leaf_by_leaf():
    check_state("h", {"a": (torch.zeros(2), torch.arange(2))}, LIKE)
    check_state("h", None, LIKE)
    with pytest.raises(ValueError, match=r"h must be finite; got nan at index \(1,\)"):
        check_state("h", {"a": (torch.zeros(2), torch.tensor([0.0, torch.nan]))}, LIKE)
    with pytest.raises(ValueError, match="h must be on cpu, where the model is; got meta"):
        check_state("h", (torch.zeros(2, device="meta"),), LIKE)


def test_targets_that_are_optional_may_be_missing_and_are_checked_if_they_are_not():
    check(x=torch.zeros(4, 3), y=None, optional=True)
    with pytest.raises(ValueError, match=r"y must begin with the axes \(4,\) of x .*got shape \(3, 1\)"):
        check(x=torch.zeros(4, 3), y=torch.zeros(3, 1), optional=True)
    with pytest.raises(TypeError, match="y must be a tensor; got int"):
        check(x=torch.zeros(4, 3), y=0, optional=True)


def test_inputs_are_never_optional_and_are_checked_without_targets_too():
    with pytest.raises(TypeError, match="x must be a tensor; got NoneType"):
        check(x=None, y=None, optional=True)
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\) or \(B, T, D\); got \(3,\)"):
        check(x=torch.zeros(3), y=None, optional=True)
    with pytest.raises(ValueError, match="x must hold at least one sequence and one step; got shape"):
        check(x=torch.zeros(0, 3), y=None, optional=True)


@pytest.mark.parametrize("reset", [True, False])
def test_one_bool_for_all_rows_says_where_the_first_step_begins(reset):
    for_a_step = check_reset_mask(reset, torch.zeros(2, 3))
    for_a_sequence = check_reset_mask(reset, torch.zeros(2, 3, 4))
    assert for_a_step is not None
    assert for_a_sequence is not None
    assert for_a_step.tolist() == [reset] * 2
    assert for_a_sequence.tolist() == [[reset, False, False]] * 2
    assert for_a_step.dtype is for_a_sequence.dtype is torch.bool


def test_a_mask_that_fits_passes_as_it_is():
    assert check_reset_mask(None, torch.zeros(2, 3)) is None
    for mask, x in (
        (torch.tensor([True, False]), torch.zeros(2, 3)),
        (torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, 3)),
    ):
        assert check_reset_mask(mask, x) is mask


@pytest.mark.parametrize(
    ("reset", "error", "message"),
    [
        (1, TypeError, r"reset must be a Bool tensor of shape \(4, 6\), a bool or None; got int"),
        ([[True] * 6] * 4, TypeError, r"reset must be a Bool tensor of shape \(4, 6\), .* got list"),
        (torch.zeros(4, 6), ValueError, r"reset must be Bool of shape \(4, 6\) .* got torch.float32 of shape \(4, 6\)"),
        (torch.zeros(4).bool(), ValueError, r"reset must be Bool of shape \(4, 6\) .* got torch.bool of shape \(4,\)"),
        (
            torch.zeros(4, 6, 1).bool(),
            ValueError,
            r"reset must be Bool of shape \(4, 6\) .* got torch.bool of shape \(4, 6, 1\)",
        ),
        (torch.zeros(4, 6, device="meta").bool(), ValueError, "reset must be on cpu, where the model is; got meta"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(reset, error, message):
    with pytest.raises(error, match=message):
        check_reset_mask(reset, torch.zeros(4, 6, 3))
