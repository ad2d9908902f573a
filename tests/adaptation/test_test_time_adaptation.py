"""The Adapter: the inner loop on a live model, and what it must leave alone."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torchopt.base import GradientTransformation

from ssmrl.adaptation import AdaptationConfig, Adapter, adapt, mse_loss
from ssmrl.core import MLP, MLPState, StateSpaceModel
from ssmrl.meta_rl import MetaMAML

D, O, S = 3, 2, 4  # noqa: E741
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda: torchopt.sgd(0.1),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "adam": lambda: torchopt.adam(0.05),
    "radam": lambda: torchopt.radam(0.05),
}
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def setting(seed=0, rows=5, steps=None) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A float64 model, inputs, targets and a state."""
    torch.manual_seed(seed)
    model = StateSpaceModel(S, D, O, hidden_dim=6).double()
    leading = (rows,) if steps is None else (rows, steps)
    draw = [torch.randn(*leading, width, dtype=torch.float64) for width in (D, O)]
    return model, draw[0], draw[1], torch.randn(rows, S, dtype=torch.float64)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def run(adapter, *data, calls=3):
    losses = [adapter.update_step(*data)[0] for _ in range(calls)]
    return losses, weights(adapter.model)


# What a step does.


def test_two_steps_of_a_scalar_model_by_hand():
    # y = wx with w = 1, x = 2, target 4: loss (2 - 4)² = 4, gradient 2·(2 - 4)·2 = -8, so w = 1 + 8/16 = 1.5;
    # then loss 1, gradient -4, w = 1.75.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    adapter = Adapter(model, AdaptationConfig(learning_rate=1 / 16, num_steps=2))
    assert adapter.update_step(torch.tensor([[2.0]]), torch.tensor([[4.0]]), None) == (4.0, 2)
    assert model.weight.item() == 1.75


def test_the_model_predicts_the_transition_better_afterwards():
    model, x, y, h = setting()
    before, start = weights(model), mse_loss(model(x, h)[0], y)
    Adapter(model).update_step(x, y, h)
    assert mse_loss(model(x, h)[0], y) < start
    assert not any(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_it_returns_the_loss_before_the_first_step_and_the_number_of_steps():
    model, x, y, h = setting()
    start = mse_loss(model(x, h)[0], y).item()
    loss, steps = Adapter(model, AdaptationConfig(num_steps=3)).update_step(x, y, h)
    assert (type(loss), type(steps)) == (float, int)
    assert loss == pytest.approx(start, rel=1e-14)
    assert steps == 3


def test_the_number_of_steps_is_an_int_for_every_integer():
    model, x, y, h = setting()
    steps = Adapter(model, AdaptationConfig(num_steps=torch.tensor(2))).update_step(x, y, h)[1]  # type: ignore[arg-type]
    assert (type(steps), steps) == (int, 2)


@pytest.mark.parametrize("length", [None, 7])
@over_optimizers
def test_a_step_equals_adapt_called_by_hand(make, length):
    model, x, y, h = setting(steps=length)
    optimizer = make()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    by_hand = adapt(
        lambda p: (functional_call(twin, p, (x, h))[0] - y).square().mean(), params, optimizer=optimizer, num_steps=4
    )
    loss, _ = Adapter(model, AdaptationConfig(optimizer=optimizer, num_steps=4)).update_step(x, y, h)
    close(weights(model), by_hand.params)
    assert loss == pytest.approx(by_hand.losses[0].item(), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.none() | st.integers(1, 5),
    steps=st.integers(0, 4),
    rate=st.floats(0, 0.1),
    seed=st.integers(0, 99),
)
def test_a_step_equals_meta_maml_s_adapt_task(rows, length, steps, rate, seed):
    model, x, y, h = setting(seed, rows, length)
    fast = MetaMAML(model, inner_lr=rate, inner_steps=steps).adapt_task(x, y, h)
    Adapter(model, AdaptationConfig(rate, steps)).update_step(x, y, h)
    close(weights(model), dict(fast))


def test_the_state_is_not_advanced_between_steps():
    model, x, y, h = setting()
    twin = copy.deepcopy(model)
    Adapter(model, AdaptationConfig(num_steps=2)).update_step(x, y, h)
    one = Adapter(twin, AdaptationConfig(num_steps=1))
    for _ in range(2):
        one.update_step(x, y, h)
    close(weights(model), weights(twin))


@over_optimizers
def test_two_updates_equal_one_of_twice_the_steps(make):
    model, x, y, h = setting()
    twin = copy.deepcopy(model)
    Adapter(twin, AdaptationConfig(num_steps=6, optimizer=make())).update_step(x, y, h)
    run(Adapter(model, AdaptationConfig(num_steps=3, optimizer=make())), x, y, h, calls=2)
    close(weights(model), weights(twin))


@pytest.mark.parametrize("steps", [0, 3])
def test_rate_zero_or_zero_steps_report_the_loss_and_change_nothing(steps):
    model, x, y, h = setting()
    before = weights(model)
    adapter = Adapter(model, AdaptationConfig(learning_rate=0.0 if steps else 0.01, num_steps=steps))
    loss, taken = adapter.update_step(x, y, h)
    assert same(weights(model), before)
    assert loss == pytest.approx(mse_loss(model(x, h)[0], y).item(), rel=1e-14)
    assert taken == steps


def test_every_setting_changes_the_result():
    model, x, y, h = setting()
    results = []
    for config in (
        None,
        AdaptationConfig(learning_rate=0.02),
        AdaptationConfig(num_steps=6),
        AdaptationConfig(optimizer=torchopt.adam(0.01)),
    ):
        twin = copy.deepcopy(model)
        Adapter(twin, config).update_step(x, y, h)
        results.append(weights(twin)["output_input.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_defaults_are_five_steps_of_sgd_at_0_01():
    model, x, y, h = setting()
    twin = copy.deepcopy(model)
    Adapter(model).update_step(x, y, h)
    Adapter(twin, AdaptationConfig(num_steps=5, optimizer=torchopt.sgd(0.01))).update_step(x, y, h)
    assert same(weights(model), weights(twin))


def test_the_loss_that_is_given_is_used_also_on_labels():
    # The gradient of cross-entropy at zero logits is softmax - onehot = (1/2, 1/2) - (0, 1).
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    adapter = Adapter(model, AdaptationConfig(1.0, 1), loss_fn=functional.cross_entropy)
    loss, _ = adapter.update_step(torch.ones(1, 1), torch.tensor([1]), None)
    assert loss == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert model.weight.flatten().tolist() == [-0.5, 0.5]


# Reset.


@over_optimizers
def test_reset_restores_every_weight_and_a_fresh_optimizer(make):
    model, x, y, h = setting()
    before = weights(model)
    adapter = Adapter(model, AdaptationConfig(num_steps=2, optimizer=make()))
    losses, after = run(adapter, x, y, h)
    assert not same(after, before)
    adapter.reset()
    assert same(weights(model), before)
    losses_again, after_again = run(adapter, x, y, h)
    assert losses_again == losses
    assert same(after_again, after)


def test_reset_goes_back_to_when_the_adapter_was_made():
    model, x, y, h = setting()
    Adapter(model).update_step(x, y, h)
    made = weights(model)
    adapter = Adapter(model)
    adapter.update_step(x, y, h)
    adapter.reset()
    adapter.reset()
    assert same(weights(model), made)


def test_the_model_keeps_its_parameters_their_memory_and_their_gradients():
    model, x, y, h = setting()
    mse_loss(model(x, h)[0], y).backward()
    before = {name: (p, p.data_ptr(), p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    adapter = Adapter(model)
    adapter.update_step(x, y, h)
    adapter.reset()
    for name, p in model.named_parameters():
        parameter, memory, gradient, value = before[name]
        assert p is parameter
        assert p.data_ptr() == memory
        assert p.requires_grad
        assert p.grad is gradient
        assert torch.equal(gradient, value)


# What is left alone.


class _Leaky(nn.Module):
    """Leaks at the rate in a buffer, counts its calls in another, and keeps a frozen readout; one step only."""

    leak: Tensor
    calls: Tensor

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D + O, O)
        self.readout = nn.Linear(O, O).requires_grad_(False)
        self.register_buffer("leak", torch.tensor(0.5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x, hidden_state):
        self.calls += 1
        h = self.leak * hidden_state + torch.tanh(self.inner(torch.cat([x, hidden_state], -1)))
        return self.readout(h), h


def test_frozen_parameters_and_buffers_are_untouched():
    model = _Leaky()
    before = weights(model)
    run(Adapter(model), torch.randn(4, D), torch.randn(4, O), torch.zeros(4, O))
    after = weights(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"inner.weight", "inner.bias"}


def test_buffers_are_read_as_they_are_now():
    model = _Leaky()
    adapter = Adapter(model, AdaptationConfig(num_steps=0))
    data = torch.randn(4, D), torch.randn(4, O), torch.ones(4, O)
    for leak in (0.5, 2.0):
        model.leak.fill_(leak)
        assert adapter.update_step(*data)[0] == pytest.approx(mse_loss(model(data[0], data[2])[0], data[1]).item())


def test_batch_norm_adapts_and_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, O))
    before = weights(model)
    Adapter(model).update_step(torch.randn(8, D), torch.randn(8, O), None)
    after = weights(model)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    # The bias before a batch norm has no effect, so its gradient is only rounding.
    assert unchanged - {"0.bias"} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_tied_parameter_adapts_once_with_both_gradients():
    # y = w·w·x with w = 1, x = 1, target 0: gradient 2·1·(2w) = 4, so w = 1 - 4/8.
    model: Any = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    Adapter(model, AdaptationConfig(1 / 8, 1)).update_step(torch.ones(1, 1), torch.zeros(1, 1), None)
    assert model[1].weight is model[0].weight
    assert model[0].weight.item() == 0.5


def test_a_state_with_a_graph_is_detached_and_its_graph_still_works():
    model, x, y, h = setting()
    leaf = h.clone().requires_grad_()
    state = 3 * leaf
    twin = copy.deepcopy(model)
    Adapter(model).update_step(x, y, state)
    Adapter(twin).update_step(x, y, 3 * h)
    assert same(weights(model), weights(twin))
    assert torch.equal(state, 3 * h)
    assert leaf.grad is None
    (gradient,) = torch.autograd.grad(state.sum(), leaf)
    assert torch.equal(gradient, torch.full_like(h, 3.0))


def test_data_and_state_are_not_modified():
    model, x, y, h = setting(steps=4)
    given_x, given_y, given_h = x.clone(), y.clone(), h.clone()
    run(Adapter(model, AdaptationConfig(optimizer=torchopt.adam(0.1))), x, y, h)
    assert torch.equal(x, given_x)
    assert torch.equal(y, given_y)
    assert torch.equal(h, given_h)


@pytest.mark.parametrize("where", ["data", "state", "loss"])
def test_a_graph_in_what_it_is_given_does_not_reach_the_optimizer_state(where):
    seen: list[bool] = []

    def update(gradient, state, *, params=None, inplace=True):
        seen.extend(g.requires_grad for g in [*gradient.values(), *state.values()])
        moments = {name: 0.9 * state[name] + g for name, g in gradient.items()}
        return {name: -0.1 * m for name, m in moments.items()}, moments

    recording = GradientTransformation(lambda p: {name: torch.zeros_like(v) for name, v in p.items()}, update)
    model, x, y, h = setting()
    x, h = x.requires_grad_(where == "data"), h.requires_grad_(where == "state")
    factor = torch.ones((), dtype=torch.float64, requires_grad=where == "loss")
    adapter = Adapter(model, AdaptationConfig(optimizer=recording), loss_fn=lambda o, y: factor * mse_loss(o, y))
    run(adapter, x, y, h, calls=2)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(mode):
    model, x, y, h = setting(steps=4)
    twin = copy.deepcopy(model)
    on = run(Adapter(model), x, y, h)
    with mode():
        off = run(Adapter(twin), x, y, h)
    assert off[0] == on[0]
    assert same(off[1], on[1])


# States of every kind.


class _Pair(NamedTuple):
    a: Tensor
    b: Tensor


class _Two(nn.Module):
    """A model with two states in a container of any kind."""

    def __init__(self, make, parts):
        super().__init__()
        self.make, self.parts = make, parts
        self.linear = nn.Linear(D + 2 * O, O)

    def forward(self, x, hidden_state):
        a, b = self.parts(hidden_state)
        a = torch.tanh(self.linear(torch.cat([x, a, b], -1)))
        return a, self.make(a, a + b)


@pytest.mark.parametrize(
    ("make", "parts"),
    [(_Pair, tuple), (lambda a, b: (a, b), tuple), (lambda a, b: {"a": a, "b": b}, lambda s: (s["a"], s["b"]))],
    ids=["NamedTuple", "tuple", "dict"],
)
def test_a_state_is_any_container_of_tensors(make, parts):
    torch.manual_seed(0)
    model = _Two(make, parts)
    x, y, a, b = torch.randn(4, D), torch.randn(4, O), torch.randn(4, O), torch.randn(4, O)
    gradients = torch.autograd.grad(mse_loss(model(x, make(a, b))[0], y), tuple(model.parameters()))
    expected = {name: p - 0.5 * g for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
    leaf = a.clone().requires_grad_()
    Adapter(model, AdaptationConfig(0.5, 1)).update_step(x, y, make(2 * leaf / 2, b))
    close(weights(model), {name: value.detach() for name, value in expected.items()}, tolerance=1e-6)
    assert leaf.grad is None


@pytest.mark.parametrize("model", [nn.Linear(D, O), nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, O))])
def test_a_model_without_a_state_adapts(model):
    x, y = torch.randn(4, 6, D), torch.randn(4, 6, O)
    gradients = torch.autograd.grad(mse_loss(model(x), y), tuple(model.parameters()))
    expected = {n: (p - 0.5 * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    Adapter(model, AdaptationConfig(0.5, 1)).update_step(x, y, None)
    close(weights(model), expected, tolerance=1e-6)


def test_an_mlp_adapts_with_its_empty_state_as_without_one():
    x, y = torch.randn(4, D), torch.randn(4, O)
    model = MLP(D, O)
    twin = copy.deepcopy(model)
    assert run(Adapter(model), x, y, MLPState())[0] == run(Adapter(twin), x, y, None)[0]
    assert same(weights(model), weights(twin))


# Long runs.


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)

    def forward(self, x, hidden_state):
        h = self.linear(x + hidden_state)
        return h, h


def resident_kilobytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_calls_leave_memory_flat():
    model = _Tiny()
    adapter = Adapter(model, AdaptationConfig(num_steps=1, optimizer=torchopt.sgd(1e-4, momentum=0.5)))
    x, y, h = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1)

    def calls(count):
        state = h
        for _ in range(count):
            adapter.update_step(x, y, state)
            _, state = model(x, h)  # carries a graph into the next call, as a careless loop does
        return live_tensors(), resident_kilobytes()

    tensors, kilobytes = calls(500)
    tensors_after, kilobytes_after = calls(9500)
    assert tensors_after <= tensors
    assert kilobytes_after - kilobytes < 4096  # a leak of one small tensor a call is about 9500 · 0.5 kB


# Errors, after each of which the model and the optimizer state are as before.


@pytest.fixture
def live():
    """An adapter that has adapted once, so that its Adam has moments; and its data. What changed shows at the end."""
    model, x, y, h = setting(rows=4, steps=6)
    config = AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05))
    adapter, twin = Adapter(model, config), Adapter(copy.deepcopy(model), config)
    for one in (adapter, twin):
        one.update_step(x, y, h)

    yield adapter, x, y, h
    assert same(weights(model), weights(twin.model))
    losses, after = run(adapter, x, y, h)
    twin_losses, twin_after = run(twin, x, y, h)
    assert losses == twin_losses
    assert same(after, twin_after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(live, bad):
    adapter, x, y, h = live
    spoiled = x.clone()
    spoiled[2, 3, 1] = bad
    with pytest.raises(ValueError, match=rf"x must be finite; got {bad} at index \(2, 3, 1\).*model is untouched"):
        adapter.update_step(spoiled, y, h)


def test_targets_that_are_not_finite_are_refused(live):
    adapter, x, y, h = live
    spoiled = y.clone()
    spoiled[0, 5, 0] = torch.nan
    with pytest.raises(ValueError, match=r"y must be finite; got nan at index \(0, 5, 0\).*model is untouched"):
        adapter.update_step(x, spoiled, h)


@pytest.mark.parametrize("compile", ["trace", True])
def test_a_compiled_adapter_refuses_what_is_not_finite_too(compile):
    # A compiler may take 0 x for 0, and so lose NaN.
    model, x, y, h = setting(rows=4)
    before = weights(model)
    adapter = Adapter(model, AdaptationConfig(num_steps=1), compile=compile)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = x.clone()
        spoiled[2, 1] = bad
        with pytest.raises(ValueError, match=rf"x must be finite; got {bad} at index \(2, 1\)"):
            adapter.update_step(spoiled, y, h)
    with pytest.raises(FloatingPointError, match=r"Adaptation made 'loss' non-finite"):
        adapter.update_step(x, y * 1e200, h)
    assert same(weights(model), before)
    assert adapter.counts is None


def test_a_divergence_is_a_floating_point_error(live):
    adapter, x, y, h = live
    with pytest.raises(
        FloatingPointError, match=r"made 'loss' non-finite; the model is untouched\. Lower the learning rate"
    ):
        adapter.update_step(x, y * 1e200, h)


def test_a_rate_that_is_too_high_is_a_floating_point_error():
    model, x, y, h = setting()
    before = weights(model)
    adapter = Adapter(model, AdaptationConfig(learning_rate=1e200))
    with pytest.raises(FloatingPointError, match=r"Adaptation made '\w+' non-finite; the model is untouched"):
        adapter.update_step(x, y, h)
    assert same(weights(model), before)


def test_a_wrong_rank_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\) or \(B, T, D\); got \(3,\)"):
        adapter.update_step(x[0, 0], y[0, 0], h)


def test_a_wrong_width_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match="x must have 3 features on its last axis"):
        adapter.update_step(x[..., :2], y, h)


def test_targets_of_a_wrong_width_are_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"shape of the model's output, \(4, 6, 2\); got \(4, 6, 1\)"):
        adapter.update_step(x, y[..., :1], h)


def test_mismatched_steps_are_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"y must begin with the axes \(4, 6\) of x"):
        adapter.update_step(x, y[:, :5], h)


def test_a_mismatched_batch_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"y must begin with the axes \(4, 6\) of x"):
        adapter.update_step(x, y[:3], h)


def test_a_state_of_a_wrong_batch_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"hidden_state must have shape \(4, 4\) to match x; got \(3, 4\)"):
        adapter.update_step(x, y, h[:3])


def test_a_wrong_dtype_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match=r"x must be of dtype torch\.float64, as the model's weights are"):
        adapter.update_step(x.float(), y, h)


def test_data_on_a_wrong_device_are_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match="y must be on cpu, where the model is; got meta"):
        adapter.update_step(x, y.to("meta"), h)


def test_data_that_are_no_tensors_are_refused(live):
    adapter, x, y, h = live
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        adapter.update_step(x.tolist(), y, h)


def test_a_model_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"must be on device 'meta'; it is on 'cpu': move it, or pass device='cpu'"):
        Adapter(nn.Linear(1, 1), device="meta")


def test_a_model_with_nothing_to_adapt_is_refused():
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        Adapter(nn.Linear(1, 1).requires_grad_(False))


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate must be finite and >= 0; got -0\.1"):
        AdaptationConfig(learning_rate=-0.1)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps must be >= 0; got -1"):
        AdaptationConfig(num_steps=-1)


def test_a_rate_beside_an_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate = 0\.5 would be ignored: optimizer has a rate of its own"):
        AdaptationConfig(learning_rate=0.5, optimizer=torchopt.adam(0.1))


def test_another_kind_of_optimizer_is_refused():
    optimizer: Any = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a TorchOpt gradient transformation, .* got SGD"):
        AdaptationConfig(optimizer=optimizer)


def test_an_empty_batch_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match="x must hold at least one sequence and one step; got shape"):
        adapter.update_step(x[:0], y[:0], h[:0])


def test_a_state_that_is_not_finite_is_refused(live):
    adapter, x, y, h = live
    with pytest.raises(ValueError, match="hidden_state must be finite; got nan"):
        adapter.update_step(x, y, torch.full_like(h, torch.nan))


def test_no_state_means_init_hidden():
    model, x, y, h = setting()
    results = [Adapter(copy.deepcopy(model)).update_step(x, y, state) for state in (None, torch.zeros_like(h))]
    assert results[0] == results[1]
