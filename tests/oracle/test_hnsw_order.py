"""The order that graphs take nodes in: cells against whole-number arithmetic, chunks against the shuffle they sort."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.core.sampling import shuffled
from embstore.search.hnsw.order import cells, in_growing_chunks

Points = NDArray[np.float32]


def clustered(count: int, *, rank: int = 24, seed: int = 0) -> Points:
    random = np.random.default_rng(seed)
    centre_CR = 3 * random.standard_normal((12, rank))
    return (centre_CR[random.integers(0, 12, count)] + 0.3 * random.standard_normal((count, rank))).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 24, 700])
def test_nodes_of_a_cell_are_nearest_to_one_pivot(rank: int, scale: float) -> None:
    """In Python's whole numbers, from the definition: 2^24 values, three times R squares of the largest below them."""
    points = clustered(500, rank=rank) * np.float32(scale)
    points[3] *= 50  # an isolated point: clipped
    pivots = shuffled(500, 7)[:32]  # 500 has nine bits: 2 * 2^4
    largest = int(np.sqrt(2**24 // (3 * rank)))
    spread = 2 * float(np.median(np.abs(points[pivots]).max(axis=1)))
    whole = np.rint(np.clip(points.astype(np.float64) * (largest / spread), -largest, largest)).astype(np.int64)
    squared_GP = np.square(whole[:, None] - whole[pivots]).sum(axis=2)
    cell_G = cells(points, 7)
    assert cell_G.dtype == np.int32
    assert set(cell_G) <= set(range(32))
    own_P = cell_G[pivots]
    # a node's cell is that of its nearest pivot, the first of them where several are as near; rounding of a coordinate to
    # one whole number or the next may differ in float32, which moves a squared distance by no more than this
    slack = 4 * largest * rank
    pivot_of_cell = {int(cell): number for number, cell in reversed(list(enumerate(own_P)))}
    chosen = np.array([squared_GP[node, pivot_of_cell[int(cell)]] for node, cell in enumerate(cell_G)])
    assert (chosen <= squared_GP.min(axis=1) + slack).all()
    assert (chosen == squared_GP.min(axis=1)).mean() > 0.99


def test_a_walk_along_the_cells_takes_short_steps() -> None:
    points = clustered(4000)
    cell_G = cells(points, 0)

    def mean_step(order_G: NDArray[np.intp]) -> float:
        return float(np.linalg.norm(np.diff(points[order_G].astype(np.float64), axis=0), axis=1).mean())

    along = mean_step(np.argsort(cell_G, kind="stable"))
    assert along < 0.2 * mean_step(shuffled(4000, 0))
    # and cells of one cluster follow each other: neighbouring numbers are no farther apart than any two of a cluster
    centre_P = np.stack([points[cell_G == cell].mean(axis=0) for cell in np.unique(cell_G)])
    assert np.median(np.linalg.norm(np.diff(centre_P, axis=0), axis=1)) < 3


def test_cells_are_the_same_from_any_number_of_threads(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", clustered(3000, rank=200))
    program = (
        "import sys, zlib; import numpy as np; from embstore.search.hnsw.order import cells\n"
        "print(zlib.crc32(cells(np.load(sys.argv[1]), 0).tobytes()))"
    )
    found = set()
    for threads in ("1", "2", "3"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, str(tmp_path / "points.npy")]
        found.add(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    assert len(found) == 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 9000), num_cells=st.integers(1, 40), seed=st.integers(0, 9))
def test_each_chunk_is_a_sample_sorted_by_cell(count: int, num_cells: int, seed: int) -> None:
    nodes = 3 * shuffled(count, seed)  # as a shard: not every number
    cell_G = np.random.default_rng(seed).integers(0, num_cells, 3 * count).astype(np.int32)
    order = in_growing_chunks(nodes, cell_G)
    assert np.array_equal(order[:1024], nodes[:1024])
    start = 1024
    while start < count:
        chunk = order[start : 4 * start]
        assert sorted(chunk) == sorted(nodes[start : 4 * start])
        assert (np.diff(cell_G[chunk]) >= 0).all()
        start *= 4
    assert len(order) == count


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [0, 1e-44])
def test_few_nodes_and_coordinates_next_to_nothing_are_one_cell(count: int, value: float) -> None:
    assert cells(np.full((count, 4), value, dtype=np.float32), 0).tolist() == [0] * count
