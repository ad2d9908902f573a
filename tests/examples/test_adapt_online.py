"""The live example at tiny size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapt_online.py"


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_it_adapts_live_and_writes_plot_and_figures(env, tmp_path):
    printed = run("--env", env, "--size", "tiny", "--streams", "3", "--seed", "2", cwd=tmp_path)
    result = json.loads((tmp_path / "output" / f"adapt_online_{env}_seed2.json").read_text())
    assert (tmp_path / "output" / f"adapt_online_{env}_seed2.png").read_bytes().startswith(b"\x89PNG")
    errors = {name: row["median"] for name, row in result["errors"].items()}
    assert len(errors) == 6
    assert all(math.isfinite(error) for error in errors.values())
    assert all(f"{error:.4f}" in printed for error in errors.values())
    assert "3 live streams: 100%" in printed
    # Even a model that was hardly trained gets better at what it sees, and best in hindsight.
    assert errors["adapting, carrying on, guarded"] < errors["no adaptation"]
    assert errors["fitted to the true physics, in hindsight"] == min(errors.values())


def test_help_names_the_arguments(tmp_path):
    printed = run("--help", cwd=tmp_path)
    for argument in ("--env", "--streams", "--seed", "--size", "--out"):
        assert argument in printed
