"""Clusters of prompts: crowded neighbourhoods and near-duplicates, as connected components of the neighbour graph.

A row may have 32 edges, so edges are never kept: each round reads the graph again, block by block. In memory are a few
numbers a row.

Shapes: N rows, K neighbours, B rows of a block, E edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR
from embstore.core.rows import slices

CROWDED_SHARE = 0.05
_NEAR = 0.1  # of the typical distance to the nearest other prompt
_BLOCK_ROWS = 1 << 12

Edges = tuple[NDArray[np.integer], NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """``count`` groups of two rows or more, which have ``rows`` rows; ``largest``: members of some, largest first."""

    count: int
    rows: int
    largest: list[NDArray[np.int32]]


def components(num_rows: int, edges: Callable[[], Iterable[Edges]]) -> NDArray[np.int32]:
    """The smallest row that each row is connected to, int32 [N]; each call of ``edges`` gives all pairs, in blocks.

    Labels spread along edges and jump to their label's label, so that a chain takes log N rounds.

    Examples
    --------
    >>> components(5, lambda: [(np.array([3, 1]), np.array([1, 4]))]).tolist()
    [0, 1, 2, 1, 1]
    """
    label_N = np.arange(num_rows, dtype=np.int32)
    while True:
        found_N = label_N.copy()
        for first_E, second_E in edges():
            low_E = np.minimum(label_N[first_E], label_N[second_E])
            for ends_E in (first_E, second_E):
                np.minimum.at(found_N, ends_E, low_E)
                np.minimum.at(found_N, label_N[ends_E], low_E)
        while not np.array_equal(jumped_N := found_N[found_N], found_N):
            found_N = jumped_N
        if np.array_equal(found_N, label_N):
            return label_N
        label_N = found_N


def crowded_neighbourhoods(
    neighbor_ids_NK: NDArray[np.int32],
    groups_N: NDArray[np.int32],
    mean_distance_N: NDArray[np.float64],
    k: int,
    *,
    most: int,
) -> Clusters:
    """Connected components among the most crowded twentieth of the prompts, ``most`` of them with their members.

    Two crowded prompts are linked when one is among the ``k`` nearest of the other: the clusters of a density level set,
    with density by nearest neighbours. Prompts that share a vector are linked too.
    """
    finite_N = np.isfinite(mean_distance_N) & (groups_N >= 0)
    if not finite_N.any():
        return Clusters(count=0, rows=0, largest=[])
    is_crowded_N = finite_N & (mean_distance_N <= np.quantile(mean_distance_N[finite_N], CROWDED_SHARE))

    def edges() -> Iterator[Edges]:
        for block in slices(0, len(groups_N), _BLOCK_ROWS):
            rows_B = np.flatnonzero(is_crowded_N[block]) + block.start
            first_E, second_E = np.repeat(rows_B, k), neighbor_ids_NK[rows_B][:, :k].ravel()
            stays_E = (second_E >= 0) & is_crowded_N[second_E]
            yield first_E[stays_E], second_E[stays_E]
            yield _copies(groups_N, block, among_N=is_crowded_N)

    return _clusters(components(len(groups_N), edges), most)


def near_distance(neighbor_distances_NK: NDArray[np.float32]) -> float:
    """The largest distance of near-duplicates: a tenth of the median distance to the nearest other vector."""
    nearest_N = neighbor_distances_NK[:, 0]
    finite = nearest_N[np.isfinite(nearest_N)]
    return max(NOISE_FLOOR, _NEAR * float(np.median(finite))) if len(finite) else NOISE_FLOOR


def near_duplicates(
    neighbor_ids_NK: NDArray[np.int32],
    neighbor_distances_NK: NDArray[np.float32],
    groups_N: NDArray[np.int32],
    distance: float,
    *,
    most: int,
) -> Clusters:
    """Prompts linked by steps of at most ``distance``, or by a shared vector, ``most`` groups with their members."""
    has_vector_N = groups_N >= 0

    def edges() -> Iterator[Edges]:
        for block in slices(0, len(groups_N), _BLOCK_ROWS):
            place_E, column_E = np.nonzero(neighbor_distances_NK[block] <= distance)
            second_E = neighbor_ids_NK[block][place_E, column_E]
            stays_E = second_E >= 0
            yield place_E[stays_E] + block.start, second_E[stays_E]
            yield _copies(groups_N, block, among_N=has_vector_N)

    return _clusters(components(len(groups_N), edges), most)


def _copies(groups_N: NDArray[np.int32], block: slice, *, among_N: NDArray[np.bool_]) -> Edges:
    """Edges from the rows of a block to the first row with the same vector, where both are ``among_N``."""
    group_B = groups_N[block]
    rows_B = np.arange(block.start, block.stop)
    is_copy_B = (group_B >= 0) & (group_B != rows_B) & among_N[block] & among_N[group_B]
    return rows_B[is_copy_B], group_B[is_copy_B]


def _clusters(label_N: NDArray[np.int32], most: int) -> Clusters:
    """The parts of two rows or more, by the label of each row; of the largest, ties by first row, the members."""
    size_N = np.bincount(label_N).astype(np.int32)
    labels = np.flatnonzero(size_N > 1).astype(np.int32)
    size_C = size_N[labels]
    del size_N
    largest = [
        np.flatnonzero(label_N == label).astype(np.int32) for label in labels[np.argsort(-size_C, kind="stable")[:most]]
    ]
    return Clusters(count=len(labels), rows=int(size_C.sum(dtype=np.int64)), largest=largest)
