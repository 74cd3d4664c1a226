"""Memory of chunks, used again when the writer is done with it: fresh pages cost more than the arithmetic on them.

Measured on a virtual machine: filling a new 32 MiB tensor took 13 times as long as filling one that was there
(docs/performance.md). Host memory for a GPU is pinned, which is dearer still to make.

Shapes: B rows of a chunk, V vocabulary, R coordinates.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkMemory:
    """Host memory of one chunk: rows float16 [B, V], coordinates float32 [B, R], residuals float32 [B]."""

    emb_BV: Tensor
    coord_BR: Tensor
    residual_B: Tensor


class RecycledMemory:
    """Chunks' memory for any number of threads; as many pieces exist as were ever out at once."""

    def __init__(self, dimension: int, rank: int, *, pinned: bool) -> None:
        self._dimension, self._rank, self._pinned = dimension, rank, pinned
        self._free: list[ChunkMemory] = []
        self._lock = threading.Lock()

    def take(self, rows: int) -> ChunkMemory:
        """Memory of a chunk; what was in it before is still there."""
        with self._lock:
            for index, memory in enumerate(self._free):
                if len(memory.emb_BV) >= rows:
                    whole = self._free.pop(index)
                    return whole if len(whole.emb_BV) == rows else _first(whole, rows)
            self._free.clear()  # all too small: let them go before there is more
        emb_BV = (
            torch.empty((rows, self._dimension), dtype=torch.float16, pin_memory=True)
            if self._pinned
            # numpy asks for huge pages where the system grants them on request
            else torch.from_numpy(np.empty((rows, self._dimension), dtype=np.float16))
        )
        return ChunkMemory(emb_BV=emb_BV, coord_BR=torch.empty((rows, self._rank)), residual_B=torch.empty(rows))

    def give_back(self, memory: ChunkMemory) -> None:
        """Nobody reads this memory any more."""
        with self._lock:
            self._free.append(memory)


def _first(whole: ChunkMemory, rows: int) -> ChunkMemory:
    return ChunkMemory(emb_BV=whole.emb_BV[:rows], coord_BR=whole.coord_BR[:rows], residual_B=whole.residual_B[:rows])
