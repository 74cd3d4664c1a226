"""HNSW candidates out of core: shards that fit the memory given, built one thread each, queried by all cores, then dropped.

Malkov & Yashunin 2018 (arXiv:1603.09320), by hnswlib. Its traps and what is done here: equal vectors wreck a graph (callers
pass distinct vectors only); insertion order matters (samples of a fixed shuffle, each along the cells); two threads in one
graph give other graphs every run (one thread a shard, shards in parallel); ``ip`` cancels (``l2`` on coordinates, square
root at this border); self is found by label, never by column; one row with too few answers fails its whole batch (retried
alone, then scanned); graphs are never persisted: no checksum, silently wrong when damaged. What is kept are the answers,
block by block.

Shapes: G nodes, C candidates, R coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# A shard, and the blocks of nodes that are to be asked about; of one block: its number, labels, squared distances, and which
# nodes of the shard did not find themselves.
Asked = tuple[int, tuple[int, ...]]
Answer = tuple[int, IntMatrix, NDArray[np.float32], NDArray[np.bool_]]

BLOCK_ROWS = 8192  # Ctrl-C is not honoured inside a call, and each call copies its block
_MERGE_BYTES = 4 + 4 + 8

# Builds graphs and asks them elsewhere: from the cells of all nodes and what is asked, in the order asked for.
Elsewhere = Callable[[NDArray[np.int32], Sequence[Asked]], Iterator[tuple[int, Iterator[Answer]]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How hard a graph tries; raising any of them raises recall and cost. ``ef`` is that of one graph of all nodes."""

    links: int
    ef_construction: int
    ef: int

    def ef_of(self, shards: int) -> int:
        """What each of several graphs is asked with for the recall of one: less, as it holds a share of the k nearest.

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
    """Memory beside the graphs: two blocks of coordinates and the merge of their answers."""
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
    elsewhere: Elsewhere | None = None,
) -> Candidates:
    """Candidates of every node from ``shards`` graphs; a pure function of its arguments, not of threads or ``kept``.

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
        Where each block of nodes is kept when a graph has been asked about it. A killed search builds at most the graph it
        was asking again, and asks it about the blocks that are left.
    advance
        Called with nodes finished: each node counts once when built and once per shard when queried.
    elsewhere
        Who builds the graphs and asks them, if it is not this process; gives their answers in the order asked for.
    """
    num_nodes = len(coord_GR)
    running = _Running(num_nodes, num_candidates, work, kept, effort)
    tell = advance or (lambda count: None)
    cell_G = cells(coord_GR, seed)
    order_G = shuffled(num_nodes, seed)
    nodes_of = [shard_nodes(order_G, cell_G, shard, shards) for shard in range(shards)]
    if elsewhere is not None:
        asked = [(shard, blocks) for shard in range(shards) if (blocks := running.open_blocks(shard))]
        tell((shards + 1 - len(asked)) * num_nodes - sum(len(nodes_of[shard]) for shard, _ in asked))
        for shard, found in elsewhere(cell_G, asked):
            for answer in found:
                running.merge(shard, answer)
            tell(len(nodes_of[shard]) + num_nodes)
        return Candidates(ids_GC=running.ids_GC, missed_self_G=running.missed_self_G)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for first in range(0, shards, threads):
            every = range(first, min(first + threads, shards))
            wave = [shard for shard in every if running.open_blocks(shard)]
            tell(sum(len(nodes_of[shard]) + num_nodes for shard in every if shard not in wave))
            graphs = list(pool.map(lambda shard: build(coord_GR, nodes_of[shard], effort, tell), wave))
            for shard, graph in zip(wave, graphs, strict=True):
                for answer in answers(
                    coord_GR,
                    cell_G,
                    nodes_of[shard],
                    graph,
                    effort.ef_of(shards),
                    threads,
                    num_candidates,
                    running.open_blocks(shard),
                    BLOCK_ROWS,
                ):
                    running.merge(shard, answer)
                tell(num_nodes)
            del graphs
    return Candidates(ids_GC=running.ids_GC, missed_self_G=running.missed_self_G)


class _Running:
    """The best candidates so far of every node, block by block, and how many shards each block has asked."""

    def __init__(self, num_nodes: int, num_candidates: int, work: Path, kept: BlockStore, effort: Effort) -> None:
        shape = (num_nodes, num_candidates)
        self.ids_GC = large_array(work / "candidates.npy", shape, np.int32)
        self.squared_GC = large_array(work / "squared.npy", shape, np.float32)
        self.missed_self_G = np.zeros(num_nodes, dtype=np.bool_)
        self.blocks = list(slices(0, num_nodes, BLOCK_ROWS))
        self.asked = [0] * len(self.blocks)
        # 2: in graphs of nodes in this order; a search that an earlier version began is not gone on with
        self._kept, self._name = kept, f"candidates-2-{effort.links}-{effort.ef_construction}-{effort.ef}"
        for number, rows in enumerate(self.blocks):
            self.ids_GC[rows], self.squared_GC[rows] = -1, np.inf
            self._load(number, rows)

    def open_blocks(self, shard: int) -> tuple[int, ...]:
        """Blocks that have not asked this shard."""
        return tuple(number for number, asked in enumerate(self.asked) if asked <= shard)

    def merge(self, shard: int, answer: Answer) -> None:
        """Take one graph's answers about one block; what a node had stays before what is as near."""
        number, labels, squared, missed_self = answer
        rows = self.blocks[number]
        ids, best = self.ids_GC[rows], self.squared_GC[rows]
        self.missed_self_G[rows] |= missed_self
        if self.asked[number]:
            all_ids, all_squared = np.concatenate([ids, labels], axis=1), np.concatenate([best, squared], axis=1)
            nearest = np.argsort(all_squared, axis=1, kind="stable")[:, : ids.shape[1]]
            ids[:], best[:] = np.take_along_axis(all_ids, nearest, 1), np.take_along_axis(all_squared, nearest, 1)
        else:
            ids[:, : labels.shape[1]], best[:, : labels.shape[1]] = labels, squared
        self.asked[number] = shard + 1
        self._kept.save(
            f"{self._name}-{number}",
            {"asked": np.array([shard + 1]), "ids": ids, "squared": best, "missed": self.missed_self_G[rows]},
        )

    def _load(self, number: int, rows: slice) -> None:
        found = self._kept.load(f"{self._name}-{number}")
        ids = self.ids_GC[rows]
        if found is None or not _is_block(found, len(ids), ids.shape[1], len(self.ids_GC)):
            return
        self.ids_GC[rows], self.squared_GC[rows] = found["ids"], found["squared"]
        self.missed_self_G[rows] = found["missed"]
        self.asked[number] = int(found["asked"][0])


def _is_block(found: Mapping[str, NDArray[np.generic]], num_rows: int, num_candidates: int, num_nodes: int) -> bool:
    """Whether a kept block has the parts of one: its checksum says that it is whole, not that it is of this search."""
    shapes = {name: (array.dtype.str, array.shape) for name, array in found.items()}
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"asked": ("<i8", (1,)), "missed": ("|b1", (num_rows,))}
    wanted |= {"ids": ("<i4", (num_rows, num_candidates)), "squared": ("<f4", (num_rows, num_candidates))}
    return shapes == wanted and int(found["ids"].max(initial=-1)) < num_nodes


def build(
    coord_GR: NDArray[np.float32],
    nodes: NDArray[np.int64],
    effort: Effort,
    tell: Callable[[int], None] = lambda count: None,
) -> hnswlib.Index:
    """A graph of some nodes, labelled by their numbers: one thread in the order given, so always the same graph."""
    graph = hnswlib.Index(space="l2", dim=coord_GR.shape[1])
    graph.init_index(max_elements=len(nodes), M=effort.links, ef_construction=effort.ef_construction, random_seed=100)
    for start in range(0, len(nodes), BLOCK_ROWS):
        block = nodes[start : start + BLOCK_ROWS]
        graph.add_items(np.ascontiguousarray(coord_GR[block]), block, num_threads=1)
        tell(len(block))
    return graph


def shard_nodes(order_G: NDArray[np.int64], cell_G: NDArray[np.int32], shard: int, shards: int) -> NDArray[np.int64]:
    """Nodes of one shard of the shuffle, in the order they are inserted."""
    return in_growing_chunks(order_G[shard::shards], cell_G)


def answers(
    coord_GR: NDArray[np.float32],
    cell_G: NDArray[np.int32],
    nodes: NDArray[np.int64],
    graph: hnswlib.Index,
    ef: int,
    threads: int,
    num_candidates: int,
    blocks: Sequence[int],
    block_rows: int,
) -> Iterator[Answer]:
    """Ask one graph about all nodes of some blocks, of ``block_rows`` each, cell after cell."""
    wanted = min(num_candidates, len(nodes))
    graph.set_ef(max(ef, wanted))
    in_shard = np.zeros(len(coord_GR), dtype=np.bool_)
    in_shard[nodes] = True
    every = list(slices(0, len(coord_GR), block_rows))
    for number in blocks:
        rows = every[number]
        order_B = np.argsort(cell_G[rows], kind="stable")
        found, distances = _ask(graph, coord_GR[rows][order_B], wanted, ef, threads, coord_GR, nodes)
        labels, squared = np.empty_like(found), np.empty_like(distances)
        labels[order_B], squared[order_B] = found, distances
        own = np.arange(rows.start, rows.stop)[:, None]
        yield number, labels, squared, in_shard[rows] & ~(labels == own).any(axis=1)


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
