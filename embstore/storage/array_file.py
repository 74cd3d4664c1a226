"""Arrays to import: rows of a ``.npy`` file, of a folder of them, or of a Zarr array.

None of them is trusted. A ``.npy`` header is parsed, never evaluated, and the file is mapped. Nothing is unpickled.
"""

from __future__ import annotations

import bisect
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import HEADER_BYTES, ArrayHeader, decode_array_header
from embstore.core.errors import ArrayError, CorruptStoreError
from embstore.core.file_kinds import HEAD_BYTES, NPY, kind_of
from embstore.core.interfaces import GivenRows
from embstore.storage.array_rows import ArrayRows
from embstore.storage.prompt_folder import by_number
from embstore.storage.zarr_array import ZARR_DOCUMENTS, ZarrRows

# what numpy.save writes for an array of ml_dtypes.bfloat16. "|V2" could be any two bytes, and is refused
_BFLOAT16 = "<V2"


def open_array(path: str | Path) -> GivenRows:
    """The array at ``path``: a ``.npy`` file, a folder of them, or the folder of one Zarr array (version 2 or 3).

    Raises
    ------
    ArrayError
        There is no array, or it is not [N, D] of float16, bfloat16, float32 or float64.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return _NpyRows(path)
        has_zarr = any((path / name).exists() for name in ZARR_DOCUMENTS)
        return _NpyFolder(path) if not has_zarr and any(path.glob("*.npy")) else ZarrRows(path)
    except OSError as error:
        raise ArrayError(
            f"cannot read array {path}: {error.strerror or error}",
            hint="give a .npy file, a folder of them, or the folder of a Zarr array",
        ) from error


class _NpyRows(ArrayRows):
    """A mapped ``.npy`` file: its pages are the kernel's, not anonymous memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            header = _npy_header(path, file)
            self._is_bfloat16 = header.descr == _BFLOAT16
            stored = _dtype(path, "<u2" if self._is_bfloat16 else header.descr)
            super().__init__(path, header.shape, np.dtype(np.float32) if self._is_bfloat16 else stored)
            if header.is_fortran:
                raise ArrayError(
                    f"{path} is in Fortran order, which scatters each row over the file",
                    hint="save it as numpy.ascontiguousarray(rows)",
                )
            size, needed = os.fstat(file.fileno()).st_size, header.offset + stored.itemsize * math.prod(header.shape)
            if size != needed:
                raise ArrayError(
                    f"{path} has {size} bytes, but its header describes {needed}", hint="copy it again: it is truncated"
                )
            self._rows = np.memmap(file, dtype=stored, mode="r", offset=header.offset, shape=header.shape)
        self.held_bytes = 4 * self.dimension if self._is_bfloat16 else 0  # rows that are widened are not mapped

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """As ``GivenRows``: a view, or float32 of the same values as bfloat16."""
        rows: NDArray[Any] = self._rows[start:stop]
        if self._is_bfloat16:
            rows = rows.astype("<u4")
            rows <<= 16
            rows = rows.view("<f4")
        return rows


def _dtype(path: Path, descr: str) -> np.dtype[Any]:
    try:
        return np.dtype(descr)
    except TypeError:
        raise ArrayError(
            f"{path} contains {descr}, which numpy does not know", hint='numpy.save("rows.npy", rows) writes a plain array'
        ) from None


def _npy_header(path: Path, file: BinaryIO) -> ArrayHeader:
    """The header of a ``.npy`` file; anything else is refused by what it is."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ArrayError(
            f"{path} is a pipe or device: rows are read from any place in a file", hint="write it to a file first"
        )
    start = os.pread(file.fileno(), HEAD_BYTES, 0)
    kind = kind_of(start)
    if kind is not None and kind is not NPY:
        raise ArrayError(f"{path} is {kind.name}, not a .npy array", hint=kind.array.format(file=path))
    try:
        header = decode_array_header(start[:HEADER_BYTES], name=str(path), foreign=True)
    except CorruptStoreError as error:
        what = "save it without a structured type" if kind is NPY else "raw numbers have no shape"
        raise ArrayError(str(error), hint=f'{what}; numpy.save("rows.npy", rows) writes a plain array') from error
    if header.descr.endswith("O"):
        raise ArrayError(
            f"{path} is an array of Python objects, not a plain .npy array; they are pickled, and embstore never unpickles",
            hint='give rows of one length: numpy.save("rows.npy", numpy.stack(list(rows)).astype(numpy.float32))',
        )
    if header.descr[1] == "V" and header.descr != _BFLOAT16:
        raise ArrayError(
            f"{path} contains values of {header.descr[2:]} bytes whose type it does not name ({header.descr})",
            hint='if they are bfloat16: numpy.save("rows.npy", rows.view(ml_dtypes.bfloat16).astype(numpy.float32))',
        )
    return header


class _NpyFolder(ArrayRows):
    """The ``.npy`` files of a folder, one after the other: by name, numbers by their value (emb_2 before emb_10)."""

    def __init__(self, path: Path) -> None:
        names = sorted((each.name for each in path.glob("*.npy") if not each.name.startswith(".")), key=by_number)
        series = Counter(re.sub(r"\d+", "#", name) for name in names)
        if len(series) > 1 and max(series.values()) > 1:
            raise ArrayError(
                f"{path} contains files of several arrays: {', '.join(sorted(series)[:5])}", hint="give each its own folder"
            )
        parts = [_NpyRows(path / name) for name in names if not _is_empty(path / name)]
        if not parts:
            raise ArrayError(f"{path}: none of its {len(names)} .npy files has rows", hint="is it the right folder?")
        first = parts[0]
        for part in parts:
            if (part.dimension, part.dtype) != (first.dimension, first.dtype):
                raise ArrayError(
                    f"{path}: {part.name} has {part.dimension} columns of {part.dtype}, "
                    f"{first.name} has {first.dimension} of {first.dtype}",
                    hint="the files of one array have the same columns and type; move the others away",
                )
        rows = sum(part.num_rows for part in parts)
        super().__init__(path, (rows, first.dimension), np.dtype(first.dtype))
        self._parts = parts
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)]).tolist()
        self.held_bytes = first.dimension * np.dtype(self.dtype).itemsize  # rows across two files are not mapped

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """As ``GivenRows``: a view where the rows lie in one file."""
        found = []
        for position in range(bisect.bisect_right(self._starts, start) - 1, len(self._parts)):
            begin = self._starts[position]
            if begin >= stop:
                break
            found.append(
                self._parts[position].read(max(start - begin, 0), min(stop - begin, self._parts[position].num_rows))
            )
        return found[0] if len(found) == 1 else np.concatenate(found)


def _is_empty(path: Path) -> bool:
    """Whether a file is an array without rows, as some writers end with."""
    with path.open("rb") as file:
        shape = _npy_header(path, file).shape
    return len(shape) == 2 and shape[0] == 0
