"""Neighbours where coordinates are not the whole row: proven by a bound, and looked up where it does not reach.

A unit row of a head that leaves its basis (soft-capped, streamed) has a part p orthogonal to it, so distances obey

    dc^2 <= d^2 <= dc^2 + (pa + pb)^2

with dc between coordinates. Rounding to float16 moves a stored row by at most ``RESIDUAL_FLOOR``, which is noise by
declaration; what a stored residual says beyond that bounds p (docs/decisions/0038). A row whose k nearest the bound proves
is left alone. Of any other, the pairs that may lie on either side of the k-th place get their distance from stored rows.

Shapes: N rows, G distinct vectors, K neighbours kept, V columns, B rows of a block, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR
from embstore.core.events import Observer, StageAdvanced, StageFinished, StageStarted
from embstore.host.scratch import large_array
from embstore.search.distances import FloatMatrix
from embstore.search.stored_pairs import Rows, StoredRows, stored_distances

# 2^-11 of a unit row is 4.9e-4; the subnormal values of up to 13 million columns do not make it more than this.
RESIDUAL_FLOOR = NOISE_FLOOR / 2
# Where the bound leaves more than this a vector, reading them all is no remedy: the basis is too small.
_PAIRS_PER_VECTOR = 16
_BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """What is proven of the ``k`` nearest, up to the noise floor, of the neighbours that were looked at.

    ``off_basis_rows``: rows whose residual is above ``residual_floor``; none under an affine head, where coordinates are the
    rows, so that everything is proven and nothing is read. ``certified_share``: of the rows with a vector, by the bound
    alone. ``straddling_pairs``: of the others, how many pairs may lie on either side of the k-th place, and ``read_pairs``
    how many of them have their distance from stored rows. ``uncertain_rows``: rows that nothing proves in the end, because
    a vector that is not among the K kept may be nearer, or pairs were left unread. An approximate search may have missed a
    vector whatever is said here: that is for its audit to say.
    """

    k: int
    off_basis_rows: int
    certified_share: float
    straddling_pairs: int
    read_pairs: int
    uncertain_rows: int
    residual_floor: float


def refine(
    ids_NK: NDArray[np.int32],
    distances_NK: NDArray[np.float32],
    groups_N: NDArray[np.int32],
    residual_N: NDArray[np.float32],
    stored: StoredRows,
    *,
    k: int,
    threads: int,
    memory_bytes: int,
    work: Path,
    observer: Observer,
    clock: Callable[[], float],
    residual_floor: float = RESIDUAL_FLOOR,
    max_pairs: int | None = None,
) -> tuple[Refinement, NDArray[np.bool_]]:
    """Put distances of stored rows, and the order they give, in place of uncertain ones; see the module docstring.

    Parameters
    ----------
    ids_NK, distances_NK
        Neighbours by coordinates as ``knn.KnnGraph`` has them, K > k; changed in place, ties by row.
    groups_N
        The first row with the same coordinates, -1 for failed rows. A group is one vector: that of its first row, with the
        largest residual of its members.
    residual_N
        float32 [N], the distance of each stored row from its coordinates.
    stored
        Not called where no residual is above ``residual_floor``.
    k
        Neighbours whose membership is to be proven.
    threads, memory_bytes, work
        Cores to use; the anonymous memory that stored rows may take, five chunks at least; a folder for long arrays.
    residual_floor
        What rounding alone may leave as a residual.
    max_pairs
        Read no more than these, vectors with the fewest first; 16 a vector by default. What is left is counted.

    Returns
    -------
    Refinement, proven_N
        The figures, and whether each row's k nearest are proven in the end.
    """
    rows_G = np.flatnonzero(groups_N == np.arange(len(groups_N)))
    present = np.flatnonzero(groups_N >= 0)
    node_of_present = np.searchsorted(rows_G, groups_N[present])
    off_basis_N = np.zeros(len(groups_N))
    np.maximum.at(off_basis_N, groups_N[present], residual_N[present])
    off_basis_N = np.where(off_basis_N > residual_floor, off_basis_N + residual_floor, 0.0)
    bound = _Bound(ids_NK, distances_NK, off_basis_N, k, has_unseen=len(rows_G) - 1 > ids_NK.shape[1])
    certified_G = np.ones(len(rows_G), dtype=np.bool_)
    pairs_G = np.zeros(len(rows_G), dtype=np.int64)
    if off_basis_N.any():
        for block in _blocks(len(rows_G)):
            certified_G[block], straddles_BK, _ = bound.judge(rows_G[block])
            pairs_G[block] = straddles_BK.sum(axis=1)
    fewest_first = np.argsort(pairs_G, kind="stable")
    most = _PAIRS_PER_VECTOR * len(rows_G) if max_pairs is None else max_pairs
    is_read_G = np.zeros(len(rows_G), dtype=np.bool_)
    is_read_G[fewest_first[np.cumsum(pairs_G[fewest_first]) <= most]] = True
    is_read_G &= pairs_G > 0
    uncertain_G = ~certified_G & ~is_read_G
    if is_read_G.any():
        chosen = np.flatnonzero(is_read_G)
        keys_P = bound.pairs(rows_G[chosen], int(pairs_G[chosen].sum()), work)
        started = clock()
        observer(StageStarted(stage="refine", total=len(keys_P), unit="pairs"))
        distance_P = large_array(work / "stored distances.npy", keys_P.shape, np.float64)
        for part, found in stored_distances(keys_P, len(groups_N), stored, threads=threads, memory_bytes=memory_bytes):
            distance_P[part] = found
            observer(StageAdvanced(stage="refine", count=len(found)))
        for block in _blocks(len(chosen)):
            uncertain_G[chosen[block]] = bound.replace(rows_G[chosen[block]], keys_P, distance_P)
        members = present[groups_N[present] != present]
        for block in _blocks(len(members)):
            first_B = groups_N[members[block]]
            ids_NK[members[block]], distances_NK[members[block]] = ids_NK[first_B], distances_NK[first_B]
        observer(StageFinished(stage="refine", seconds=clock() - started))
    proven_N = np.zeros(len(groups_N), dtype=np.bool_)
    proven_N[present] = ~uncertain_G[node_of_present]
    refinement = Refinement(
        k=k,
        off_basis_rows=int(np.count_nonzero(residual_N[present] > residual_floor)),
        certified_share=float(np.count_nonzero(certified_G[node_of_present]) / max(1, len(present))),
        straddling_pairs=int(pairs_G.sum()),
        read_pairs=int(pairs_G[is_read_G].sum()),
        uncertain_rows=len(present) - int(np.count_nonzero(proven_N)),
        residual_floor=residual_floor,
    )
    return refinement, proven_N


class _Bound:
    """What coordinates and norms off the basis say of each kept pair."""

    def __init__(
        self,
        ids_NK: NDArray[np.int32],
        distances_NK: NDArray[np.float32],
        off_basis_N: NDArray[np.float64],
        k: int,
        *,
        has_unseen: bool,
    ) -> None:
        self._ids_NK, self._distances_NK, self._off_basis_N, self._k = ids_NK, distances_NK, off_basis_N, k
        self._has_unseen = has_unseen

    def judge(self, rows_B: Rows) -> tuple[NDArray[np.bool_], NDArray[np.bool_], FloatMatrix]:
        """Rows whose k nearest are proven, pairs that straddle in the others, and the largest distance each may have."""
        low_BK = self._distances_NK[rows_B].astype(np.float64)
        reach_BK = self._off_basis_N[rows_B][:, None] + self._off_basis_N[self._ids_NK[rows_B]]
        high_BK = np.sqrt(low_BK**2 + reach_BK**2)
        # in: at most k - 1 others can be nearer, and nothing unseen, which is farther than all that is kept
        is_in_BK = high_BK <= low_BK[:, self._k, None]
        is_in_BK[:, self._k :] = False
        # out: k others must be nearer
        is_out_BK = low_BK > np.partition(high_BK, self._k - 1, axis=1)[:, self._k - 1, None]
        is_gap_BK = np.isinf(low_BK)
        certified_B: NDArray[np.bool_] = np.all((is_in_BK | is_gap_BK)[:, : self._k], axis=1)
        return certified_B, ~(is_in_BK | is_out_BK | is_gap_BK | certified_B[:, None]), high_BK

    def pairs(self, rows_G: Rows, count: int, work: Path) -> Rows:
        """The straddling pairs of these rows as ascending ``smaller row * N + larger row``; one that two rows share once."""
        keys_P = large_array(work / "straddling pairs.npy", (count,), np.int64)
        filled = 0
        for block in _blocks(len(rows_G)):
            keys = self._keys(rows_G[block])[self.judge(rows_G[block])[1]]
            keys_P[filled : filled + len(keys)] = keys
            filled += len(keys)
        keys_P.sort()
        kept = 0
        for block in _blocks(len(keys_P)):
            keys = np.unique(keys_P[block])
            keys = keys[1:] if kept and keys[0] == keys_P[kept - 1] else keys
            keys_P[kept : kept + len(keys)] = keys
            kept += len(keys)
        return keys_P[:kept]

    def replace(self, rows_B: Rows, keys_P: Rows, distance_P: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Enter distances of stored rows and sort again; true where a vector that is not kept may still be nearer."""
        _, straddles_BK, high_BK = self.judge(rows_B)
        value_BK = self._distances_NK[rows_B].astype(np.float64)
        unseen_B = value_BK[:, -1].copy() if self._has_unseen else np.full(len(rows_B), np.inf)
        value_BK[straddles_BK] = distance_P[np.searchsorted(keys_P, self._keys(rows_B)[straddles_BK])]
        high_BK[straddles_BK] = value_BK[straddles_BK]
        ids_BK, stored_BK = self._ids_NK[rows_B], value_BK.astype(np.float32)
        order_BK = np.lexsort((ids_BK, stored_BK), axis=1)
        self._ids_NK[rows_B] = np.take_along_axis(ids_BK, order_BK, 1)
        self._distances_NK[rows_B] = np.take_along_axis(stored_BK, order_BK, 1)
        uncertain_B: NDArray[np.bool_] = np.take_along_axis(high_BK, order_BK, 1)[:, : self._k].max(axis=1) > unseen_B
        return uncertain_B

    def _keys(self, rows_B: Rows) -> Rows:
        ids_BK = self._ids_NK[rows_B].astype(np.int64)
        smaller_BK, larger_BK = np.minimum(ids_BK, rows_B[:, None]), np.maximum(ids_BK, rows_B[:, None])
        keys_BK: Rows = smaller_BK * len(self._ids_NK) + larger_BK
        return keys_BK


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK_ROWS, count)) for start in range(0, count, _BLOCK_ROWS))
