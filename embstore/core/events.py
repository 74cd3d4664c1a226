"""Events that a build sends to its observer. The library never prints; the command line turns events into lines and bars.

``RowsCommitted`` is sent after the window's journal line is durable, so progress never shows work that a crash would lose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from embstore.core.config import Turns

# What comes before the first row, in its order; ``Preflight.stage_seconds`` says what each took.
Preparation = Literal[
    "imports",  # torch and transformers
    "fetch",  # a model of the hub, from its cache or by a download
    "prompts",  # stage 0 of a new store: lines are read
    "rows",  # and distinct ones named and written
    "check",  # on a resume: stage 0 is read back, and the given prompts are compared with it
    "hash",  # the model's files, for its identity
    "reuse",  # prompts are looked up in the stores of --reuse
    "templates",  # every chat is rendered once, to find those that the model's template refuses
    "load",
    "probe",  # what head is this, and how long are the prompts?
    "basis",  # the axes of the coordinates
    "dtype",  # are rows in 16 bits good enough?
    "pilot",  # a few rows are timed
    "readback",  # on a resume: committed windows are read back
]
Stage = Literal[Preparation, "embed", "knn", "audit", "rerank", "publish", "verify"]
PREPARATIONS: tuple[Preparation, ...] = get_args(Preparation)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage begins; it has ``total`` items (None: unknown) called ``unit``, of which earlier runs committed ``done``."""

    stage: Stage
    total: int | None
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
    prompts are not in this pool. ``device`` is the one that computes, with its index. ``seconds`` is the estimate for the
    remaining rows; ``answered_lines`` counts chats that end in an assistant turn, which ``turns`` all embeds as well and
    prompt leaves out; ``stage_seconds`` says what the stages before them took in this run, and has "embed", the same
    estimate, and "knn" where the search is exact and on this machine's CPU.
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
    answered_lines: int = 0
    turns: Turns = "all"
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """A note for a person, or a warning: what was observed and what follows from it."""

    message: str
    is_warning: bool = False


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


@contextlib.contextmanager
def stage(
    observer: Observer, name: Stage, total: int | None = None, unit: str = "", *, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Tell an observer of a stage while it runs; a stage that fails is never finished.

    Yields
    ------
    Callable
        To be called with the number of items that are done since the last call.
    """
    started = time.perf_counter()
    observer(StageStarted(stage=name, total=total, done=done, unit=unit))
    yield lambda count: observer(StageAdvanced(stage=name, count=count))
    observer(StageFinished(stage=name, seconds=time.perf_counter() - started))
