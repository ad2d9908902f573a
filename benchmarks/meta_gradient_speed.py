"""How long one second-order meta-update takes: ssmrl beside four other ways to write it.

A meta-update is that of MAML: K SGD steps on every task's support set, the exact gradient of the mean query loss
through them, one Adam step; float32. The engines start from the same weights and read the same data:

    ssmrl      MetaMAML.meta_update
    traced     the same with compile="trace", recorded before the clock starts
    compiled   the same with compile=True, compiled before the clock starts
    loop       Python loops over tasks and time steps, torch.autograd.grad(create_graph=True)
    higher     the `higher` library, loops over tasks and time steps
    unrolled   torch.func: vmap over tasks, the recurrence unrolled step by step
    jax        jit + vmap + lax.scan, compiled before the clock starts

First the script compares the meta-gradient of every engine with one that plain autograd takes in float64, and stops
where one differs. Then engines take turns, so that the noise of the machine hits
all alike; a figure is the median over turns. A peer that is not installed, or not written for a model, is named and
left out.

    python benchmarks/meta_gradient_speed.py                                    # the table of docs/results.md
    python benchmarks/meta_gradient_speed.py --models all --cases rl20
    python benchmarks/meta_gradient_speed.py --cases tiny --scaling             # also growth with T, N, K: PNG

Threads: the process is confined to as many cores as `--threads` says (Linux), which binds every engine alike; torch is
told the number, and XLA, which has no setting of its own, takes it from the variable NPROC. With other work on those
cores torch on several threads loses most, for they wait for each other: the report has the load average before and
after; ratios mean something where it is small.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch._inductor.utils
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import grad, vmap

import ssmrl
from ssmrl import MetaMAML
from ssmrl.core import functional_forward

INNER_LR, OUTER_LR = 0.01, 0.001
TOLERANCE = 1e-2
"""Of float32 meta-gradients, relative, parameter by parameter. It is as wide as this because a ReLU's slope flips where
float32 rounds an activation across zero: with seed 1 one does in rl20k5, for ssmrl and for JAX alike, which puts 2.4e-3
into one bias. In float64, where the tests compare the engines, they agree to 1e-10."""

# ---------------------------------------------------------------------------------------------------------- settings


class Sizes(NamedTuple):
    """N tasks of B sequences (support and query alike), T steps, D inputs, O outputs, S state, K inner steps."""

    N: int
    B: int
    T: int
    D: int
    O: int  # noqa: E741
    S: int
    K: int


CASES = {
    "smoke": Sizes(2, 1, 3, 2, 2, 4, 1),
    "tiny": Sizes(8, 1, 10, 4, 4, 4, 1),
    "rl20": Sizes(20, 4, 50, 23, 17, 64, 1),
    "rl20k5": Sizes(20, 4, 50, 23, 17, 64, 5),
    "long": Sizes(8, 1, 200, 23, 17, 128, 1),
}
SCALING_BASE = Sizes(8, 4, 50, 23, 17, 64, 1)
SCALING_AXES = {"T": (10, 100, 250, 500, 900, 1000), "N": (1, 4, 16, 64, 256), "K": (1, 2, 4, 8)}
SCALING_ENGINES = ("ssmrl", "jax")
MODELS: dict[str, Callable[[Sizes], nn.Module]] = {
    "StateSpaceModel": lambda s: ssmrl.StateSpaceModel(s.S, s.D, s.O, hidden_dim=128),
    "GRU": lambda s: ssmrl.GRU(s.S, s.D, s.O),
    "LSTM": lambda s: ssmrl.LSTM(s.S, s.D, s.O),
    "DiagonalSSM": lambda s: ssmrl.DiagonalSSM(s.S, s.D, s.O),
    "Transformer": lambda s: ssmrl.Transformer(s.S, s.D, s.O),
    "MLP": lambda s: ssmrl.MLP(s.D, s.O),
}
"""A model of every family that `ssmrl` has, for the sizes of a case; widths that a case does not give are defaults."""


@dataclass(frozen=True)
class Arguments:
    """How long one second-order meta-update takes, engine by engine."""

    cases: tuple[str, ...] = ("tiny", "rl20", "rl20k5", "long")
    """Keys of CASES."""
    engines: tuple[str, ...] = ("ssmrl", "traced", "compiled", "jax", "unrolled", "higher", "loop")
    """Keys of ENGINES."""
    models: tuple[str, ...] = ("StateSpaceModel",)
    """Model families; "all" for every one that ssmrl has."""
    repeats: int = 15
    """Turns of every engine."""
    slow_repeats: int = 3
    """Turns of `loop` and `higher`."""
    threads: int = 2
    """Cores for every engine."""
    seed: int = 0
    """Of weights and data."""
    scaling: bool = False
    """Also time and memory as T, N and K grow, for ssmrl and JAX: every point in a process of its own, and a PNG."""
    out: Path = Path("output/meta_gradient_speed.json")
    """File for the figures; the plot goes beside it."""
    point: Annotated[str | None, tyro.conf.arg(help="internal: one point of --scaling")] = None


# -------------------------------------------------------------------------------------------------------------- task


class Problem(NamedTuple):
    """What every engine is given, and does not change."""

    family: str
    model: nn.Module
    sizes: Sizes
    data: tuple[Tensor, ...]
    """support_x (N, B, T, D), support_y (N, B, T, O), query_x, query_y."""


def make_problem(family: str, sizes: Sizes, seed: int = 0) -> Problem:
    """A model with its initial weights, and standard normal data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[family](sizes)
    generator = torch.Generator().manual_seed(seed)
    widths = (sizes.D, sizes.O, sizes.D, sizes.O)
    data = tuple(torch.randn(sizes.N, sizes.B, sizes.T, width, generator=generator) for width in widths)
    return Problem(family, model, sizes, data)


# ------------------------------------------------------------------------------------- cells, once for torch and JAX


class Ops(NamedTuple):
    """What a cell is written with."""

    linear: Callable[..., Any]
    """(x, weight, bias) -> x weight^T + bias."""
    relu: Callable[..., Any]
    sigmoid: Callable[..., Any]
    tanh: Callable[..., Any]
    split: Callable[..., Any]
    """(x, n) -> n equal parts of the last axis."""


TORCH = Ops(F.linear, torch.relu, torch.sigmoid, torch.tanh, lambda x, n: x.chunk(n, -1))


class Cell(NamedTuple):
    """A recurrence in three parts: only `step` has to wait for the step before. w: the weights by name."""

    drive: Callable[..., Any]
    """(ops, w, x) -> what x_t brings into step t, at any leading axes."""
    step: Callable[..., tuple[Any, ...]]
    """(ops, w, state, drive_t) -> state, a tuple of num_states arrays (..., S), the first of which is read out."""
    readout: Callable[..., Any]
    """(ops, w, h, x) -> y."""
    num_states: int
    input_weights: tuple[str, ...]
    """Weight matrices that x is multiplied by: no derivative by x is needed."""


def _perceptron(ops: Ops, w: Any, name: str, x: Any) -> Any:
    hidden = ops.relu(ops.linear(x, w[f"{name}.hidden.weight"], w[f"{name}.hidden.bias"]))
    return ops.linear(hidden, w[f"{name}.out.weight"], w[f"{name}.out.bias"])


def _ssm_drive(ops: Ops, w: Any, x: Any) -> Any:
    return ops.linear(x, w["state_input.weight"], w["state_input.bias"])


def _ssm_step(ops: Ops, w: Any, state: tuple[Any, ...], drive: Any) -> tuple[Any, ...]:
    return (_perceptron(ops, w, "state_mlp", state[0]) + drive,)


def _ssm_readout(ops: Ops, w: Any, h: Any, x: Any) -> Any:
    return _perceptron(ops, w, "output_mlp", h) + ops.linear(x, w["output_input.weight"], w["output_input.bias"])


def _gated_drive(ops: Ops, w: Any, x: Any) -> Any:
    return ops.linear(x, w["rnn.weight_ih_l0"], w["rnn.bias_ih_l0"])


def _gru_step(ops: Ops, w: Any, state: tuple[Any, ...], drive: Any) -> tuple[Any, ...]:
    (h,) = state
    x_r, x_z, x_n = ops.split(drive, 3)
    h_r, h_z, h_n = ops.split(ops.linear(h, w["rnn.weight_hh_l0"], w["rnn.bias_hh_l0"]), 3)
    z = ops.sigmoid(x_z + h_z)
    return ((1 - z) * ops.tanh(x_n + ops.sigmoid(x_r + h_r) * h_n) + z * h,)


def _lstm_step(ops: Ops, w: Any, state: tuple[Any, ...], drive: Any) -> tuple[Any, ...]:
    h, c = state
    i, f, g, o = ops.split(drive + ops.linear(h, w["rnn.weight_hh_l0"], w["rnn.bias_hh_l0"]), 4)
    c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
    return ops.sigmoid(o) * ops.tanh(c), c


def _linear_readout(ops: Ops, w: Any, h: Any, x: Any) -> Any:
    return ops.linear(h, w["readout.weight"], w["readout.bias"])


CELLS = {
    "StateSpaceModel": Cell(_ssm_drive, _ssm_step, _ssm_readout, 1, ("state_input.weight", "output_input.weight")),
    "GRU": Cell(_gated_drive, _gru_step, _linear_readout, 1, ("rnn.weight_ih_l0",)),
    "LSTM": Cell(_gated_drive, _lstm_step, _linear_readout, 2, ("rnn.weight_ih_l0",)),
}

# ----------------------------------------------------------------------------------------------------------- engines


class Missing(Exception):
    """Why an engine cannot take part."""


class Engine(NamedTuple):
    """One way to make a meta-update, with its own copy of the weights."""

    update: Callable[[], Any]
    """One meta-update."""
    gradient: Callable[[], dict[str, np.ndarray]]
    """One meta-update, and the meta-gradient that it used."""
    compile_seconds: float | None = None


def ssmrl_engine(problem: Problem, *, compile: bool | Literal["trace"] = False) -> Engine:
    """MetaMAML.meta_update; its gradient is read when the outer optimizer gets it."""
    model = copy.deepcopy(problem.model)
    maml = MetaMAML(model, INNER_LR, OUTER_LR, inner_steps=problem.sizes.K, compile=compile)

    def update() -> float:
        return maml.meta_update(problem.data)  # type: ignore[arg-type]

    def gradient() -> dict[str, np.ndarray]:
        seen: dict[str, np.ndarray] = {}
        handle = maml.outer_optimizer.register_step_pre_hook(lambda *_: seen.update(_gradients(maml.model)))
        update()
        handle.remove()
        return seen

    return Engine(update, gradient)


def compiled_engine(problem: Problem, *, compile: Literal[True, "trace"] = True) -> Engine:
    """MetaMAML(compile=…).meta_update; another learner compiles first, for the time it takes without a cache."""
    started = time.perf_counter()
    with torch._inductor.utils.fresh_inductor_cache() if compile is True else contextlib.nullcontext():
        ssmrl_engine(problem, compile=compile).update()
    seconds = time.perf_counter() - started
    return ssmrl_engine(problem, compile=compile)._replace(compile_seconds=seconds)


def traced_engine(problem: Problem) -> Engine:
    """MetaMAML(compile="trace").meta_update."""
    return compiled_engine(problem, compile="trace")


def loop_engine(problem: Problem) -> Engine:
    """Loops over tasks, inner steps and time steps."""
    network = _step_by_step(problem)

    def backward(model: nn.Module) -> None:
        theta = dict(model.named_parameters())
        for support_x, support_y, query_x, query_y in zip(*problem.data, strict=True):
            w = theta
            for _ in range(problem.sizes.K):
                loss = F.mse_loss(network(w, support_x), support_y)
                g = torch.autograd.grad(loss, tuple(w.values()), create_graph=True)
                w = {name: p - INNER_LR * g_p for (name, p), g_p in zip(w.items(), g, strict=True)}
            (F.mse_loss(network(w, query_x), query_y) / problem.sizes.N).backward()

    return _with_adam(copy.deepcopy(problem.model), backward)


def higher_engine(problem: Problem) -> Engine:
    """`higher.innerloop_ctx` around a plain module: it cannot patch an abstract class, as models of ssmrl have."""
    network = _step_by_step(problem)
    try:
        import higher
    except ImportError as error:
        raise Missing("higher is not installed: pip install higher") from error
    plain = _Plain(problem.model, network)

    def backward(model: nn.Module) -> None:
        inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
        for support_x, support_y, query_x, query_y in zip(*problem.data, strict=True):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, fast_sgd):
                for _ in range(problem.sizes.K):
                    fast_sgd.step(F.mse_loss(fast(support_x), support_y))
                (F.mse_loss(fast(query_x), query_y) / problem.sizes.N).backward()

    engine = _with_adam(plain, backward)
    return engine._replace(gradient=lambda: {plain.names[key]: g for key, g in engine.gradient().items()})


class _Plain(nn.Module):
    """A network as a module that owns its weights, under names without dots."""

    def __init__(self, model: nn.Module, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self.names = {name.replace(".", "__"): name for name, _ in model.named_parameters()}
        for name, p in model.named_parameters():
            self.register_parameter(name.replace(".", "__"), nn.Parameter(p.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.network({name: getattr(self, key) for key, name in self.names.items()}, x)


def unrolled_engine(problem: Problem) -> Engine:
    """torch.func.vmap over tasks; what does not depend on the step before is one product for all T."""
    network = _unrolled(problem)

    def backward(model: nn.Module) -> None:
        losses = vmap(_task_loss(network, problem.sizes.K), in_dims=(None, 0, 0, 0, 0))
        losses(dict(model.named_parameters()), *problem.data).mean().backward()

    return _with_adam(copy.deepcopy(problem.model), backward)


def jax_engine(problem: Problem) -> Engine:
    """The whole update, Adam included, as one compiled function."""
    cell = _cell(problem)
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Missing("jax is not installed: pip install jax") from error
    cpu = jax.devices("cpu")[0]
    ops = Ops(
        linear=lambda x, weight, bias: x @ weight.T + bias,
        relu=jax.nn.relu,
        sigmoid=jax.nn.sigmoid,
        tanh=jnp.tanh,
        split=lambda x, n: jnp.split(x, n, -1),
    )

    def network(w: Any, x: Any) -> Any:
        x = jnp.swapaxes(x, 0, 1)
        zero = jnp.zeros((x.shape[1], problem.sizes.S), x.dtype)

        def step(state: Any, drive: Any) -> tuple[Any, Any]:
            state = cell.step(ops, w, state, drive)
            return state, state[0]

        _, h = jax.lax.scan(step, (zero,) * cell.num_states, cell.drive(ops, w, x))
        return jnp.swapaxes(cell.readout(ops, w, h, x), 0, 1)

    def mean_squared_error(w: Any, x: Any, y: Any) -> Any:
        return jnp.mean((network(w, x) - y) ** 2)

    def task_loss(w: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(problem.sizes.K):
            g = jax.grad(mean_squared_error)(w, support_x, support_y)
            w = jax.tree.map(lambda p, g_p: p - INNER_LR * g_p, w, g)
        return mean_squared_error(w, query_x, query_y)

    def meta_loss(w: Any, data: Any) -> Any:
        return jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(w, *data).mean()

    def step(w: Any, m: Any, v: Any, t: Any, data: Any) -> tuple[Any, ...]:
        loss, g = jax.value_and_grad(meta_loss)(w, data)
        t = t + 1  # Adam as in torch.optim: beta 0.9 and 0.999, eps 1e-8
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        rate, scale = OUTER_LR / (1 - 0.9**t), 1 / jnp.sqrt(1 - 0.999**t)
        w = jax.tree.map(lambda p, m, v: p - rate * m / (scale * jnp.sqrt(v) + 1e-8), w, m, v)
        return w, m, v, t, g, loss

    weights = {name: jax.device_put(p.detach().numpy().copy(), cpu) for name, p in problem.model.named_parameters()}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    data = tuple(jax.device_put(part.numpy().copy(), cpu) for part in problem.data)
    carry = (weights, zeros, zeros, jax.device_put(np.float32(0), cpu))
    started = time.perf_counter()
    compiled = jax.jit(step).lower(*carry, data).compile()
    compile_seconds = time.perf_counter() - started

    def gradient() -> dict[str, np.ndarray]:
        nonlocal carry
        *new, g, _ = jax.block_until_ready(compiled(*carry, data))
        carry = tuple(new)  # type: ignore[assignment]
        return {name: np.asarray(g[name]) for name in g}

    def update() -> float:
        nonlocal carry
        *new, _, loss = jax.block_until_ready(compiled(*carry, data))
        carry = tuple(new)  # type: ignore[assignment]
        return float(loss)

    return Engine(update, gradient, compile_seconds)


ENGINES: dict[str, Callable[[Problem], Engine]] = {
    "ssmrl": ssmrl_engine,
    "traced": traced_engine,
    "compiled": compiled_engine,
    "jax": jax_engine,
    "unrolled": unrolled_engine,
    "higher": higher_engine,
    "loop": loop_engine,
}
SLOW = ("higher", "loop")


def _with_adam(model: nn.Module, backward: Callable[[nn.Module], None]) -> Engine:
    """An engine of what accumulates the meta-gradient in `.grad`."""
    adam = torch.optim.Adam(model.parameters(), lr=OUTER_LR, fused=True)

    def update() -> None:
        adam.zero_grad()
        backward(model)
        adam.step()

    def gradient() -> dict[str, np.ndarray]:
        update()
        return _gradients(model)

    return Engine(update, gradient)


def _gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def _task_loss(network: Callable[..., Tensor], num_steps: int) -> Callable[..., Tensor]:
    """(weights, support_x, support_y, query_x, query_y) -> query loss after K inner steps."""

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(network(w, x), y)

    def task_loss(w: dict[str, Tensor], support_x: Tensor, support_y: Tensor, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(num_steps):
            g = grad(loss)(w, support_x, support_y)
            w = {name: p - INNER_LR * g[name] for name, p in w.items()}
        return loss(w, x, y)

    return task_loss


def _cell(problem: Problem) -> Cell:
    if problem.family not in CELLS:
        raise Missing(f"no peer of {problem.family} is written")
    return CELLS[problem.family]


def _step_by_step(problem: Problem) -> Callable[..., Tensor]:
    """(weights, x (B, T, D)) -> y (B, T, O), with everything in the loop over time, as a cell is first written."""
    cell = _cell(problem)

    def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
        state, ys = (x.new_zeros(x.shape[0], problem.sizes.S),) * cell.num_states, []
        for x_t in x.unbind(1):
            state = cell.step(TORCH, w, state, cell.drive(TORCH, w, x_t))
            ys.append(cell.readout(TORCH, w, state[0], x_t))
        return torch.stack(ys, 1)

    return network


def _unrolled(problem: Problem) -> Callable[..., Tensor]:
    """The same, with only what is sequential in the loop over time."""
    cell = _cell(problem)

    def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
        state, hs = (x.new_zeros(x.shape[0], problem.sizes.S),) * cell.num_states, []
        for drive in cell.drive(TORCH, w, x).unbind(1):
            state = cell.step(TORCH, w, state, drive)
            hs.append(state[0])
        return cell.readout(TORCH, w, torch.stack(hs, 1), x)

    return network


# ----------------------------------------------------------------------------------------------------------- scoring


def reference_gradient(problem: Problem) -> dict[str, np.ndarray]:
    """The meta-gradient in float64 by plain autograd: unrolled, or through the model where no cell is written."""
    model = copy.deepcopy(problem.model).double()
    if problem.family in CELLS:
        network = _unrolled(problem)
    else:

        def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_forward(model, w, x)[0]

    losses = vmap(_task_loss(network, problem.sizes.K), in_dims=(None, 0, 0, 0, 0))
    losses(dict(model.named_parameters()), *(part.double() for part in problem.data)).mean().backward()
    return _gradients(model)


def gradient_error(gradient: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Max over parameters p of |g_p - r_p| / (|r_p| + |r| / 1000), with |r| over all: exact zeros may round."""
    if gradient.keys() != reference.keys():
        return float("inf")
    norm = float(np.sqrt(sum(np.square(r).sum() for r in reference.values())))
    return max(
        float(np.linalg.norm(gradient[name] - r) / (np.linalg.norm(r) + norm / 1000)) for name, r in reference.items()
    )


def meta_update_flops(problem: Problem) -> int | None:
    """Floating-point operations of the matrix products of one meta-update; None where no formula is written.

    On the R = N·B·T rows of support or query data, an (m, n) weight matrix costs 2·R·m·n for every product. An inner
    step has 3 for a matrix that is fed by states (output, and derivatives by weight and by input), and its derivative
    has 2 for each of these: 9 in all. The query loss and its gradient have 3. A matrix that is fed by x needs no
    derivative by its input, which leaves 4 and 2. For K steps

        FLOPs = 2·R·[(9K + 3)·(weights fed by states) + (4K + 2)·(weights fed by x)].
    """
    if problem.family not in CELLS:
        return None
    N, B, T, *_, K = problem.sizes
    sizes = {name: p.numel() for name, p in problem.model.named_parameters() if p.dim() == 2}
    fed_by_x = sum(sizes[name] for name in CELLS[problem.family].input_weights)
    return 2 * N * B * T * ((9 * K + 3) * (sum(sizes.values()) - fed_by_x) + (4 * K + 2) * fed_by_x)


def peak_flops(size: int = 2048, turns: int = 5) -> float:
    """Floating-point operations per second of the largest product that torch multiplies here, the best of `turns`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, b)) for _ in range(turns + 1))


def take_turns(engines: dict[str, Engine], repeats: int, slow_repeats: int) -> dict[str, list[float]]:
    """Seconds per update, turn by turn. A turn is one update, or as many as take 0.1 s after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    guess = {name: _seconds(engine.update) for name, engine in engines.items()}
    slow_every = max(1, repeats // slow_repeats)
    for turn in range(repeats):
        for name, engine in engines.items():
            if name in SLOW and (turn % slow_every or len(seconds[name]) >= slow_repeats):
                continue
            calls = max(1, min(30, int(0.1 / guess[name])))
            time.sleep(0.01)  # worker threads of the engine before spin for some milliseconds
            if calls > 1:
                engine.update()
            seconds[name].append(_seconds(lambda e=engine, n=calls: [e.update() for _ in range(n)]) / calls)
    return seconds


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(problem: Problem, names: Sequence[str], repeats: int, slow_repeats: int, peak: float) -> dict[str, Any]:
    """Check and time every engine on one problem: a row of the report."""
    engines, missing, errors = {}, {}, {}
    for name in names:
        try:
            engines[name] = ENGINES[name](problem)
        except Missing as why:
            missing[name] = str(why)
    reference = reference_gradient(problem)
    for name, engine in engines.items():
        errors[name] = gradient_error(engine.gradient(), reference)
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise SystemExit(f"{problem.family} {problem.sizes}: meta-gradients differ from the reference: {wrong}.")
    turns = take_turns(engines, repeats, slow_repeats)
    median = {name: statistics.median(turns[name]) for name in turns}
    flops = meta_update_flops(problem)
    figures = {
        name: {
            "seconds": seconds,
            "turns": turns[name],
            "ratio_to_jax": seconds / median["jax"] if "jax" in median else None,
            "ratio_to_loop": seconds / median["loop"] if "loop" in median else None,
            "multiple_of_time_at_peak": None if flops is None else seconds / (flops / peak),
            "gradient_error": errors[name],
            "compile_seconds": engines[name].compile_seconds,
        }
        for name, seconds in median.items()
    }
    return {
        "sizes": problem.sizes._asdict(),
        "flops": flops,
        "seconds_at_peak": None if flops is None else flops / peak,
        "engines": figures,
        "missing": missing,
    }


def measure_point(engine_name: str, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Seconds per update and peak memory of this process, which must be a fresh one."""
    engine = ENGINES[engine_name](make_problem("StateSpaceModel", sizes, seed))
    before = _memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here: compilation does not count
    guess = _seconds(engine.update)
    seconds = [_seconds(engine.update) for _ in range(max(3, min(30, int(1 / guess))))]
    peak = _memory("VmHWM")
    return {
        "seconds": statistics.median(seconds),
        "peak_megabytes": peak,
        "update_megabytes": None if peak is None or before is None else peak - before,
        "compile_seconds": engine.compile_seconds,
    }


def _memory(field: str) -> float | None:
    """A field of /proc/self/status in megabytes; None where there is none. (`getrusage` has the parent's peak too.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def scaling(base: Sizes, axes: dict[str, Sequence[int]], threads: int, seed: int) -> list[dict[str, Any]]:
    """`measure_point` along every axis from `base`, each in a fresh process."""
    points = []
    for axis, values in axes.items():
        for value in values:
            for engine in SCALING_ENGINES:
                sizes = base._replace(**{axis: value})
                point = json.dumps([engine, sizes])
                command = [sys.executable, __file__, "--point", point]
                command += ["--threads", str(threads), "--seed", str(seed)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
                result = json.loads(done.stdout.splitlines()[-1])
                points.append({"axis": axis, "value": value, "engine": engine} | result)
                print(f"{axis} = {value:4}  {engine:6} " + _point_text(result), flush=True)
    return points


def _point_text(result: dict[str, Any]) -> str:
    if "missing" in result:
        return str(result["missing"])
    memory = result["update_megabytes"]
    return f"{1e3 * result['seconds']:9.1f} ms" + ("" if memory is None else f" {memory:7.0f} MB")


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory of an update below, one column for every axis."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        for row, (key, scale, label) in enumerate(
            [("seconds", 1e3, "ms per meta-update"), ("update_megabytes", 1, "MB on top of weights and data")]
        ):
            panel = panels[row][column]
            for engine in SCALING_ENGINES:
                line = [
                    (p["value"], scale * p[key])
                    for p in points
                    if (p["axis"], p["engine"]) == (axis, engine) and p.get(key)
                ]
                if line:
                    panel.loglog(*zip(*line, strict=True), "o-", label=engine)
                    panel.legend()
            values = sorted({point["value"] for point in points if point["axis"] == axis})
            crowded = [value * 1.3 > after for value, after in zip(values, [*values[1:], math.inf], strict=True)]
            panel.set_xticks(values, ["" if c else str(value) for c, value in zip(crowded, values, strict=True)])
            panel.set_xticks([], minor=True)
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.set(xlabel=axis, ylabel=label)
            panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ script


def print_row(title: str, row: dict[str, Any]) -> None:
    sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
    work = (
        ""
        if row["flops"] is None
        else f"; {row['flops'] / 1e9:.3g} GFLOP, {1e3 * row['seconds_at_peak']:.3g} ms at peak"
    )
    print(f"\n{title} ({sizes}){work}")
    print(f"{'':10}{'ms':>10}{'/ jax':>9}{'/ loop':>9}{'/ peak':>9}{'gradient error':>16}{'compile s':>11}")
    for name, figures in row["engines"].items():
        ratios = (figures[key] for key in ("ratio_to_jax", "ratio_to_loop", "multiple_of_time_at_peak"))
        cells = "".join(f"{'-' if ratio is None else format(ratio, '.3g'):>9}" for ratio in ratios)
        compiled = figures["compile_seconds"]
        compiled = "" if compiled is None else f"{compiled:.1f}"
        print(f"{name:10}{1e3 * figures['seconds']:10.1f}{cells}{figures['gradient_error']:16.1e}{compiled:>11}")
    for name, why in row["missing"].items():
        print(f"{name:10}left out: {why}")
    sys.stdout.flush()


def limit_threads(threads: int) -> None:
    """Before the first operation of torch or JAX: threads that exist are not bound."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= threads <= len(cores):
            raise SystemExit(f"--threads must be from 1 to the {len(cores)} cores there are; got {threads}.")
        os.sched_setaffinity(0, cores[:threads])
    os.environ["NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(threads)


def choose(option: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names, or an exit that lists what there is."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--{option} must be among {', '.join(known)}; got {', '.join(unknown)}.")
    return tuple(names)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Arguments) -> None:
    limit_threads(arguments.threads)
    if arguments.point is not None:
        engine, sizes = json.loads(arguments.point)
        try:
            result = measure_point(engine, Sizes(*sizes), arguments.seed)
        except Missing as why:
            result = {"missing": str(why)}
        print(json.dumps(result))
        return
    started = time.perf_counter()
    families = tuple(MODELS) if arguments.models == ("all",) else choose("models", arguments.models, list(MODELS))
    cases = choose("cases", arguments.cases, list(CASES))
    engines = choose("engines", arguments.engines, list(ENGINES))
    if arguments.repeats < 1 or arguments.slow_repeats < 1:
        raise SystemExit("--repeats and --slow-repeats must be at least 1.")
    peak = peak_flops()
    load = os.getloadavg()[0]
    print(
        f"peak: {peak / 1e9:.0f} GFLOP/s in float32 on {arguments.threads} cores; load average {load:.1f}", flush=True
    )
    report: dict[str, Any] = {"peak_flops_per_second": peak, "results": {}}
    for family in families:
        report["results"][family] = {}
        for case in cases:
            problem = make_problem(family, CASES[case], arguments.seed)
            row = measure(problem, engines, arguments.repeats, arguments.slow_repeats, peak)
            report["results"][family][case] = row
            print_row(f"{family} {case}", row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.scaling:
        print(f"\ngrowth from {SCALING_BASE}")
        report["scaling"] = {
            "base": SCALING_BASE._asdict(),
            "points": scaling(SCALING_BASE, SCALING_AXES, arguments.threads, arguments.seed),
        }
        plot(report["scaling"]["points"], arguments.out.with_suffix(".png"))
    report |= {
        "settings": {
            "inner_lr": INNER_LR,
            "outer_lr": OUTER_LR,
            "repeats": arguments.repeats,
            "slow_repeats": arguments.slow_repeats,
            "threads": arguments.threads,
            "seed": arguments.seed,
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ssmrl", "torch", "torchopt", "jax", "jaxlib", "higher")},
        "machine": {"processor": _processor(), "system": platform.system(), "cores": os.cpu_count()}
        | {"load_average": [load, os.getloadavg()[0]]},
        "command": " ".join(["python", "benchmarks/meta_gradient_speed.py", *sys.argv[1:]]),
        "seconds": time.perf_counter() - started,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {arguments.out} in {report['seconds']:.0f} s")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments))
