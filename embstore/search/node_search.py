"""One search over fixed nodes, by the engine that the plan names; finished blocks outlive the process.

Shapes: G nodes, Q queries, K neighbours kept, C candidates, R coordinates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import K_MAX, DensityConfig
from embstore.core.events import Observer, StageAdvanced
from embstore.core.interfaces import BlockStore, NothingKept
from embstore.core.rows import slices
from embstore.core.sampling import seeded_sample, shuffled
from embstore.host.allocator import give_back
from embstore.host.scratch import large_array
from embstore.search.audit import compare, sample_nodes
from embstore.search.distances import IntMatrix, rerank
from embstore.search.exact.pairwise import brute_force
from embstore.search.hnsw.shards import Effort, QueryOnWorkers, hnsw_candidates
from embstore.search.kept_blocks import has_layout
from embstore.search.remote import RemoteSearch
from embstore.search.search_plan import SMALL_NODES, SearchPlan

# Up to this many nodes the exact engine, which takes hours at most, follows graphs that were asked for and fail their audit.
EXACT_NODES = 4_000_000
_RANKED_ROWS = 1024
_PILOT_NODES = 16_384
_PILOT_QUERIES = 500
_PILOT_K = 10
# Below this in a sample, the graph of all nodes would not pass the audit: recall falls as nodes are added.
_PILOT_RECALL = 0.9995


class NeighborSearch:
    """Neighbours of all nodes: ``ids_GK`` int32 and ``distances_GK`` float32, ascending, maps of ``work`` when large.

    ``effort``: of the graphs; None for the exact engine. ``missed_self_G``: nodes that their own graph did not return.
    """

    def __init__(
        self,
        coord_GR: NDArray[np.float32],
        config: DensityConfig,
        plan: SearchPlan,
        *,
        threads: int,
        work: Path,
        kept: BlockStore,
        observer: Observer,
        device: str = "cpu",
        remote: RemoteSearch | None = None,
    ) -> None:
        self.coord_GR = coord_GR
        self._config, self._plan, self._threads = config, plan, threads
        self._work, self._kept, self._observer = work, kept, observer
        self._device, self._remote = device, remote
        shape = (len(coord_GR), K_MAX)
        self.ids_GK = large_array(work / "found_ids.npy", shape, np.int32)
        self.distances_GK = large_array(work / "found_distances.npy", shape, np.float32)
        self.missed_self_G = np.zeros(len(coord_GR), dtype=np.bool_)
        self.pilot_recall = self._pilot() if plan.method == "pilot" else None
        is_exact = plan.method == "exact" or (self.pilot_recall is not None and self.pilot_recall < _PILOT_RECALL)
        self.effort = None if is_exact else self._graph_effort

    @property
    def total(self) -> int:
        """Node visits of a run: one to build and one per shard to query, or one of the exact engine."""
        return len(self.coord_GR) * (self._plan.shards + 1 if self.effort is not None else 1)

    @property
    def may_search_exactly(self) -> bool:
        """Whether the exact engine may follow (docs/decisions/0036)."""
        return self.effort is not None and (self._plan.method == "pilot" or len(self.coord_GR) <= EXACT_NODES)

    def run(self) -> None:
        """Search by graphs, or exactly where ``effort`` is None."""
        give_back()
        if self.effort is not None:
            self._search_graphs(self.effort)
            return
        self.missed_self_G[:] = False
        if len(self.coord_GR) <= SMALL_NODES:
            every_node = np.arange(len(self.coord_GR))
            self._take(every_node, *brute_force(self.coord_GR, every_node, K_MAX, advance=self._advance))
        else:
            self._scan()

    def search_exactly(self) -> None:
        """Search again with the exact engine, and take what it finds in place of what graphs found."""
        self.effort = None
        self.run()

    def repair(self, nodes: NDArray[np.int64]) -> None:
        """Replace what was found for these nodes by their exact neighbours."""
        give_back()
        if len(self.coord_GR) <= SMALL_NODES:
            self._take(nodes, *brute_force(self.coord_GR, nodes, K_MAX))
        elif self._remote is not None:
            for part, (ids_QK, distances_QK) in self._remote.scan(self.coord_GR, K_MAX, self._remote.cut(nodes)):
                self._take(part, ids_QK, distances_QK)
        else:
            for block in self._exact_blocks(nodes):
                self._take(*block)

    # --- the exact engine: blocks of the shuffled nodes, kept as ``exact-<first>`` -------------------------------

    def _scan(self) -> None:
        """Search for all nodes, from the first block on that no earlier run kept."""
        order = shuffled(len(self.coord_GR), 0)
        first = 0
        while (block := self._kept.load(f"exact-{first}")) is not None:
            nodes = order[first : first + len(block.get("ids", ()))]
            if not self._take_kept(block, nodes):
                break
            first += len(nodes)
        if self._remote is not None:
            self._scan_on_workers(self._remote, order[first:], first)
            return
        for nodes, ids, distances in self._exact_blocks(None, first):
            self._take(nodes, ids, distances)
            self._kept.save(f"exact-{first}", {"ids": ids, "distances": distances.astype(np.float32)})
            first += len(nodes)

    def _scan_on_workers(self, remote: RemoteSearch, nodes: NDArray[np.int64], first: int) -> None:
        """Search these nodes on workers. Blocks that an interrupted run saved are reused if they cover the same ranges."""
        todo, first_of = [], {}
        for part in remote.cut(nodes):
            first_of[int(part[0])] = first
            if not self._take_kept(self._kept.load(f"exact-{first}"), part):
                todo.append(part)
            first += len(part)
        for part, (ids_QK, distances_QK) in remote.scan(self.coord_GR, K_MAX, todo):
            self._take(part, ids_QK, distances_QK)
            self._kept.save(f"exact-{first_of[int(part[0])]}", {"ids": ids_QK, "distances": distances_QK})
            self._advance(len(part))

    def _take_kept(self, block: Mapping[str, NDArray[Any]] | None, nodes: NDArray[np.int64]) -> bool:
        """Take a kept block if it can be that of these nodes."""
        layout = {"ids": ("<i4", (len(nodes), K_MAX)), "distances": ("<f4", (len(nodes), K_MAX))}
        if block is None or not len(nodes) or not has_layout(block, layout, len(self.coord_GR)):
            return False
        self._take(nodes, block["ids"], block["distances"])
        self._advance(len(nodes))
        return True

    def _exact_blocks(
        self, nodes: NDArray[np.int64] | None, finished: int = 0
    ) -> Iterator[tuple[NDArray[np.int64], IntMatrix, NDArray[np.float64]]]:
        from embstore.search.exact.scan import all_neighbors, scan_device  # noqa: PLC0415 - torch, which small searches do not need

        blocks = all_neighbors(
            self.coord_GR,
            K_MAX,
            queries_Q=nodes,
            finished=finished,
            threads=self._threads,
            memory_bytes=self._plan.scan_memory_bytes,
            work=self._work,
            device=scan_device(self._device),
            advance=self._advance if nodes is None else None,
        )
        for block in blocks:
            yield block.nodes_N, block.ids_NK, block.distances_NK

    # --- graphs -------------------------------------------------------------------------------------------------

    def _search_graphs(self, effort: Effort) -> None:
        found = hnsw_candidates(
            self.coord_GR,
            K_MAX + 1,
            effort=effort,
            shards=self._plan.shards,
            threads=self._threads,
            seed=self._config.seed,
            work=self._work,
            kept=self._kept,
            advance=self._advance,
            on_workers=self._query_on_workers(self._remote, effort) if self._remote is not None else None,
        )
        self.missed_self_G = found.missed_self_G

        def rank(rows: slice) -> None:
            nodes = np.arange(rows.start, rows.stop)
            self._take(nodes, *rerank(self.coord_GR, nodes, found.ids_GC[rows], K_MAX))

        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            list(pool.map(rank, slices(0, len(self.coord_GR), _RANKED_ROWS)))

    def _query_on_workers(self, remote: RemoteSearch, effort: Effort) -> QueryOnWorkers:
        return functools.partial(
            remote.query_graphs,
            self.coord_GR,
            num_candidates=K_MAX + 1,
            effort=effort,
            shards=self._plan.shards,
            seed=self._config.seed,
        )

    def _pilot(self) -> float:
        """Recall of graphs of a sample of the nodes: how hard they are for a graph."""
        size = min(_PILOT_NODES, len(self.coord_GR))
        sample_GR = self.coord_GR[seeded_sample(len(self.coord_GR), size, self._config.seed)]
        found = hnsw_candidates(
            sample_GR,
            _PILOT_K + 1,
            effort=self._graph_effort,
            shards=min(self._threads, 2),
            threads=self._threads,
            seed=self._config.seed,
            work=self._work,
            kept=NothingKept(),
        )
        queries = sample_nodes(size, _PILOT_QUERIES, seed=self._config.seed, draw=-1)
        distances = rerank(sample_GR, queries, found.ids_GC[queries], _PILOT_K)[1]
        return compare(distances, brute_force(sample_GR, queries, _PILOT_K)[1], num_nodes=size).recall

    @property
    def _graph_effort(self) -> Effort:
        config = self._config
        return Effort(links=config.links, ef_construction=config.ef_construction, ef=config.ef)

    # --- what was found -----------------------------------------------------------------------------------------

    def _take(self, nodes: NDArray[np.int64], ids_QK: IntMatrix, distances_QK: NDArray[np.floating[Any]]) -> None:
        self.ids_GK[nodes], self.distances_GK[nodes] = ids_QK, distances_QK

    def _advance(self, count: int) -> None:
        self._observer(StageAdvanced(stage="knn", count=count))
