"""Distances as published: float64 direct differences, ties by index. Every search ends here, whatever found its candidates.

The difference is taken first: |x|^2 + |y|^2 - 2 x.y would cancel where neighbours are near.

Shapes: G nodes, Q queries, K neighbours, C candidates, R coordinates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embstore.core.rows import slices

IntMatrix = NDArray[np.int32]
FloatMatrix = NDArray[np.float64]

_DIFFERENCE_BYTES = 2 << 20  # one block of float64 differences: a core's cache
_DIRECT_ROWS = 4096


def rerank_bytes(rank: int, num_candidates: int) -> int:
    """Anonymous memory of ``rerank`` in one thread: gathered candidates and one block of float64 differences."""
    return _rerank_rows(rank, num_candidates) * num_candidates * rank * (4 + 8)


def rerank(
    coord_GR: NDArray[np.float32], queries_Q: NDArray[np.integer], candidates_QC: IntMatrix, k: int
) -> tuple[IntMatrix, FloatMatrix]:
    """Rank candidates by float64 direct differences; ties by index, self and -1 dropped.

    Returns int32 [Q, k] and float64 [Q, k], padded with -1 and +inf.
    """
    return ranked(direct_distances(coord_GR, queries_Q, candidates_QC), candidates_QC, k)


def direct_distances(coord_GR: NDArray[np.float32], queries_Q: NDArray[np.integer], candidates_QC: IntMatrix) -> FloatMatrix:
    """Distances float64 [Q, C] by direct differences; +inf for self and -1."""
    distance_QC = np.empty(candidates_QC.shape)
    for part in slices(0, len(queries_Q), _rerank_rows(coord_GR.shape[1], candidates_QC.shape[1])):
        difference = coord_GR[candidates_QC[part]].astype(np.float64)
        difference -= coord_GR[queries_Q[part]][:, None]
        np.sqrt(np.einsum("qcr,qcr->qc", difference, difference), out=distance_QC[part])
    distance_QC[(candidates_QC < 0) | (candidates_QC == queries_Q[:, None])] = np.inf
    return distance_QC


def ranked(distance_QC: FloatMatrix, candidates_QC: IntMatrix, k: int) -> tuple[IntMatrix, FloatMatrix]:
    """The ``k`` nearest candidates of each row, ties by index; +inf means none. Returns what ``rerank`` returns."""
    ids_QK = np.full((len(distance_QC), k), -1, dtype=np.int32)
    distances_QK = np.full((len(distance_QC), k), np.inf)
    order = np.lexsort((candidates_QC, distance_QC), axis=1)[:, :k]
    found = np.take_along_axis(distance_QC, order, 1)
    distances_QK[:, : order.shape[1]] = found
    nearest = np.take_along_axis(candidates_QC, order, 1)
    ids_QK[:, : order.shape[1]] = np.where(np.isfinite(found), nearest, -1)
    return ids_QK, distances_QK


def direct_neighbors(coord_GR: NDArray[np.float32], node: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The ``k`` nearest of all other nodes, without candidates: for rows whose ties no scan can tell apart.

    Price: G * R differences, 8 bytes a node.
    """
    distance_G = np.empty(len(coord_GR))
    own_R = coord_GR[node].astype(np.float64)
    for part in slices(0, len(coord_GR), _DIRECT_ROWS):
        difference = coord_GR[part] - own_R
        distance_G[part] = np.sqrt(np.einsum("gr,gr->g", difference, difference))
    distance_G[node] = np.inf
    nearest = np.argsort(distance_G, kind="stable")[:k]
    ids_K = np.full(k, -1, dtype=np.int32)
    distances_K = np.full(k, np.inf)
    distances_K[: len(nearest)] = distance_G[nearest]
    ids_K[: len(nearest)] = np.where(np.isfinite(distance_G[nearest]), nearest, -1)
    return ids_K, distances_K


def _rerank_rows(rank: int, num_candidates: int) -> int:
    return max(1, _DIFFERENCE_BYTES // (num_candidates * rank * 8))
