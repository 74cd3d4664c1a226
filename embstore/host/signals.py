"""SIGINT and SIGTERM during a build: the window in flight is finished and committed first.

A second signal abandons the window in flight at the next batch. Outside a window a signal stops the build immediately: all
files are then durable or will be rewritten by the next run. Nothing is written after the exception has left ``deferred``.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from embstore.core.errors import BuildInterruptedError
from embstore.core.interfaces import Check

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HINT = "run the same command with --resume to continue"


class StopSignals:
    """Signal handlers during a build; the previous ones are restored on exit. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self._count = 0
        self._is_deferred = False
        self._stopped: BuildInterruptedError | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # interrupted code may raise a different error: an extension module raises "initialization failed", for example
        if self._stopped is not None and isinstance(error, Exception) and not isinstance(error, BuildInterruptedError):
            raise self._stopped from None

    def is_stopping(self) -> bool:
        """Whether a signal has arrived: start nothing new."""
        return self._count > 0

    @contextlib.contextmanager
    def deferred(self, what: str = "committing the window in flight") -> Iterator[Check]:
        """Delay signals until the end of one commit; yields a check that abandons the window after a second signal.

        Raises
        ------
        BuildInterruptedError
            A signal arrived.
        """
        if self._stopped is not None:  # the interrupted code swallowed the exception: start nothing new
            raise self._stopped
        self._is_deferred = True
        try:
            yield self._check
        finally:
            self._is_deferred = False
        if self._count:
            raise self._stop(f"stopped after {what}")

    def _check(self) -> None:
        if self._count > 1:
            raise self._stop("stopped; the window in flight was abandoned")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        # a build that is already stopping must be able to clean up
        if not (self._is_deferred or self._stopped):
            raise self._stop(f"stopped by {signal.Signals(number).name}")

    def _stop(self, message: str) -> BuildInterruptedError:
        self._stopped = BuildInterruptedError(message, hint=_HINT)
        return self._stopped
