"""Arrays to import: rows of a ``.npy`` file or of a Zarr array, and the names of those rows.

Neither file is trusted. A ``.npy`` header is parsed, never evaluated, and the file is mapped; a Zarr array is opened only if
all its codecs merely unpack numbers. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import PromptRule, format_bytes
from embstore.core.decode import HEADER_BYTES, decode_array_header, parse_json, shown
from embstore.core.errors import ArrayError, CorruptStoreError, PromptError
from embstore.core.format import DOCUMENT_BYTES, MAX_COLUMNS, MAX_ROWS, canonical_json
from embstore.core.interfaces import GivenRows
from embstore.core.prompts import Prompt, Rejected, named_row, parse_named_row
from embstore.core.rows import slices
from embstore.storage.prompt_source import MAX_LINE_BYTES, open_prompts

_BLOCK_BYTES = 16 << 20
_LIST_BYTES = 256 << 20
_FLOATS = {2: "float16", 4: "float32", 8: "float64"}
# codecs that unpack numbers and do nothing else, by version of the format
_CODECS = {
    3: frozenset({"bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed"}),
    2: frozenset({"blosc", "zstd", "zlib", "gzip", "lz4", "lzma", "bz2", "shuffle"}),
}


def open_array(path: str | Path) -> GivenRows:
    """The array at ``path``: a ``.npy`` file (version 1.0, C order), or the folder of one Zarr array (version 2 or 3).

    Raises
    ------
    ArrayError
        There is no array, or it is not [N, D] of float16, float32 or float64.
    """
    path = Path(path)
    try:
        return _ZarrRows(path) if path.is_dir() else _NpyRows(path)
    except OSError as error:
        raise ArrayError(
            f"cannot read array {path}: {error.strerror or error}", hint="give a .npy file or the folder of a Zarr array"
        ) from error


class _Rows:
    """What both kinds of array share: shape, and the digest of all values."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if len(shape) != 2 or not (0 < shape[0] <= MAX_ROWS and 0 < shape[1] <= MAX_COLUMNS):
            raise ArrayError(
                f"{path} has shape {shape}, expected [N, D] with N up to {MAX_ROWS} and D up to {MAX_COLUMNS}",
                hint="save it with two dimensions and one row per prompt",
            )
        if dtype.kind != "f" or dtype.itemsize not in _FLOATS:
            raise ArrayError(
                f"{path} contains {dtype}, expected float16, float32 or float64", hint="save it as one of these"
            )
        self._path = path
        self._row_step = 1
        self.num_rows, self.dimension = shape
        self.dtype = _FLOATS[dtype.itemsize]
        self.held_bytes = 0

    @property
    def name(self) -> str:
        """The name of the file or folder, without its path."""
        return self._path.absolute().name

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """As ``GivenRows``; equal for a ``.npy`` file and a Zarr array of equal values, in any byte order."""
        total = hashlib.sha256(canonical_json([self.num_rows, self.dimension, self.dtype]).encode())
        step = max(1, _BLOCK_BYTES // (self.dimension * np.dtype(self.dtype).itemsize))
        step = -(-step // self._row_step) * self._row_step  # whole chunks of a Zarr array
        little = np.dtype(self.dtype).newbyteorder("<")
        for part in slices(0, self.num_rows, step):
            block = self.read(part.start, part.stop)
            total.update(np.ascontiguousarray(block, dtype=little).data.cast("B"))
        return total.hexdigest()


class _NpyRows(_Rows):
    """A mapped ``.npy`` file: its pages are the kernel's, not anonymous memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                header = decode_array_header(os.pread(file.fileno(), HEADER_BYTES, 0), name=str(path))
            except CorruptStoreError as error:
                raise ArrayError(str(error), hint="numpy.save(FILE, rows) writes such a file") from error
            dtype = np.dtype(header.descr)
            super().__init__(path, header.shape, dtype)
            if header.is_fortran:
                raise ArrayError(
                    f"{path} is in Fortran order, which scatters each row over the file",
                    hint="save it as numpy.ascontiguousarray(rows)",
                )
            size, needed = os.fstat(file.fileno()).st_size, header.offset + dtype.itemsize * math.prod(header.shape)
            if size != needed:
                raise ArrayError(
                    f"{path} has {size} bytes, but its header describes {needed}", hint="copy it again: it is truncated"
                )
            self._rows = np.memmap(file, dtype=dtype, mode="r", offset=header.offset, shape=header.shape)

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """As ``GivenRows``: a view."""
        return self._rows[start:stop]


class _ZarrRows(_Rows):
    """A Zarr array in a folder, read by zarr."""

    def __init__(self, path: Path) -> None:
        _check_zarr(path)
        import zarr  # noqa: PLC0415 - takes a moment to load, and most imports are of .npy files

        try:
            self._array: Any = zarr.open_array(path, mode="r")
            super().__init__(path, tuple(self._array.shape), np.dtype(self._array.dtype))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, ArrayError):
                raise
            raise ArrayError(f"zarr cannot open {path}: {error}", hint="is this a whole Zarr array?") from error
        self._row_step = int(self._array.chunks[0])
        # reading one row decodes every chunk it crosses, some of them at the same time
        height = min(self._row_step, self.num_rows)
        self.held_bytes = 2 * height * self.dimension * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``, decoded from their chunks."""
        try:
            rows: NDArray[np.floating] = np.asarray(self._array[start:stop])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ArrayError(
                f"{self._path}: rows {start} to {stop - 1} cannot be read: {error}", hint="a chunk is damaged"
            ) from error
        return rows


def _check_zarr(path: Path) -> None:
    """Refuse anything but an array, and codecs that could do more than unpack numbers."""
    for version, name in ((3, "zarr.json"), (2, ".zarray")):
        if not (path / name).is_file():
            continue
        with (path / name).open("rb") as file:
            content = file.read(DOCUMENT_BYTES + 1)
        try:
            if len(content) > DOCUMENT_BYTES:
                raise CorruptStoreError(f"{path / name} has more than {format_bytes(DOCUMENT_BYTES)}")
            metadata = parse_json(content, name=str(path / name))
        except CorruptStoreError as error:
            raise ArrayError(str(error), hint="is this a whole Zarr array?") from error
        if not isinstance(metadata, dict) or metadata.get("node_type", "array") != "array":
            raise ArrayError(f"{path} is a Zarr group, not an array", hint="give the folder of one array inside it")
        codecs = list(_codecs(metadata))
        foreign = next((codec for codec in codecs if codec not in _CODECS[version]), None)
        if foreign is not None or metadata.get("storage_transformers"):
            raise ArrayError(
                f"{path} uses {shown(foreign or 'storage transformers')}, which embstore does not run",
                hint=f"save it with one of {', '.join(sorted(_CODECS[version]))}",
            )
        return
    raise ArrayError(f"{path} is a folder without a Zarr array", hint="give the folder with zarr.json or .zarray")


def _codecs(value: object) -> Iterator[object]:
    """Names of all codecs in the metadata of an array of either version, those inside shards included."""
    if not isinstance(value, dict):
        yield value
        return
    for field in ("codecs", "index_codecs", "filters", "compressor"):
        found = value.get(field)
        for codec in found if isinstance(found, list) else [found] if found is not None else []:
            is_named = isinstance(codec, dict)
            yield codec.get("name", codec.get("id")) if is_named else codec
            if is_named and isinstance(codec.get("configuration"), dict):
                yield from _codecs(codec["configuration"])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIds:
    """Names of ``num_rows`` rows: from a file (text with one id per line, a JSON list, or JSONL), or the row numbers.

    A JSONL line may have a prompt in addition to its id, as for ``build``; a line without an id gets its row number.
    """

    path: Path | None
    num_rows: int

    @property
    def name(self) -> str:
        """The path of the file, for messages."""
        return str(self.path) if self.path is not None else "row numbers"

    def prompts(self, rule: PromptRule) -> Generator[Prompt, None, None]:
        """As ``RowNames``.

        Raises
        ------
        PromptError
            The file cannot be read, a line does not name a row, or the number of names differs from that of the rows.
        """
        if self.path is None:
            yield from (Prompt(id=str(row), text="") for row in range(self.num_rows))
            return
        count = 0
        for prompt in self._read(rule):
            if isinstance(prompt, Rejected):
                raise PromptError(
                    f"{self.path} line {count + 1} does not name a row: {prompt.reason}",
                    hint="every row of the array needs an id; correct the line",
                )
            if count < self.num_rows:
                yield prompt if prompt.id is not None else dataclasses.replace(prompt, id=str(count))
            count += 1
        if count != self.num_rows:
            raise PromptError(
                f"{self.path} names {count} rows, the array has {self.num_rows}", hint="give one id for each row, in order"
            )

    def _read(self, rule: PromptRule) -> Iterator[Prompt | Rejected]:
        if self.path is None:
            raise AssertionError("row numbers need no file")
        with open_prompts(self.path) as lines:
            first = next(lines, None)
            if first is None:
                return
            opening = first.lstrip()[:1]
            if opening == b"[":
                yield from self._list(first, lines)
                return
            parse = functools.partial(parse_named_row, rule=rule) if opening in (b"{", b'"') else _text_id
            for line in itertools.chain([first], lines):
                yield parse(line) if len(line) <= MAX_LINE_BYTES else Rejected(reason=f"longer than {MAX_LINE_BYTES} bytes")

    def _list(self, first: bytes, lines: Iterator[bytes]) -> Iterator[Prompt | Rejected]:
        content = bytearray(first)
        for line in lines:
            content += line
            if len(content) > _LIST_BYTES:
                raise PromptError(
                    f"{self.path} is a JSON list of more than {format_bytes(_LIST_BYTES)}",
                    hint="give one id per line: such a file is read line by line",
                )
        try:
            ids = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"{self.path} is not a JSON list of ids: {str(error)[:80]}", hint="give one id per line"
            ) from error
        yield from (named_row(value) for value in ids)


def _text_id(line: bytes) -> Prompt | Rejected:
    try:
        return named_row(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Rejected(reason=f"not UTF-8 (byte {error.start})")
