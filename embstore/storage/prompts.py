"""Stage 0: the prompts file becomes canonical rows, ids, a line map and a fingerprint, durable before any row is computed.

Invariant: every input line is either a row (first occurrence), a repeat of a row, or quarantined with its reason; rows are
numbered only after quarantine, so bad input never shifts one. Price: one pass over the source plus one over a spool of the
distinct rows (ids can only be given when all explicit ids are known); memory about 250 bytes a row, texts never held.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

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
from embstore.storage.atomic import DurableFile, fsync_directory, storage_errors

# A longer "line" is taken for a file that is no JSONL; reading stays bounded in memory.
MAX_LINE_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_SPOOL = "rows.spool"


@contextlib.contextmanager
def open_prompts(source: str | Path) -> Iterator[Iterator[bytes]]:
    """Lines of a prompts file: JSONL, gzip by content, or ``-`` for standard input.

    Raises
    ------
    PromptError
        The file is missing, unreadable, or its gzip stream is damaged.
    """
    with contextlib.ExitStack() as stack:
        if str(source) == "-":
            raw: BinaryIO = sys.stdin.buffer
        else:
            try:
                raw = stack.enter_context(Path(source).open("rb"))
            except OSError as error:
                raise PromptError(
                    f"cannot read prompts {source}: {error.strerror}", hint="give a JSONL file, one prompt a line"
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
    line_rows: list[int] = field(default_factory=list)
    quarantined: list[tuple[int, str]] = field(default_factory=list)


def ingest(source: str | Path, folder: Path, spool_folder: Path, *, strict: bool, limit: int | None) -> PromptsRecord:
    """Write stage 0 of ``source`` into ``folder``; durable, but committed only by the record the caller journals.

    Parameters
    ----------
    source
        Path of a JSONL file (gzip allowed), or ``-``.
    folder, spool_folder
        Where the files go, and where the scratch file may lie.
    strict
        Refuse the file if any line holds no prompt.
    limit
        Stop after this many distinct rows; None reads everything.

    Raises
    ------
    PromptError
        Unreadable file, no prompt at all, a bad line under ``strict``, or one explicit id with two texts.
    """
    spool_path = spool_folder / _SPOOL
    rows = _Rows()
    try:
        with storage_errors("writing", spool_path), spool_path.open("wb") as spool, open_prompts(source) as lines:
            for line_number, line in enumerate(lines, start=1):
                prompt = _read(line)
                if isinstance(prompt, Rejected):
                    rows.quarantined.append((line_number, prompt.reason))
                    rows.line_rows.append(-1)
                    continue
                row, is_new = _place(rows, prompt, line_number)
                rows.line_rows.append(row)
                if is_new:
                    spool.write(encode_row(prompt))
                    if limit is not None and len(rows.row_ids) >= limit:
                        break
        _refuse_unusable(rows, str(source), strict=strict)
        return _write_files(rows, spool_path, folder)
    finally:
        with storage_errors("removing", spool_path):
            spool_path.unlink(missing_ok=True)


def _read(line: bytes) -> Prompt | Rejected:
    if len(line) > MAX_LINE_BYTES:
        return Rejected(reason=f"longer than {MAX_LINE_BYTES >> 20} MiB")
    return parse_line(line)


def _place(rows: _Rows, prompt: Prompt, line_number: int) -> tuple[int, bool]:
    """The row of this prompt, new or repeated, and whether it is new."""
    row = rows.digests.setdefault(prompt.digest, len(rows.row_ids))
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
    first = "; ".join(f"line {line}: {reason}" for line, reason in rows.quarantined[:3])
    if not rows.row_ids:
        seen = f"{len(rows.line_rows)} lines, all unusable ({first})" if rows.line_rows else "the file is empty"
        raise PromptError(f"no prompts in {source}: {seen}", hint='each line must be JSON such as {"prompt": "..."}')
    if strict and rows.quarantined:
        raise PromptError(
            f"{len(rows.quarantined)} of {len(rows.line_rows)} lines of {source} hold no prompt ({first})",
            hint="mend them, or build without --strict: they are then listed in quarantine.jsonl and never a row",
        )


def _write_files(rows: _Rows, spool_path: Path, folder: Path) -> PromptsRecord:
    num_rows = len(rows.row_ids)
    taken = set(rows.explicit)
    aliases = dict(rows.explicit)
    fingerprint = hashlib.sha256()
    files: dict[str, FileDigest] = {}
    ids: list[str] = []
    next_suffix: dict[str, int] = {}
    with (
        storage_errors("reading", spool_path),
        spool_path.open("rb") as spool,
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
    files[QUARANTINE] = _publish(
        folder / QUARANTINE,
        (json.dumps({"line": line, "reason": reason}).encode() + b"\n" for line, reason in rows.quarantined),
    )
    keys = np.frombuffer(b"".join(digest[:8] for digest in rows.digests), dtype="<u8")
    for name, array in (
        (LINE_ROWS, np.asarray(rows.line_rows, dtype="<i8")),
        (MULTIPLICITY, np.asarray(rows.multiplicity, dtype="<i4")),
        (KEYS, keys),
    ):
        files[name] = save_array(folder / name, array, sync_directory=False)
    fsync_directory(folder)
    return PromptsRecord(
        rows=num_rows,
        lines=len(rows.line_rows),
        quarantined=len(rows.quarantined),
        repeats=len(rows.line_rows) - len(rows.quarantined) - num_rows,
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


def save_array(path: Path, array: NDArray[np.generic], *, sync_directory: bool = True) -> FileDigest:
    """Publish an array as .npy (never pickled)."""
    with DurableFile(path, sync_directory=sync_directory) as file:
        file.write(array_header(array.dtype, array.shape))
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return file.digest


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The .npy header of a C-ordered array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()


class PromptTable:
    """Random access to the canonical rows of ``prompts.jsonl``: 8 bytes a row in memory, texts read when asked for."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self._path = path
        offsets = np.zeros(num_rows + 1, dtype=np.int64)
        with storage_errors("reading", path), path.open("rb") as file:
            row = 0
            for row, line in enumerate(file, start=1):
                if row > num_rows:
                    break
                offsets[row] = offsets[row - 1] + len(line)
        if row != num_rows:
            raise CorruptStoreError(
                f"{path} does not hold the {num_rows} rows that the journal committed", hint="run embstore verify STORE"
            )
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, rows: RowRange) -> list[Prompt]:
        """Prompts of a row range, in order."""
        start, stop = int(self._offsets[rows.start]), int(self._offsets[rows.stop])
        with storage_errors("reading", self._path), self._path.open("rb") as file:
            data = os.pread(file.fileno(), stop - start, start)
        return [decode_row(line) for line in data.splitlines()] if rows.num_rows else []

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""
        return [self.read(RowRange(row, row + 1))[0] for row in rows]
