"""Rows of a chunk, computed slab by slab on worker threads into memory that is used again.

Shapes: B rows of a chunk or slab, V columns, R coordinates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.interfaces import RowBlock
from embstore.core.records import FailedRow
from embstore.core.rows import slices
from embstore.host.threads import Urgency, Workers
from embstore.model.recycled import ChunkMemory, RecycledMemory

# Computes the rows of a slab of the chunk into emb_BV, coord_BR and residual_B; returns the norms [B] they had.
Fill = Callable[[slice, Tensor, Tensor, Tensor], NDArray[np.floating]]
# Why a row of the chunk has failed, given its norm; None if it has not.
Reason = Callable[[int, float], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows of one chunk on the way; ``norm_B`` are float64 norms before scaling, filled by ``jobs``."""

    memory: ChunkMemory
    norm_B: NDArray[np.float64]
    jobs: list[Future[None]]

    def wait(self) -> None:
        """Wait until no job of this chunk runs, whether or not they succeed."""
        wait(self.jobs)


class SlabWorkers:
    """Cuts chunks into slabs of ``slab_rows`` and has them filled; slabs decide low bits."""

    def __init__(self, workers: Workers, memory: RecycledMemory, slab_rows: int, urgency: Urgency = ()) -> None:
        self._workers, self._memory = workers, memory
        self._slab_rows, self._urgency = slab_rows, urgency

    def begin(self, num_rows: int, fill: Fill) -> Chunk:
        """Have all slabs of a chunk filled in the background."""
        memory, norm_B = self._memory.take(num_rows), np.empty(num_rows)

        def run(slab: slice) -> None:
            norm_B[slab] = fill(slab, memory.emb_BV[slab], memory.coord_BR[slab], memory.residual_B[slab])

        jobs = [
            self._workers.submit(functools.partial(run, slab), self._urgency)
            for slab in slices(0, num_rows, self._slab_rows)
        ]
        return Chunk(memory=memory, norm_B=norm_B, jobs=jobs)

    def finished(self, chunk: Chunk, first_row: int, reason: Reason) -> RowBlock:
        """Wait for a chunk, and replace the rows that failed by NaN."""
        for job in chunk.jobs:
            job.result()
        memory = chunk.memory
        emb_BV, coord_BR, residual_B = memory.emb_BV.numpy(), memory.coord_BR.numpy(), memory.residual_B.numpy()
        failed: list[FailedRow] = []
        for local, norm in enumerate(chunk.norm_B.tolist()):
            if (why := reason(local, norm)) is not None:
                emb_BV[local] = coord_BR[local] = residual_B[local] = np.nan
                failed.append(FailedRow(row=first_row + local, reason=why))
        release = functools.partial(self._memory.give_back, memory)
        return RowBlock(emb_BV=emb_BV, coord_BR=coord_BR, residual_B=residual_B, failed=tuple(failed), release=release)
