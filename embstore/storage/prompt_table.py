"""Stage 0: the prompts file becomes canonical rows, ids, a line map and a fingerprint, durable before any row is computed.

Invariant: every input line is either a row (first occurrence), a repeat of a row, or quarantined with its reason; rows are
numbered only after quarantine, so bad input never shifts one. Price: one pass over the source plus one over a spool of the
distinct rows (ids can only be given when all explicit ids are known); memory about 250 bytes a row, texts never held, and
nothing for lines that are no new row: a small gzip file can hold billions of them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import USUAL_FIELDS, PromptFields
from embstore.core.errors import CorruptStoreError, PromptError
from embstore.core.format import (
    ALIASES,
    IDS,
    KEYS,
    LINE_ROWS,
    MULTIPLICITY,
    PROMPTS,
    PROMPTS_LIST,
    QUARANTINE,
    FileDigest,
    canonical_json,
)
from embstore.core.prompts import Prompt, Rejected, decode_row, encode_row, parse_line
from embstore.core.records import PromptsRecord
from embstore.core.rows import RowRange
from embstore.storage.arrays import array_header, save_array
from embstore.storage.atomic import DurableFile, fsync_directory, open_regular, pread_all, read_blocks, storage_errors
from embstore.storage.parquet_source import is_table, table_lines

# A longer "line" is taken for a file that is no JSONL; reading stays bounded in memory.
MAX_LINE_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_SPOOL = "rows.spool"
_LINES_SPOOL = "lines.spool"  # the row of each line, 8 bytes little endian
_READ_BYTES = 1 << 20
_SHORTEST_ROW_BYTES = len(b'{"id": "", "prompt": ""}\n')


class RowNames(Protocol):
    """What names the rows of an array, in its order: each gives one row, told apart by id."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    def prompts(self) -> Generator[Prompt, None, None]:
        """One prompt a row, each with an id; raises where a row has none, or where there are not as many as rows."""


PromptSource = str | Path | RowNames


@contextlib.contextmanager
def open_prompts(source: str | Path) -> Iterator[Iterator[bytes]]:
    """Lines of a prompts file: JSONL, gzip by content, ``-`` for standard input, or a table (see storage.tables).

    Raises
    ------
    PromptError
        The file is missing, unreadable, or its gzip stream is damaged.
    """
    with contextlib.ExitStack() as stack:
        if str(source) == "-":
            raw: BinaryIO = sys.stdin.buffer
        elif is_table(Path(source)):
            yield table_lines(Path(source))
            return
        else:
            try:
                raw = stack.enter_context(Path(source).open("rb"))
            except (OSError, ValueError) as error:  # a path may hold a zero byte
                reason = error.strerror if isinstance(error, OSError) else error
                raise PromptError(
                    f"cannot read prompts {source}: {reason}", hint="give a JSONL or Parquet file, one prompt a line"
                ) from error
        buffered = io.BufferedReader(raw) if not isinstance(raw, io.BufferedReader) else raw  # type: ignore[type-var]
        stream: BinaryIO = buffered
        if buffered.peek(2)[:2] == _GZIP_MAGIC:
            stream = stack.enter_context(gzip.GzipFile(fileobj=buffered))  # type: ignore[assignment]
        yield _lines(stream, str(source))


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    first = True
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                # swallow the rest piecewise; the caller sees one over-long line
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_LINE_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise PromptError(f"reading prompts {name} failed: {error}", hint="the file is damaged or truncated") from error
        if not line:
            return
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False


@dataclass(kw_only=True, slots=True)
class _Rows:
    """What one pass over the source collects; lists are indexed by row."""

    digests: dict[bytes, int] = field(default_factory=dict)
    explicit: dict[str, int] = field(default_factory=dict)  # explicit id -> row
    explicit_line: dict[str, int] = field(default_factory=dict)
    row_ids: list[str | None] = field(default_factory=list)
    multiplicity: list[int] = field(default_factory=list)
    lines: int = 0
    quarantined: int = 0
    first_quarantined: list[str] = field(default_factory=list)


def ingest(
    source: PromptSource,
    folder: Path,
    spool_folder: Path,
    *,
    strict: bool,
    limit: int | None,
    fields: PromptFields = USUAL_FIELDS,
) -> PromptsRecord:
    """Write stage 0 of ``source`` into ``folder``; durable, but committed only by the record the caller journals.

    Parameters
    ----------
    source
        Path of a JSONL file (gzip allowed), of a table, or ``-``; or the names of an array's rows.
    folder, spool_folder
        Where the files go, and where the scratch file may lie.
    strict
        Refuse the file if any line holds no prompt.
    limit
        Stop after this many distinct rows; None reads everything.
    fields
        Names of the fields that hold a prompt, where they are not the usual ones.

    Raises
    ------
    PromptError
        Unreadable file, no prompt at all, a bad line under ``strict``, or one explicit id with two texts.
    """
    spools = spool_folder / _SPOOL, spool_folder / _LINES_SPOOL
    rows = _Rows()
    try:
        with DurableFile(folder / QUARANTINE, sync_directory=False) as quarantine:
            with (
                storage_errors("writing to", spool_folder),
                spools[0].open("wb") as row_spool,
                spools[1].open("wb") as line_spool,
                _open_source(source, fields) as prompts,
            ):
                for prompt in prompts:
                    rows.lines += 1
                    row, is_new = -1, False
                    if isinstance(prompt, Rejected):
                        _quarantine(rows, prompt.reason, quarantine)
                    elif isinstance(source, str | Path):
                        row, is_new = _place(rows, prompt, prompt.digest)
                    else:
                        row, is_new = _place_named(rows, prompt, source.name)
                    line_spool.write(row.to_bytes(8, "little", signed=True))
                    if is_new and isinstance(prompt, Prompt):
                        row_spool.write(encode_row(prompt))
                        if limit is not None and len(rows.row_ids) >= limit:
                            break
            _refuse_unusable(rows, str(source) if isinstance(source, str | Path) else source.name, strict=strict)
        return _write_files(rows, spools, folder, quarantine.digest)
    finally:
        for spool in spools:
            with storage_errors("removing", spool):
                spool.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_source(source: PromptSource, fields: PromptFields) -> Iterator[Iterator[Prompt | Rejected]]:
    if isinstance(source, str | Path):
        with open_prompts(source) as lines:
            yield (_read(line, fields) for line in lines)
    else:
        with contextlib.closing(source.prompts()) as prompts:
            yield prompts


def _quarantine(rows: _Rows, reason: str, file: DurableFile) -> None:
    file.write(json.dumps({"line": rows.lines, "reason": reason}).encode() + b"\n")
    rows.quarantined += 1
    if len(rows.first_quarantined) < 3:
        rows.first_quarantined.append(f"line {rows.lines}: {reason}")


def _read(line: bytes, fields: PromptFields) -> Prompt | Rejected:
    if len(line) > MAX_LINE_BYTES:
        return Rejected(reason=f"longer than {MAX_LINE_BYTES >> 20} MiB")
    return parse_line(line, fields)


def _place_named(rows: _Rows, prompt: Prompt, name: str) -> tuple[int, bool]:
    """A row of its own, whatever the text."""
    if prompt.id is None or prompt.id in rows.explicit:
        raise PromptError(
            f"{name}: id {prompt.id!r} names two rows, {rows.explicit[prompt.id or '']} and {len(rows.row_ids)}",
            hint="give each row of the array an id of its own",
        )
    return _place(rows, prompt, prompt.id_digest)


def _place(rows: _Rows, prompt: Prompt, digest: bytes) -> tuple[int, bool]:
    """The row of this prompt, new or repeated, and whether it is new."""
    line_number = rows.lines
    row = rows.digests.setdefault(digest, len(rows.row_ids))
    is_new = row == len(rows.row_ids)
    if is_new:
        rows.row_ids.append(prompt.id)
        rows.multiplicity.append(0)
    rows.multiplicity[row] += 1
    if prompt.id is not None:
        known = rows.explicit.setdefault(prompt.id, row)
        rows.explicit_line.setdefault(prompt.id, line_number)
        if known != row:
            raise PromptError(
                f"id {prompt.id!r} names two different prompts: line {rows.explicit_line[prompt.id]} and line {line_number}",
                hint="give one of them another id, or remove the ids: they are derived from the text then",
            )
    return row, is_new


def _refuse_unusable(rows: _Rows, source: str, *, strict: bool) -> None:
    first = "; ".join(rows.first_quarantined)
    if not rows.row_ids:
        seen = f"{rows.lines} lines, all unusable ({first})" if rows.lines else "the file is empty"
        raise PromptError(f"no prompts in {source}: {seen}", hint='each line must be JSON such as {"prompt": "..."}')
    if strict and rows.quarantined:
        raise PromptError(
            f"{rows.quarantined} of {rows.lines} lines of {source} hold no prompt ({first})",
            hint="mend them, or build without --strict: they are then listed in quarantine.jsonl and never a row",
        )


def _write_files(rows: _Rows, spools: tuple[Path, Path], folder: Path, quarantine: FileDigest) -> PromptsRecord:
    row_spool_path, line_spool_path = spools
    num_rows = len(rows.row_ids)
    taken = set(rows.explicit)
    aliases = dict(rows.explicit)
    fingerprint = hashlib.sha256()
    files: dict[str, FileDigest] = {QUARANTINE: quarantine}
    ids: list[str] = []
    next_suffix: dict[str, int] = {}
    with (
        storage_errors("reading", row_spool_path),
        row_spool_path.open("rb") as spool,
        DurableFile(folder / PROMPTS, sync_directory=False) as prompts_file,
        DurableFile(folder / PROMPTS_LIST, sync_directory=False) as texts_file,
    ):
        texts_file.write(b"[")
        for row, line in enumerate(spool):
            prompt = decode_row(line)
            row_id = prompt.id or _unique_id(prompt.derived_id, taken, next_suffix)
            aliases.setdefault(row_id, row)
            ids.append(row_id)
            canonical = encode_row(replace(prompt, id=row_id))
            prompts_file.write(canonical)
            texts_file.write((",\n" if row else "\n").encode() + json.dumps(prompt.rendered, ensure_ascii=False).encode())
            _update_fingerprint(fingerprint, replace(prompt, id=row_id))
        texts_file.write(b"\n]\n")
    files[PROMPTS], files[PROMPTS_LIST] = prompts_file.digest, texts_file.digest
    files[IDS] = _publish(folder / IDS, [_json_lines("[", (json.dumps(item, ensure_ascii=False) for item in ids), "]")])
    pairs = (f"{json.dumps(name, ensure_ascii=False)}: {row}" for name, row in sorted(aliases.items()))
    files[ALIASES] = _publish(folder / ALIASES, [_json_lines("{", pairs, "}")])
    keys = np.frombuffer(b"".join(digest[:8] for digest in rows.digests), dtype="<u8")
    files[LINE_ROWS] = _save_line_rows(line_spool_path, rows.lines, folder / LINE_ROWS)
    for name, array in ((MULTIPLICITY, np.asarray(rows.multiplicity, dtype="<i4")), (KEYS, keys)):
        files[name] = save_array(folder / name, array, sync_directory=False)
    fsync_directory(folder)
    return PromptsRecord(
        rows=num_rows,
        lines=rows.lines,
        quarantined=rows.quarantined,
        repeats=rows.lines - rows.quarantined - num_rows,
        fingerprint=fingerprint.hexdigest(),
        files=files,
    )


def _unique_id(base: str, taken: set[str], next_suffix: dict[str, int]) -> str:
    """``base``, or ``base-2``, ``base-3``, ... the first that no row has; linear over all rows that share ``base``."""
    candidate = base
    while candidate in taken:
        next_suffix[base] = next_suffix.get(base, 1) + 1
        candidate = f"{base}-{next_suffix[base]}"
    taken.add(candidate)
    return candidate


def _update_fingerprint(fingerprint: hashlib._Hash, prompt: Prompt) -> None:
    content = canonical_json(list(prompt.messages)) if prompt.messages is not None else prompt.text or ""
    for part in (prompt.id or "", "messages" if prompt.messages is not None else "text", content):
        data = part.encode()
        fingerprint.update(len(data).to_bytes(8, "little") + data)


def _json_lines(opening: str, items: Iterable[str], closing: str) -> bytes:
    body = ",\n".join(items)
    return f"{opening}\n{body}\n{closing}\n".encode()


def _publish(path: Path, parts: Iterable[bytes]) -> FileDigest:
    with DurableFile(path, sync_directory=False) as file:
        for part in parts:
            file.write(part)
    return file.digest


def _save_line_rows(spool_path: Path, lines: int, path: Path) -> FileDigest:
    with (
        storage_errors("reading", spool_path),
        spool_path.open("rb") as spool,
        DurableFile(path, sync_directory=False) as file,
    ):
        file.write(array_header(np.dtype("<i8"), (lines,)))
        while block := spool.read(_READ_BYTES):
            file.write(block)
    return file.digest


class PromptTable:
    """Random access to the canonical rows of ``prompts.jsonl``: 8 bytes a row in memory, texts read when asked for.

    What it allocates is bounded by the line ends that the file really has, never by what a spec claims.
    """

    def __init__(
        self, path: Path, num_rows: int, digest: FileDigest | None = None, *, offsets: NDArray[np.int64] | None = None
    ) -> None:
        """``offsets`` are those of another table of the file, which is then not read."""
        self._path = path
        with storage_errors("reading", path):
            try:
                self.offsets = _row_offsets(path, num_rows, digest) if offsets is None else offsets
            except FileNotFoundError:
                raise CorruptStoreError(f"{path} is missing", hint="run embstore verify STORE") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in row order, one in memory at a time."""
        with self._opened() as handle:
            for row in range(len(self)):
                yield decode_row(self._bytes(handle, RowRange(row, row + 1)))

    def read(self, rows: RowRange) -> list[Prompt]:
        """Prompts of a row range, in order."""
        with self._opened() as handle:
            return [decode_row(line) for line in self._bytes(handle, rows).splitlines(keepends=True)]

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""
        return [self.read(RowRange(row, row + 1))[0] for row in rows]

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


def _row_offsets(path: Path, num_rows: int, digest: FileDigest | None) -> NDArray[np.int64]:
    """Where each row of ``prompts.jsonl`` begins, and the end of the last; the one read also compares the digest."""
    total = hashlib.sha256()
    ends: list[NDArray[np.int64]] = []
    found, size = 0, 0
    is_sound = True
    for block in read_blocks(path.parent, path.name):
        characters = np.frombuffer(block, dtype=np.uint8)
        if digest is not None:
            total.update(block)
        ends.append(np.flatnonzero(characters == ord("\n")) + size + 1)
        found, size = found + len(ends[-1]), size + len(block)
        # JSON never holds a zero byte, and every hole of a sparse file gives one
        is_sound = found <= num_rows and b"\0" not in block and b"\r" not in block
        if not is_sound:
            break
    is_sound &= digest is None or total.hexdigest() == digest.sha256
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    if not is_sound or found != num_rows or offsets[-1] != size or (np.diff(offsets) < _SHORTEST_ROW_BYTES).any():
        raise CorruptStoreError(
            f"{path} does not hold the {num_rows} rows that the journal committed", hint="run embstore verify STORE"
        )
    return offsets
