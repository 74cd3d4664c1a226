"""Ranks the neighbours that a search kept by the stored rows, where coordinates are not the whole row.

The search sees coordinates only. Rows of an affine head are their coordinates up to float16 rounding, and nothing is read
for them. Rows of a soft-capped or streamed head, and of some imported arrays, leave the basis: then every neighbour kept for
such a row gets the distance of the two stored rows, and the row is sorted again (docs/decisions/0042).

Stored rows are larger than memory. Part of them is held, the chunks that contain their neighbours are read one by one, and
so on for the next part: each chunk is decoded at most once a part.

Shapes: N rows, K neighbours kept, V columns, B rows of a block, H rows held, S second rows of a chunk, P pairs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR
from embstore.core.events import Observer, StageAdvanced, StageFinished, StageStarted
from embstore.core.rows import slices
from embstore.search.distances import FloatMatrix, ranked

# What float16 rounding alone may leave of a unit row: 2^-11 of it is 4.9e-4, and the subnormal values of up to 13 million
# columns add less than the rest.
RESIDUAL_FLOOR = NOISE_FLOOR / 2
_BLOCK_ROWS = 8192
_SLAB_BYTES = 1 << 20  # of float32 differences: a core's cache
_BESIDE_ROW_BYTES = 2048  # ids, distances and the pairs of one row that is held

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRows:
    """Where stored rows are read: ``read`` gives float16 [n, V] of ascending rows and decodes each of their chunks once."""

    read: Callable[[Rows], NDArray[np.float16]]
    dimension: int
    chunk_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerank:
    """What ranking by stored rows did.

    ``off_basis_rows``: rows whose residual is above ``residual_floor``, none under an affine head. ``reranked_rows``: rows
    that leave the basis, or one of whose neighbours does. ``uncertain_rows``: those of them for which a vector that the
    search did not keep may be among the ``k`` nearest.
    """

    k: int
    residual_floor: float
    off_basis_rows: int
    reranked_rows: int
    uncertain_rows: int


def rerank_by_stored_rows(
    ids_NK: NDArray[np.int32],
    distances_NK: NDArray[np.float32],
    groups_N: NDArray[np.int32],
    residual_N: NDArray[np.float32],
    stored: StoredRows,
    *,
    k: int,
    threads: int,
    memory_bytes: int,
    observer: Observer,
) -> Rerank:
    """Put distances between stored rows, and the order they give, in place of those between coordinates.

    Parameters
    ----------
    ids_NK, distances_NK
        Neighbours by coordinates, as ``KnnGraph`` has them; changed in place. Ties are ordered by row.
    groups_N
        The first row with the same coordinates, -1 for failed rows. A group's stored row is that of its first row.
    residual_N
        float32 [N], the distance of each stored row from its coordinates.
    stored
        Not read where no residual is above ``RESIDUAL_FLOOR``.
    k
        Neighbours that ``uncertain_rows`` is about.
    threads, memory_bytes
        Cores to use, and anonymous memory that stored rows may take (five chunks at least).

    Notes
    -----
    Price: N * K * V differences, and one read of all rows for every ``memory_bytes`` of them.
    """
    present = np.flatnonzero(groups_N >= 0)
    is_off_N = np.zeros(len(groups_N), dtype=np.bool_)
    is_off_N[groups_N[present[residual_N[present] > RESIDUAL_FLOOR]]] = True
    chosen = _chosen(ids_NK, groups_N, is_off_N)
    is_uncertain_N = np.zeros(len(groups_N), dtype=np.bool_)
    if len(chosen):
        started = time.perf_counter()
        observer(StageStarted(stage="rerank", total=len(chosen)))
        has_unseen = np.count_nonzero(groups_N == np.arange(len(groups_N))) - 1 > ids_NK.shape[1]
        most_rows = memory_bytes // (2 * stored.dimension + _BESIDE_ROW_BYTES) - 4 * stored.chunk_rows
        with ThreadPoolExecutor(threads, thread_name_prefix="embstore-rerank") as pool:
            for part in slices(0, len(chosen), max(stored.chunk_rows, most_rows)):
                held_H = chosen[part]
                distance_HK = _stored_distances(held_H, ids_NK[held_H], stored, pool)
                # a projection lengthens nothing, so what was not kept is at least as far as the last coordinate distance
                farthest_H = distances_NK[held_H, -1]
                ids_NK[held_H], distances_NK[held_H] = ranked(distance_HK, ids_NK[held_H], ids_NK.shape[1])
                is_uncertain_N[held_H] = has_unseen & (distances_NK[held_H, k - 1] > farthest_H)
                observer(StageAdvanced(stage="rerank", count=len(held_H)))
        copies = present[groups_N[present] != present]
        for block in slices(0, len(copies), _BLOCK_ROWS):
            first_B = groups_N[copies[block]]
            ids_NK[copies[block]], distances_NK[copies[block]] = ids_NK[first_B], distances_NK[first_B]
        observer(StageFinished(stage="rerank", seconds=time.perf_counter() - started))
    is_chosen_N = np.zeros(len(groups_N), dtype=np.bool_)
    is_chosen_N[chosen] = True
    return Rerank(
        k=k,
        residual_floor=RESIDUAL_FLOOR,
        off_basis_rows=int(np.count_nonzero(residual_N[present] > RESIDUAL_FLOOR)),
        reranked_rows=int(np.count_nonzero(is_chosen_N[groups_N[present]])),
        uncertain_rows=int(np.count_nonzero(is_uncertain_N[groups_N[present]])),
    )


def _chosen(ids_NK: NDArray[np.int32], groups_N: NDArray[np.int32], is_off_N: NDArray[np.bool_]) -> Rows:
    """First rows that leave the basis, or have a neighbour that does; ascending."""
    first = np.flatnonzero(groups_N == np.arange(len(groups_N)))
    if not is_off_N.any():
        return first[:0]
    chosen = []
    for block in slices(0, len(first), _BLOCK_ROWS):
        near_BK = ids_NK[first[block]]
        is_near_off_B = (is_off_N[near_BK] & (near_BK >= 0)).any(axis=1)
        chosen.append(first[block][is_off_N[first[block]] | is_near_off_B])
    return np.concatenate(chosen)


def _stored_distances(held_H: Rows, near_HK: NDArray[np.int32], stored: StoredRows, pool: ThreadPoolExecutor) -> FloatMatrix:
    """Distances float64 [H, K] between stored rows; +inf where there is no neighbour."""
    held_HV = stored.read(held_H)
    distance_HK = np.full(near_HK.shape, np.inf)
    chunk_HK = near_HK // stored.chunk_rows  # -1 stays -1
    for chunk in np.unique(chunk_HK[near_HK >= 0]):
        row_P, place_P = np.nonzero(chunk_HK == chunk)
        second_S, second_P = np.unique(near_HK[row_P, place_P].astype(np.int64), return_inverse=True)
        second_SV = stored.read(second_S)
        slabs = list(slices(0, len(row_P), max(1, _SLAB_BYTES // (4 * stored.dimension))))
        norms = pool.map(
            _difference_norms,
            itertools.repeat(held_HV),
            itertools.repeat(second_SV),
            (row_P[slab] for slab in slabs),
            (second_P[slab] for slab in slabs),
        )
        distance_HK[row_P, place_P] = np.concatenate(list(norms))
    return distance_HK


def _difference_norms(
    held_HV: NDArray[np.float16], second_SV: NDArray[np.float16], row_P: Rows, second_P: Rows
) -> NDArray[np.float64]:
    """|held - second| of each pair: float32 has differences of float16 below 1 exactly, sums are float64."""
    difference_PV = _widened(held_HV[row_P])
    difference_PV -= _widened(second_SV[second_P])
    norms_P: NDArray[np.float64] = 2.0**112 * np.sqrt(np.square(difference_PV, dtype=np.float64).sum(axis=1))
    return norms_P


def _widened(half: NDArray[np.float16]) -> NDArray[np.float32]:
    """Finite float16 values times 2^-112, exactly: their bits under float32's exponent. numpy's cast takes 4 x as long."""
    bits: NDArray[np.int32] = half.view(np.int16).astype(np.int32)  # the sign fills the upper half
    bits <<= 13
    bits &= np.int32(-0x7000_2000)  # keeps one sign bit, the exponent and the mantissa
    return bits.view(np.float32)
