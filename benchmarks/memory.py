"""Resident memory of this process, for several benchmarks (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["peak_of", "resident"]

T = TypeVar("T")


def resident(field: str) -> float:
    """Resident memory in MB: VmRSS now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def peak_of(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the peak of memory during it above what the process held before, in MB.

    What the C library keeps of memory that was freed, for calls like this one, it gives back before (glibc).
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = call()
    return result, resident("VmHWM") - before
