"""Random numbers of many rows at once, each from a stream of its own.

NumPy's generators draw for one row at a time, which in every step would cost more than the rest of a small
simulation. Here number i of a row is a hash of the row's key and i: B rows are drawn together, a row's numbers do not
depend on the others, and a key and a count are all there is to save. The key is drawn from the row's own generator
when an episode begins. Tasks are drawn one by one, from NumPy's (`scattered`).

The hash is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
https://doi.org/10.1145/2660193.2660195): number i of key k is mix(k + (i + 1) γ), γ = 2⁶⁴ / golden ratio, modulo 2⁶⁴.

Letters: B rows, N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "check_scatter", "new_keys", "normal", "scattered", "uniform"]

Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST, _UNUSED = np.uint64(31), np.uint64(11)


def new_keys(generators: Sequence[np.random.Generator]) -> Words:
    """Draw a key from each generator, (len(generators),)."""
    return np.array([g.integers(2**64, dtype=np.uint64) for g in generators], np.uint64)


def uniform(key: Words, step: Words, size: int) -> NDArray[np.float64]:
    """Return numbers (B, N) that are uniform in [0, 1): N = `size` of them for each row's key (B,) and step (B,)."""
    index: Words = np.add((step * np.uint64(size))[:, None], np.arange(1, size + 1, dtype=np.uint64))
    words: Words = np.add(key[:, None], index * _GAMMA)
    for shift, factor in _MIX:
        words = np.bitwise_xor(words, words >> shift)
        words *= factor
    words = np.bitwise_xor(words, words >> _LAST)
    return (words >> _UNUSED).astype(np.float64) * 2.0**-53


def normal(key: Words, step: Words, size: int) -> NDArray[np.float64]:
    """Return numbers (B, N) ~ N(0, 1), each made of two uniform ones (Box and Muller 1958)."""
    radius, angle = np.split(uniform(key, step, 2 * size), 2, axis=1)
    numbers: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    return numbers


def scattered(
    nominal: Mapping[str, float], generator: np.random.Generator, base: float, spread: float
) -> dict[str, float]:
    """Return every value times base^u with its own u ~ U[-spread, spread]."""
    exponents = generator.uniform(-spread, spread, len(nominal))
    return {name: value * base ** float(u) for (name, value), u in zip(nominal.items(), exponents, strict=True)}


def check_scatter(base: float, spread: float) -> None:
    """Raise a ValueError unless base > 0 and spread >= 0 are finite."""
    if not (math.isfinite(base) and base > 0):
        raise ValueError(f"`base` must be positive and finite; got {base}.")
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"`spread` must be at least 0 and finite; got {spread}.")
