"""The neighbour search on workers: shards and blocks of nodes as tasks, coordinates and answers in files that all see.

A graph task builds the graph of one shard, by one thread in the order given, queries it with every open block, and leaves
the answers in a file. They are merged shard by shard, so the candidates are those of one process. A scan task finds the
exact neighbours of some nodes, which are the same wherever they are computed.

Shapes: G nodes, Q queries, K neighbours kept, C candidates, R coordinates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.events import Observer
from embstore.core.interfaces import Check, Engine, Needs, no_check
from embstore.core.rows import slices
from embstore.core.sampling import shuffled
from embstore.search.hnsw import shards as hnsw
from embstore.search.hnsw.shards import Answer, Effort, ShardQueries, build_index, query_blocks, shard_nodes

_RANGES_A_WORKER = 4  # each task quantises all rows for itself, which its products must outweigh
LEAST_RANGE_ROWS = 4096

# Exact neighbours of the nodes of a task: int32 [Q, K] and float32 [Q, K].
Found = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphJob:
    """Its tasks are shards and the blocks to query their graphs with; the result is the file of the answers."""

    coordinates: Path
    cells: Path
    block_rows: int
    num_candidates: int
    effort: Effort
    shards: int
    seed: int
    folder: Path
    needs: Needs = "core"

    def start(self, number: int) -> _GraphWorker:
        """A worker that builds and queries graphs."""
        return _GraphWorker(self, number)

    def name(self, task: ShardQueries) -> str:
        """The shard, for messages."""
        return f"the graph of shard {task[0]} of {self.shards} of the neighbour search"

    def lost(self, number: int) -> None:
        """No result names what the worker wrote."""


class _GraphWorker:
    def __init__(self, job: GraphJob, number: int) -> None:
        self._job, self._number = job, number
        self._coord_GR, self._cell_G = _open(job.coordinates), _open(job.cells)

    def run(self, task: ShardQueries, *, following: ShardQueries | None, check: Check) -> Path:
        job, (shard, blocks) = self._job, task
        nodes = shard_nodes(shuffled(len(self._cell_G), job.seed), self._cell_G, shard, job.shards)
        answers = query_blocks(
            build_index(self._coord_GR, nodes, job.effort),
            self._coord_GR,
            self._cell_G,
            nodes,
            blocks,
            block_rows=job.block_rows,
            ef=job.effort.ef_of(job.shards),
            num_candidates=job.num_candidates,
            threads=1,
        )
        path = job.folder / f"answers-{shard}-{self._number}"
        with path.open("wb") as file:
            for number, *arrays in answers:
                for array in (np.array(number), *arrays):
                    np.save(file, array, allow_pickle=False)
        return path

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanJob:
    """Its tasks are nodes, int64 [Q]; the result is ``Found``."""

    coordinates: Path
    k: int
    threads: int
    memory_bytes: int
    device: str
    folder: Path
    needs: Needs = "device"

    def start(self, number: int) -> _ScanWorker:
        """A worker that scans all nodes for those of its task."""
        return _ScanWorker(self, number)

    def name(self, task: NDArray[np.int64]) -> str:
        """The range of nodes, for messages."""
        return f"the exact neighbours of {len(task)} nodes from node {task[0]} on"

    def lost(self, number: int) -> None:
        """Results are not in files."""


class _ScanWorker:
    def __init__(self, job: ScanJob, number: int) -> None:
        self._job, self._work = job, job.folder / f"scan-{number}"
        self._work.mkdir(exist_ok=True)
        self._coord_GR = _open(job.coordinates)

    def run(self, task: NDArray[np.int64], *, following: NDArray[np.int64] | None, check: Check) -> Found:
        from embstore.host.numerics import exact_arithmetic  # noqa: PLC0415 - torch loads where it computes
        from embstore.search.exact.scan import all_neighbors, scan_device  # noqa: PLC0415

        job = self._job
        with exact_arithmetic():
            blocks = list(
                all_neighbors(
                    self._coord_GR,
                    job.k,
                    queries_Q=task,
                    threads=job.threads,
                    memory_bytes=job.memory_bytes,
                    work=self._work,
                    device=scan_device(job.device),
                )
            )
        distances_QK = np.concatenate([block.distances_NK for block in blocks])
        return np.concatenate([block.ids_NK for block in blocks]), distances_QK.astype(np.float32)

    def close(self) -> None:
        pass


class RemoteSearch:
    """Runs the two jobs on an engine's workers; ``folder`` is one that they all see."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        threads: int,
        memory_bytes: int,
        device: str,
        observer: Observer,
    ) -> None:
        self._engine, self._folder, self._observer = engine, folder, observer
        self._threads, self._memory_bytes, self._device = threads, memory_bytes, device

    def query_graphs(
        self,
        coord_GR: NDArray[np.float32],
        cell_G: NDArray[np.int32],
        queries: Sequence[ShardQueries],
        *,
        num_candidates: int,
        effort: Effort,
        shards: int,
        seed: int,
    ) -> Iterator[tuple[int, Iterator[Answer]]]:
        """The answers of each graph, in the order of ``queries``; those of a graph that finishes early wait in its file."""
        job = GraphJob(
            coordinates=_file_of(coord_GR, self._folder / "graphs.npy"),
            cells=_file_of(cell_G, self._folder / "cells.npy"),
            block_rows=hnsw.BLOCK_ROWS,
            num_candidates=num_candidates,
            effort=effort,
            shards=shards,
            seed=seed,
            folder=self._folder,
        )
        finished: dict[int, Path] = {}
        waiting = [shard for shard, _ in queries]
        results = self._engine.map(job, queries, check=no_check, is_stopping=_never, observer=self._observer)
        with contextlib.closing(results):
            for (shard, _), path in results:
                finished[shard] = path
                while waiting and waiting[0] in finished:
                    its_turn = finished.pop(waiting[0])
                    yield waiting.pop(0), _read_answers(its_turn)
                    its_turn.unlink()

    def scan(
        self, coord_GR: NDArray[np.float32], k: int, tasks: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], Found]]:
        """Exact neighbours of each task's nodes, as they finish."""
        job = ScanJob(
            coordinates=_file_of(coord_GR, self._folder / "scan.npy"),
            k=k,
            threads=self._threads,
            memory_bytes=self._memory_bytes,
            device=self._device,
            folder=self._folder,
        )
        results = self._engine.map(job, tasks, check=no_check, is_stopping=_never, observer=self._observer)
        with contextlib.closing(results):
            yield from results

    def cut(self, nodes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Nodes as tasks: a few for each worker."""
        rows = max(LEAST_RANGE_ROWS, -(-len(nodes) // (_RANGES_A_WORKER * self._engine.num_workers("device"))))
        return [nodes[part] for part in slices(0, len(nodes), rows)]


def _file_of(array: NDArray[Any], path: Path) -> Path:
    """The .npy file of which ``array`` is the whole map, or ``path``, to which an array in memory is written."""
    if isinstance(array, np.memmap) and array.filename is not None:
        return Path(array.filename)
    np.save(path, array, allow_pickle=False)
    return path


def _open(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _read_answers(path: Path) -> Iterator[Answer]:
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            number, labels, squared, missed = (np.load(file, allow_pickle=False) for _ in range(4))
            yield int(number), labels, squared, missed


def _never() -> bool:
    """A search has no point at which it could end early and keep what it has."""
    return False
