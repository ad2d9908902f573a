"""The loops over time in C++, for float32 and float64 on the CPU.

`recurrences.cpp` is compiled when the package is installed, once per instruction set (hatch_build.py), where there is a
C++ compiler; after a change to it, install again. Without its libraries the same loops run in Python, one operation at
a time, that of diagonal_scan in rounds: the same results, up to rounding, in more time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["is_available", "run"]

_DTYPES = {torch.float32: "float", torch.float64: "double"}


def is_available() -> bool:
    """Whether this installation has the compiled loops."""
    return _library() is not None


def run(kernel: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> bool:
    """Run a kernel of recurrences.cpp on PyTorch's threads.

    Args:
        kernel: its name.
        inputs: its arguments in order, as its comment there lists them; None for a missing one.
        outputs: contiguous tensors for its results, in order; the second is (T, B, H) or (G, T, B, H). Where there is
            none, the first is states, (T+1, B, H) or (G, T+1, B, H).

    Returns:
        Whether it ran. It does not where the library is missing, or for tensors of another dtype or device.
    """
    result = outputs[0]
    function = _function(kernel, result.dtype) if result.is_cpu else None
    if function is None:
        return False
    *groups, steps, batch, hidden = outputs[-1].shape
    steps -= len(outputs) == 1  # of states there is one more
    operands, weights, transposed = [*inputs, *outputs], _WEIGHTS[kernel], 0
    for i, x in enumerate(inputs):
        if x is None or x.is_contiguous():
            continue
        if i in weights and x.mT.is_contiguous():
            operands[i], transposed = x.mT, transposed | 1 << i
        else:
            operands[i] = x.contiguous()
    weight: Tensor = inputs[weights[0]]  # type: ignore[assignment]
    state, shared = weight.shape[-2], weight.dim() == 2
    function(
        _Sizes(groups[0] if groups else 1, steps, batch, state, hidden, result.shape[-1], shared, transposed),
        torch.get_num_threads(),
        _Addresses(*[None if x is None else x.data_ptr() for x in operands]),
    )
    return True


_WEIGHTS = {
    "mlp": (1, 3),
    "linear_forward": (3, 4),
    "linear_adjoint": (3, 4),
    "perceptron": (2, 4),
    "linear_perceptron": (3, 4),
    "gated_forward": (4,),
    "gated_adjoint": (4,),
    "gru": (2,),
    "lstm": (2,),
    "diagonal_forward": (0,),
    "diagonal_adjoint": (0,),
}
"""Which arguments of a kernel are weights; the first is (S, …), or (2, S) of a diagonal one, and none is missing."""
_Sizes = ctypes.c_ssize_t * 8
_Addresses = ctypes.c_void_p * 8


@functools.cache
def _function(kernel: str, dtype: torch.dtype) -> Callable[..., None] | None:
    library = _library() if dtype in _DTYPES else None
    if library is None:
        return None
    function: Callable[..., None] = library[f"{kernel}_{_DTYPES[dtype]}"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function


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
