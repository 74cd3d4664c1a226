"""Exact neighbours by brute force in float64 numpy: what audits compare with, and how small searches are done.

Coordinates must be centred: logit rows share one direction that carries nearly all of their norm (docs/decisions/0006). The
scan selects a few nodes more than asked for. Where it cannot prove that the answer is among them, because too many are
equally far, it compares the row with every node directly. So the answer depends on neither tiling nor threads. The exact
engine (``scan``) shares no arithmetic with this one.

Shapes: G nodes, Q queries, K neighbours, C candidates, R coordinates, T nodes of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from embstore.core.rows import slices
from embstore.search.distances import FloatMatrix, IntMatrix, direct_neighbors, rerank, rerank_bytes

# Candidates kept beyond k: ties and rounding inside this margin need no second look.
MARGIN = 16
_BASE_ROWS = 4096
_QUERY_ROWS = 512


def brute_force_bytes(rank: int, k: int) -> int:
    """Anonymous memory of ``brute_force``: a tile of scores with its partition indices, and the two operand tiles."""
    tile = _QUERY_ROWS * (_BASE_ROWS + 2 * (k + MARGIN))
    return tile * (8 + 8) + (_QUERY_ROWS + _BASE_ROWS) * rank * 8 + rerank_bytes(rank, k + MARGIN)


def brute_force(
    coord_GR: NDArray[np.float32],
    queries_Q: NDArray[np.int64],
    k: int,
    *,
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
    advance
        Called with the number of queries finished.

    Returns
    -------
    ids_QK, distances_QK
        int32 node indices and float64 metric distances, ascending, ties by index. Price: Q * G * R multiply-adds in float64.
    """
    num_nodes = len(coord_GR)
    keep = min(k + MARGIN, num_nodes - 1)
    ids_QK = np.full((len(queries_Q), k), -1, dtype=np.int32)
    distances_QK = np.full((len(queries_Q), k), np.inf)
    half_norm_G = _half_squared_norms(coord_GR)
    # |fl(x.y) - x.y| <= R u |x||y|, and as much again for the norms
    slack = 4 * (coord_GR.shape[1] + 4) * 2.0**-53 * float(half_norm_G.max(initial=0.0))
    for part in slices(0, len(queries_Q), _QUERY_ROWS):
        queries = queries_Q[part]
        if keep > 0:
            candidates, cut_Q = _scan(coord_GR, half_norm_G, queries, keep)
            ids_QK[part], distances_QK[part] = rerank(coord_GR, queries, candidates, k)
            if keep < num_nodes - 1:
                # nothing left out scored below the cut, so nothing left out is nearer than this
                reached_Q = distances_QK[part, -1] ** 2 / 2
                for row in part.start + np.flatnonzero(reached_Q >= cut_Q + half_norm_G[queries] - slack):
                    ids_QK[row], distances_QK[row] = direct_neighbors(coord_GR, int(queries_Q[row]), k)
        if advance is not None:
            advance(len(queries))
    return ids_QK, distances_QK


def _scan(
    coord_GR: NDArray[np.float32], half_norm_G: FloatMatrix, queries: NDArray[np.int64], keep: int
) -> tuple[IntMatrix, FloatMatrix]:
    """Indices of the ``keep`` smallest |y|^2 / 2 - x.y for each query x, as |x - y| orders, and the largest one kept."""
    query_QR = coord_GR[queries].astype(np.float64)
    best_QC = np.full((len(queries), 0), np.inf)
    ids_QC = np.full((len(queries), 0), -1, dtype=np.int32)
    for tile in slices(0, len(coord_GR), _BASE_ROWS):
        score_QT = query_QR @ coord_GR[tile].astype(np.float64).T
        np.subtract(half_norm_G[tile], score_QT, out=score_QT)
        own = np.flatnonzero((queries >= tile.start) & (queries < tile.stop))
        score_QT[own, queries[own] - tile.start] = np.inf  # a row is excluded by its number, never as the first found
        cut_Q = best_QC.max(axis=1) if best_QC.shape[1] == keep else np.full(len(queries), np.inf)
        score_QT, tile_QT = _nearest_of_tile(score_QT, cut_Q, keep)
        best_QC = np.concatenate([best_QC, score_QT], axis=1)
        ids_QC = np.concatenate([ids_QC, tile_QT + np.int32(tile.start)], axis=1)
        if best_QC.shape[1] > keep:
            chosen = np.argpartition(best_QC, keep - 1, axis=1)[:, :keep]
            best_QC, ids_QC = np.take_along_axis(best_QC, chosen, 1), np.take_along_axis(ids_QC, chosen, 1)
    return np.where(np.isfinite(best_QC), ids_QC, -1).astype(np.int32), best_QC.max(axis=1)


def _nearest_of_tile(score_QT: FloatMatrix, cut_Q: NDArray[np.float64], keep: int) -> tuple[FloatMatrix, IntMatrix]:
    """Scores and columns of what may be among each row's ``keep`` smallest, which lie below its cut; padded with +inf."""
    is_below_QT = score_QT < cut_Q[:, None]
    count_Q = np.count_nonzero(is_below_QT, axis=1)
    if count_Q.max() > max(keep, score_QT.shape[1] // 8):
        # the first tile, or rows in an order that says much about distance
        chosen = np.argpartition(score_QT, keep - 1, axis=1)[:, :keep]
        return np.take_along_axis(score_QT, chosen, 1), chosen.astype(np.int32)
    row_H, column_H = np.nonzero(is_below_QT)
    place_H = np.arange(len(row_H)) - np.repeat(np.cumsum(count_Q) - count_Q, count_Q)
    packed_QC = np.full((len(cut_Q), count_Q.max()), np.inf)
    columns_QC = np.zeros(packed_QC.shape, dtype=np.int32)
    packed_QC[row_H, place_H], columns_QC[row_H, place_H] = score_QT[row_H, column_H], column_H
    return packed_QC, columns_QC


def _half_squared_norms(coord_GR: NDArray[np.float32]) -> FloatMatrix:
    half_norm_G = np.empty(len(coord_GR))
    for tile in slices(0, len(coord_GR), _BASE_ROWS):
        block = coord_GR[tile].astype(np.float64)
        half_norm_G[tile] = np.einsum("gr,gr->g", block, block) / 2
    return half_norm_G
