"""Threads that each run torch on a share of the cores, the most urgent job first.

One batch per thread is faster than all threads on one batch, because threads do not wait for each other after every small
operation; and a worker with one core computes the same bits whatever the number of workers (docs/decisions/0012). Urgency
keeps the disk busy: rows of the window that is being written are finished before batches of the next window.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

# Limit for the activations of all batches in flight; above it, fewer workers share the cores. It is a constant because the
# rounding of rows depends on the split.
_MAX_ACTIVATION_BYTES = 512 << 20

Urgency = tuple[int, ...]  # smaller is sooner; jobs of one urgency start in the order given
_Waiting = tuple[Urgency, int, Callable[[], None], Future[None]]


def num_cores() -> int:
    """Number of cores this process may use, from the affinity mask where the system has one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def workers_for(threads: int, activation_bytes: int) -> int:
    """How many batches to compute at the same time: one per thread while all activations together stay below 512 MiB."""
    return max(1, min(threads, _MAX_ACTIVATION_BYTES // max(1, activation_bytes)))


class Workers:
    """``num_workers`` threads with ``threads // num_workers`` torch threads each, started on first use.

    ``device``: the one they compute on, which becomes their current one if it is a GPU.
    """

    def __init__(self, threads: int, num_workers: int, device: torch.device | None = None) -> None:
        self.num_workers = num_workers
        share = max(1, threads // num_workers)
        self._executor = ThreadPoolExecutor(
            num_workers, thread_name_prefix="embstore", initializer=start_thread, initargs=(share, device)
        )
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count()  # also keeps jobs themselves from being compared

    def submit(self, job: Callable[[], None], urgency: Urgency = ()) -> Future[None]:
        """Run ``job`` in inference mode on the next free worker, after all more urgent jobs."""
        done: Future[None] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), job, done))
        self._executor.submit(self._run_most_urgent)  # one call per job, but each takes the job that is then most urgent
        return done

    def _run_most_urgent(self) -> None:
        with self._lock:
            _, _, job, done = heapq.heappop(self._waiting)
        if not done.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode():  # a mode of the thread, not of the process
                job()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            done.set_exception(error)
        else:
            done.set_result(None)


def start_thread(num_threads: int, device: torch.device | None) -> None:
    """Torch's thread count and its current GPU belong to the thread that sets them; a new thread's GPU is number 0."""
    torch.set_num_threads(num_threads)
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


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
    """Cancel jobs, and wait for those that have started; no background work is left."""
    wait([job for job in jobs if not job.cancel()])
