"""Policies from any model: what their outputs mean, steps and sequences, acting by noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ssmrl.core import GRU, LSTM, MLP, StateSpaceModel
from ssmrl.meta_rl import CategoricalHead, GaussianHead, PolicyModel
from ssmrl.meta_rl.distributions import Categorical, Gaussian, TanhGaussian

MODELS = {
    "ssm": lambda outputs: StateSpaceModel(5, 3, outputs, hidden_dim=8),
    "gru": lambda outputs: GRU(5, 3, outputs),
    "lstm": lambda outputs: LSTM(5, 3, outputs),
    "mlp": lambda outputs: MLP(3, outputs, hidden_dim=8),
    "linear": lambda outputs: nn.Linear(3, outputs),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_is_its_steps_and_a_reset_forgets(name):
    torch.manual_seed(0)
    policy = PolicyModel(MODELS[name](3), GaussianHead(2, log_std=-0.5), has_value=True).double()
    x, reset = torch.randn(4, 6, 3, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.bool)
    reset[1, 3] = True
    whole, _ = policy(x, None, reset if name != "linear" else None)
    state = policy.init_hidden(4)
    for t in range(6):
        step, state = policy(x[:, t], state, reset[:, t] if name != "linear" else None)
        torch.testing.assert_close(step.distribution.mean, whole.distribution.mean[:, t])
        torch.testing.assert_close(step.value, whole.value[:, t])
    assert whole.value.shape == (4, 6)
    torch.testing.assert_close(whole.distribution.log_std, torch.full((4, 6, 2), -0.5, dtype=torch.float64))


def test_outputs_of_a_gaussian_are_means_and_where_asked_log_deviations():
    output = torch.tensor([[1.0, 2.0, 0.5, -30.0]])
    fixed = GaussianHead(4)(output)
    assert isinstance(fixed, Gaussian)
    torch.testing.assert_close(fixed.mean, output)
    torch.testing.assert_close(fixed.log_std, torch.zeros(1, 4))
    varying = GaussianHead(2, log_std=0.25, depends_on_input=True, squash=True)(output)
    assert isinstance(varying, TanhGaussian)
    torch.testing.assert_close(varying.mean, output[:, :2])
    torch.testing.assert_close(varying.log_std, torch.tensor([[0.75, math.log(1e-6)]]))  # kept above
    assert GaussianHead(2, depends_on_input=True).num_outputs == 4
    assert [*GaussianHead(2, depends_on_input=True).parameters()] == []


def test_outputs_of_a_categorical_are_logits():
    distribution = CategoricalHead(3)(torch.tensor([0.0, math.log(2.0), math.log(5.0)]))
    assert isinstance(distribution, Categorical)
    torch.testing.assert_close(distribution.log_prob(torch.tensor(2)).exp(), torch.tensor(5 / 8))


def test_acting_is_sampling_by_the_noise_or_the_most_likely_action():
    policy = PolicyModel(nn.Linear(3, 2), GaussianHead(2, log_std=1.0))
    params = dict(policy.named_parameters())
    x, noise = torch.randn(5, 3), torch.randn(5, 2)
    reset = torch.zeros(5, dtype=torch.bool)
    sampled, state = policy.act(params, x, None, reset, noise)
    best, _ = policy.act(params, x, None, reset, None)
    torch.testing.assert_close(best, policy.model(x))
    torch.testing.assert_close(sampled, best + math.e * noise)
    assert state is None


def test_acting_uses_the_parameters_that_it_is_given():
    policy = PolicyModel(nn.Linear(3, 2), GaussianHead(2))
    params = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}
    action, _ = policy.act(params, torch.randn(5, 3), None, torch.zeros(5, dtype=torch.bool), None)
    torch.testing.assert_close(action, torch.zeros(5, 2))
    assert policy.model.weight.abs().sum() > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PolicyModel(GRU(5, 3, 4), GaussianHead(2)), "`model` must have 2 outputs, .*; got 4"),
        (lambda: PolicyModel(GRU(5, 3, 2), GaussianHead(2), has_value=True), "must have 3 outputs"),
        (lambda: GaussianHead(0), "^action_dim must be a positive integer; got 0"),
        (lambda: CategoricalHead(2.5), "^num_actions must be a positive integer; got 2.5"),  # type: ignore[arg-type]
        (lambda: GaussianHead(2, log_std=math.nan), "`log_std` must be finite; got nan"),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
