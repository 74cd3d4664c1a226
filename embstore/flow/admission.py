"""The spec of a run: everything that changes a byte, fixed once, or compared with what is fixed; refuse what cannot work.

Nothing in this module computes a row. A different input is refused before anything is written. A build that does not fit on
the disk or in the memory budget is refused before the first row (``flow.cost``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import DEFAULT_CHAT_DATE, BuildConfig, Compressor, EmbeddingConfig
from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    FieldMismatch,
    IdentityMismatchError,
)
from embstore.core.events import Notice, Preflight, stage
from embstore.core.files import file_problem
from embstore.core.format import FORMAT_VERSION, basis_file
from embstore.core.interfaces import Embedder, EmbedderSource, PromptReader
from embstore.core.plan import as_stored, grid_of, plan, refuse_drift, refuse_other_input
from embstore.core.prompts import Prompt
from embstore.core.records import DemotedRecord, DriftRecord, PromptsRecord
from embstore.core.spec import EmbeddingSpec, ModelIdentity, StoreSpec
from embstore.flow.cost import check_fits, copied_rows, fit_rows
from embstore.flow.first_checks import find_source
from embstore.flow.reuse import Reuse, match_rows, nothing_reused, open_again, open_reused, refuse_unlike
from embstore.flow.run import Run, RunContext
from embstore.flow.stage0 import begin_again
from embstore.flow.template_check import check_templates
from embstore.storage.filesystem import caveat
from embstore.storage.journal import NO_FOLDER_SYNC, run_entries
from embstore.storage.reader import EmbeddingStore, open_published
from embstore.storage.row_files import map_basis
from embstore.storage.verify import damaged_windows


def warn_of_place(run: Run) -> None:
    """Warn of what the store's file system does not guarantee: it is not a local disk, or cannot sync folders."""
    message = caveat(run.writer.root)
    if message is not None:
        run.observer(Notice(message=message))
    if not run.writer.syncs_folders:
        run.observer(Notice(message=f"the file system of {run.writer.root} {NO_FOLDER_SYNC}"))


def commit_spec(run: Run, record: PromptsRecord) -> tuple[StoreSpec, Embedder | None, Reuse]:
    """The pinned spec, an embedder if rows must be computed, and the stores from which others are copied.

    A different input is refused here, before anything is written; a store without a committed row is begun again by it.
    """
    writer = run.writer
    if writer.state.spec is not None:
        try:
            return _continue_spec(run)
        except (IdentityMismatchError, CorruptStoreError) as error:
            if not writer.may_begin_again:
                raise
            why = "; ".join(map(str, error.mismatches)) if isinstance(error, IdentityMismatchError) else str(error)
            begin_again(run, f"the settings differ ({why})", keeps_prompts=True)
    paths = run.config.reuse or (_reuse_of_last_run(writer.root) if writer.state.reuse is not None else ())
    if paths:
        return _create_reusing(run, record, paths)
    if run.source is None:
        raise ConfigError("no model was given", hint="add --model")
    return *_create_spec(run, record, run.source), nothing_reused(record.rows)


def _continue_spec(run: Run) -> tuple[StoreSpec, Embedder | None, Reuse]:
    writer, config = run.writer, run.config
    spec = writer.read_spec()
    if config.reuse and writer.state.reuse is None:
        raise IdentityMismatchError(
            [FieldMismatch(field="stores to reuse", stored="none", given=", ".join(config.reuse))],
            hint="resume without --reuse, or build into another --out",
        )
    remaining = plan(spec, writer.state).windows
    # an explicit device or thread count is compared even if no rows are left; versions make rows and nothing else
    asked = config.embedding.device not in (None, "auto") or config.embedding.threads is not None
    choose_device(run, spec.embedding, computes=bool(remaining))
    model = run.source.identity(run.observer) if run.source is not None else None
    hardware = None
    if run.source is not None and (remaining or asked):
        hardware = _hardware(run.source, config.embedding, spec.embedding)
        hardware = hardware if remaining else {**hardware, "versions": None}
    drifted = refuse_other_input(spec, config.embedding, model, hardware)
    if drifted and hardware is not None:
        if not config.allow_drift:
            refuse_drift(drifted)
        if remaining:
            fields = [each.field for each in drifted]
            run.observer(Notice(message=f"drift allowed in {', '.join(fields)}: the remaining rows may differ in low bits"))
            writer.commit(DriftRecord(fields=fields))
        # only in this run: the stored spec still describes the first rows
        spec = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, **hardware))  # type: ignore[arg-type]
    _refuse_unrecorded_date(run, spec.embedding, _prompts_of(run, spec, remaining))
    reuse = _open_reused_again(run, spec) if remaining else None
    run.log_start()
    _demote_damaged(run, spec)
    todo = plan(spec, writer.state)
    if not todo.windows:
        return spec, None, nothing_reused(spec.rows)
    reuse = reuse or _open_reused_again(run, spec)
    if all(reuse.count(todo.grid.window(window)) == todo.grid.window(window).num_rows for window in todo.windows):
        return spec, None, reuse
    if run.source is None:  # all rows were committed, but some were found damaged
        run.source = find_source(writer.root, writer.state, config, run.observer)
        run.compute_exactly(needs_torch=False)
    if run.source is None:
        raise ConfigError("rows must be computed, but no model was given", hint="add --model, a folder or a hub id")
    _refuse_unrecorded_date(run, spec.embedding, _prompts_of(run, spec, todo.windows))
    check_templates(run, run.source, run.prompts, reuse, spec.embedding.chat_date)
    if config.engine.is_remote:
        return spec, None, reuse  # workers load it
    embedder = run.source.reopen(
        spec.embedding,
        map_basis(writer.root, spec.embedding),
        memory_bytes=config.memory_budget_bytes,
        device=run.device,
        observer=run.observer,
    )
    return spec, embedder, reuse


def _refuse_unrecorded_date(
    run: RunContext, stored: EmbeddingSpec, computed: Iterable[Prompt], *, reused: str | None = None
) -> None:
    """Refuse to add chats to rows whose date is not recorded, if the chat template prints the current one."""
    if stored.chat_date is not None or run.source is None or all(prompt.messages is None for prompt in computed):
        return
    if run.source.reads_clock():
        given = "a chat template that prints the current date"
        raise IdentityMismatchError(
            [FieldMismatch(field="chat_date", stored="none recorded", given=given)],
            hint="new rows would contain another date than the stored ones: build into another --out without --reuse; it "
            "records its date",
            reused=reused,
        )


def _prompts_of(run: Run, spec: StoreSpec, windows: Sequence[int]) -> Iterator[Prompt]:
    grid = grid_of(spec)
    for window in windows:
        yield from run.prompts.read(grid.window(window))


def _create_spec(run: Run, record: PromptsRecord, source: EmbedderSource) -> tuple[StoreSpec, Embedder | None]:
    writer, config = run.writer, run.config
    prompts = run.prompts
    choose_device(run, None, computes=True)
    check_templates(run, source, prompts, nothing_reused(record.rows), config.embedding.chat_date or DEFAULT_CHAT_DATE)
    identity = source.identity(run.observer)
    planned = plan_new(run, source, prompts, record, root=writer.root, work=writer.work)
    compressor = config.embedding.compressor or "lz4"
    spec = _new_spec(record, identity, planned.embedding, planned.window_rows, planned.chunk_rows, compressor)
    run.log_start()
    return writer.create(spec, planned.basis_VR), planned.embedder


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRows:
    """How the rows of a new store come about; nothing is written yet. ``embedder`` is None if all rows are copied."""

    embedding: EmbeddingSpec
    embedder: Embedder | None
    basis_VR: NDArray[np.float32]
    chunk_rows: int
    window_rows: int
    preflight: Preflight


def plan_new(
    context: RunContext,
    source: EmbedderSource,
    prompts: PromptReader,
    record: PromptsRecord,
    *,
    root: Path,
    work: Path | None,
) -> PlannedRows:
    """The plan of a store at ``root`` whose rows are all computed; ``work`` is that of ``EmbedderSource.create``.

    Raises
    ------
    BudgetError, ModelError, RowError
        It does not fit, or the model cannot be used with these prompts.
    """
    config, reuse = context.config, nothing_reused(record.rows)
    embedder = source.create(
        prompts,
        dataclasses.replace(_shared_cores(config, source), device=context.device),
        memory_bytes=config.memory_budget_bytes,
        work=work,
        observer=context.observer,
    )
    chunk_rows, window_rows = fit_rows(config, embedder, record.rows, reuse)
    return PlannedRows(
        embedding=embedder.spec,
        embedder=embedder,
        basis_VR=embedder.basis_VR,
        chunk_rows=chunk_rows,
        window_rows=window_rows,
        preflight=check_fits(context, record, embedder.spec, embedder, reuse, root=root, chunk_rows=chunk_rows),
    )


def _new_spec(
    record: PromptsRecord,
    model: ModelIdentity,
    embedding: EmbeddingSpec,
    window_rows: int,
    chunk_rows: int,
    compressor: Compressor,
) -> StoreSpec:
    """The spec that the writer completes with the digest of the basis."""
    return StoreSpec(
        format_version=FORMAT_VERSION,
        rows=record.rows,
        prompts_fingerprint=record.fingerprint,
        model=model,
        embedding=embedding,
        window_rows=window_rows,
        chunk_rows=chunk_rows,
        compressor=compressor,
        basis_sha256="",
    )


def choose_device(run: RunContext, stored: EmbeddingSpec | None, *, computes: bool) -> None:
    """Where this run computes, once and with its index: as the options say, else on a device of the stored kind.

    Where only the search is left, the rows' device need not be here: the search takes the CPU then.
    """
    given = run.config.embedding.device
    name = given or (stored.device if stored is not None else "auto")
    if run.source is not None and (computes or given not in (None, "auto")):
        run.device = run.source.device(name)
    elif stored is not None:
        run.device = stored.device if name == "auto" else name


def _hardware(source: EmbedderSource, config: EmbeddingConfig, stored: EmbeddingSpec) -> dict[str, object]:
    """Hardware of this run, on the device and threads of a store where none were given."""
    asked = dataclasses.replace(config, device=config.device or stored.device, threads=config.threads or stored.threads)
    return as_stored(source.hardware(asked), stored)


def _shared_cores(config: BuildConfig, source: EmbedderSource) -> EmbeddingConfig:
    """The embedding's options; workers of one machine share its cores if no thread count was given."""
    engine, embedding = config.engine, config.embedding
    workers = engine.num_workers or len(engine.devices)
    if embedding.threads is not None or engine.ray_address is not None or workers < 2:
        return embedding
    cores = source.hardware(embedding)["threads"]
    return dataclasses.replace(embedding, threads=max(1, int(str(cores)) // workers))


def _create_reusing(run: Run, record: PromptsRecord, paths: Sequence[str]) -> tuple[StoreSpec, Embedder | None, Reuse]:
    """A new store with the settings of old ones; only the sizes of windows and chunks are chosen again."""
    writer, config = run.writer, run.config
    prompts = run.prompts
    stores = open_reused(paths, writer.root)
    refuse_other_turns(record, stores)
    with stage(run.observer, "reuse", record.rows, "prompts"):
        reuse = match_rows(
            prompts, stores, folder=writer.work, memory_bytes=config.memory_budget_bytes, observer=run.observer
        )
    computed = (prompt for row, prompt in enumerate(prompts) if reuse.store_N[row] < 0)
    settled = settle_reused(run, record, reuse, computed)
    if record.rows > reuse.num_rows and run.source is not None:
        check_templates(run, run.source, prompts, reuse, settled.old.embedding.chat_date)
    planned = plan_reusing(run, record, prompts, reuse, settled, root=writer.root)
    compressor = config.embedding.compressor or settled.old.compressor
    model, embedding = settled.model or settled.old.model, settled.old.embedding
    spec = _new_spec(record, model, embedding, planned.window_rows, planned.chunk_rows, compressor)
    run.log_start()
    if writer.state.reuse != reuse.record:
        writer.commit(reuse.record)  # before the spec, so that a store with a spec always shows whether rows are copied
    spec = writer.create(spec, planned.basis_VR)
    if settled.drifted:
        fields = [each.field for each in settled.drifted]
        run.observer(Notice(message=f"drift allowed in {', '.join(fields)}: computed rows may differ in low bits"))
        writer.commit(DriftRecord(fields=fields))
    return spec, planned.embedder, reuse


@dataclass(frozen=True, kw_only=True, slots=True)
class SettledReuse:
    """Settings under which rows are copied and others are computed: those of ``old``, with the hardware of this run."""

    old: StoreSpec
    embedding: EmbeddingSpec  # only in this run: the stored one describes the copied rows
    model: ModelIdentity | None
    drifted: list[FieldMismatch]


def settle_reused(context: RunContext, record: PromptsRecord, reuse: Reuse, computed: Iterable[Prompt]) -> SettledReuse:
    """Compare options, model and hardware with the stores of ``reuse``; ``computed`` are prompts that they do not have.

    Raises
    ------
    IdentityMismatchError, ConfigError, CorruptStoreError
        Rows of these stores and computed ones do not belong together, there is no model, or a basis is damaged.
    """
    stores, config, source = reuse.stores, context.config, context.source
    old = _common_spec(stores)
    num_computed = record.rows - reuse.num_rows
    if num_computed and source is None:
        raise ConfigError(
            f"{num_computed} prompts are not in the stores to reuse, and no model was given",
            hint="add --model, a folder or a hub id",
        )
    choose_device(context, old.embedding, computes=num_computed > 0)
    model = source.identity(context.observer) if source is not None else None
    hardware = None
    if source is not None and num_computed:
        hardware = _hardware(source, config.embedding, old.embedding)
    drifted = refuse_unlike(stores, config, model, hardware)
    _refuse_unrecorded_date(context, old.embedding, computed, reused=str(stores[0].root))
    embedding = dataclasses.replace(old.embedding, **hardware) if hardware is not None else old.embedding  # type: ignore[arg-type]
    name = basis_file(old.embedding.basis)
    problem = file_problem(stores[0].root, name, stores[0].committed_digest(name))
    if problem is not None:
        raise CorruptStoreError(f"{stores[0].root}/{name} {problem}", hint=f"run embstore verify {stores[0].root}")
    return SettledReuse(old=old, embedding=embedding, model=model, drifted=drifted)


def plan_reusing(
    context: RunContext, record: PromptsRecord, prompts: PromptReader, reuse: Reuse, settled: SettledReuse, *, root: Path
) -> PlannedRows:
    """The plan of a store at ``root`` that copies rows; the model is loaded if it has to compute any."""
    config, old = context.config, settled.old
    basis_VR = map_basis(reuse.stores[0].root, old.embedding)
    embedder = None
    chunk_rows, window_rows = copied_rows(config, old)
    if record.rows > reuse.num_rows and context.source is not None:
        embedder = context.source.take_over(
            prompts,
            settled.embedding,
            basis_VR,
            memory_bytes=config.memory_budget_bytes,
            device=context.device,
            observer=context.observer,
        )
        chunk_rows, window_rows = fit_rows(config, embedder, record.rows, reuse)
    return PlannedRows(
        embedding=old.embedding,
        embedder=embedder,
        basis_VR=basis_VR,
        chunk_rows=chunk_rows,
        window_rows=window_rows,
        preflight=check_fits(context, record, old.embedding, embedder, reuse, root=root, chunk_rows=chunk_rows),
    )


def _common_spec(stores: Sequence[EmbeddingStore]) -> StoreSpec:
    """The first store's spec, without a date of chats where one of the stores has not recorded its own."""
    spec = stores[0].spec
    if all(store.spec.embedding.chat_date is not None for store in stores):
        return spec
    return dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, chat_date=None))


def refuse_other_turns(record: PromptsRecord, stores: Sequence[EmbeddingStore]) -> None:
    """Rows of whole chats and of their beginnings do not belong into one store."""
    for store in stores:
        old = store.journal.prompts
        if old is not None and old.rule.turns != record.rule.turns:
            raise IdentityMismatchError(
                [FieldMismatch(field="turns", stored=old.rule.turns, given=record.rule.turns)],
                hint=f"add --turns {old.rule.turns}, or build without --reuse",
                reused=str(store.root),
            )


def _open_reused_again(run: Run, spec: StoreSpec) -> Reuse:
    """On a resume, the sources of the remaining rows; without the old stores they are computed if drift is allowed."""
    record = run.writer.state.reuse
    if record is None:
        return nothing_reused(spec.rows)
    paths = run.config.reuse or _reuse_of_last_run(run.writer.root)
    try:
        stores = open_again(paths, run.writer.root, record)
    except IdentityMismatchError as error:
        if not run.config.allow_drift:
            raise
        message = "; ".join(str(mismatch) for mismatch in error.mismatches)
        run.observer(Notice(message=f"drift allowed: rows that should be copied are computed instead ({message})"))
        run.writer.commit(DriftRecord(fields=["reuse"]))
        return nothing_reused(spec.rows)
    with stage(run.observer, "reuse", spec.rows, "prompts"):
        return match_rows(
            run.prompts,
            stores,
            folder=run.writer.work,
            memory_bytes=run.config.memory_budget_bytes,
            observer=run.observer,
        )


def _reuse_of_last_run(root: Path) -> tuple[str, ...]:
    for entry in reversed(run_entries(root)):
        paths = entry.get("reuse")
        if isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths):
            return tuple(paths)
    return ()


def _demote_damaged(run: Run, spec: StoreSpec) -> None:
    """Read committed windows back before anything is added; damaged ones are computed again."""
    if run.config.trust_journal or open_published(run.writer.root) is not None:
        return  # finished stores are checked by verify
    state = run.writer.state
    with stage(run.observer, "readback", len(state.windows), "windows") as advance:
        for window, finding in damaged_windows(run.writer.root, spec, state, advance):
            run.observer(Notice(message=f"{finding}; window {window} will be computed again"))
            run.writer.commit(DemotedRecord(window=window, reason=finding))
