"""PyTorch's deterministic mode: nothing of this library needs what it refuses, and what is run twice is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt

from ssmrl import GRU, LSTM, MLP, AdaptationConfig, DiagonalSSM, MetaMAML, StateSpaceModel, StreamAdapter, Transformer
from ssmrl.adaptation import Guard, Window, reset_on_rise
from ssmrl.adaptation.tree import tree_leaves
from ssmrl.meta_rl import PPO, BoxActions, CategoricalHead, Planner, PolicyModel, actor_critic_batch, model_step
from ssmrl.meta_rl.dynamics import dynamics_scales

over_devices = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
MODELS: dict[str, Any] = {
    "ssm": lambda device: StateSpaceModel(5, 3, 2, 6, device),
    "gru": lambda device: GRU(5, 3, 2, device),
    "lstm": lambda device: LSTM(5, 3, 2, device),
    "transformer": lambda device: Transformer(8, 3, 2, 6, device, num_heads=2, window=4),
    "mlp": lambda device: MLP(3, 2, 5, device),
    "diagonal": lambda device: DiagonalSSM(6, 3, 2, 5, device),
}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_twice_the_same(run):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append([torch.as_tensor(leaf) for leaf in tree_leaves(run())])
    assert found[0]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@over_devices
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"compile": "trace"}, {"recompute": 1}], ids=["plain", "traced", "recomputed"])
def test_meta_updates(device, name, options):
    def run():
        maml = MetaMAML(MODELS[name](device), 0.1, inner_steps=2, **options)
        x, y = torch.randn(2, 4, 2, 9, 3, device=device), torch.randn(2, 4, 2, 9, 2, device=device)
        losses = [maml.meta_update((x[0], y[0], x[1], y[1])) for _ in range(2)]
        return [losses, [p.detach() for p in maml.model.parameters()]]

    assert_twice_the_same(run)


@over_devices
@pytest.mark.parametrize("name", MODELS)
def test_streams(device, name):
    config = AdaptationConfig(
        num_steps=2,
        optimizer=torchopt.adam(0.05),
        window=Window(4, minimum=2),
        reset=reset_on_rise(1.1),
        guard=Guard(allowance=1.0),
    )

    def run():
        adapter = StreamAdapter(MODELS[name](device), config, 5, device)
        state, found = None, []
        for _ in range(8):
            x, y, reset = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device), torch.rand(5) < 0.2
            output, after = adapter(x, state, reset.to(device))
            found += [output, *adapter.update(x, y, state, reset=reset.to(device))]
            state = after
        return found

    assert_twice_the_same(run)


@over_devices
def test_planning(device):
    def run():
        model = StateSpaceModel(5, 4, 3, 6, device)
        o, a = torch.randn(50, 3, device=device), torch.randn(50, 1, device=device)
        step = model_step(model, dynamics_scales(o, a, torch.randn_like(o)), lambda o, a, after: after.square().sum(-1))
        box = BoxActions(torch.tensor([-1.0], device=device), torch.tensor([1.0], device=device))
        planner = Planner(step, box, horizon=4, candidates=20, rounds=2)
        params = {name: p.detach().expand(3, *p.shape) for name, p in model.named_parameters()}
        noise = planner.noise(3, torch.Generator(device).manual_seed(0))
        return planner(params, model.init_hidden(3), o[:3], planner.init(3), noise)

    assert_twice_the_same(run)


@over_devices
def test_ppo(device):
    def run():
        policy = PolicyModel(GRU(4, 3, 4, device), CategoricalHead(3), has_value=True)
        ppo = PPO(policy, torch.optim.Adam(policy.parameters(), 0.01), minibatches=2)
        x, reward = torch.randn(6, 7, 3, device=device), torch.randn(6, 7, device=device)
        action = torch.randint(3, (6, 7), device=device)
        reset, ends = torch.zeros(2, 6, 7, dtype=torch.bool, device=device)
        reset[:, 0], ends[:, -1] = True, True
        batch = actor_critic_batch(policy, x, action, reward, reset, ends, torch.zeros_like(ends))
        update = ppo.update(batch, torch.Generator().manual_seed(0))
        return [[v for v in update if v is not None], [p.detach() for p in policy.parameters()]]

    assert_twice_the_same(run)
