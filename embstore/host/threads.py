"""Threads that each run torch with its own share of the cores, the most urgent job first.

One batch a thread is faster than all threads on one batch, because no thread waits at the end of every small operation; and
a worker with one core gives the same bits on any number of workers (docs/decisions/0012). Urgency keeps the disk fed: rows
of the window that is being written are finished before batches of the next one go on.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

# Of all batches in flight; above it fewer workers share the cores. A constant, because bits depend on the split.
_MAX_ACTIVATION_BYTES = 512 << 20

Urgency = tuple[int, ...]  # smaller is sooner; jobs of one urgency start in the order given
_Waiting = tuple[Urgency, int, Callable[[], None], Future[None]]


def num_cores() -> int:
    """Cores this process may use: the affinity mask, not the machine's count."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count()  # also keeps jobs themselves from being compared

    def submit(self, job: Callable[[], None], urgency: Urgency = ()) -> Future[None]:
        """Run ``job`` under inference mode on the next free worker that finds nothing more urgent."""
        done: Future[None] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), job, done))
        self._executor.submit(self._run_most_urgent)  # as many calls as jobs: each takes one, whichever it is then
        return done

    def _run_most_urgent(self) -> None:
        with self._lock:
            _, _, job, done = heapq.heappop(self._waiting)
        if not done.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode():  # a mode of the thread, not of the process
                job()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            done.set_exception(error)
        else:
            done.set_result(None)


def finish_all(jobs: Iterable[Future[None]]) -> None:
    """Wait for all jobs. On the first error, cancel those that have not started, wait for the rest, then raise it."""
    jobs = list(jobs)
    _, remaining = wait(jobs, return_when=FIRST_EXCEPTION)
    if remaining:
        abandon(remaining)
    for job in jobs:
        if not job.cancelled():
            job.result()


def abandon(jobs: Iterable[Future[None]]) -> None:
    """Cancel jobs and wait for those that have started, so that none goes on in the background."""
    wait([job for job in jobs if not job.cancel()])
