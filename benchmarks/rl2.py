"""RL² against the published numbers: `examples/rl2_bandit.py` with several seeds, put together.

    python benchmarks/rl2.py                # bandits of 10 and 100 pulls, tabular processes; three seeds of each
    python benchmarks/rl2.py --jobs 2       # two runs at a time; each is on one core
    python benchmarks/rl2.py --size tiny --seeds 2 --out output

No run is made again where its figures are there, and one that was stopped goes on. Written is rl2.json, which the
documentation shows.
"""

from __future__ import annotations

import json
import platform
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from meta_rl import Case, run

import ssmrl

KINDS = {
    "bandit, 10 pulls": (),
    "bandit, 100 pulls": ("--pulls", "100"),
    "tabular process, 10 episodes": ("--task", "tabular"),
}
MEANS, ERRORS, SECONDS = "mean return of a trial on test tasks", "standard error", "seconds of training"
POINTS = 100  # of a curve


@dataclass(frozen=True)
class Arguments:
    """The example of RL² with several seeds, put together."""

    seeds: int = 3
    """From 0 on."""
    jobs: int = 1
    """Runs at a time, of one thread each."""
    size: Literal["tiny", "default"] = "default"
    """Of the example."""
    runs: Path = Path("output/rl2")
    """Folder for the runs."""
    out: Path = Path("docs/results")
    """Folder for what is put together."""


def put_together(extra: tuple[str, ...], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several seeds: lists over seeds, but means in a trial."""
    step = max(len(runs[0]["curve"]) // POINTS, 1)
    return {
        **{key: {name: [one[key][name] for one in runs] for name in runs[0][key]} for key in (MEANS, ERRORS)},
        "published": runs[0]["published"],
        "in a trial": {
            name: [statistics.fmean(at) for at in zip(*(one["in a trial"][name] for one in runs), strict=True)]
            for name in runs[0]["in a trial"]
        },
        "curves": [one["curve"][::step] for one in runs],
        "curve step": step,
        SECONDS: [one[SECONDS] for one in runs],
        "command": " ".join(["python examples/rl2_bandit.py", *extra]),
        "arguments": [{k: v for k, v in one["arguments"].items() if k != "out"} for one in runs],
    }


def main(arguments: Arguments) -> None:
    case = Case("rl2_bandit.py", report="rl2_bandit.json", threads=False)
    names = {kind: kind.replace(", ", "_").replace(" ", "_") for kind in KINDS}
    wanted = [(kind, seed) for kind in KINDS for seed in range(arguments.seeds)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        made = list(pool.map(lambda one: run(arguments, case, names[one[0]], KINDS[one[0]], one[1]), wanted))
    found: dict[str, Any] = {}
    for n, (kind, extra) in enumerate(KINDS.items()):
        found[kind] = put_together(extra, made[n * arguments.seeds : (n + 1) * arguments.seeds])
        print(kind, {name: f"{statistics.fmean(values):.2f}" for name, values in found[kind][MEANS].items()})
    report = {
        "runs": found,
        "command": f"python benchmarks/rl2.py --seeds {arguments.seeds} --jobs {arguments.jobs}",
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, 2 cores, one of which a run has",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rl2.json").write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
