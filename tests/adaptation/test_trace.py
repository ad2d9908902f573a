"""Traces: the same numbers, recorded once for given shapes."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.func import grad, vmap

from ssmrl import GRU, LSTM, StateSpaceModel
from ssmrl.adaptation.trace import Traced
from ssmrl.core import functional_forward


class Counted:
    """A function that knows how often it ran."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *arguments):
        self.runs += 1
        return self.function(*arguments)


def test_it_runs_once_for_given_shapes_and_replays_with_other_values():
    function = Counted(lambda tree, scale: {"sum": tree["a"] + tree["b"] * scale})
    traced = Traced(function)
    for seed in range(3):
        torch.manual_seed(seed)
        tree = {"a": torch.randn(3), "b": torch.randn(3)}
        scale = torch.randn(())
        assert torch.equal(traced(tree, scale)["sum"], tree["a"] + tree["b"] * scale)
    assert function.runs == 1


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), (torch.zeros(3),)])
def test_another_shape_dtype_or_structure_is_recorded_anew(other):
    function = Counted(lambda x: x)
    traced = Traced(function)
    traced(torch.zeros(3))
    traced(other)
    assert function.runs == 2
    traced(torch.zeros(3))
    assert function.runs == 2


@pytest.mark.parametrize("inductor", [False, True])
def test_the_layout_in_memory_is_of_no_account(inductor):
    function = Counted(lambda x: x.reshape(6) * torch.arange(6.0))
    traced = Traced(function, inductor=inductor)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(traced(x), torch.arange(6.0).square())
    assert torch.equal(traced(x.T.contiguous().T), torch.arange(6.0).square())
    assert torch.equal(traced(torch.ones(1, 3).expand(2, 3)), torch.arange(6.0))
    assert function.runs == 1


def test_results_carry_no_graph():
    x = torch.zeros(3, requires_grad=True)
    traced = Traced(lambda x: x.sin())
    assert not traced(x).requires_grad
    assert not traced(x).requires_grad


@pytest.mark.skipif(torch.__version__ < "2.8", reason="it is not kept")
def test_what_was_compiled_is_found_again_by_the_same_version_of_this_library(monkeypatch):
    factor = secrets.randbits(50) / 2**50  # of no run before

    def found(offset):
        before = counters["inductor"]["fxgraph_cache_hit"]
        traced = Traced(lambda x: x * factor + offset, inductor=True)
        torch.testing.assert_close(traced(torch.arange(5.0)), torch.arange(5.0) * factor + offset)
        return counters["inductor"]["fxgraph_cache_hit"] - before

    offset = torch.arange(5.0).cos()
    assert [found(offset), found(offset)] == [0, 1]
    found(offset + 1)  # the right numbers, whether it is found or not
    monkeypatch.setattr("ssmrl.__version__", "of tomorrow")
    assert found(offset) == 0


def test_a_missing_compiler_is_named():
    traced = Traced(lambda x: x.sin() * 2, inductor=True)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with without, pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        traced(torch.zeros(100))


@pytest.mark.parametrize("model", [StateSpaceModel(3, 2, 1, 4), GRU(3, 2, 1), LSTM(3, 2, 1)], ids=str)
def test_a_recurrence_is_one_node_whatever_its_length(model):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def second(params, x):
        loss = lambda p, x: functional_forward(model, p, x)[0].square().sum()  # noqa: E731
        norm = lambda p, x: sum(g.square().sum() for g in grad(loss)(p, x).values())  # noqa: E731
        return vmap(grad(norm), in_dims=(None, 0))(params, x)

    traced: Any = Traced(second)
    nodes = []
    for steps in (4, 40):
        x = torch.randn(2, 3, steps, 2)
        expected = second(params, x)
        found = traced(params, x)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        *_, (graph, _) = traced._traces.values()
        nodes.append(len(graph.graph.nodes))
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_tensor_in_two_places_is_two_arguments(inductor):
    traced = Traced(lambda a, b: a - 2 * b, inductor=inductor)
    same = torch.ones(3)
    assert traced(same, same).tolist() == [-1, -1, -1]
    assert traced(torch.full((3,), 5.0), same).tolist() == [3, 3, 3]
