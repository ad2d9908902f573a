from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmrl.env_runner.tasks.draws import new_keys, normal, uniform

KEYS = new_keys([np.random.default_rng(seed) for seed in range(50)])


def steps(count: int) -> np.ndarray:
    return np.full(len(KEYS), count, np.uint64)


def test_numbers_are_those_of_splitmix64():
    # The first outputs of the reference implementation, https://prng.di.unimi.it/splitmix64.c, seeded with 1234567.
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    numbers = uniform(np.array([1234567], np.uint64), np.zeros(1, np.uint64), 5)[0]
    assert numbers.tolist() == [(word >> 11) * 2.0**-53 for word in words]


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 50), st.sampled_from([uniform, normal]))
def test_a_rows_numbers_do_not_depend_on_the_others(count, size, rows, draw):
    together = draw(KEYS[:rows], steps(count)[:rows], size)
    alone = [draw(KEYS[row : row + 1], steps(count)[:1], size)[0] for row in range(rows)]
    np.testing.assert_array_equal(together, alone)


def test_the_steps_numbers_follow_each_other():
    one_by_one = np.concatenate([uniform(KEYS, steps(count), 1) for count in range(6)], axis=1)
    by_twos = np.concatenate([uniform(KEYS, steps(count), 2) for count in range(3)], axis=1)
    np.testing.assert_array_equal(one_by_one, by_twos)
    assert len(np.unique(one_by_one)) == one_by_one.size


def test_uniform_numbers_are_uniform_and_independent():
    numbers = np.stack([uniform(KEYS, steps(count), 4) for count in range(500)])  # 100,000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, 20, (0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # the 0.999 quantile of χ² with 19 degrees of freedom
    for first, second in (
        (numbers[:-1], numbers[1:]),
        (numbers[:, :-1], numbers[:, 1:]),
        (numbers[..., :-1], numbers[..., 1:]),
    ):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / first.size**0.5


def test_normal_numbers_are_normal():
    numbers = np.stack([normal(KEYS, steps(count), 4) for count in range(500)])
    moments = [(numbers**k).mean() for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
    assert np.mean(np.abs(numbers) > 1.959964) == pytest.approx(0.05, abs=0.003)
    assert abs(np.corrcoef(numbers[..., 0].ravel(), numbers[..., 1].ravel())[0, 1]) < 4 / 25_000**0.5


def test_a_key_is_drawn_from_each_generator():
    generators = [np.random.default_rng(seed) for seed in (3, 3, 4)]
    first, second = new_keys(generators), new_keys(generators)
    assert first[0] == first[1] != first[2]
    assert first.dtype == np.uint64
    assert not (first == second).any()
