"""The main job at tiny size: table, plot and figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapt_dynamics.py"


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_it_prints_the_table_and_writes_plot_and_figures(env, tmp_path):
    printed = run("--env", env, "--size", "tiny", "--seed", "3", cwd=tmp_path)
    result = json.loads((tmp_path / "output" / f"adapt_dynamics_{env}_seed3.json").read_text())
    assert (tmp_path / "output" / f"adapt_dynamics_{env}_seed3.png").read_bytes().startswith(b"\x89PNG")
    errors = {name: error["mean"] for name, error in result["errors"].items()}
    assert all(math.isfinite(error) and error > 0 for error in errors.values())
    for row, name in (("(a)", "meta"), ("(b)", "joint"), ("(c)", "joint"), ("(d)", "untrained")):
        (line,) = (line for line in printed.splitlines() if line.startswith(row))
        assert f"{errors[f'{name}_before']:.4f}" in line
        assert (f"{errors[f'{name}_after']:.4f}" in line) == (row != "(b)")
    assert "meta-training: 100%" in printed
    # Even four meta-updates learn something, and three steps help the untrained model.
    assert result["loss_reduction"] > 0
    assert errors["untrained_after"] < errors["untrained_before"]
    # Adapter, one task at a time, agrees with MetaMAML.evaluate, all tasks at once.
    assert result["errors"]["meta_after"]["mean"] == pytest.approx(result["meta_curve"][-1][1], rel=1e-4)


def test_the_seed_decides_everything(tmp_path):
    results = []
    for out in ("one", "two"):
        run("--size", "tiny", "--epochs", "1", "--out", out, cwd=tmp_path)
        results.append(json.loads(next((tmp_path / out).glob("*.json")).read_text()))
    assert results[0]["errors"] == results[1]["errors"]
    assert results[0]["settings"]["epochs"] == 1


def test_help_names_the_arguments(tmp_path):
    printed = run("--help", cwd=tmp_path)
    for argument in ("--env", "--epochs", "--seed", "--size", "--out"):
        assert argument in printed
