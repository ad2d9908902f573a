"""One model in one safetensors file: weights, class name, constructor arguments, and a checksum of all of them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_model_file", "write_model_file"]

_FORMAT = "ssmrl model 1"


def write_model_file(
    path: str | os.PathLike[str],
    class_name: str,
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the file beside `path`, flush it to disk, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "class": class_name, "arguments": json.dumps(dict(arguments))}
    payload = safetensors.torch.save(tensors, metadata={**header, "sha256": _digest(header, tensors)})
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_model_file(path: str | os.PathLike[str], class_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights (on the CPU) of the `class_name` in the file.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, foreign, or holds another class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file at {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{str(path)!r} was not written by save(): expected the format {_FORMAT!r} in its header, "
            f"got {header.get('format')!r}."
        )
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{str(path)!r} is damaged: its contents do not match its checksum.")
    if header["class"] != class_name:
        raise ValueError(
            f"{str(path)!r} holds a {header['class']}, not a {class_name}; load it with {header['class']}.load."
        )
    arguments: dict[str, Any] = json.loads(header["arguments"])
    return arguments, tensors


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
