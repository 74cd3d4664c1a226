"""What a build tells its observers. The library never prints: the command line turns these into lines and bars.

``RowsCommitted`` is only sent after the window's journal line is durable, so progress never shows work a crash would lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["prompts", "model", "embed", "knn", "audit", "rerank", "publish"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage begins; ``total`` counts ``unit`` items, ``done`` of them were committed by earlier runs."""

    stage: Stage
    total: int
    done: int = 0
    unit: str = "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageAdvanced:
    """``count`` more items of a stage are finished (for the embedding stage: see RowsCommitted)."""

    stage: Stage
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsCommitted:
    """One window is durable: rows ``start <= row < stop``, its stored bytes, tokens and seconds since the last commit.

    ``num_reused`` of the rows were copied from another store.
    """

    start: int
    stop: int
    num_tokens: int
    stored_bytes: int
    seconds: float
    num_reused: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished:
    """A stage ended after ``seconds`` of this run."""

    stage: Stage
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """What the build is about to do and cost, known before the first row is computed.

    Of ``remaining_rows``, ``reused_rows`` are copied from other stores; ``dropped_rows`` of them are no prompts here.
    """

    num_rows: int
    remaining_rows: int
    quarantined_lines: int
    truncated_share: float
    dimension: int
    head: str
    dtype: str
    device: str
    remaining_bytes: int
    free_bytes: int
    embed_memory_bytes: int
    memory_budget_bytes: int
    knn: str
    num_shards: int
    seconds: float
    reused_rows: int = 0
    dropped_rows: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something a person should know: a warning with what was seen and what follows."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersChanged:
    """Workers of an engine that are ready, of those wanted; ``retries`` of tasks and ``lost`` workers are of this stage."""

    alive: int
    wanted: int
    retries: int
    lost: int


Event = StageStarted | StageAdvanced | RowsCommitted | StageFinished | Preflight | Notice | WorkersChanged
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer of a caller that wants no progress."""
