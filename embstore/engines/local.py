"""The engine of one process: one worker runs tasks in order and starts on the next one while the last one is written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence

from embstore.core.events import Observer
from embstore.core.interfaces import Check, Job, Needs, Result, Task


class LocalEngine:
    """An ``Engine`` in this process."""

    is_remote = False
    traffic_bytes = 0

    def num_workers(self, needs: Needs) -> int:
        """One."""
        return 1

    def map(
        self,
        job: Job[Task, Result],
        tasks: Sequence[Task],
        *,
        check: Check,
        is_stopping: Callable[[], bool],
        observer: Observer,
    ) -> Generator[tuple[Task, Result]]:
        """As ``Engine.map``, without retries: a task that fails in this process would fail again."""
        if not tasks:
            return
        with contextlib.closing(job.start(0)) as worker:
            for task, following in itertools.zip_longest(tasks, tasks[1:]):
                if is_stopping():
                    return
                yield task, worker.run(task, following=following, check=check)

    def close(self) -> None:
        """Do nothing: no worker outlives ``map``."""
