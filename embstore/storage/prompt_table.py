"""The canonical prompts of a store, read by row."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.files import open_regular, pread_all, read_blocks, storage_errors
from embstore.core.format import FileDigest
from embstore.core.prompts import Prompt, decode_row
from embstore.core.rows import RowRange

_SHORTEST_ROW_BYTES = len(b'{"id": "", "prompt": ""}\n')
_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 4096
# how ``encode_row`` begins a line whose id needs no escapes
_PLAIN_ID = re.compile(rb'\{"id": "([^"\\\x00-\x1f]*)", ')


class PromptTable:
    """Random access to the canonical rows of ``prompts.jsonl``: 8 bytes a row in memory; texts are read on demand.

    Memory depends on the line ends that the file really has, not on what a spec claims.
    """

    def __init__(
        self,
        path: Path,
        num_rows: int,
        digest: FileDigest | None = None,
        *,
        offsets: NDArray[np.int64] | None = None,
        seen: Callable[[int], None] = lambda count: None,
    ) -> None:
        """``offsets`` are those of another table of the same file, which then need not be read.

        ``seen`` is called with the number of bytes read since the last call.
        """
        self._path = path
        with storage_errors("reading", path):
            try:
                self.offsets = _row_offsets(path, num_rows, digest, seen) if offsets is None else offsets
            except FileNotFoundError:
                raise CorruptStoreError(f"{path} is missing", hint="run embstore verify STORE") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in row order, one in memory at a time, and the lines of a MiB."""
        for line in self._all_lines():
            yield decode_row(line)

    def ids(self) -> Iterator[str]:
        """Ids of all rows, in row order. Price: under a microsecond each, because the rest of a line is not decoded."""
        for line in self._all_lines():
            found = _PLAIN_ID.match(line)
            try:
                plain = found[1].decode() if found is not None else None
            except UnicodeDecodeError:
                plain = None  # decode_row says what is wrong with the line
            yield plain if plain is not None else str(decode_row(line).id)

    def each(self, rows: Iterable[int]) -> Iterator[Prompt]:
        """Prompts of single rows, in the order given, one in memory at a time."""
        with self._opened() as handle:
            for row in rows:
                yield decode_row(self._bytes(handle, RowRange(row, row + 1)))

    def blocks(self, max_bytes: int = _BLOCK_BYTES, max_rows: int = _BLOCK_ROWS) -> Iterator[RowRange]:
        """All rows, in ranges whose lines take at most ``max_bytes``; a longer line is a range alone."""
        start = 0
        while start < len(self):
            fitting = int(np.searchsorted(self.offsets, self.offsets[start] + max_bytes, side="right")) - 1
            stop = min(max(fitting, start + 1), start + max_rows)
            yield RowRange(start, stop)
            start = stop

    def read(self, rows: RowRange) -> list[Prompt]:
        """Prompts of a row range, in order."""
        with self._opened() as handle:
            return [decode_row(line) for line in self._bytes(handle, rows).splitlines(keepends=True)]

    def lines(self, rows: RowRange) -> list[bytes]:
        """Canonical lines of a row range, in order, as ``encode_row`` wrote them."""
        with self._opened() as handle:
            return self._bytes(handle, rows).splitlines(keepends=True)

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""
        return list(self.each(rows))

    def _all_lines(self) -> Iterator[bytes]:
        with self._opened() as handle:
            for rows in self.blocks():
                yield from self._bytes(handle, rows).splitlines(keepends=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        with storage_errors("reading", self._path):
            handle = open_regular(self._path.parent, self._path.name)
            try:
                yield handle
            finally:
                os.close(handle)

    def _bytes(self, handle: int, rows: RowRange) -> bytes:
        start, stop = int(self.offsets[rows.start]), int(self.offsets[rows.stop])
        with storage_errors("reading", self._path):
            return pread_all(handle, stop - start, start)


def _row_offsets(path: Path, num_rows: int, digest: FileDigest | None, seen: Callable[[int], None]) -> NDArray[np.int64]:
    """Start of each row of ``prompts.jsonl``, and the end of the last; the same read compares the digest."""
    total = hashlib.sha256()
    ends: list[NDArray[np.int64]] = []
    found, size, last = 0, 0, 0
    is_sound = True
    for block in read_blocks(path.parent, path.name):
        seen(len(block))
        characters = np.frombuffer(block, dtype=np.uint8)
        if digest is not None:
            total.update(block)
        ends.append(np.flatnonzero(characters == ord("\n")) + size + 1)
        found, size = found + len(ends[-1]), size + len(block)
        # JSON never contains a zero byte, and every hole of a sparse file returns zero bytes
        is_sound = found <= num_rows and b"\0" not in block and b"\r" not in block
        if len(ends[-1]):
            is_sound &= bool((np.diff(ends[-1], prepend=last) >= _SHORTEST_ROW_BYTES).all())
            last = int(ends[-1][-1])
        if not is_sound:
            break
    is_sound &= digest is None or total.hexdigest() == digest.sha256
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    if not is_sound or found != num_rows or last != size:
        raise CorruptStoreError(
            f"{path} does not contain the {num_rows} rows that the journal committed", hint="run embstore verify STORE"
        )
    return offsets
