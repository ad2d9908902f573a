"""Checkpoints: a tree of tensors, arrays and numbers in a directory that survives a kill at any instant; no pickle.

    folder/000000000012-000007/tensors.safetensors   tensors and arrays, each under its path in the tree
                               state.json            everything else
                               manifest.json         format, step, versions; size and SHA-256 of the two
           latest                                    the name of the checkpoint that was saved last

The second number counts the saves into the folder: it orders them, and lets a step be saved again without touching
what is there before the new one is complete. One process writes into a folder; any number read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ssmrl import __version__

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]

_FORMAT = "ssmrl checkpoint 1"
_NAME = re.compile(r"(\d{12})-(\d{6,18})", re.ASCII)
_PARTIAL = re.compile(rf"\.({_NAME.pattern}|latest)\.partial", re.ASCII)
_DEPTH = 100


class CheckpointError(ValueError):
    """No checkpoint is as it was saved, or there is none of the step asked for; the message says what is wrong."""


class Checkpoint(NamedTuple):
    """What `load_checkpoint` found."""

    step: int
    state: Any
    """As it was saved, all tensors on the CPU."""
    path: Path
    """Its directory."""
    skipped: tuple[str, ...]
    """The newer ones, which are damaged: a sentence for each, with its path and what is wrong."""


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: Any, *, keep: int = 3) -> Path:
    """Save a state, delete all but the last `keep` checkpoints, and return the new one's directory.

    It is written under a hidden name, flushed to disk and renamed; then `latest` is moved, and only then are older
    ones deleted, and another of the same step. A process killed at any instant leaves what was there or the new one,
    valid, and its half-done work goes with the next save.

    Args:
        folder: where checkpoints are; made if its parent is there.
        step: of the run, from 0 to 10^12 - 1.
        state: dicts and OrderedDicts with keys of type str or int, lists and tuples, nested at most 100 deep, of

            - dense tensors and parameters of any shape, strides and device, and of any dtype but quantized ones and
              complex32; that one requires a gradient or shares memory with another is not kept;
            - NumPy arrays and scalars: booleans, integers, floats and complex numbers of up to 64 bits a part;
            - int of any size, float (infinities and NaNs bit for bit), bool, str, bytes and None.

            The `state_dict()` of a module or an optimizer, the state of a generator of torch's or NumPy's, and what
            `Environment.save` returns are such trees. NamedTuples are not: a file that names a class is not safe to
            load. Pass their `_asdict()`.
        keep: how many checkpoints stay, the new one included.

    Raises:
        TypeError: `state` holds a value of another type; the message says where.
        ValueError: `step` or `keep` is out of range, or `state` nests too deep.
        OSError: the disk is full, read-only or gone. What was saved before is there still.
    """
    if type(step) is not int or not 0 <= step < 10**12:
        raise ValueError(f"`step` must be an integer from 0 to 10^12 - 1; got {step!r}.")
    if type(keep) is not int or keep < 1:
        raise ValueError(f"`keep` must be a positive integer; got {keep!r}.")
    tensors: dict[str, Tensor] = {}
    files = {"state.json": json.dumps(_encode(state, "state", tensors), allow_nan=False).encode()}
    files["tensors.safetensors"] = safetensors.torch.save(tensors)
    files["manifest.json"] = json.dumps(_manifest(step, files), indent=1).encode()

    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir()
        _sync(folder.parent)
    _sweep(folder)
    before = _candidates(folder)
    path = folder / f"{step:012d}-{1 + (_order(before[-1])[0] if before else 0):06d}"
    ours = [old for old in before if old.is_dir() and not old.is_symlink()]
    others = [old for old in ours if _order(old)[1] != step]
    kept = others[max(0, len(others) - keep + 1) :]
    try:
        _publish(path, files)
        for old in ours:
            if old not in kept:
                os.replace(old, _partial(old))  # at no instant is half of a checkpoint visible
                shutil.rmtree(_partial(old))
    except BaseException:
        _sweep(folder)
        raise
    return path


def load_checkpoint(folder: str | os.PathLike[str], step: int | None = None) -> Checkpoint | None:
    """Return the checkpoint saved last; if it is damaged the one before it, and so on.

    Args:
        folder: where checkpoints are.
        step: only checkpoints of this step; None: of any.

    Returns:
        The checkpoint, whose `skipped` names the damaged ones. None: there is no checkpoint, or no `folder`.

    Raises:
        CheckpointError: all are damaged, or there is none of the `step` that was asked for.
        OSError: `folder` cannot be listed.
    """
    folder = Path(folder)
    damaged: dict[Path, str] = {}
    while untried := [path for path in _candidates(folder, step) if path not in damaged]:
        path = untried[-1]
        try:
            return Checkpoint(*_read(path), path, tuple(damaged.values()))
        except Exception as error:  # whatever a hostile file makes a parser raise
            if path in _candidates(folder, step):  # or else a save has deleted it meanwhile, and there is a newer one
                damaged[path] = f"{str(path)!r} is damaged: {error or type(error).__name__}"
    if damaged:
        raise CheckpointError(f"No checkpoint is valid. {' '.join(damaged.values())}")
    if step is not None:
        raise CheckpointError(f"There is no checkpoint of step {step} in {str(folder)!r}.")
    return None


# The folder.


def _order(path: Path) -> tuple[int, int]:
    """Number of the save, step."""
    step, number = path.name.split("-")
    return int(number), int(step)


def _candidates(folder: Path, step: int | None = None) -> list[Path]:
    """What is named like a checkpoint, in the order of saves, and what `latest` names: a newest that is lost shows."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    with contextlib.suppress(OSError, ValueError):  # a killed save left none, or it is damaged: the names are enough
        names.append(_content(folder / "latest").decode("ascii").removesuffix("\n"))
    paths = sorted({folder / name for name in names if _NAME.fullmatch(name)}, key=_order)
    return [path for path in paths if step is None or _order(path)[1] == step]


def _publish(path: Path, files: dict[str, bytes]) -> None:
    """Make the directory complete and durable, then visible, then `latest`."""
    latest = path.with_name("latest")
    _partial(path).mkdir()
    for name, content in files.items():
        _write(_partial(path) / name, content)
    _write(_partial(latest), f"{path.name}\n".encode())
    _sync(_partial(path))
    os.replace(_partial(path), path)
    _sync(path.parent)
    os.replace(_partial(latest), latest)
    _sync(path.parent)


def _partial(path: Path) -> Path:
    """Return the hidden name of what is not complete yet, or not any more."""
    return path.with_name(f".{path.name}.partial")


def _sweep(folder: Path) -> None:
    """Remove what was left half done; what cannot be removed waits for the next save."""
    with contextlib.suppress(OSError):
        for stray in [folder / name for name in os.listdir(folder) if _PARTIAL.fullmatch(name)]:
            shutil.rmtree(stray, ignore_errors=True)
            stray.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in a directory durable; Windows cannot open one, and does not need it."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# One checkpoint.


def _manifest(step: int, files: dict[str, bytes]) -> dict[str, Any]:
    versions = {"ssmrl": __version__, "python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, np, safetensors)}
    sums = {n: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for n, content in files.items()}
    return {"format": _FORMAT, "step": step, "versions": versions, **sums}


def _content(path: Path) -> bytes:
    if not stat.S_ISREG(os.lstat(path).st_mode):  # a link leads elsewhere, and a pipe blocks
        raise ValueError(f"{path.name} is not a regular file.")
    return path.read_bytes()


def _read(path: Path) -> tuple[int, Any]:
    """Step and state of a checkpoint, every byte of which was checked first."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise ValueError("it is not a directory.")
    try:
        manifest = dict(json.loads(_content(path / "manifest.json")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"manifest.json holds no JSON object: {error}") from error
    files = {name: _content(path / name) for name in ("state.json", "tensors.safetensors")}
    found = _manifest(_order(path)[1], files)
    for name in [*found, *manifest]:
        said, got = manifest.get(name), found.get(name)
        if name != "versions" and said != got:
            raise ValueError(f"manifest.json says that {name!r:.200} is {said!r:.200}; it is {got!r}.")
    tensors = safetensors.torch.load(files["tensors.safetensors"])
    state = _decode(json.loads(files["state.json"]), "state", tensors)
    if tensors:
        raise ValueError(f"tensors.safetensors holds what is not in state.json: {sorted(tensors)!r:.200}.")
    return found["step"], state


# The tree. JSON's own values and lists stand for themselves; an object has one key, the type of what it stands for.

_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMPY_DTYPE = re.compile(r"[<>|]([bi]1|u1|[iu][248]|f[248]|c8|c16)")
_STORED = ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32", "float64")
_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_AS_BYTES = ("uint16", "uint32", "uint64", "complex64", "complex128", *_FLOAT8)  # not in every version of safetensors
_DTYPES = {name: getattr(torch, name) for name in _STORED + _AS_BYTES}


def _encode(value: Any, path: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return the JSON of a value, and put its tensors and arrays into `tensors` under their paths."""
    if depth > _DEPTH:
        raise ValueError(f"`state` must be nested at most {_DEPTH} deep; {path} is deeper.")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if abs(value) < 2**53 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is str:  # JSON makes one character of two surrogates
        return {"str": value.encode("utf-8", "surrogatepass").hex()} if _SURROGATE.search(value) else value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple):
        items = [_encode(item, f"{path}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        if not all(type(key) in (str, int) for key in value):
            raise TypeError(f"The keys of a dict must be of type str or int; those of {path} are {list(value)!r:.200}.")
        at = {key: f"{path}[{key!r}]" for key in value}
        return {
            kind.__name__: [[_encode(k, path, {}), _encode(v, at[k], tensors, depth + 1)] for k, v in value.items()]
        }
    if kind in (Tensor, torch.nn.Parameter) and _dtype(value) in _DTYPES and not value.is_meta:
        tensors[path] = _stored(value)
        return {"tensor": _dtype(value)}
    if (kind is np.ndarray or isinstance(value, np.generic)) and _NUMPY_DTYPE.fullmatch(value.dtype.str):
        native = np.asarray(value).astype(value.dtype.newbyteorder("="), order="C")
        tensors[path] = _stored(torch.from_numpy(native))
        return {"array" if kind is np.ndarray else "scalar": value.dtype.str}
    what = [str(getattr(value, name)) for name in ("dtype", "layout", "device") if hasattr(value, name)]
    raise TypeError(
        f"{path} is of a type that is not saved: {' '.join([kind.__module__ + '.' + kind.__name__, *what])}."
    )


def _decode(node: Any, path: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return the value that `_encode` made this JSON of, and take its tensors out of `tensors`."""
    if depth > _DEPTH:
        raise ValueError(f"state.json is nested more than {_DEPTH} deep.")
    if isinstance(node, list):
        return [_decode(item, f"{path}[{i}]", tensors, depth + 1) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    match next(iter(node.items())) if len(node) == 1 else None:
        case "tuple", list(items):
            return tuple(_decode(items, path, tensors, depth))
        case "dict" | "OrderedDict" as name, list(pairs):
            made: dict[str | int, Any] = {} if name == "dict" else OrderedDict()
            for key, item in pairs:
                key = _decode(key, path, {}, _DEPTH)
                if type(key) not in (str, int) or key in made:
                    raise ValueError(f"{path} has a key of another type, or one twice: {key!r:.200}.")
                made[key] = _decode(item, f"{path}[{key!r}]", tensors, depth + 1)
            return made
        case "int", str(digits):
            return int(digits, 16)
        case "float", str(digits):
            return struct.unpack(">d", bytes.fromhex(digits))[0]
        case "str", str(digits):
            return bytes.fromhex(digits).decode("utf-8", "surrogatepass")
        case "bytes", str(digits):
            return bytes.fromhex(digits)
        case "tensor", str(dtype):
            return _take(tensors, path, dtype)
        case "array" | "scalar" as name, str(dtype) if _NUMPY_DTYPE.fullmatch(dtype):
            native = torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("=")))
            array = _take(tensors, path, _dtype(native)).numpy().astype(dtype, copy=False)
            return array if name == "array" else array[()]
    raise ValueError(f"{path} is not a value: {node!r:.200}.")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.") if tensor.layout is torch.strided else ""


def _stored(tensor: Tensor) -> Tensor:
    """Return a copy that safetensors takes: on the CPU, contiguous; bytes (..., itemsize) if it may lack the dtype."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
    return copy if _dtype(copy) in _STORED else copy.unsqueeze(-1).view(torch.uint8)


def _take(tensors: dict[str, Tensor], path: str, dtype: str) -> Tensor:
    """Take the tensor at this path, which must have this dtype."""
    tensor = tensors.pop(path, None)
    if tensor is not None and dtype in _AS_BYTES and tensor.dtype is torch.uint8:
        tensor = tensor.view(_DTYPES[dtype]).squeeze(-1)
    if tensor is None or tensor.dtype is not _DTYPES.get(dtype):
        raise ValueError(f"tensors.safetensors must hold {path} as {dtype!r:.200}.")
    return tensor
