"""Which engine a search uses, how it is cut, what memory it takes: decided by arithmetic before it starts.

Nothing is decided by a clock (docs/decisions/0003): the same rows, options, budget and hardware always give the same plan.

Shapes: N rows, R coordinates, K neighbours kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embstore.core.config import K_MAX, DensityConfig, over_memory_budget
from embstore.search.distances import rerank_bytes
from embstore.search.exact.pairwise import brute_force_bytes
from embstore.search.hnsw.shards import graph_bytes, num_shards, query_bytes

Method = Literal["hnsw", "exact", "pilot"]

# Up to this many nodes float64 brute force takes less time than torch takes to load.
SMALL_NODES = 4096
# Multiply-adds (N^2 R) up to which `auto` takes the exact engine without a pilot: half an hour on two cores, for a million
# rows of 256 coordinates or 270,000 of 4,097 (docs/decisions/0036).
AUTO_EXACT_WORK = 3.0e14
# Multiply-adds (N^2 R) a core and second of the exact engine (docs/scaling.md); processors differ by a few times.
_EXACT_WORK_PER_SECOND = 6e10
# Anonymous bytes a row: node numbers, hashes and their order, half norms, flags.
_ROW_BYTES = 72
_FIXED_BYTES = 32 << 20  # thread pools, visited lists, allocator slack
_SMALL_ARRAYS_BYTES = 24 << 20  # six arrays a row that are mapped files only when they are large


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """What the search will do. ``pilot``: HNSW if it finds nearly everything in a sample, else exact.

    ``scan_memory_bytes``: the part of the budget that is available to an exact scan.
    """

    method: Method
    shards: int
    memory_bytes: int
    scan_memory_bytes: int


def plan_search(num_rows: int, rank: int, config: DensityConfig, *, threads: int, memory_bytes: int) -> SearchPlan:
    """Engine, shards and memory of the search under a budget.

    Raises
    ------
    BudgetError
        The budget is too small for a graph of 64 rows and its buffers; the message has the least that suffices.
    """
    held_bytes = _held_bytes(num_rows)
    scan_memory = max(0, memory_bytes - held_bytes)
    needed = held_bytes + _scan_needs(num_rows, rank, threads=threads, memory_bytes=scan_memory)
    method = _method(num_rows, rank, config)
    shards = 0
    if method != "exact":
        shards = _hnsw_shards(num_rows, rank, config, threads=threads, memory_bytes=memory_bytes)
        graphs = min(threads, shards) * graph_bytes(-(-num_rows // shards), rank, config.links)
        needed = max(needed, graphs + _hnsw_buffers(num_rows, rank, threads))
    if needed > memory_bytes:
        raise over_memory_budget("the neighbour search needs", needed, memory_bytes)
    return SearchPlan(method=method, shards=shards, memory_bytes=needed, scan_memory_bytes=scan_memory)


def exact_seconds(num_rows: int, rank: int, *, threads: int) -> float:
    """About how long the exact engine takes on ``threads`` cores, for the preflight; nothing is decided by it."""
    return num_rows**2 * rank / (_EXACT_WORK_PER_SECOND * threads)


def _hnsw_shards(num_rows: int, rank: int, config: DensityConfig, *, threads: int, memory_bytes: int) -> int:
    """Graphs to cut the rows into: as configured, else as few as memory and cores allow."""
    smallest = threads * graph_bytes(64, rank, config.links)
    memory_bytes = max(smallest, memory_bytes - _hnsw_buffers(num_rows, rank, threads))
    return config.shards or num_shards(num_rows, rank, config.links, threads=threads, memory_bytes=memory_bytes)


def _held_bytes(num_rows: int) -> int:
    """Memory that every search takes."""
    return num_rows * _ROW_BYTES + min(_SMALL_ARRAYS_BYTES, 6 * 132 * num_rows) + _FIXED_BYTES


def _hnsw_buffers(num_rows: int, rank: int, threads: int) -> int:
    """Memory in addition to the graphs."""
    return _held_bytes(num_rows) + query_bytes(rank, K_MAX + 1) + threads * rerank_bytes(rank, K_MAX + 1)


def _method(num_rows: int, rank: int, config: DensityConfig) -> Method:
    if config.knn != "auto":
        return config.knn
    return "exact" if num_rows**2 * rank <= AUTO_EXACT_WORK else "pilot"


def _scan_needs(num_rows: int, rank: int, *, threads: int, memory_bytes: int) -> int:
    """Memory of the exact engine or of brute force: every search may end with one of them, for repairs or as a whole."""
    if num_rows <= SMALL_NODES:
        return brute_force_bytes(rank, K_MAX)
    from embstore.search.exact.scan import plan_scan  # noqa: PLC0415 - torch, which small searches do not need

    return plan_scan(num_rows, rank, K_MAX, threads=threads, memory_bytes=memory_bytes).memory_bytes
