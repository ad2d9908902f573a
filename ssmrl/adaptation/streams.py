"""StreamAdapter: the inner loop on many live streams at once, each with weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import vmap

from ssmrl.adaptation.checks import check_pair, check_reset_mask, check_state
from ssmrl.adaptation.live import LiveModel
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import check_num_steps
from ssmrl.adaptation.stream import Counts, Outcome, Report, Stream, begin, fresh, in_use
from ssmrl.adaptation.test_time_adaptation import AdaptationConfig
from ssmrl.adaptation.trace import Traced, check_compile
from ssmrl.adaptation.tree import is_there, tree_leaves, tree_map
from ssmrl.sharding import Rows

__all__ = ["StreamAdapter", "StreamsSnapshot"]


class StreamsSnapshot(NamedTuple):
    """All that a `StreamAdapter` carries, as copies; of several ranks, what this one does."""

    streams: Stream | None
    active: Tensor
    example: Any = None
    """Data like those of one stream that they were begun for."""


class StreamAdapter:
    """Adapts one model to N streams of transitions in one call, as so many adapters would: the same numbers for each.

    It is called like the model, whose row i then has the weights of stream i. Every stream has its own adapted
    weights, optimizer state, window, guard and counters; what does not adapt is held once. A stream whose data are not
    finite, or which diverges, changes no bit of any other.

    The model itself is never written to. The anchor is the weights that adapt as they were when this was made; what
    does not adapt is read from the model at every call.

    Args:
        model: any module, with a state or without.
        config: how every stream adapts; with `adapted` choosing a head, only heads are stored N times. The optimizer
            must keep all its state in tensors, as all of TorchOpt's but `radam` do or can be made to.
        num_streams: N >= 1.
        device: where the model is and the data will come from.
        loss_fn: (output, y) -> scalar, for one stream, as for `Adapter`.
        chunk_size: at most so many streams at once, which takes less memory, and less time where the weights of
            all do not fit the cache: the same numbers. None: all at once.
        compile: True: record an update once for given shapes and compile it with TorchInductor, which for many streams
            is ten times as fast and more; "trace": record and replay it.
        process_group: of `torch.distributed`, whose ranks make the same calls with the same data, adapt the streams in
            turn (rank r of R has r, r + R, ...), and get the results of all. `counts`, `params`, `in_use` and
            `state_dict` have to be asked for on all ranks too. The model is at first that of the first rank. None: one
            process.

    Raises:
        TypeError, ValueError: as `Adapter`; a number that is not an integer >= 1, or fewer streams than ranks; an
            optimizer that cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaptationConfig | None = None,
        num_streams: int = 1,
        device: torch.device | str = "cpu",
        *,
        loss_fn: Callable[[Tensor, Any], Tensor] = mse_loss,
        chunk_size: int | None = None,
        compile: bool | Literal["trace"] = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._rows = Rows(process_group)
        self.model = model
        self.config = AdaptationConfig() if config is None else config
        self.loss_fn = loss_fn
        self.compile = check_compile(compile)
        for name, value in (("num_streams", num_streams), ("chunk_size", chunk_size)):
            if value is not None and check_num_steps(name, value) < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self._check_number(num_streams)
        self._rows.shards.broadcast([*model.parameters(), *model.buffers()])
        self.chunk_size = chunk_size
        self._device = device
        self._begin(LiveModel(model, self.config, device, loss_fn, for_one=False))
        self._streams: Stream | None = None
        self._example: tuple[Any, ...] | None = None  # of the data of one stream that they were begun for
        self._active = torch.ones(num_streams, dtype=torch.bool, device=self._live.like.device)
        self._all_active = True

    @property
    def num_streams(self) -> int:
        """N, with streams that were dropped."""
        return len(self._active)

    @property
    def active(self) -> Tensor:
        """Bool (N,), False for streams that were dropped; a copy."""
        return self._active.clone()

    @property
    def counts(self) -> Counts | None:
        """How many updates every stream had, and how they ended, Int64 (N,) each; None before any."""
        if self._streams is None:
            return None
        counts: Counts = self._rows.whole(self._streams.counts, self.num_streams)
        return Counts(*map(torch.clone, counts))

    @torch.no_grad()
    def __call__(self, x: Tensor, hidden_state: Any = None, reset: Tensor | bool | None = None) -> tuple[Tensor, Any]:
        """The model's output, row i with the weights of stream i.

        Args:
            x: (N, D) one step, or (N, T, D) a sequence, of every stream.
            hidden_state: the state before it, leaves (N, ...); None means `init_hidden`, or no state.
            reset: Bool (N,) or (N, T), or one for all: where an episode begins.

        Returns:
            The output, (N, O) or (N, T, O), and the next state.
        """
        self._check(x, None, hidden_state)
        mask = check_reset_mask(reset, x)
        data = self._rows.mine((x, hidden_state if is_there(hidden_state) else (), () if mask is None else mask))
        if self._streams is None:
            results = self._live.forward({}, self._live.rules.anchor, *data)
        else:
            mapped = self._predict(in_use(self._streams), self._live.others(), *_as_batches(data))
            results = tree_map(lambda leaf: leaf[:, 0], mapped)
        output, after = self._rows.whole(results, self.num_streams)
        return output, after if is_there(after) else None

    def update_step(
        self, x: Tensor, y: Tensor | None, hidden_state: Any, *, reset: Tensor | bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adapt every stream to its transition: `Adapter.update_step` of all.

        Args:
            x: (N, D) one step, or (N, T, D) a sequence, of every stream; with a window, one step.
            y: the targets, with the leading axes of `x`; None for a loss that needs none.
            hidden_state: the state before `x`, leaves (N, ...), as for `Adapter.update_step`.
            reset: Bool (N,) or (N, T), or one for all: where an episode begins.

        Returns:
            The losses *before* the first gradient step, (N,), NaN where data were not finite, and the numbers of steps
            that stand, Int64 (N,), 0 where an update was skipped or rolled back.

        Raises:
            TypeError, ValueError: data of a wrong shape, dtype or device. Values that are not finite are no error: that
                stream is left as it is, and so it is where steps lead to a value that is not finite.
        """
        report = self._update(False, x, y, hidden_state, reset)
        loss, num_steps = self._rows.whole((report.loss, report.num_steps), self.num_streams)
        return loss, num_steps

    def update(self, x: Tensor, y: Tensor | None, hidden_state: Any, *, reset: Tensor | bool | None = None) -> Report:
        """`update_step`, and what it did in numbers, (N,) each, for the price of one more evaluation of the loss."""
        report: Report = self._rows.whole(self._update(True, x, y, hidden_state, reset), self.num_streams)
        return report

    def params(self, stream: int) -> dict[str, Tensor]:
        """Copies of the weights in use of one stream, by name: of those that adapt."""
        if not 0 <= stream < self.num_streams:
            raise IndexError(f"stream must be between 0 and {self.num_streams - 1}; got {stream}.")
        if self._streams is None:
            return self._live.anchor()
        named: dict[str, Tensor] = self._rows.one(in_use(self._streams), stream)
        return named

    def in_use(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights that streams predict with, by name, for a computation of your own; not to be written to.

        Returns:
            What adapts, (N, ...) each, and what does not, parameters and buffers, which all streams share.
        """
        if self._streams is None:
            named = {name: p.expand(self.num_streams, *p.shape) for name, p in self._live.rules.anchor.items()}
        else:
            named = dict(self._rows.whole(in_use(self._streams), self.num_streams))
        return named, self._live.others()

    def reset(self, streams: Tensor | None = None) -> None:
        """Begin anew, at the anchor, in the streams of a mask, Bool (N,); None: in all."""
        mask = torch.ones_like(self._active) if streams is None else self._mask(streams)
        if self._streams is None:
            return
        if bool(mask.all()):
            self._streams = None
            return
        mine = self._rows.mine(mask)
        self._streams = _where(mine, self._fresh(len(mine)), self._streams)

    def drop(self, streams: Tensor) -> None:
        """End the streams of a mask, Bool (N,): their rows are ignored from now on, until `add` takes their places."""
        self._active = self._active & ~self._mask(streams)
        self._all_active = bool(self._active.all())

    def add(self, number: int = 1) -> Tensor:
        """Begin new streams, at the anchor, in the places of dropped ones, and behind the others where there are none.

        Returns:
            Int64 (number,) which rows they are.
        """
        if check_num_steps("number", number) < 1:
            raise ValueError(f"number must be at least 1; got {number}.")
        free = torch.nonzero(~self._active)[:number, 0]
        more = number - len(free)
        count = self.num_streams
        if len(free):
            mask = torch.zeros_like(self._active)
            mask[free] = True
            if len(free) < count:
                self.reset(mask)
            else:
                self._streams = None
            self._active = self._active | mask
        if more:
            if self._streams is not None:
                fresh_ones = self._fresh(self._rows.count(count + more) - self._rows.count(count))
                self._streams = tree_map(lambda a, b: torch.cat([a, b]), self._streams, fresh_ones)
            self._active = torch.cat([self._active, torch.ones_like(self._active[:1]).expand(more)])
        self._all_active = bool(self._active.all())
        return torch.cat([free, torch.arange(count, count + more, device=free.device)])

    def snapshot(self) -> StreamsSnapshot:
        """A copy of everything that is carried from update to update."""
        streams = None if self._streams is None else tree_map(torch.clone, self._streams)
        return StreamsSnapshot(streams, self._active.clone(), self._example)

    def restore(self, snapshot: StreamsSnapshot) -> None:
        """Go back to a snapshot of this adapter, bit for bit; it can be restored again."""
        self._streams = None if snapshot.streams is None else tree_map(torch.clone, snapshot.streams)
        self._active = snapshot.active.clone()
        self._all_active = bool(self._active.all())
        self._example = snapshot.example

    def state_dict(self) -> dict[str, Any]:
        """Anchor, and all that is carried from update to update, of all ranks: a tree for `save_checkpoint`.

        All ranks make it together, one of them saves it, and any number of ranks goes on from it.
        """
        saved = self._live.saved(self._streams, self._example)
        if saved is not None:
            saved = {**saved, "leaves": self._rows.whole(saved["leaves"], self.num_streams)}
        return {"anchor": self._live.anchor(), "active": self._active.clone(), "streams": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of an adapter with the same settings returned, to the same bits.

        There are as many streams then as there were; what does not adapt is the model's, and the caller's to load.

        Raises:
            ValueError: it is of another model, or of other settings; nothing has changed.
        """
        live = LiveModel(self.model, self.config, self._device, self.loss_fn, for_one=False, anchor=state["anchor"])
        active = state["active"].to(live.like.device, copy=True)
        self._check_number(len(active))
        saved = state["streams"]
        loaded: tuple[Stream | None, tuple[Any, ...] | None] = (None, None)
        if saved is not None:
            if any(not isinstance(leaf, Tensor) or leaf.shape[:1] != active.shape for leaf in saved["leaves"]):
                raise ValueError(f"The state must be of a StreamAdapter with {len(active)} streams; it is not.")
            saved = {**saved, "leaves": self._rows.mine(saved["leaves"])}
            loaded = live.loaded(saved, lambda one: _stacked(one, self._rows.count(len(active))))
        self._streams, self._example = loaded
        self._active, self._all_active = active, bool(active.all())
        self._begin(live)

    def _begin(self, live: LiveModel) -> None:
        self._live = live
        self._predict = self._mapped(lambda params, others, *data: live.forward(others, params, *data))
        self._updates = {
            (measured, adapting): self._mapped(live.update(measured=measured, adapting=adapting))
            for measured in (True, False)
            for adapting in (True, False)
        }

    @torch.no_grad()
    def _update(self, measured: bool, x: Tensor, y: Any, hidden_state: Any, reset: Any) -> Report:
        self._check(x, y, hidden_state)
        every = self._live.data(x, y, hidden_state, check_reset_mask(reset, x), len(x))
        data: tuple[Any, ...] = _as_batches(self._rows.mine(every))
        streams = self._streams
        if streams is None:
            first = tree_map(lambda leaf: leaf[0], data)
            streams = _stacked(begin(self._live.rules, *first), len(data[0]))
            self._example = tree_map(torch.zeros_like, first)
        streams, data = self._live.fitted(streams, data, axis=2)
        period = self.config.every
        adapting = period == 1 or bool(((streams.counts.calls + 1) % period == 0).any())
        report: Report
        after, report = self._updates[measured, adapting](streams, self._live.others(), *data)
        if not self._all_active:
            active = self._rows.mine(self._active)
            after = _where(active, after, streams)
            nothing = Report(*(torch.full_like(t, torch.nan if t.is_floating_point() else 0) for t in report))
            nothing = nothing._replace(outcome=torch.full_like(report.outcome, Outcome.DROPPED))
            report = _where(active, report, nothing)
        self._streams = after
        return report

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """(streams or their parameters, others, *data) mapped over streams."""

        def run(mine: Any, others: Any, *data: Any) -> Any:
            in_dims = (0, None, *[0] * len(data))
            return vmap(function, in_dims=in_dims, chunk_size=self.chunk_size)(mine, others, *data)

        return run if self.compile is False else Traced(run, inductor=self.compile is True)

    def _fresh(self, number: int) -> Stream:
        """So many streams at their beginning, with windows like those of the others."""
        one = tree_map(lambda leaf: torch.zeros_like(leaf[0]), self._streams)
        rules = self._live.rules
        streams: Stream = _stacked(
            fresh(rules, one.buffer, () if rules.guard is None else one.guard.anchor_hidden), number
        )
        return streams

    def _check_number(self, num_streams: int) -> None:
        if num_streams < self._rows.shards.size:
            raise ValueError(
                f"num_streams must be at least the number of ranks, {self._rows.shards.size}; got {num_streams}."
            )

    def _check(self, x: Any, y: Any, hidden_state: Any) -> None:
        check_pair("x", x, "y", y, self._live.like, optional=True)
        if len(x) != self.num_streams:
            raise ValueError(f"x must have a row for each of {self.num_streams} streams; got shape {tuple(x.shape)}.")
        check_state("hidden_state", hidden_state, self._live.like, finite=False)
        for leaf in tree_leaves(hidden_state):
            if leaf.dim() == 0 or len(leaf) != self.num_streams:
                raise ValueError(
                    f"hidden_state must have a row for each of {self.num_streams} streams; got shape "
                    f"{tuple(leaf.shape)}."
                )

    def _mask(self, streams: Any) -> Tensor:
        mask = streams
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != self._active.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"streams must be a Bool tensor of shape ({self.num_streams},); got {got}.")
        return mask.to(self._active.device)


def _as_batches(tree: Any) -> Any:
    """(N, ...) -> (N, 1, ...): every stream is a batch of one row."""
    return tree_map(lambda leaf: leaf[:, None], tree)


def _stacked(tree: Any, number: int) -> Any:
    return tree_map(lambda leaf: leaf.expand(number, *leaf.shape).clone(), tree)


def _where(streams: Tensor, true: Any, false: Any) -> Any:
    """Of two stacks the streams of `true` where the mask is True, else those of `false`."""
    return tree_map(lambda a, b: torch.where(streams.view(-1, *[1] * (a.dim() - 1)), a, b), true, false)
