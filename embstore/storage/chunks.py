"""Chunk files of the embedding array: float16 rows to the exact bytes Zarr v3 expects, and back.

Codecs: bytes (little endian), blosc lz4 with bitshuffle unless ``--compressor none``, crc32c last. Blosc runs in contextual
mode only: with its own threads it returned different bytes for equal input (docs/decisions/0004). The edge chunk is padded
with NaN to full shape, as Zarr stores it, so unwritten rows can never read as plausible zeros.
"""

from __future__ import annotations

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.format import chunk_name
from embstore.core.records import ChunkRecord

numcodecs.blosc.use_threads = False

_BLOSC = numcodecs.blosc.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.blosc.BITSHUFFLE, blocksize=0, typesize=2)
_TRAILER_BYTES = 4


def crc32c(data: bytes | memoryview) -> str:
    """CRC-32C (Castagnoli) as 8 hex digits; 5 to 7 GB/s, so checks are bound by the disk."""
    # the extension takes bytes and arrays, but no memoryview
    return f"{google_crc32c.value(np.frombuffer(data, dtype=np.uint8)):08x}"


def encode_chunk(
    emb_BV: NDArray[np.float16], *, chunk_rows: int, compressor: str
) -> tuple[list[bytes | memoryview], ChunkRecord]:
    """Encode rows of one chunk; returns the pieces to write, in order, and their record (index still 0).

    Price: one compressed copy of the chunk (about 0.74 of it); uncompressed rows are not copied at all.
    """
    rows = np.ascontiguousarray(emb_BV, dtype="<f2")
    if len(rows) < chunk_rows:
        padded = np.full((chunk_rows, rows.shape[1]), np.nan, dtype="<f2")
        padded[: len(rows)] = rows
        rows = padded
    raw = rows.data.cast("B")
    body = memoryview(_BLOSC.encode(rows.reshape(-1))) if compressor == "lz4" else raw
    crc = crc32c(body)
    record = ChunkRecord(index=0, bytes=body.nbytes + _TRAILER_BYTES, crc32c=crc)
    return [body, bytes.fromhex(crc)[::-1]], record


def check_chunk(data: bytes, record: ChunkRecord) -> None:
    """Compare a chunk file's bytes with what was committed: size, trailer and checksum of the body.

    Raises
    ------
    CorruptStoreError
        Names the file and both values.
    """
    name = chunk_name(record.index)
    hint = "run embstore verify STORE --repair, then embstore build --resume"
    if len(data) != record.bytes:
        raise CorruptStoreError(f"{name} has {len(data)} bytes, committed were {record.bytes}", hint=hint)
    found = crc32c(memoryview(data)[:-_TRAILER_BYTES])
    trailer = f"{int.from_bytes(data[-_TRAILER_BYTES:], 'little'):08x}"
    if found != record.crc32c or trailer != record.crc32c:
        raise CorruptStoreError(f"{name} has crc32c {found} (trailer {trailer}), committed was {record.crc32c}", hint=hint)


def decode_chunk(data: bytes, *, chunk_rows: int, dimension: int, compressor: str) -> NDArray[np.float16]:
    """Rows of a checked chunk file, float16 [chunk_rows, V], padding rows included."""
    body = memoryview(data)[:-_TRAILER_BYTES]
    raw = _BLOSC.decode(body) if compressor == "lz4" else body
    return np.frombuffer(raw, dtype="<f2").reshape(chunk_rows, dimension)
