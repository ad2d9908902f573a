"""The RL² example at a tiny size, from another folder: its figures, its seeds, and a run that is killed and goes on."""

from __future__ import annotations

import json
import math
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmrl.checkpoint import load_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "rl2_bandit.py"


def start(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    done = start(out, *arguments)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads((out / "rl2_bandit.json").read_text())
    return figures


def repeatable(figures: dict[str, Any]) -> dict[str, Any]:
    """Everything but how long it took and what was asked for."""
    return {name: value for name, value in figures.items() if name not in ("seconds of training", "arguments")}


def test_it_plots_and_reports_and_another_seed_gives_another_curve(tmp_path):
    first = run(tmp_path / "a")
    other = run(tmp_path / "b", "--seed", "1")
    means = first["mean return of a trial on test tasks"]
    assert [*means] == ["RL²", "RL², most probable actions", "random", "Thompson", "UCB1", "oracle"]
    assert all(0 <= value <= 10 for value in means.values())
    assert means["oracle"] == max(means.values())
    for name, units in first["in a trial"].items():
        assert len(units) == 10
        assert math.isclose(sum(units), means[name], rel_tol=1e-9)
    assert len(first["curve"]) == 4
    assert other["curve"] != first["curve"]
    assert (tmp_path / "a" / "rl2_bandit.png").stat().st_size > 10_000


@pytest.mark.parametrize("task", ["bandit", "tabular"])
def test_a_run_that_was_killed_ends_where_the_uninterrupted_one_ends(tmp_path, task):
    """Killed after the third iteration, it goes on from the checkpoint of the second, in the middle of annealing."""
    arguments = ("--task", task, "--save-every", "2", *(("--episodes", "2") if task == "tabular" else ()))
    whole = run(tmp_path / "whole", *arguments)
    killed = start(tmp_path / "killed", *arguments, "--stop-after", "3")
    assert killed.returncode == 0, killed.stderr
    assert not (tmp_path / "killed" / "rl2_bandit.json").exists()
    resumed = run(tmp_path / "killed", *arguments, "--resume")
    assert repeatable(resumed) == repeatable(whole)  # the same seed, the same bits
    assert len(whole["curve"]) == 4
    if task == "tabular":
        assert len(whole["in a trial"]["PSRL"]) == 2


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(tmp_path):
    arguments = ("--iterations", "60", "--save-every", "1000")  # nothing is saved unless it is asked to stop
    whole = run(tmp_path / "whole", *arguments)
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--out", str(tmp_path / "asked"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        shown = ""
        while "return=" not in shown:  # of the bar, after an iteration
            shown += process.stdout.read(1)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143
    found = load_checkpoint(tmp_path / "asked" / "checkpoints")
    assert found is not None
    assert 0 < found.step < 60
    resumed = run(tmp_path / "asked", *arguments, "--resume")
    assert repeatable(resumed) == repeatable(whole)


@pytest.mark.parametrize("kind", ["gru", "lstm", "ssm", "diagonal", "fast-weights"])
def test_a_memory_run_over_a_sequence_is_its_steps_and_forgets_at_a_reset(kind):
    """The laws of a state model, which the one that is defined in the script keeps as well."""
    example = runpy.run_path(str(SCRIPT))
    torch.manual_seed(0)
    memory = example["Memory"](example["MODELS"][kind], 5, 3, 8, 20).double()
    x, reset = torch.randn(3, 7, 5, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.bool)
    reset[1, 3] = reset[1, 5] = reset[2, 0] = True
    whole, last = memory(x, None, reset)
    state, steps = memory.init_hidden(3), []
    for t in range(7):
        y, state = memory(x[:, t], state, reset[:, t])
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    torch.testing.assert_close(state, last)
    first, between = memory(x[:, :4], None, reset[:, :4])
    torch.testing.assert_close(torch.cat([first, memory(x[:, 4:], between, reset[:, 4:])[0]], 1), whole)
    torch.testing.assert_close(memory(x[1:2, 3:5])[0], whole[1:2, 3:5])


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_package_that_is_missing_is_named(tmp_path):
    done = start(tmp_path / "a", "--tensorboard")
    assert done.returncode != 0
    assert "--tensorboard needs the package `tensorboard` (pip install tensorboard)" in done.stderr
