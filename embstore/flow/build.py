"""The main flow: prompts -> rows -> neighbours -> weights -> one published artefact. Read this first.

``build`` runs the stages in order; each reads what the previous one committed and writes its own files. ``storage`` does not
know models, and ``model`` and ``search`` do not know the disk: they meet only here. ``storage.writer`` defines what is
committed and when, ``model.embed`` what a row is. After a kill at any point the same call with ``resume`` continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embstore.core.config import BuildConfig
from embstore.core.density import mean_distance
from embstore.core.events import (
    Notice,
    Observer,
    RowsCommitted,
    StageFinished,
    StageStarted,
    ignore,
)
from embstore.core.files import map_array, storage_errors
from embstore.core.format import DEFAULT_WEIGHTS, QUARANTINE, RESIDUALS, JsonObject
from embstore.core.interfaces import Embedder, EmbedderSource, Job
from embstore.core.plan import plan
from embstore.core.records import REFUSED_BY_TEMPLATE, WindowRecord
from embstore.core.spec import StoreSpec
from embstore.engines.ray import refuse_missing
from embstore.flow.admission import commit_spec, warn_of_place
from embstore.flow.artifact import (
    NeighborFiles,
    WeightFiles,
    extremes,
    publish,
    read_neighbors,
    short_digest,
    write_neighbors,
    write_weights,
)
from embstore.flow.first_checks import check_command, on_hub
from embstore.flow.pool_summary import PoolSummary, judge_quarantined, summarize
from embstore.flow.reuse import Reuse
from embstore.flow.row_copier import RowCopier
from embstore.flow.run import Run, open_engine, open_run, timed
from embstore.flow.stage0 import commit_prompts, nothing_left_if_refused
from embstore.flow.window_tasks import LocalWindowJob, MadeWindow, RemoteWindowJob
from embstore.host.allocator import give_back
from embstore.storage.prompt_source import PromptSource
from embstore.storage.reader import EmbeddingStore, open_published
from embstore.storage.search_blocks import SearchBlocks

if TYPE_CHECKING:
    from embstore.search.graph import KnnGraph
    from embstore.search.remote import RemoteSearch
    from embstore.search.search_plan import SearchPlan
    from embstore.search.stored_rerank import Rerank

_MOST_REREADS = 3.0  # about 2 if the order is unchanged, because neighbouring chunks share an old chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """Result of a build; ``metadata`` describes the weights that training maps.

    ``pool`` says what became of the lines. ``seconds`` maps stages of this run to their duration. ``embedded_rows`` counts
    rows that this run computed, ``reused_rows`` those it copied from other stores, ``dropped_rows`` rows of those stores
    whose prompts are not in this pool. ``rarest`` and ``most_crowded`` are row numbers. ``peak_anonymous_bytes`` does not
    count imports and the model (host.memory), ``model_peak_bytes`` is what it took to load and probe it,
    ``worker_peak_bytes`` is the peak of the largest worker process (None without workers), ``worker_traffic_bytes`` counts
    the bytes between this process and workers.
    """

    store: Path
    num_rows: int
    pool: PoolSummary
    embedded_rows: int
    reused_rows: int
    dropped_rows: int
    embedded_tokens: int
    stored_bytes: int
    seconds: dict[str, float]
    metadata: JsonObject
    rarest: list[int]
    most_crowded: list[int]
    peak_anonymous_bytes: int | None
    model_peak_bytes: int | None
    peak_file_bytes: int | None
    worker_peak_bytes: int | None
    worker_traffic_bytes: int


def build(
    prompts: PromptSource | None = None,
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
        JSONL file (gzip allowed) or ``-`` for standard input, or the names of an array's rows. May be None on a resume,
        because the store contains the rows; if given, they must match.
    out
        The store's folder; created when absent.
    model
        Folder or hub id of a causal LM; shorthand for ``config.embedding.model``. May be None on a resume.
    config
        Everything else; ``help(embstore.core.config.BuildConfig)`` lists each option with its default and unit.
    resume
        Continue the store at ``out``, or start one if there is none: a job script needs only one command. A store that
        has never had a committed row may also be begun again, without ``resume`` or by other prompts or settings.
    observer
        Called with ``core.events`` during the build; must return quickly.
    source
        Embedder to use instead of the Hugging Face one.

    Returns
    -------
    BuildReport

    Raises
    ------
    EmbstoreError
        See core.errors. Committed rows are kept; an input that is refused before there are any leaves no folder behind.
    """
    config = (config or BuildConfig()).for_workers
    if model is not None:
        config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, model=model))
    root, seconds = Path(out), dict[str, float]()
    observer = timed(observer, seconds)
    if config.engine.is_remote:
        refuse_missing()
    prompts = on_hub(prompts, config.dataset)
    source = check_command(root, prompts, config, source=source, resume=resume, observer=observer)
    with open_run(root, config, source=source, resume=resume, observer=observer, seconds=seconds) as run:
        warn_of_place(run)
        run.compute_exactly(needs_torch=False)
        run.meter.set_baseline()  # the budget does not include what is imported
        with nothing_left_if_refused(run):
            record = commit_prompts(run, prompts, resume=resume)
        run.prompts_peak_bytes = run.meter.set_baseline()
        lists = f"{root}/{QUARANTINE} lists them"  # what was read stays, and with it this list
        judge_quarantined(run, record, lists=lists, has_rows=not run.writer.may_begin_again)
        with nothing_left_if_refused(run):
            spec, embedder, reuse = commit_spec(run, record)
        if config.engine.is_remote:
            embedder = None  # loaded only to resolve the settings; each worker loads the model itself
            give_back()
            if spec.embedding.device == "cuda":
                from embstore.host.device import give_back_device  # noqa: PLC0415

                give_back_device()
        run.resources.enter_context(open_engine(run, spec))
        run.model_peak_bytes = run.meter.set_baseline()  # nor the model, which stays in memory
        _embed_windows(run, spec, embedder, reuse)
        del embedder, reuse  # frees the model's memory for the search
        give_back()
        finished = open_published(root)
        neighbors = _find_neighbors(run, spec, finished)
        weights = _publish_weights(run, spec, neighbors, finished)
        report = _report(run, spec, neighbors, weights)
        run.writer.log_run({"event": "finished", "time": time.time(), "seconds": report.seconds})
        return report


# --- embedding: one window, one commit --------------------------------------------------------------------------------


def _embed_windows(run: Run, spec: StoreSpec, embedder: Embedder | None, reuse: Reuse) -> None:
    todo = plan(spec, run.writer.state)
    if not todo.windows:
        return
    if (rereads := RowCopier(reuse, spec, run.writer.work).rereads(todo.windows)) > _MOST_REREADS:
        run.observer(
            Notice(
                message=f"the order of the pool differs from the old store's: rows to copy are read {rereads:.0f} times each"
            )
        )
    job = _window_job(run, spec, embedder, reuse, todo.windows)
    run.observer(StageStarted(stage="embed", total=spec.rows, done=spec.rows - todo.remaining_rows))
    started = since = time.perf_counter()
    with run.stage("embed"), run.stop.deferred() as check:
        # signals are deferred for the whole loop: a finished window is committed and reported, and no new one starts
        made_windows = run.engine.map(
            job, todo.windows, check=check, is_stopping=run.stop.is_stopping, observer=run.observer
        )
        with contextlib.closing(made_windows):
            for window, made in made_windows:
                record = run.writer.commit_window(spec, made.written)
                if made.peak_anonymous_bytes is not None:
                    run.worker_peak_bytes = max(run.worker_peak_bytes or 0, made.peak_anonymous_bytes)
                rows = todo.grid.window(window)
                stored_bytes = sum(chunk.bytes for chunk in record.chunks)
                reused = reuse.count(rows)
                run.embedded_rows += rows.num_rows - reused
                run.reused_rows += reused
                run.embedded_tokens += record.tokens
                run.stored_bytes += stored_bytes
                since, before = time.perf_counter(), since
                run.observer(
                    RowsCommitted(
                        start=rows.start,
                        stop=rows.stop,
                        num_tokens=record.tokens,
                        stored_bytes=stored_bytes,
                        seconds=since - before,
                        num_reused=reused,
                    )
                )
                for failed in record.failed:
                    if failed.reason.startswith(REFUSED_BY_TEMPLATE):
                        continue  # said before the pass
                    run.observer(Notice(message=f"row {failed.row} failed and has no vector: {failed.reason}"))
    run.observer(StageFinished(stage="embed", seconds=time.perf_counter() - started))


def _window_job(
    run: Run, spec: StoreSpec, embedder: Embedder | None, reuse: Reuse, windows: tuple[int, ...]
) -> Job[int, MadeWindow]:
    root, stops = run.writer.root, run.config.on_error == "stop"
    if not run.engine.is_remote:
        return LocalWindowJob(
            root=root,
            spec=spec,
            prompts=run.prompts,
            embedder=embedder,
            reuse=reuse,
            stops_at_failure=stops,
            work=run.writer.work,
            todo=windows,
        )
    return RemoteWindowJob.prepare(
        root.absolute(),
        spec,
        run.source if reuse.num_rows < spec.rows else None,
        reuse,
        prompts=run.prompts,
        stops_at_failure=stops,
        folder=run.engine_folder,
        memory_bytes=run.config.memory_budget_bytes,
    )


# --- density, weights, publication ------------------------------------------------------------------------------------


def _find_neighbors(run: Run, spec: StoreSpec, finished: EmbeddingStore | None) -> NeighborFiles:
    """The neighbour graph for these rows and settings: the published one if the settings are equal, else a new search."""
    from embstore.search.graph import build_graph  # noqa: PLC0415 - hnswlib loads only where it is needed
    from embstore.search.search_plan import SMALL_NODES, plan_search  # noqa: PLC0415

    run.compute_exactly(needs_torch=spec.rows > SMALL_NODES)
    state, density, threads = run.writer.state, run.config.density, spec.embedding.threads
    memory_bytes = run.config.memory_budget_bytes
    search = plan_search(spec.rows, spec.embedding.rank, density, threads=threads, memory_bytes=memory_bytes)
    commits = [_grouped_by(window) for window in state.windows.values()]
    digest = short_digest({"density": dataclasses.asdict(density), "shards": search.shards, "rows": commits})
    if finished is not None and finished.published.neighbors == digest:
        return read_neighbors(finished)
    store = finished or EmbeddingStore(run.writer.root, None, state, spec)
    failed_N = np.zeros(spec.rows, dtype=np.bool_)
    failed_N[[failed.row for failed in state.failed]] = True
    with run.stage("knn"), storage_errors("writing to", run.writer.work):
        graph = build_graph(
            store.coordinates,
            failed_N,
            density,
            sequence_N=store.sequences,
            threads=threads,
            memory_bytes=memory_bytes,
            work=run.writer.work,
            observer=run.observer,
            kept=SearchBlocks(run.writer.work, digest),
            device=run.device,
            remote=_search_workers(run, spec, search),
        )
        record = graph.as_record()
        if not density.center:  # distances seen from the mean are not those between stored rows
            record["rerank"] = dataclasses.asdict(_rerank(run, store, graph))
    return write_neighbors(run.writer.root, digest, graph.ids_NK, graph.distances_NK, graph.groups_N, record)


def _grouped_by(window: WindowRecord) -> list[int | str]:
    """What a window adds to the neighbours, for their digest."""
    sequences = [window.sequences_crc32c] if window.sequences_crc32c is not None else []
    return [window.window, window.coordinates_crc32c, *sequences]


def _search_workers(run: Run, spec: StoreSpec, search: SearchPlan) -> RemoteSearch | None:
    from embstore.search.remote import RemoteSearch  # noqa: PLC0415

    if not run.engine.is_remote:
        return None
    return RemoteSearch(
        run.engine,
        run.engine_folder,
        threads=spec.embedding.threads,
        memory_bytes=search.scan_memory_bytes,
        device=spec.embedding.device,
        observer=run.observer,
    )


def _rerank(run: Run, store: EmbeddingStore, graph: KnnGraph) -> Rerank:
    """Where rows leave the basis, put distances between stored rows in the graph, in place."""
    from embstore.search.graph import AUDIT_K  # noqa: PLC0415
    from embstore.search.stored_rerank import StoredRows, rerank_by_stored_rows  # noqa: PLC0415

    return rerank_by_stored_rows(
        graph.ids_NK,
        graph.distances_NK,
        graph.groups_N,
        store.residuals,
        StoredRows(read=store.rows_at, dimension=store.spec.embedding.dimension, chunk_rows=store.spec.chunk_rows),
        k=AUDIT_K,
        threads=store.spec.embedding.threads,
        memory_bytes=run.config.memory_budget_bytes // 2,  # the search still uses the rest
        observer=run.observer,
    )


def _publish_weights(run: Run, spec: StoreSpec, neighbors: NeighborFiles, finished: EmbeddingStore | None) -> WeightFiles:
    started = time.perf_counter()
    run.observer(StageStarted(stage="publish", total=1, unit="manifest"))
    with run.stage("publish"):
        residual_N = (
            finished.residuals if finished is not None else map_array(run.writer.root, RESIDUALS, "<f4", (spec.rows,))
        )
        weights = write_weights(run.writer.root, spec, run.writer.state, neighbors, residual_N, run.config.weighting)
        kept = finished.manifest if finished is not None else None
        if kept is None or kept.names.get(DEFAULT_WEIGHTS) != weights.digest or kept.neighbors != neighbors.digest:
            with run.stop.deferred("publishing"):  # the flip and the links that follow it
                publish(run.writer, spec, neighbors, weights, name=DEFAULT_WEIGHTS, kept=kept)
    run.observer(StageFinished(stage="publish", seconds=time.perf_counter() - started))
    for warning in weights.metadata["warnings"]:
        run.observer(Notice(message=warning))
    return weights


def _largest(*peaks: int | None) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _report(run: Run, spec: StoreSpec, neighbors: NeighborFiles, weights: WeightFiles) -> BuildReport:
    taken = run.writer.state.reuse
    dropped = sum(store.rows - store.found for store in taken.stores) if taken is not None else 0
    rarest, most_crowded = extremes(mean_distance(neighbors.distances_NK, run.config.weighting.k), 3)
    return BuildReport(
        store=run.writer.root,
        num_rows=spec.rows,
        pool=summarize(run.prompts, spec, run.writer.state, neighbors.groups_N),
        embedded_rows=run.embedded_rows,
        reused_rows=run.reused_rows,
        dropped_rows=dropped,
        embedded_tokens=run.embedded_tokens,
        stored_bytes=run.stored_bytes,
        seconds=run.seconds,
        metadata=weights.metadata,
        rarest=rarest,
        most_crowded=most_crowded,
        peak_anonymous_bytes=_largest(run.prompts_peak_bytes, run.meter.peak_anonymous_bytes),
        model_peak_bytes=run.model_peak_bytes,
        peak_file_bytes=run.meter.peak_file_bytes,
        worker_peak_bytes=run.worker_peak_bytes,
        worker_traffic_bytes=run.engine.traffic_bytes,
    )
