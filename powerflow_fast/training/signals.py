"""Signals that ask a run to stop: it saves first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Abandoned(BaseException):
    """Leaves work that is made again after a resume. No ``Exception``: code in between must not swallow it."""


class StopRequest:
    """SIGTERM and SIGINT, while this context is entered, set :attr:`signal` instead of ending the process.

    Work that changes nothing lasting runs inside :meth:`abandonable`, which a signal leaves at once with
    :class:`Abandoned`; what does change weights or files is finished first. A second SIGINT is a KeyboardInterrupt, a
    second SIGTERM changes nothing: schedulers repeat it. Signals that the process ignores stay ignored, and outside
    the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._leave_at_once = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                former = signal.getsignal(number)
                # None: a handler that Python did not install and could not put back.
                if former not in (signal.SIG_IGN, None):
                    self._former[number] = former
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        if self._leave_at_once:
            raise Abandoned

    @contextmanager
    def abandonable(self, enabled: bool = True) -> Iterator[None]:
        """Inside, a signal raises :class:`Abandoned`, and so does one that came before; not if ``enabled`` is False.

        Processes that train together must not be abandoned one by one: the others would wait for them.
        """
        if enabled and self.signal is not None:
            raise Abandoned
        self._leave_at_once = enabled
        try:
            yield
        finally:
            self._leave_at_once = False
