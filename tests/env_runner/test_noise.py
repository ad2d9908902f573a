from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions
from torch.testing import assert_close

from ssmrl.env_runner import derive_seed, gumbel_noise, normal_noise
from ssmrl.env_runner.noise import philox

MAKERS = [normal_noise, gumbel_noise]


def draws(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    # https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors
    assert [int(word[0]) for word in philox([np.array([c], np.uint64) for c in counter], key)] == words


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MAKERS),
    st.integers(0, 2**40),
    st.integers(1, 7),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    st.data(),
)
def test_a_rows_numbers_depend_on_nothing_but_the_seed_the_row_and_its_count(maker, seed, size, counts, data):
    noise = maker(seed, size)
    expected = noise(draws(*counts))
    assert expected.shape == (len(counts), size)
    assert expected.dtype == torch.float64
    rows = data.draw(st.integers(1, len(counts)))
    fewer = [*counts[:rows]]
    assert_close(maker(seed, size)(draws(*fewer)), expected[:rows], rtol=0, atol=0)
    row = data.draw(st.integers(0, len(counts) - 1))
    others = [count if i == row else count + 1 for i, count in enumerate(counts)]
    moved = noise(draws(*others))
    assert_close(moved[row], expected[row], rtol=0, atol=0)
    assert not (moved == expected).any(dim=1)[[i for i in range(len(counts)) if i != row]].any()


@pytest.mark.parametrize("maker", MAKERS)
def test_no_two_rows_steps_components_or_seeds_share_a_number(maker):
    numbers = [maker(seed, 5)(torch.full((40,), n)) for seed in (0, 1, derive_seed(0, 1)) for n in (*range(30), 2**32)]
    everything = torch.stack(numbers)
    assert len(everything.unique()) == everything.numel() == 3 * 31 * 40 * 5


@pytest.mark.parametrize(
    ("maker", "law"),
    [(normal_noise, distributions.Normal(0.0, 1.0)), (gumbel_noise, distributions.Gumbel(0.0, 1.0))],
)
def test_the_numbers_have_their_distribution_along_rows_steps_and_components(maker, law):
    numbers = torch.stack([maker(3, 5)(torch.full((400,), n)) for n in range(50)])
    uniform = law.cdf(numbers).flatten().sort().values
    distance = (uniform - torch.arange(0.5, len(uniform)) / len(uniform)).abs().max()
    assert distance < 1.95 / len(uniform) ** 0.5  # Kolmogorov and Smirnov's, at 0.001.
    centred = (numbers - law.mean) / law.stddev
    for n in range(3):
        shifted = centred.narrow(n, 1, numbers.shape[n] - 1) * centred.narrow(n, 0, numbers.shape[n] - 1)
        assert abs(shifted.mean().item()) < 4 / shifted.numel() ** 0.5


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`seed` must be at least 0; got -1"):
        normal_noise(-1, 2)
    with pytest.raises(ValueError, match="`size` must be at least 1; got 0"):
        gumbel_noise(0, 0)
