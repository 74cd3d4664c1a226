"""The exact scan against brute force in float64 and scikit-learn; the audit that is built on it; the plan under a budget."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from embstore.core.config import DensityConfig, KnnMethod
from embstore.core.errors import BudgetError
from embstore.search.audit import TIE_TOLERANCE, Audit, compare, sample_nodes
from embstore.search.distances import rerank
from embstore.search.exact import pairwise
from embstore.search.exact.pairwise import MARGIN, brute_force
from embstore.search.hnsw.shards import graph_bytes
from embstore.search.search_plan import plan_search

MIB = 1 << 20


def by_definition(points_GR: NDArray[np.floating], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All neighbours in float64, ties by index, padded with -1 and +inf."""
    num_nodes = len(points_GR)
    points = points_GR.astype(np.float64)
    distance_GG = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance_GG, np.inf)
    order = np.argsort(distance_GG, axis=1, kind="stable")[:, : min(k, num_nodes - 1)]
    pad = ((0, 0), (0, k - order.shape[1]))
    return np.pad(order, pad, constant_values=-1), np.pad(
        np.take_along_axis(distance_GG, order, 1), pad, constant_values=np.inf
    )


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(*[st.integers(-4, 4)] * 3), max_size=MARGIN + 60, unique=True),
    k=st.integers(1, 12),
)
def test_neighbours_are_brute_forces_with_ties_by_index(points: list[tuple[int, ...]], k: int) -> None:
    """A lattice: exact in float32, full of equal distances, also more of them than the margin."""
    coord_GR = np.array(points, dtype=np.float32).reshape(-1, 3)
    every_node = np.arange(len(coord_GR))
    ids_GK, distances_GK = brute_force(coord_GR, every_node, k)
    assert (ids_GK.dtype, distances_GK.dtype) == (np.int32, np.float64)
    if len(points) < 2:
        assert (ids_GK == -1).all()
        assert np.isinf(distances_GK).all()
        return
    expected_ids, expected_distances = by_definition(coord_GR, k)
    assert distances_GK == pytest.approx(expected_distances, rel=1e-12)
    assert np.array_equal(ids_GK, expected_ids)


def test_more_ties_than_the_margin_still_go_by_index() -> None:
    corners = np.array([[sign * (axis == place) for place in range(64)] for axis in range(64) for sign in (-1, 1)])
    coord_GR = np.concatenate([corners, np.zeros((1, 64))]).astype(np.float32)
    ids_GK, distances_GK = brute_force(coord_GR, np.arange(129), 10)
    assert distances_GK[128] == pytest.approx(np.ones(10))  # the centre has 128 neighbours at 1
    assert ids_GK[128].tolist() == list(range(10))
    assert (ids_GK[:128, 0] == 128).all()
    assert distances_GK[:128, 1:] == pytest.approx(math.sqrt(2) * np.ones((128, 9)))


@pytest.mark.parametrize("order", ["random", "farthest first"])
def test_the_scan_does_not_depend_on_its_tiles(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each tile is nearer than all before it, so that the cut of those leaves nothing out."""
    coord_GR = np.random.default_rng(0).standard_normal((700, 9)).astype(np.float32)
    if order == "farthest first":
        coord_GR = coord_GR[np.argsort(-np.linalg.norm(coord_GR, axis=1))] * np.float32(0.1)
        coord_GR[:, 0] += np.linspace(9, 0, 700, dtype=np.float32)
    queries_Q = np.random.default_rng(1).permutation(700)[:311]
    whole = brute_force(coord_GR, queries_Q, 7)
    assert np.array_equal(whole[0], by_definition(coord_GR, 7)[0][queries_Q])
    for base_rows, query_rows in ((64, 16), (320, 100), (699, 310), (5, 1000)):
        monkeypatch.setattr(pairwise, "_BASE_ROWS", base_rows)
        monkeypatch.setattr(pairwise, "_QUERY_ROWS", query_rows)
        advanced: list[int] = []
        tiled = brute_force(coord_GR, queries_Q, 7, advance=advanced.append)
        assert sum(advanced) == 311
        assert np.array_equal(tiled[0], whole[0])
        assert np.array_equal(tiled[1], whole[1])


def test_the_scan_agrees_with_scikit_learn() -> None:
    coord_GR = np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float32)
    nearest = NearestNeighbors(n_neighbors=33, algorithm="kd_tree").fit(coord_GR.astype(np.float64))
    distances, ids = nearest.kneighbors()  # self is excluded
    found_ids, found_distances = brute_force(coord_GR, np.arange(3000), 33)
    assert np.array_equal(found_ids, ids)
    assert found_distances == pytest.approx(distances, rel=1e-12)


def test_rounding_in_the_scan_pushes_no_neighbour_out() -> None:
    """Two tight clusters: centring cannot bring both near 0, and scores of order 1 tell near distances apart badly."""
    random = np.random.default_rng(0)
    side_G = np.repeat([[1.0], [-1.0]], 200, axis=0)
    coord_GR = (side_G + 2e-3 * random.standard_normal((400, 4))).astype(np.float32)
    ids_GK, distances_GK = brute_force(coord_GR, np.arange(400), 5)
    expected_ids, expected_distances = by_definition(coord_GR, 5)
    assert np.array_equal(ids_GK, expected_ids)
    assert distances_GK == pytest.approx(expected_distances, rel=1e-12)


def test_a_query_is_told_apart_from_a_node_very_near_it() -> None:
    """Self is excluded by index: the nearest column may well be another node."""
    coord_GR = np.array([[1.0, 1.0], [np.nextafter(np.float32(1), 2), 1.0], [5.0, 5.0]], dtype=np.float32)
    ids_GK, distances_GK = brute_force(coord_GR, np.arange(3), 2)
    assert ids_GK.tolist() == [[1, 2], [0, 2], [1, 0]]
    assert distances_GK[:2, 0] == pytest.approx(2.0**-23)


def test_rerank_orders_candidates_and_drops_self_and_gaps() -> None:
    coord_GR = np.array([[0.0], [3.0], [-3.0], [1.0], [2.0]], dtype=np.float32)
    candidates = np.array([[2, -1, 0, 1], [-1, -1, 1, 4]], dtype=np.int32)
    ids_QK, distances_QK = rerank(coord_GR, np.array([0, 1]), candidates, 3)
    assert ids_QK.tolist() == [[1, 2, -1], [4, -1, -1]]
    assert distances_QK.tolist() == [[3, 3, math.inf], [1, math.inf, math.inf]]


# --- audit ------------------------------------------------------------------------------------------------------------


def test_an_audit_counts_hits_within_the_tie_tolerance() -> None:
    exact_QK = np.tile(np.linspace(1, 2, 10), (50, 1))
    found_QK = exact_QK.copy()
    found_QK[:, 9] = 2 * (1 + 0.9 * TIE_TOLERANCE)
    assert compare(found_QK, exact_QK, num_nodes=1000).recall == 1
    found_QK[:4, 7:] = 2.5  # three neighbours of four nodes are lost
    audit = compare(found_QK, exact_QK, num_nodes=1000)
    assert (audit.k, audit.num_rows, audit.recall) == (10, 50, 1 - 12 / 500)
    assert audit.recall_lower < audit.recall
    weight_Q, exact_weight_Q = found_QK.mean(axis=1), exact_QK.mean(axis=1)
    expected = np.abs(weight_Q / weight_Q.sum() - exact_weight_Q / exact_weight_Q.sum()).sum() / 2
    assert audit.tv == pytest.approx(expected)


def bound(hits_Q: NDArray[np.integer], k: int, num_nodes: int) -> Audit:
    """Audit of nodes with so many hits of k."""
    found_QK = np.where(np.arange(k) < hits_Q[:, None], 1.0, 2.0)
    return compare(found_QK, np.ones((len(hits_Q), k)), num_nodes=num_nodes)


@pytest.mark.parametrize("missed", [0, 1, 7, 150, 499])
def test_the_bound_is_wilsons_root(missed: int) -> None:
    """The recall L at which what was seen lies 1.645 standard errors away (k = 1, from a graph without end)."""
    hits_Q = (np.arange(500) >= missed).astype(int)
    audit = bound(hits_Q, 1, 10**9)
    lower, pairs = audit.recall_lower, 500 if missed == 0 else 499  # the sample variance costs one degree of freedom
    assert audit.recall - lower == pytest.approx(1.6448536 * math.sqrt(lower * (1 - lower) / pairs), rel=1e-4)


def test_an_audit_of_every_node_needs_no_bound() -> None:
    """Else an exact search of a small store could never meet its target."""
    hits_Q = np.full(40, 10)
    assert bound(hits_Q, 10, 40).recall_lower == 1
    assert bound(hits_Q, 10, 41).recall_lower < 1
    hits_Q[3] = 5
    assert bound(hits_Q, 10, 40).recall_lower == bound(hits_Q, 10, 40).recall == 1 - 5 / 400


@pytest.mark.parametrize(
    ("recall", "together", "num_nodes", "num_rows"),
    [(0.999, 0.0, 10**5, 2000), (0.99, 0.0, 10**5, 2000), (0.95, 0.4, 10**5, 2000), (0.98, 0.4, 3000, 2000)],
)
def test_the_bound_covers_the_true_recall_in_19_of_20_audits(
    recall: float, together: float, num_nodes: int, num_rows: int
) -> None:
    """Simulated graphs; ``together`` is the correlation of the pairs of one node. 400 audits: 0.92 is 2.7 deviations."""
    random = np.random.default_rng(0)
    node_recall_G = np.full(num_nodes, recall)
    if together:
        sharpness = (1 - together) / together
        node_recall_G = random.beta(recall * sharpness, (1 - recall) * sharpness, num_nodes)
    hits_G = random.binomial(10, node_recall_G)
    true_recall = hits_G.mean() / 10
    lower = [
        bound(hits_G[random.choice(num_nodes, num_rows, replace=False)], 10, num_nodes).recall_lower for _ in range(400)
    ]
    covered = np.mean(np.array(lower) <= true_recall)
    assert 0.92 <= covered < 1
    assert np.median(lower) > 1 - 3 * (1 - recall)  # and is worth something


def test_each_draw_audits_other_distinct_nodes() -> None:
    samples = [sample_nodes(5000, 200, seed=seed, draw=draw) for seed in (0, 1) for draw in (0, 1, 2)]
    for sample in samples:
        assert len(np.unique(sample)) == 200
        assert 0 <= sample.min() <= sample.max() < 5000
    assert len({sample.tobytes() for sample in samples}) == 6
    assert np.array_equal(sample_nodes(5000, 200, seed=0, draw=0), samples[0])
    assert sample_nodes(7, 200, seed=0, draw=0).tolist() == list(range(7))


# --- plan -------------------------------------------------------------------------------------------------------------

REQUESTS = st.tuples(st.integers(1, 3_000_000), st.integers(1, 600), st.integers(1, 16))


@pytest.mark.parametrize("knn", ["hnsw", "exact", "auto"])
@settings(max_examples=100, deadline=None)
@given(request=REQUESTS, memory=st.integers(1, 3000 * MIB))
def test_a_plan_keeps_its_budget_or_names_the_least_that_would_do(
    knn: KnnMethod, request: tuple[int, int, int], memory: int
) -> None:
    num_rows, rank, threads = request
    config = DensityConfig(knn=knn)
    try:
        plan = plan_search(num_rows, rank, config, threads=threads, memory_bytes=memory)
    except BudgetError as error:
        named = re.search(r"(\d+)MiB", error.hint or "")
        assert named is not None
        least = int(named[1])
        assert least * MIB > memory
        assert plan_search(num_rows, rank, config, threads=threads, memory_bytes=least * MIB).memory_bytes <= least * MIB
        with pytest.raises(BudgetError):
            plan_search(num_rows, rank, config, threads=threads, memory_bytes=(least - 1) * MIB)
    else:
        assert plan.memory_bytes <= memory
        assert (plan.shards == 0) == (plan.method == "exact")
        if plan.shards:
            in_flight = min(threads, plan.shards)
            assert in_flight * graph_bytes(-(-num_rows // plan.shards), rank, config.links) < memory


def test_a_smaller_budget_cuts_more_shards() -> None:
    """A million rows of 256 coordinates: 1.3 GB of graph in one piece."""
    config = DensityConfig(knn="hnsw")
    shards = [
        plan_search(1_000_000, 256, config, threads=2, memory_bytes=budget * MIB).shards for budget in (4096, 1024, 512, 400)
    ]
    assert shards == sorted(shards)
    assert shards[0] == 2
    assert shards[-1] >= 8


def test_shards_asked_for_are_taken_or_refused() -> None:
    asked = DensityConfig(knn="hnsw", shards=3)
    assert plan_search(1_000_000, 256, asked, threads=2, memory_bytes=1280 * MIB).shards == 3
    with pytest.raises(BudgetError):
        plan_search(1_000_000, 256, asked, threads=2, memory_bytes=900 * MIB)


def test_an_exact_search_has_no_shards_and_needs_little_memory() -> None:
    plan = plan_search(1_000_000, 256, DensityConfig(knn="exact"), threads=2, memory_bytes=320 * MIB)
    assert (plan.method, plan.shards) == ("exact", 0)


@pytest.mark.parametrize(("num_rows", "method"), [(28_000, "exact"), (1_000_000, "exact"), (1_100_000, "pilot")])
def test_auto_asks_a_sample_where_a_scan_takes_many_minutes(num_rows: int, method: str) -> None:
    assert plan_search(num_rows, 256, DensityConfig(), threads=2, memory_bytes=2048 * MIB).method == method
