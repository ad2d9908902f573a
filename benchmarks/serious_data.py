"""What models of `serious_benchmark.py` see of its robots, and how much of it: sizes, batches, windows.

Letters: N systems, B windows, L steps of one, K inner steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from serious_tasks import WARM_UP, Amount, Episodes, scales_of, steps_apart, windows_at
from torch import Tensor

__all__ = ["Data", "Size"]


@dataclass(frozen=True)
class Size:
    """How much is spent, and how."""

    amount: Amount
    updates: int
    """Meta-updates, each of K + 1 gradients."""
    batch: int = 10
    """Systems of an update."""
    inner_steps: int = 3
    """K."""
    support: tuple[int, int] = (4, 16)
    """Windows that follow each other in one episode, and their steps: what is adapted to."""
    query: tuple[int, int] = (4, 24)
    """Windows of another episode, and their steps."""
    context: int = 4
    """Steps of a window of the test that the model sees before it predicts from its own predictions."""
    outer_lr: float = 0.005
    """Of Adam, after a tenth of the updates; it falls to 0 as a cosine."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Of gradient descent from the model for all systems; what suits it best on those held out is taken, and is MAML's
    at first, where every tensor learns its own."""
    gain_rate: float = 3.0
    """MAML's at first, of the gains of models that have them: better than 1 on a joint left out of the training."""
    gain_rates: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Of gradient descent, with any of `rates`, `gain_rate` among them."""
    oracle_steps: int = 300
    """Of Adam, on all other episodes of the very system."""
    oracle_windows: int = 8
    """Of each of its steps."""
    compile: bool | Literal["trace"] = True
    """Of meta-updates."""

    @property
    def joint_updates(self) -> int:
        """Updates of the model for all systems, which gets as many gradients as MAML with what comes before it."""
        return 2 * (1 + self.inner_steps) * self.updates

    @property
    def shared_updates(self) -> int:
        """Those that come before MAML: half of all."""
        return self.joint_updates // 2

    @property
    def joint_windows(self) -> int:
        """Windows of its batch: as many steps as support and query of MAML have."""
        return self.query[0] + math.ceil(math.prod(self.support) / self.query[1])


class Data:
    """Systems of the training, systems of it that are held out to choose rates on, and systems of the test.

    Raises:
        ValueError: a component of the observation never moves, so that its errors have no unit.
    """

    def __init__(self, size: Size, train: Episodes, test: Episodes, *, dead_actuators: bool = False) -> None:
        self.size, self.test, self.dead_actuators = size, test, dead_actuators
        held_out = size.amount.held_out
        self.train = Episodes(*(leaf[held_out:] for leaf in train))
        self.held_out = Episodes(*(leaf[:held_out] for leaf in train))
        self.scales, self.far = scales_of(self.train), steps_apart(self.train)
        self.no_action = self.scales.action.normalize(torch.zeros(train.action.shape[-1]))
        """(A,) an action of 0, as models see it."""
        self.inputs = train.observation.shape[-1] + train.action.shape[-1]
        self.outputs = train.observation.shape[-1]
        if bool((self.far == 0).any()):
            still = (self.far == 0).any(0).nonzero()[:, 0].tolist()
            raise ValueError(f"Every component of an observation must move in the training; {still} do not.")

    def batch(self, generator: torch.Generator, windows: int | None = None) -> tuple[Tensor, ...]:
        """Support x, y and query x, y of some systems, (N, B, L, ...); `windows` of the query."""
        return self.drawn(generator, windows)[1]

    def drawn(self, generator: torch.Generator, windows: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Which systems, (N,), and a batch of them."""
        size, episodes = self.size, self.train.action.shape[1]
        systems = torch.randint(len(self.train.action), (size.batch,), generator=generator)
        first = torch.randint(episodes, (size.batch,), generator=generator)
        second = (first + torch.randint(1, episodes, (size.batch,), generator=generator)) % episodes
        support = self.support(self.train, systems, first, self.begins(size.batch, math.prod(size.support), generator))
        count, length = size.query[0] if windows is None else windows, size.query[1]
        starts = torch.stack([self.begins(size.batch, length, generator) for _ in range(count)], 1)
        return systems, (*support, *windows_at(self.scales, self.train, systems, second, starts, length))

    def support(self, of: Episodes, systems: Tensor, episode: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        """Windows that follow each other from a step on."""
        count, length = self.size.support
        starts = begin[:, None] + length * torch.arange(count)
        return windows_at(self.scales, of, systems, episode, starts, length)

    def tested(self, of: Episodes, episodes: tuple[int, int] = (0, 1)) -> tuple[Tensor, ...]:
        """Support of the one episode, query of the other, of all systems: always the same."""
        systems = torch.arange(len(of.action))
        first, second = (torch.full_like(systems, e) for e in episodes)
        begin = torch.full_like(systems, WARM_UP)
        count, length = self.size.query
        starts = (begin[:, None] + length * torch.arange(count)).expand(len(systems), -1)
        return (
            *self.support(of, systems, first, begin),
            *windows_at(self.scales, of, systems, second, starts, length),
        )

    def observed(self, of: Episodes, episode: int = 1) -> tuple[Tensor, Tensor]:
        """Observations (N, B, L + 1, D) and actions (N, B, L, A) of the windows of the query of `tested`."""
        count, length = self.size.query
        t = WARM_UP + length * torch.arange(count)[:, None] + torch.arange(length + 1)
        return of.observation[:, episode][:, t], of.action[:, episode][:, t[:, :-1]]

    def begins(self, number: int, length: int, generator: torch.Generator) -> Tensor:
        """Int64 (N,), where windows of so many steps begin."""
        last = self.train.action.shape[2] - length
        return WARM_UP + torch.randint(last - WARM_UP + 1, (number,), generator=generator)
