"""Time and memory of every model as sequences get longer and states wider: measured exponents in place of claims.

    forward         one sequence (1, T, D), no gradient
    meta-gradient   2 tasks of one such sequence for support and query each, one inner step of SGD, second order
    step            one step (1, D) at test time, after T steps: what a live loop pays

of every model of the library, with all of the past T steps in the Transformer's window, and of PyTorch's own LSTM and
GRU, which `vmap` cannot map. T grows at width 64, the width W at T = 256: W is the state of a StateSpaceModel
(with hidden width 2 W), an LSTM, a GRU and a DiagonalSSM (of hidden width W), and the width of Transformer and MLP.

An exponent e says that time or memory grows as n^e: it is the slope of a straight line through the last three points,
both axes logarithmic. Every point is a process of its own, of one thread; memory is the peak of resident memory above
what the process held before.

    python benchmarks/complexity.py --out docs/results/complexity.json        # 10 minutes
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from memory import peak_of
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import ssmrl
from ssmrl import GRU, LSTM, MLP, DiagonalSSM, MetaMAML, StateSpaceModel, Transformer

D, OUTPUTS, TASKS = 23, 17, 2
WIDTH, LENGTH = 64, 256
"""Where the other one grows."""
LIMIT_GB = 12
"""What a process may take."""


class Torch(nn.Module):
    """PyTorch's own recurrent module and a readout, one step or a sequence."""

    def __init__(self, kind: Callable[..., nn.Module], width: int) -> None:
        super().__init__()
        self.rnn, self.out = kind(D, width, batch_first=True), nn.Linear(width, OUTPUTS)

    def forward(self, x: torch.Tensor, hidden_state: Any = None) -> tuple[torch.Tensor, Any]:
        h, state = self.rnn(x[:, None] if x.ndim == 2 else x, hidden_state)
        return self.out(h[:, 0] if x.ndim == 2 else h), state


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "StateSpaceModel": lambda width, length: StateSpaceModel(width, D, OUTPUTS, hidden_dim=2 * width),
    "GRU": lambda width, length: GRU(width, D, OUTPUTS),
    "LSTM": lambda width, length: LSTM(width, D, OUTPUTS),
    "Transformer": lambda width, length: Transformer(width, D, OUTPUTS, hidden_dim=4 * width, window=length),
    "DiagonalSSM": lambda width, length: DiagonalSSM(width, D, OUTPUTS, hidden_dim=width),
    "MLP": lambda width, length: MLP(D, OUTPUTS, hidden_dim=width),
    "nn.LSTM": lambda width, length: Torch(nn.LSTM, width),
    "nn.GRU": lambda width, length: Torch(nn.GRU, width),
}
"""`make(W, T)`."""
AXES = {"T": (64, 256, 1024, 4096), "W": (32, 64, 128, 256)}
TINY_AXES = {"T": (4, 8, 16), "W": (8,)}
MEASURES = ("forward_ms", "forward_mb", "meta_gradient_ms", "meta_gradient_mb", "step_ms", "state_kb")


@dataclass(frozen=True)
class Arguments:
    """Time and memory of every model over length and width."""

    models: tuple[str, ...] = ("all",)
    """Keys of MODELS, or all."""
    size: Literal["tiny", "default"] = "default"
    """tiny is for tests."""
    out: Path = Path("output/complexity.json")
    """File for the figures; the plot goes beside it."""
    point: Annotated[str | None, tyro.conf.arg(help="internal: one point")] = None


def measured(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median milliseconds of a call, after a first one, and the megabytes that the first one took."""
    _, peak = peak_of(call)
    times: list[float] = []
    began = time.perf_counter()
    while not times or (time.perf_counter() - began < seconds and len(times) < 200):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times), peak


def measure(name: str, width: int, length: int, seconds: float) -> dict[str, float | None]:
    """All of a point, in this process; None where it does not fit into `LIMIT_GB`, or where there is none."""
    torch.manual_seed(0)
    model = MODELS[name](width, length)
    x = torch.randn(1, length, D)
    found: dict[str, float | None] = dict.fromkeys(MEASURES)
    with torch.no_grad():
        model(x[:, :4])
        found["forward_ms"], found["forward_mb"] = measured(lambda: model(x), seconds)
        _, state = model(x)
        found["step_ms"], _ = measured(lambda: model(x[:, 0], state), seconds)
    kept = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    found["state_kb"] = sum(leaf.numel() * leaf.element_size() for leaf in kept) / 1024
    if not name.startswith("nn."):
        maml = MetaMAML(model, inner_lr=0.01)

        def update(steps: int = length) -> None:
            maml.meta_update(tuple(torch.randn(TASKS, 1, steps, size) for size in (D, OUTPUTS, D, OUTPUTS)))

        try:
            update(4)
            found["meta_gradient_ms"], found["meta_gradient_mb"] = measured(update, seconds)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
    return found


def point(name: str, width: int, length: int, seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps([name, width, length, seconds])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} with W = {width} and T = {length} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def exponent(sizes: list[int], values: list[float | None], least: float = 0.0) -> float | None:
    """Slope of log value over log size through the last three values above `least`; None where they are fewer."""
    there = [(n, v) for n, v in zip(sizes, values, strict=True) if v is not None and v > least][-3:]
    if len(there) < 3:
        return None
    n, v = np.log(np.array(there)).T
    return float(np.polyfit(n, v, 1)[0])


def exponents(row: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Of every measure, over a row of points; of memory where it is more than a megabyte, which is a few pages."""
    sizes = [int(size) for size in row]
    return {
        measure: exponent(sizes, [cell[measure] for cell in row.values()], 1.0 if measure.endswith("_mb") else 0.0)
        for measure in MEASURES
    }


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = (
        ("forward_ms", "forward, ms"),
        ("meta_gradient_ms", "meta-gradient, ms"),
        ("meta_gradient_mb", "meta-gradient, MB"),
        ("step_ms", "step at test time, ms"),
    )
    figure, axes = plt.subplots(2, len(shown), figsize=(4 * len(shown), 7), layout="constrained")
    for row, (axis_name, words) in zip(axes, (("T", "steps T"), ("W", "width W")), strict=True):
        for axis, (measure, label) in zip(row, shown, strict=True):
            for number, (name, of_model) in enumerate(figures.items()):
                cells = [(int(n), cell[measure]) for n, cell in of_model[axis_name].items() if cell[measure]]
                if cells:
                    style = "--" if name.startswith("nn.") else "-"
                    axis.loglog(*zip(*cells, strict=True), style, marker=".", color=f"C{number}", label=name)
            axis.set(xlabel=words, ylabel=label)
            ticks = [int(n) for n in next(iter(figures.values()))[axis_name]]
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    if arguments.point:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_GB << 30, LIMIT_GB << 30))
        print(json.dumps(measure(*json.loads(arguments.point))))
        return
    names = tuple(MODELS) if "all" in arguments.models else arguments.models
    if unknown := [name for name in names if name not in MODELS]:
        raise SystemExit(f"--models must be among {', '.join(MODELS)} or all; got {', '.join(unknown)}.")
    axes, seconds = (TINY_AXES, 0.01) if arguments.size == "tiny" else (AXES, 0.5)
    began = time.perf_counter()
    figures: dict[str, Any] = {name: {axis: {} for axis in axes} for name in names}
    jobs = [(axis, n, name) for axis, sizes in axes.items() for n in sizes for name in names]
    at_width, at_length = (8, 8) if arguments.size == "tiny" else (WIDTH, LENGTH)
    for axis, n, name in tqdm(jobs, desc="points", file=sys.stdout):
        width, length = (at_width, n) if axis == "T" else (n, at_length)
        figures[name][axis][str(n)] = point(name, width, length, seconds)
    slopes = {name: {axis: exponents(row) for axis, row in of_model.items()} for name, of_model in figures.items()}
    for axis in axes:
        print(f"\nexponents over {axis:3}" + "".join(f"{measure:>18}" for measure in MEASURES))
        for name, of_model in slopes.items():
            cells = ["" if e is None else f"{e:.2f}" for e in of_model[axis].values()]
            print(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells))
    record = {
        "figures": figures,
        "exponents": slopes,
        "sizes": {"width": at_width, "length": at_length, "inputs": D, "outputs": OUTPUTS, "tasks": TASKS},
        "seed": 0,
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "command": " ".join(["python benchmarks/complexity.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - began,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(figures, arguments.out.with_suffix(".png"))
    print(f"\nwrote {arguments.out} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
