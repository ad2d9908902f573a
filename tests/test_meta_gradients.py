"""Exact meta-gradients: every optimizer, model and memory option, mapped and in a loop, against finite differences."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import higher
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.func import grad, vmap
from torchopt import pytree

from ssmrl import GRU, LSTM, MLP, StateSpaceModel, adapt, mse_loss
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.core import functional_forward

D, O, S, N, B, T = 2, 1, 3, 2, 2, 3  # noqa: E741
randn = partial(torch.randn, dtype=torch.float64)

MODELS: dict[str, Any] = {
    "StateSpaceModel": partial(StateSpaceModel, S, D, O, hidden_dim=4),
    "GRU": partial(GRU, S, D, O),
    "LSTM": partial(LSTM, S, D, O),
    "MLP": partial(MLP, D, O, hidden_dim=4),
}

# Those whose step divides by the size of the gradient have an eps that keeps its curvature within reach of differences.
OPTIMIZERS: dict[str, Any] = {
    "sgd": torchopt.sgd(0.1),
    "weight decay": torchopt.sgd(0.1, weight_decay=0.1),
    "momentum": torchopt.sgd(0.1, momentum=0.9),
    "momentum with dampening": torchopt.sgd(0.1, momentum=0.9, dampening=0.5),
    "nesterov": torchopt.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": torchopt.adam(0.1, eps=1e-2),
    "adam with eps_root": torchopt.adam(0.1, eps_root=1e-4),
    "adamw": torchopt.adamw(0.1, eps=1e-2),
    "adamax": torchopt.adamax(0.1, eps=1e-2),
    "radam": torchopt.radam(0.1, betas=(0.9, 0.7), eps=1e-2),  # rectifies within four steps
    "rmsprop": torchopt.rmsprop(0.1, eps=1e-2),
    "adagrad": torchopt.adagrad(0.1, eps=1e-2),
    "adadelta": torchopt.adadelta(0.1, eps=1e-4),
    "schedule": torchopt.sgd(torchopt.schedule.linear_schedule(0.1, 0.01, 4)),
    "exponential schedule": torchopt.sgd(torchopt.schedule.exponential_decay(0.1, 0.9)),
    "chain with clipping": torchopt.chain(clip_by_global_norm(0.05), torchopt.adam(0.1, eps=1e-2)),
}
PLAIN: dict[str, Any] = {}
MODES: list[dict[str, Any]] = [PLAIN, {"recompute": 1}, {"mixed_mode": True}, {"mixed_mode": True, "recompute": 3}]


def problem(make, seed=0):
    """A model, meta-parameters (weights, an initial state, an offset of the support inputs), and a stack of tasks."""
    torch.manual_seed(seed)
    model = make().double()
    meta = {
        "params": {name: p.detach().clone() for name, p in model.named_parameters()},
        "state": pytree.tree_map(lambda s: 0.3 * randn(B, *s.shape[1:]), model.init_hidden(B)),
        "offset": 0.3 * randn(D),
    }
    tasks = (randn(N, B, T, D), randn(N, B, T, O), randn(N, B, T, D), randn(N, B, T, O))
    return model, meta, tasks


def objective(model, optimizer, steps, options, meta, task):
    """The query loss of one task, and a little of the losses on the way, whose derivative counts too."""

    def loss(params, state, offset, x, y):
        output, _ = functional_forward(model, params, x + offset, state)
        return mse_loss(output, y)

    support_x, support_y, query_x, query_y = task
    adapted = adapt(
        loss,
        meta["params"],
        meta["state"],
        meta["offset"],
        support_x,
        support_y,
        optimizer=optimizer,
        num_steps=steps,
        **options,
    )
    return loss(adapted.params, meta["state"], 0.0, query_x, query_y) + 0.1 * adapted.losses.sum()


def mapped(task_loss, meta, tasks):
    return vmap(task_loss, in_dims=(None, 0))(meta, tasks).mean()


def looped(task_loss, meta, tasks):
    return torch.stack([task_loss(meta, tuple(t[i] for t in tasks)) for i in range(N)]).mean()


def flat(tree):
    return torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(tree)])


def differences(function, meta, direction, step=1e-6):
    """The derivative of a function of a pytree along a direction, by central differences of the fourth order."""

    def at(distance):
        return function(pytree.tree_map(lambda p, d: p + distance * step * d, meta, direction))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def agrees_with_differences(function, meta, gradient, tolerance=1e-6):
    torch.manual_seed(1)
    for _ in range(2):
        direction = pytree.tree_map(torch.randn_like, meta)
        expected = differences(function, meta, direction)
        actual = flat(gradient) @ flat(direction)
        assert abs(actual - expected) <= tolerance * max(1.0, abs(expected)), (actual, expected)


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_meta_gradient_is_exact_and_every_way_to_it_the_same(optimizer, make, steps):
    model, meta, tasks = problem(make)
    results = {}
    for options, over in itertools.product(MODES, (mapped, looped)):
        task_loss = partial(objective, model, optimizer, steps, options)
        results[str(options), over.__name__] = grad(lambda m: over(task_loss, m, tasks))(meta)  # noqa: B023
    reference = results[str(PLAIN), "looped"]
    loss = partial(objective, model, optimizer, steps, PLAIN)
    agrees_with_differences(lambda m: looped(loss, m, tasks), meta, reference)
    scale = flat(reference).norm()
    for way, result in results.items():
        assert (flat(result) - flat(reference)).norm() <= 1e-10 * scale, way


@pytest.mark.parametrize("options", MODES[1:], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_pytorch_s_own_backward_gives_the_same_in_every_mode(make, options):
    model, meta, tasks = problem(make)
    optimizer = OPTIMIZERS["adam"]
    reference = grad(lambda m: mapped(partial(objective, model, optimizer, 3, PLAIN), m, tasks))(meta)
    leaves = pytree.tree_map(lambda p: p.clone().requires_grad_(), meta)
    mapped(partial(objective, model, optimizer, 3, options), leaves, tasks).backward()
    ours = pytree.tree_map(lambda p: p.grad, leaves)
    assert (flat(ours) - flat(reference)).norm() <= 1e-10 * flat(reference).norm()


@pytest.mark.parametrize("options", MODES[1:], ids=str)
def test_a_hessian_vector_product_of_the_meta_loss_is_the_same_in_every_mode(options):
    model, meta, tasks = problem(MODELS["GRU"])
    torch.manual_seed(2)
    direction = pytree.tree_map(torch.randn_like, meta)

    def product(options):
        def slope(m):
            task_loss = partial(objective, model, OPTIMIZERS["momentum"], 2, options)
            return flat(grad(lambda m: mapped(task_loss, m, tasks))(m)) @ flat(direction)

        return flat(grad(slope)(meta))

    reference = product(PLAIN)
    assert (product(options) - reference).norm() <= 1e-9 * reference.norm()


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize(("per_step", "per_element"), [(False, True), (True, False), (True, True)])
def test_learned_rates_are_differentiated_exactly(per_step, per_element, options):
    model, meta, tasks = problem(MODELS["StateSpaceModel"])
    rates = learning_rates(meta["params"], 0.1, num_steps=3 if per_step else None, per_element=per_element)
    meta["rates"] = {name: rate.detach() for name, rate in rates.items()}

    def task_loss(meta, task):
        optimizer = scale_by_learning_rates(meta["rates"], per_step=per_step)
        return objective(model, optimizer, 3, options, meta, task)

    gradient = grad(lambda m: mapped(task_loss, m, tasks))(meta)
    assert all((g != 0).any() for g in gradient["rates"].values())
    agrees_with_differences(lambda m: looped(task_loss, m, tasks), meta, gradient)


class _Recurrent(nn.Module):
    """h_t = tanh(W_h h_{t-1} + W_x x_t), y_t = W_y tanh(W h_t), of PyTorch modules, which higher can patch."""

    def __init__(self):
        super().__init__()
        self.state, self.input = nn.Linear(S, S), nn.Linear(D, S)
        self.hidden, self.output = nn.Linear(S, 4), nn.Linear(4, O)

    def forward(self, x, h):
        outputs = []
        for t in range(x.shape[1]):
            h = (self.state(h) + self.input(x[:, t])).tanh()
            outputs.append(self.output(self.hidden(h).tanh()))
        return torch.stack(outputs, 1), h


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torchopt.sgd(0.1), partial(torch.optim.SGD, lr=0.1)),
        (torchopt.sgd(0.1, momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        (torchopt.adam(0.01, eps=0.0), partial(torch.optim.Adam, lr=0.01, eps=0.0)),  # higher has another place for eps
    ],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_meta_gradient_equals_that_of_higher(ours, theirs):
    torch.manual_seed(0)
    model = _Recurrent().double()
    start, tasks = randn(B, S), (randn(N, B, T, D), randn(N, B, T, O), randn(N, B, T, D), randn(N, B, T, O))

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_forward(model, params, x, start)[0], y)

    def task_loss(params, task):
        return loss(adapt(loss, params, *task[:2], optimizer=ours, num_steps=4).params, *task[2:])

    gradient = grad(lambda p: mapped(task_loss, p, tasks))({name: p.detach() for name, p in model.named_parameters()})
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        with higher.innerloop_ctx(model, theirs(model.parameters()), copy_initial_weights=False) as (fast, optimizer):
            for _ in range(4):
                optimizer.step(mse_loss(fast(support_x, start)[0], support_y))
            total = total + mse_loss(fast(query_x, start)[0], query_y) / N
    expected = torch.autograd.grad(total, tuple(model.parameters()))
    for (name, _), e in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[name], e, rtol=1e-8, atol=1e-10)
