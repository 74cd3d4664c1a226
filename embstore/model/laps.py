"""A lap: all batches of some windows pass each unit of weights together, so the weights are read once a lap.

Every batch runs its class's own forward in a greenlet, which waits at the gates of the units: handing over costs a
microsecond, and the number of threads does not grow with the number of batches. A batch belongs to one thread for the whole
lap, because a greenlet cannot move.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import greenlet
from torch import nn

from embstore.core.interfaces import Check
from embstore.model.residency import Residency
from embstore.model.units import Unit

Job = Callable[[], None]  # one batch: calls the backbone
_Task = tuple[greenlet.greenlet, Job]  # a batch that has begun


class Lap:
    """Jobs on their way through the units of a backbone."""

    def __init__(self, residency: Residency, check: Check) -> None:
        self._residency, self._check = residency, check
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Every thread of this lap ends soon; batches that wait are thrown out of their forwards."""
        self._is_cancelled.set()

    def share(self, jobs: Sequence[tuple[Job, int]], num_threads: int) -> list[Job]:
        """Jobs with their costs dealt to threads: call each result in a separate thread."""
        hands: list[list[Job]] = [[] for _ in range(max(1, min(num_threads, len(jobs))))]
        loads = [0] * len(hands)
        for job, cost in sorted(jobs, key=lambda each: -each[1]):
            least = loads.index(min(loads))
            hands[least].append(job)
            loads[least] += cost
        return [functools.partial(self._run, hand) for hand in hands]

    def _run(self, jobs: Sequence[Job]) -> None:
        """All jobs of this thread; the first error of one cancels the lap."""
        self._residency.begin(jobs)
        fresh = list(reversed(jobs))
        waiting: dict[Unit, list[_Task]] = defaultdict(list)
        try:
            while fresh or waiting:
                self._check()
                if self._is_cancelled.is_set():
                    return
                # every batch begins before any passes a unit twice: the first unit can go once all have arrived
                task = (self._started(fresh[-1]), fresh.pop()) if fresh else self._next(waiting)
                if task is not None:
                    self._resume(task, waiting)
        except BaseException:
            self.cancel()
            raise
        finally:
            for batch, _ in [task for tasks in waiting.values() for task in tasks]:
                with contextlib.suppress(Exception):  # what a class raises while it is thrown out
                    batch.throw()  # GreenletExit, at the gate
            for job in jobs:
                self._residency.leave(job)

    def _started(self, job: Job) -> greenlet.greenlet:
        batch = greenlet.greenlet(job)
        batch.gr_context = contextvars.copy_context()
        return batch

    def _next(self, waiting: dict[Unit, list[_Task]]) -> _Task | None:
        """A batch that waits at an open unit, the oldest one first; None after half a second without."""
        for unit in self._residency.opened:
            if unit in waiting and self._residency.enter(unit):
                task = waiting[unit].pop()
                if not waiting[unit]:
                    del waiting[unit]
                return task
        self._residency.wait(waiting)
        return None

    def _resume(self, task: _Task, waiting: dict[Unit, list[_Task]]) -> None:
        """Run a batch until it calls the next gate, or ends."""
        batch, job = task
        try:
            unit = batch.switch()
        except BaseException:
            self._residency.leave(job)
            raise
        if batch.dead:
            self._residency.leave(job)
        else:
            waiting[unit].append(task)
            self._residency.arrive(job, unit)


def add_gates(units: Sequence[Unit]) -> Iterator[Callable[[], None]]:
    """Make every call of a unit's gate wait for its weights; yields what takes each gate away again."""
    for unit in units:
        for module in unit.gates:
            yield module.register_forward_pre_hook(_gate(unit)).remove


def _gate(unit: Unit) -> Callable[[nn.Module, object], None]:
    def wait(module: nn.Module, arguments: object) -> None:
        thread = greenlet.getcurrent().parent
        if thread is None:
            raise AssertionError(f"{unit.name} was called outside a lap, and its weights are not in memory")
        thread.switch(unit)

    return wait
