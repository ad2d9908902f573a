"""What the models of `serious_benchmark.py` are held against: that nothing changes, an oracle, a model that is told.

Letters: N systems, B windows, L steps of one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from schedules import rate_at
from serious_data import Data
from serious_models import MODELS, alike, errors, finite, made, one_step, scaled, stream
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
    """Of the model for all systems, trained on with the other episodes of the very system, one model for each.

    The last two of these are held out, and of all steps those weights are taken that do best on them, system by system.
    """
    size, number, length = data.size, len(data.test.action), data.size.query[1]
    model, generator = made(name, data), stream(seed, 3)
    own = {name: p.detach().clone().requires_grad_() for name, p in alike(params, number).items()}
    optimizer = torch.optim.Adam(own.values())  # elementwise, so that systems do not know each other
    systems, last = torch.arange(number), data.test.action.shape[1] - 2
    held_out = [
        torch.cat(both, 1) for both in zip(*(data.tested(data.test, (0, last + e))[2:] for e in (0, 1)), strict=True)
    ]
    loss = vmap(partial(one_step, model))
    best = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        least = loss(best, *held_out)
    for step in range(size.oracle_steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, size.oracle_steps, size.outer_lr / 2)
        parts = []
        for _ in range(size.oracle_windows):
            episode = torch.randint(2, last, (number,), generator=generator)
            begin = data.begins(number, length, generator)
            parts.append(windows_at(data.scales, data.test, systems, episode, begin[:, None], length))
        optimizer.zero_grad()
        loss(own, *(torch.cat(part, 1) for part in zip(*parts, strict=True))).sum().backward()
        optimizer.step()
        if (step + 1) % max(size.oracle_steps // 10, 1) == 0:
            with torch.no_grad():
                found = loss(own, *held_out)
                for name, p in own.items():
                    better = (found < least).view(-1, *[1] * (p.dim() - 1))
                    best[name] = torch.where(better, p, best[name])
                least = torch.minimum(found, least)
    return errors(model, data, best, data.test, size.context)


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
    no_action = data.no_action if data.dead_actuators else None
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
    params = alike(learned, len(data.test.action))
    return errors(told, data, {**params, "physics": data.test.physics}, data.test, size.context)
