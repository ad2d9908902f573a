"""The memory benchmark at a tiny size: every way gives the same meta-gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "meta_gradient_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_exact_ways_agree_and_first_order_does_not(tmp_path):
    out = tmp_path / "m.json"
    ways = ["plain", "recomputed", "both, √K", "first order", "higher", "jax remat"]
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--steps", "4", "--turns", "1", "--ways", *ways]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    norms = {way: row["4"]["gradient_norm"] for way, row in figures.items()}
    for way in ("recomputed", "both, √K", "higher", "jax remat"):
        assert norms[way] == pytest.approx(norms["plain"], rel=1e-5), way
    assert norms["first order"] != pytest.approx(norms["plain"], rel=1e-3)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_an_unknown_way_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--ways", "magic"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "--ways must be among plain" in done.stderr
