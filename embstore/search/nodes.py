"""Nodes of a search: rows with equal vectors are one, and all are centred.

Equal are rows with the same bits, and rows that were made from the same tokens: in a batch of another height the same tokens
may give other low bits (docs/decisions/0053).

So k neighbours are k *distinct vectors*, and copies cannot wreck a graph. Centring removes the direction that all logit rows
share, which carries nearly all of their norm (docs/decisions/0006).

Shapes: N rows, G nodes (distinct vectors), K neighbours kept, R coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR
from embstore.core.errors import CorruptStoreError
from embstore.core.rows import slices
from embstore.host.scratch import block_rows, large_array

_BLOCK_ROWS = 8192
# Rows of the same tokens differ by rounding alone: by 2e-6 in float32, by a few 1e-3 at most in bfloat16 (docs/limits.md).
# Two that are further apart have their digest by accident, or from a forger.
LARGEST_DIFFERENCE = 10 * NOISE_FLOOR

Rows = NDArray[np.int64]


def group_rows(
    coord_NR: NDArray[np.float32], failed_N: NDArray[np.bool_], sequence_N: NDArray[np.uint64] | None = None
) -> tuple[Rows, Rows]:
    """Group rows with equal vectors: bit-equal (0.0 and -0.0 are equal), or made from the same tokens.

    Parameters
    ----------
    coord_NR
        float32 [N, R] coordinates as stored; may be a memory map.
    failed_N
        Rows without a vector.
    sequence_N
        uint64 [N], digests of the tokens that rows were made from, 0 where they are unknown. Rows of one digest are a group
        as far as they are within ``LARGEST_DIFFERENCE`` of the first of them. None: all are unknown.

    Returns
    -------
    rows_G, node_N
        The first row of each distinct vector, ascending; each row's node (-1 for failed rows). Price: one sequential read,
        a second look at rows of one hash or digest, 64 bytes a row.
    """
    present = np.flatnonzero(~failed_N)
    first_of_N = np.full(len(coord_NR), -1, dtype=np.int64)
    first_of_N[present] = present
    for rows in _runs(_hashes(coord_NR), present):
        _group_run(coord_NR, rows, first_of_N)
    if sequence_N is not None:
        for rows in _runs(sequence_N, present[sequence_N[present] != 0]):
            if len(near := _near_first(coord_NR, rows)) > 1:
                _join(first_of_N, near)
        while (first_of_N[present] != (further := first_of_N[first_of_N[present]])).any():
            first_of_N[present] = further
    rows_G = np.flatnonzero((first_of_N >= 0) & (first_of_N == np.arange(len(coord_NR))))
    node_N = np.full(len(coord_NR), -1, dtype=np.int64)
    node_N[present] = np.searchsorted(rows_G, first_of_N[present])
    return rows_G, node_N


def centred(coord_NR: NDArray[np.float32], rows_G: Rows, work: Path) -> NDArray[np.float32]:
    """float32 [G, R] of the nodes minus their mean, in ``work`` as a memory map: its pages are not anonymous memory.

    Raises
    ------
    CorruptStoreError
        A coordinate is not finite: one such row would spoil the answers of others in any index.
    """
    rank = coord_NR.shape[1]
    total_R = np.zeros(rank)
    blocks = list(slices(0, len(rows_G), block_rows(rank)))
    for part in blocks:
        block = coord_NR[rows_G[part]]
        if not np.isfinite(block).all():
            row = int(rows_G[part][~np.isfinite(block).all(axis=1)][0])
            raise CorruptStoreError(
                f"the coordinates of row {row} are not finite, though no failure was committed for it",
                hint="run embstore verify STORE --repair, then embstore build --resume",
            )
        total_R += block.sum(axis=0, dtype=np.float64)
    mean_R = total_R / max(1, len(rows_G))
    # written, then mapped: a full disk is an error from write, but a bus error from a mapped page
    shape = (len(rows_G), rank)
    with (work / "centred.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in blocks:
            centred_BR = coord_NR[rows_G[part]].astype(np.float64) - mean_R
            file.write(centred_BR.astype("<f4").data.cast("B"))
    if not len(rows_G):
        return np.empty(shape, dtype=np.float32)
    centred_GR: NDArray[np.float32] = np.load(work / "centred.npy", mmap_mode="r", allow_pickle=False)
    return centred_GR


def expand(
    ids_GK: NDArray[np.int32], distances_GK: NDArray[np.float32], rows_G: Rows, node_N: Rows, work: Path
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Node neighbours as row neighbours: every member of a group gets its node's, each node named by its first row."""
    shape = (len(node_N), ids_GK.shape[1])
    ids_NK = large_array(work / "ids.npy", shape, np.int32)
    distances_NK = large_array(work / "distances.npy", shape, np.float32)
    for block in slices(0, len(node_N), _BLOCK_ROWS):
        node_B = node_N[block]
        valid = node_B >= 0
        ids, distances = ids_NK[block], distances_NK[block]
        ids[:], distances[:] = -1, np.inf
        if valid.any():
            nearest = ids_GK[node_B[valid]]
            ids[valid] = np.where(nearest >= 0, rows_G[nearest], -1)
            distances[valid] = distances_GK[node_B[valid]]
    return ids_NK, distances_NK


def _hashes(coord_NR: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A 64-bit hash of each row's bits: a sum of words times odd constants. Equal rows have equal hashes."""
    words = np.random.Philox(key=1).random_raw(coord_NR.shape[1]) | np.uint64(1)
    hash_N = np.empty(len(coord_NR), dtype=np.uint64)
    for part in slices(0, len(coord_NR), block_rows(coord_NR.shape[1])):
        block = np.ascontiguousarray(coord_NR[part]) + np.float32(0)  # -0.0 becomes 0.0
        hash_N[part] = (block.view(np.uint32) * words).sum(axis=1, dtype=np.uint64)
    return hash_N


def _runs(key_N: NDArray[np.uint64], rows: Rows) -> Iterator[Rows]:
    """The rows of each key that several of these rows have; ``rows`` and all runs are ascending."""
    ordered = rows[np.argsort(key_N[rows], kind="stable")]
    key_N = key_N[ordered]
    is_repeat = np.concatenate([[False], key_N[1:] == key_N[:-1], [False]])
    edges = np.flatnonzero(is_repeat[1:] != is_repeat[:-1])
    for start, last in zip(edges[::2], edges[1::2], strict=True):
        yield ordered[start : last + 1]


def _near_first(coord_NR: NDArray[np.float32], rows: Rows) -> Rows:
    """Those of the rows that differ from the first one by rounding alone, itself included (none, if it is not finite)."""
    near = []
    for part in slices(0, len(rows), block_rows(coord_NR.shape[1])):
        square_B = np.square(coord_NR[rows[part]] - coord_NR[rows[0]]).sum(axis=1, dtype=np.float64)
        near.append(rows[part][square_B <= LARGEST_DIFFERENCE**2])
    return np.concatenate(near)


def _join(first_of_N: Rows, rows: Rows) -> None:
    """Make one group of the groups of these rows: their first rows point at the least of them, perhaps by way of others."""
    firsts = first_of_N[rows]
    while (firsts != (further := first_of_N[firsts])).any():
        firsts = further
    first_of_N[firsts] = first_of_N[rows] = firsts.min()


def _group_run(coord_NR: NDArray[np.float32], rows: Rows, first_of_N: Rows) -> None:
    """Rows of one hash, ascending: point each at the first row with its vector (several vectors may have one hash)."""
    firsts: list[int] = []
    for part in slices(0, len(rows), block_rows(coord_NR.shape[1])):
        rows_B = rows[part]
        block = coord_NR[rows_B]
        is_open = np.ones(len(rows_B), dtype=np.bool_)
        while is_open.any():
            known = [first for first in firsts if (coord_NR[first] == block[is_open][0]).all()]
            first = known[0] if known else int(rows_B[is_open][0])
            if not known:
                firsts.append(first)
            same = is_open & (block == coord_NR[first]).all(axis=1)
            first_of_N[rows_B[same]] = first
            is_open &= ~same
