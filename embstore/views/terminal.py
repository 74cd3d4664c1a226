"""Show events, reports and stores on a terminal. Results go to stdout, progress and messages to stderr.

Progress counts committed rows only: it never shows work that a crash would lose.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from embstore.core.config import format_bytes
from embstore.core.decode import printable
from embstore.core.diagnostics import MILD_ESS_SHARE
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
from embstore.core.format import JsonObject
from embstore.flow.build import BuildReport
from embstore.host.memory import read_memory
from embstore.storage.verify import ONLY_A_NEW_BUILD, VerifyReport
from embstore.views.comparison import Comparison
from embstore.views.info import NeighborInfo, PromptInfo, StoreInfo

_BLOCKS = " ▏▎▍▌▋▊▉█"
_HISTOGRAM_WIDTH = 40
_SHOWN_RANGES = 5

_TITLES = {
    "imports": "loading torch and transformers",
    "prompts": "reading prompts",
    "fetch": "fetching the model from the hub or its cache",
    "check": "comparing the prompts with the store's",
    "hash": "hashing the model's files",
    "reuse": "looking prompts up in the stores to reuse",
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
}


def results() -> Console:
    """The console for results: stdout, without line wrapping if it is not a terminal."""
    return Console(soft_wrap=not sys.stdout.isatty(), emoji=False)


def plain(text: str) -> str:
    """Text from a store or a prompts file, escaped so that it cannot change styles or move the cursor."""
    return escape(printable(text))


class _Memory(ProgressColumn):
    """Anonymous memory of this process now."""

    def render(self, task: Task) -> Text:
        memory = read_memory()
        return Text(format_bytes(memory.anonymous_bytes) if memory else "", style="dim")


class _Count(ProgressColumn):
    """Items done, of all if their number is known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        unit = str(task.fields["unit"])
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
                self._console.print(f"[yellow]note[/yellow]: {plain(event.message)}", highlight=False)

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


def preflight_line(event: Preflight) -> str:
    """One paragraph: what will be computed, what it needs, and what is available."""
    reuse = ""
    if event.reused_rows or event.dropped_rows:
        computed = event.remaining_rows - event.reused_rows
        reuse = f"{event.reused_rows:,} reused, {computed:,} computed, {event.dropped_rows:,} old rows dropped; "
    return (
        f"[bold]preflight[/bold]: {reuse}{event.remaining_rows:,} of {event.num_rows:,} rows x {event.dimension:,} float16 "
        f"({event.head} head, {event.dtype} on {event.device}), about {_duration(event.seconds)}; "
        f"{event.truncated_share:.1%} of prompts truncated, {event.quarantined_lines:,} lines quarantined; "
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
    return f"[bold]time[/bold]: {before}next the pass, about {_duration(event.seconds)}, then the search, not estimated"


def _search(event: Preflight) -> str:
    """Which engine will find the neighbours."""
    graphs = f"{event.num_shards} HNSW shard{'s' if event.num_shards > 1 else ''}"
    if event.knn == "pilot":
        return f"{graphs} if they find everything in a sample, else exact search"
    return "exact search" if event.knn == "exact" else graphs


def _duration(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def print_report(console: Console, report: BuildReport, info: StoreInfo) -> None:
    """The end of a build: what was done, how accurate it is, and the weights."""
    seconds = report.seconds.get("embed", 0.0)
    console.print(
        f"[bold green]complete[/bold green] {escape(str(report.store))}: {report.num_rows:,} rows", highlight=False
    )
    if report.reused_rows or report.dropped_rows:
        console.print(
            f"  reused {report.reused_rows:,} rows, computed {report.embedded_rows:,}, "
            f"dropped {report.dropped_rows:,} old rows",
            highlight=False,
        )
    if report.embedded_rows and seconds:
        tokens = f"{report.embedded_tokens / seconds:,.0f} tokens/s, " if report.embedded_tokens else ""
        console.print(
            f"  embedded {report.embedded_rows:,} rows in {seconds:.1f} s: {report.embedded_rows / seconds:,.0f} rows/s, "
            f"{tokens}{format_bytes(report.stored_bytes / seconds)}/s written",
            highlight=False,
        )
    if report.peak_anonymous_bytes is not None:
        workers = f", {format_bytes(report.worker_peak_bytes)} in a worker" if report.worker_peak_bytes else ""
        console.print(
            f"  peak memory {format_bytes(report.peak_anonymous_bytes)} above the baseline{workers}", highlight=False
        )
    _print_density(console, report.metadata)
    _print_prompts(console, "rarest", info.rarest)
    _print_prompts(console, "most crowded", info.most_crowded)
    console.print(f"  training: [bold]load_weights({escape(repr(str(report.store)))})[/bold]", highlight=False)


def print_info(console: Console, info: StoreInfo) -> None:
    """What ``embstore inspect`` shows."""
    state = "[green]complete[/green]" if info.is_complete else f"[yellow]unfinished[/yellow] ({info.stage})"
    console.print(f"[bold]{plain(info.path)}[/bold]  {state}", highlight=False)
    console.print(
        f"  rows {info.committed_rows:,}/{info.total_rows:,} committed, "
        f"windows {info.committed_windows}/{info.total_windows}, {format_bytes(info.stored_bytes)} of rows",
        highlight=False,
    )
    console.print(
        f"  from {info.lines:,} lines: {info.repeated_lines:,} repeats, {info.quarantined_lines:,} quarantined; "
        f"{info.failed_rows:,} failed rows"
        + (f"; {info.reused_rows:,} copied from other stores" if info.reused_rows else ""),
        highlight=False,
    )
    if info.spec is not None:
        _print_spec(console, info.spec)
    if info.metadata is None:
        if not info.is_complete:
            console.print("  no weights yet: run [bold]embstore build --resume[/bold]", highlight=False)
        return
    _print_density(console, info.metadata)
    _print_histogram(console, info.weights_histogram, info.histogram_edges)
    _print_prompts(console, "rarest", info.rarest)
    _print_prompts(console, "most crowded", info.most_crowded)
    if info.shares:
        table = Table("value", "rows", "share of rows", "share of weight", "ratio", box=None, pad_edge=False)
        for share in info.shares:
            ratio = share.weight_share / share.row_share
            table.add_row(
                plain(share.value), f"{share.rows:,}", f"{share.row_share:.2%}", f"{share.weight_share:.2%}", f"{ratio:.2f}"
            )
        console.print(table)


def print_neighbors(console: Console, prompt_id: str, neighbors: Sequence[NeighborInfo]) -> None:
    """Nearest distinct prompts of one prompt."""
    console.print(f"nearest distinct prompts of [bold]{plain(prompt_id)}[/bold]", highlight=False)
    for neighbor in neighbors:
        console.print(f"  {neighbor.distance:.5f}  {plain(neighbor.id)}  {plain(neighbor.text)}", highlight=False)


def print_comparison(console: Console, found: Comparison) -> None:
    """What ``embstore compare`` found."""
    for title, side in (("left", found.left), ("right", found.right)):
        gamma = side.weighting.get("gamma")
        shown_gamma = f", gamma {gamma:.3g}" if isinstance(gamma, float) else ""
        alone = f"; {side.alone:,} rows ({side.alone_weight:.2%} of the weight) only here" if side.alone else ""
        console.print(
            f"[bold]{title:<6}[/bold] {plain(side.store)}:{plain(side.name)}  {plain(str(side.weighting['weighting']))}, "
            f"k {side.weighting['k']}{shown_gamma}, effective sample size {side.ess_share:.1%}{alone}",
            highlight=False,
        )
    rank = "undefined (one side is uniform)" if found.spearman is None else f"{found.spearman:.4f}"
    console.print(
        f"  {found.common:,} common prompts: {found.tv:.2%} of the draws would differ (TV), rank correlation {rank}",
        highlight=False,
    )
    if found.differing_texts:
        console.print(f"  [yellow]note[/yellow]: {found.differing_texts:,} of them have different texts", highlight=False)
    for title, prompts in (("rose", found.rose), ("fell", found.fell)):
        for prompt in prompts:
            console.print(
                f"  {title} {prompt.left:7.2f} -> {prompt.right:<7.2f} [dim]{plain(prompt.id)}[/dim]  {plain(prompt.text)}",
                highlight=False,
                no_wrap=True,
                overflow="ellipsis" if console.is_terminal else "ignore",
                crop=console.is_terminal,
            )


def print_verify(console: Console, report: VerifyReport, *, repaired: bool) -> None:
    """What ``embstore verify`` found."""
    for finding in report.findings:
        window = f" (window {finding.window})" if finding.window is not None else ""
        console.print(f"[red]damaged[/red] {plain(finding.path)}: {plain(finding.message)}{window}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/yellow]: {plain(note)}", highlight=False)
    checked = f"{report.files:,} files, {format_bytes(report.bytes)}, {report.committed_rows:,}/{report.total_rows:,} rows"
    if report.reused:
        ranges = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in report.reused[:_SHOWN_RANGES])
        more = f" and {len(report.reused) - _SHOWN_RANGES:,} more ranges" if len(report.reused) > _SHOWN_RANGES else ""
        reused = sum(stop - start for start, stop in report.reused)
        console.print(f"  {reused:,} rows were copied from other stores: rows {ranges}{more}", highlight=False)
    if report.findings:
        windows = {finding.window for finding in report.findings if finding.window is not None}
        console.print(f"[red]damaged[/red]: {len(report.findings)} findings in {checked}", highlight=False)
        if repaired and all(finding.path in ONLY_A_NEW_BUILD for finding in report.findings):
            console.print("  nothing was changed: these files need a new build into another --out", highlight=False)
        elif repaired:
            console.print(
                f"  {len(windows)} windows demoted: run embstore build --resume to compute them again", highlight=False
            )
    elif report.is_complete:
        console.print(f"[green]ok[/green]: {checked}", highlight=False)
    else:
        console.print(f"[yellow]unfinished, undamaged[/yellow]: {checked}; run embstore build --resume", highlight=False)


def _print_spec(console: Console, spec: JsonObject) -> None:
    model, embedding = spec["model"], spec["embedding"]
    console.print(
        f"  model {plain(model['name'])} ({plain(model['architecture'])}), weights {plain(model['weights_sha256'][:12])}, "
        f"tokenizer {plain(model['tokenizer_sha256'][:12])}, prompts {plain(spec['prompts_fingerprint'][:12])}",
        highlight=False,
    )
    if embedding["head"]["kind"] == "imported":
        console.print(
            f"  {embedding['dimension']:,} columns in {embedding['rank']} coordinates, imported from "
            f"{plain(embedding['dtype'])} rows ({plain(embedding['capability'])}, {embedding['threads']} threads)",
            highlight=False,
        )
        _print_versions(console, embedding["versions"])
        return
    console.print(
        f"  {embedding['dimension']:,} columns in {embedding['rank']} coordinates, {plain(embedding['head']['kind'])} head, "
        f"{plain(embedding['dtype'])} on {plain(embedding['device'])} "
        f"({plain(embedding['capability'])}, {embedding['threads']} threads), "
        f"at most {embedding['max_tokens']} tokens",
        highlight=False,
    )
    _print_versions(console, embedding["versions"])


def _print_versions(console: Console, versions: JsonObject | None) -> None:
    """What made the rows, apart from the model and the hardware."""
    if versions is None:
        console.print("  versions not recorded", highlight=False)
        return
    made = ", ".join(f"{name} {plain(version)}" for name, version in versions.items() if version is not None)
    console.print(f"  made with {made}", highlight=False)


def _print_density(console: Console, metadata: JsonObject) -> None:
    neighbors, weighting = metadata["neighbors"], metadata["weighting"]
    audit = neighbors["audit"]
    if audit is not None:
        verdict = "[green]meets its target[/green]" if neighbors["meets_target"] else "[red]BELOW its target[/red]"
        console.print(
            f"  recall@{audit['k']} {audit['recall']:.5f} (at least {audit['recall_lower']:.5f} with 95 % confidence, "
            f"{audit['num_rows']:,} rows checked exactly), weights TV {audit['tv']:.1e}: {verdict}",
            highlight=False,
        )
    _print_rerank(console, neighbors.get("rerank"))
    gamma = f", gamma {weighting['gamma']:.3g}" if weighting["weighting"] == "inverse-density" else ""
    centred = ", rows centred" if neighbors.get("center") is True else ""
    console.print(
        f"  weights {plain(weighting['weighting'])}, k {weighting['k']}{gamma}{centred}: "
        f"effective sample size {metadata['ess']:,.0f} ({metadata['ess_share']:.1%}), "
        f"largest {metadata['max_over_mean']:.1f} x the mean",
        highlight=False,
    )
    if metadata["ess_share"] > MILD_ESS_SHARE and weighting["weighting"] != "uniform":
        console.print(
            "  the weighting is mild: sampling is close to uniform; [bold]--target-ess 0.5[/bold] makes it stronger"
        )
    groups = metadata["vector_groups"]
    if groups["rows"]:
        console.print(
            f"  {groups['rows']:,} rows share their vector with other rows, in {groups['groups']:,} groups", highlight=False
        )
    if metadata["byte_identity_voided"]:
        console.print(
            "  [yellow]note[/yellow]: rows are not bit-reproducible, because of hardware drift or split batches",
            highlight=False,
        )
    for warning in metadata["warnings"]:
        console.print(f"  [yellow]note[/yellow]: {plain(warning)}", highlight=False)


def _print_rerank(console: Console, rerank: JsonObject | None) -> None:
    """How many rows were ranked by stored rows, where coordinates are not the whole row; stores before this do not say."""
    if rerank is None or not rerank["off_basis_rows"]:
        return
    console.print(
        f"  {rerank['reranked_rows']:,} rows leave the basis or have a neighbour that does: their neighbours are ranked by "
        f"stored rows; {rerank['uncertain_rows']:,} of them may miss one of their {rerank['k']} nearest",
        highlight=False,
    )


def _print_histogram(console: Console, counts: Sequence[int], edges: Sequence[float]) -> None:
    most = max(counts, default=0)
    if not most:
        return
    console.print("  weight, in units of the mean:", highlight=False)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        eighths = round(count / most * _HISTOGRAM_WIDTH * 8)
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        console.print(f"  {low:5.2f} to {high:5.2f} {count:>9,} [cyan]{bar}[/cyan]", highlight=False)


def _print_prompts(console: Console, title: str, prompts: Sequence[PromptInfo]) -> None:
    for prompt in prompts:
        console.print(
            f"  {title:<12} weight {prompt.weight:5.2f}  distance {prompt.mean_distance:.4f}  "
            f"[dim]{plain(prompt.id)}[/dim]  {plain(prompt.text)}",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis" if console.is_terminal else "ignore",  # a file or a pipe gets the whole excerpt
            crop=console.is_terminal,
        )
