"""The two row files, ``coordinates.npy`` and ``residuals.npy``: full size from the start, written in place window by window.

Their shape and header follow from the spec alone, so a damaged header or a wrong length is mended without touching a row.
Values never written are NaN; a window's slice is checked against the crc32c in its commit.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from embstore.core.errors import CorruptStoreError
from embstore.core.format import COORDINATES, RESIDUALS, StoreSpec
from embstore.core.records import WindowRecord
from embstore.storage.atomic import DurableFile, pwrite_all, storage_errors, sync_data
from embstore.storage.chunks import crc32c
from embstore.storage.prompts import array_header

ROW_FILES = (COORDINATES, RESIDUALS)

_FLOAT = np.dtype("<f4")
_NAN_BLOCK = np.full(1 << 20, np.nan, dtype=_FLOAT).data.cast("B")


def row_bytes(spec: StoreSpec, name: str) -> int:
    """Bytes of one row in the row file ``name``."""
    return _FLOAT.itemsize * (spec.embedding.rank if name == COORDINATES else 1)


def header(spec: StoreSpec, name: str) -> bytes:
    """The .npy header of the row file ``name``."""
    return array_header(_FLOAT, (spec.rows, spec.embedding.rank) if name == COORDINATES else (spec.rows,))


def preallocate(root: Path, spec: StoreSpec, name: str) -> None:
    """A row file of full size, every value NaN: an unwritten row never reads as a plausible zero."""
    with DurableFile(root / name, sha256=False) as file:
        file.write(header(spec, name))
        remaining = spec.rows * row_bytes(spec, name)
        while remaining:
            count = min(remaining, len(_NAN_BLOCK))
            file.write(_NAN_BLOCK[:count])
            remaining -= count


def mend(root: Path, spec: StoreSpec, name: str) -> None:
    """Restore a row file's existence, header and length; rows that are there keep their bytes, rows cut off become NaN.

    A whole file is only looked at. Only for an unfinished store: the rows that were lost are those of demoted windows.
    """
    path = root / name
    if not path.exists():
        preallocate(root, spec, name)
        return
    expected = header(spec, name)
    size = len(expected) + spec.rows * row_bytes(spec, name)
    with storage_errors("mending", path):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(handle).st_size
            if found == size and os.pread(handle, len(expected), 0) == expected:
                return
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
        with (root / name).open("rb") as file:
            if file.read(len(expected)) != expected:
                return "has a header that does not describe the rows of spec.json"
            found = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"has {found} bytes, its rows take {size}" if found != size else None


def slice_problem(root: Path, spec: StoreSpec, name: str, record: WindowRecord) -> str | None:
    """How the slice of a committed window differs from its commit, or None."""
    width = row_bytes(spec, name)
    try:
        with (root / name).open("rb") as file:
            file.seek(len(header(spec, name)) + record.start * width)
            check_rows(name, file.read((record.stop - record.start) * width), record)
    except FileNotFoundError:
        return "is missing"
    except (OSError, CorruptStoreError) as error:
        return str(error)
    return None


def check_rows(name: str, data: bytes, record: WindowRecord) -> None:
    """Compare a window's slice of coordinates or residuals with its commit; a difference is a CorruptStoreError."""
    expected = record.coordinates_crc32c if name == COORDINATES else record.residuals_crc32c
    found = crc32c(data)
    if found != expected:
        raise CorruptStoreError(
            f"{name}, rows {record.start} to {record.stop - 1}: crc32c {found}, committed was {expected}",
            hint="run embstore verify STORE --repair, then embstore build --resume",
        )
