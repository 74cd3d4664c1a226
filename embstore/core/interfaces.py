"""The protocols between layers: embedders, imported arrays, engines, and stored blocks of a search.

``Embedder`` and ``EmbedderSource`` turn prompts into rows (the torch embedder and the test double implement them). An engine
runs tasks in this process, on several GPUs, or on a cluster. A *job* describes the work and starts *workers*. A worker owns
what is expensive (a loaded model, a mapped array) and runs one *task* at a time: a window of rows, a shard, or a block of
nodes. Results arrive in the order in which tasks finish; the caller of ``map`` restores the order. With several processes,
jobs, tasks and results are pickled, so they must be small; large arrays are passed as files that every worker can read.
``BlockStore`` saves finished parts of a long search; the result is the same without it.

Shapes: B rows of a block, V vocabulary columns, R coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.events import Observer, ignore
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
    stored row to its coordinates. A failed row is NaN in all three and named in ``failed`` (global row numbers).
    ``sequence_B`` uint64 is a digest of the tokens that a row was made from, 0 where it is unknown; None is 0 for all. The
    caller owns the memory until it calls ``release``: it reads a block after requesting the next one, so an embedder must
    not reuse the memory before.
    """

    emb_BV: NDArray[np.float16]
    coord_BR: NDArray[np.float32]
    residual_B: NDArray[np.float32]
    sequence_B: NDArray[np.uint64] | None = None
    failed: tuple[FailedRow, ...] = ()
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowCounts:
    """Counts of a window: pooled tokens, prompts truncated at max_tokens, batches split for lack of device memory."""

    tokens: int
    truncated: int
    splits: int


class Embedder(Protocol):
    """A loaded model with resolved settings: its rows are a pure function of prompts, row numbers and ``spec``."""

    @property
    def spec(self) -> EmbeddingSpec:
        """The resolved settings; equal specs give equal bytes on the same machine and software."""

    @property
    def max_window_rows(self) -> int:
        """Most rows of one window: they fit the embedder's memory and take a minute or less."""

    @property
    def truncated_share(self) -> float:
        """Share of sampled prompts longer than max_tokens, for the preflight."""

    @property
    def seconds_per_row(self) -> float:
        """Seconds per row, measured on a few sampled prompts for the preflight's estimate."""

    @property
    def basis_VR(self) -> NDArray[np.float32]:
        """What the store keeps in ``format.basis_file``: an orthonormal basis float32 [V, R], or a coordinate map [M, R]."""

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of the anonymous memory that one window takes above the loaded model."""

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        first_row: int,
        chunk_rows: int,
        check: Check,
        following: Iterable[Sequence[Prompt]] = (),
    ) -> Iterator[RowBlock]:
        """Rows of one window, chunk by chunk; ``counts`` are valid once the iterator is exhausted.

        ``following`` gives the prompts objects that the next calls will pass, in their order: the embedder takes as many as
        it wants to start on in the background. If that work fails, the error is raised by the call for those prompts, or by
        that for an earlier window which is computed together with them.
        """

    def close(self) -> None:
        """Abandon all background work."""

    @property
    def counts(self) -> WindowCounts:
        """Counts of the last window."""


class GivenRows(Protocol):
    """Rows that exist already: a float array [N, D] that is read in parts."""

    @property
    def name(self) -> str:
        """The file's name without its path, for messages."""

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
        """Anonymous memory that reading takes in addition to the returned array."""

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``; may be a view of mapped memory."""

    def fingerprint(self) -> str:
        """Sha256 of shape, dtype and every value; reads the whole array."""


class PromptReader(Protocol):
    """Random access to the canonical prompts."""

    def __len__(self) -> int:
        """N."""

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""


class ChatTemplate(Protocol):
    """How a model renders a chat, without its weights."""

    @property
    def digest(self) -> str:
        """Sha256 of what decides the text of a chat."""

    def refusal(self, prompt: Prompt) -> str | None:
        """The reason for which a chat has no text, bounded in length; None if it has one."""


class EmbedderSource(Protocol):
    """A model that is located and identified but not loaded: a resume that computes no rows never loads it."""

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        """Digests of weights, configuration and tokenizer; files are read once a run and host."""

    def template(self, chat_date: str | None) -> ChatTemplate | None:
        """The chat template, for which it is ``chat_date``; None if the model has none. Loads the tokenizer."""

    def device(self, name: str) -> str:
        """The device of this name (or ``auto``) as this process sees it, with its index: cpu or cuda:N."""

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path | None, observer: Observer
    ) -> Embedder:
        """Load, probe on a seeded sample of ``prompts``, and resolve every open setting; ``work`` is scratch space.

        None in its place is a dry run: nothing is written, and a basis that needs a sample of rows is not made. Its rank is
        the largest possible then.
        """

    def reopen(
        self,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int = 0,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> Embedder:
        """Load with stored settings and the array of ``Embedder.basis_VR``, on ``device``.

        None is this process's own device of the kind in the spec. ``memory_bytes`` is what windows that are computed
        together may take.
        """

    def take_over(
        self,
        prompts: PromptReader,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> Embedder:
        """Load with another store's settings for a new store; probe only what the plan needs, on a seeded sample."""

    def reads_clock(self) -> bool:
        """Whether the chat template asks for the current time, so that rows depend on the date that a store records."""

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """Device kind, capability, packing, threads and versions of this run, under their names in EmbeddingSpec."""


# --- engines ----------------------------------------------------------------------------------------------------------

Task = TypeVar("Task")
Result = TypeVar("Result")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

# What a worker occupies: a device and the threads pinned in the spec, or one core.
Needs = Literal["device", "core"]


class Worker(Protocol[Task_contra, Result_co]):
    """Runs one task at a time."""

    def run(self, task: Task_contra, *, following: Task_contra | None, check: Check) -> Result_co:
        """The result of a task; ``following`` is probably the next one: the worker may start on it in the background."""

    def close(self) -> None:
        """Stop; no background work is left when this returns."""


class Job(Protocol[Task_contra, Result_co]):
    """The work; every worker starts the same job."""

    @property
    def needs(self) -> Needs:
        """What each worker occupies."""

    def start(self, number: int) -> Worker[Task_contra, Result_co]:
        """A worker. ``number`` is unique within this job, also when a worker replaces a lost one."""

    def name(self, task: Task_contra) -> str:
        """A description of a task for messages: its kind, rows and prompts."""

    def lost(self, number: int) -> None:
        """Called in the driver when a worker is given up: whatever it still writes must be ignored."""


class Engine(Protocol):
    """Maps tasks over workers."""

    @property
    def is_remote(self) -> bool:
        """Whether workers are other processes, to which jobs are sent."""

    @property
    def traffic_bytes(self) -> int:
        """Bytes of tasks and results that passed between this process and workers."""

    def num_workers(self, needs: Needs) -> int:
        """Most workers that would run at the same time."""

    def map(
        self,
        job: Job[Task, Result],
        tasks: Sequence[Task],
        *,
        check: Check,
        is_stopping: Callable[[], bool],
        observer: Observer,
    ) -> Generator[tuple[Task, Result]]:
        """Run every task and yield each with its result, once, in the order in which they finish.

        Closing the iterator abandons running tasks. ``check`` is called about once a second and raises to abandon all.
        When ``is_stopping`` returns True no further task starts, and the iterator ends after the running ones.

        Raises
        ------
        EngineError
            A task failed on every attempt, no worker can start, or a worker does not see the store.
        EmbstoreError
            Raised by a task.
        """

    def close(self) -> None:
        """End everything that the engine started."""


# --- blocks that a long search saves between runs -----------------------------------------------------------------------

Arrays = Mapping[str, NDArray[np.generic]]


class BlockStore(Protocol):
    """Saves blocks for the next run."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays saved under ``name``; None if they are missing or damaged."""

    def save(self, name: str, arrays: Arrays) -> None:
        """Save arrays under ``name``, replacing earlier ones."""


class NothingKept:
    """A ``BlockStore`` that saves nothing, for searches that take seconds."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """None."""
        return None

    def save(self, name: str, arrays: Arrays) -> None:
        """Do nothing."""
