"""Interleaved processes: each runs for a second while the others are stopped, until all have finished.

A shared machine changes its speed by the minute, so two runs one after the other may meet two different machines.
Interleaved, in another order each time, all meet the same one, and the ratios of their times compare what they do. Disk
writes that a process has asked for continue while it is stopped, now and then for some hundredths of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

SECONDS = 1.0  # of a turn: some twenty batches; caches are warm again after milliseconds


class _Stoppable:
    """A process in its own session that runs in its turns only."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - end() closes it
        self._process: subprocess.Popen[str] | None = None
        self._stops: list[tuple[float, float]] = []
        self._stopped_at = 0.0

    def take(self, seconds: float | None) -> bool:
        """Run for a turn, or to the end; whether it is done."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdout=self._output, stderr=subprocess.DEVNULL, text=True, start_new_session=True
            )
        else:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._stops.append((self._stopped_at, time.perf_counter()))
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._stopped_at = time.perf_counter()
            os.killpg(self._process.pid, signal.SIGSTOP)
            return False
        if code:
            raise subprocess.CalledProcessError(code, self._command)
        return True

    def figures(self) -> dict[str, Any]:
        """What it printed last, the time it was stopped taken out of every span."""
        self._output.seek(0)
        found: dict[str, Any] = json.loads(self._output.read().splitlines()[-1])
        for each in (found, *found.get("rounds", ())):
            for name, (began, ended) in each.pop("spans", {}).items():
                each[name] = ended - began - self._stopped_within(began, ended)
        return found

    def _stopped_within(self, began: float, ended: float) -> float:
        return sum(max(0.0, min(ended, until) - max(began, since)) for since, until in self._stops)

    def end(self) -> None:
        """Leave nothing behind, also after an error."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()


def run_interleaved(commands: Sequence[Sequence[str]], *, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """The JSON objects that these commands print, each in the place of its command.

    ``spans`` in them, {name: [began, ended]} by ``time.perf_counter`` (on Linux one clock for all processes), become seconds
    under their names.

    Raises
    ------
    CalledProcessError
        One of them failed; the others are killed.
    """
    all_of_them = [_Stoppable(command) for command in commands]
    waiting = list(all_of_them)
    shuffle = random.Random(0).shuffle
    try:
        while waiting:
            shuffle(waiting)  # what else happens periodically must not always meet the same one
            waiting = [each for each in waiting if not each.take(seconds if len(waiting) > 1 else None)]
        return [each.figures() for each in all_of_them]
    finally:
        for each in all_of_them:
            each.end()
