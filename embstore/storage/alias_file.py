"""``aliases.json``: ids are looked up in passes over its lines, and none is kept."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from embstore.core.decode import parse_json, printable, shown
from embstore.core.errors import ConfigError, CorruptStoreError
from embstore.core.files import check_content, committed_blocks
from embstore.core.format import ALIASES, FileDigest

_SHOWN = 10


class AliasFile:
    """Rows of the input ids and row ids of a store; the file is compared with its digest once, before the first look."""

    def __init__(self, root: Path, num_rows: int, digest: FileDigest | None) -> None:
        self._root, self._num_rows = root, num_rows
        self._unchecked = digest

    def rows_of(self, ids: Sequence[str]) -> list[int]:
        """Row of each id, by one pass.

        Raises
        ------
        ConfigError
            No prompt has one of the ids.
        CorruptStoreError
            The file is not as committed, or gives an id a row that the store does not have.
        """
        rows: dict[bytes, int] = {}
        names = [json.dumps(prompt_id, ensure_ascii=False).encode() for prompt_id in ids]
        wanted = frozenset(names)
        for name, row in self._items():
            if name in wanted:
                rows[name] = int(row) if row.isdigit() else -1
        for prompt_id, name in zip(ids, names, strict=True):
            if name not in rows:
                raise self._unknown(prompt_id)
            if not 0 <= rows[name] < self._num_rows:
                raise CorruptStoreError(
                    f"{ALIASES} maps an id to none of {self._num_rows} rows", hint=f"run embstore verify {self._root}"
                )
        return [rows[name] for name in names]

    def _items(self) -> Iterator[tuple[bytes, bytes]]:
        """Name and row of every id, as JSON; stage 0 writes one of them per line."""
        if self._unchecked is not None:
            check_content(self._root, ALIASES, committed_blocks(self._root, ALIASES), self._unchecked)
            self._unchecked = None
        rest = b""
        for block in committed_blocks(self._root, ALIASES):
            for line in io.BytesIO(rest + block):
                rest = b"" if line.endswith(b"\n") else line  # it goes on in the next block
                name, colon, row = line.rstrip(b",\n").rpartition(b": ")
                if colon and not rest:
                    yield name, row

    def _unknown(self, prompt_id: str) -> ConfigError:
        """The refusal of an id, with some that there are: those like it, or the first."""
        count, first, like = 0, list[bytes](), list[bytes]()
        within = json.dumps(prompt_id.lower(), ensure_ascii=False).encode()[1:-1]
        for name, _ in self._items():
            count += 1
            if len(first) < _SHOWN:
                first.append(name)
            if within and len(like) < _SHOWN and within in name.decode(errors="replace").lower().encode():
                like.append(name)
        such_as = ", ".join(printable(str(parse_json(name, name=ALIASES))) for name in like or first)
        return ConfigError(
            f"no prompt has the id {shown(prompt_id)}; the store has {count:,} ids, such as {such_as}",
            hint=f"all ids are in {self._root / ALIASES}",
        )
