"""A live model as the adapters see it: what is read from it, and what is written back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssmrl import LSTM, AdaptationConfig, Adapter, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Guard, Window, reset_on_rise
from ssmrl.adaptation.live import LiveModel
from ssmrl.adaptation.losses import mse_loss
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core.base import initial_state

HEAD = {"output_mlp.out.weight", "output_mlp.out.bias"}


def live(config=None, *, for_one=True, **settings):
    torch.manual_seed(0)
    model = StateSpaceModel(4, 3, 2, hidden_dim=6).double()
    model.register_buffer("unused", torch.ones(2))
    config = AdaptationConfig(**settings) if config is None else config
    return model, LiveModel(model, config, "cpu", mse_loss, for_one=for_one)


@pytest.mark.parametrize("for_one", [True, False])
def test_what_is_read_has_the_names_and_values_of_the_model_and_is_a_copy(for_one):
    model, adapting = live(for_one=for_one)
    params = adapting.read()
    named = adapting.named(params)
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in named.items())
    before = model.output_input.bias.detach().clone()
    with torch.no_grad():
        model.output_input.bias += 1
    assert torch.equal(adapting.named(params)["output_input.bias"], before)
    adapting.load(named)
    assert torch.equal(model.output_input.bias, before)


def test_what_does_not_adapt_is_the_rest_with_the_buffers_as_it_is_now():
    model, adapting = live(adapted="output_mlp.out")
    others = adapting.others()
    assert adapting.params.keys() == HEAD
    assert others.keys() == (dict(model.named_parameters()).keys() - HEAD) | {"unused"}
    with torch.no_grad():
        model.state_input.bias += 1
    assert torch.equal(adapting.others()["state_input.bias"], model.state_input.bias)


@pytest.mark.parametrize("for_one", [True, False])
def test_the_forward_takes_all_that_it_is_given(for_one):
    model, adapting = live(for_one=for_one, adapted="output_mlp.out")
    x, state = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    reset = torch.tensor([True, False])
    shifted = {name: value + 1 for name, value in adapting.others().items()}
    output, after = adapting.forward(shifted, adapting.read(), x, state, reset)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += name not in HEAD
    expected, next_state = model(x, state, reset)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(after, next_state)


def test_an_optimizer_for_many_keeps_a_count_for_each():
    _, adapting = live(for_one=False, optimizer=torchopt.adamax(0.1))
    leaves: list[Any] = torchopt.pytree.tree_leaves(adapting.rules.transformation().init(adapting.rules.anchor))
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    with pytest.raises(ValueError, match=r"optimizer must keep all its state in tensors, .* torchopt\.radam does not"):
        live(for_one=False, optimizer=torchopt.radam(0.1))


CONFIGS = {
    "plain": {},
    "carried on": {"optimizer": torchopt.adam(0.01, eps_root=1e-8), "num_steps": 2, "max_grad_norm": 1.0},
    "window": {"window": Window(4, minimum=2), "from_anchor": True, "num_steps": 2, "adapted": "*.bias"},
    "all": {
        "optimizer": torchopt.sgd(0.05, momentum=0.9),
        "window": Window(3),
        "guard": Guard(allowance=0.5),
        "reset": reset_on_rise(1.5, keep=2),
        "average": 0.9,
        "every": 2,
        "anchor_strength": 0.1,
        "max_distance": 0.5,
    },
}
MODELS = {
    "ssm": lambda: StateSpaceModel(4, 3, 2, hidden_dim=6),
    "lstm": lambda: LSTM(4, 3, 2),
    "no state": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
}


def one_of(kind, make, config, seed):
    """An adapter of another object of the model, with other weights for every seed."""
    torch.manual_seed(seed)
    return kind(make(), AdaptationConfig(**config), *([3] if kind is StreamAdapter else []))


def driven(adapter, steps, state, generator):
    """Losses of so many updates, some of whose episodes begin anew, and the state after them."""
    losses = []
    for t in steps:
        x = torch.randn(3, 3, generator=generator)
        y = x[:, :2] * (1 if t < 9 else -2)  # a change, which resets
        reset = torch.tensor([t == 5, False, False]) if t >= 4 else None
        losses.append(torch.as_tensor(adapter.update_step(x, y, state, reset=reset)[0]))
        if isinstance(adapter, StreamAdapter):
            _, state = adapter(x, state)
        else:
            with torch.no_grad():
                output = adapter.model(x) if state is None else adapter.model(x, state)
            state = output[1] if isinstance(output, tuple) else None
    return torch.stack(losses), state


@pytest.mark.parametrize("kind", [Adapter, StreamAdapter])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_adapters_go_on_from_a_checkpoint_to_the_same_bits(tmp_path, kind, config, make):
    """In another object, whose own weights are others: the anchor, which is gone back to, is saved too."""
    whole, first, second = (one_of(kind, make, config, seed) for seed in (0, 0, 1))
    begin = initial_state(whole.model, 3)
    expected, _ = driven(whole, range(20), begin, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    _, state = driven(first, range(8), begin, generator)
    leaves, structure = tree_flatten(state)
    save_checkpoint(tmp_path, 8, {"adapter": first.state_dict(), "state": leaves, "generator": generator.get_state()})
    found = load_checkpoint(tmp_path)
    assert found is not None
    second.load_state_dict(found.state["adapter"])
    if kind is StreamAdapter:  # what does not adapt is the caller's to load
        second.model.load_state_dict(first.model.state_dict())
    else:
        theirs = first.model.state_dict()
        for name, p in second.model.named_parameters():
            if name in found.state["adapter"]["weights"]:
                assert torch.equal(p, theirs[name])
        second.model.load_state_dict(theirs)
    generator.set_state(found.state["generator"])
    got, _ = driven(second, range(8, 20), tree_unflatten(found.state["state"], structure), generator)
    assert torch.equal(got, expected[8:])
    counts = zip(second.counts, whole.counts, strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in counts)
    if "reset" in config:
        assert torch.as_tensor(whole.counts.resets).sum() > 0
    if kind is Adapter:
        whole.reset()
        second.reset()
        assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
    else:
        second.reset()
        whole.reset()
        assert all(torch.equal(second.params(0)[name], p) for name, p in whole.params(0).items())


@pytest.mark.parametrize("kind", [Adapter, StreamAdapter])
def test_before_any_update_there_is_an_anchor_to_save(kind):
    first, second = (one_of(kind, MODELS["ssm"], {}, seed) for seed in (0, 1))
    second.load_state_dict(first.state_dict())
    assert second.counts is None
    x = torch.randn(3, 3)
    losses = [torch.as_tensor(a.update_step(x, x[:, :2], None)[0]) for a in (first, second)]
    assert torch.equal(*losses)


def test_streams_that_were_added_and_dropped_are_there_again():
    first = one_of(StreamAdapter, MODELS["ssm"], CONFIGS["window"], 0)
    driven(first, range(4), torch.zeros(3, 4), torch.Generator().manual_seed(0))
    first.add(2)
    first.drop(torch.tensor([False, True, False, False, False]))
    second = one_of(StreamAdapter, MODELS["ssm"], CONFIGS["window"], 0)
    second.load_state_dict(first.state_dict())
    assert second.num_streams == 5
    assert torch.equal(second.active, first.active)
    assert all(torch.equal(second.params(n)[name], p) for n in range(5) for name, p in first.params(n).items())


def test_a_state_of_another_adapter_is_refused_and_changes_nothing():
    adapter = one_of(Adapter, MODELS["ssm"], {}, 0)
    driven(adapter, range(2), torch.zeros(3, 4), torch.Generator().manual_seed(0))
    before = adapter.state_dict()
    other = one_of(Adapter, MODELS["lstm"], {}, 0)
    with pytest.raises(ValueError, match=r"must be of weights .* that adapt; it is of"):
        adapter.load_state_dict(other.state_dict())
    momentum = one_of(Adapter, MODELS["ssm"], CONFIGS["all"], 0)
    driven(momentum, range(2), torch.zeros(3, 4), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="of an adapter with the same settings"):
        adapter.load_state_dict(momentum.state_dict())
    after = adapter.state_dict()
    leaves = [leaf for leaf in zip(tree_flatten(before)[0], tree_flatten(after)[0], strict=True) if leaf[0] is not None]
    assert len(leaves) > 20
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in leaves)


@pytest.mark.parametrize("kind", [Adapter, StreamAdapter])
def test_what_is_restored_can_be_saved(kind):
    """A snapshot carries the shapes of its data: between it and its return there may have been others, or none."""
    first, second = (one_of(kind, MODELS["ssm"], CONFIGS["all"], 0) for _ in range(2))
    driven(first, range(4), torch.zeros(3, 4), torch.Generator().manual_seed(0))
    taken = first.snapshot()
    first.load_state_dict(second.state_dict())  # of before any update
    assert first.counts is None
    first.restore(taken)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 3)
    losses = [torch.as_tensor(a.update_step(x, x[:, :2], torch.zeros(3, 4))[0]) for a in (first, second)]
    assert torch.equal(*losses)


def test_a_block_with_data_of_other_shapes_leaves_no_trace_in_what_is_saved():
    first, second = (one_of(Adapter, MODELS["ssm"], CONFIGS["window"], 0) for _ in range(2))
    driven(first, range(4), torch.zeros(3, 4), torch.Generator().manual_seed(0))
    with first:
        first.reset()
        first.update_step(torch.randn(1, 3), torch.randn(1, 2), torch.zeros(1, 4))
    first.update_step(torch.randn(3, 3), torch.randn(3, 2), torch.zeros(3, 4))
    second.load_state_dict(first.state_dict())
    assert second.counts == first.counts
