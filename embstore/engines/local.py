"""The engine of one process: one worker, tasks in the order given, the next one begun while the present one is written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence

from embstore.core.events import Observer
from embstore.core.interfaces import Check, Job, Needs, Result, Task


class LocalEngine:
    """As ``core.engine.Engine``."""

    is_remote = False
    traffic_bytes = 0

    def num_workers(self, needs: Needs) -> int:
        """As ``core.engine.Engine``."""
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
        """As ``core.engine.Engine``; nothing is retried: what fails here fails again."""
        if not tasks:
            return
        with contextlib.closing(job.start(0)) as worker:
            for task, following in itertools.zip_longest(tasks, tasks[1:]):
                if is_stopping():
                    return
                yield task, worker.run(task, following=following, check=check)

    def close(self) -> None:
        """Nothing was started."""
