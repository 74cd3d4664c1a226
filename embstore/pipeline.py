"""THE main flow: prompts -> rows -> neighbours -> weights -> one published artefact. Read this first.

``build`` runs the stages in order; each reads what the previous one committed and writes its own files. Storage knows no
model and compute knows no disk: they meet only here. What is committed, and when, is storage.writer's business; what a
row is, is compute.embed's. A build killed anywhere is continued by the same command with ``resume``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.artifact import (
    DEFAULT_NAME,
    NeighborFiles,
    WeightFiles,
    digest_of,
    extremes,
    publish,
    read_neighbors,
    write_neighbors,
    write_weights,
)
from embstore.core.config import K_MAX, BuildConfig, EmbeddingConfig, format_bytes
from embstore.core.density import mean_distance
from embstore.core.embedder import Embedder, EmbedderSource, RowBlock
from embstore.core.errors import (
    BudgetError,
    ConfigError,
    FieldMismatch,
    IdentityMismatchError,
    RowError,
)
from embstore.core.events import (
    Notice,
    Observer,
    Preflight,
    RowsCommitted,
    StageFinished,
    StageStarted,
    ignore,
)
from embstore.core.format import (
    BASIS,
    COORDINATES,
    FORMAT_VERSION,
    MANIFEST,
    PROMPTS,
    RESIDUALS,
    RUNS,
    DemotedRecord,
    DriftRecord,
    JsonObject,
    PromptsRecord,
    StoreSpec,
)
from embstore.core.plan import BuildPlan, plan, refuse_drift, refuse_other_input
from embstore.core.rows import chunk_rows_near
from embstore.interrupts import StopSignals
from embstore.memory import MemoryMeter
from embstore.storage.prompts import PromptTable, ingest
from embstore.storage.store import EmbeddingStore, open_store
from embstore.storage.verify import check_stage0, damaged_windows
from embstore.storage.writer import StoreWriter

CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What a build did and found; ``metadata`` is that of the weights training maps.

    ``seconds`` maps stages of this run to their duration; ``embedded_rows`` counts rows this run computed. ``rarest`` and
    ``most_crowded`` are rows. ``peak_anonymous_bytes`` is above the baseline (see embstore.memory).
    """

    store: Path
    num_rows: int
    embedded_rows: int
    embedded_tokens: int
    stored_bytes: int
    seconds: dict[str, float]
    metadata: JsonObject
    rarest: list[int]
    most_crowded: list[int]
    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None


@dataclass(kw_only=True, slots=True)
class _Run:
    """One run of a build: what every stage needs, and what the report is made of."""

    writer: StoreWriter
    config: BuildConfig
    source: EmbedderSource | None
    observer: Observer
    stop: StopSignals
    meter: MemoryMeter
    seconds: dict[str, float] = field(default_factory=dict)
    embedded_rows: int = 0
    embedded_tokens: int = 0
    stored_bytes: int = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage of this run."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def build(
    prompts: str | Path | None = None,
    *,
    out: str | Path,
    model: str | None = None,
    config: BuildConfig | None = None,
    resume: bool = False,
    observer: Observer = ignore,
    source: EmbedderSource | None = None,
) -> BuildReport:
    """Build a store, or continue one.

    Parameters
    ----------
    prompts
        JSONL file (gzip allowed) or ``-``. May be None on a resume: the rows are in the store; if given they must match.
    out
        The store's folder; created when absent.
    model
        Folder or hub id of a causal LM; shorthand for ``config.embedding.model``. May be None on a resume.
    config
        Everything else; defaults suit most.
    resume
        Continue what is at ``out``; starts from nothing if nothing is there, so a job script is the same line every time.
    observer
        Called with ``core.events`` as the build goes; must return quickly.
    source
        Another embedder than the Hugging Face one.

    Returns
    -------
    BuildReport

    Raises
    ------
    EmbstoreError
        See core.errors; whatever was committed stays committed.
    """
    config = config or BuildConfig()
    if model is not None:
        config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, model=model))
    root = Path(out)
    with StopSignals() as stop, MemoryMeter() as meter, StoreWriter(root, resume=resume) as writer:
        run = _Run(writer=writer, config=config, source=source, observer=observer, stop=stop, meter=meter)
        record = _commit_prompts(run, prompts)
        run.source = source or _torch_source(run)
        spec, embedder = _commit_spec(run, record)
        _log_start(run)
        _embed_windows(run, spec, embedder)
        del embedder  # the model's memory is free for the search
        finished = _published(root)
        neighbors = _find_neighbors(run, spec, finished)
        weights = _publish_weights(run, spec, neighbors, finished)
        report = _report(run, spec, neighbors, weights)
        writer.log_run({"event": "finished", "time": time.time(), "seconds": report.seconds})
        return report


def preflight(
    prompts: str | Path | None,
    *,
    out: str | Path,
    config: BuildConfig,
    observer: Observer = ignore,
    source: EmbedderSource | None = None,
) -> Preflight:
    """What ``build`` would do and cost, writing nothing to ``out`` (``--dry-run``); the events tell the same.

    The prompts are read and the model is loaded and probed, in a temporary folder.
    """
    root = Path(out)
    free_bytes = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
    if prompts is None:
        raise ConfigError("a dry run needs the prompts file")
    with (
        tempfile.TemporaryDirectory(prefix="embstore-dry-run-") as scratch,
        StopSignals() as stop,
        MemoryMeter() as meter,
        StoreWriter(Path(scratch) / "store", resume=False) as writer,
    ):
        run = _Run(writer=writer, config=config, source=source, observer=observer, stop=stop, meter=meter)
        record = _commit_prompts(run, prompts)
        run.source = source or _torch_source(run)
        spec, embedder = _commit_spec(run, record)
        if embedder is None:
            raise AssertionError("a new store has rows to compute")
        return _preflight(run, spec, embedder, plan(spec, writer.state), free_bytes)


# --- stage 0: prompts ------------------------------------------------------------------------------------------------


def _commit_prompts(run: _Run, source: str | Path | None) -> PromptsRecord:
    """Canonical rows in the store; on a resume, the given file must still give the same rows."""
    writer, config = run.writer, run.config
    committed = writer.state.prompts
    with run.stage("prompts"):
        if committed is None:
            if source is None:
                raise ConfigError(f"{writer.root} holds no prompts yet", hint="give the prompts file")
            record = ingest(source, writer.root, writer.work, strict=config.strict, limit=config.limit)
            writer.commit(record)
        else:
            record = committed
            if not config.trust_journal:
                check_stage0(writer.root, record)
            if source is not None:
                _refuse_other_prompts(writer.root, record, source, config)
    if record.quarantined:
        run.observer(
            Notice(
                message=f"{record.quarantined} of {record.lines} lines hold no prompt; see {writer.root}/quarantine.jsonl"
            )
        )
    return record


def _refuse_other_prompts(root: Path, record: PromptsRecord, source: str | Path, config: BuildConfig) -> None:
    """Ingest the given file aside and compare; names the first row that differs."""
    with tempfile.TemporaryDirectory(prefix="embstore-compare-") as scratch:
        folder = Path(scratch)
        given = ingest(source, folder, folder, strict=config.strict, limit=config.limit or None)
        if given.fingerprint == record.fingerprint:
            return
        mismatches = [FieldMismatch(field="prompts", stored=record.fingerprint[:16], given=given.fingerprint[:16])]
        if given.rows != record.rows:
            mismatches.append(FieldMismatch(field="rows", stored=record.rows, given=given.rows))
        with (root / PROMPTS).open("rb") as stored_file, (folder / PROMPTS).open("rb") as given_file:
            for row, (left, right) in enumerate(zip(stored_file, given_file, strict=False)):
                if left != right:
                    stored_text, given_text = left.decode()[:60], right.decode()[:60]
                    mismatches.append(FieldMismatch(field=f"row {row}", stored=stored_text, given=given_text))
                    break
    raise IdentityMismatchError(mismatches)


# --- spec: everything that changes a byte, pinned once ----------------------------------------------------------------


def _torch_source(run: _Run) -> EmbedderSource | None:
    """The model named by the options, or by the last run; None when every row is committed and none was named."""
    from embstore.compute.models import locate_model  # noqa: PLC0415 - torch loads only where rows may be computed
    from embstore.compute.source import TorchSource  # noqa: PLC0415

    embedding = run.config.embedding
    state = run.writer.state
    if embedding.model is None:
        if state.spec is not None and not plan(run.writer.read_spec(), state).windows:
            return None
        model, revision = _model_of_last_run(run.writer.root)
        embedding = dataclasses.replace(embedding, model=model, revision=revision)
    return TorchSource(locate_model(embedding))


def _model_of_last_run(root: Path) -> tuple[str, str | None]:
    path = root / RUNS
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for entry in reversed(entries):
        if entry.get("model"):
            return entry["model"], entry.get("revision")
    raise ConfigError("no model was given", hint="add --model, a folder or a hub id such as org/name")


def _commit_spec(run: _Run, record: PromptsRecord) -> tuple[StoreSpec, Embedder | None]:
    """The pinned spec, and an embedder for it if rows remain; a different input is refused here, nothing written."""
    writer, config = run.writer, run.config
    if writer.state.spec is None:
        if run.source is None:
            raise ConfigError("no model was given", hint="add --model")
        return _create_spec(run, record, run.source)
    spec = writer.read_spec()
    model = run.source.identity() if run.source is not None else None
    remaining = plan(spec, writer.state).windows
    # an explicit device or thread count is compared even when no row is left
    asked = config.embedding.device not in (None, "auto") or config.embedding.threads is not None
    hardware = None
    if run.source is not None and (remaining or asked):
        known = dataclasses.replace(
            config.embedding,
            device=config.embedding.device or spec.embedding.device,
            threads=config.embedding.threads or spec.embedding.threads,
        )
        hardware = run.source.hardware(known)
    drifted = refuse_other_input(spec, config.embedding, model, hardware)
    if drifted and hardware is not None:
        if not config.allow_drift:
            refuse_drift(spec, drifted, hardware)
        run.observer(Notice(message=f"drift allowed in {', '.join(drifted)}: rows may differ in low bits from here on"))
        writer.commit(DriftRecord(fields=drifted))
        # only this run's copy: the stored spec stays what the first rows were made with
        spec = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, **hardware))  # type: ignore[arg-type]
    _demote_damaged(run, spec)
    if not plan(spec, writer.state).windows or run.source is None:
        return spec, None
    with run.stage("model"):
        # copy-on-write mapping: torch takes no read-only array, and nothing writes to it
        basis_VR = np.load(writer.root / BASIS, mmap_mode="c", allow_pickle=False)
        embedder = run.source.reopen(spec.embedding, basis_VR)
    run.meter.set_baseline()
    return spec, embedder


def _create_spec(run: _Run, record: PromptsRecord, source: EmbedderSource) -> tuple[StoreSpec, Embedder]:
    writer, config = run.writer, run.config
    prompts = PromptTable(writer.root / PROMPTS, record.rows)
    identity = source.identity()
    with run.stage("model"):
        embedder = source.create(
            prompts,
            config.embedding,
            memory_bytes=config.memory_budget_bytes,
            work=writer.work,
            observer=run.observer,
        )
    run.meter.set_baseline()
    chunk_rows, window_rows = _fit_rows(config, embedder, record.rows)
    spec = StoreSpec(
        format_version=FORMAT_VERSION,
        rows=record.rows,
        prompts_fingerprint=record.fingerprint,
        model=identity,
        embedding=embedder.spec,
        window_rows=window_rows,
        chunk_rows=chunk_rows,
        compressor=config.embedding.compressor or "lz4",
        basis_sha256="",
    )
    _preflight(run, spec, embedder, plan(spec, writer.state), shutil.disk_usage(writer.root).free)
    return writer.create(spec, embedder.basis_VR), embedder


def _fit_rows(config: BuildConfig, embedder: Embedder, num_rows: int) -> tuple[int, int]:
    """Rows of a chunk and of a window: near 32 MiB and about a minute, less where the memory budget asks."""
    embedding = config.embedding
    chunk_rows = embedding.chunk_rows or chunk_rows_near(
        2 * embedder.spec.dimension, CHUNK_BYTES, num_rows=num_rows, max_rows=embedder.max_window_rows
    )
    while (
        embedding.chunk_rows is None and chunk_rows > 16 and embedder.memory_bytes(chunk_rows) > config.memory_budget_bytes
    ):
        chunk_rows = max(16, chunk_rows // 2 // 16 * 16)
    needed = embedder.memory_bytes(chunk_rows)
    if needed > config.memory_budget_bytes:
        raise BudgetError(
            f"embedding needs {format_bytes(needed)}, --memory-budget is {format_bytes(config.memory_budget_bytes)}",
            hint=f"give --memory-budget {-(-needed // (1 << 20))}MiB or more",
        )
    whole = -(-num_rows // chunk_rows) * chunk_rows
    window_rows = embedding.window_rows or min(max(1, embedder.max_window_rows // chunk_rows) * chunk_rows, whole)
    return chunk_rows, window_rows


def _preflight(run: _Run, spec: StoreSpec, embedder: Embedder, todo: BuildPlan, free_bytes: int) -> Preflight:
    """Say what is about to happen; refuse what cannot fit on the disk or in the budget."""
    from embstore.compute.knn import plan_search  # noqa: PLC0415 - hnswlib loads only where it is needed

    search = plan_search(
        spec.rows,
        spec.embedding.rank,
        run.config.density,
        threads=spec.embedding.threads,
        memory_bytes=run.config.memory_budget_bytes,
    )
    row_bytes = 2 * spec.embedding.dimension
    beside = spec.rows * (3 * 4 * spec.embedding.rank + 16 * K_MAX)  # coordinates, their centred copy, neighbours
    remaining_bytes = todo.remaining_rows * row_bytes + beside
    record = run.writer.state.prompts
    event = Preflight(
        num_rows=spec.rows,
        remaining_rows=todo.remaining_rows,
        quarantined_lines=record.quarantined if record else 0,
        truncated_share=embedder.truncated_share,
        dimension=spec.embedding.dimension,
        head=spec.embedding.head,
        dtype=spec.embedding.dtype,
        device=spec.embedding.device,
        remaining_bytes=remaining_bytes,
        free_bytes=free_bytes,
        embed_memory_bytes=embedder.memory_bytes(spec.chunk_rows),
        memory_budget_bytes=run.config.memory_budget_bytes,
        num_shards=search.shards,
        seconds=embedder.seconds_per_row * todo.remaining_rows,
    )
    run.observer(event)
    if remaining_bytes > free_bytes:
        raise BudgetError(
            f"the store may need {format_bytes(remaining_bytes)}, {run.writer.root} has {format_bytes(free_bytes)} free",
            hint="free some space, choose another --out, or try --limit",
        )
    return event


def _demote_damaged(run: _Run, spec: StoreSpec) -> None:
    """Committed windows must still be what was committed before anything is added to them."""
    if run.config.trust_journal or _published(run.writer.root) is not None:
        return  # a finished store is verify's business
    for window, finding in damaged_windows(run.writer.root, spec, run.writer.state):
        run.observer(Notice(message=f"{finding}; window {window} is computed again"))
        run.writer.commit(DemotedRecord(window=window, reason=finding))


# --- embedding: one window, one commit --------------------------------------------------------------------------------


def _embed_windows(run: _Run, spec: StoreSpec, embedder: Embedder | None) -> None:
    todo = plan(spec, run.writer.state)
    if embedder is None or not todo.windows:
        return
    prompts = PromptTable(run.writer.root / PROMPTS, spec.rows)
    run.observer(StageStarted(stage="embed", total=spec.rows, done=spec.rows - todo.remaining_rows))
    started = time.perf_counter()
    with run.stage("embed"):
        for window in todo.windows:
            rows = todo.grid.window(window)
            since = time.perf_counter()
            with run.stop.deferred() as check:
                blocks = embedder.embed(prompts.read(rows), first_row=rows.start, chunk_rows=spec.chunk_rows, check=check)
                record = run.writer.write_window(
                    spec, window, _refuse_failed(blocks, run.config, prompts), lambda: embedder.counts
                )
            stored_bytes = sum(chunk.bytes for chunk in record.chunks)
            run.embedded_rows += rows.num_rows
            run.embedded_tokens += record.tokens
            run.stored_bytes += stored_bytes
            run.observer(
                RowsCommitted(
                    start=rows.start,
                    stop=rows.stop,
                    num_tokens=record.tokens,
                    stored_bytes=stored_bytes,
                    seconds=time.perf_counter() - since,
                )
            )
            for failed in record.failed:
                run.observer(Notice(message=f"row {failed.row} failed and is kept without a vector: {failed.reason}"))
    run.observer(StageFinished(stage="embed", seconds=time.perf_counter() - started))


def _refuse_failed(blocks: Iterator[RowBlock], config: BuildConfig, prompts: PromptTable) -> Iterator[RowBlock]:
    """Pass blocks on; without quarantine a failed row stops the run before anything of its chunk is written."""
    for block in blocks:
        if block.failed and config.on_error == "stop":
            failed = block.failed[0]
            prompt = prompts.sample([failed.row])[0]
            raise RowError(
                f"prompt {prompt.id!r} (row {failed.row}) failed: {failed.reason}",
                hint="resume with --on-error quarantine to keep its row number without a vector, or remove the prompt",
            )
        yield block


# --- density, weights, publication ------------------------------------------------------------------------------------


def _published(root: Path) -> EmbeddingStore | None:
    return open_store(root) if (root / MANIFEST).exists() else None


def _find_neighbors(run: _Run, spec: StoreSpec, finished: EmbeddingStore | None) -> NeighborFiles:
    """The neighbour graph for these rows and settings: the published one if it is the same, else a new search."""
    from embstore.compute.knn import build_graph, plan_search  # noqa: PLC0415 - hnswlib loads only where it is needed

    state, density = run.writer.state, run.config.density
    failed_N = np.zeros(spec.rows, dtype=np.bool_)
    failed_N[[failed.row for failed in state.failed]] = True
    commits = [[window.window, window.coordinates_crc32c] for window in state.windows.values()]
    search = plan_search(
        spec.rows,
        spec.embedding.rank,
        density,
        threads=spec.embedding.threads,
        memory_bytes=run.config.memory_budget_bytes,
    )
    digest = digest_of({"density": dataclasses.asdict(density), "shards": search.shards, "rows": commits})
    if finished is not None and finished.manifest is not None and finished.manifest.neighbors == digest:
        return read_neighbors(finished)
    with run.stage("knn"):
        graph = build_graph(
            np.load(run.writer.root / COORDINATES, mmap_mode="r", allow_pickle=False),
            failed_N,
            density,
            threads=spec.embedding.threads,
            memory_bytes=run.config.memory_budget_bytes,
            work=run.writer.work,
            observer=run.observer,
            clock=time.perf_counter,
        )
    found = {
        "knn": density.knn,
        "k_max": K_MAX,
        "shards": graph.shards,
        "seed": density.seed,
        "effort": dataclasses.asdict(graph.effort) if graph.effort else None,
        "distinct_vectors": graph.num_nodes,
        "repaired_vectors": graph.repaired_nodes,
        "audit": dataclasses.asdict(graph.audit) if graph.audit else None,
        "target_recall": density.target_recall,
        "target_tv": density.target_tv,
        "meets_target": graph.meets_target,
    }
    return write_neighbors(run.writer.root, digest, graph.ids_NK, graph.distances_NK, graph.groups_N, found)


def _publish_weights(run: _Run, spec: StoreSpec, neighbors: NeighborFiles, finished: EmbeddingStore | None) -> WeightFiles:
    started = time.perf_counter()
    run.observer(StageStarted(stage="publish", total=1, unit="manifest"))
    with run.stage("publish"):
        residual_N: NDArray[np.float32] = np.load(run.writer.root / RESIDUALS, mmap_mode="r", allow_pickle=False)
        weights = write_weights(run.writer.root, spec, run.writer.state, neighbors, residual_N, run.config.weighting)
        kept = finished.manifest if finished is not None else None
        if kept is None or kept.names.get(DEFAULT_NAME) != weights.digest or kept.neighbors != neighbors.digest:
            publish(run.writer, spec, neighbors, weights, name=DEFAULT_NAME, kept=kept)
    run.observer(StageFinished(stage="publish", seconds=time.perf_counter() - started))
    for warning in weights.result.warnings:
        run.observer(Notice(message=warning))
    return weights


def _report(run: _Run, spec: StoreSpec, neighbors: NeighborFiles, weights: WeightFiles) -> BuildReport:
    rarest, most_crowded = extremes(mean_distance(neighbors.distances_NK, run.config.weighting.k), 3)
    return BuildReport(
        store=run.writer.root,
        num_rows=spec.rows,
        embedded_rows=run.embedded_rows,
        embedded_tokens=run.embedded_tokens,
        stored_bytes=run.stored_bytes,
        seconds=run.seconds,
        metadata=weights.metadata,
        rarest=rarest,
        most_crowded=most_crowded,
        peak_anonymous_bytes=run.meter.peak_anonymous_bytes,
        peak_file_bytes=run.meter.peak_file_bytes,
    )


def _log_start(run: _Run) -> None:
    embedding: EmbeddingConfig = run.config.embedding
    model = str(Path(embedding.model).absolute()) if embedding.model and Path(embedding.model).exists() else embedding.model
    run.writer.log_run(
        {
            "event": "started",
            "time": time.time(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "model": model,
            "revision": embedding.revision,
            "memory_budget_bytes": run.config.memory_budget_bytes,
        }
    )
