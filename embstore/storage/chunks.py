"""Chunk files of the embedding array: float16 rows to the exact bytes Zarr v3 expects, and back.

Codecs: bytes (little endian), blosc lz4 with bitshuffle unless ``--compressor none``, crc32c last. Blosc runs in contextual
mode only: with its own threads it returned different bytes for equal input (docs/decisions/0004). The edge chunk is padded
with NaN to full shape, as Zarr stores it, so unwritten rows can never read as plausible zeros.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.files import open_regular, read_all, storage_errors
from embstore.core.format import chunk_name
from embstore.core.records import ChunkRecord
from embstore.core.spec import StoreSpec

numcodecs.blosc.use_threads = False

_BLOSC = numcodecs.blosc.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.blosc.BITSHUFFLE, blocksize=0, typesize=2)
Encoded = tuple[list[bytes | memoryview], ChunkRecord]

_TRAILER_BYTES = 4
_BLOSC_HEADER_BYTES = 16  # also the most by which blosc makes a buffer larger
_REPAIR = "run embstore verify STORE --repair, then embstore build --resume"


def crc32c(data: bytes | memoryview) -> str:
    """CRC-32C (Castagnoli) as 8 hex digits; 5 to 7 GB/s, so checks are bound by the disk."""
    # the extension accepts bytes and arrays, but not memoryviews
    return f"{google_crc32c.value(np.frombuffer(data, dtype=np.uint8)):08x}"


def encode_chunk(emb_BV: NDArray[np.float16], *, chunk_rows: int, compressor: str) -> Encoded:
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


def read_chunk(root: Path, spec: StoreSpec, record: ChunkRecord) -> bytes:
    """Bytes of a chunk file as they were committed; a size that is impossible under this spec is refused unread.

    Raises
    ------
    CorruptStoreError
        The file is missing, is not a regular file, or differs from its record in size or checksum.
    """
    name = chunk_name(record.index)
    most = 2 * spec.chunk_rows * spec.embedding.dimension + _BLOSC_HEADER_BYTES + _TRAILER_BYTES
    if record.bytes > most:
        raise CorruptStoreError(f"{name}: the journal says {record.bytes} bytes, a chunk has at most {most}", hint=_REPAIR)
    with storage_errors("reading", root / name):
        try:
            handle = open_regular(root, name)
        except FileNotFoundError:
            raise CorruptStoreError(f"{name} is missing", hint=_REPAIR) from None
        try:
            if (size := os.fstat(handle).st_size) != record.bytes:
                raise CorruptStoreError(f"{name} has {size} bytes, but {record.bytes} were committed", hint=_REPAIR)
            data = read_all(handle, name, record.bytes)
        finally:
            os.close(handle)
    check_chunk(data, record)
    return data


def prefetch_chunk(root: Path, index: int) -> None:
    """Ask the kernel to start reading a chunk file that will probably be needed soon; failures are ignored."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with contextlib.suppress(OSError, CorruptStoreError):
        handle = open_regular(root, chunk_name(index))
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def check_chunk(data: bytes, record: ChunkRecord) -> None:
    """Compare a chunk file's bytes with what was committed: size, trailer and checksum of the body.

    Raises
    ------
    CorruptStoreError
        Names the file and both values.
    """
    name = chunk_name(record.index)
    if len(data) != record.bytes:
        raise CorruptStoreError(f"{name} has {len(data)} bytes, but {record.bytes} were committed", hint=_REPAIR)
    found = crc32c(memoryview(data)[:-_TRAILER_BYTES])
    trailer = f"{int.from_bytes(data[-_TRAILER_BYTES:], 'little'):08x}"
    if found != record.crc32c or trailer != record.crc32c:
        raise CorruptStoreError(
            f"{name} has crc32c {found} (trailer {trailer}), but committed was {record.crc32c}", hint=_REPAIR
        )


def decode_chunk(data: bytes, spec: StoreSpec, index: int, *, out: NDArray[np.float16] | None = None) -> NDArray[np.float16]:
    """Rows of a checked chunk file, float16 [chunk_rows, V], padding rows included.

    Compressed rows are decoded into ``out``, contiguous and of that shape, if given: fresh memory costs more than decoding.

    Raises
    ------
    CorruptStoreError
        The body is not a chunk of this spec, whatever its checksum: sizes are compared before anything is allocated.
    """
    body = memoryview(data)[:-_TRAILER_BYTES]
    size = 2 * spec.chunk_rows * spec.embedding.dimension
    name = chunk_name(index)
    if spec.compressor == "lz4":
        header = bytes(body[:_BLOSC_HEADER_BYTES])
        claimed = tuple(int.from_bytes(header[start : start + 4], "little") for start in (4, 12))
        if len(header) < _BLOSC_HEADER_BYTES or header[3] != 2 or claimed != (size, len(body)):
            raise CorruptStoreError(f"{name} is not a blosc frame of {size} bytes in {len(body)}", hint=_REPAIR)
        try:
            body = memoryview(_BLOSC.decode(body, out=out)).cast("B")
        except RuntimeError as error:
            raise CorruptStoreError(f"{name} cannot be decoded ({error})", hint=_REPAIR) from error
    if len(body) != size:
        raise CorruptStoreError(f"{name} contains {len(body)} bytes of rows, not {size}", hint=_REPAIR)
    return np.frombuffer(body, dtype="<f2").reshape(spec.chunk_rows, spec.embedding.dimension)
