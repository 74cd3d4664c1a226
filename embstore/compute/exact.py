"""Exact nearest neighbours by blocked scan, and exact re-ranking of candidates. The oracle of the audit, and an engine.

Coordinates must be centred: logit rows share one direction that carries nearly all of their norm, and without centring the
float32 cancellation in |x - y|^2 loses true neighbours (recall 0.9976 for an exact search, docs/decisions/0006). The scan
selects in float32 with a margin; the answer is ranked by float64 direct differences, ties by row, so it does not depend on
tiling.

Shapes: G nodes, Q queries, K neighbours, C candidates, R coordinates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Candidates kept beyond k, so that float32 rounding in the scan cannot push a true neighbour out.
MARGIN = 16
_BASE_ROWS = 4096
_QUERY_ROWS = 512

IntMatrix = NDArray[np.int32]
FloatMatrix = NDArray[np.float64]


def scan_bytes(rank: int, k: int) -> int:
    """Anonymous memory of a scan in float64: one tile of scores with its partition indices, and the two operand tiles."""
    tile = _QUERY_ROWS * (_BASE_ROWS + 2 * (k + MARGIN))
    return tile * (8 + 8) + (_QUERY_ROWS + _BASE_ROWS) * rank * 8 + rerank_bytes(rank, k + MARGIN)


def exact_neighbors(
    coord_GR: NDArray[np.float32],
    queries_Q: NDArray[np.int64],
    k: int,
    *,
    double: bool = False,
    advance: Callable[[int], None] | None = None,
) -> tuple[IntMatrix, FloatMatrix]:
    """The ``k`` nearest nodes of each query node, self excluded.

    Parameters
    ----------
    coord_GR
        float32 [G, R], centred, finite, pairwise distinct; may be a memory map.
    queries_Q
        Node indices to search for.
    k
        Neighbours wanted; fewer nodes give -1 and +inf at the end.
    double
        Scan in float64: about 2.5 times the time, for audits, which must not share the rounding of what they judge.
    advance
        Called with the number of queries finished.

    Returns
    -------
    ids_QK, distances_QK
        int32 node indices and float64 metric distances, ascending, ties by index. Price: Q * G * R multiply-adds.
    """
    num_nodes = len(coord_GR)
    keep = min(k + MARGIN, num_nodes - 1)
    ids_QK = np.full((len(queries_Q), k), -1, dtype=np.int32)
    distances_QK = np.full((len(queries_Q), k), np.inf)
    half_norm_G: NDArray[np.floating] = _half_squared_norms(coord_GR)
    if not double:
        half_norm_G = half_norm_G.astype(np.float32)
    for start in range(0, len(queries_Q), _QUERY_ROWS):
        queries = queries_Q[start : start + _QUERY_ROWS]
        if keep > 0:
            candidates = _scan(coord_GR, half_norm_G, queries, keep)
            stop = start + len(queries)
            ids_QK[start:stop], distances_QK[start:stop] = rerank(coord_GR, queries, candidates, k)
        if advance is not None:
            advance(len(queries))
    return ids_QK, distances_QK


def _scan(
    coord_GR: NDArray[np.float32], half_norm_G: NDArray[np.floating], queries: NDArray[np.int64], keep: int
) -> IntMatrix:
    """Indices of the ``keep`` smallest |y|^2 / 2 - x.y for each query x, as |x - y| orders; in half_norm_G's dtype."""
    dtype = half_norm_G.dtype
    query_QR = np.ascontiguousarray(coord_GR[queries], dtype=dtype)
    best_QC = np.full((len(queries), 0), np.inf, dtype=dtype)
    ids_QC = np.full((len(queries), 0), -1, dtype=np.int32)
    for start in range(0, len(coord_GR), _BASE_ROWS):
        stop = min(start + _BASE_ROWS, len(coord_GR))
        score_QT = query_QR @ coord_GR[start:stop].astype(dtype, copy=False).T
        np.subtract(half_norm_G[start:stop], score_QT, out=score_QT)
        own = np.flatnonzero((queries >= start) & (queries < stop))
        score_QT[own, queries[own] - start] = np.inf  # self is excluded by index, never by position
        tile_QT = np.broadcast_to(np.arange(start, stop, dtype=np.int32), score_QT.shape)
        if score_QT.shape[1] > keep:
            chosen = np.argpartition(score_QT, keep - 1, axis=1)[:, :keep]
            score_QT, tile_QT = np.take_along_axis(score_QT, chosen, 1), np.take_along_axis(tile_QT, chosen, 1)
        best_QC = np.concatenate([best_QC, score_QT], axis=1)
        ids_QC = np.concatenate([ids_QC, tile_QT], axis=1)
        if best_QC.shape[1] > keep:
            chosen = np.argpartition(best_QC, keep - 1, axis=1)[:, :keep]
            best_QC, ids_QC = np.take_along_axis(best_QC, chosen, 1), np.take_along_axis(ids_QC, chosen, 1)
    return np.where(np.isfinite(best_QC), ids_QC, -1).astype(np.int32)


def rerank_bytes(rank: int, num_candidates: int) -> int:
    """Anonymous memory of ``rerank``: one block of float64 differences."""
    return _rerank_rows(rank, num_candidates) * num_candidates * rank * (4 + 8)


def rerank(
    coord_GR: NDArray[np.float32], queries_Q: NDArray[np.int64], candidates_QC: IntMatrix, k: int
) -> tuple[IntMatrix, FloatMatrix]:
    """Rank candidates by float64 direct differences; ties by index, self and -1 dropped.

    Returns int32 [Q, k] and float64 [Q, k], padded with -1 and +inf.
    """
    num_candidates = candidates_QC.shape[1]
    ids_QK = np.full((len(queries_Q), k), -1, dtype=np.int32)
    distances_QK = np.full((len(queries_Q), k), np.inf)
    step = _rerank_rows(coord_GR.shape[1], num_candidates)
    for start in range(0, len(queries_Q), step):
        queries = queries_Q[start : start + step]
        candidates = candidates_QC[start : start + step]
        # difference first, in float64: |x|^2 + |y|^2 - 2 x.y would cancel
        difference = coord_GR[candidates].astype(np.float64) - coord_GR[queries].astype(np.float64)[:, None, :]
        distance = np.sqrt(np.einsum("qcr,qcr->qc", difference, difference))
        distance[(candidates < 0) | (candidates == queries[:, None])] = np.inf
        order = np.lexsort((candidates, distance), axis=1)[:, :k]
        found = np.take_along_axis(distance, order, 1)
        width = order.shape[1]
        distances_QK[start : start + step, :width] = found
        nearest = np.take_along_axis(candidates, order, 1)
        ids_QK[start : start + step, :width] = np.where(np.isfinite(found), nearest, -1)
    return ids_QK, distances_QK


def _rerank_rows(rank: int, num_candidates: int) -> int:
    return max(1, (4 << 20) // (num_candidates * rank * 8))


def _half_squared_norms(coord_GR: NDArray[np.float32]) -> FloatMatrix:
    half_norm_G = np.empty(len(coord_GR))
    for start in range(0, len(coord_GR), _BASE_ROWS):
        block = coord_GR[start : start + _BASE_ROWS].astype(np.float64)
        half_norm_G[start : start + _BASE_ROWS] = np.einsum("gr,gr->g", block, block) / 2
    return half_norm_G
