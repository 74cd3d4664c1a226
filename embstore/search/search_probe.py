"""How long a search will take here: half a second of the real work on random points, scaled up. Never what decides.

What is chosen follows from arithmetic (``search_plan``); this says what it will cost, and what the alternative would.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from embstore.core.config import K_MAX, DensityConfig
from embstore.search.exact.scan import scan_dtype
from embstore.search.exact.tiles import TileScan, quantise
from embstore.search.hnsw.shards import Effort, build
from embstore.search.search_plan import SearchPlan, hnsw_shards

_TILE_ROWS = 2048
_GRAPH_NODES = 2000
_ASKED_NODES = 500
# Candidates and ranking, in units of the products: measured at 28 thousand to a million rows (benchmarks/results/knn.json).
_BESIDE_PRODUCTS = 1.4
_RANK_SECONDS = 3e-5


def estimate_seconds(plan: SearchPlan, num_rows: int, rank: int, config: DensityConfig, *, threads: int) -> dict[str, float]:
    """Seconds that the exact engine and HNSW would take, by name; audits and repairs not counted.

    A graph's cost grows with the logarithm of its size, and with how hard the points are, which only a sample of them tells.
    """
    points = np.random.default_rng(0).standard_normal((_TILE_ROWS, rank)).astype(np.float32)
    shards = plan.shards or hnsw_shards(num_rows, rank, config, threads=threads, memory_bytes=plan.memory_bytes)
    return {
        "exact": (num_rows**2 * _pair_seconds(points) * _BESIDE_PRODUCTS + num_rows * _RANK_SECONDS) / threads,
        "hnsw": num_rows * _node_seconds(points[:_GRAPH_NODES], num_rows / shards, shards, config) / threads,
    }


def _pair_seconds(points: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """Of one core, a pair of nodes looked at from both sides counting twice."""
    device = torch.device("cpu")
    scan = TileScan(
        quantise(points, np.arange(len(points)), dtype=scan_dtype(device), device=device),
        np.arange(len(points)),
        K_MAX,
        _TILE_ROWS,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            scan.visit(slice(0, len(points)), slice(0, len(points)))
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return min(seconds) / 2 / len(points) ** 2


def _node_seconds(
    points: np.ndarray[tuple[int, ...], np.dtype[np.float32]], shard_nodes: float, shards: int, config: DensityConfig
) -> float:
    """Of one core: to put a node into its graph and ask every graph about it."""
    effort = Effort(links=config.links, ef_construction=config.ef_construction, ef=config.ef)
    started = time.perf_counter()
    graph = build(points, np.arange(len(points)), effort)
    built = time.perf_counter()
    graph.set_ef(effort.ef_of(shards))
    graph.knn_query(points[:_ASKED_NODES], k=K_MAX + 1, num_threads=1)
    asked = time.perf_counter()
    growth = math.log(max(shard_nodes, 2)) / math.log(len(points))
    return growth * ((built - started) / len(points) + shards * (asked - built) / _ASKED_NODES)
