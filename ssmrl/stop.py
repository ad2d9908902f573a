"""Signals that ask a run to stop, heard between its updates."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from ssmrl.sharding import Shards

__all__ = ["StopSignal"]


class StopSignal:
    """Lets a loop finish its update and save when SIGTERM or SIGINT (Ctrl-C) asks it to stop::

        with StopSignal() as stop:
            for step in range(start, total):
                ...
                if stop or (step + 1) % 100 == 0:
                    save_checkpoint(folder, step + 1, state)
                    stop.exit_if_asked()  # here, so that a signal that comes later waits for the next save

    A second SIGINT raises KeyboardInterrupt at once, also in the midst of a save, which leaves the checkpoint
    before it valid. The handlers that were there come back after the block; a signal that was heard after its last
    `exit_if_asked` is then given to them, so that none is lost. Processes that are forked within the block leave Ctrl-C
    to this one, so that those of environments serve the update that is to be finished; SIGTERM ends them as usual.

    Ranks of `torch.distributed` hear a signal at different updates, and one that stops by itself leaves the others
    waiting. With their group, `stop` asks all of them, and is True on all where one has heard a signal. One that comes
    after they asked for the last time is the affair of the rank that hears it.

    Args:
        process_group: of `torch.distributed`, whose ranks all ask for `stop` equally often. None: one process.

    Raises:
        TypeError: a group of another kind, or one that this process is not in.
        ValueError: entered in another thread than the main one, where Python takes no signals.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._shards = Shards(process_group)
        self._agreed = 0  # the signal that ranks have agreed on, at the last time of asking
        self._asked: int | None = None
        self._before: dict[int, Any] = {}
        self._process = self._interrupts = 0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopSignal must be entered in the main thread; Python takes signals in no other.")
        self._asked, self._interrupts, self._agreed, self._process = None, 0, 0, os.getpid()
        self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
        number = self._agreed or self._asked or 0
        if number and kind is None:
            signal.raise_signal(number)

    def __bool__(self) -> bool:
        """Whether a signal has come, to any rank."""
        if self._shards.group is None:
            return self._asked is not None
        self._agreed = self._shards.largest(self._asked or 0)
        return self._agreed > 0

    def exit_if_asked(self) -> None:
        """End the process if a signal has come; with a group, if one had come when `stop` was asked for last.

        Raises:
            SystemExit: with 128 + the number of the signal, as shells have it: 143 for SIGTERM, 130 for SIGINT.
        """
        number = self._asked if self._shards.group is None else self._agreed
        if number:
            raise SystemExit(128 + number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._asked is None:
            self._asked = number
