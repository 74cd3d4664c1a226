"""A Zarr array to import, read by zarr: only if its codecs merely unpack numbers, and never as zeros where it is missing."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import format_bytes
from embstore.core.decode import parse_json, shown
from embstore.core.errors import ArrayError, CorruptStoreError
from embstore.core.format import DOCUMENT_BYTES
from embstore.storage.array_rows import ArrayRows

ZARR_DOCUMENTS = {"zarr.json": 3, ".zarray": 2}
# codecs that unpack numbers and do nothing else, by version of the format
_CODECS = {
    3: frozenset({"bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed"}),
    2: frozenset({"blosc", "zstd", "zlib", "gzip", "lz4", "lzma", "bz2", "shuffle"}),
}


class ZarrRows(ArrayRows):
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
        self._stored_chunks = self._array.shards or self._array.chunks
        self._row_step = int(self._stored_chunks[0])
        self._present: set[tuple[int, int]] = set()
        # reading one row decodes every chunk it crosses, some of them at the same time
        height = min(self._row_step, self.num_rows)
        self.held_bytes = 2 * height * self.dimension * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``, decoded from their chunks; a chunk that is not there is no chunk of zeros."""
        self._refuse_missing(start, stop)
        try:
            rows: NDArray[np.floating] = np.asarray(self._array[start:stop])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ArrayError(
                f"{self._path}: rows {start} to {stop - 1} cannot be read: {error}", hint="a chunk is damaged"
            ) from error
        return rows

    def _refuse_missing(self, start: int, stop: int) -> None:
        height, width = self._stored_chunks
        for place in itertools.product(range(start // height, -(-stop // height)), range(-(-self.dimension // width))):
            if place in self._present:
                continue
            key = self._array.metadata.encode_chunk_key(place)
            lacks = None if (self._path / key).is_file() else f"chunk {key}"
            if lacks is None and self._array.shards is not None:
                inner = _missing_inner_chunk(self._path / key, self._array, place)
                lacks = None if inner is None else f"chunk {inner} of shard {key}"
            if lacks is not None:
                last = min((place[0] + 1) * height, self.num_rows) - 1
                raise ArrayError(
                    f"{self._path} lacks {lacks} (rows {place[0] * height} to {last}); zarr reads "
                    f"{self._array.fill_value} there",
                    hint="copy or write the array again; if these values are meant, write it with "
                    'config={"write_empty_chunks": True}',
                )
            self._present.add(place)


def _missing_inner_chunk(path: Path, array: Any, place: tuple[int, ...]) -> str | None:  # noqa: ANN401 - zarr's
    """The first chunk of the array that the index of its shard lists as empty; None if there is none.

    The last or first bytes of a shard are a table of offset and length of each chunk, as uint64, then a crc32c
    (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html). Other indexes are not read.
    """
    codec = array.metadata.codecs[0].to_dict()
    settings = codec.get("configuration", {})
    if codec["name"] != "sharding_indexed" or [each["name"] for each in settings["index_codecs"]] != ["bytes", "crc32c"]:
        return None
    sizes = list(zip(array.shape, array.shards, array.chunks, place, strict=True))
    grid = tuple(outer // inner for _, outer, inner, _ in sizes)
    # what a shard has beyond the array's edges need not be there
    within = tuple(-(-min(outer, length - at * outer) // inner) for length, outer, inner, at in sizes)
    index_bytes = 16 * math.prod(grid) + 4
    with path.open("rb") as file:
        content_bytes = os.fstat(file.fileno()).st_size
        at_start = str(getattr(settings["index_location"], "value", settings["index_location"])) == "start"
        file.seek(0 if at_start else max(0, content_bytes - index_bytes))
        index = np.frombuffer(file.read(index_bytes)[:-4], dtype="<u8")
    if index.size != 2 * math.prod(grid):
        return None  # zarr says what is wrong with it
    offsets = index.reshape(*grid, 2)[..., 0][tuple(slice(count) for count in within)]
    empty = np.argwhere(offsets == np.iinfo(np.uint64).max)
    return None if not len(empty) else "/".join(str(each) for each in empty[0])


def _check_zarr(path: Path) -> None:
    """Refuse anything but an array, and codecs that could do more than unpack numbers."""
    for name, version in ZARR_DOCUMENTS.items():
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
    inside = sorted(each.parent.name for name in ZARR_DOCUMENTS for each in path.glob(f"*/{name}"))
    hint = f"give one array inside it: {path / inside[0]}" if inside else "give the folder with zarr.json or .zarray"
    raise ArrayError(f"{path} is a folder without a Zarr array and without .npy files", hint=hint)


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
