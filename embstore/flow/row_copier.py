"""Blocks of windows that mix rows copied from old stores with computed ones; each old chunk is checked as it is read."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.files import storage_errors
from embstore.core.interfaces import RowBlock
from embstore.core.plan import grid_of
from embstore.core.records import FailedRow
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec
from embstore.flow.reuse import Reuse
from embstore.host.scratch import map_scratch

_SCRATCH = "reused_rows.npy"
_CHUNKS_AHEAD = 2  # chunks of an old store that the disk reads while one is decoded
# Computed rows come in smaller blocks than chunks, so that copied and computed rows fit in memory together.
_BLOCKS_IN_CHUNK = 4


class RowCopier:
    """Blocks of windows that mix copied and computed rows.

    If the old rows of a chunk are close together, chunks are assembled one at a time, each while the previous one is
    written. If they are scattered, the whole window is assembled in a mapped scratch file, so that each old chunk is read at
    most once per window.
    """

    def __init__(self, reuse: Reuse, spec: StoreSpec, work: Path) -> None:
        self._reuse = reuse
        self._spec = spec
        self._grid = grid_of(spec)
        self._scratch = work / _SCRATCH
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="embstore-copy")
        self._held: tuple[int, int] | None = None  # store and chunk that _held_BV contains
        self._held_BV: NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self._decoded = self._held_BV  # reused: fresh memory costs more than decoding
        self._free: list[NDArray[np.float16]] = []
        self._announced: dict[int, int] = {}  # of a store: the first chunk that the kernel was not told to read

    @property
    def computed_chunk_rows(self) -> int:
        """Rows per block that the embedder should yield for computed rows."""
        return max(1, self._spec.chunk_rows // _BLOCKS_IN_CHUNK)

    def close(self) -> None:
        """Stop the reading thread and delete the scratch file."""
        self._reader.shutdown(cancel_futures=True)
        with storage_errors("removing", self._scratch):
            self._scratch.unlink(missing_ok=True)

    def blocks(self, window: int, computed: Iterator[RowBlock]) -> Iterator[RowBlock]:
        """All rows of a window, chunk by chunk; ``computed`` yields the missing rows, numbered from the window's start."""
        rows = self._grid.window(window)
        feed = _one_by_one(computed, rows.start)
        chunks = [chunk for _, chunk in self._grid.chunks(window)]
        for chunk, emb_BV in zip(chunks, self._buffers(window, chunks), strict=True):
            coord_BR, residual_B, sequence_B = self._row_values(chunk)
            failed = []
            for row in self._reuse.missing(chunk):
                made = next(feed)
                local = int(row) - chunk.start
                emb_BV[local], coord_BR[local], residual_B[local] = made.emb_V, made.coord_R, made.residual
                sequence_B[local] = made.sequence
                if made.reason is not None:
                    failed.append(FailedRow(row=int(row), reason=made.reason))
            release = functools.partial(self._give_back, emb_BV)
            yield RowBlock(
                emb_BV=emb_BV,
                coord_BR=coord_BR,
                residual_B=residual_B,
                sequence_B=sequence_B,
                failed=tuple(failed),
                release=release,
            )
        if next(feed, None) is not None:
            raise AssertionError(f"window {window} got more computed rows than it needs")

    def rereads(self, windows: Sequence[int]) -> float:
        """How often each old chunk that these windows need is read, on average."""
        reads, distinct = 0, set[tuple[int, int]]()
        for window in windows:
            chunks = [chunk for _, chunk in self._grid.chunks(window)]
            needed = [self._needed(chunk) for chunk in chunks]
            together = set().union(*needed)
            reads += len(together) if self._is_scattered(chunks) else sum(map(len, needed))
            distinct |= together
        return reads / max(1, len(distinct))

    def _buffers(self, window: int, chunks: Sequence[RowRange]) -> Iterator[NDArray[np.float16]]:
        """float16 [rows, V] of each chunk with its copied rows; computed rows are still to be filled in."""
        rows = self._grid.window(window)
        if self._is_scattered(chunks):
            with storage_errors("removing", self._scratch):
                self._scratch.unlink(missing_ok=True)
            whole_WV = map_scratch(self._scratch, (rows.num_rows, self._spec.embedding.dimension), np.float16)
            self._copy(rows, whole_WV)
            yield from (whole_WV[chunk.start - rows.start : chunk.stop - rows.start] for chunk in chunks)
            return
        ahead = self._reader.submit(self._gathered, chunks[0])
        for following in (*chunks[1:], None):
            emb_BV = ahead.result()
            if following is not None:
                ahead = self._reader.submit(self._gathered, following)
            yield emb_BV

    def _is_scattered(self, chunks: Sequence[RowRange]) -> bool:
        """Whether assembling chunk by chunk would read old chunks repeatedly."""
        by_chunk = [self._needed(chunk) for chunk in chunks]
        return sum(map(len, by_chunk)) > 2 * len(set().union(*by_chunk)) + len(by_chunk)

    def _needed(self, rows: RowRange) -> set[tuple[int, int]]:
        """Old chunks, as (store, index), that contain rows of a range."""
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        return {
            (number, int(index))
            for number, store in enumerate(self._reuse.stores)
            for index in np.unique(row_B[store_B == number] // store.spec.chunk_rows)
        }

    def _gathered(self, rows: RowRange) -> NDArray[np.float16]:
        """float16 [rows, V] with the copied rows of a range."""
        is_whole = rows.num_rows == self._spec.chunk_rows
        emb_BV = self._free.pop() if is_whole and self._free else self._empty(rows.num_rows)
        self._copy(rows, emb_BV)
        return emb_BV

    def _copy(self, rows: RowRange, emb_BV: NDArray[np.float16]) -> None:
        """Copy the reused rows of a range into ``emb_BV``; each old chunk is read, checked and decoded once."""
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        # the decoded chunk first: the previous range ended in it
        for number, index in sorted(self._needed(rows), key=lambda needed: (needed != self._held, needed)):
            chunk_rows = self._reuse.stores[number].spec.chunk_rows
            old_BV = self._old_chunk(number, index)
            # row by row: indexing with a list of rows would copy them twice
            for local in np.flatnonzero((store_B == number) & (row_B // chunk_rows == index)):
                emb_BV[local] = old_BV[row_B[local] - index * chunk_rows]

    def _give_back(self, emb_BV: NDArray[np.float16]) -> None:
        if emb_BV.flags.owndata and len(emb_BV) == self._spec.chunk_rows:  # neither mapped nor from the smaller last chunk
            self._free.append(emb_BV)

    def _empty(self, num_rows: int) -> NDArray[np.float16]:
        return np.empty((num_rows, self._spec.embedding.dimension), dtype=np.float16)

    def _old_chunk(self, number: int, index: int) -> NDArray[np.float16]:
        if self._held != (number, index):
            store = self._reuse.stores[number]
            if self._held is None or self._held[0] != number:
                self._held_BV = self._decoded = self._empty(0)  # never hold chunks of two stores at once
                self._decoded = self._empty(store.spec.chunk_rows)
            self._prefetch(number, index)
            self._held = None  # the next read may fail half-way
            self._held_BV = store.read_chunk(index, out=self._decoded)
            self._held = (number, index)
        return self._held_BV

    def _prefetch(self, number: int, index: int) -> None:
        """Announce the chunks after this one: pools keep most of their order."""
        begun = max(self._announced.get(number, 0), index + 1)
        for following in range(begun, index + 1 + _CHUNKS_AHEAD):
            self._reuse.stores[number].prefetch_chunk(following)
        self._announced[number] = max(begun, index + 1 + _CHUNKS_AHEAD)

    def _row_values(self, rows: RowRange) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint64]]:
        """Coordinates, residuals and sequences; the latter are 0 where the old store has none."""
        coord_BR = np.empty((rows.num_rows, self._spec.embedding.rank), dtype=np.float32)
        residual_B = np.empty(rows.num_rows, dtype=np.float32)
        sequence_B = np.zeros(rows.num_rows, dtype=np.uint64)
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        for number, store in enumerate(self._reuse.stores):
            mine = store_B == number
            coord_BR[mine] = store.coordinates[row_B[mine]]
            residual_B[mine] = store.residuals[row_B[mine]]
            if store.sequences is not None:
                sequence_B[mine] = store.sequences[row_B[mine]]
        return coord_BR, residual_B, sequence_B


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    emb_V: NDArray[np.float16]
    coord_R: NDArray[np.float32]
    residual: np.float32
    sequence: np.uint64
    reason: str | None


def _one_by_one(blocks: Iterator[RowBlock], first_row: int) -> Iterator[_Computed]:
    """Computed rows in order; a block is released after its last row."""
    for block in blocks:
        reasons = {failed.row: failed.reason for failed in block.failed}
        sequence_B = block.sequence_B if block.sequence_B is not None else np.zeros(len(block.emb_BV), dtype=np.uint64)
        for local in range(len(block.emb_BV)):
            yield _Computed(
                emb_V=block.emb_BV[local],
                coord_R=block.coord_BR[local],
                residual=block.residual_B[local],
                sequence=sequence_B[local],
                reason=reasons.get(first_row + local),
            )
        first_row += len(block.emb_BV)
        block.release()
