"""The peak of memory during a call."""

from __future__ import annotations

import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc")


def test_the_peak_of_a_call_is_the_same_after_others_like_it(import_benchmark):
    memory = import_benchmark("memory")

    def call():  # 200 MB in pieces that the C library keeps when they are freed
        return sum(float(piece[0]) for piece in [torch.ones(25_000) for _ in range(2_000)])

    for _ in range(3):
        result, peak = memory.peak_of(call)
        assert result == 2_000
        assert 150 < peak < 300
