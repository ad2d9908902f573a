"""The example of adaptive control at a tiny size, from another folder: its figures, and a run that was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "adaptive_control.py"
RETURNS = "returns: way, group, task"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    settings = ["--size", "tiny", "--threads", "1", "--candidates", "8", "--horizon", "4", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *settings, *arguments],
        capture_output=True,
        text=True,
        cwd=out.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = list(out.glob("*.json"))
    return json.loads(reports[0].read_text()) if reports else {}


def test_a_run_that_was_stopped_ends_where_one_that_was_not_ends(tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "stopped", "--stop-after", "1") == {}
    resumed = run(tmp_path / "stopped", "--resume")
    assert whole[RETURNS] == resumed[RETURNS]
    assert len(whole[RETURNS]) == 5
    assert (tmp_path / "whole" / "adaptive_control.png").stat().st_size > 10_000
    for returns in whole[RETURNS].values():
        assert [len(group) for group in returns] == [2, 2, 2]
    known, adapting, _, hidden, _ = whole[RETURNS].values()
    assert known != adapting != hidden
