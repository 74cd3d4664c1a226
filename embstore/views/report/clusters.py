"""Clusters of prompts: crowded neighbourhoods and near-duplicates, as connected components of the neighbour graph.

Shapes: N rows, K neighbours, E edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR

CROWDED_SHARE = 0.05
_NEAR = 0.1  # of the typical distance to the nearest other prompt

Members = NDArray[np.int64]


def components(num_rows: int, first_E: NDArray[np.integer], second_E: NDArray[np.integer]) -> NDArray[np.int64]:
    """The smallest row that each row is connected to, int64 [N]; an edge joins ``first_E[i]`` and ``second_E[i]``.

    Labels spread along edges and jump to their label's label, so that a chain takes log N rounds.

    Examples
    --------
    >>> components(5, np.array([3, 1]), np.array([1, 4])).tolist()
    [0, 1, 2, 1, 1]
    """
    label_N = np.arange(num_rows, dtype=np.int64)
    while True:
        low_E = np.minimum(label_N[first_E], label_N[second_E])
        found_N = label_N.copy()
        for ends_E in (first_E, second_E):
            np.minimum.at(found_N, ends_E, low_E)
            np.minimum.at(found_N, label_N[ends_E], low_E)
        while not np.array_equal(jumped_N := found_N[found_N], found_N):
            found_N = jumped_N
        if np.array_equal(found_N, label_N):
            return label_N
        label_N = found_N


def crowded_neighbourhoods(
    neighbor_ids_NK: NDArray[np.int32], groups_N: NDArray[np.int32], mean_distance_N: NDArray[np.float64], k: int
) -> list[Members]:
    """Connected components among the most crowded twentieth of the prompts, largest first.

    Two crowded prompts are linked when one is among the ``k`` nearest of the other: the clusters of a density level set,
    with density by nearest neighbours. Prompts that share a vector are linked too.
    """
    finite_N = np.isfinite(mean_distance_N) & (groups_N >= 0)
    if not finite_N.any():
        return []
    is_crowded_N = finite_N & (mean_distance_N <= np.quantile(mean_distance_N[finite_N], CROWDED_SHARE))
    rows = np.flatnonzero(is_crowded_N)
    first_E = np.repeat(rows, k)
    second_E = neighbor_ids_NK[rows][:, :k].ravel().astype(np.int64)
    stays_E = (second_E >= 0) & is_crowded_N[second_E]
    return _parts(groups_N, first_E[stays_E], second_E[stays_E], among_N=is_crowded_N)


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
) -> list[Members]:
    """Prompts linked by steps of at most ``distance``, or by a shared vector, largest group first."""
    first_E, column_E = np.nonzero(neighbor_distances_NK <= distance)
    second_E = neighbor_ids_NK[first_E, column_E].astype(np.int64)
    stays_E = second_E >= 0
    return _parts(groups_N, first_E[stays_E], second_E[stays_E], among_N=groups_N >= 0)


def _parts(
    groups_N: NDArray[np.int32], first_E: NDArray[np.int64], second_E: NDArray[np.int64], *, among_N: NDArray[np.bool_]
) -> list[Members]:
    """Connected components of two rows or more, largest first, ties by first row."""
    copies = np.flatnonzero(among_N & (groups_N >= 0) & (groups_N != np.arange(len(groups_N))))
    copies = copies[among_N[groups_N[copies]]]
    first_E = np.concatenate([first_E, copies])
    second_E = np.concatenate([second_E, groups_N[copies].astype(np.int64)])
    touched = np.unique(np.concatenate([first_E, second_E]))
    if not len(touched):
        return []
    label_T = components(len(groups_N), first_E, second_E)[touched]
    order = np.argsort(label_T, kind="stable")
    parts = np.split(touched[order], np.flatnonzero(np.diff(label_T[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: (-len(part), int(part[0])))
