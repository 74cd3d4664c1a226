"""A hard limit on how long a test may take: what never ends fails, with the stacks of all threads."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


class TimeLimit:
    """Seconds from now; ``check`` ends what asks it, so that no thread outlives a test that failed."""

    def __init__(self, seconds: float = 120.0) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise once the time is over."""
        if time.monotonic() > self._end:
            raise TimeoutError(f"this did not end within {self._seconds:g} seconds")

    def run(self, job: Callable[[], T]) -> T:
        """The job's result, or its error."""
        found: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                found.append(job())
            except BaseException as error:  # noqa: BLE001 - raised again by the test
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(max(0.0, self._end - time.monotonic()))
        if thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            pytest.fail(f"this did not end within {self._seconds:g} seconds; the stacks of all threads are above")
        if errors:
            raise errors[0]
        return found[0]
