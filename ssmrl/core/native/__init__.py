"""The loops over time in C++, for float32 and float64 on the CPU.

`recurrences.cpp` is compiled when the package is installed, once per instruction set (hatch_build.py), where there is a
C++ compiler. Without its libraries the same loops run in Python, one operation at a time: the same results, up to
rounding, in more time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["is_available", "run"]

_DTYPES = {torch.float32: "float", torch.float64: "double"}


def is_available() -> bool:
    """Whether this installation has the compiled loops."""
    return _library() is not None


def run(kernel: str, inputs: Sequence[Tensor | None], outputs: tuple[Tensor, Tensor], *, state: int) -> bool:
    """Run a kernel of recurrences.cpp on PyTorch's threads.

    Args:
        kernel: its name.
        inputs: its arguments in order, as its comment there lists them; None for a missing one.
        outputs: contiguous tensors for its results, in order; the second is (T, B, H) or (G, T, B, H).
        state: S.

    Returns:
        Whether it ran. It does not where the library is missing, or for tensors of another dtype or device.
    """
    result = outputs[0]
    library = _library() if result.device.type == "cpu" and result.dtype in _DTYPES else None
    if library is None:
        return False
    *groups, steps, batch, hidden = outputs[1].shape
    operands = [None if x is None else x.contiguous() for x in inputs] + list(outputs)
    sizes = (groups[0] if groups else 1, steps, batch, state, hidden, result.shape[-1])
    getattr(library, f"{kernel}_{_DTYPES[result.dtype]}")(
        (ctypes.c_ssize_t * len(sizes))(*sizes),
        ctypes.c_int(torch.get_num_threads()),
        (ctypes.c_void_p * len(operands))(*[None if x is None else x.data_ptr() for x in operands]),
    )
    return True


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library for this processor, if the installation built it and it loads."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    for name in (level, "default"):
        path = Path(__file__).with_name(f"recurrences_{name}.so")
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # the process has no OpenMP, say
                continue
    return None
