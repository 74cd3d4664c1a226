"""HNSW candidates out of core: one graph per shard of the nodes, as many shards as the memory requires.

Each graph is built by one thread, queried by all cores, and dropped. The method is that of Malkov & Yashunin 2018
(arXiv:1603.09320), the library hnswlib. Its traps, and what is done about them:

- Equal vectors wreck a graph: callers pass distinct vectors only.
- Insertion order matters: nodes are inserted in samples of a fixed shuffle, each along the cells (``order``).
- Two threads in one graph build another graph every run: one thread a graph, graphs in parallel.
- Its ``ip`` cancels: ``l2`` on coordinates.
- A node may not find itself: it is recognised by its label, never by its place.
- One query with too few answers fails its whole batch: the batch is halved until that query is alone, then scanned.
- A saved graph has no checksum and is silently wrong when damaged: graphs are never saved, only answers, block by block.

Shapes: G nodes, C candidates, R coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

from embstore.core.interfaces import BlockStore
from embstore.core.rows import slices
from embstore.core.sampling import shuffled
from embstore.host.scratch import large_array
from embstore.search.distances import IntMatrix
from embstore.search.hnsw.order import cells, in_growing_chunks
from embstore.search.kept_blocks import has_layout

# A shard, and the numbers of the blocks of nodes to query its graph with.
ShardQueries = tuple[int, tuple[int, ...]]
# Of one block: its number, labels, squared distances, and which nodes of the shard did not find themselves.
Answer = tuple[int, IntMatrix, NDArray[np.float32], NDArray[np.bool_]]

BLOCK_ROWS = 8192  # Ctrl-C is not honoured inside a call, and each call copies its block
_MERGE_BYTES = 4 + 4 + 8

# Builds and queries graphs on workers: from the cells of all nodes and the queries, answers in the order of the queries.
QueryOnWorkers = Callable[[NDArray[np.int32], Sequence[ShardQueries]], Iterator[tuple[int, Iterator[Answer]]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How hard a graph tries, in hnswlib's terms; raising any of them raises recall and cost.

    ``links``: M. ``ef``: that of one graph of all nodes.
    """

    links: int
    ef_construction: int
    ef: int

    def ef_of(self, shards: int) -> int:
        """The ef with which each of several graphs is queried for the recall of one: each has only a share of the k nearest.

        Examples
        --------
        >>> [Effort(links=16, ef_construction=100, ef=64).ef_of(shards) for shards in (1, 2, 4, 16)]
        [64, 54, 46, 32]
        """
        return math.ceil(self.ef / math.sqrt(math.sqrt(shards)))  # docs/decisions/0017


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """``ids_GC`` int32 [G, C], -1 where missing, unordered; ``missed_self_G``: the node's own shard did not return it."""

    ids_GC: IntMatrix
    missed_self_G: NDArray[np.bool_]


def graph_bytes(num_nodes: int, rank: int, links: int) -> int:
    """Memory of one graph: vectors, level-0 links, and about 170 bytes an element of bookkeeping (measured)."""
    return num_nodes * (4 * rank + 8 * links + 170)


def query_bytes(rank: int, num_candidates: int) -> int:
    """Memory in addition to the graphs: two blocks of coordinates, and the merge of their answers."""
    return BLOCK_ROWS * (2 * 4 * rank + 3 * num_candidates * _MERGE_BYTES)


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
    work: Path,
    kept: BlockStore,
    advance: Callable[[int], None] | None = None,
    on_workers: QueryOnWorkers | None = None,
) -> Candidates:
    """Candidates of every node from ``shards`` graphs; the same for any number of threads and whatever was kept.

    Parameters
    ----------
    coord_GR
        float32 [G, R], finite, pairwise distinct; may be a memory map.
    num_candidates
        C: the best C over all shards are kept, self included.
    shards, threads
        Graphs to cut the nodes into, and how many of them are built at once.
    work
        Folder for the candidates, which are mapped when they are many.
    kept
        Where the answers about each block of nodes are kept after every graph. A search that was killed rebuilds at most the
        graph that it was querying, and queries it for the remaining blocks.
    advance
        Called with nodes finished: each node counts once when inserted and once per shard when queried.
    on_workers
        Builds and queries the graphs instead of this process.
    """
    num_nodes = len(coord_GR)
    running = _Running(num_nodes, num_candidates, work, kept, effort)
    tell = advance or (lambda count: None)
    cell_G = cells(coord_GR, seed)
    order_G = shuffled(num_nodes, seed)
    nodes_of = [shard_nodes(order_G, cell_G, shard, shards) for shard in range(shards)]
    if on_workers is not None:
        queries = [(shard, blocks) for shard in range(shards) if (blocks := running.open_blocks(shard))]
        tell((shards + 1 - len(queries)) * num_nodes - sum(len(nodes_of[shard]) for shard, _ in queries))
        for shard, found in on_workers(cell_G, queries):
            for answer in found:
                running.merge(shard, answer)
            tell(len(nodes_of[shard]) + num_nodes)
        return Candidates(ids_GC=running.ids_GC, missed_self_G=running.missed_self_G)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for first in range(0, shards, threads):
            every = range(first, min(first + threads, shards))
            wave = [shard for shard in every if running.open_blocks(shard)]
            tell(sum(len(nodes_of[shard]) + num_nodes for shard in every if shard not in wave))
            graphs = list(pool.map(lambda shard: build_index(coord_GR, nodes_of[shard], effort, tell), wave))
            for shard, graph in zip(wave, graphs, strict=True):
                for answer in query_blocks(
                    graph,
                    coord_GR,
                    cell_G,
                    nodes_of[shard],
                    running.open_blocks(shard),
                    block_rows=BLOCK_ROWS,
                    ef=effort.ef_of(shards),
                    num_candidates=num_candidates,
                    threads=threads,
                ):
                    running.merge(shard, answer)
                tell(num_nodes)
            del graphs
    return Candidates(ids_GC=running.ids_GC, missed_self_G=running.missed_self_G)


class _Running:
    """The best candidates so far of every node, block by block, and how many shards have answered for each block."""

    def __init__(self, num_nodes: int, num_candidates: int, work: Path, kept: BlockStore, effort: Effort) -> None:
        shape = (num_nodes, num_candidates)
        self.ids_GC = large_array(work / "candidates.npy", shape, np.int32)
        self.squared_GC = large_array(work / "squared.npy", shape, np.float32)
        self.missed_self_G = np.zeros(num_nodes, dtype=np.bool_)
        self.blocks = list(slices(0, num_nodes, BLOCK_ROWS))
        self.num_asked = [0] * len(self.blocks)
        # 2: the order of insertion; a search that an earlier version began in another order is not continued
        self._kept, self._name = kept, f"candidates-2-{effort.links}-{effort.ef_construction}-{effort.ef}"
        for number, rows in enumerate(self.blocks):
            self.ids_GC[rows], self.squared_GC[rows] = -1, np.inf
            self._load(number, rows)

    def open_blocks(self, shard: int) -> tuple[int, ...]:
        """Blocks for which this shard has not answered."""
        return tuple(number for number, asked in enumerate(self.num_asked) if asked <= shard)

    def merge(self, shard: int, answer: Answer) -> None:
        """Take one graph's answers about one block; of equally near candidates the older stays first."""
        number, labels, squared, missed_self = answer
        rows = self.blocks[number]
        ids, best = self.ids_GC[rows], self.squared_GC[rows]
        self.missed_self_G[rows] |= missed_self
        if self.num_asked[number]:
            all_ids, all_squared = np.concatenate([ids, labels], axis=1), np.concatenate([best, squared], axis=1)
            nearest = np.argsort(all_squared, axis=1, kind="stable")[:, : ids.shape[1]]
            ids[:], best[:] = np.take_along_axis(all_ids, nearest, 1), np.take_along_axis(all_squared, nearest, 1)
        else:
            ids[:, : labels.shape[1]], best[:, : labels.shape[1]] = labels, squared
        self.num_asked[number] = shard + 1
        self._kept.save(
            f"{self._name}-{number}",
            {"asked": np.array([shard + 1]), "ids": ids, "squared": best, "missed": self.missed_self_G[rows]},
        )

    def _load(self, number: int, rows: slice) -> None:
        found = self._kept.load(f"{self._name}-{number}")
        shape = self.ids_GC[rows].shape
        layout = {"asked": ("<i8", (1,)), "ids": ("<i4", shape), "squared": ("<f4", shape), "missed": ("|b1", shape[:1])}
        if found is None or not has_layout(found, layout, len(self.ids_GC)):
            return
        self.ids_GC[rows], self.squared_GC[rows] = found["ids"], found["squared"]
        self.missed_self_G[rows] = found["missed"]
        self.num_asked[number] = int(found["asked"][0])


def build_index(
    coord_GR: NDArray[np.float32],
    nodes: NDArray[np.int64],
    effort: Effort,
    tell: Callable[[int], None] = lambda count: None,
) -> hnswlib.Index:
    """A graph of some nodes, labelled by their numbers: one thread in the order given, so always the same graph."""
    graph = hnswlib.Index(space="l2", dim=coord_GR.shape[1])
    graph.init_index(max_elements=len(nodes), M=effort.links, ef_construction=effort.ef_construction, random_seed=100)
    for block in slices(0, len(nodes), BLOCK_ROWS):
        graph.add_items(np.ascontiguousarray(coord_GR[nodes[block]]), nodes[block], num_threads=1)
        tell(block.stop - block.start)
    return graph


def shard_nodes(order_G: NDArray[np.int64], cell_G: NDArray[np.int32], shard: int, shards: int) -> NDArray[np.int64]:
    """Nodes of one shard of the shuffle, in the order they are inserted."""
    return in_growing_chunks(order_G[shard::shards], cell_G)


def query_blocks(
    graph: hnswlib.Index,
    coord_GR: NDArray[np.float32],
    cell_G: NDArray[np.int32],
    nodes: NDArray[np.int64],
    blocks: Sequence[int],
    *,
    block_rows: int,
    ef: int,
    num_candidates: int,
    threads: int,
) -> Iterator[Answer]:
    """Query the graph of ``nodes`` with all nodes of some blocks, of ``block_rows`` each, cell after cell."""
    wanted = min(num_candidates, len(nodes))
    graph.set_ef(max(ef, wanted))
    in_shard = np.zeros(len(coord_GR), dtype=np.bool_)
    in_shard[nodes] = True
    every = list(slices(0, len(coord_GR), block_rows))
    for number in blocks:
        rows = every[number]
        order_B = np.argsort(cell_G[rows], kind="stable")
        found, distances = _query(graph, coord_GR[rows][order_B], wanted, ef, threads, coord_GR, nodes)
        labels, squared = np.empty_like(found), np.empty_like(distances)
        labels[order_B], squared[order_B] = found, distances
        own = np.arange(rows.start, rows.stop)[:, None]
        yield number, labels, squared, in_shard[rows] & ~(labels == own).any(axis=1)


def _query(
    graph: hnswlib.Index,
    block_BR: NDArray[np.float32],
    wanted: int,
    ef: int,
    threads: int,
    coord_GR: NDArray[np.float32],
    nodes: NDArray[np.int64],
) -> tuple[IntMatrix, NDArray[np.float32]]:
    """``wanted`` answers for every row of a block, with more effort or a scan where a row finds fewer."""
    try:
        labels, squared = graph.knn_query(block_BR, k=wanted, num_threads=threads)
        return labels.astype(np.int32), squared
    except RuntimeError:
        # some row reaches fewer than `wanted` nodes, so hnswlib fails the batch: halves find that row
        if len(block_BR) > 1:
            middle = len(block_BR) // 2
            halves = [
                _query(graph, half, wanted, ef, threads, coord_GR, nodes) for half in (block_BR[:middle], block_BR[middle:])
            ]
            return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])
    if ef < len(nodes):
        graph.set_ef(min(8 * ef, len(nodes)))
        answer = _query(graph, block_BR, wanted, min(8 * ef, len(nodes)), threads, coord_GR, nodes)
        graph.set_ef(max(ef, wanted))
        return answer
    difference = coord_GR[nodes] - block_BR
    scores = np.einsum("gr,gr->g", difference, difference)
    nearest = np.argpartition(scores, wanted - 1)[:wanted]
    return nodes[nearest].astype(np.int32)[None], scores[nearest][None]
