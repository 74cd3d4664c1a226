"""Distances of pairs of stored rows, when far fewer rows fit the memory than there are.

Shapes: V columns, P pairs, F first rows of a pass, S second rows or pairs of one chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLAB_BYTES = 1 << 20
_ROW_BYTES = 1024  # of a row of a pass: where its pairs lie, their order and distances

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRows:
    """Where stored rows are read: ``read`` gives float16 [n, V] of ascending rows, and decodes each of their chunks once."""

    read: Callable[[Rows], NDArray[np.float16]]
    dimension: int
    chunk_rows: int


def stored_distances(
    keys_P: Rows, num_rows: int, stored: StoredRows, *, threads: int, memory_bytes: int
) -> Iterator[tuple[Rows, NDArray[np.float64]]]:
    """Distances float64 of pairs and where they belong, by passes: first rows are held, chunks of second rows go by.

    A chunk is decoded at most once a pass, and once for its own first rows.
    """
    row_bytes = 2 * stored.dimension + _ROW_BYTES
    # beside the rows held: this block of second rows, the one before it, and a chunk encoded and decoded
    most_rows = max(stored.chunk_rows, memory_bytes // row_bytes - 4 * stored.chunk_rows)
    with ThreadPoolExecutor(threads, thread_name_prefix="embstore-refine") as pool:
        for part, first_F in _passes(keys_P, num_rows, stored.chunk_rows, most_rows):
            for place, found in _pass(keys_P[part], first_F, num_rows, stored, pool):
                yield part.start + place, found


def _pass(
    keys_P: Rows, first_F: Rows, num_rows: int, stored: StoredRows, pool: ThreadPoolExecutor
) -> Iterator[tuple[Rows, NDArray[np.float64]]]:
    first_FV = stored.read(first_F)
    first_P, second_P = np.divmod(keys_P, num_rows)
    order_P = np.argsort(second_P, kind="stable")
    chunk_P = second_P[order_P] // stored.chunk_rows
    step = max(1, _SLAB_BYTES // (4 * stored.dimension))
    for mine in np.split(order_P, np.flatnonzero(np.diff(chunk_P)) + 1):
        second_S = np.unique(second_P[mine])
        second_SV = stored.read(second_S)
        left, right = np.searchsorted(first_F, first_P[mine]), np.searchsorted(second_S, second_P[mine])
        slabs = [slice(start, start + step) for start in range(0, len(mine), step)]
        norms = pool.map(
            _difference_norms,
            itertools.repeat(first_FV),
            itertools.repeat(second_SV),
            (left[slab] for slab in slabs),
            (right[slab] for slab in slabs),
        )
        yield mine, np.concatenate(list(norms))


def _passes(keys_P: Rows, num_rows: int, chunk_rows: int, most_rows: int) -> Iterator[tuple[slice, Rows]]:
    """Cut ascending pairs by their first rows, at chunk borders, so that no part has more first rows than ``most_rows``."""
    borders = np.searchsorted(keys_P, np.arange(0, num_rows + chunk_rows, chunk_rows) * num_rows)
    held: list[Rows] = []
    start = num_held = 0
    for low, high in itertools.pairwise(borders.tolist()):
        rows = np.unique(keys_P[low:high] // num_rows)
        if held and num_held + len(rows) > most_rows:
            yield slice(start, low), np.concatenate(held)
            start, held, num_held = low, [], 0
        held.append(rows)
        num_held += len(rows)
    yield slice(start, len(keys_P)), np.concatenate(held)


def _difference_norms(
    first_FV: NDArray[np.float16], second_SV: NDArray[np.float16], left: Rows, right: Rows
) -> NDArray[np.float64]:
    """|first - second| of each pair: float32 holds differences of float16 below 1 exactly, sums are float64."""
    difference = _widened(first_FV[left])
    difference -= _widened(second_SV[right])
    norms: NDArray[np.float64] = 2.0**112 * np.sqrt(np.einsum("sv,sv->s", difference, difference, dtype=np.float64))
    return norms


def _widened(half: NDArray[np.float16]) -> NDArray[np.float32]:
    """Finite float16 values times 2^-112, exactly: their bits under float32's exponent. numpy's cast takes 4 x as long."""
    bits: NDArray[np.int32] = half.view(np.int16).astype(np.int32)  # the sign above
    bits <<= 13
    bits &= np.int32(-0x7000_2000)  # one sign bit of them, exponent and mantissa
    return bits.view(np.float32)
