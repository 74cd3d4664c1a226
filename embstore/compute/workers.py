"""Threads that each run torch with its own share of the cores.

One batch a thread beats all threads on one batch: nobody waits at the end of every small operation, and a worker with one
core gives the same bits on any number of workers (docs/decisions/0012).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

# Activations of all batches in flight; above it fewer workers share the cores. A constant, because bits depend on the split.
_MAX_ACTIVATION_BYTES = 512 << 20


def workers_for(threads: int, activation_bytes: int) -> int:
    """How many batches are computed at once: one a thread while their activations stay below 512 MiB in all."""
    return max(1, min(threads, _MAX_ACTIVATION_BYTES // max(1, activation_bytes)))


class Workers:
    """``num_workers`` threads with ``threads // num_workers`` torch threads each, started when first used."""

    def __init__(self, threads: int, num_workers: int) -> None:
        self.num_workers = num_workers
        share = max(1, threads // num_workers)
        # torch's thread count belongs to the thread that sets it
        self._executor = ThreadPoolExecutor(
            num_workers, thread_name_prefix="embstore", initializer=torch.set_num_threads, initargs=(share,)
        )

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run ``job`` under inference mode on some worker; jobs start in the order given."""
        return self._executor.submit(_inferring, job)

    def for_each(self, items: Iterable[T], work: Callable[[T], None]) -> None:
        """``work(item)`` on every item, each worker taking the next when it is free; returns when all are done.

        Items are drawn one at a time, so a lazy iterable is never held whole. The first error ends it and is raised.
        """
        remaining, lock = iter(items), threading.Lock()
        has_failed = threading.Event()

        def draw() -> None:
            try:
                while not has_failed.is_set():
                    with lock:
                        item = next(remaining, None)
                    if item is None:
                        return
                    work(item)
            except BaseException:
                has_failed.set()
                raise

        jobs = [self.submit(draw) for _ in range(self.num_workers)]
        wait(jobs)
        for job in jobs:
            job.result()


def _inferring(job: Callable[[], None]) -> None:
    with torch.inference_mode():  # a mode of the thread, not of the process
        job()
