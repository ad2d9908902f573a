"""What runs on a CUDA device gives the numbers of the CPU, and stays there; skipped where there is none."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from torch.func import grad, vmap

from ssmrl import (
    GRU,
    LSTM,
    MLP,
    AdaptationConfig,
    Adapter,
    DiagonalSSM,
    MetaMAML,
    StateSpaceModel,
    StreamAdapter,
    Transformer,
    mse_loss,
)
from ssmrl.adaptation import Guard, Window, adapt, learning_rates, reset_on_rise, scale_by_learning_rates
from ssmrl.adaptation.tree import tree_leaves, tree_map
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import functional_forward
from ssmrl.meta_rl import AdaptiveControl, BoxActions, Planner, cem, dynamics_scales, model_step, mppi, random_shooting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)

N, B, T, D, O = 3, 2, 7, 3, 2  # noqa: E741
MODELS = {
    "ssm": lambda: StateSpaceModel(5, D, O, hidden_dim=6),
    "gru": lambda: GRU(5, D, O),
    "lstm": lambda: LSTM(5, D, O),
    "transformer": lambda: Transformer(8, D, O, hidden_dim=6, num_heads=2, window=16),
    "mlp": lambda: MLP(D, O, hidden_dim=5),
    "diagonal": lambda: DiagonalSSM(6, D, O),
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def model_of(make: Any) -> Any:
    torch.manual_seed(0)
    return make().double()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on(device, tree):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def assert_same(cuda, cpu):
    """The leaves of a tree are on the device, and what the CPU has."""
    for a, b in zip(tree_leaves(cuda), tree_leaves(cpu), strict=True):
        if isinstance(b, torch.Tensor):
            assert a.device == CUDA
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-11)


@over_models
def test_a_sequence_with_resets_and_its_gradient(make):
    model = model_of(make)
    x, y = draw(N, B, T, D), draw(N, B, T, O, seed=1)
    reset = draw(N, B, T, seed=2) > 1.0

    def loss(params, x, y, reset):
        output, state = functional_forward(model, params, x, reset=reset)
        return mse_loss(output, y), (output, state)

    def run(device):
        model.to(device)
        params = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(loss, has_aux=True), (None, 0, 0, 0))(params, *on(device, (x, y, reset)))

    cpu = run("cpu")
    assert_same(run(CUDA), cpu)


@over_models
@pytest.mark.parametrize("compile", [False, "trace"])
def test_a_meta_gradient(make, compile):
    tasks = (draw(N, B, T, D), draw(N, B, T, O, seed=1), draw(N, B, T, D, seed=2), draw(N, B, T, O, seed=3))

    def run(device):
        model = model_of(make).to(device)
        maml = MetaMAML(model, inner_lr=0.05, inner_steps=2, compile=compile)
        losses = [maml.meta_update(on(device, tasks)) for _ in range(2)]
        return torch.tensor(losses, device=device), [p.grad for p in model.parameters()]

    cpu = run("cpu")
    assert_same(run(CUDA), cpu)


@pytest.mark.parametrize(
    "optimizer",
    [
        torchopt.sgd(0.05, momentum=0.9),
        torchopt.adam(0.01),
        torchopt.adamw(0.01),
        torchopt.rmsprop(0.01),
        torchopt.adamax(0.01),
        torchopt.adagrad(0.01),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adamax", "adagrad"],
)
@pytest.mark.parametrize("options", [{}, {"mixed_mode": True}, {"recompute": 1}], ids=["plain", "mixed", "recomputed"])
def test_derivatives_through_the_inner_loop(optimizer, options):
    model = model_of(MODELS["ssm"])
    x, y = draw(N, B, T, D), draw(N, B, T, O, seed=1)

    def loss(params, x, y):
        return mse_loss(functional_forward(model, params, x)[0], y)

    def after(params, x, y):
        adapted = adapt(loss, params, x, y, optimizer=optimizer, num_steps=3, **options)
        return loss(adapted.params, x, y)

    def run(device):
        model.to(device)
        params = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(after), (None, 0, 0))(params, *on(device, (x, y)))

    cpu = run("cpu")
    assert_same(run(CUDA), cpu)


def test_learned_rates():
    params = {"w": draw(4)}

    def after(rates, params):
        optimizer = scale_by_learning_rates(rates)
        return adapt(lambda p: p["w"].pow(4).sum(), params, optimizer=optimizer, num_steps=2).params["w"].sum()

    def run(device):
        here = on(device, params)
        rates = learning_rates(here, 0.01, per_element=True)
        return grad(after)({name: r.detach() for name, r in rates.items()}, here)

    assert_same(run(CUDA), run("cpu"))


CONFIGS = {
    "sgd": AdaptationConfig(0.05, 3),
    "adam, a window, a guard": AdaptationConfig(
        optimizer=torchopt.adam(0.02), num_steps=2, window=Window(4, minimum=2, burn_in=1), guard=Guard()
    ),
    "everything": AdaptationConfig(
        optimizer=torchopt.adam(0.02),
        num_steps=2,
        max_grad_norm=1.0,
        max_distance=0.5,
        anchor_strength=0.01,
        average=0.5,
        every=2,
        window=Window(4, minimum=2),
        reset=reset_on_rise(1.5),
    ),
    "from the anchor": AdaptationConfig(0.05, 2, window=Window(4), from_anchor=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("compile", [False, "trace"])
def test_streams(config, compile):
    data = draw(10, N, D), draw(10, N, O, seed=1), draw(10, N, seed=2) > 1.2

    def run(device):
        adapter = StreamAdapter(model_of(MODELS["ssm"]).to(device), config, N, device, compile=compile)
        state, results = None, []
        for x, y, first in zip(*on(device, data), strict=True):
            prediction, after = adapter(x, state, first)
            results.append((prediction, adapter.update(x, y, state, reset=first)))
            state = after
        return results, adapter.counts, adapter.in_use()

    assert_same(run(CUDA), run("cpu"))


def test_one_adapter_and_a_model_that_is_elsewhere():
    x, y = draw(1, D), draw(1, O, seed=1)

    def run(device):
        model = model_of(MODELS["gru"]).to(device)
        adapter = Adapter(model, AdaptationConfig(optimizer=torchopt.adam(0.02), num_steps=3), device)
        for _ in range(3):
            adapter.update_step(x.to(device), y.to(device), model.init_hidden(1))
        return dict(model.named_parameters())

    assert_same(run(CUDA), run("cpu"))
    with pytest.raises(ValueError, match="cuda"):
        Adapter(model_of(MODELS["gru"]), device=CUDA)


@pytest.mark.parametrize("method", [random_shooting, cem, partial(mppi, temperature=0.1)], ids=["rs", "cem", "mppi"])
@pytest.mark.parametrize("compile", [False, "trace"])
def test_planning_and_control(method, compile, monkeypatch):
    model = model_of(lambda: StateSpaceModel(5, D + 1, D, hidden_dim=6))
    recorded = draw(50, D), draw(50, 1, seed=1), draw(50, D, seed=2)
    observations = draw(5, N, D, seed=3)

    def run(device):
        mine = copy.deepcopy(model).to(device)
        scales = dynamics_scales(*on(device, recorded))
        box = BoxActions(*on(device, (torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())))
        step = model_step(mine, scales, lambda o, a, after: after.square().sum(-1))
        planner = Planner(step, box, horizon=4, candidates=20, rounds=2, method=method, compile=compile)
        # Noise is drawn on the CPU, so that both get the same.
        monkeypatch.setattr(planner, "noise", lambda n, generator: draw(n, 2, 20, 4, 1, seed=4).to(device))
        adapter = StreamAdapter(mine, AdaptationConfig(0.01, 2, window=Window(3)), N, device)
        policy = AdaptiveControl(planner, mine, scales, adapter=adapter)
        state, actions = None, []
        for t, observation in enumerate(observations):
            reset = torch.full((N,), t == 0, device=device)
            action, state = policy(observation.to(device), state, reset)
            actions.append(action)
        return actions

    assert_same(run(CUDA), run("cpu"))


def test_a_checkpoint_is_read_on_any_device(tmp_path):
    weights = {"w": draw(4).to(CUDA)}
    save_checkpoint(tmp_path, 1, weights)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.state["w"].cpu(), weights["w"].cpu())
