"""Hand out tasks to worker processes: each gets one task at a time, lost workers are replaced, and every wait has a limit.

A worker that died or raised is given up and replaced. Its task is retried on another worker, up to ``_MAX_ATTEMPTS`` times
in all: a bad machine does not end the build, and a bad task is not repeated forever. A task runs on one worker at a time,
and its result is yielded once. If no worker starts within ``start_seconds``, the build stops with an error that names the
resources each worker needs.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from embstore.core.config import EngineConfig
from embstore.core.errors import EmbstoreError, EngineError, StorageError
from embstore.core.events import Notice, Observer, WorkersChanged
from embstore.core.interfaces import Check, Job, Needs, Result, Task

RESUME = "then run the same command with --resume: committed rows are kept"

_MAX_ATTEMPTS = 3
_POLL_SECONDS = 0.5
_SILENT_SECONDS = 300.0


class Pool(Protocol):
    """Starts worker processes, calls them and ends them. Actors and pending calls (questions) are types of the pool.

    An answer is a pickled tuple: ``("hello", node, version, token found)``, then ``("done", result)``, ``("refused", name of
    the EmbstoreError, message, hint)`` or ``("failed", name of the error, message)``.
    """

    traffic_bytes: int

    def num_workers(self, needs: Needs) -> int:
        """Most workers that would run at the same time."""

    def wants(self, needs: Needs) -> str:
        """The resources a worker needs and those that are free, for messages."""

    def hire(self, needs: Needs, slot: int) -> tuple[int, Any, Any]:
        """Request a worker: its number, the actor, and the pending greeting. Slots run from 0 to the workers wanted - 1."""

    def refuse_stranger(self, node: str, version: str | None, found: str | None) -> None:
        """Raise EngineError if the worker's greeting shows another embstore version or another store."""

    def pack(self, value: object) -> bytes:
        """Serialise a job, or a task with the one that follows."""

    def begin(self, actor: Any, job: bytes, number: int) -> Any:  # noqa: ANN401 - the pool's own
        """Start a job on a worker; the returned question is answered when the worker is ready."""

    def run(self, actor: Any, tasks: bytes) -> Any:  # noqa: ANN401 - the pool's own
        """Run a task on a worker; the returned question is answered with its result."""

    def answers(self, questions: Sequence[Any], seconds: float) -> list[tuple[Any, bytes | EngineError]]:
        """Answered questions, or none after ``seconds``; the answer is an error if the worker is dead or unreachable."""

    def kill(self, actor: Any) -> None:  # noqa: ANN401 - the pool's own
        """End a worker in any state."""


@dataclass(slots=True)
class _Todo(Generic[Task]):
    task: Task
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Hand(Generic[Task]):
    """A worker as the driver sees it: ``todo`` is its running task, ``reserved`` the announced next one."""

    number: int
    slot: int  # 0 to the workers wanted - 1; selects the device if devices were given
    actor: Any
    node: str = "an unknown node"
    is_ready: bool = False
    todo: _Todo[Task] | None = None
    reserved: _Todo[Task] | None = None


class Dispatch(Generic[Task, Result]):
    """One call of ``map``: its tasks and its workers."""

    def __init__(
        self, pool: Pool, config: EngineConfig, job: Job[Task, Result], tasks: Sequence[Task], observer: Observer
    ) -> None:
        self._pool, self._config, self._job, self._observer = pool, config, job, observer
        self._packed = pool.pack(job)
        self._queue = deque(_Todo(task) for task in tasks)
        self._wanted = min(pool.num_workers(job.needs), len(tasks))
        self._hands: list[_Hand[Task]] = []
        self._pending: dict[Any, _Hand[Task]] = {}
        self._retries = self._lost = self._failed_starts = 0
        self._told = WorkersChanged(alive=0, wanted=0, retries=0, lost=0)
        self._ready_since = self._finished_since = time.monotonic()

    def results(self, check: Check, is_stopping: Callable[[], bool]) -> Generator[tuple[Task, Result]]:
        """Every task with its result, as ``Engine.map`` yields them."""
        while self._queue or any(hand.todo or hand.reserved for hand in self._hands):
            if is_stopping():
                self._queue.clear()
                for hand in self._hands:
                    hand.reserved = None
                if not any(hand.todo for hand in self._hands):
                    return
            for hand in self._hands:
                if hand.is_ready and hand.todo is None:
                    self._give(hand)  # tasks of lost workers
            self._hire()
            answered = self._pool.answers(list(self._pending), _POLL_SECONDS)
            check()
            for question, answer in answered:
                hand = self._pending.pop(question)
                if isinstance(answer, EngineError):
                    self._lose(hand, str(answer))
                    continue
                self._pool.traffic_bytes += len(answer)
                yield from self._take(hand, pickle.loads(answer))
            self._tell()
            self._refuse_to_wait()

    def close(self) -> None:
        """Give up all workers and their tasks."""
        for hand in self._hands:
            self._give_up(hand)
        self._hands.clear()

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _take(self, hand: _Hand[Task], answer: tuple[Any, ...]) -> Generator[tuple[Task, Result]]:
        """Process a worker's answer; a result is yielded after the worker has received its next task."""
        kind, *said = answer
        if kind == "hello":
            hand.node = said[0]
            self._pool.refuse_stranger(*said)
            self._ask(hand, self._pool.begin(hand.actor, self._packed, hand.number), len(self._packed))
        elif kind == "refused" and said[0] != StorageError.__name__:
            raise _as_raised(*said)
        elif kind != "done":
            self._lose(hand, f"{said[0]}: {said[1]}")
        elif (finished := hand.todo) is None:
            hand.is_ready, self._failed_starts = True, 0
            self._give(hand)
        else:
            hand.todo = None
            self._finished_since = time.monotonic()
            self._give(hand)
            yield finished.task, said[0]

    def _give(self, hand: _Hand[Task]) -> None:
        """Hand out the next task and announce the one that will probably follow."""
        lenders = [other for other in self._hands if other.reserved is not None]
        if hand.reserved is not None:
            hand.todo, hand.reserved = hand.reserved, None
        elif self._queue:
            hand.todo = self._queue.popleft()
        elif lenders:  # take it from a slower worker, which may have started on it in the background
            hand.todo, lenders[0].reserved = lenders[0].reserved, None
        if hand.todo is None:
            return
        if len(self._queue) >= self._wanted:  # near the end no worker reserves a task that another could start
            hand.reserved = self._queue.popleft()
        following = hand.reserved.task if hand.reserved is not None else None
        packed = self._pool.pack((hand.todo.task, following))
        self._ask(hand, self._pool.run(hand.actor, packed), len(packed))

    def _ask(self, hand: _Hand[Task], question: Any, sent_bytes: int) -> None:  # noqa: ANN401 - the pool's own
        self._pool.traffic_bytes += sent_bytes
        self._pending[question] = hand

    def _lose(self, hand: _Hand[Task], reason: str) -> None:
        """Give up a worker and requeue its task.

        Raises
        ------
        EngineError
            The task, or starting a worker, has failed ``_MAX_ATTEMPTS`` times.
        """
        self._hands.remove(hand)
        self._give_up(hand)
        self._lost += 1
        todo, reserved = hand.todo, hand.reserved
        if reserved is not None:
            self._queue.appendleft(reserved)
        if todo is not None:
            todo.attempts += 1
            self._retries += 1
            if todo.attempts >= _MAX_ATTEMPTS:
                raise EngineError(
                    f"{self._job.name(todo.task)} failed {todo.attempts} times, last on {hand.node}: {reason}",
                    hint=f"check that prompt and that machine, {RESUME}",
                )
            self._queue.appendleft(todo)
        elif not hand.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_ATTEMPTS:
                raise EngineError(
                    f"{self._failed_starts} workers in a row could not start, last on {hand.node}: {reason}",
                    hint=f"free memory for the model there or set a smaller --num-workers, {RESUME}",
                )

    # --- workers -----------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Request workers until there are as many as wanted, but not more than open tasks."""
        open_tasks = len(self._queue) + sum(bool(hand.todo) + bool(hand.reserved) for hand in self._hands)
        while len(self._hands) < min(self._wanted, open_tasks):
            slot = min(set(range(self._wanted)) - {hand.slot for hand in self._hands})
            number, actor, greeting = self._pool.hire(self._job.needs, slot)
            hand = _Hand[Task](number=number, slot=slot, actor=actor)
            self._hands.append(hand)
            self._pending[greeting] = hand

    def _give_up(self, hand: _Hand[Task]) -> None:
        self._pending = {question: other for question, other in self._pending.items() if other is not hand}
        self._pool.kill(hand.actor)
        self._job.lost(hand.number)

    def _tell(self) -> None:
        alive = sum(hand.is_ready for hand in self._hands)
        now = WorkersChanged(alive=alive, wanted=self._wanted, retries=self._retries, lost=self._lost)
        if now != self._told:
            self._told = now
            self._observer(now)

    def _refuse_to_wait(self) -> None:
        """Raise if no worker starts in time; report if no task finishes for a long time."""
        now = time.monotonic()
        if any(hand.is_ready for hand in self._hands):
            self._ready_since = now
        elif now - self._ready_since > self._config.start_seconds:
            raise EngineError(
                f"no worker could start within {self._config.start_seconds:g} s: each needs "
                f"{self._pool.wants(self._job.needs)}",
                hint=f"add or free machines, or reduce --gpus-per-worker or --threads, {RESUME}",
            )
        if now - self._finished_since > _SILENT_SECONDS:
            self._finished_since = now
            busy = [f"{self._job.name(hand.todo.task)} on {hand.node}" for hand in self._hands if hand.todo is not None]
            self._observer(Notice(message=f"no task has finished for {_SILENT_SECONDS:g} s; running: {'; '.join(busy)}"))


def _as_raised(name: str, message: str, hint: str | None) -> EmbstoreError:
    """The error that a worker raised, as an exception of the same class."""
    kinds = [EmbstoreError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.__name__ == name), EngineError)
    error = kind.__new__(kind)
    EmbstoreError.__init__(error, message, hint=hint)
    return error
