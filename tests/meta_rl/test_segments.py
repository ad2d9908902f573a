"""Episodes within a row, and the recurrence that stops at their ends."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacrev, vmap

from ssmrl.meta_rl.segments import (
    check_fraction,
    continuing,
    count_episodes,
    episode_step,
    following,
    sum_back,
    sum_forward,
)

f64 = partial(torch.tensor, dtype=torch.float64)


def mask(text):
    return torch.tensor([c == "1" for c in text], dtype=torch.bool)


NONE = mask("0000000")
# An episode that is truncated after 3 steps, a NEXT_STEP dummy, one that terminates after 2, padding.
TRUNCATED, TERMINATED, VALID = mask("0010000"), mask("0000010"), mask("1110110")


def test_continuing_by_hand():
    assert torch.equal(continuing(TERMINATED, TRUNCATED, VALID), mask("1100100"))
    assert torch.equal(continuing(TERMINATED, TRUNCATED), mask("1101100"))
    assert torch.equal(following(mask("1100100")), mask("0110010"))


def test_a_row_is_cut_at_its_end_and_before_an_invalid_step():
    assert torch.equal(continuing(NONE, NONE), mask("1111110"))
    assert torch.equal(continuing(NONE, NONE, mask("1111001")), mask("1110000"))


def test_episode_steps_by_hand():
    assert episode_step(TERMINATED, TRUNCATED, VALID).tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert episode_step(TERMINATED, TRUNCATED).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert episode_step(NONE, NONE).tolist() == list(range(7))


def test_episodes_are_counted_over_all_rows():
    assert int(count_episodes(TERMINATED, TRUNCATED, VALID)) == 2
    assert int(count_episodes(TERMINATED, TRUNCATED)) == 3
    rows = [torch.stack([a, b]) for a, b in ((TERMINATED, NONE), (TRUNCATED, NONE), (VALID, NONE))]
    assert int(count_episodes(*rows)) == 2
    rows[2] = torch.stack([VALID, ~NONE])
    assert int(count_episodes(*rows)) == 3


def test_the_recurrence_by_hand():
    f, c = f64([1.0, 2.0, 3.0]), f64([0.5, 0.0, 0.9])
    assert sum_back(f, c).tolist() == [2.0, 2.0, 3.0]
    assert sum_forward(f, f64([0.9, 0.5, 2.0])).tolist() == [1.0, 2.5, 8.0]


@settings(deadline=None, max_examples=40)
@given(num_steps=st.integers(0, 40), lead=st.sampled_from([(), (3,), (2, 3)]), seed=st.integers(0, 99))
def test_the_recurrence_is_a_loop(num_steps, lead, seed):
    g = torch.Generator().manual_seed(seed)
    f, c = torch.randn(2, *lead, num_steps, dtype=torch.float64, generator=g)
    y: list[torch.Tensor] = []
    after = torch.zeros(lead, dtype=torch.float64)
    for t in reversed(range(num_steps)):
        after = f[..., t] + c[..., t] * after
        y.insert(0, after)
    expected = torch.stack(y, -1) if y else f
    torch.testing.assert_close(sum_back(f, c), expected)
    torch.testing.assert_close(sum_forward(f.flip(-1), c.flip(-1)), expected.flip(-1))


def test_the_recurrence_is_differentiable_twice():
    f, c = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f.requires_grad_()
    c.requires_grad_()
    assert torch.autograd.gradcheck(sum_back, (f, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sum_back, (f, c))


def test_vmap_of_its_derivatives_is_a_loop():
    f, c = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for transform in (jacrev, hessian):
        of = transform(lambda f, c: sum_back(f, c).square().sum(), argnums=1)
        torch.testing.assert_close(vmap(of)(f, c), torch.stack([of(*row) for row in zip(f, c, strict=True)]))


def test_masks_map_with_vmap():
    rows = [torch.stack([a, b]) for a, b in ((TERMINATED, NONE), (TRUNCATED, NONE), (VALID, ~NONE))]
    assert torch.equal(vmap(episode_step)(*rows), episode_step(*rows))
    assert vmap(count_episodes)(*rows).tolist() == [2, 1]


def test_a_row_without_steps_holds_nothing():
    empty = mask("")
    assert episode_step(empty, empty).shape == (0,)
    assert int(count_episodes(empty, empty)) == 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ((TERMINATED, TRUNCATED[:3]), r"`truncated` must have the shape \(\.\.\., T\) = \(7,\) of `terminated`; got"),
        ((TERMINATED, TRUNCATED, VALID.long()), "`valid` must be Bool; got torch.int64"),
        ((TERMINATED[0], TRUNCATED[0]), "`terminated` must have an axis of steps"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        episode_step(*masks)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"`truncated` must be a tensor \(\.\.\., T\); got list"):
        episode_step(TERMINATED, [False] * 7)  # type: ignore[arg-type]


def test_fractions():
    check_fraction("gamma", 1)
    check_fraction("gamma", torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]; got 1.5"):
        check_fraction("gamma", 1.5)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]; got nan"):
        check_fraction("gamma", float("nan"))
    with pytest.raises(TypeError, match=r"gamma must be a number in \[0, 1\] or a tensor; got True"):
        check_fraction("gamma", True)
