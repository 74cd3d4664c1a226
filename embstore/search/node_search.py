"""One search over fixed nodes, by whichever engine the plan names, at rising effort; finished blocks outlive the process.

Shapes: G nodes, K neighbours kept, C candidates, R coordinates.
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
from embstore.core.sampling import shuffled
from embstore.host.allocator import give_back
from embstore.host.scratch import large_array
from embstore.search.audit import compare, sample_nodes
from embstore.search.distances import rerank
from embstore.search.exact.reference import exact_neighbors
from embstore.search.hnsw.shards import Effort, Elsewhere, hnsw_candidates
from embstore.search.remote import MappedSearch
from embstore.search.search_plan import SMALL_NODES, SearchPlan

# The exact scan is the last rung of the effort ladder while it takes minutes, not days.
_EXACT_RUNG_NODES = 4_000_000
_RANKED_ROWS = 1024
_PILOT_NODES = 16_384
_PILOT_QUERIES = 500
_PILOT_K = 10
# Below this in a sample, the graph of all nodes would not pass the audit: recall falls as nodes are added.
_PILOT_RECALL = 0.9995


class Search:
    """Neighbours of all nodes: ``ids_GK`` int32 and ``distances_GK`` float32, ascending, maps of ``work`` when large.

    ``effort``: of the last run, None when it was exact. ``missed_self_G``: nodes that their own graph did not return.
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
        mapped: MappedSearch | None = None,
    ) -> None:
        self.coord_GR = coord_GR
        self._mapped = mapped
        self._device = device
        self._config, self._plan, self._threads = config, plan, threads
        self._work, self._kept, self._observer = work, kept, observer
        shape = (len(coord_GR), K_MAX)
        self.ids_GK = large_array(work / "found_ids.npy", shape, np.int32)
        self.distances_GK = large_array(work / "found_distances.npy", shape, np.float32)
        self.missed_self_G = np.zeros(len(coord_GR), dtype=np.bool_)
        self.pilot_recall = self._pilot() if plan.method == "pilot" else None
        self._ladder = self._efforts()
        self.level = 0

    @property
    def effort(self) -> Effort | None:
        """Effort of the present level; None: exact."""
        return self._ladder[self.level]

    @property
    def total(self) -> int:
        """Node visits of a run: one to build and one per shard to query, or one of the exact engine."""
        return len(self.coord_GR) * (self._plan.shards + 1 if self.effort is not None else 1)

    @property
    def has_more_effort(self) -> bool:
        """Whether there is a level above this one."""
        return self.level + 1 < len(self._ladder)

    def raise_effort(self) -> Effort | None:
        """Go up one level; gives its effort."""
        self.level += 1
        return self.effort

    def run(self) -> None:
        """Search at the present level."""
        give_back()
        if self.effort is None:
            self.missed_self_G[:] = False
            if len(self.coord_GR) <= SMALL_NODES:
                every_node = np.arange(len(self.coord_GR))
                self._take(every_node, *exact_neighbors(self.coord_GR, every_node, K_MAX, advance=self._advance))
            else:
                self._scan()
        else:
            self._search_graphs(self.effort)

    def repair(self, nodes: NDArray[np.int64]) -> None:
        """Replace what was found for these nodes by what an exact search finds."""
        give_back()
        if len(self.coord_GR) <= SMALL_NODES:
            self._take(nodes, *exact_neighbors(self.coord_GR, nodes, K_MAX))
            return
        if self._mapped is not None:
            for part, found in self._mapped.scan(self.coord_GR, K_MAX, self._mapped.cut(nodes)):
                self._take(part, found.ids_QK, found.distances_QK)
            return
        for block_nodes, ids, distances in self._exact_blocks(nodes):
            self._take(block_nodes, ids, distances)

    def _scan(self) -> None:
        """All nodes by the exact engine; blocks that an earlier run finished are read back."""
        finished = 0
        order = shuffled(len(self.coord_GR), 0)
        while (block := self._kept.load(f"exact-{finished}")) is not None:
            nodes = order[finished : finished + len(block.get("ids", ()))]
            if not self._is_found(block, len(nodes)):
                break
            self._take(nodes, block["ids"], block["distances"])
            finished += len(nodes)
            self._advance(len(nodes))
        if self._mapped is not None:
            self._scan_elsewhere(self._mapped, order[finished:], finished)
            return
        for nodes, ids, distances in self._exact_blocks(None, finished):
            self._take(nodes, ids, distances)
            self._kept.save(f"exact-{finished}", {"ids": ids, "distances": distances.astype(np.float32)})
            finished += len(nodes)

    def _scan_elsewhere(self, mapped: MappedSearch, nodes: NDArray[np.int64], first: int) -> None:
        """These nodes by workers; what an earlier run kept out of its turn is taken, if it is of the same cut."""
        todo, starts = [], {}
        for part in mapped.cut(nodes):
            starts[int(part[0])] = first
            block = self._kept.load(f"exact-{first}")
            if block is not None and self._is_found(block, len(part)):
                self._take(part, block["ids"], block["distances"])
                self._advance(len(part))
            else:
                todo.append(part)
            first += len(part)
        for part, found in mapped.scan(self.coord_GR, K_MAX, todo):
            self._take(part, found.ids_QK, found.distances_QK)
            name = f"exact-{starts[int(part[0])]}"
            self._kept.save(name, {"ids": found.ids_QK, "distances": found.distances_QK})
            self._advance(len(part))

    def _exact_blocks(
        self, nodes: NDArray[np.int64] | None, finished: int = 0
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]]:
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
            elsewhere=self._asking(self._mapped, effort) if self._mapped is not None else None,
        )
        self.missed_self_G = found.missed_self_G

        def rank(start: int) -> None:
            nodes = np.arange(start, min(start + _RANKED_ROWS, len(self.coord_GR)))
            self._take(nodes, *rerank(self.coord_GR, nodes, found.ids_GC[nodes], K_MAX))

        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            list(pool.map(rank, range(0, len(self.coord_GR), _RANKED_ROWS)))

    def _asking(self, mapped: MappedSearch, effort: Effort) -> Elsewhere:
        return functools.partial(
            mapped.graphs,
            self.coord_GR,
            num_candidates=K_MAX + 1,
            effort=effort,
            shards=self._plan.shards,
            seed=self._config.seed,
        )

    def _pilot(self) -> float:
        """Recall of the first effort in a sample of the nodes: how hard they are for a graph."""
        size = min(_PILOT_NODES, len(self.coord_GR))
        sample_GR = self.coord_GR[np.sort(shuffled(len(self.coord_GR), self._config.seed)[:size])]
        found = hnsw_candidates(
            sample_GR,
            _PILOT_K + 1,
            effort=self._first_effort,
            shards=min(self._threads, 2),
            threads=self._threads,
            seed=self._config.seed,
            work=self._work,
            kept=NothingKept(),
        )
        queries = sample_nodes(size, _PILOT_QUERIES, seed=self._config.seed, level=-1)
        distances = rerank(sample_GR, queries, found.ids_GC[queries], _PILOT_K)[1]
        return compare(distances, exact_neighbors(sample_GR, queries, _PILOT_K)[1], num_nodes=size).recall

    @property
    def _first_effort(self) -> Effort:
        config = self._config
        return Effort(links=config.links, ef_construction=config.ef_construction, ef=config.ef)

    def _efforts(self) -> list[Effort | None]:
        """Efforts to try, lowest first; None is the exact engine."""
        first = self._first_effort
        if self._plan.method == "exact" or (self.pilot_recall is not None and self.pilot_recall < _PILOT_RECALL):
            return [None]
        if self._plan.method == "pilot":
            return [first, None]
        rungs: list[Effort | None] = [
            first,
            Effort(links=first.links, ef_construction=first.ef_construction, ef=4 * first.ef),
            Effort(links=2 * first.links, ef_construction=4 * first.ef_construction, ef=8 * first.ef),
        ]
        return [*rungs, None] if len(self.coord_GR) <= _EXACT_RUNG_NODES else rungs

    def _take(self, nodes: NDArray[np.int64], ids_QK: NDArray[np.int32], distances_QK: NDArray[np.floating[Any]]) -> None:
        self.ids_GK[nodes], self.distances_GK[nodes] = ids_QK, distances_QK

    def _is_found(self, block: Mapping[str, NDArray[Any]], num_rows: int) -> bool:
        """Whether a kept block can be one of this search."""
        shapes = {name: (array.dtype.str, array.shape) for name, array in block.items()}
        wanted = {"ids": ("<i4", (num_rows, K_MAX)), "distances": ("<f4", (num_rows, K_MAX))}
        return bool(num_rows) and shapes == wanted and int(block["ids"].max()) < len(self.coord_GR)

    def _advance(self, count: int) -> None:
        self._observer(StageAdvanced(stage="knn", count=count))
