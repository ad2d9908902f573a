"""Builds the C++ loops of ssmrl.core.native, one library per instruction set; without a compiler, none."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("ssmrl", "core", "native", "recurrences.cpp")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Wno-psabi"]
X86 = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"]}
"""By the names that torch.backends.cpu.get_cpu_capability() has for them, in lower case."""


class NativeLoops(BuildHookInterface[Any]):
    """Hatchling's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into the source tree, and put what was built into the wheel."""
        if not sys.platform.startswith("linux"):
            return
        levels = {"default": [], **(X86 if platform.machine() == "x86_64" else {})}
        libraries = [SOURCE.with_name(f"{SOURCE.stem}_{level}.so") for level in levels]
        for library, flags in zip(libraries, levels.values(), strict=True):
            try:
                self._compile(library, flags)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or error
                self.app.display_warning(f"ssmrl: no compiled loops, so recurrences run in Python ({reason}).")
                return
        build_data["artifacts"] += [f"/{library.as_posix()}" for library in libraries]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def _compile(self, library: Path, flags: list[str]) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        built = Path(self.root, f"{library}.{os.getpid()}")
        object_file = built.with_suffix(".o")
        steps = (
            [*compiler, *FLAGS, *flags, "-c", str(Path(self.root, SOURCE)), "-o", str(object_file)],
            # Without -fopenmp: the functions of OpenMP are those that the process has, which are PyTorch's.
            [*compiler, "-shared", str(object_file), "-o", str(built)],
        )
        try:
            for step in steps:
                subprocess.run(step, check=True, capture_output=True, text=True)
            built.replace(Path(self.root, library))
        finally:
            object_file.unlink(missing_ok=True)
            built.unlink(missing_ok=True)


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))
