"""Events that a build sends to its observer. The library never prints; the command line turns events into lines and bars.

``RowsCommitted`` is sent after the window's journal line is durable, so progress never shows work that a crash would lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["prompts", "model", "embed", "knn", "audit", "rerank", "publish"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage begins; it has ``total`` items called ``unit``, of which earlier runs committed ``done``."""

    stage: Stage
    total: int
    done: int = 0
    unit: str = "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageAdvanced:
    """``count`` more items of a stage are finished (the embedding stage sends RowsCommitted instead)."""

    stage: Stage
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsCommitted:
    """One window is durable: rows ``start <= row < stop``, its tokens and stored bytes, and seconds since the last commit.

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
    """A stage has ended; it took ``seconds`` in this run."""

    stage: Stage
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """The plan of a build and its estimated cost, before the first row is computed.

    Of ``remaining_rows``, ``reused_rows`` are copied from other stores; ``dropped_rows`` counts rows of those stores whose
    prompts are not in this pool.
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
    """A warning or note for a person: what was observed and what follows from it."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersChanged:
    """How many of the wanted workers are ready, and how many ``retries`` of tasks and ``lost`` workers this stage had."""

    alive: int
    wanted: int
    retries: int
    lost: int


Event = StageStarted | StageAdvanced | RowsCommitted | StageFinished | Preflight | Notice | WorkersChanged
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Observe nothing: the default observer."""
