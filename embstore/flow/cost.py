"""What a build costs: rows of its chunks and windows, and the preflight, which refuses what cannot fit.

Everything that decides a byte is arithmetic; only the estimates of times are measured.
"""

from __future__ import annotations

from pathlib import Path

from embstore.core.config import K_MAX, BuildConfig, format_bytes, over_memory_budget
from embstore.core.errors import BudgetError
from embstore.core.events import PREPARATIONS, Preflight
from embstore.core.interfaces import Embedder
from embstore.core.records import PromptsRecord
from embstore.core.rows import chunk_rows_near, part_of_window
from embstore.core.spec import EmbeddingSpec, StoreSpec
from embstore.flow.first_checks import free_bytes_at
from embstore.flow.reuse import Reuse
from embstore.flow.run import RunContext

CHUNK_BYTES = 32 << 20
# A small store has smaller chunks, so that all cores work until its end and fewer new pages are touched.
_LEAST_CHUNKS, _SMALL_CHUNK_BYTES = 8, 4 << 20
_COPIED_BYTES_PER_SECOND = 300e6  # for the estimate: read, checked, decoded, encoded, written


def fit_rows(config: BuildConfig, embedder: Embedder, num_rows: int, reuse: Reuse) -> tuple[int, int]:
    """Rows per chunk and per window: near 32 MiB and about a minute, less for few rows or a small memory budget."""
    embedding = config.embedding
    row_bytes = 2 * embedder.spec.dimension
    chunk_bytes = min(CHUNK_BYTES, max(_SMALL_CHUNK_BYTES, num_rows * row_bytes // _LEAST_CHUNKS))

    def needs(chunk_rows: int) -> int:
        return embedder.memory_bytes(chunk_rows) + reuse.memory_bytes(chunk_rows)

    near = chunk_rows_near(row_bytes, chunk_bytes, num_rows=num_rows, max_rows=embedder.max_window_rows)
    chunk_rows = embedding.chunk_rows or _in_window(embedding.window_rows, near)
    while embedding.chunk_rows is None and near > 16 and needs(chunk_rows) > config.memory_budget_bytes:
        near = max(16, near // 2 // 16 * 16)
        chunk_rows = _in_window(embedding.window_rows, near)
    needed = needs(chunk_rows)
    if needed > config.memory_budget_bytes:
        raise over_memory_budget("embedding needs", needed, config.memory_budget_bytes)
    whole = -(-num_rows // chunk_rows) * chunk_rows
    window_rows = embedding.window_rows or min(max(1, embedder.max_window_rows // chunk_rows) * chunk_rows, whole)
    return chunk_rows, window_rows


def copied_rows(config: BuildConfig, old: StoreSpec) -> tuple[int, int]:
    """Rows per chunk and per window of a store whose rows are all copied: those of the old store, where none are chosen."""
    embedding = config.embedding
    chunk_rows = embedding.chunk_rows or _in_window(embedding.window_rows, old.chunk_rows)
    return chunk_rows, embedding.window_rows or max(1, old.window_rows // chunk_rows) * chunk_rows


def _in_window(window_rows: int | None, near: int) -> int:
    """Rows of a chunk near ``near``, which divide a chosen window."""
    return near if window_rows is None else part_of_window(window_rows, near)


def check_fits(
    context: RunContext,
    record: PromptsRecord,
    embedding: EmbeddingSpec,
    embedder: Embedder | None,
    reuse: Reuse,
    *,
    root: Path,
    chunk_rows: int,
) -> Preflight:
    """Report the plan of a new store; refuse it if it does not fit on the disk of ``root``, which may not be there yet."""
    from embstore.search.search_plan import exact_seconds, plan_search  # noqa: PLC0415 - hnswlib loads only where needed

    config, num_rows, free_bytes = context.config, record.rows, free_bytes_at(root)
    search = plan_search(
        num_rows,
        embedding.rank,
        config.density,
        threads=embedding.threads,
        memory_bytes=config.memory_budget_bytes,
    )
    row_bytes = 2 * embedding.dimension
    copies = 4 if config.density.center else 3  # coordinates, their centred copies, neighbours
    search_bytes = num_rows * (copies * 4 * embedding.rank + 16 * K_MAX)
    basis_bytes = 0
    if embedder is not None:
        is_sampled = embedding.basis == "range-finder"  # a dry run does not make it
        basis_bytes = 4 * embedding.dimension * embedding.rank if is_sampled else embedder.basis_VR.nbytes
    remaining_bytes = num_rows * row_bytes + search_bytes + basis_bytes
    seconds = (embedder.seconds_per_row if embedder else 0.0) * (num_rows - reuse.num_rows)
    seconds += reuse.num_rows * row_bytes / _COPIED_BYTES_PER_SECOND
    to_come = {"embed": seconds}
    if search.method == "exact" and context.device == "cpu" and not config.engine.is_remote:
        to_come["knn"] = exact_seconds(num_rows, embedding.rank, threads=embedding.threads)
    event = Preflight(
        num_rows=num_rows,
        remaining_rows=num_rows,
        quarantined_lines=record.quarantined,
        answered_lines=record.answered,
        turns=record.rule.turns,
        truncated_share=embedder.truncated_share if embedder else 0.0,
        dimension=embedding.dimension,
        head=embedding.head.kind,
        dtype=embedding.dtype,
        device=context.device,
        remaining_bytes=remaining_bytes,
        free_bytes=free_bytes,
        embed_memory_bytes=(embedder.memory_bytes(chunk_rows) if embedder else 0) + reuse.memory_bytes(chunk_rows),
        memory_budget_bytes=config.memory_budget_bytes,
        knn=search.method,
        num_shards=search.shards,
        seconds=seconds,
        stage_seconds={name: context.seconds[name] for name in PREPARATIONS if name in context.seconds} | to_come,
        reused_rows=reuse.num_rows,
        dropped_rows=reuse.dropped_rows,
    )
    context.observer(event)
    if remaining_bytes > free_bytes:
        raise BudgetError(
            f"the store may need {format_bytes(remaining_bytes)}, "
            f"but the disk of {root} has {format_bytes(free_bytes)} free",
            hint="free some space, choose another --out, or try --limit",
        )
    return event
