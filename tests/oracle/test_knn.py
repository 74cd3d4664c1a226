"""The neighbour graph against scikit-learn in float64, and what it does about copies, failed rows, short answers and misses.

The points lie in clusters of very uneven density, and all share an offset a hundred times their spread, as logit rows share
one direction: distances must be taken after centring.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

from embstore.core.config import K_MAX, DensityConfig, WeightingConfig
from embstore.core.density import mean_distance, sampling_weights
from embstore.core.diagnostics import total_variation
from embstore.core.errors import CorruptStoreError
from embstore.core.events import Event, Notice, ignore
from embstore.search import node_search, nodes, search_plan
from embstore.search.graph import KnnGraph, build_graph
from embstore.search.hnsw import shards
from embstore.search.hnsw.shards import Candidates, Effort, hnsw_candidates

Points = NDArray[np.float32]


def clustered(count: int, *, rank: int = 16, seed: int = 0) -> Points:
    """Distinct points float32 [count, rank]; within a cluster 0.01 to 0.5 wide, the clusters spread over 1."""
    random = np.random.default_rng(seed)
    cluster_N = random.choice(100, size=count, p=random.dirichlet(np.ones(100)))
    width_N = 10 ** random.uniform(-2, -0.3, 100)[cluster_N]
    point_NR = random.standard_normal((100, rank))[cluster_N] + width_N[:, None] * random.standard_normal((count, rank))
    point_NR -= point_NR.mean(axis=0)
    spread = np.sqrt((point_NR**2).sum(axis=1).mean())
    direction_R = random.standard_normal(rank)
    return (point_NR + 100 * spread * direction_R / np.linalg.norm(direction_R)).astype(np.float32)


def exact_distances(points: Points, k: int = K_MAX) -> NDArray[np.float64]:
    """Distances to the k nearest others in float64, by scikit-learn's tree."""
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(centred).kneighbors()
    return np.asarray(distances)


def graph_of(
    points: Points,
    work: Path,
    *,
    failed: NDArray[np.bool_] | None = None,
    threads: int = 2,
    observer: Callable[[Event], None] = ignore,
    sequence_N: NDArray[np.uint64] | None = None,
    **settings: Any,
) -> KnnGraph:
    return build_graph(
        points,
        np.zeros(len(points), dtype=np.bool_) if failed is None else failed,
        DensityConfig(**{"knn": "hnsw", **settings}),
        sequence_N=sequence_N,
        threads=threads,
        memory_bytes=1 << 30,
        work=work,
        observer=observer,
    )


def recall(distances_NK: NDArray[np.floating], exact_NK: NDArray[np.float64]) -> float:
    return float((distances_NK[:, :10] <= exact_NK[:, 9:10] * (1 + 1e-4)).mean())


def weights_of(graph: KnnGraph) -> NDArray[np.float32]:
    return sampling_weights(mean_distance(graph.distances_NK, 10), graph.groups_N, WeightingConfig()).weights


@pytest.fixture(scope="module")
def points() -> Points:
    return clustered(5000)


@pytest.fixture(scope="module")
def exact_NK(points: Points) -> NDArray[np.float64]:
    return exact_distances(points)


@pytest.mark.parametrize(("method", "shards"), [("hnsw", 1), ("hnsw", 4), ("exact", None)])
def test_neighbours_and_weights_are_scikit_learns(
    points: Points, exact_NK: NDArray[np.float64], method: str, shards: int | None, tmp_path: Path
) -> None:
    graph = graph_of(points, tmp_path, knn=method, shards=shards)
    assert graph.shards == (shards or 0)
    assert recall(graph.distances_NK, exact_NK) >= 0.999
    assert total_variation(weights_of(graph), exact_NK[:, :10].mean(axis=1)) <= 1e-3
    assert graph.meets_target
    assert graph.audit is not None
    assert graph.audit.recall_lower >= 0.999
    assert (np.diff(graph.distances_NK, axis=1) >= 0).all()
    assert (graph.ids_NK != np.arange(len(points))[:, None]).all()
    direct = np.linalg.norm(points[graph.ids_NK].astype(np.float64) - points[:, None].astype(np.float64), axis=-1)
    assert graph.distances_NK == pytest.approx(direct, rel=1e-4, abs=1e-5)  # the centred copy is float32


def as_bytes(graph: KnnGraph) -> list[bytes]:
    return [graph.ids_NK.tobytes(), graph.distances_NK.tobytes(), graph.groups_N.tobytes()]


def test_the_graph_is_the_same_for_any_number_of_threads(points: Points, tmp_path: Path) -> None:
    first = as_bytes(graph_of(points, tmp_path, shards=3, threads=1))
    assert all(as_bytes(graph_of(points, tmp_path, shards=3, threads=threads)) == first for threads in (2, 2, 4))


def crowd(*, copies: int) -> tuple[Points, NDArray[np.int64]]:
    """400 distinct points in shuffled rows: 0 is isolated, 1 to 99 a dense crowd, of which 1 to 20 are repeated."""
    random = np.random.default_rng(1)
    distinct = random.standard_normal((400, 8))
    distinct[1:100] = 0.01 * distinct[1:100] + 2
    distinct[0] = -30
    rows = random.permutation(np.concatenate([np.arange(400), np.repeat(np.arange(1, 21), copies - 1)]))
    return distinct.astype(np.float32), rows


def connected(is_one_NN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The least row that each row is connected with."""
    _, label_N = connected_components(is_one_NN, directed=False)
    return np.array([np.flatnonzero(label_N == label)[0] for label in label_N])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("center", [False, True])
def test_rows_of_the_same_bits_or_the_same_tokens_are_one_node(seed: int, center: bool, tmp_path: Path) -> None:
    """Few vectors, with low bits that differ, few digests, unknown ones, and some that belong to another vector."""
    random = np.random.default_rng(seed)
    vector_N = random.integers(0, 60, 400)
    points = random.standard_normal((60, 6))[vector_N] + 1e-4 * random.integers(0, 3, 400)[:, None]
    points = points.astype(np.float32)
    sequence_N = (vector_N * 2 + random.integers(0, 2, 400) + 1).astype(np.uint64) << np.uint64(56)
    sequence_N[random.random(400) < 0.4] = 0
    forged = random.random(400) < 0.05
    sequence_N[forged] = random.permutation(sequence_N[forged])
    failed_N = random.random(400) < 0.05
    points[failed_N] = np.nan
    graph = graph_of(points, tmp_path, failed=failed_N, knn="exact", center=center, sequence_N=sequence_N)
    present = ~failed_N[:, None] & ~failed_N
    difference_NNR = points[:, None] - points
    has_same_bits = (difference_NNR == 0).all(axis=2)
    has_same_tokens = (sequence_N[:, None] == sequence_N) & (sequence_N != 0)
    is_near = np.linalg.norm(difference_NNR, axis=2) < 1e-2
    # a digest of two vectors counts for that of its first row
    first = [np.flatnonzero(has_same_tokens[row] & ~failed_N)[:1].tolist() for row in range(400)]
    is_firsts = np.array([bool(of_row) and bool(is_near[row, of_row[0]]) for row, of_row in enumerate(first)])
    has_same_tokens &= is_firsts[:, None] & is_firsts
    expected_N = np.where(failed_N, -1, connected(present & (has_same_bits | has_same_tokens)))
    by_bits_N = np.where(failed_N, -1, connected(present & has_same_bits))
    assert len(np.unique(expected_N)) < len(np.unique(by_bits_N)) - 20
    assert (forged & ~is_firsts & (sequence_N != 0)).any()
    assert np.array_equal(graph.groups_N, expected_N)
    assert graph.num_nodes == len(np.unique(expected_N[~failed_N]))
    assert (graph.distances_NK[~failed_N][:, 0] > 0).all()


def test_a_chain_of_equal_rows_is_one_node_however_long_it_is(tmp_path: Path) -> None:
    """Rows 2 i and 2 i + 1 have the same bits, 2 i + 1 and 2 i + 2 the same tokens; digests in an order that is no row's."""
    count = 3000
    step = np.arange(count) // 2 % 2
    points = np.stack([np.where(step, 1e-6, 0), np.arange(count) // 2 * 1e-9, np.ones(count)], axis=1).astype(np.float32)
    link = (np.arange(count) + 1) // 2
    sequence_N = np.random.default_rng(0).permutation(2 * count)[link].astype(np.uint64) + np.uint64(1)
    graph = graph_of(points, tmp_path, knn="exact", sequence_N=sequence_N)
    assert graph.num_nodes == 1
    assert (graph.groups_N == 0).all()


def test_one_digest_for_all_rows_merges_nothing_that_is_apart(points: Points, tmp_path: Path) -> None:
    forged_N = np.full(len(points), 7, dtype=np.uint64)
    assert as_bytes(graph_of(points, tmp_path, shards=1, sequence_N=forged_N)) == as_bytes(
        graph_of(points, tmp_path, shards=1)
    )


def test_a_digest_whose_first_row_is_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    points = clustered(50)
    points[3, 2] = np.nan
    with pytest.raises(CorruptStoreError, match="row 3 are not finite"):
        graph_of(points, tmp_path, knn="exact", sequence_N=(np.arange(50) // 4 + 1).astype(np.uint64))


@pytest.mark.parametrize("method", ["hnsw", "exact"])
def test_copies_are_one_node_and_neighbours_are_distinct_vectors(method: str, tmp_path: Path) -> None:
    distinct, rows = crowd(copies=40)
    graph = graph_of(distinct[rows], tmp_path, knn=method)
    first_row = np.array([np.flatnonzero(rows == node)[0] for node in range(400)])
    assert graph.num_nodes == 400
    assert np.array_equal(graph.groups_N, first_row[rows])
    assert graph.distances_NK == pytest.approx(exact_distances(distinct)[rows], rel=1e-4, abs=1e-6)
    for neighbours, own in zip(graph.ids_NK, graph.groups_N, strict=True):
        assert len({*neighbours, own}) == K_MAX + 1
        assert np.isin(neighbours, first_row).all()


def test_an_isolated_point_outweighs_each_of_a_crowd_and_copies_share_one_weight(tmp_path: Path) -> None:
    distinct, rows = crowd(copies=40)
    weights = weights_of(graph_of(distinct[rows], tmp_path))
    assert weights[rows == 0].item() == weights.max() > 100 * weights[(rows >= 1) & (rows < 100)].max()
    without_copies = weights_of(graph_of(distinct, tmp_path))
    of_vector = np.bincount(rows, weights=weights, minlength=400)
    assert of_vector == pytest.approx(without_copies.astype(np.float64), rel=1e-5)
    for node in range(1, 21):
        assert len(set(weights[rows == node])) == 1


def test_rows_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 64-bit hash may be shared by different vectors: grouping compares the vectors themselves."""
    distinct, rows = crowd(copies=3)
    expected = graph_of(distinct[rows], tmp_path).groups_N
    monkeypatch.setattr(nodes, "_hashes", lambda coord_NR: np.arange(len(coord_NR), dtype=np.uint64) * 0 + np.uint64(7))
    assert np.array_equal(graph_of(distinct[rows], tmp_path).groups_N, expected)
    first = {rows[row]: row for row in reversed(range(len(rows)))}
    assert expected.tolist() == [first[node] for node in rows]


@pytest.mark.parametrize(("hard", "method"), [(False, "hnsw"), (True, "exact")])
def test_auto_takes_a_graph_only_where_a_sample_says_it_finds_everything(
    hard: bool, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_plan, "AUTO_EXACT_WORK", 0)  # as if a scan took too long
    points = np.random.default_rng(0).standard_normal((6000, 64)).astype(np.float32) if hard else clustered(6000)
    graph = graph_of(points, tmp_path, knn="auto")
    assert graph.method == method
    assert graph.pilot_recall is not None
    assert (graph.pilot_recall < 0.9995) == hard
    assert recall(graph.distances_NK, exact_distances(points)) >= 0.999


def test_negative_zero_is_zero(tmp_path: Path) -> None:
    points = np.array([[0.0, 1.0], [-0.0, 1.0], [2.0, 2.0]], dtype=np.float32)
    assert graph_of(points, tmp_path).groups_N.tolist() == [0, 0, 2]


def test_failed_rows_have_no_neighbours_and_are_nobodys(tmp_path: Path) -> None:
    points = clustered(600)
    failed = np.zeros(600, dtype=np.bool_)
    failed[[0, 17, 300, 599]] = True
    kept = np.flatnonzero(~failed)
    alone = graph_of(points[kept], tmp_path, shards=2)
    points[failed] = np.nan
    graph = graph_of(points, tmp_path, shards=2, failed=failed)
    assert (graph.ids_NK[failed] == -1).all()
    assert np.isposinf(graph.distances_NK[failed]).all()
    assert (graph.groups_N[failed] == -1).all()
    assert np.array_equal(graph.ids_NK[kept], kept[alone.ids_NK])
    assert np.array_equal(graph.distances_NK[kept], alone.distances_NK)
    weights = weights_of(graph)
    assert (weights[failed] == 0).all()
    assert (weights[kept] > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named_and_poisons_no_index(value: float, tmp_path: Path) -> None:
    points = clustered(600)
    points[417, 3] = value
    with pytest.raises(CorruptStoreError, match="row 417 "):
        graph_of(points, tmp_path)


@pytest.mark.parametrize("method", ["hnsw", "exact"])
@pytest.mark.parametrize("num_nodes", [1, 2, 10, 11, K_MAX, K_MAX + 1, 130])
def test_few_vectors_have_as_many_neighbours_as_there_are(method: str, num_nodes: int, tmp_path: Path) -> None:
    points = clustered(num_nodes, rank=4)
    graph = graph_of(np.repeat(points, 2, axis=0), tmp_path, knn=method)
    found = min(K_MAX, num_nodes - 1)
    assert (graph.ids_NK[:, :found] >= 0).all()
    assert (graph.ids_NK[:, found:] == -1).all()
    assert np.isposinf(graph.distances_NK[:, found:]).all()
    if found:
        expected = np.repeat(exact_distances(points, found), 2, axis=0)
        assert graph.distances_NK[:, :found] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert graph.meets_target  # also where every node fits the audit
    assert (np.ptp(weights_of(graph)) == 0) == (num_nodes <= 10)  # fewer than k + 1 vectors: uniform


@pytest.mark.parametrize("method", ["hnsw", "exact"])
def test_a_store_without_any_vector_has_an_empty_graph(method: str, tmp_path: Path) -> None:
    points = np.full((3, 4), np.nan, dtype=np.float32)
    graph = graph_of(points, tmp_path, knn=method, failed=np.ones(3, dtype=np.bool_))
    assert graph.num_nodes == 0
    assert (graph.ids_NK == -1).all()
    assert graph.groups_N.tolist() == [-1, -1, -1]


# --- answers that fall short ------------------------------------------------------------------------------------------


class Flaky:
    """An hnswlib.Index whose queries fail, as they do when one row of a batch reaches too few nodes."""

    genuine = hnswlib.Index

    def __init__(self, fails: Callable[[NDArray[np.float32], int], bool], **arguments: Any) -> None:
        self._index = self.genuine(**arguments)
        self._fails = fails
        self._ef = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def set_ef(self, ef: int) -> None:
        self._ef = ef
        self._index.set_ef(ef)

    def knn_query(self, block: NDArray[np.float32], **arguments: Any) -> Any:
        if self._fails(block, self._ef):
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")
        return self._index.knn_query(block, **arguments)


@pytest.mark.parametrize("cure", ["a second try", "more effort", "only a scan"])
def test_a_row_with_too_few_answers_is_retried_and_costs_no_other(
    cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = clustered(500)
    expected = as_bytes(graph_of(points, tmp_path, shards=2))
    short_rows = points[[17, 333]] - points.mean(axis=0, dtype=np.float64)
    calls: list[int] = []
    efforts: set[int] = set()

    def fails(block: NDArray[np.float32], ef: int) -> bool:
        calls.append(len(block))
        efforts.add(ef)
        if cure == "a second try":
            return len(calls) == 1
        short = np.isclose(block[:, None], short_rows, atol=1e-4).all(axis=2).any()
        return bool(short and (cure == "only a scan" or ef <= 64))

    monkeypatch.setattr(shards.hnswlib, "Index", lambda **arguments: Flaky(fails, **arguments))
    assert as_bytes(graph_of(points, tmp_path, shards=2)) == expected
    assert calls[0] == 500
    assert len(calls) > 2  # it did fail
    # two graphs share the 64 of one; a shard's every node is the most effort there is
    assert efforts == ({54} if cure == "a second try" else {54, 250})


# --- audit and effort -------------------------------------------------------------------------------------------------


def notices(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice)]


def test_a_damaged_graph_fails_the_audit_and_is_searched_again(
    points: Points, exact_NK: NDArray[np.float64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DensityConfig()

    def damaged(coord_GR: Points, num_candidates: int, *, effort: Effort, **arguments: Any) -> Candidates:
        found = hnsw_candidates(coord_GR, num_candidates, effort=effort, **arguments)
        if effort.ef == first.ef:
            found.ids_GC[::20, :5] = -1  # one node in twenty loses up to five of its nearest
        return found

    monkeypatch.setattr(node_search, "hnsw_candidates", damaged)
    events: list[Event] = []
    graph = graph_of(points, tmp_path, observer=events.append)
    (notice,) = notices(events)
    assert "target 0.999" in notice
    assert "searching again" in notice
    assert graph.effort is None
    assert graph.method == "exact"
    assert graph.meets_target
    assert recall(graph.distances_NK, exact_NK) >= 0.999


def test_the_exact_engine_follows_a_poor_graph(points: Points, exact_NK: NDArray[np.float64], tmp_path: Path) -> None:
    events: list[Event] = []
    graph = graph_of(points, tmp_path, shards=1, links=2, ef_construction=4, ef=1, observer=events.append)
    (notice,) = notices(events)
    assert "exactly" in notice
    assert graph.effort is None
    assert graph.meets_target
    assert recall(graph.distances_NK, exact_NK) == 1


def test_a_poor_graph_of_too_many_nodes_for_a_scan_is_said_to_miss(
    points: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_search, "EXACT_NODES", len(points) - 1)
    events: list[Event] = []
    poor = Effort(links=2, ef_construction=4, ef=1)
    graph = graph_of(points, tmp_path, shards=1, links=2, ef_construction=4, ef=1, observer=events.append)
    (notice,) = notices(events)
    assert "NOT met" in notice
    assert "--knn exact" in notice
    assert (graph.method, graph.effort, graph.meets_target) == ("hnsw", poor, False)
    assert graph.audit is not None
    assert graph.audit.recall < 0.9
    assert graph.as_record()["meets_target"] is False


def test_a_target_out_of_reach_is_said_to_be_missed(tmp_path: Path) -> None:
    """100 audited rows cannot prove a recall of 0.9999, not even of an exact search."""
    events: list[Event] = []
    graph = graph_of(clustered(1000), tmp_path, target_recall=0.9999, audit_rows=100, observer=events.append)
    assert not graph.meets_target
    assert "NOT met" in notices(events)[-1]
    assert graph.audit is not None
    assert graph.audit.recall == 1
    assert graph.audit.recall_lower < 0.9999


def test_a_weight_target_is_a_target_too(points: Points, tmp_path: Path) -> None:
    poor = {"links": 6, "ef_construction": 20, "ef": 40, "shards": 1, "target_recall": 0.5}
    assert graph_of(points, tmp_path, **poor, target_tv=1.0).effort == Effort(links=6, ef_construction=20, ef=40)
    assert graph_of(points, tmp_path, **poor, target_tv=1e-4).effort != Effort(links=6, ef_construction=20, ef=40)


def test_the_largest_weights_are_exact_even_in_a_graph_that_misses(
    points: Points, exact_NK: NDArray[np.float64], tmp_path: Path
) -> None:
    poor = {"links": 8, "ef_construction": 30, "ef": 40, "target_recall": 0.5, "target_tv": 1.0}
    graph = graph_of(points, tmp_path, shards=1, **poor)
    wrong_N = np.abs(graph.distances_NK - exact_NK).max(axis=1) > 1e-5
    assert wrong_N.sum() > 100
    assert graph.repaired_nodes >= len(points) // 20
    largest = np.argsort(-mean_distance(graph.distances_NK, 10))
    assert not wrong_N[largest[: len(points) // 50]].any()
