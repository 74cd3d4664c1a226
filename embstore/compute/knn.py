"""From coordinates to an audited neighbour graph: group, centre, search, re-rank, audit, repair.

Follows docs/decisions/0006: distances are taken between centred coordinates, candidates come from HNSW shards or an exact
scan, final distances are float64 direct differences with ties by row. Rows with bit-equal vectors are one node, so k
neighbours means k *distinct vectors* and copies cannot sink a graph. Every graph is audited on fresh rows; below target the
effort is raised, and what still falls short is stated.

Shapes: N rows, G nodes (distinct vectors), K neighbours kept, R coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.compute.audit import Audit, compare, sample_nodes
from embstore.compute.exact import exact_neighbors, rerank, rerank_bytes, scan_bytes
from embstore.compute.hnsw import Effort, graph_bytes, hnsw_candidates, num_shards, query_bytes
from embstore.core.config import K_MAX, DensityConfig, format_bytes
from embstore.core.errors import BudgetError
from embstore.core.events import Notice, Observer, StageAdvanced, StageFinished, StageStarted

AUDIT_K = 10
_BLOCK_ROWS = 8192
# The exact scan is the last rung of the effort ladder while it takes minutes, not hours (N^2 R multiply-adds).
_EXACT_RUNG_NODES = 200_000
_REPAIRED_SHARE = 0.05
# Anonymous bytes a row: candidates with distances, ranked nodes in float64, the result, and the hash that groups it.
_ROW_BYTES = (K_MAX + 1) * (4 + 4) + K_MAX * (4 + 8) + K_MAX * (4 + 4) + 200
_FIXED_BYTES = 32 << 20  # thread pools, visited lists, allocator slack


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """What the search will do: decided before it starts, recorded with the result."""

    method: str
    shards: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnGraph:
    """Nearest distinct vectors of every row.

    ``ids_NK`` int32 rows (-1 none), ``distances_NK`` float32 metric (+inf none), both ascending by distance, self and own
    group excluded. ``groups_N`` int32: the first row with the same vector (-1 for failed rows). ``audit`` is None when
    there are too few distinct vectors to have neighbours. ``meets_target``: the audit reached recall and TV targets.
    """

    ids_NK: NDArray[np.int32]
    distances_NK: NDArray[np.float32]
    groups_N: NDArray[np.int32]
    num_nodes: int
    shards: int
    effort: Effort | None
    audit: Audit | None
    meets_target: bool
    repaired_nodes: int


def plan_search(num_rows: int, rank: int, config: DensityConfig, *, threads: int, memory_bytes: int) -> SearchPlan:
    """Shards and memory of the search under a budget.

    Raises
    ------
    BudgetError
        The budget holds neither a graph of 64 rows nor the buffers around it; names the least that would do.
    """
    held_bytes = num_rows * _ROW_BYTES + _FIXED_BYTES
    audit_bytes = held_bytes + scan_bytes(rank, K_MAX)
    if config.knn == "exact":
        return _fitting(SearchPlan(method="exact", shards=0, memory_bytes=audit_bytes), memory_bytes)
    buffers = held_bytes + query_bytes(rank, K_MAX + 1) + rerank_bytes(rank, K_MAX + 1)
    smallest = threads * graph_bytes(64, rank, config.links)
    shards = config.shards or num_shards(
        num_rows, rank, config.links, threads=threads, memory_bytes=max(smallest, memory_bytes - buffers)
    )
    in_flight = min(threads, shards)
    graphs = in_flight * graph_bytes(-(-num_rows // shards), rank, config.links)
    return _fitting(SearchPlan(method="hnsw", shards=shards, memory_bytes=max(graphs + buffers, audit_bytes)), memory_bytes)


def _fitting(plan: SearchPlan, memory_bytes: int) -> SearchPlan:
    if plan.memory_bytes > memory_bytes:
        raise BudgetError(
            f"the neighbour search needs {format_bytes(plan.memory_bytes)}, --memory-budget is {format_bytes(memory_bytes)}",
            hint=f"give --memory-budget {-(-plan.memory_bytes // (1 << 20))}MiB or more",
        )
    return plan


def build_graph(
    coord_NR: NDArray[np.float32],
    failed_N: NDArray[np.bool_],
    config: DensityConfig,
    *,
    threads: int,
    memory_bytes: int,
    work: Path,
    observer: Observer,
    clock: Callable[[], float],
) -> KnnGraph:
    """Neighbours of every row; see the module docstring.

    Parameters
    ----------
    coord_NR
        float32 [N, R] coordinates as stored (uncentred); may be a memory map. Failed rows are ignored.
    failed_N
        Rows without a vector.
    threads, memory_bytes
        Cores to use, and anonymous memory the search may take.
    work
        Scratch folder on the store's disk: the centred copy is mapped, not held.
    clock
        Seconds, for the events.
    """
    rows_G, node_N = group_rows(coord_NR, failed_N)
    num_nodes = len(rows_G)
    plan = plan_search(num_nodes, coord_NR.shape[1], config, threads=threads, memory_bytes=memory_bytes)
    started = clock()
    passes = plan.shards + 1 if plan.method == "hnsw" else 1
    observer(StageStarted(stage="knn", total=num_nodes * passes, unit="node visits"))
    coord_GR = _centred(coord_NR, rows_G, work)
    search = _Search(coord_GR, config, plan, threads, observer)
    ids_GK, distances_GK = search.run(0)
    observer(StageFinished(stage="knn", seconds=clock() - started))
    started = clock()
    observer(StageStarted(stage="audit", total=min(num_nodes, config.audit_rows)))
    ids_GK, distances_GK, audit, meets_target = _raise_until_met(search, ids_GK, distances_GK, config, observer)
    repaired = _repair(search, ids_GK, distances_GK) if search.used is not None and num_nodes > 1 else 0
    observer(StageFinished(stage="audit", seconds=clock() - started))
    ids_NK, distances_NK = _expand(ids_GK, distances_GK, rows_G, node_N)
    return KnnGraph(
        ids_NK=ids_NK,
        distances_NK=distances_NK,
        groups_N=np.where(node_N >= 0, rows_G[node_N] if num_nodes else -1, -1).astype(np.int32),
        num_nodes=num_nodes,
        shards=plan.shards,
        effort=search.used,
        audit=audit,
        meets_target=meets_target,
        repaired_nodes=repaired,
    )


def group_rows(coord_NR: NDArray[np.float32], failed_N: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group rows with bit-equal vectors.

    Returns
    -------
    rows_G, node_N
        The first row of each distinct vector, ascending; each row's node (-1 for failed rows). Price: one sequential read
        and a 16-byte hash a row.
    """
    node_of: dict[bytes, int] = {}
    rows: list[int] = []
    node_N = np.full(len(coord_NR), -1, dtype=np.int64)
    for start in range(0, len(coord_NR), _BLOCK_ROWS):
        block = np.ascontiguousarray(coord_NR[start : start + _BLOCK_ROWS]) + np.float32(0)  # -0.0 becomes 0.0
        for row, vector in enumerate(block, start=start):
            if failed_N[row]:
                continue
            node = node_of.setdefault(hashlib.blake2b(vector.data, digest_size=16).digest(), len(rows))
            if node == len(rows):
                rows.append(row)
            node_N[row] = node
    return np.asarray(rows, dtype=np.int64), node_N


class _Search:
    """One search configuration over fixed nodes, run at rising effort levels."""

    def __init__(
        self, coord_GR: NDArray[np.float32], config: DensityConfig, plan: SearchPlan, threads: int, observer: Observer
    ) -> None:
        self.coord_GR = coord_GR
        self.config = config
        self.plan = plan
        self.threads = threads
        self.observer = observer
        self.used: Effort | None = None  # of the last run; None: exact
        self.missed_self_G = np.zeros(len(coord_GR), dtype=np.bool_)

    @property
    def ladder(self) -> list[Effort | None]:
        """Efforts to try, lowest first; None is the exact scan."""
        if self.plan.method == "exact":
            return [None]
        config = self.config
        first = Effort(links=config.links, ef_construction=config.ef_construction, ef=config.ef)
        rungs: list[Effort | None] = [
            first,
            Effort(links=first.links, ef_construction=first.ef_construction, ef=4 * first.ef),
            Effort(links=2 * first.links, ef_construction=4 * first.ef_construction, ef=8 * first.ef),
        ]
        return [*rungs, None] if len(self.coord_GR) <= _EXACT_RUNG_NODES else rungs

    def run(self, level: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Neighbours of all nodes at one effort level."""

        def advance(count: int) -> None:
            self.observer(StageAdvanced(stage="knn", count=count))

        self.used = rung = self.ladder[level]
        every_node = np.arange(len(self.coord_GR))
        if rung is None:
            return exact_neighbors(self.coord_GR, every_node, K_MAX, advance=advance)
        found = hnsw_candidates(
            self.coord_GR,
            K_MAX + 1,
            effort=rung,
            shards=self.plan.shards,
            threads=self.threads,
            seed=self.config.seed,
            advance=advance,
        )
        self.missed_self_G = found.missed_self_G
        return rerank(self.coord_GR, every_node, found.ids_GC, K_MAX)

    def audit(self, distances_GK: NDArray[np.float64], level: int) -> Audit | None:
        """Audit a result on a fresh sample; None when a node has fewer than AUDIT_K others."""
        if len(self.coord_GR) <= AUDIT_K:
            return None
        sample = sample_nodes(len(self.coord_GR), self.config.audit_rows, seed=self.config.seed, level=level)
        exact = exact_neighbors(self.coord_GR, sample, AUDIT_K, double=True)[1]
        return compare(distances_GK[sample, :AUDIT_K], exact, num_nodes=len(self.coord_GR))


def _raise_until_met(
    search: _Search,
    ids_GK: NDArray[np.int32],
    distances_GK: NDArray[np.float64],
    config: DensityConfig,
    observer: Observer,
) -> tuple[NDArray[np.int32], NDArray[np.float64], Audit | None, bool]:
    ladder = search.ladder
    audit = search.audit(distances_GK, 0)
    for level in range(1, len(ladder) + 1):
        if audit is None or _meets(audit, config):
            return ids_GK, distances_GK, audit, True
        seen = f"recall@{audit.k} lower bound {audit.recall_lower:.5f} (target {config.target_recall}), TV {audit.tv:.1e}"
        if level == len(ladder):
            break
        rung = ladder[level]
        observer(Notice(message=f"audit: {seen}; searching again, {'exactly' if rung is None else rung}"))
        ids_GK, distances_GK = search.run(level)
        audit = search.audit(distances_GK, level)
    observer(Notice(message=f"audit: {seen}: the target is NOT met at the highest effort; metadata says so"))
    return ids_GK, distances_GK, audit, False


def _meets(audit: Audit, config: DensityConfig) -> bool:
    return audit.recall_lower >= config.target_recall and audit.tv <= config.target_tv


def _repair(search: _Search, ids_GK: NDArray[np.int32], distances_GK: NDArray[np.float64]) -> int:
    """Recompute exactly, in place, the nodes where a miss matters most: top weights, and nodes that missed themselves.

    HNSW errs on one side (distances too large) and most on isolated nodes, which get the largest weights.
    """
    k = min(AUDIT_K, len(search.coord_GR) - 1)
    mean_G = distances_GK[:, :k].mean(axis=1)
    top = np.argsort(-mean_G, kind="stable")[: int(_REPAIRED_SHARE * len(mean_G))]
    nodes = np.union1d(top, np.flatnonzero(search.missed_self_G))
    ids_GK[nodes], distances_GK[nodes] = exact_neighbors(search.coord_GR, nodes, K_MAX)
    return len(nodes)


def _centred(coord_NR: NDArray[np.float32], rows_G: NDArray[np.int64], work: Path) -> NDArray[np.float32]:
    """float32 [G, R] of the nodes minus their mean, as a scratch memory map: its pages are not anonymous memory."""
    rank = coord_NR.shape[1]
    total_R = np.zeros(rank)
    for start in range(0, len(rows_G), _BLOCK_ROWS):
        total_R += coord_NR[rows_G[start : start + _BLOCK_ROWS]].sum(axis=0, dtype=np.float64)
    mean_R = total_R / max(1, len(rows_G))
    # written, then mapped: a full disk is an error from write, but a bus error from a mapped page
    shape = (len(rows_G), rank)
    with (work / "centred.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, len(rows_G), _BLOCK_ROWS):
            block = coord_NR[rows_G[start : start + _BLOCK_ROWS]].astype(np.float64) - mean_R
            file.write(block.astype("<f4").data.cast("B"))
    if not len(rows_G):
        return np.empty(shape, dtype=np.float32)
    centred_GR: NDArray[np.float32] = np.load(work / "centred.npy", mmap_mode="r", allow_pickle=False)
    return centred_GR


def _expand(
    ids_GK: NDArray[np.int32], distances_GK: NDArray[np.float64], rows_G: NDArray[np.int64], node_N: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Node neighbours as row neighbours: every member of a group gets its node's, each node named by its first row."""
    shape = (len(node_N), ids_GK.shape[1])
    ids_NK = np.full(shape, -1, dtype=np.int32)
    distances_NK = np.full(shape, np.inf, dtype=np.float32)
    valid = node_N >= 0
    if len(rows_G):
        nearest = ids_GK[node_N[valid]]
        ids_NK[valid] = np.where(nearest >= 0, rows_G[nearest], -1)
        distances_NK[valid] = distances_GK[node_N[valid]]
    return ids_NK, distances_NK
