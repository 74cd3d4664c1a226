"""HNSW candidates out of core: shards that fit the memory given, built one thread each, queried by all cores, then dropped.

Malkov & Yashunin 2018 (arXiv:1603.09320), by hnswlib. Its traps and what is done here: equal vectors wreck a graph (callers
pass distinct vectors only); insertion order matters (fixed shuffle); two threads in one graph give other graphs every run
(one thread a shard, shards in parallel); ``ip`` cancels (``l2`` on coordinates, square root at this border); self is found
by label, never by column; one row with too few answers fails its whole batch (retried alone, then scanned); graphs are
never persisted: they have no checksum and load silently wrong.

Shapes: G nodes, C candidates, R coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import hnswlib
import numpy as np
from numpy.typing import NDArray

from embstore.compute.exact import IntMatrix

_BLOCK_ROWS = 4096  # Ctrl-C is not honoured inside a call, and each call copies its block
_MERGE_BYTES = 4 + 4 + 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How hard a graph tries; raising any of them raises recall and cost."""

    links: int
    ef_construction: int
    ef: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """``ids_GC`` int32 [G, C], -1 where missing, unordered; ``missed_self_G``: the node's own shard did not return it."""

    ids_GC: IntMatrix
    missed_self_G: NDArray[np.bool_]


def graph_bytes(num_nodes: int, rank: int, links: int) -> int:
    """Memory of one graph: vectors, level-0 links, and about 170 bytes an element of bookkeeping (measured)."""
    return num_nodes * (4 * rank + 8 * links + 170)


def query_bytes(rank: int, num_candidates: int) -> int:
    """Memory beside the graphs: two blocks of coordinates and the merge of their answers."""
    return _BLOCK_ROWS * (2 * 4 * rank + 3 * num_candidates * _MERGE_BYTES)


def num_shards(num_nodes: int, rank: int, links: int, *, threads: int, memory_bytes: int) -> int:
    """Fewest shards whose graphs fit, ``threads`` of them at a time; never fewer than threads, so all cores build.

    Examples
    --------
    >>> num_shards(28_000, 256, 16, threads=2, memory_bytes=2 << 30)
    2
    >>> num_shards(28_000, 256, 16, threads=2, memory_bytes=16 << 20)
    6
    """
    # floored per graph, not per wave: every graph of a wave may hold the odd row
    per_graph = max(1, memory_bytes // threads // graph_bytes(1, rank, links))
    wanted = max(threads, -(-num_nodes // per_graph))
    wanted = -(-wanted // threads) * threads  # whole waves
    return max(1, min(wanted, num_nodes // 64))


def hnsw_candidates(
    coord_GR: NDArray[np.float32],
    num_candidates: int,
    *,
    effort: Effort,
    shards: int,
    threads: int,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> Candidates:
    """Candidates of every node from ``shards`` graphs; a pure function of its arguments except ``threads``.

    Parameters
    ----------
    coord_GR
        float32 [G, R], finite, pairwise distinct; may be a memory map.
    num_candidates
        C: the best C over all shards are kept, self included.
    shards, threads
        Graphs to cut the nodes into, and how many of them are built at once.
    advance
        Called with nodes finished: each node counts once when built and once per shard when queried.
    """
    num_nodes = len(coord_GR)
    # raw Philox words: their stream is promised stable, Generator.permutation's is not (NEP 19)
    order = np.argsort(np.random.Philox(key=seed).random_raw(num_nodes), kind="stable")
    ids_GC = np.full((num_nodes, num_candidates), -1, dtype=np.int32)
    squared_GC = np.full((num_nodes, num_candidates), np.inf, dtype=np.float32)
    missed_self_G = np.zeros(num_nodes, dtype=np.bool_)
    tell = advance or (lambda count: None)
    members = [order[shard::shards] for shard in range(shards)]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for first in range(0, shards, threads):
            wave = members[first : first + threads]
            graphs = list(pool.map(lambda nodes: _build(coord_GR, nodes, effort, tell), wave))
            for nodes, graph in zip(wave, graphs, strict=True):
                _query(coord_GR, nodes, graph, effort.ef, threads, ids_GC, squared_GC, missed_self_G)
                tell(num_nodes)
            del graphs
    return Candidates(ids_GC=ids_GC, missed_self_G=missed_self_G)


def _build(
    coord_GR: NDArray[np.float32], nodes: NDArray[np.int64], effort: Effort, tell: Callable[[int], None]
) -> hnswlib.Index:
    graph = hnswlib.Index(space="l2", dim=coord_GR.shape[1])
    graph.init_index(max_elements=len(nodes), M=effort.links, ef_construction=effort.ef_construction, random_seed=100)
    for start in range(0, len(nodes), _BLOCK_ROWS):
        block = nodes[start : start + _BLOCK_ROWS]
        graph.add_items(np.ascontiguousarray(coord_GR[block]), block, num_threads=1)
        tell(len(block))
    return graph


def _query(
    coord_GR: NDArray[np.float32],
    nodes: NDArray[np.int64],
    graph: hnswlib.Index,
    ef: int,
    threads: int,
    ids_GC: IntMatrix,
    squared_GC: NDArray[np.float32],
    missed_self_G: NDArray[np.bool_],
) -> None:
    """Ask one graph about every node and merge the answers into the running best, in place."""
    num_nodes, num_candidates = ids_GC.shape
    wanted = min(num_candidates, len(nodes))
    graph.set_ef(max(ef, wanted))
    in_shard = np.zeros(num_nodes, dtype=np.bool_)
    in_shard[nodes] = True
    for start in range(0, num_nodes, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, num_nodes))
        block_BR = np.ascontiguousarray(coord_GR[rows])
        labels, squared = _ask(graph, block_BR, wanted, ef, threads, coord_GR, nodes)
        own = np.arange(rows.start, rows.stop)[:, None]
        missed_self_G[rows] |= in_shard[rows] & ~(labels == own).any(axis=1)
        all_ids = np.concatenate([ids_GC[rows], labels], axis=1)
        all_squared = np.concatenate([squared_GC[rows], squared], axis=1)
        # by distance, ties by node: the merge must not depend on which shard came first
        best = np.lexsort((all_ids, all_squared), axis=1)[:, :num_candidates]
        ids_GC[rows] = np.take_along_axis(all_ids, best, 1)
        squared_GC[rows] = np.take_along_axis(all_squared, best, 1)


def _ask(
    graph: hnswlib.Index,
    block_BR: NDArray[np.float32],
    wanted: int,
    ef: int,
    threads: int,
    coord_GR: NDArray[np.float32],
    nodes: NDArray[np.int64],
) -> tuple[IntMatrix, NDArray[np.float32]]:
    """``wanted`` answers for every row of a block, whatever it takes."""
    try:
        labels, squared = graph.knn_query(block_BR, k=wanted, num_threads=threads)
        return labels.astype(np.int32), squared
    except RuntimeError:
        # some row reaches fewer than `wanted` nodes and hnswlib fails the batch: find it by halves
        if len(block_BR) > 1:
            middle = len(block_BR) // 2
            halves = [
                _ask(graph, half, wanted, ef, threads, coord_GR, nodes) for half in (block_BR[:middle], block_BR[middle:])
            ]
            return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])
    if ef < len(nodes):
        graph.set_ef(min(8 * ef, len(nodes)))
        answer = _ask(graph, block_BR, wanted, min(8 * ef, len(nodes)), threads, coord_GR, nodes)
        graph.set_ef(max(ef, wanted))
        return answer
    difference = coord_GR[nodes] - block_BR
    scores = np.einsum("gr,gr->g", difference, difference)
    nearest = np.argpartition(scores, wanted - 1)[:wanted]
    return nodes[nearest].astype(np.int32)[None], scores[nearest][None]
