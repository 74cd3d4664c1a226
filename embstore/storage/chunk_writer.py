"""Makes the chunks of one window durable, in whichever process computes them: it takes no lock and commits nothing.

Per chunk: temp -> write -> fsync -> rename; per window: fsync(folder). What a commit needs besides the chunks (their sizes
and checksums, slices of the row files, failed rows: about 4 R bytes a row) is returned. It may travel to the one process
that has the lock and the journal (``storage.writer.StoreWriter.commit_window``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import RowError
from embstore.core.files import fsync_directory
from embstore.core.format import EMBEDDINGS, chunk_name
from embstore.core.interfaces import RowBlock, WindowCounts
from embstore.core.plan import grid_of
from embstore.core.records import ChunkRecord, FailedRow, ReusingWindowRecord, WindowRecord
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec
from embstore.host.allocator import keep_large_blocks
from embstore.storage.atomic import DurableFile
from embstore.storage.chunks import Encoded, crc32c, encode_chunk
from embstore.storage.direct import DirectBuffer

WORKER_FOLDERS = "engine-"  # folders in work/ that begin like this contain temp files of a driver's workers
# Chunks that are compressed while another one is written. Compression takes as long as a write to a fast disk.
ENCODED_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WrittenWindow:
    """A window with durable chunks that is not committed yet: its record, and its slice of each row file."""

    record: WindowRecord
    coord_WR: NDArray[np.float32]
    residual_W: NDArray[np.float32]
    sequence_W: NDArray[np.uint64]


class WindowWriter:
    """Writes chunks of the store at ``root``; ``folder`` is for temp files (default: the folder of the chunks)."""

    def __init__(self, root: Path, spec: StoreSpec, *, folder: Path | None = None) -> None:
        self._root, self._spec, self._folder = root, spec, folder
        self._direct = DirectBuffer()  # shared by all chunks
        self._encoders = ThreadPoolExecutor(ENCODED_AHEAD, thread_name_prefix="embstore-encode")  # started when first used

    def close(self) -> None:
        """Stop the threads; written chunks stay."""
        self._encoders.shutdown(cancel_futures=True)

    def write(
        self,
        window: int,
        blocks: Iterator[RowBlock],
        counts: Callable[[], WindowCounts],
        *,
        reused: Sequence[RowRange] = (),
    ) -> WrittenWindow:
        """Write the chunks of one window.

        ``blocks`` yields one RowBlock per chunk; ``counts`` is called once they are exhausted; ``reused`` are the rows that
        were copied from other stores, in row order.
        """
        keep_large_blocks()
        grid = grid_of(self._spec)
        rows = grid.window(window)
        coord_WR = np.empty((rows.num_rows, self._spec.embedding.rank), dtype="<f4")
        residual_W = np.empty(rows.num_rows, dtype="<f4")
        sequence_W = np.zeros(rows.num_rows, dtype="<u8")
        chunks: list[ChunkRecord] = []
        failed: list[FailedRow] = []
        for index, chunk_rows, block, encoded in self._encoding_ahead(grid.chunks(window), blocks):
            chunks.append(self._write_chunk(index, *encoded.result()))
            local = slice(chunk_rows.start - rows.start, chunk_rows.stop - rows.start)
            coord_WR[local], residual_W[local] = block.coord_BR, block.residual_B
            if block.sequence_B is not None:
                sequence_W[local] = block.sequence_B
            failed += block.failed
            block.release()
        _refuse_unlisted(rows, coord_WR, residual_W, failed)
        fsync_directory(self._root / EMBEDDINGS)
        seen = counts()
        record = WindowRecord(
            window=window,
            start=rows.start,
            stop=rows.stop,
            chunks=chunks,
            coordinates_crc32c=crc32c(coord_WR.data.cast("B")),
            residuals_crc32c=crc32c(residual_W.data.cast("B")),
            sequences_crc32c=crc32c(sequence_W.data.cast("B")) if self._spec.sequences else None,
            tokens=seen.tokens,
            truncated=seen.truncated,
            splits=seen.splits,
            failed=failed,
        )
        if reused:
            fields = {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}
            record = ReusingWindowRecord(**fields, reused=[[rows.start, rows.stop] for rows in reused])
        return WrittenWindow(record=record, coord_WR=coord_WR, residual_W=residual_W, sequence_W=sequence_W)

    def _encoding_ahead(
        self, chunks: Iterable[tuple[int, RowRange]], blocks: Iterator[RowBlock]
    ) -> Iterator[tuple[int, RowRange, RowBlock, Future[Encoded]]]:
        """Chunks in order, each encoded while earlier ones are written, so that the disk does not wait for compression."""
        spec = self._spec
        waiting: deque[tuple[int, RowRange, RowBlock, Future[Encoded]]] = deque()
        for (index, rows), block in zip(chunks, blocks, strict=True):
            expected = (rows.num_rows, spec.embedding.dimension)
            if block.emb_BV.shape != expected:
                raise AssertionError(f"chunk {index} needs {expected}, the embedder gave {block.emb_BV.shape}")
            if any(np.may_share_memory(block.emb_BV, other.emb_BV) for _, _, other, _ in waiting):
                raise AssertionError(f"chunk {index} shares memory with a block that is not written yet")
            encode = functools.partial(encode_chunk, chunk_rows=spec.chunk_rows, compressor=spec.compressor)
            waiting.append((index, rows, block, self._encoders.submit(encode, block.emb_BV)))
            if len(waiting) > ENCODED_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _write_chunk(self, index: int, pieces: list[bytes | memoryview], record: ChunkRecord) -> ChunkRecord:
        path = self._root / chunk_name(index)
        with DurableFile(path, sync_directory=False, sha256=False, direct=self._direct, folder=self._folder) as file:
            for piece in pieces:
                file.write(piece)
        return dataclasses.replace(record, index=index)


def _refuse_unlisted(
    rows: RowRange, coord_WR: NDArray[np.float32], residual_W: NDArray[np.float32], failed: list[FailedRow]
) -> None:
    """Refuse a value that is not finite in a row that is not listed as failed: it would be committed as damage."""
    is_finite_W = np.isfinite(coord_WR).all(axis=1) & np.isfinite(residual_W)
    is_finite_W[[each.row - rows.start for each in failed]] = True
    if not is_finite_W.all():
        row = rows.start + int(np.argmin(is_finite_W))
        raise RowError(
            f"row {row} has a coordinate or residual that is not finite, but the embedder did not report it as failed",
            hint="this is a bug in the embedder, not in the prompt: please report it with the prompt and the model",
        )
