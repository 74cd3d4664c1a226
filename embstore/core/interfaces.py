"""The protocols between layers: what the flow asks of models, of given arrays, of engines, and of kept blocks.

``Embedder`` and ``EmbedderSource`` turn prompts into rows (the torch embedder and the test double both fit). ``Engine`` runs
tasks, in this process, on several GPUs, or on a cluster: a *job* says what is to be done and starts *workers*; a worker has
what is expensive (a loaded model, a mapped array) and gets one *task* after the other: windows of rows, shards, blocks of
nodes. Results arrive in the order in which tasks finish; the caller of ``map`` restores the order. Jobs, tasks and results
travel between processes where an engine has several: they are small and can be pickled, and large arrays go by files
that every worker sees. ``BlockStore`` keeps what a long search has finished; with or without it, the result is the same.

Shapes: B rows of a block, V vocabulary columns, R coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.events import Observer
from embstore.core.prompts import Prompt
from embstore.core.records import FailedRow
from embstore.core.spec import EmbeddingSpec, ModelIdentity

# Called between batches; raises to abandon the window in flight (a second Ctrl-C).
Check = Callable[[], None]


def no_check() -> None:
    """The ``Check`` of a caller that abandons nothing, or whose signals raise by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Finished rows of one chunk, in row order.

    ``emb_BV`` float16, unit L2 norm before rounding; ``coord_BR`` float32; ``residual_B`` float32, the distance from a
    stored row to its coordinates. A failed row is NaN in all three and named in ``failed`` (global row numbers). Its memory
    is the taker's until ``release`` is called: it is read after the next block was asked for, so an embedder that uses it
    again earlier is refused.
    """

    emb_BV: NDArray[np.float16]
    coord_BR: NDArray[np.float32]
    residual_B: NDArray[np.float32]
    failed: tuple[FailedRow, ...] = ()
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowCounts:
    """What a window cost: pooled tokens, prompts cut at max_tokens, batches split for lack of device memory."""

    tokens: int
    truncated: int
    splits: int


class Embedder(Protocol):
    """A model that is loaded and resolved: its rows are a pure function of prompts, row numbers and ``spec``."""

    @property
    def spec(self) -> EmbeddingSpec:
        """The resolved settings; equal specs give equal bytes on the same machine and software."""

    @property
    def max_window_rows(self) -> int:
        """Rows of one window that the embedder can hold and that take it a minute or less."""

    @property
    def truncated_share(self) -> float:
        """Share of sampled prompts longer than max_tokens, for the preflight."""

    @property
    def seconds_per_row(self) -> float:
        """Measured on a few sampled prompts, for the preflight's estimate only."""

    @property
    def basis_VR(self) -> NDArray[np.float32]:
        """Orthonormal basis of the coordinates, float32 [V, R]."""

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of anonymous memory one window takes above the loaded model."""

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        first_row: int,
        chunk_rows: int,
        check: Check,
        following: Sequence[Prompt] = (),
    ) -> Iterator[RowBlock]:
        """Rows of one window, chunk by chunk; ``counts`` are valid once the iterator is exhausted.

        ``following`` are the prompts that will be asked for next, as the same object: they may be begun in the background.
        An error of theirs is raised when they are asked for.
        """

    def close(self) -> None:
        """Abandon whatever was begun in the background."""

    @property
    def counts(self) -> WindowCounts:
        """Counts of the last window."""


class GivenRows(Protocol):
    """Rows that exist already: an array [N, D] of floats, of which some are in memory at a time."""

    @property
    def name(self) -> str:
        """For people: the file's own name, no path."""

    @property
    def num_rows(self) -> int:
        """N."""

    @property
    def dimension(self) -> int:
        """D."""

    @property
    def dtype(self) -> str:
        """One of float16, float32 and float64."""

    @property
    def held_bytes(self) -> int:
        """Anonymous memory that reading takes, besides what is returned."""

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``; may be a view of mapped memory."""

    def fingerprint(self) -> str:
        """Sha256 of shape, dtype and every value; price: one read of all."""


class PromptReader(Protocol):
    """Random access to the canonical prompts."""

    def __len__(self) -> int:
        """N."""

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""


class EmbedderSource(Protocol):
    """A model that is located and identified but not loaded: a resume that needs no row never loads it."""

    def identity(self) -> ModelIdentity:
        """Digests of weights, configuration and tokenizer."""

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> Embedder:
        """Load, probe on a seeded sample of ``prompts``, and resolve every open setting; ``work`` is scratch space."""

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32]) -> Embedder:
        """Load with stored settings, without probing."""

    def take_over(
        self, prompts: PromptReader, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], *, memory_bytes: int
    ) -> Embedder:
        """Load with another store's settings for a new store: only what its plan needs is probed, on a seeded sample."""

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """Device, capability and threads this run would use, under their names in EmbeddingSpec."""


# --- engines: who runs tasks ------------------------------------------------------------------------------------------

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


# --- blocks that a long search keeps between runs -----------------------------------------------------------------------

Arrays = Mapping[str, NDArray[np.generic]]


class BlockStore(Protocol):
    """Keeps blocks for the next run; a damaged or missing one is None, never wrong."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under ``name``."""

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under ``name``, in place of what was there."""


class NothingKept:
    """For searches that take seconds."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """As ``BlockStore``."""
        return None

    def save(self, name: str, arrays: Arrays) -> None:
        """As ``BlockStore``."""
