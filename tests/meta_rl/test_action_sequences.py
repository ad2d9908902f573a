"""Plans over sequences of actions: by hand, and by what their samples are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmrl.meta_rl import BoxActions, CategoricalPlan, DiscreteActions, GaussianPlan, colored_noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


BOX = BoxActions([-1.0, 0.0], [1.0, 4.0])


# Boxes


def test_a_plan_that_knows_nothing_is_the_middle_and_half_of_a_half():
    plan = BOX.start(3)
    assert plan.mean.tolist() == [[0.0, 2.0]] * 3
    assert plan.scale.tolist() == [[0.5, 1.0]] * 3
    assert BoxActions([-1.0], [1.0], initial_scale=2.0).start(1).scale.tolist() == [[2.0]]


def test_samples_are_mean_plus_scaled_noise_clipped():
    plan = GaussianPlan(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, 2.0]]))
    noise = torch.tensor([[[-1.0, 1.0]], [[3.0, -3.0]]])
    assert BOX.sample(plan, noise).tolist() == [[[0.0, 3.0]], [[1.0, 0.0]]]


def test_a_fit_is_the_weighted_mean_and_deviation():
    actions = torch.tensor([[[0.0, 1.0]], [[1.0, 3.0]], [[-1.0, 4.0]]])
    plan = GaussianPlan(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    weights = torch.tensor([0.5, 0.5, 0.0])
    fitted = BOX.fit(plan, actions, weights)
    assert fitted.mean.tolist() == [[0.5, 2.0]]
    assert fitted.scale.tolist() == [[0.5, 1.0]]
    smooth = BOX.fit(plan, actions, weights, smoothing=0.5)
    assert smooth.mean.tolist() == [[0.25, 1.0]]
    assert smooth.scale.tolist() == [[0.75, 1.0]]
    assert BOX.fit(plan, actions, weights, scale=False).scale is plan.scale


def test_a_mean_of_actions_on_the_bound_is_not_over_it():
    actions = torch.full((300, 1, 1), 2.0)
    box = BoxActions([-2.0], [2.0])
    for seed in range(50):
        weights = torch.softmax(torch.randn(300, generator=generator(seed)), 0)
        assert box.fit(box.start(1), actions, weights).mean.item() <= 2.0


def test_a_plan_moves_on_by_a_step_and_is_wide_again():
    plan = GaussianPlan(torch.tensor([[0.1, 1.0], [0.2, 2.0], [0.3, 3.0]]), torch.zeros(3, 2))
    moved = BOX.shifted(plan)
    torch.testing.assert_close(moved.mean, torch.tensor([[0.2, 2.0], [0.3, 3.0], [0.3, 3.0]]))
    assert torch.equal(moved.scale, BOX.start(3).scale)
    assert torch.equal(BOX.first(plan), torch.tensor([0.1, 1.0]))


def test_uniform_actions_are_uniform():
    actions = BOX.uniform(BOX.noise((20_000, 1, 2), generator()))
    grid = torch.arange(1, 10) / 10
    expected = torch.stack([-1.0 + 2.0 * grid, 4.0 * grid], 1)
    torch.testing.assert_close(actions[:, 0].quantile(grid, dim=0), expected, atol=0.05, rtol=0)


# Choices


def test_choices_are_drawn_with_their_probabilities_one_hot():
    space = DiscreteActions(3)
    plan = CategoricalPlan(torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0]]))
    actions = space.sample(plan, space.noise((20_000, 2, 3), generator()))
    assert torch.equal(actions.sum(-1), torch.ones(20_000, 2))
    torch.testing.assert_close(actions.mean(0), plan.probabilities, atol=0.015, rtol=0)
    even = space.uniform(space.noise((20_000, 1, 3), generator()))
    torch.testing.assert_close(even.mean(0), torch.full((1, 3), 1 / 3), atol=0.015, rtol=0)


def test_a_fit_of_choices_is_the_weighted_frequency():
    space = DiscreteActions(2)
    actions = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    weights = torch.tensor([0.5, 0.25, 0.25])
    assert space.fit(space.start(1), actions, weights).probabilities.tolist() == [[0.5, 0.5]]
    plan = CategoricalPlan(torch.tensor([[1.0, 0.0]]))
    assert space.fit(plan, actions, weights, smoothing=0.5).probabilities.tolist() == [[0.75, 0.25]]


def test_choices_that_are_moved_on_keep_a_floor():
    space = DiscreteActions(2, floor=0.5)
    plan = CategoricalPlan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert space.shifted(plan).probabilities.tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert space.first(plan).item() == 1
    assert space.first(plan).dtype is torch.int64


# Noise


@settings(deadline=None, max_examples=20)
@given(exponent=st.floats(0.0, 4.0), horizon=st.integers(1, 24))
def test_coloured_noise_has_variance_1_at_every_step(exponent, horizon):
    noise = colored_noise((4000, horizon, 2), exponent, generator(), dtype=torch.float64)
    assert noise.shape == (4000, horizon, 2)
    torch.testing.assert_close(noise.square().mean((0, 2)), torch.ones(horizon, dtype=torch.float64), atol=0.12, rtol=0)


def test_the_power_of_coloured_noise_falls_with_frequency():
    noise = colored_noise((20_000, 16, 1), 2.0, generator(), dtype=torch.float64)
    power = torch.fft.rfft(noise, dim=1).abs().square().mean((0, 2))
    frequency = torch.fft.rfftfreq(16, dtype=torch.float64)
    torch.testing.assert_close(power[2:8] / power[1], (frequency[2:8] / frequency[1]) ** -2, rtol=0.05, atol=0)


def test_without_an_exponent_noise_is_that_of_the_generator():
    assert torch.equal(colored_noise((2, 3, 1), 0.0, generator(3)), torch.randn(2, 3, 1, generator=generator(3)))


# Errors


@pytest.mark.parametrize(
    ("low", "high", "match"),
    [
        ([1.0], [-1.0], "low <= high; got 1.0 and -1.0 for component 0"),
        ([0.0, 0.0], [1.0, float("inf")], "must be finite.*component 1"),
        ([float("nan")], [1.0], "must be finite"),
        ([0.0], [1.0, 2.0], r"same shape \(A,\)"),
        ([], [], r"A >= 1"),
    ],
)
def test_infeasible_bounds_are_refused(low, high, match):
    with pytest.raises(ValueError, match=match):
        BoxActions(low, high)


def test_a_component_may_be_fixed():
    box = BoxActions([1.0], [1.0])
    assert box.sample(box.start(2), torch.randn(5, 2, 1)).unique().tolist() == [1.0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="initial_scale must be > 0"):
        BoxActions([0.0], [1.0], initial_scale=scale)


def test_numbers_of_choices_are_checked():
    with pytest.raises(ValueError, match="number must be at least 1; got 0"):
        DiscreteActions(0)
    with pytest.raises(TypeError, match="number must be an integer; got float"):
        DiscreteActions(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\]; got 2"):
        DiscreteActions(2, floor=2)
    with pytest.raises(ValueError, match=r"no colour.*got 2\.0"):
        DiscreteActions(2).noise((1, 2, 2), None, exponent=2.0)
