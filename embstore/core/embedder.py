"""What the pipeline asks of whatever turns prompts into rows. The torch embedder and the test double both fit here.

Shapes: B rows of a block, V vocabulary columns, R coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.events import Observer
from embstore.core.prompts import Prompt
from embstore.core.records import FailedRow
from embstore.core.spec import EmbeddingSpec, ModelIdentity

# Called between batches; raises to abandon the window in flight (a second Ctrl-C).
Check = Callable[[], None]


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
