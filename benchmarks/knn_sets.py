"""Points that neighbour searches are compared on, and the true neighbours of some of them in float64.

``store``: centred coordinates of a real store, bit-equal rows once. ``easy``: 200 clusters, spectrum i^-0.5. ``hard``: no
clusters, spectrum i^-0.25, so that all points are nearly equally far. Both seeded, unit norm, centred, 256 dimensions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RANK = 256
TRUTH_ROWS = 4000  # where a graph misses a whole cluster of 200, 500 rows do not tell 0.998 from 1
TRUTH_K = 10
_BLOCK_ROWS, _JUDGED_ROWS = 4096, 64

Points = NDArray[np.float32]


def make(kind: str, num_rows: int, *, store: Path | None, seed: int = 0) -> Points:
    """Float32 [num_rows, R] points of a kind."""
    if kind == "store":
        if store is None:
            raise SystemExit("points of a store need --store")
        coordinates = np.load(store / "coordinates.npy", allow_pickle=False).astype(np.float64)[:num_rows]
        _, first = np.unique(coordinates, axis=0, return_index=True)
        points = coordinates[np.sort(first)]
        centred: Points = (points - points.mean(axis=0)).astype(np.float32)
        return centred
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, RANK + 1, dtype=np.float32) ** (-0.5 if kind == "easy" else -0.25)
    points_NR = random.standard_normal((num_rows, RANK), dtype=np.float32) * spectrum
    if kind == "easy":
        centre_CR = 2 * random.standard_normal((200, RANK), dtype=np.float32) * spectrum
        points_NR *= 0.5
        points_NR += centre_CR[random.integers(0, 200, num_rows)]
    points_NR /= np.linalg.norm(points_NR, axis=1, keepdims=True)
    points_NR -= points_NR.mean(axis=0, dtype=np.float64).astype(np.float32)
    return points_NR


def truth(points_NR: Points) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows to judge by, and their distances to the 10 nearest others: float64 numpy, every pair."""
    rows = np.sort(np.random.default_rng(1).choice(len(points_NR), min(TRUTH_ROWS, len(points_NR)), replace=False))
    query_QR = points_NR[rows].astype(np.float64)
    query_Q1 = np.square(query_QR).sum(axis=1)[:, None]
    nearest = np.full((len(rows), TRUTH_K), -1)
    squared_QK = np.full((len(rows), TRUTH_K), np.inf)
    for start in range(0, len(points_NR), _BLOCK_ROWS):
        block_BR = points_NR[start : start + _BLOCK_ROWS].astype(np.float64)
        squared_QB = query_Q1 + np.square(block_BR).sum(axis=1) - 2 * query_QR @ block_BR.T
        is_here = (rows >= start) & (rows < start + len(block_BR))
        squared_QB[is_here, rows[is_here] - start] = np.inf  # itself
        ids_QX = np.concatenate(
            [nearest, np.broadcast_to(np.arange(start, start + len(block_BR)), squared_QB.shape)], axis=1
        )
        squared_QX = np.concatenate([squared_QK, squared_QB], axis=1)
        best_QK = np.argpartition(squared_QX, TRUTH_K - 1, axis=1)[:, :TRUTH_K]
        nearest = np.take_along_axis(ids_QX, best_QK, axis=1)
        squared_QK = np.take_along_axis(squared_QX, best_QK, axis=1)
    difference = points_NR[nearest].astype(np.float64) - query_QR[:, None]
    return rows, np.sort(np.sqrt(np.square(difference).sum(axis=2)), axis=1)


def recall(points_NR: Points, rows: NDArray[np.int64], true_QK: NDArray[np.float64], ids_NK: NDArray[np.integer]) -> float:
    """Share of the 10 nearest that were found; the row itself never counts, ties within 1e-4 do.

    A few rows at a time: an engine's memory is measured while this is computed.
    """
    num_found = 0
    for start in range(0, len(rows), _JUDGED_ROWS):
        part = slice(start, start + _JUDGED_ROWS)
        found = ids_NK[rows[part]]
        difference = points_NR[np.maximum(found, 0)].astype(np.float64) - points_NR[rows[part]].astype(np.float64)[:, None]
        distance = np.sqrt(np.square(difference).sum(axis=2))
        distance[(found < 0) | (found == rows[part, None])] = np.inf
        nearest = np.sort(distance, axis=1)[:, :TRUTH_K]
        num_found += int((nearest <= true_QK[part, -1:] * (1 + 1e-4)).sum())
    return num_found / (TRUTH_K * len(rows))
