"""Near nodes get near numbers: the order in which a graph takes nodes in, and is asked about them.

A search touches a few thousand vectors around its node. When the next node lies next to it they are in the core's cache; in
shuffled order every one comes from memory, and a graph of a hundred thousand nodes of 256 coordinates waits for it more than
half of the time (docs/decisions/0022).

Shapes: G nodes, P pivots (one per cell), R coordinates.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from embstore.core.rows import slices
from embstore.core.sampling import shuffled
from embstore.host.scratch import block_rows

_MOST_CELLS = 1024
_LEAST_SPREAD = np.float32(1e-30)  # coordinates smaller than this are in one cell
_FIRST_CHUNK, _GROWTH = 1024, 4

Coordinates = NDArray[np.float32]


def cells(coord_GR: Coordinates, seed: int) -> NDArray[np.int32]:
    """Number of each node's cell, int32 [G]; cells with near numbers lie near each other.

    A cell is the nodes nearest to one of about 2 sqrt(G) pivots, at most 1024: the first of the shuffle by ``seed``.
    Cells are numbered along a chain from each pivot to the nearest one left. Coordinates are rounded to so few whole numbers
    that float32 products of them are exact: the same cells on any CPU, with any BLAS, from any number of threads.

    Price: G * P products of R, a twentieth of what the graphs cost. Memory: a [P, P] and a [P, R] matrix of float64.
    """
    num_nodes, rank = coord_GR.shape
    if not num_nodes:
        return np.zeros(0, dtype=np.int32)
    num_pivots = min(_MOST_CELLS, 2 << (num_nodes.bit_length() // 2), num_nodes)
    pivot_PR = coord_GR[shuffled(num_nodes, seed)[:num_pivots]]
    # sums of 3 R squares of the largest whole number stay below 2^24, where float32 has every one
    largest = np.float32(math.isqrt((1 << 24) // (3 * rank)))
    scale = largest / max(2 * np.median(np.abs(pivot_PR).max(axis=1)), _LEAST_SPREAD)
    pivot_PR = _whole_numbers(pivot_PR, scale, largest)
    square_P = np.square(pivot_PR).sum(axis=1)
    number_P = _chained(pivot_PR)
    cell_G = np.empty(num_nodes, dtype=np.int32)
    for block in slices(0, num_nodes, block_rows(max(rank, num_pivots))):
        block_BR = _whole_numbers(coord_GR[block], scale, largest)
        cell_G[block] = number_P[(2 * (block_BR @ pivot_PR.T) - square_P).argmax(axis=1)]
    return cell_G


def in_growing_chunks(nodes: NDArray[np.int64], cell_G: NDArray[np.int32]) -> NDArray[np.int64]:
    """Shuffled nodes in chunks, each three times as many as came before it; nodes of a chunk are sorted by cell.

    If all nodes were sorted, the graph would join each cell to earlier ones by few links, and searches would miss them. So
    each chunk is a random sample, and the graph of the chunks so far is as good as that of a shuffle.
    """
    bounds = [_FIRST_CHUNK]
    while bounds[-1] < len(nodes):
        bounds.append(_GROWTH * bounds[-1])
    first, *others = np.split(nodes, bounds[:-1])
    return np.concatenate([first, *(chunk[np.argsort(cell_G[chunk], kind="stable")] for chunk in others)])


def _whole_numbers(coord_BR: Coordinates, scale: np.floating, largest: np.float32) -> Coordinates:
    whole_BR: Coordinates = np.rint(np.clip(coord_BR * np.float32(scale), -largest, largest))
    return whole_BR


def _chained(pivot_PR: Coordinates) -> NDArray[np.int32]:
    """The place of each pivot in a chain that starts at the first and goes on to the nearest that is left."""
    pivots = pivot_PR.astype(np.float64)
    square_P = np.square(pivots).sum(axis=1)
    distance_PP = pivots @ pivots.T
    distance_PP *= -2
    distance_PP += square_P[:, None]
    distance_PP += square_P
    place_P = np.zeros(len(pivots), dtype=np.int32)
    here = 0
    distance_PP[:, here] = np.inf
    for place in range(1, len(pivots)):
        here = int(distance_PP[here].argmin())
        place_P[here] = place
        distance_PP[:, here] = np.inf
    return place_P
