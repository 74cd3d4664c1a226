"""One read of every file that a store lists, apart from chunks and row files, for ``verify``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from embstore.core.decode import HEADER_BYTES, ArrayHeader, decode_array_header
from embstore.core.errors import CorruptStoreError
from embstore.core.files import file_problem, read_if_present
from embstore.core.format import ARRAY_METADATA, CHUNKS, DOCUMENT_BYTES, SPEC, TABLE_BYTES, FileDigest, range_problem

_FLOAT = np.dtype("<f4")
_DOCUMENTS = {SPEC: DOCUMENT_BYTES, ARRAY_METADATA: DOCUMENT_BYTES, CHUNKS: TABLE_BYTES}  # follow from other files


class ListedFiles:
    """How files differ from their digests, and what is looked at afterwards in those that do not.

    ``problems`` has a sentence for each file that differs, ``contents`` the documents that follow from other files,
    ``values`` those of ``weights``, which are names of arrays. ``advance`` is called with the number of bytes read since the
    last call.
    """

    def __init__(
        self, root: Path, digests: Mapping[str, FileDigest], weights: Collection[str], advance: Callable[[int], None]
    ) -> None:
        self._root, self._digests = root, digests
        self.problems: dict[str, str] = {}
        self.contents: dict[str, bytes] = {}
        self.values: dict[str, WeightValues] = {}
        for name, digest in digests.items():
            if (problem := self._read(name, digest, name in weights, advance)) is not None:
                self.problems[name] = problem

    def differs(self, name: str, expected: bytes) -> bool:
        """Whether a document is not the one that follows from the rest of the store; damage counts in ``problems`` alone."""
        if name in self._digests:
            return self.contents.get(name, expected) != expected
        try:
            return read_if_present(self._root, name, limit=len(expected)) != expected
        except CorruptStoreError:
            return True

    def _read(self, name: str, digest: FileDigest, is_weights: bool, advance: Callable[[int], None]) -> str | None:
        limit = _DOCUMENTS.get(name)
        if limit is not None and digest.bytes > limit:
            return f"has {digest.bytes} bytes, more than the limit of {limit}"
        blocks: list[bytes] = []
        values = WeightValues(name, digest.bytes)

        def seen(block: bytes) -> None:
            advance(len(block))
            if limit is not None:
                blocks.append(block)
            if is_weights:
                values.add(block)

        problem = file_problem(self._root, name, digest, seen=seen)
        if problem is None and limit is not None:
            self.contents[name] = b"".join(blocks)
        if problem is None and is_weights:
            self.values[name] = values
        return problem


class WeightValues:
    """Range and sum of the float32 values in a file of weights, of blocks that are read in order."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._header: ArrayHeader | None = None
        self._problem: str | None = None
        self._low, self._high, self._total = np.inf, -np.inf, 0.0
        self._left = b""  # of a value whose end is in the next block

    def add(self, block: bytes) -> None:
        """Take the next block; the first has the header."""
        if self._header is None and self._problem is None:
            try:
                self._header = decode_array_header(block[:HEADER_BYTES], name=self._name)
            except CorruptStoreError as error:
                self._problem = str(error)
            block = block[self._header.offset :] if self._header is not None else b""
        if self._header is None or self._header.descr != _FLOAT.str:
            return
        data = self._left + block if self._left else block
        whole = len(data) // _FLOAT.itemsize * _FLOAT.itemsize
        values = np.frombuffer(data[:whole], dtype=_FLOAT)
        self._left = data[whole:]
        if len(values):
            with np.errstate(invalid="ignore"):
                self._low = float(np.minimum(self._low, values.min()))  # keeps a NaN
                self._high = float(np.maximum(self._high, values.max()))
                self._total += float(values.sum(dtype=np.float64))

    def problem(self, num_rows: int) -> str | None:
        """Why these cannot be the weights of so many rows, or None."""
        if self._header is None:
            return self._problem or "is empty"
        found = (self._header.descr, self._header.shape, self._header.offset + num_rows * _FLOAT.itemsize)
        if found != (_FLOAT.str, (num_rows,), self._size):
            return f"contains {found[0]} of shape {found[1]} in {self._size} bytes, expected {num_rows} float32 values"
        return range_problem(self._low, self._high, self._total)
