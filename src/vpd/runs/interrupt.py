"""On Ctrl-C, SIGTERM and SIGHUP, lets the step under way end, so that a checkpoint can be saved before leaving."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptGuard:
    """While entered, the first of these signals only sets ``signal_number``; a second SIGINT interrupts at once.

    A signal that is ignored stays ignored, as SIGHUP is under ``nohup``. Where the terminal is gone, what would be
    written to it is dropped, so that the run can still save. Outside the main thread, where Python delivers no signals,
    the guard does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if number == signal.SIGHUP:
            self._drop_lost_terminals()

    def _drop_lost_terminals(self) -> None:
        for descriptor in self._terminals:
            # A terminal that is gone answers no question.
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
