"""What a running build shows: stages, rates and the preflight, on a terminal or in a log, on stderr.

Progress counts committed rows only: it never shows work that a crash would lose.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from embstore.core.config import format_bytes
from embstore.core.events import (
    PREPARATIONS,
    Event,
    Notice,
    Preflight,
    RowsCommitted,
    StageAdvanced,
    StageFinished,
    StageStarted,
    WorkersChanged,
)
from embstore.host.memory import read_memory
from embstore.views.terminal import plain

_TITLES = {
    "imports": "loading torch and transformers",
    "prompts": "reading prompts",
    "rows": "writing prompts",
    "fetch": "fetching the model from the hub or its cache",
    "check": "comparing the prompts with the store's",
    "hash": "hashing the model's files",
    "reuse": "looking prompts up in the stores to reuse",
    "templates": "rendering chats",
    "load": "loading the model",
    "probe": "probing the model",
    "basis": "making coordinates",
    "dtype": "comparing dtypes",
    "pilot": "timing a few prompts",
    "readback": "reading committed rows back",
    "embed": "embedding",
    "knn": "neighbours",
    "audit": "audit",
    "rerank": "re-ranking",
    "publish": "publishing",
    "verify": "checking every byte",
}


class _Memory(ProgressColumn):
    """Anonymous memory of this process now."""

    def render(self, task: Task) -> Text:
        memory = read_memory()
        return Text(format_bytes(memory.anonymous_bytes) if memory else "", style="dim")


class _Count(ProgressColumn):
    """Items done, of all if their number is known."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields["unit"])
        if task.total is None:
            return Text(f"{_amount(task.completed, unit)} {unit}" if task.completed else "", justify="right")
        return Text(f"{_amount(task.completed, unit)}/{_amount(task.total, unit)}", justify="right")


class _Rate(ProgressColumn):
    """Items per second of this run."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_amount(speed, str(task.fields['unit']))}/s" if speed and task.total is not None else "")


def _amount(count: float, unit: str) -> str:
    return format_bytes(count) if unit == "bytes" else f"{count:,.0f}"


_COUNTED = ("embed", "knn", "audit", "rerank")
_QUIET_SECONDS = 1.0  # a stage before the rows that took less is not reported again in a log
_SHOWN_SECONDS = 0.05  # of a stage, in the preflight
_LOG_SECONDS = 10.0  # between two lines of one stage in a log


class TerminalObserver:
    """Shows a build on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            _Count(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            _Memory(),
            TextColumn("{task.fields[resumed]}", style="dim"),
            TextColumn("{task.fields[workers]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._plain = not console.is_terminal
        self._total = 0
        self._done = 0
        self._rows = self._seconds = 0.0  # totals of this run: workers finish in bursts, so single windows vary widely
        self._workers = ""
        self._stage = ""
        self._counted = 0  # items of the stage that is under way, for a log
        self._logged = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._start(event)
            case StageAdvanced():
                self._advance(event)
            case RowsCommitted():
                self._commit(event)
            case StageFinished():
                self._finish(event)
            case WorkersChanged():
                self._count_workers(event)
            case Preflight():
                for line in (preflight_line(event), time_line(event)):
                    self._console.print(line, highlight=False)
            case Notice():
                kind = "[bold yellow]warning[/bold yellow]" if event.is_warning else "[yellow]note[/yellow]"
                self._console.print(f"{kind}: {plain(event.message)}", highlight=False)

    def _start(self, event: StageStarted) -> None:
        resumed = f"[resumed {event.done:,}/{event.total:,}]" if event.done else ""
        self._tasks[event.stage] = self._progress.add_task(
            _TITLES[event.stage],
            total=event.total,
            completed=event.done,
            resumed=escape(resumed),
            workers="",
            unit=event.unit,
        )
        self._stage, self._workers = event.stage, ""
        self._counted, self._logged = event.done, time.monotonic()
        if event.stage == "embed":
            self._total, self._done = event.total or 0, event.done
        if self._plain:
            total = "" if event.total is None else f": {_amount(event.total, event.unit)}"
            unit = event.unit if event.total is not None and event.unit != "bytes" else ""
            shown = f"{_TITLES[event.stage]}{total} {unit} {escape(resumed)}"
            self._console.print(" ".join(shown.split()), highlight=False)

    def _advance(self, event: StageAdvanced) -> None:
        task = self._tasks[event.stage]
        self._progress.advance(task, event.count)
        self._counted += event.count
        if self._plain and time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            unit, total = str(self._progress.tasks[task].fields["unit"]), self._progress.tasks[task].total
            of = "" if total is None else f" of {_amount(total, unit)}"
            self._console.print(f"  {_TITLES[event.stage]}: {_amount(self._counted, unit)}{of}", highlight=False)

    def _commit(self, event: RowsCommitted) -> None:
        rows = event.stop - event.start
        self._progress.advance(self._tasks["embed"], rows)
        self._done += rows
        if self._plain:
            self._rows, self._seconds = self._rows + rows, self._seconds + event.seconds
            rate = self._rows / max(self._seconds, 1e-9) if self._workers else rows / max(event.seconds, 1e-9)
            left = f", {self._workers}, {_duration((self._total - self._done) / rate)} left" if self._workers else ""
            self._console.print(
                f"  committed {self._done:,}/{self._total:,} rows, {rate:,.0f} rows/s{left}", highlight=False, markup=False
            )

    def _count_workers(self, event: WorkersChanged) -> None:
        """Show the number of workers in the progress line."""
        retries = f", {event.retries} retries" if event.retries else ""
        lost = f", {event.lost} lost" if event.lost else ""
        self._workers = f"{event.alive}/{event.wanted} workers{retries}{lost}"
        if self._stage in self._tasks:
            self._progress.update(self._tasks[self._stage], workers=self._workers)
        if self._plain and event.lost:
            self._console.print(f"  {self._workers}", highlight=False, markup=False)

    def _finish(self, event: StageFinished) -> None:
        task = self._tasks[event.stage]
        total = self._progress.tasks[task].total
        # a bar without a total would go on moving
        self._progress.update(task, total=1 if total is None else total, completed=1 if total is None else total)
        self._progress.stop_task(task)
        if self._plain and (event.stage in _COUNTED or event.seconds >= _QUIET_SECONDS):
            self._console.print(f"{_TITLES[event.stage]}: done in {event.seconds:.1f} s", highlight=False)


def on_stderr() -> TerminalObserver:
    """An observer on stderr, whose lines are whole where it is not a terminal."""
    return TerminalObserver(Console(stderr=True, soft_wrap=not sys.stderr.isatty()))


def preflight_line(event: Preflight) -> str:
    """One paragraph: what will be computed, what it needs, and what is available."""
    reuse = ""
    if event.reused_rows or event.dropped_rows:
        computed = event.remaining_rows - event.reused_rows
        reuse = f"{event.reused_rows:,} reused, {computed:,} computed, {event.dropped_rows:,} old rows dropped; "
    return (
        f"[bold]preflight[/bold]: {reuse}{event.remaining_rows:,} of {event.num_rows:,} rows x {event.dimension:,} float16 "
        f"({event.head} head, {event.dtype} on {event.device}), about {_duration(event.seconds)}; "
        f"{event.truncated_share:.1%} of prompts truncated, {event.quarantined_lines:,} lines quarantined; {_answers(event)}"
        f"disk {format_bytes(event.remaining_bytes)} of {format_bytes(event.free_bytes)} free; "
        f"memory {format_bytes(event.embed_memory_bytes)} of {format_bytes(event.memory_budget_bytes)}; {_search(event)}"
    )


def time_line(event: Preflight) -> str:
    """Where the time went, and where it will go."""
    spent = [
        f"{_TITLES[name]} {seconds:.1f} s"
        for name, seconds in event.stage_seconds.items()
        if name in PREPARATIONS and seconds >= _SHOWN_SECONDS
    ]
    before = f"so far {', '.join(spent)}; " if spent else ""
    search = f"about {_duration(event.stage_seconds['knn'])}" if "knn" in event.stage_seconds else "not estimated"
    return f"[bold]time[/bold]: {before}next the pass, about {_duration(event.seconds)}, then the search, {search}"


def _answers(event: Preflight) -> str:
    """What becomes of assistant turns at the end of chats."""
    if not event.answered_lines:
        return ""
    done = "is left out" if event.turns == "prompt" else "is embedded, too (--turns prompt leaves it out)"
    return f"{event.answered_lines:,} chats end in an assistant turn, which {done}; "


def _search(event: Preflight) -> str:
    """Which engine will find the neighbours."""
    graphs = f"{event.num_shards} HNSW shard{'s' if event.num_shards > 1 else ''}"
    if event.knn == "pilot":
        return f"{graphs} if they find everything in a sample, else exact search"
    return "exact search" if event.knn == "exact" else graphs


def _duration(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
