"""The row files: ``coordinates.npy``, ``residuals.npy``, ``sequences.npy``.

Each has its full size from the start and is written in place, window by window. Shape and header follow from the spec alone,
so a damaged header or a wrong length is repaired without touching a row. Unwritten values are NaN, or 0 in
``sequences.npy``; a window's slice is checked against the crc32c in its commit.
``map_basis`` opens the array that says what the coordinates are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.files import (
    array_header,
    file_problem,
    map_array,
    open_regular,
    pread_all,
    reading_problem,
    storage_errors,
)
from embstore.core.format import (
    BASIS,
    COORDINATES,
    LARGEST_COORDINATE,
    RESIDUALS,
    SEQUENCES,
    FileDigest,
    basis_file,
)
from embstore.core.records import WindowRecord
from embstore.core.rows import RowRange
from embstore.core.spec import EmbeddingSpec, StoreSpec
from embstore.storage.atomic import DurableFile
from embstore.storage.chunks import crc32c

ROW_FILES = (COORDINATES, RESIDUALS, SEQUENCES)

_FLOAT, _DIGEST = np.dtype("<f4"), np.dtype("<u8")
_READ_BYTES = 8 << 20
_NAN_BLOCK = np.full(1 << 20, np.nan, dtype=_FLOAT).data.cast("B")
_ZERO_BLOCK = np.zeros(len(_NAN_BLOCK), dtype=np.uint8).data


def map_basis(root: Path, embedding: EmbeddingSpec) -> NDArray[np.float32]:
    """The basis [V, R] or coordinate map [M, R] of a store, float32; copy-on-write, because torch wraps no read-only array.

    Raises
    ------
    CorruptStoreError
        It is missing, or another array.
    """
    name = basis_file(embedding.basis)
    rows = embedding.dimension if name == BASIS else None  # M is the model's
    basis: NDArray[np.float32] = map_array(root, name, "<f4", (rows, embedding.rank), mode="c")
    return basis


def row_files(spec: StoreSpec) -> tuple[str, ...]:
    """The row files of a store, in the order in which a commit writes them."""
    return tuple(name for name in ROW_FILES if name != SEQUENCES or spec.sequences)


def row_bytes(spec: StoreSpec, name: str) -> int:
    """Bytes of one row in the row file ``name``."""
    return _dtype(name).itemsize * (spec.embedding.rank if name == COORDINATES else 1)


def header(spec: StoreSpec, name: str) -> bytes:
    """The .npy header of the row file ``name``."""
    return array_header(_dtype(name), (spec.rows, spec.embedding.rank) if name == COORDINATES else (spec.rows,))


def preallocate(root: Path, spec: StoreSpec, name: str, *, old: int | None = None) -> None:
    """Write a row file of full size that says of every row that it is unwritten: NaN cannot be a coordinate.

    ``old`` is the descriptor of a row file whose values are kept, as far as it reaches. The caller syncs the folder.
    """
    start, width = header(spec, name), _dtype(name).itemsize
    size = len(start) + spec.rows * row_bytes(spec, name)
    with DurableFile(root / name, sync_directory=False, sha256=False) as file:
        offset = file.write(start)
        while offset < size:
            kept = pread_all(old, min(_READ_BYTES, size - offset), offset) if old is not None else b""
            offset += file.write(kept[: len(kept) // width * width] or _unwritten(name)[: size - offset])


def repair(root: Path, spec: StoreSpec, name: str) -> bool:
    """Restore a row file's existence, header and length: rows that are left keep their bytes, the others become unwritten.

    True asks the caller to sync the folder: the file is made from scratch. Of one that was repaired in place, the next
    process could not tell whether it is on the disk or in the page cache alone. Only for an unfinished store: the rows that
    were lost are those of demoted windows.
    """
    if not os.path.lexists(root / name):
        preallocate(root, spec, name)
        return True
    with storage_errors("repairing", root / name):
        # for writing: a file that does not allow it ends the run before a window is computed
        handle = open_regular(root, name, os.O_RDWR)
        try:
            if header_problem(root, spec, name) is None:
                return False
            preallocate(root, spec, name, old=handle)
        finally:
            os.close(handle)
    return True


def header_problem(root: Path, spec: StoreSpec, name: str) -> str | None:
    """What is wrong with a row file apart from its rows, or None; a missing file is None, too."""
    expected = header(spec, name)
    size = len(expected) + spec.rows * row_bytes(spec, name)
    try:
        handle = open_regular(root, name)
        try:
            if os.pread(handle, len(expected), 0) != expected:
                return "has a header that does not match spec.json"
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


class RowFileCheck:
    """One read of a row file, window by window in row order: each slice against its commit, then the file as a whole.

    ``sealed`` is the digest that the manifest has of the file, None while there is no manifest. A few MiB are in memory at a
    time.
    """

    def __init__(self, root: Path, spec: StoreSpec, name: str, sealed: FileDigest | None = None) -> None:
        self.name = name
        self._root, self._spec, self._sealed = root, spec, sealed
        self._start, self._width = len(header(spec, name)), row_bytes(spec, name)
        self._total = hashlib.sha256()
        self._hashed = 0  # bytes from the start of the file that are in the digest

    def window_problem(self, record: WindowRecord) -> str | None:
        """How the slice of a window differs from its commit, or None.

        Coordinates of unit rows, and distances to them, are at most 1 (plus rounding), whatever their checksum says; any
        number may stand for a sequence.
        """
        failed = {row.row for row in record.failed}
        crc, beyond = 0, None
        try:
            for rows, data in self._blocks(record):
                crc = google_crc32c.extend(crc, data)
                if self.name == SEQUENCES:
                    continue
                values_BR = np.frombuffer(data[: len(data) // self._width * self._width], dtype=_FLOAT)
                values_BR = values_BR.reshape(-1, self._width // _FLOAT.itemsize)
                unlike = rows.start + np.flatnonzero(~(np.abs(values_BR) <= LARGEST_COORDINATE).all(axis=1))
                beyond = next((int(row) for row in unlike if int(row) not in failed), None) if beyond is None else beyond
            _check_crc(self.name, f"{crc:08x}", record)
        except CorruptStoreError as error:
            return str(error)
        except OSError as error:
            return reading_problem(self._root, self.name, error)
        return None if beyond is None else f"row {beyond} has a value beyond {LARGEST_COORDINATE:g} or NaN"

    def problem(self) -> str | None:
        """How the whole file differs from its digest, or None. It is read again only to say what differs."""
        if self._sealed is None:
            return None
        is_read = self._hashed == self._sealed.bytes and self._total.hexdigest() == self._sealed.sha256
        if is_read and header_problem(self._root, self._spec, self.name) is None:
            return None
        return file_problem(self._root, self.name, self._sealed)

    def _blocks(self, record: WindowRecord) -> Iterator[tuple[RowRange, bytes]]:
        handle = open_regular(self._root, self.name)
        try:
            if self._sealed is not None and self._hashed == 0:
                self._add(0, pread_all(handle, self._start, 0))
            for rows in RowRange(record.start, record.stop).split(max(1, _READ_BYTES // self._width)):
                offset = self._start + rows.start * self._width
                data = pread_all(handle, rows.num_rows * self._width, offset)
                self._add(offset, data)
                yield rows, data
        finally:
            os.close(handle)

    def _add(self, offset: int, data: bytes) -> None:
        if self._sealed is not None and offset == self._hashed:  # where a window is missing, the digest stops
            self._total.update(data)
            self._hashed += len(data)


def check_rows(name: str, data: bytes | memoryview, record: WindowRecord) -> None:
    """Compare a window's slice of a row file with its commit; a difference is a CorruptStoreError."""
    _check_crc(name, crc32c(data), record)


def _check_crc(name: str, found: str, record: WindowRecord) -> None:
    expected = {
        COORDINATES: record.coordinates_crc32c,
        RESIDUALS: record.residuals_crc32c,
        SEQUENCES: record.sequences_crc32c,
    }[name]
    if found != expected:
        raise CorruptStoreError(
            f"{name}, rows {record.start} to {record.stop - 1}: crc32c {found}, but committed was {expected}",
            hint="run embstore verify STORE --repair, then embstore build --resume",
        )


def _dtype(name: str) -> np.dtype[np.generic]:
    return _DIGEST if name == SEQUENCES else _FLOAT


def _unwritten(name: str) -> memoryview:
    """A few MiB of what an unwritten row holds."""
    return _ZERO_BLOCK if name == SEQUENCES else _NAN_BLOCK
