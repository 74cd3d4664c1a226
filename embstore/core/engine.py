"""What a build asks of whatever runs its tasks: in this process, on several GPUs, or on a cluster.

A *job* says what is to be done and starts *workers*; a worker holds what is dear (a loaded model, a mapped array) and is
given one *task* after the other: windows of rows, shards, blocks of nodes. Results come in whatever order tasks finish; who
maps puts them in order. Jobs, tasks and results travel between processes where an engine has several: they are small and
can be pickled, and large arrays go by files that every worker sees.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, Protocol, TypeVar

from embstore.core.embedder import Check
from embstore.core.events import Observer

Task = TypeVar("Task")
Result = TypeVar("Result")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

# What a worker takes for itself: a device and the threads pinned in the spec, or one core.
Needs = Literal["device", "core"]


class Worker(Protocol[Task_contra, Result_co]):
    """Runs one task at a time."""

    def run(self, task: Task_contra, *, following: Task_contra | None, check: Check) -> Result_co:
        """The result of a task; ``following`` is probably the next one, and may be begun in the background."""

    def close(self) -> None:
        """Nothing goes on in the background when this returns."""


class Job(Protocol[Task_contra, Result_co]):
    """What is to be done; one job is started on every worker."""

    @property
    def needs(self) -> Needs:
        """What each worker takes."""

    def start(self, number: int) -> Worker[Task_contra, Result_co]:
        """A worker. ``number`` is its own: no other of this job has it, nor one that takes the place of a lost one."""

    def name(self, task: Task_contra) -> str:
        """A task for a message: what it is, which rows, which prompts."""

    def lost(self, number: int) -> None:
        """Called where the job was made: this worker was given up, and nothing that it may still write counts."""


class Engine(Protocol):
    """Maps tasks over workers."""

    @property
    def is_remote(self) -> bool:
        """Whether workers are other processes, so that jobs must travel."""

    @property
    def traffic_bytes(self) -> int:
        """Bytes of tasks and results that passed between this process and workers."""

    def num_workers(self, needs: Needs) -> int:
        """How many workers there would be for enough tasks."""

    def map(
        self,
        job: Job[Task, Result],
        tasks: Sequence[Task],
        *,
        check: Check,
        is_stopping: Callable[[], bool],
        observer: Observer,
    ) -> Generator[tuple[Task, Result]]:
        """Run every task, and give each once, as it finishes.

        Closing the iterator abandons what is under way. ``check`` is called every second or so and raises to abandon all;
        once ``is_stopping`` says so no further task is begun, and the iterator ends when those under way have finished.

        Raises
        ------
        EngineError
            A task failed on every try, no worker can start, or one does not see the store.
        EmbstoreError
            As a task raised it.
        """

    def close(self) -> None:
        """End what the engine started."""
