"""Memory and time of an exact meta-gradient as the number of inner steps K grows: ssmrl's options beside two peers.

The case is rl20 of meta_gradient_speed.py: 20 tasks of 4 sequences, 50 steps, StateSpaceModel with state 64; SGD inner
steps, float32. The ways:

    plain              everything stored
    mixed-mode         mixed_mode=True
    recomputed         recompute=1
    recomputed, √K     recompute=√K
    both               mixed_mode=True, recompute=1
    both, √K           mixed_mode=True, recompute=√K
    first order        first_order=True: another, biased gradient
    higher             the `higher` library, one task after the other as it has no vmap, a backward pass each
    jax remat          jit + vmap + lax.scan over inner steps, each in jax.checkpoint
    jax plain          the same without jax.checkpoint

Every point is a process of its own. Memory is the peak of resident memory during one meta-gradient, less what the
process held before it and after a meta-gradient with K = 1; time is a median over meta-gradients, of turns that go
through all ways.

    python benchmarks/meta_gradient_memory.py --out docs/results/meta_gradient_memory.json      # an hour
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from memory import peak_of
from torch import Tensor, nn
from torch.func import vmap

N, B, T, D, O, S, H = 20, 4, 50, 23, 17, 64, 128  # noqa: E741
RATE = 0.01
WEIGHTS_MB = 4 * N * (S * H + H + H * S + S + S * H + H + H * O + O + D * S + S + D * O + O) / 2**20
"""Of one copy of the weights for each task: what every way but first order stores K times, or √K times."""


@dataclass(frozen=True)
class Arguments:
    """Memory and time of an exact meta-gradient over the number of inner steps."""

    ways: tuple[str, ...] = ("all",)
    """Keys of WAYS, or all."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """K."""
    turns: int = 3
    """Processes for every point."""
    size: str = "rl20"
    """rl20, or tiny for a test."""
    out: Path = Path("output/meta_gradient_memory.json")
    """File for the figures; the plot goes beside it."""
    point: Annotated[str | None, tyro.conf.arg(help="internal: one point")] = None


def shapes(size: str) -> tuple[int, ...]:
    return (N, B, T, D, O, S, H) if size == "rl20" else (2, 1, 3, 2, 2, 4, 5)


def ssmrl_meta_gradient(size: str, steps: int, options: dict[str, Any]) -> Callable[[int], Any]:
    from ssmrl import StateSpaceModel, mse_loss
    from ssmrl.core import functional_forward
    from ssmrl.meta_rl import post_adaptation_loss

    n, b, t, d, o, s, h = shapes(size)
    torch.manual_seed(0)
    model = StateSpaceModel(s, d, o, hidden_dim=h)
    params = dict(model.named_parameters())
    tasks = tuple(torch.randn(n, b, t, width) for width in (d, o, d, o))
    optimizer = torchopt_sgd()

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_forward(model, params, x)[0], y)

    def run(steps: int) -> list[Tensor]:
        def task_loss(params: Any, *task: Tensor) -> Tensor:
            return post_adaptation_loss(
                loss, params, task[:2], task[2:], optimizer=optimizer, num_steps=steps, **options
            )

        losses = vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(params, *tasks)
        return list(torch.autograd.grad(losses.mean(), tuple(params.values())))

    return run


def torchopt_sgd() -> Any:
    import torchopt

    return torchopt.sgd(RATE)


class _Unrolled(nn.Module):
    """StateSpaceModel of PyTorch's modules alone, step by step: what higher can patch."""

    def __init__(self, model: nn.Module, state_dim: int) -> None:
        super().__init__()
        self.state_dim = state_dim
        for name, p in model.named_parameters():
            module, kind = name.rsplit(".", 1)
            module = module.replace(".", "_")
            if not hasattr(self, module):
                like = model.get_submodule(name.rsplit(".", 1)[0])
                setattr(self, module, nn.Linear(like.in_features, like.out_features))
            getattr(getattr(self, module), kind).data.copy_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.state_dim)
        outputs = []
        for t in range(x.shape[1]):
            h = self.state_mlp_out(self.state_mlp_hidden(h).relu()) + self.state_input(x[:, t])
            outputs.append(self.output_mlp_out(self.output_mlp_hidden(h).relu()) + self.output_input(x[:, t]))
        return torch.stack(outputs, 1)


def higher_meta_gradient(size: str, steps: int, options: dict[str, Any]) -> Callable[[int], Any]:
    import warnings

    import higher

    from ssmrl import StateSpaceModel, mse_loss

    n, b, t, d, o, s, h = shapes(size)
    torch.manual_seed(0)
    same = StateSpaceModel(s, d, o, hidden_dim=h)
    tasks = tuple(torch.randn(n, b, t, width) for width in (d, o, d, o))
    model = _Unrolled(same, s)
    inner = torch.optim.SGD(model.parameters(), lr=RATE)

    def run(steps: int) -> list[Tensor]:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
                with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, optimizer):
                    for _ in range(steps):
                        optimizer.step(mse_loss(fast(support_x), support_y))
                    (mse_loss(fast(query_x), query_y) / n).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return run


def jax_meta_gradient(size: str, steps: int, options: dict[str, Any]) -> Callable[[int], Any]:
    import jax
    import jax.numpy as jnp

    from ssmrl import StateSpaceModel

    n, b, t, d, o, s, h = shapes(size)
    torch.manual_seed(0)
    model = StateSpaceModel(s, d, o, hidden_dim=h)
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    tasks = tuple(jnp.asarray(torch.randn(n, b, t, width).numpy()) for width in (d, o, d, o))

    def linear(p: Any, name: str, v: Any) -> Any:
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def mlp(p: Any, name: str, v: Any) -> Any:
        return linear(p, f"{name}.out", jax.nn.relu(linear(p, f"{name}.hidden", v)))

    def loss(p: Any, x: Any, y: Any) -> Any:
        def step(state: Any, drive: Any) -> Any:
            state = mlp(p, "state_mlp", state) + drive
            return state, state

        drive = jnp.swapaxes(linear(p, "state_input", x), 0, 1)
        _, states = jax.lax.scan(step, jnp.zeros((b, s)), drive)
        output = mlp(p, "output_mlp", jnp.swapaxes(states, 0, 1)) + linear(p, "output_input", x)
        return jnp.mean((output - y) ** 2)

    def total(params: Any, tasks: Any, steps: int) -> Any:
        def task_loss(params: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
            def step(params: Any, _: None) -> Any:
                gradient = jax.grad(loss)(params, support_x, support_y)
                return jax.tree_util.tree_map(lambda p, g: p - RATE * g, params, gradient), None

            body = jax.checkpoint(step) if options["remat"] else step
            adapted, _ = jax.lax.scan(body, params, None, length=steps)
            return loss(adapted, query_x, query_y)

        return jnp.mean(jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(params, *tasks))

    compiled: dict[int, Any] = {}

    def run(steps: int) -> list[Any]:
        if steps not in compiled:
            gradient = jax.jit(jax.grad(total), static_argnums=2).lower(params, tasks, steps).compile()
            compiled[steps] = gradient
        result = compiled[steps](params, tasks)
        jax.block_until_ready(result)
        return [result[name] for name in params]

    # Compiled before memory is looked at.
    compiled[steps] = jax.jit(jax.grad(total), static_argnums=2).lower(params, tasks, steps).compile()
    return run


WAYS: dict[str, tuple[Callable[..., Callable[[int], Any]], Callable[[int], dict[str, Any]]]] = {
    "plain": (ssmrl_meta_gradient, lambda k: {}),
    "mixed-mode": (ssmrl_meta_gradient, lambda k: {"mixed_mode": True}),
    "recomputed": (ssmrl_meta_gradient, lambda k: {"recompute": 1}),
    "recomputed, √K": (ssmrl_meta_gradient, lambda k: {"recompute": math.isqrt(k)}),
    "both": (ssmrl_meta_gradient, lambda k: {"mixed_mode": True, "recompute": 1}),
    "both, √K": (ssmrl_meta_gradient, lambda k: {"mixed_mode": True, "recompute": math.isqrt(k)}),
    "first order": (ssmrl_meta_gradient, lambda k: {"first_order": True}),
    "higher": (higher_meta_gradient, lambda k: {}),
    "jax remat": (jax_meta_gradient, lambda k: {"remat": True}),
    "jax plain": (jax_meta_gradient, lambda k: {"remat": False}),
}


def measure(way: str, steps: int, size: str) -> dict[str, Any]:
    """Peak memory of one meta-gradient, and the median time of three more, in this process."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    make, options = WAYS[way]
    run = make(size, steps, options(steps))
    run(1)
    started = time.perf_counter()
    gradient, peak = peak_of(lambda: run(steps))
    first = time.perf_counter() - started
    times = [first]
    for _ in range(0 if first > 20 else 3):
        started = time.perf_counter()
        run(steps)
        times.append(time.perf_counter() - started)
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradient))
    return {"peak_mb": peak, "seconds": statistics.median(times), "gradient_norm": norm}


def point(way: str, steps: int, size: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps([way, steps, size])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{way} with K = {steps} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def plot(figures: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (way, row) in enumerate(figures.items()):
        steps = [int(k) for k in row]
        style = {"color": f"C{i}", "ls": "--" if way in ("higher", "jax remat", "jax plain") else "-", "marker": "."}
        axes[0].loglog(steps, [max(cell["peak_mb"], 0.1) for cell in row.values()], label=way, **style)
        axes[1].loglog(steps, [cell["seconds"] for cell in row.values()], label=way, **style)
    reference = [int(k) for k in next(iter(figures.values()))]
    axes[0].loglog(reference, [k * WEIGHTS_MB for k in reference], ":", color="0.5", label="K copies of the weights")
    axes[0].set_ylabel("peak memory, MB")
    axes[1].set_ylabel("seconds for a meta-gradient")
    for axis in axes:
        axis.set_xlabel("inner steps K")
        axis.set_xticks(reference, [str(k) for k in reference])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    if arguments.point:
        print(json.dumps(measure(*json.loads(arguments.point))))
        return
    ways = tuple(WAYS) if "all" in arguments.ways else arguments.ways
    if unknown := [way for way in ways if way not in WAYS]:
        raise SystemExit(f"--ways must be among {', '.join(WAYS)} or all; got {', '.join(unknown)}.")
    if arguments.size not in ("rl20", "tiny"):
        raise SystemExit(f"--size must be rl20 or tiny; got {arguments.size}.")
    if arguments.turns < 1 or min(arguments.steps) < 1:
        raise SystemExit("--turns and --steps must be at least 1.")
    started = time.perf_counter()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {way: {str(k): [] for k in arguments.steps} for way in ways}
    for turn in range(arguments.turns):
        for k in arguments.steps:
            for way in ways:
                runs[way][str(k)].append(point(way, k, arguments.size))
            line = "  ".join(f"{w} {runs[w][str(k)][-1]['peak_mb']:.0f} MB" for w in ways)
            print(f"turn {turn} K = {k}: {line}", flush=True)
    figures = {
        way: {
            k: {name: statistics.median(r[name] for r in results) for name in ("peak_mb", "seconds", "gradient_norm")}
            for k, results in row.items()
        }
        for way, row in runs.items()
    }
    for name, unit in (("peak_mb", "peak memory, MB"), ("seconds", "seconds")):
        print(f"\n{unit:18}" + "".join(f"{f'K = {k}':>10}" for k in arguments.steps))
        for way, row in figures.items():
            print(f"{way:18}" + "".join(f"{cell[name]:10.3g}" for cell in row.values()))
    record = {
        "figures": figures,
        "runs": runs,
        "weights_mb": WEIGHTS_MB,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "command": f"python benchmarks/meta_gradient_memory.py --ways {' '.join(repr(w) for w in ways)} "
        f"--steps {' '.join(map(str, arguments.steps))} --turns {arguments.turns}",
        "seconds": time.perf_counter() - started,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(figures, arguments.out.with_suffix(".png"))
    print(f"\nwrote {arguments.out} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
