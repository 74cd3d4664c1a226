"""The exact engine against scikit-learn in float64: whatever the tiles, threads, memory, number format and row order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from embstore.search.exact import scan, tiles
from embstore.search.exact.pairwise import brute_force
from embstore.search.exact.scan import NeighborBlock, all_neighbors, plan_scan
from embstore.search.exact.tiles import TileScan, quantise

Points = NDArray[np.float32]
MIB = 1 << 20
CPU = torch.device("cpu")


def crowded(count: int, *, rank: int = 24, seed: int = 0) -> Points:
    """Distinct centred points: a cloud, a crowd of near-copies far below a tile's resolution, isolated points."""
    random = np.random.default_rng(seed)
    point_NR = random.standard_normal((count, rank))
    crowd = count // 4
    point_NR[:crowd] = 3 + 1e-3 * random.standard_normal((crowd, rank))
    point_NR[crowd : crowd + 3] *= 40
    point_NR -= point_NR.mean(axis=0)
    return random.permutation(point_NR).astype(np.float32)


def oracle(points: Points, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """scikit-learn's tree in float64; self excluded. No distances tie in random points."""
    distances, ids = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(points.astype(np.float64)).kneighbors()
    return np.asarray(ids), np.asarray(distances)


def collect(blocks: Iterator[NeighborBlock], num_nodes: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    ids_GK, distances_GK = np.full((num_nodes, k), -7, dtype=np.int32), np.full((num_nodes, k), -7.0)
    for block in blocks:
        assert (ids_GK[block.nodes_N] == -7).all()  # no node twice
        ids_GK[block.nodes_N], distances_GK[block.nodes_N] = block.ids_NK, block.distances_NK
    return ids_GK, distances_GK


def scanned(points: Points, k: int, work: Path, **settings: Any) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    arguments: dict[str, Any] = {"threads": 2, "memory_bytes": 256 * MIB, "work": work, **settings}
    return collect(all_neighbors(points, k, **arguments), len(points), k)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def number_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What tiles are computed in; a CPU without bfloat16 emulates it."""
    dtype: torch.dtype = request.param
    monkeypatch.setattr(scan, "scan_dtype", lambda device: dtype)
    return dtype


def test_neighbours_are_scikit_learns(number_format: torch.dtype, tmp_path: Path) -> None:
    points = crowded(5000)
    told: list[int] = []
    ids_GK, distances_GK = scanned(points, 32, tmp_path, advance=told.append)
    expected_ids, expected_distances = oracle(points, 32)
    assert np.array_equal(ids_GK, expected_ids)
    assert distances_GK == pytest.approx(expected_distances, rel=1e-12)
    assert sum(told) == 5000


def test_no_tile_thread_memory_or_format_changes_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = crowded(3000, seed=1)
    first = scanned(points, 10, tmp_path, threads=1)
    assert np.array_equal(first[0], oracle(points, 10)[0])
    for tile_rows, panel_rows, threads, dtype in (
        (256, 3000, 3, torch.bfloat16),
        (512, 700, 2, torch.bfloat16),  # panels of rows, each compared with every node
        (2048, 3000, 2, torch.float32),
        (1024, 1024, 1, torch.float32),
    ):
        plan = scan.ScanPlan(tile_rows=tile_rows, panel_rows=panel_rows, memory_bytes=0)
        monkeypatch.setattr(scan, "plan_scan", lambda *_, plan=plan, **__: plan)
        monkeypatch.setattr(scan, "scan_dtype", lambda device, dtype=dtype: dtype)
        again = scanned(points, 10, tmp_path, threads=threads)
        assert np.array_equal(again[0], first[0])
        assert again[1].tobytes() == first[1].tobytes()


def test_some_nodes_have_the_neighbours_they_have_among_all(number_format: torch.dtype, tmp_path: Path) -> None:
    points = crowded(3000, seed=2)
    nodes = np.random.default_rng(0).permutation(3000)[:700]
    blocks = list(all_neighbors(points, 10, queries_Q=nodes, threads=2, memory_bytes=256 * MIB, work=tmp_path))
    assert np.array_equal(np.concatenate([block.nodes_N for block in blocks]), nodes)
    assert np.array_equal(np.concatenate([block.ids_NK for block in blocks]), oracle(points, 10)[0][nodes])


@pytest.mark.parametrize("kept_blocks", [1, 3, 5])
def test_a_scan_goes_on_after_any_block(kept_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scan.ScanPlan(tile_rows=512, panel_rows=3000, memory_bytes=0)
    monkeypatch.setattr(scan, "plan_scan", lambda *_, **__: plan)
    points = crowded(3000, seed=3)
    blocks_of_scan = all_neighbors(points, 10, threads=2, memory_bytes=256 * MIB, work=tmp_path)
    blocks = [next(blocks_of_scan) for _ in range(kept_blocks)]
    blocks_of_scan.close()  # as an interrupted build does
    finished = sum(len(block.nodes_N) for block in blocks)
    blocks += all_neighbors(points, 10, finished=finished, threads=2, memory_bytes=256 * MIB, work=tmp_path)
    assert np.array_equal(collect(iter(blocks), 3000, 10)[0], oracle(points, 10)[0])


@pytest.mark.parametrize("num_nodes", [1, 2, 9, 10, 11, 12, 255, 256, 257, 513])
def test_few_nodes_have_as_many_neighbours_as_there_are(num_nodes: int, number_format: torch.dtype, tmp_path: Path) -> None:
    points = np.random.default_rng(0).standard_normal((num_nodes, 5)).astype(np.float32)
    ids_GK, distances_GK = scanned(points, 10, tmp_path)
    found = min(10, num_nodes - 1)
    assert (ids_GK[:, found:] == -1).all()
    assert np.isposinf(distances_GK[:, found:]).all()
    if found:
        assert np.array_equal(ids_GK[:, :found], oracle(points, found)[0])


def test_ties_that_no_score_can_tell_apart_go_by_index(number_format: torch.dtype, tmp_path: Path) -> None:
    """Corners of a simplex are all equally far: more of them than a row has candidates."""
    points = (np.eye(400) - 1 / 400).astype(np.float32)
    ids_GK, _ = scanned(points, 10, tmp_path)
    distance_GG = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=-1)
    np.fill_diagonal(distance_GG, np.inf)
    assert np.array_equal(ids_GK, np.argsort(distance_GG, axis=1, kind="stable")[:, :10])


def with_bars_too_low(monkeypatch: pytest.MonkeyPatch, *, tile_rows: int) -> None:
    """The first scan of 3000 rows keeps what the second of their candidates beats: many rows are left in doubt."""
    plan = scan.ScanPlan(tile_rows=tile_rows, panel_rows=3000, memory_bytes=0)
    monkeypatch.setattr(scan, "plan_scan", lambda *_, **__: plan)
    rank = TileScan._rank
    monkeypatch.setattr(
        TileScan, "_rank", lambda scan, first_row: 2 if len(scan.queries_Q) == 3000 else rank(scan, first_row)
    )


def test_nothing_is_looked_at_that_was_not_scored(
    number_format: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh memory holds the best scores there are: half of a tile on the diagonal is never written, nor its minima."""

    def poisoned(size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full((size,) if isinstance(size, int) else size, torch.iinfo(dtype).min, dtype=dtype, device=device)

    monkeypatch.setattr(tiles, "_new_tile", poisoned)
    monkeypatch.setattr(torch, "empty", poisoned)
    points = crowded(5000, seed=6)  # an edge of a tile of 4096, and several products in its rows
    ids_GK, _ = scanned(points, 10, tmp_path)
    assert np.array_equal(ids_GK, oracle(points, 10)[0])


@pytest.mark.parametrize("most_candidates", [256, 11], ids=["scanned again", "float64"])
def test_bars_that_are_too_low_leave_rows_in_doubt_not_wrong(
    most_candidates: int, number_format: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = crowded(3000, seed=4)
    exact_rows = 0

    def counted(coord_GR: Points, nodes_Q: NDArray[np.int64], k: int) -> Any:
        nonlocal exact_rows
        exact_rows += len(nodes_Q)
        return brute_force(coord_GR, nodes_Q, k)

    monkeypatch.setattr(scan, "brute_force", counted)
    monkeypatch.setattr(scan, "_MOST_CANDIDATES", most_candidates)
    with_bars_too_low(monkeypatch, tile_rows=512)
    ids_GK, distances_GK = scanned(points, 10, tmp_path)
    expected_ids, expected_distances = oracle(points, 10)
    assert np.array_equal(ids_GK, expected_ids)
    assert distances_GK == pytest.approx(expected_distances, rel=1e-12)
    # never all: those whose scores can be told apart need no more than 256 candidates
    assert 0 < exact_rows < 3000 if most_candidates == 11 else exact_rows < 1500


def test_rows_scanned_again_come_in_few_heights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel for each shape of a product: 60,000 rows left 70 MiB of them, above the memory budget."""
    heights: set[int] = set()
    visit = TileScan.visit

    def seen(scan: TileScan, rows: slice, nodes: slice, **mirrored: Any) -> None:
        if len(scan.queries_Q) < 3000:
            heights.add(rows.stop - rows.start)
        visit(scan, rows, nodes, **mirrored)

    monkeypatch.setattr(TileScan, "visit", seen)
    with_bars_too_low(monkeypatch, tile_rows=256)
    scanned(crowded(3000, seed=4), 10, tmp_path)
    assert heights
    assert heights <= {2**power for power in range(10)}


def test_sorted_rows_cost_no_more_than_shuffled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In file order each tile would hold nearer nodes than all before it, and every one would be looked into."""
    taken: list[int] = []
    merge = TileScan._merge

    def counted(scan: TileScan, first_row: int, row_H: Any, *hits: Any) -> None:
        taken.append(len(row_H))
        merge(scan, first_row, row_H, *hits)

    monkeypatch.setattr(TileScan, "_merge", counted)
    plan = scan.ScanPlan(tile_rows=512, panel_rows=6000, memory_bytes=0)
    monkeypatch.setattr(scan, "plan_scan", lambda *_, **__: plan)
    line = np.linspace(-1, 1, 6000)
    points = np.stack([line, line**2 - 1 / 3], axis=1).astype(np.float32)
    scanned(points, 10, tmp_path)
    in_order = sum(taken)
    taken.clear()
    scanned(np.random.default_rng(0).permutation(points), 10, tmp_path)
    assert in_order < 1.2 * sum(taken)


# --- the bound ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rank=st.integers(1, 70),
    spread=st.floats(-6, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_no_score_exceeds_what_its_distance_allows(seed: int, rank: int, spread: float, dtype: torch.dtype) -> None:
    """The certificate: scores read from a tile are within ``reach`` of their distances."""
    random = np.random.default_rng(seed)
    centre_NR = random.standard_normal((60, rank)) * 10 ** random.uniform(-2, 2, (60, 1))
    points = (centre_NR[random.integers(0, 60, 120)] + 10**spread * random.standard_normal((120, rank))).astype(np.float32)
    operand = quantise(points, np.arange(120), dtype=dtype, device=CPU)
    scan = TileScan(operand, np.arange(120), 119, 256)
    scan.visit(slice(0, 120), slice(0, 120))
    ids_QC, magnitude_QC, _ = scan.best(slice(0, 120))
    assert (np.sort(ids_QC, axis=1) == np.array([np.delete(np.arange(120), row) for row in range(120)])).all()
    rows, columns = np.repeat(np.arange(120), 119), ids_QC.ravel()
    distance = np.linalg.norm(points[rows].astype(np.float64) - points[columns].astype(np.float64), axis=1)
    assert (magnitude_QC.ravel() <= operand.reach(rows, distance)).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.floats(-4, 1), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_what_is_no_candidate_scores_at_least_what_the_scan_says(seed: int, spread: float, dtype: torch.dtype) -> None:
    """The other half of the certificate: bars are set before all nodes were seen, so what they shut out is checked here."""
    random, count = np.random.default_rng(seed), 600
    centre_NR = random.standard_normal((8, 12))
    points = (centre_NR[random.integers(0, 8, count)] + 10**spread * random.standard_normal((count, 12))).astype(np.float32)
    operand = quantise(points, np.arange(count), dtype=dtype, device=CPU)
    scan = TileScan(operand, np.arange(count), 20, 256)
    blocks = [slice(start, min(start + 256, count)) for start in range(0, count, 256)]
    for place, rows in enumerate(blocks):
        scan.visit(rows, rows)
        for others in blocks[place + 1 :]:
            scan.visit(rows, others, mirrored=others)
    distance_QG = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=2)
    for rows in blocks:
        ids_QC, _, left_out_Q = scan.best(rows)
        assert np.isfinite(left_out_Q).all()
        own_Q = np.arange(rows.start, rows.stop)
        is_left_out_QG = np.ones((len(own_Q), count), dtype=np.bool_)
        np.put_along_axis(is_left_out_QG, np.column_stack([own_Q, ids_QC]), False, axis=1)
        place, other = np.nonzero(is_left_out_QG)
        assert (operand.reach(own_Q[place], distance_QG[own_Q[place], other]) >= np.asarray(left_out_Q)[place]).all()


def test_less_memory_means_smaller_panels_and_tiles() -> None:
    plans = [plan_scan(1_000_000, 256, 32, threads=2, memory_bytes=budget * MIB) for budget in (2048, 512, 256, 96)]
    for plan, budget in zip(plans, (2048, 512, 256, 96), strict=True):
        assert plan.memory_bytes <= budget * MIB
    assert plans[0].panel_rows == 1_000_000
    assert [plan.panel_rows for plan in plans] == sorted((plan.panel_rows for plan in plans), reverse=True)
    assert plans[-1].tile_rows < plans[0].tile_rows
