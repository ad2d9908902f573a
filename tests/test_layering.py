"""Imports point one way."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import ssmrl

ROOT = Path(ssmrl.__file__).parent

ALLOWED = {
    "core": {"torch", "safetensors", "ssmrl.core"},
    "adaptation": {"torch", "torchopt", "ssmrl.core", "ssmrl.adaptation", "ssmrl.sharding", "ssmrl.__version__"},
    "meta_rl": {"torch", "torchopt", "ssmrl.core", "ssmrl.adaptation", "ssmrl.meta_rl", "ssmrl.sharding"},
    "env_runner": {"gymnasium", "numpy", "torch", "ssmrl.env_runner", "metaworld", "minari", "mujoco"},
}
EXTRAS = {"metaworld", "minari", "mujoco"}
over_packages = pytest.mark.parametrize("package", ALLOWED)


def imported(source: str) -> set[str]:
    """What a file imports: the top-level package, or the sub-package where it is ours; the standard library apart."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "ssmrl" else {module}
    tops = {".".join(name.split(".")[: 2 if name.startswith("ssmrl") else 1]) for name in names}
    return tops - set(sys.stdlib_module_names)


def test_imports_are_read_from_every_form_of_import():
    source = (
        "import os, torch.nn\nfrom ssmrl import core\nfrom ssmrl.a.b import c\ndef f():\n    from gymnasium import Env"
    )
    assert imported(source) == {"torch", "ssmrl.core", "ssmrl.a", "gymnasium"}


@over_packages
def test_a_package_imports_only_what_its_layer_may(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file.read_text("utf-8")) <= ALLOWED[package], file


def test_extras_are_imported_where_they_are_used():
    """A module of this library can be imported without them: inside a function, or for a type checker alone."""
    for file in ROOT.rglob("*.py"):
        top = [
            ast.unparse(n)
            for n in ast.parse(file.read_text("utf-8")).body
            if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        assert not EXTRAS & imported("\n".join(top)), file


def test_the_inner_loop_needs_no_models():
    """Losses arrive as arguments: only what holds a live model imports `core`."""
    importers = {f.name for f in (ROOT / "adaptation").glob("*.py") if "ssmrl.core" in imported(f.read_text("utf-8"))}
    assert importers == {"live.py"}


def test_every_package_has_its_layer():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ALLOWED)


def test_gymnasium_is_imported_in_env_runner_and_nowhere_else():
    importers = {file for file in ROOT.rglob("*.py") if "gymnasium" in imported(file.read_text("utf-8"))}
    assert {file.relative_to(ROOT).parts[0] for file in importers} == {"env_runner"}


def test_only_the_public_names_are_imported_dynamically():
    dynamic = {f.relative_to(ROOT) for f in ROOT.rglob("*.py") if {"import_module", "__import__"} & words(f)}
    assert dynamic == {Path("__init__.py")}


def words(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in nodes if isinstance(node, ast.Name)}
