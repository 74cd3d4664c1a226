"""Exact neighbours of all nodes, in any memory: tiles find candidates, a bound proves them, float64 ranks them.

One product of quantised rows scores a tile (``tiles``); the best 2 k of each row are its candidates. Those that can
be among the k nearest, given what quantisation may have done to their scores, are ranked by float64 direct differences.
Rows whose candidates do not settle the answer are scanned again with 256 of them, and by float64 brute force (``pairwise``)
if these do not either. The result is therefore *the* answer, ties by index: the same for every tile size, thread count,
memory and device.

While the candidates of all rows fit the memory, every tile serves its rows and its columns: half the products. Nodes are
taken in a shuffled order: in a sorted one each tile has nearer nodes than all before it, and nothing is ever ruled out.

Shapes: G nodes, Q queries, K neighbours, C candidates, R coordinates. *Positions* count nodes in the shuffled order.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.core.config import format_bytes
from embstore.core.errors import BudgetError
from embstore.core.rows import slices
from embstore.core.sampling import shuffled
from embstore.host.device import free_device_bytes, has_fast_bfloat16, resolve_device
from embstore.host.numerics import full_precision
from embstore.host.threads import Workers, abandon, finish_all
from embstore.search.distances import FloatMatrix, IntMatrix, direct_distances, ranked, rerank_bytes
from embstore.search.exact.pairwise import brute_force, brute_force_bytes
from embstore.search.exact.tiles import Operand, TileScan, map_operand, operand_bytes, quantise, state_bytes, tile_bytes

_TILE_ROWS = (4096, 2048, 1024, 512, 256)
_SETTLED_ROWS = 512  # ranked by one job, or scanned again together
_RANKED_ROWS = 64
_RANKED_FIRST = 2  # beyond the k best scores, so that the k-th distance is about what it will be
_LEAST_PANEL_ROWS = 4096
_MOST_CANDIDATES = 256
_DEVICE_RESERVE_BYTES = 256 << 20  # of a GPU: libraries, parts of operands on their way, fragmentation

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanPlan:
    """How a scan is cut: rows of a tile, and rows whose candidates are held at once (a panel)."""

    tile_rows: int
    panel_rows: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborBlock:
    """Neighbours of ``nodes_N``: int32 [n, K] and float64 [n, K], as ``rerank`` gives them."""

    nodes_N: NDArray[np.int64]
    ids_NK: IntMatrix
    distances_NK: FloatMatrix


def scan_device(name: str) -> torch.device:
    """Where tiles are computed: the GPU that the rows came from if it is here, else the CPU; the result is the same."""
    is_here = name.startswith("cuda") and torch.cuda.is_available()
    return resolve_device(name) if is_here else torch.device("cpu")


def scan_dtype(device: torch.device) -> torch.dtype:
    """What tiles are computed in: bfloat16 where the hardware has it, float32 elsewhere."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def plan_on_device(
    num_nodes: int, num_queries: int, rank: int, k: int, *, memory_bytes: int, free_bytes: int, device: torch.device
) -> tuple[ScanPlan, bool]:
    """How a scan is cut on a GPU with ``free_bytes`` of free memory, and whether all nodes lie there.

    Where they do not fit, they stay on the host, and parts are copied when they are used: the result is the same.

    Raises
    ------
    BudgetError
        Not even the smallest tiles fit; the message has the least that would do.
    """
    operand, room = operand_bytes(num_nodes, rank, scan_dtype(device)), free_bytes - _DEVICE_RESERVE_BYTES
    for held_bytes in (operand, 0):
        affordable = min(memory_bytes, room - held_bytes)
        plan = plan_scan(num_queries, rank, k, threads=1, memory_bytes=max(0, affordable), device=device)
        if plan.memory_bytes <= room - held_bytes:
            return plan, held_bytes > 0
    raise BudgetError(
        f"the exact search needs {format_bytes(plan.memory_bytes + _DEVICE_RESERVE_BYTES)} on {device}, "
        f"which has {format_bytes(free_bytes)} free",
        hint="free some of the device's memory, then run the command again with --resume",
    )


def plan_scan(
    num_queries: int, rank: int, k: int, *, threads: int, memory_bytes: int, device: torch.device | None = None
) -> ScanPlan:
    """Largest tiles and panels that fit; the smallest if nothing fits (``memory_bytes`` says what they need)."""
    dtype = scan_dtype(device or torch.device("cpu"))
    per_row = state_bytes(1, _num_candidates(k), dtype)
    least_panel = min(num_queries, _LEAST_PANEL_ROWS)
    fixed_bytes, tile_rows = 0, _TILE_ROWS[-1]
    for tile_rows in _TILE_ROWS:
        fixed_bytes = max(threads * tile_bytes(tile_rows, dtype), brute_force_bytes(rank, k))
        fixed_bytes += threads * rerank_bytes(rank, _num_candidates(k))
        fixed_bytes += threads * _SETTLED_ROWS * tile_rows * dtype.itemsize  # rows in doubt
        fixed_bytes += state_bytes(_SETTLED_ROWS, _MOST_CANDIDATES, dtype)
        if fixed_bytes + least_panel * per_row <= memory_bytes:
            break
    panel_rows = max(least_panel, min(num_queries, (memory_bytes - fixed_bytes) // per_row))
    return ScanPlan(tile_rows=tile_rows, panel_rows=panel_rows, memory_bytes=fixed_bytes + panel_rows * per_row)


def all_neighbors(
    coord_GR: NDArray[np.float32],
    k: int,
    *,
    queries_Q: NDArray[np.int64] | None = None,
    finished: int = 0,
    threads: int,
    memory_bytes: int,
    work: Path,
    device: torch.device | None = None,
    advance: Advance | None = None,
) -> Iterator[NeighborBlock]:
    """Exact neighbours, block by block, always in the same order; see the module docstring.

    Parameters
    ----------
    coord_GR
        float32 [G, R], centred, finite, pairwise distinct; may be a memory map.
    k
        Neighbours wanted, at most 122; fewer nodes give -1 and +inf at the end.
    queries_Q
        Nodes to search for; None: every node, which costs half as much a row.
    finished
        Queries whose blocks an earlier run kept: they are not searched for again.
    threads, memory_bytes
        Cores to use; anonymous memory for tiles and candidates.
    work
        Folder for the quantised copy, which is mapped.
    device
        Where tiles are computed; default the CPU.
    advance
        Called with the number of queries that the pairs looked at since the last call are worth.

    Yields
    ------
    NeighborBlock
        At most a tile's rows each. Price: G^2 / 2 (or Q * G) products of R, and 500 bytes a row for candidates.
    """
    where = device or torch.device("cpu")
    dtype = scan_dtype(where)
    num_nodes, rank = coord_GR.shape
    order_G = shuffled(num_nodes, 0)
    positions_Q = np.arange(num_nodes) if queries_Q is None else np.argsort(order_G)[queries_Q]
    num_queries = len(positions_Q)
    if finished >= num_queries:
        return
    is_held = False
    if (free_bytes := free_device_bytes(where)) is None:
        plan = plan_scan(num_queries, rank, k, threads=threads, memory_bytes=memory_bytes, device=where)
    else:
        plan, is_held = plan_on_device(
            num_nodes, num_queries, rank, k, memory_bytes=memory_bytes, free_bytes=free_bytes, device=where
        )
    scratch = None if is_held else map_operand(work / "quantised.npy", num_nodes, rank, dtype)
    operand = quantise(coord_GR, order_G, dtype=dtype, device=where, scratch=scratch)
    workers = Workers(threads, threads if where.type == "cpu" else 1, where)
    report = _Report(advance, (num_queries - finished) * num_nodes, num_queries - finished)
    with full_precision():
        for first in range(finished, num_queries, plan.panel_rows):
            panel = positions_Q[first : first + plan.panel_rows]
            is_mirrored = queries_Q is None and len(panel) == num_nodes - finished
            scan = TileScan(operand, panel, min(_num_candidates(k), num_nodes), plan.tile_rows)
            with contextlib.closing(_Jobs(scan, workers, report, first_node=finished if is_mirrored else None)) as jobs:
                for rows in slices(0, len(panel), plan.tile_rows):
                    jobs.run(rows)
                    yield _settled(coord_GR, order_G, scan, rows, k, workers)


class _Jobs:
    """The visits of a panel: those of two row blocks are always on their way, so no core waits at the end of a block."""

    def __init__(self, scan: TileScan, workers: Workers, report: _Report, *, first_node: int | None) -> None:
        self._scan, self._workers, self._report = scan, workers, report
        self._first_node = first_node  # of the rows, when each pair of rows is looked at once; None: no mirror
        self._pending: list[tuple[int, list[Future[None]]]] = []

    def run(self, rows: slice) -> None:
        """Return when the candidates of these rows have seen every node."""
        step = self._scan.tile_rows
        for start in (rows.start, rows.stop):
            if start < len(self._scan.queries_Q) and all(begun < start for begun, _ in self._pending):
                self._begin(slice(start, min(start + step, len(self._scan.queries_Q))))
        _, jobs = self._pending[rows.start // step]
        finish_all(jobs)

    def close(self) -> None:
        """Nothing of this panel goes on in the background."""
        abandon([job for _, jobs in self._pending for job in jobs])

    def _begin(self, rows: slice) -> None:
        num_nodes, offset = len(self._scan.operand.rows_GP), self._first_node
        step = self._scan.tile_rows
        visits: list[tuple[slice, slice | None]] = [(nodes, None) for nodes in slices(0, offset or 0, step)]
        if offset is None:
            visits = [(nodes, None) for nodes in slices(0, num_nodes, step)]
        else:
            for other in slices(rows.start, num_nodes - offset, step):
                nodes = slice(other.start + offset, other.stop + offset)
                visits.append((nodes, other))
        jobs = [
            self._workers.submit(self._visit(rows, nodes, mirrored), (1, rows.start, number))
            for number, (nodes, mirrored) in enumerate(visits)
        ]
        self._pending.append((rows.start, jobs))

    def _visit(self, rows: slice, nodes: slice, mirrored: slice | None) -> Callable[[], None]:
        def visit() -> None:
            self._scan.visit(rows, nodes, mirrored=mirrored)
            pairs = (rows.stop - rows.start) * (nodes.stop - nodes.start)
            self._report.add(2 * pairs if mirrored not in (None, rows) else pairs)

        return visit


class _Report:
    """Pairs looked at, told as queries; workers add to it at the same time."""

    def __init__(self, advance: Advance | None, num_pairs: int, num_queries: int) -> None:
        self._advance, self._num_pairs, self._num_queries = advance, num_pairs, num_queries
        self._pairs = self._told = 0
        self._lock = threading.Lock()

    def add(self, pairs: int) -> None:
        with self._lock:
            self._pairs += pairs
            reached = self._num_queries * self._pairs // self._num_pairs
            if self._advance is not None and reached > self._told:
                self._advance(reached - self._told)
                self._told = reached


def _settled(
    coord_GR: NDArray[np.float32], order_G: NDArray[np.int64], scan: TileScan, rows: slice, k: int, workers: Workers
) -> NeighborBlock:
    """The neighbours of rows whose candidates have seen every node."""
    positions_Q = scan.queries_Q[rows]
    ids_QK, distances_QK, is_doubtful_Q = _ranked(coord_GR, order_G, scan, rows, k, workers)
    for part in slices(0, int(is_doubtful_Q.sum()), _SETTLED_ROWS):
        rows_D = np.flatnonzero(is_doubtful_Q)[part]
        # some rows twice: a product of every height would leave a kernel of nearly a MiB in memory for each
        padded = np.resize(rows_D, 1 << (len(rows_D) - 1).bit_length())
        again = TileScan(scan.operand, positions_Q[padded], min(_MOST_CANDIDATES, len(coord_GR)), scan.tile_rows)
        every_row, every_D = slice(0, len(padded)), slice(0, len(rows_D))
        visits = [functools.partial(again.visit, every_row, nodes) for nodes in slices(0, len(coord_GR), scan.tile_rows)]
        finish_all([workers.submit(visit, (0,)) for visit in visits])
        ids_QK[rows_D], distances_QK[rows_D], is_open_D = _ranked(coord_GR, order_G, again, every_D, k, workers)
        if is_open_D.any():
            rows_D = rows_D[is_open_D]
            ids_QK[rows_D], distances_QK[rows_D] = brute_force(coord_GR, order_G[positions_Q[rows_D]], k)
    return NeighborBlock(nodes_N=order_G[positions_Q], ids_NK=ids_QK, distances_NK=distances_QK)


def _ranked(
    coord_GR: NDArray[np.float32], order_G: NDArray[np.int64], scan: TileScan, rows: slice, k: int, workers: Workers
) -> tuple[IntMatrix, FloatMatrix, NDArray[np.bool_]]:
    """Neighbours among the candidates of some rows; and which rows are in doubt, as ``settle_rows`` tells them."""
    positions_Q = scan.queries_Q[rows]
    ids_QK = np.empty((len(positions_Q), k), dtype=np.int32)
    distances_QK = np.empty((len(positions_Q), k))
    is_doubtful_Q = np.zeros(len(positions_Q), dtype=np.bool_)

    def settle(part: slice) -> Callable[[], None]:
        def run() -> None:
            ids_QC, magnitude_QC, out_Q = scan.best(slice(rows.start + part.start, rows.start + part.stop))
            candidates_QC = np.where(ids_QC >= 0, order_G[ids_QC], -1).astype(np.int32)
            ids_QK[part], distances_QK[part], is_doubtful_Q[part] = settle_rows(
                coord_GR, order_G, scan.operand, positions_Q[part], candidates_QC, magnitude_QC, out_Q, k
            )

        return run

    finish_all([workers.submit(settle(part), (0,)) for part in slices(0, len(positions_Q), _SETTLED_ROWS)])
    return ids_QK, distances_QK, is_doubtful_Q


def settle_rows(
    coord_GR: NDArray[np.float32],
    order_G: NDArray[np.int64],
    operand: Operand,
    positions_Q: NDArray[np.int64],
    candidates_QC: IntMatrix,
    magnitude_QC: NDArray[np.float64],
    left_out_Q: NDArray[np.float64],
    k: int,
) -> tuple[IntMatrix, FloatMatrix, NDArray[np.bool_]]:
    """Neighbours from candidate nodes, best first, the magnitudes of their scores, and which rows are in doubt.

    Nodes that are not candidates score at least ``left_out_Q``.
    """
    nodes_Q = order_G[positions_Q]
    distance_QC = np.full(candidates_QC.shape, np.inf)
    first = min(k + _RANKED_FIRST, candidates_QC.shape[1])
    distance_QC[:, :first] = direct_distances(coord_GR, nodes_Q, candidates_QC[:, :first])
    kth_Q = np.sort(distance_QC[:, :first], axis=1)[:, min(k, first) - 1]
    # a node nearer than that has no larger score than this, so the others need not be looked at
    width_Q = (magnitude_QC <= operand.reach(positions_Q, kth_Q)[:, None]).sum(axis=1)
    ascending = np.argsort(width_Q, kind="stable")
    ascending = ascending[np.searchsorted(width_Q[ascending], first, side="right") :]
    for part in (ascending[block] for block in slices(0, len(ascending), _RANKED_ROWS)):
        rest = slice(first, width_Q[part[-1]])
        distance_QC[part, rest] = direct_distances(coord_GR, nodes_Q[part], candidates_QC[part, rest])
    ids_QK, distances_QK = ranked(distance_QC, candidates_QC, k)
    is_doubtful_Q = operand.reach(positions_Q, distances_QK[:, -1]) >= left_out_Q
    return ids_QK, distances_QK, is_doubtful_Q & np.isfinite(left_out_Q)


def _num_candidates(k: int) -> int:
    """Enough that quantisation seldom hides the k-th among them, also in the crowded shells of 60 and more dimensions."""
    return 2 * k + 12
