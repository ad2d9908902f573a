"""Random numbers for the rows of a rollout: a pure function of a seed, the row and the row's step.

Letters: B rows, S numbers for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.environment import derive_seed

__all__ = ["Noise", "gumbel_noise", "normal_noise", "philox"]

Noise = Callable[[Tensor], Tensor]
"""`noise(count) -> Tensor (B, S)`: from Int64 (B,), how many draws each row has made before, the next one, float64."""

_WORD, _MASK = np.uint64(32), np.uint64(0xFFFFFFFF)


def normal_noise(seed: int, size: int) -> Noise:
    """Return independent N(0, 1) numbers: `mean + std * noise` is a Gaussian action of S = `size` components.

    Row i's n-th draw is a function of (seed, i, n) alone: it depends on neither the number of rows nor what other
    rows do, and no two rows or draws share a number, since each is Philox4x32-10 of a counter of its own (Salmon et
    al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It is made at one go for all rows, where a
    `torch.Generator` per row would cost more than a step of the physics. A new seed for every rollout that does not
    go on from a carry: `normal_noise(derive_seed(seed, iteration), size)`.
    """
    uniform = _uniform(seed, size)
    return lambda count: torch.special.ndtri(uniform(count))


def gumbel_noise(seed: int, size: int) -> Noise:
    """Return independent standard Gumbel numbers: `(logits + noise).argmax(-1)` is a draw of `Categorical(logits)`.

    S = `size` is the number of logits. Its streams are those of `normal_noise`.
    """
    uniform = _uniform(seed, size)
    return lambda count: -torch.log(-torch.log(uniform(count)))


def philox(counter: Any, key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four random words from four counter words, one bijection of 128 bits for each key.

    Args:
        counter: four uint64 arrays that broadcast, of 32-bit words.
        key: two 32-bit words.

    Returns:
        Four uint64 arrays of 32-bit words. Salmon et al. 2011, section 4.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> _WORD) ^ c1 ^ np.uint64(k0), p1 & _MASK
        c2, c3 = (p0 >> _WORD) ^ c3 ^ np.uint64(k1), p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _uniform(seed: int, size: int) -> Noise:
    """Return U(0, 1) numbers, neither end among them, with 52 random bits each."""
    seed, size = require_integer("seed", seed, 0), require_integer("size", size, 1)
    key = derive_seed(seed, 0, 2), derive_seed(seed, 1, 2)
    # Two numbers from each block of four words.
    block = np.arange((size + 1) // 2, dtype=np.uint64)

    def uniform(count: Tensor) -> Tensor:
        row = np.arange(len(count), dtype=np.uint64)[:, None]
        draw = count.cpu().numpy().astype(np.uint64)[:, None]
        words = np.stack(philox((block, draw & _MASK, draw >> _WORD, row), key), axis=-1).reshape(len(row), -1, 2)
        bits = (words[..., 0] << _WORD | words[..., 1]) >> np.uint64(12)
        return torch.from_numpy((bits[:, :size] + 0.5) * 2.0**-52)

    return uniform
