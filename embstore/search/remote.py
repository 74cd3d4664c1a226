"""The neighbour search on workers: shards and blocks of nodes as tasks, coordinates and answers in files that all see.

A graph task builds one shard's graph, one thread in the order given, asks it about every open block, and leaves the answers
in a file; they are merged shard by shard, so the candidates are those of one process. A scan task gives the exact
neighbours of some nodes, which are the same wherever they are computed.

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
from embstore.core.interfaces import Check, Engine, Needs
from embstore.core.sampling import shuffled
from embstore.search.hnsw import shards as hnsw
from embstore.search.hnsw.shards import Answer, Asked, Effort, answers, build, shard_nodes

_RANGES_A_WORKER = 4  # each task quantises all rows for itself, which its products must outweigh
LEAST_RANGE_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FileArray:
    """An array that lies in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, array: NDArray[Any], path: Path) -> FileArray:
        """The file that ``array`` is a map of; one that is in memory is written to ``path``."""
        if not isinstance(array, np.memmap) or not isinstance(array.filename, str | Path):
            np.save(path, array)
            array = np.load(path, mmap_mode="r")
            assert isinstance(array, np.memmap)
        return cls(path=Path(str(array.filename)), dtype=array.dtype.str, shape=array.shape, offset=array.offset)

    def open(self) -> NDArray[Any]:
        """The array, mapped."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Graphs:
    """A job whose tasks are shards and the blocks that are to be asked about; the result is the file of the answers."""

    coord_GR: FileArray
    cell_G: FileArray
    block_rows: int
    num_candidates: int
    effort: Effort
    shards: int
    seed: int
    folder: Path
    needs: Needs = "core"

    def start(self, number: int) -> _GraphWorker:
        """As ``core.engine.Job``."""
        return _GraphWorker(self, number)

    def name(self, task: Asked) -> str:
        """As ``core.engine.Job``."""
        return f"the graph of shard {task[0]} of {self.shards} of the neighbour search"

    def lost(self, number: int) -> None:
        """What it wrote is not named by any result."""


class _GraphWorker:
    def __init__(self, job: Graphs, number: int) -> None:
        self._job, self._number = job, number
        self._coord_GR, self._cell_G = job.coord_GR.open(), job.cell_G.open()

    def run(self, task: Asked, *, following: Asked | None, check: Check) -> Path:
        job, (shard, blocks) = self._job, task
        nodes = shard_nodes(shuffled(len(self._cell_G), job.seed), self._cell_G, shard, job.shards)
        graph = build(self._coord_GR, nodes, job.effort)
        path = job.folder / f"answers-{shard}-{self._number}"
        with path.open("wb") as file:
            for number, labels, squared, missed in answers(
                self._coord_GR,
                self._cell_G,
                nodes,
                graph,
                job.effort.ef_of(job.shards),
                1,
                job.num_candidates,
                blocks,
                job.block_rows,
            ):
                for array in (np.array(number), labels, squared, missed):
                    np.save(file, array, allow_pickle=False)
        return path

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scanned:
    """Exact neighbours of the nodes of a task: int32 [Q, K] and float32 [Q, K]."""

    ids_QK: NDArray[np.int32]
    distances_QK: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A job whose tasks are nodes: int64 [Q]."""

    coord_GR: FileArray
    k: int
    threads: int
    memory_bytes: int
    device: str
    folder: Path
    needs: Needs = "device"

    def start(self, number: int) -> _ScanWorker:
        """As ``core.engine.Job``."""
        return _ScanWorker(self, number)

    def name(self, task: NDArray[np.int64]) -> str:
        """As ``core.engine.Job``."""
        return f"the exact neighbours of {len(task)} nodes from node {task[0]} on"

    def lost(self, number: int) -> None:
        """Nothing of it is in a file that counts."""


class _ScanWorker:
    def __init__(self, job: Scan, number: int) -> None:
        self._job, self._work = job, job.folder / f"scan-{number}"
        self._work.mkdir(exist_ok=True)
        self._coord_GR = job.coord_GR.open()

    def run(self, task: NDArray[np.int64], *, following: NDArray[np.int64] | None, check: Check) -> Scanned:
        from embstore.search.exact.scan import all_neighbors, scan_device  # noqa: PLC0415 - torch loads where it computes

        job = self._job
        blocks = all_neighbors(
            self._coord_GR,
            job.k,
            queries_Q=task,
            threads=job.threads,
            memory_bytes=job.memory_bytes,
            work=self._work,
            device=scan_device(job.device),
        )
        found = [(block.ids_NK, block.distances_NK.astype(np.float32)) for block in blocks]
        return Scanned(
            ids_QK=np.concatenate([ids for ids, _ in found]), distances_QK=np.concatenate([each for _, each in found])
        )

    def close(self) -> None:
        pass


class MappedSearch:
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

    def graphs(
        self,
        coord_GR: NDArray[np.float32],
        cell_G: NDArray[np.int32],
        asked: Sequence[Asked],
        *,
        num_candidates: int,
        effort: Effort,
        shards: int,
        seed: int,
    ) -> Iterator[tuple[int, Iterator[Answer]]]:
        """The answers of each graph, in the order of ``asked``; a graph that is finished early waits in its file."""
        job = Graphs(
            coord_GR=FileArray.of(coord_GR, self._folder / "graphs.npy"),
            cell_G=FileArray.of(cell_G, self._folder / "cells.npy"),
            block_rows=hnsw.BLOCK_ROWS,
            num_candidates=num_candidates,
            effort=effort,
            shards=shards,
            seed=seed,
            folder=self._folder,
        )
        finished: dict[int, Path] = {}
        waiting = [shard for shard, _ in asked]
        results = self._engine.map(job, asked, check=_no_check, is_stopping=_never, observer=self._observer)
        with contextlib.closing(results):
            for (shard, _), path in results:
                finished[shard] = path
                while waiting and waiting[0] in finished:
                    its_turn = finished.pop(waiting[0])
                    yield waiting.pop(0), _read_answers(its_turn)
                    its_turn.unlink()

    def scan(
        self, coord_GR: NDArray[np.float32], k: int, tasks: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], Scanned]]:
        """Exact neighbours of each task's nodes, as they finish."""
        job = Scan(
            coord_GR=FileArray.of(coord_GR, self._folder / "scan.npy"),
            k=k,
            threads=self._threads,
            memory_bytes=self._memory_bytes,
            device=self._device,
            folder=self._folder,
        )
        results = self._engine.map(job, tasks, check=_no_check, is_stopping=_never, observer=self._observer)
        with contextlib.closing(results):
            yield from results

    def cut(self, nodes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Nodes as tasks: a few for each worker."""
        rows = max(LEAST_RANGE_ROWS, -(-len(nodes) // (_RANGES_A_WORKER * self._engine.num_workers("device"))))
        return [nodes[start : start + rows] for start in range(0, len(nodes), rows)]


def _read_answers(path: Path) -> Iterator[Answer]:
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            number, labels, squared, missed = (np.load(file, allow_pickle=False) for _ in range(4))
            yield int(number), labels, squared, missed


def _no_check() -> None:
    """A signal during a search raises by itself."""


def _never() -> bool:
    """A search has no point at which it would end early and keep what it has."""
    return False
