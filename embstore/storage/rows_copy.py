"""``embeddings.npy`` in a store's folder: a float32 copy of the rows, for readers of the original scripts' files.

No manifest lists it and no reader of stores opens it: it may be written and deleted at any time. While it is there,
``embeddings_metadata.json`` is a file that describes the copy in the original's words, in place of the link to the metadata
of the weights (docs/decisions/0057).

Shapes: N rows, B rows of a chunk, V columns.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError, IdentityMismatchError, StorageError
from embstore.core.files import array_header, open_regular, pread_all, read_committed, reading_problem, storage_errors
from embstore.core.format import METADATA_LINK, ROWS_COPY, JsonObject, document, parse_document
from embstore.core.rows import slices
from embstore.storage.atomic import DurableFile
from embstore.storage.reader import EmbeddingStore

_DTYPE = np.dtype("<f4")
_COMPARED_VALUES = 4 << 20


Shape = tuple[int, int]  # of the rows: N, V


def copy_header(shape: Shape) -> bytes:
    """The header of a copy of rows of this shape."""
    return array_header(_DTYPE, shape)


def copy_bytes(shape: Shape) -> int:
    """Size of a copy of rows of this shape."""
    return len(copy_header(shape)) + shape[0] * shape[1] * _DTYPE.itemsize


def has_copy(root: Path, shape: Shape) -> bool:
    """Whether the folder has a file with the name, header and size of a copy; its rows are not read."""
    expected = copy_header(shape)
    with storage_errors("reading", root / ROWS_COPY):
        try:
            handle = open_regular(root, ROWS_COPY)
        except (FileNotFoundError, CorruptStoreError):
            return False
        try:
            has_size = os.fstat(handle).st_size == copy_bytes(shape)
            return has_size and pread_all(handle, len(expected), 0) == expected
        finally:
            os.close(handle)


def write_copy(store: EmbeddingStore) -> None:
    """Write the rows as float32 [N, V]; one chunk in memory at a time. The caller holds the store's lock."""
    with DurableFile(store.root / ROWS_COPY, sha256=False) as file:
        file.write(copy_header(shape_of(store)))
        for _, emb_BV in store.iter_rows():
            for part in _parts(emb_BV):
                file.write(emb_BV[part].astype(_DTYPE).data.cast("B"))


class CopyCheck:
    """Compares a copy with the rows, which come chunk by chunk; ``problem`` is the first difference, None so far."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.problem: str | None = None
        self._root, self._start = root, len(copy_header(shape))

    def compare(self, first: int, emb_BV: NDArray[np.float16]) -> None:
        """Compare the rows from ``first`` on. After a difference nothing more is read."""
        if self.problem is not None:
            return
        try:
            handle = open_regular(self._root, ROWS_COPY)
            try:
                unlike = self._unlike_row(handle, first, emb_BV)
            finally:
                os.close(handle)
            self.problem = f"differs from the rows of this store in row {unlike}" if unlike is not None else None
        except CorruptStoreError as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = reading_problem(self._root, ROWS_COPY, error)

    def _unlike_row(self, handle: int, first: int, emb_BV: NDArray[np.float16]) -> int | None:
        width: int = emb_BV.shape[1] * _DTYPE.itemsize
        for part in _parts(emb_BV):
            row: int = first + part.start
            expected = emb_BV[part].astype(_DTYPE).tobytes()
            data = pread_all(handle, len(expected), self._start + row * width)
            if data != expected:
                return row + _first_difference(data, expected) // width
        return None


def copy_problem(store: EmbeddingStore) -> str | None:
    """What a copy that is there has other than the store's rows, or None. Price: one read of both."""
    check = CopyCheck(store.root, shape_of(store))
    for rows, emb_BV in store.iter_rows():
        check.compare(rows.start, emb_BV)
    return check.problem


def shape_of(store: EmbeddingStore) -> Shape:
    """The shape of a store's rows."""
    return store.num_rows, store.spec.embedding.dimension


def in_original_words(metadata: JsonObject) -> JsonObject:
    """Metadata of weights as those of float32 rows, with the strings that the original scripts wrote."""
    return {**metadata, "embedding_dtype": "float32", "normalization": "L2 unit vectors"}


def describe_copy(root: Path, sidecar: str) -> bytes:
    """What ``embeddings_metadata.json`` contains next to a copy, if ``sidecar`` has the metadata of the default weights."""
    return document(in_original_words(parse_document(read_committed(root, sidecar), name=sidecar)))


def is_description(root: Path, sidecar: str) -> bool:
    """Whether ``embeddings_metadata.json`` is the description of a copy."""
    try:
        return read_committed(root, METADATA_LINK) == describe_copy(root, sidecar)
    except (CorruptStoreError, IdentityMismatchError):
        return False
    except StorageError as error:
        reading_problem(root, METADATA_LINK, error)
        return False


def _parts(emb_BV: NDArray[np.float16]) -> list[slice]:
    """Rows of a chunk that are converted at a time."""
    return list(slices(0, len(emb_BV), max(1, _COMPARED_VALUES // emb_BV.shape[1])))


def _first_difference(left: bytes, right: bytes) -> int:
    size = min(len(left), len(right))
    unlike = np.flatnonzero(np.frombuffer(left, np.uint8, size) != np.frombuffer(right, np.uint8, size))
    return int(unlike[0]) if len(unlike) else size
