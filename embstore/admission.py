"""What may be built here: prompts and identity committed or compared, cost stated, everything else refused.

Nothing in this module computes a row. A different input is refused before anything is written; what cannot fit on the disk
or in the memory budget is refused before the first row.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from embstore.core.config import K_MAX, BuildConfig, DensityConfig, format_bytes
from embstore.core.embedder import Embedder, EmbedderSource
from embstore.core.errors import BudgetError, ConfigError, CorruptStoreError, FieldMismatch, IdentityMismatchError
from embstore.core.events import Notice, Preflight
from embstore.core.format import BASIS, FORMAT_VERSION, MANIFEST, PROMPTS, StoreSpec
from embstore.core.plan import BuildPlan, plan, refuse_drift, refuse_other_input
from embstore.core.records import DemotedRecord, DriftRecord, PromptsRecord
from embstore.core.rows import chunk_rows_near
from embstore.run import Run
from embstore.storage.arrays import map_array
from embstore.storage.journal import run_entries
from embstore.storage.place import caveat
from embstore.storage.prompts import PromptSource, PromptTable, ingest
from embstore.storage.store import open_published
from embstore.storage.verify import check_stage0, damaged_windows

if TYPE_CHECKING:
    from embstore.compute.search_plan import SearchPlan

# Searches of fewer rows take seconds: not worth a second to foretell.
_PROBED_ROWS = 20_000

CHUNK_BYTES = 32 << 20


def warn_of_place(run: Run) -> None:
    """Say what the file system below the store does not promise, if it is no local disk."""
    message = caveat(run.writer.root)
    if message is not None:
        run.observer(Notice(message=message))


# --- stage 0: prompts ------------------------------------------------------------------------------------------------


def commit_prompts(run: Run, source: PromptSource | None) -> PromptsRecord:
    """Canonical rows in the store; on a resume, the given file must still give the same rows."""
    writer, config = run.writer, run.config
    _refuse_lost_journal(run)
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


def _refuse_lost_journal(run: Run) -> None:
    """A manifest stands only over a whole journal: nothing is computed again under what readers still follow."""
    finished = open_published(run.writer.root)
    committed = run.writer.state.committed_rows
    if finished is not None and committed != finished.num_rows:
        raise CorruptStoreError(
            f"{MANIFEST} publishes {finished.num_rows} rows, the journal commits {committed}: it lost its end",
            hint="restore journal.jsonl from a copy of the store, or run embstore verify STORE --repair and then "
            "embstore build PROMPTS --resume, which computes again what the journal lost; readers are served until then",
        )


def _refuse_other_prompts(root: Path, record: PromptsRecord, source: PromptSource, config: BuildConfig) -> None:
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


def find_source(run: Run) -> EmbedderSource | None:
    """The model named by the options, or by the last run; None when every row is committed and none was named."""
    from embstore.compute.models import locate_model  # noqa: PLC0415 - torch loads only where rows may be computed
    from embstore.compute.source import TorchSource  # noqa: PLC0415

    embedding = run.config.embedding
    state = run.writer.state
    if embedding.model is None:
        if state.spec is not None and not plan(run.writer.read_spec(), state).windows:
            return None
        if state.spec is not None and run.writer.read_spec().embedding.head == "imported":
            raise ConfigError(
                f"{run.writer.root} was made from an array, and some of its rows remain",
                hint="run embstore import ARRAY --resume with the same --out",
            )
        model, revision = _model_of_last_run(run.writer.root)
        embedding = dataclasses.replace(embedding, model=model, revision=revision)
    return TorchSource(locate_model(embedding))


def _model_of_last_run(root: Path) -> tuple[str, str | None]:
    for entry in reversed(run_entries(root)):
        model, revision = entry.get("model"), entry.get("revision")
        if model and isinstance(model, str) and isinstance(revision, str | None):
            return model, revision
    raise ConfigError("no model was given", hint="add --model, a folder or a hub id such as org/name")


def commit_spec(run: Run, record: PromptsRecord) -> tuple[StoreSpec, Embedder | None]:
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
        if remaining:
            run.observer(Notice(message=f"drift allowed in {', '.join(drifted)}: rows may differ in low bits from here on"))
            writer.commit(DriftRecord(fields=drifted))
        # only this run's copy: the stored spec stays what the first rows were made with
        spec = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, **hardware))  # type: ignore[arg-type]
    run.log_start()
    _demote_damaged(run, spec)
    if not plan(spec, writer.state).windows:
        return spec, None
    run.source = run.source or find_source(run)  # every row was committed, then some were found damaged
    if run.source is None:
        raise AssertionError("rows remain, so there is a model to compute them")
    with run.stage("model"):
        # copy-on-write mapping: torch takes no read-only array, and nothing writes to it
        shape = (spec.embedding.dimension, spec.embedding.rank)
        return spec, run.source.reopen(spec.embedding, map_array(writer.root, BASIS, "<f4", shape, mode="c"))


def _create_spec(run: Run, record: PromptsRecord, source: EmbedderSource) -> tuple[StoreSpec, Embedder]:
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
    check_fits(run, spec, embedder, plan(spec, writer.state), shutil.disk_usage(writer.root).free)
    run.log_start()
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


def check_fits(run: Run, spec: StoreSpec, embedder: Embedder, todo: BuildPlan, free_bytes: int) -> Preflight:
    """Say what is about to happen; refuse what cannot fit on the disk or in the budget."""
    from embstore.compute.search_plan import plan_search  # noqa: PLC0415 - hnswlib loads only where it is needed

    search = plan_search(
        spec.rows,
        spec.embedding.rank,
        run.config.density,
        threads=spec.embedding.threads,
        memory_bytes=run.config.memory_budget_bytes,
    )
    row_bytes = 2 * spec.embedding.dimension
    copies = 4 if run.config.density.center else 3  # coordinates, their centred copies, neighbours
    beside = spec.rows * (copies * 4 * spec.embedding.rank + 16 * K_MAX)
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
        knn=search.method,
        num_shards=search.shards,
        search_seconds=_search_seconds(search, spec, run.config.density),
        seconds=embedder.seconds_per_row * todo.remaining_rows,
    )
    run.observer(event)
    if remaining_bytes > free_bytes:
        raise BudgetError(
            f"the store may need {format_bytes(remaining_bytes)}, {run.writer.root} has {format_bytes(free_bytes)} free",
            hint="free some space, choose another --out, or try --limit",
        )
    return event


def _search_seconds(search: SearchPlan, spec: StoreSpec, density: DensityConfig) -> dict[str, float]:
    if spec.rows < _PROBED_ROWS:
        return {}
    from embstore.compute.search_probe import estimate_seconds  # noqa: PLC0415

    return estimate_seconds(search, spec.rows, spec.embedding.rank, density, threads=spec.embedding.threads)


def _demote_damaged(run: Run, spec: StoreSpec) -> None:
    """Committed windows must still be what was committed before anything is added to them."""
    if run.config.trust_journal or open_published(run.writer.root) is not None:
        return  # a finished store is verify's business
    for window, finding in damaged_windows(run.writer.root, spec, run.writer.state):
        run.observer(Notice(message=f"{finding}; window {window} is computed again"))
        run.writer.commit(DemotedRecord(window=window, reason=finding))
