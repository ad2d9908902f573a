"""MetaMAML and test-time adaptation on CartPole-v1 and Pendulum-v1, over several seeds: under two minutes on 2 cores.

Task and training are those of examples/adapt_dynamics.py, which is run once for every environment and seed; this
script only chooses the settings, and scores: means over seeds with 95 % Student t intervals. A run uses one core, so
that as many go on at a time as there are cores.

    python benchmarks/quick_benchmark.py                              # 3 seeds, small
    python benchmarks/quick_benchmark.py --seeds 5 --size default     # the figures of docs/results.md
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from scipy import stats

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "adapt_dynamics.py"
ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")


@dataclass(frozen=True)
class Arguments:
    """MetaMAML and test-time adaptation on CartPole-v1 and Pendulum-v1, over several seeds."""

    seeds: int = 3
    """Runs of every environment, with seeds 0, 1, ..."""
    size: Literal["tiny", "quick", "default", "large"] = "quick"
    """How much to spend on a run; see examples/adapt_dynamics.py."""
    out: Path = Path("output/quick_benchmark.json")
    """File for the figures."""


SCORES = {
    "loss reduction over meta-training": lambda r: r["loss_reduction"],
    "error before adaptation": lambda r: r["errors"]["meta_before"]["mean"],
    "error after adaptation, (a)": lambda r: r["errors"]["meta_after"]["mean"],
    "share that adaptation takes away": lambda r: r["adaptation_gain"],
    "error without MAML, (b)": lambda r: r["errors"]["joint_before"]["mean"],
    "... and adapted at its best rate, (c)": lambda r: r["errors"]["joint_after"]["mean"],
    "(a) / (b)": lambda r: r["ratio_to_joint"],
    "(a) / (c)": lambda r: r["ratio_to_joint_adapted"],
    "seconds": lambda r: r["seconds"]["all"],
}


def run(environment: str, seed: int, size: str) -> dict[str, Any]:
    """One run of the example: its figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLE), "--env", environment, "--seed", str(seed), "--size", size]
        done = subprocess.run([*command, "--out", folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        (file,) = Path(folder).glob("*.json")
        result: dict[str, Any] = json.loads(file.read_text())
    return result


def score(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over seeds and the half-width of its 95 % t interval, for every figure; no interval of one seed."""
    table = {}
    for name, figure in SCORES.items():
        values = np.array([figure(r) for r in results])
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
        table[name] = {"mean": values.mean(), "ci95": half, "values": values.tolist()}
    return table


def main(arguments: Arguments) -> None:
    if arguments.seeds < 1:
        raise SystemExit(f"--seeds must be at least 1; got {arguments.seeds}.")
    started = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {environment: [] for environment in ENVIRONMENTS}
    jobs = [(environment, seed) for environment in ENVIRONMENTS for seed in range(arguments.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: run(*job, arguments.size), jobs)
        for (environment, seed), result in zip(jobs, results, strict=True):
            runs[environment].append(result)
            print(
                f"{environment} seed {seed}: {result['errors']['meta_before']['mean']:.4f} -> "
                f"{result['errors']['meta_after']['mean']:.4f} in {result['seconds']['all']:.0f} s",
                flush=True,
            )
    scores = {environment: score(results) for environment, results in runs.items()}
    print(f"\n{f'mean of {arguments.seeds} seeds ± 95 % interval':40}" + "".join(f"{e:>22}" for e in ENVIRONMENTS))
    for name in SCORES:
        cells = ""
        for environment in ENVIRONMENTS:
            mean, half = scores[environment][name]["mean"], scores[environment][name]["ci95"]
            cells += f"{mean:.4f}{'' if half is None else f' ± {half:.4f}'}".rjust(22)
        print(f"{name:40}{cells}")
    report = {
        "scores": scores,
        "settings": {"seeds": arguments.seeds, "size": arguments.size}
        | {environment: results[0]["settings"] for environment, results in runs.items()},
        "rates": {environment: [r["rates"] for r in results] for environment, results in runs.items()},
        "rate_too_high": {environment: [r["rate_too_high"] for r in results] for environment, results in runs.items()},
        "versions": runs[ENVIRONMENTS[0]][0]["versions"],
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "command": f"python benchmarks/quick_benchmark.py --seeds {arguments.seeds} --size {arguments.size}",
        "seconds": time.perf_counter() - started,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {arguments.out} in {report['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
