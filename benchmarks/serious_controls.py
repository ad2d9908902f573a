"""What the models of `serious_benchmark.py` are held against: that nothing changes, an oracle, a model that is told.

Letters: N systems, B windows, L steps of one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from schedules import rate_at
from serious_data import Data
from serious_models import MODELS, errors, finite, one_step, scaled, stream
from serious_tasks import HORIZONS, windows_at
from torch import Tensor, nn
from torch.func import vmap

from ssmrl import mse_loss

__all__ = ["Told", "oracle_errors", "persistence_errors", "told_errors"]


def persistence_errors(data: Data) -> list[list[float]]:
    """Of the prediction that nothing changes."""
    observation, _ = data.observed(data.test)
    context = data.size.context
    now = observation[:, :, context : context + 1].expand(-1, -1, max(HORIZONS), -1)
    return finite(vmap(lambda a, b: scaled(a, b, data.far))(now, observation[:, :, context + 1 :]))


def oracle_errors(data: Data, name: str, params: Any, seed: int) -> list[list[float]]:
    """Of the model for all systems, trained on with the other episodes of the very system, one model for each."""
    size, number, length = data.size, len(data.test.action), data.size.query[1]
    model, generator = MODELS[name](data.inputs, data.outputs), stream(seed, 3)
    own = {name: p.detach().expand(number, *p.shape).clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(own.values())  # elementwise, so that systems do not know each other
    systems = torch.arange(number)
    for step in range(size.oracle_steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, size.oracle_steps, size.outer_lr / 2)
        parts = []
        for _ in range(size.oracle_windows):
            episode = torch.randint(2, data.test.action.shape[1], (number,), generator=generator)
            begin = data.begins(number, length, generator)
            parts.append(windows_at(data.scales, data.test, systems, episode, begin[:, None], length))
        x, y = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        vmap(partial(one_step, model))(own, x, y).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return errors(model, data, own, data.test, size.context)


class Told(nn.Module):
    """A model that is told the physics, by numbers beside its input, or by actions that a dead actuator does not get.

    Args:
        model: of inputs with or without those numbers.
        physics: (P,) of any system.
        no_action: (A,) an action of 0 as the model sees it, where physics are dead actuators; None: they are numbers.
    """

    def __init__(self, model: nn.Module, physics: Tensor, no_action: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.physics = nn.Parameter(torch.zeros_like(physics), requires_grad=False)
        self.no_action = no_action

    def init_hidden(self, batch_size: int = 1) -> Any:
        return self.model.init_hidden(batch_size)

    def forward(self, x: Tensor, hidden_state: Any = None) -> tuple[Tensor, Any]:
        output: tuple[Tensor, Any] = self.model(tell(x, self.physics, self.no_action), hidden_state)
        return output


def tell(x: Tensor, physics: Tensor, no_action: Tensor | None) -> Tensor:
    """Inputs (..., D + A) of a model that is told physics (..., P)."""
    physics = physics.expand(*x.shape[:-1], -1)
    if no_action is None:
        return torch.cat([x, physics], -1)
    observation, action = x.split([x.shape[-1] - len(no_action), len(no_action)], -1)
    return torch.cat([observation, torch.where(physics > 0, no_action, action)], -1)


def told_errors(data: Data, name: str, seed: int) -> list[list[float]]:
    """Of a model for all systems that is told the physics of each, and does not adapt: what knowing them is worth."""
    size, physics = data.size, data.train.physics
    action = data.scales.action
    no_action = action.normalize(torch.zeros_like(action.mean)) if data.dead_actuators else None
    torch.manual_seed(seed)
    inputs = data.inputs + (0 if data.dead_actuators else physics.shape[-1])
    told = Told(MODELS[name](inputs, data.outputs), physics[0], no_action)
    learned = {name: p for name, p in told.named_parameters() if p.requires_grad}
    optimizer, generator = torch.optim.Adam(learned.values()), stream(seed, 4)
    for update in range(size.joint_updates):
        optimizer.param_groups[0]["lr"] = rate_at(update, size.joint_updates, size.outer_lr)
        systems, (_, _, x, y) = data.drawn(generator, size.joint_windows)
        of_each = physics[systems][:, None, None]
        optimizer.zero_grad()
        mse_loss(told.model(tell(x, of_each, no_action).flatten(0, 1))[0], y.flatten(0, 1)).backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
    number = len(data.test.action)
    params = {name: p.detach().expand(number, *p.shape) for name, p in learned.items()}
    return errors(told, data, {**params, "physics": data.test.physics}, data.test, size.context)
