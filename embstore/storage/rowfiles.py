"""The two row files, ``coordinates.npy`` and ``residuals.npy``: full size from the start, written in place window by window.

Their shape and header follow from the spec alone, so a damaged header or a wrong length is mended without touching a row.
Values never written are NaN; a window's slice is checked against the crc32c in its commit.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np

from embstore.core.errors import CorruptStoreError
from embstore.core.format import COORDINATES, LARGEST_COORDINATE, RESIDUALS
from embstore.core.records import WindowRecord
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec
from embstore.storage.arrays import array_header
from embstore.storage.atomic import (
    DurableFile,
    open_regular,
    pread_all,
    pwrite_all,
    reading_problem,
    storage_errors,
    sync_data,
)
from embstore.storage.chunks import crc32c

ROW_FILES = (COORDINATES, RESIDUALS)

_FLOAT = np.dtype("<f4")
_READ_BYTES = 8 << 20
_NAN_BLOCK = np.full(1 << 20, np.nan, dtype=_FLOAT).data.cast("B")


def row_bytes(spec: StoreSpec, name: str) -> int:
    """Bytes of one row in the row file ``name``."""
    return _FLOAT.itemsize * (spec.embedding.rank if name == COORDINATES else 1)


def header(spec: StoreSpec, name: str) -> bytes:
    """The .npy header of the row file ``name``."""
    return array_header(_FLOAT, (spec.rows, spec.embedding.rank) if name == COORDINATES else (spec.rows,))


def preallocate(root: Path, spec: StoreSpec, name: str, *, sync_directory: bool = True) -> None:
    """A row file of full size, every value NaN: an unwritten row never reads as a plausible zero."""
    with DurableFile(root / name, sync_directory=sync_directory, sha256=False) as file:
        file.write(header(spec, name))
        remaining = spec.rows * row_bytes(spec, name)
        while remaining:
            count = min(remaining, len(_NAN_BLOCK))
            file.write(_NAN_BLOCK[:count])
            remaining -= count


def mend(root: Path, spec: StoreSpec, name: str) -> None:
    """Restore a row file's existence, header and length; rows that are there keep their bytes, rows cut off become NaN.

    A whole file is only synced: what a killed writer mended may lie in the page cache alone, and looks as whole as this.
    Only for an unfinished store: the rows that were lost are those of demoted windows.
    """
    path = root / name
    if not path.exists():
        preallocate(root, spec, name)
        return
    expected = header(spec, name)
    size = len(expected) + spec.rows * row_bytes(spec, name)
    with storage_errors("mending", path):
        handle = open_regular(root, name, os.O_RDWR)
        try:
            found = os.fstat(handle).st_size
            if found != size or os.pread(handle, len(expected), 0) != expected:
                os.ftruncate(handle, size)
                pwrite_all(handle, expected, 0)
                # the header is a multiple of 64 bytes, so values lie at multiples of 4
                start = max(len(expected), found // _FLOAT.itemsize * _FLOAT.itemsize)
                for offset in range(start, size, len(_NAN_BLOCK)):
                    pwrite_all(handle, _NAN_BLOCK[: size - offset], offset)
            sync_data(handle)
        finally:
            os.close(handle)


def header_problem(root: Path, spec: StoreSpec, name: str) -> str | None:
    """What is wrong with a row file apart from its rows, or None; None too when the file is missing."""
    expected = header(spec, name)
    size = len(expected) + spec.rows * row_bytes(spec, name)
    try:
        handle = open_regular(root, name)
        try:
            if os.pread(handle, len(expected), 0) != expected:
                return "has a header that does not describe the rows of spec.json"
            found = os.fstat(handle).st_size
        finally:
            os.close(handle)
    except FileNotFoundError:
        return None
    except CorruptStoreError as error:
        return str(error)
    except OSError as error:
        return reading_problem(root, name, error)
    return f"has {found} bytes, its rows take {size}" if found != size else None


def slice_problem(root: Path, spec: StoreSpec, name: str, record: WindowRecord) -> str | None:
    """How the slice of a committed window differs from its commit, or None; a few MiB of it are in memory at a time.

    Coordinates of unit rows, and distances to them, are numbers of at most 1 (and rounding), whatever their checksum.
    """
    width = row_bytes(spec, name)
    failed = {row.row for row in record.failed}
    crc, beyond = 0, None
    try:
        handle = open_regular(root, name)
        try:
            for rows in RowRange(record.start, record.stop).split(max(1, _READ_BYTES // width)):
                data = pread_all(handle, rows.num_rows * width, len(header(spec, name)) + rows.start * width)
                crc = google_crc32c.extend(crc, data)
                values_BR = np.frombuffer(data[: len(data) // width * width], dtype=_FLOAT).reshape(-1, width // 4)
                unlike = rows.start + np.flatnonzero(~(np.abs(values_BR) <= LARGEST_COORDINATE).all(axis=1))
                beyond = next((int(row) for row in unlike if int(row) not in failed), None) if beyond is None else beyond
        finally:
            os.close(handle)
        _check_crc(name, f"{crc:08x}", record)
    except CorruptStoreError as error:
        return str(error)
    except OSError as error:
        return reading_problem(root, name, error)
    return None if beyond is None else f"row {beyond} holds a value that is no number of at most {LARGEST_COORDINATE:g}"


def check_rows(name: str, data: bytes | memoryview, record: WindowRecord) -> None:
    """Compare a window's slice of coordinates or residuals with its commit; a difference is a CorruptStoreError."""
    _check_crc(name, crc32c(data), record)


def _check_crc(name: str, found: str, record: WindowRecord) -> None:
    expected = record.coordinates_crc32c if name == COORDINATES else record.residuals_crc32c
    if found != expected:
        raise CorruptStoreError(
            f"{name}, rows {record.start} to {record.stop - 1}: crc32c {found}, committed was {expected}",
            hint="run embstore verify STORE --repair, then embstore build --resume",
        )
