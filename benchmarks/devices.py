"""What a GPU gains: meta-gradients, many adapting streams, and planning, on the CPU and on a device, in one run.

    python benchmarks/devices.py                       # the CPU alone, where there is no GPU
    python benchmarks/devices.py --devices cpu cuda --out docs/results/devices.json

Every figure is the median time of one call in milliseconds; ways of one case take turns. A call ends when the device
has done its work.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchopt
import tyro
from control_systems import SYSTEMS

import ssmrl
from ssmrl import AdaptationConfig, MetaMAML, StateSpaceModel, StreamAdapter
from ssmrl.meta_rl import BoxActions, Planner, dynamics_scales, model_step

HEADS = ["output_mlp.out", "output_input"]


@dataclass(frozen=True)
class Arguments:
    """Times of one call, on one or more devices."""

    devices: tuple[str, ...] = ("cpu",)
    """As PyTorch names them."""
    parts: tuple[Literal["meta-gradient", "streams", "planning"], ...] = ("meta-gradient", "streams", "planning")
    """What is timed."""
    ways: tuple[Literal["plain", "trace", "compiled"], ...] = ("plain", "trace", "compiled")
    """compile=False, "trace" and True."""
    tasks: tuple[int, ...] = (20, 200)
    """Of a meta-gradient: a StateSpaceModel 64-128, support and query of 4 sequences of 50 steps, one inner step."""
    streams: tuple[int, ...] = (256, 4096)
    """That make five Adam steps on a transition each, of the heads of the same model."""
    plans: tuple[int, ...] = (64, 1024)
    """Streams that plan by the cross-entropy method: 3 rounds of 100 candidates, 20 steps, a StateSpaceModel 32-64."""
    repeats: int = 10
    """Turns of every way."""
    threads: int = 2
    """Of the CPU."""
    seconds: float = 60.0
    """A way whose first call after compiling takes longer is not repeated."""
    out: Path = Path("output/devices.json")
    """File for the figures."""


def compile_of(way: str) -> bool | Literal["trace"]:
    return "trace" if way == "trace" else way == "compiled"


def meta_gradient(number: int, device: str, way: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = StateSpaceModel(64, 23, 17, hidden_dim=128).to(device)
    maml = MetaMAML(model, inner_lr=0.01, inner_steps=1, compile=compile_of(way))
    tasks = tuple(torch.randn(number, 4, 50, width, device=device) for width in (23, 17, 23, 17))
    return lambda: maml.meta_update(tasks)


def streams(number: int, device: str, way: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = StateSpaceModel(64, 32, 11, hidden_dim=128).to(device)
    config = AdaptationConfig(optimizer=torchopt.adam(1e-3), num_steps=5, adapted=HEADS)
    adapter = StreamAdapter(model, config, number, device, compile=compile_of(way))
    x, y, state = (torch.randn(number, width, device=device) for width in (32, 11, 64))
    return lambda: adapter.update_step(x, y, state)


def planning(number: int, device: str, way: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    system = SYSTEMS["pendulum"]
    model = StateSpaceModel(32, 4, 3, hidden_dim=64).to(device)
    observation = torch.randn(number, 3, device=device)
    scales = dynamics_scales(observation, torch.randn(number, 1, device=device), torch.randn(number, 3, device=device))
    actions = BoxActions(system.actions.low.to(device), system.actions.high.to(device))
    step = model_step(model, scales, system.cost, project=system.project)
    planner = Planner(step, actions, horizon=20, candidates=100, rounds=3, compile=compile_of(way))
    params = {name: p.detach().expand(number, *p.shape) for name, p in model.named_parameters()}
    state, plan = model.init_hidden(number), planner.init(number)
    generator = torch.Generator(device).manual_seed(0)
    return lambda: planner(params, state, observation, plan, planner.noise(number, generator))


PARTS = {"meta-gradient": meta_gradient, "streams": streams, "planning": planning}


def seconds(call: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(arguments: Arguments, part: str, number: int) -> dict[str, float]:
    """Median milliseconds of every way on every device, which take turns."""
    calls = {}
    for device in arguments.devices:
        for way in arguments.ways:
            call = PARTS[part](number, device, way)
            try:
                seconds(call, device)
            except Exception as error:  # a compiler that is not there, memory: the others are worth having
                print(f"  {part} {number} {device} {way}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            if seconds(call, device) < arguments.seconds:
                calls[f"{device}, {way}"] = (device, call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats):
        for name, (device, call) in calls.items():
            times[name].append(1000 * seconds(call, device))
    return {name: statistics.median(found) for name, found in times.items()}


def main(arguments: Arguments) -> None:
    torch.set_num_threads(min(arguments.threads, os.cpu_count() or 1))
    numbers = {"meta-gradient": arguments.tasks, "streams": arguments.streams, "planning": arguments.plans}
    names = {
        device: torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
        for device in arguments.devices
    }
    figures: dict[str, Any] = {}
    for part in arguments.parts:
        for number in numbers[part]:
            figures[f"{part}, {number}"] = found = measure(arguments, part, number)
            print(f"{part}, {number}: " + "; ".join(f"{way} {ms:.2f} ms" for way, ms in found.items()), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            report = {
                "milliseconds": figures,
                "devices": names,
                "date": time.strftime("%Y-%m-%d"),
                "arguments": {**asdict(arguments), "out": str(arguments.out)},
                "command": " ".join(["python benchmarks/devices.py", *sys.argv[1:]]),
                "versions": {
                    "ssmrl": ssmrl.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            }
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
