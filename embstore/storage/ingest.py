"""Stage 0: the prompts file becomes canonical rows, ids, a line map and a fingerprint, durable before any row is computed.

Invariant: every input line is a row (its first occurrence), a repeat of a row, or quarantined with a reason. Rows are
numbered after quarantine, so a bad line never shifts a number. Price: one pass over the source and one over a spool of the
distinct rows (derived ids must avoid the explicit ids, which are known only at the end). Memory is about 250 bytes a row;
texts are not held, and lines that are not a new row cost nothing: a small gzip file can hold billions of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from embstore.core.config import CURRENT_RULE, USUAL_FIELDS, WHOLE, DatasetChoice, PromptFields, PromptRule
from embstore.core.errors import PromptError
from embstore.core.events import Notice, Observer, ignore
from embstore.core.files import array_header, fsync_directory, storage_errors
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
from embstore.core.prompts import Prompt, Rejected, decode_row, encode_row
from embstore.core.reasons import count_reason
from embstore.core.records import PromptsRecord
from embstore.storage.atomic import DurableFile, save_array
from embstore.storage.hub_dataset import HubDataset
from embstore.storage.prompt_source import Prompts, PromptSource, open_source

_SPOOL = "rows.spool"
_LINES_SPOOL = "lines.spool"  # the row of each line, 8 bytes little endian
_READ_BYTES = 1 << 20


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
    answered: int = 0
    undecoded: int = 0  # rows that are JSON text of a prompt
    reasons: dict[str, int] = field(default_factory=dict)  # quarantined lines by kind of reason
    first_quarantined: list[tuple[str, str]] = field(default_factory=list)  # where, and the reason


def ingest(
    source: PromptSource,
    folder: Path,
    spool_folder: Path,
    *,
    strict: bool,
    limit: int | None,
    fields: PromptFields = USUAL_FIELDS,
    rule: PromptRule = CURRENT_RULE,
    choice: DatasetChoice = WHOLE,
    observer: Observer = ignore,
) -> PromptsRecord:
    """Write stage 0 of ``source`` into ``folder``; durable, but committed only by the record the caller journals.

    Parameters
    ----------
    source
        Path of a file, a pipe, a folder, or ``-``; a dataset of the hub; or the names of an array's rows.
    folder, spool_folder
        Folders for the files and for scratch files.
    strict
        Refuse the file if any line has no prompt.
    limit
        Stop after this many distinct rows; None reads everything.
    fields
        Names of the prompt fields, if they are not the usual ones.
    rule
        How lines become prompts; a store keeps the rule that it began with.
    choice, observer
        As for ``prompt_source.open_records``.

    Raises
    ------
    PromptError
        The file is unreadable or has no prompts, a line is bad under ``strict``, or one explicit id has two texts.
    """
    spools = spool_folder / _SPOOL, spool_folder / _LINES_SPOOL
    rows = _Rows()
    try:
        with DurableFile(folder / QUARANTINE, sync_directory=False) as quarantine:
            with (
                storage_errors("writing to", spool_folder),
                spools[0].open("wb") as row_spool,
                spools[1].open("wb") as line_spool,
                open_source(source, fields, rule, choice, scratch=spool_folder, observer=observer) as prompts,
            ):
                for prompt in prompts:
                    rows.lines += 1
                    row, is_new = -1, False
                    if isinstance(prompt, Rejected):
                        _quarantine(rows, prompt.reason, quarantine, prompts)
                    elif isinstance(source, str | Path | HubDataset):
                        row, is_new = _place(rows, prompt, prompt.digest, prompts)
                    else:
                        row, is_new = _place_named(rows, prompt, source.name, prompts)
                    line_spool.write(row.to_bytes(8, "little", signed=True))
                    rows.answered += isinstance(prompt, Prompt) and prompt.is_answered
                    if is_new and isinstance(prompt, Prompt):
                        row_spool.write(encode_row(prompt))
                        rows.undecoded += prompt.undecoded() is not None
                        if limit is not None and len(rows.row_ids) >= limit:
                            break
            name = str(source) if isinstance(source, str | Path) else source.name
            _refuse_unusable(rows, name, strict=strict)
            if 2 * rows.undecoded > len(rows.row_ids):
                observer(
                    Notice(
                        message=f"{rows.undecoded:,} of {len(rows.row_ids):,} prompts of {name} {_UNDECODED}",
                        is_warning=True,
                    )
                )
        return replace(_write_files(rows, spools, folder, quarantine.digest, rule), fields=fields)
    finally:
        for spool in spools:
            with storage_errors("removing", spool):
                spool.unlink(missing_ok=True)


def _quarantine(rows: _Rows, reason: str, file: DurableFile, prompts: Prompts) -> None:
    file.write(json.dumps({"line": rows.lines, "reason": reason}).encode() + b"\n")
    rows.quarantined += 1
    count_reason(rows.reasons, reason)
    if len(rows.first_quarantined) < 3:
        rows.first_quarantined.append((prompts.where(rows.lines), reason))


def _place_named(rows: _Rows, prompt: Prompt, name: str, prompts: Prompts) -> tuple[int, bool]:
    """Place a named row of an array: always a new row, even if its text occurred before."""
    if prompt.id is None or prompt.id in rows.explicit:
        raise PromptError(
            f"{name}: id {prompt.id!r} names two rows, {rows.explicit[prompt.id or '']} and {len(rows.row_ids)}",
            hint="give each row of the array a different id",
        )
    return _place(rows, prompt, prompt.id_digest, prompts)


def _place(rows: _Rows, prompt: Prompt, digest: bytes, prompts: Prompts) -> tuple[int, bool]:
    """Row number of a prompt, new or repeated, and whether it is new."""
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
                f"id {prompt.id!r} names two different prompts: {prompts.where(rows.explicit_line[prompt.id])} and "
                f"{prompts.where(line_number)}",
                hint="give one of them another id; where ids are numbered per source, name a field that is unique with "
                "--id-field FIELD (a FIELD that no line has: ids are derived from the texts)",
            )
    return row, is_new


_LINES = """write one JSON object per line, such as {"prompt": "..."}"""
_UNDECODED = (
    "are JSON text in quotation marks, and are embedded with them: a column of a JSON type seems to have been written as "
    "text; decode it (json.loads), or write the file with datasets or pyarrow"
)
_OTHER_FIELDS = "name the field of the prompt: --text-field NAME if it is a text, --messages-field NAME if it is a chat"
_HINTS = {  # by the beginning of the first reason
    "no prompt: ": _OTHER_FIELDS,
    "not UTF-8": "convert the file, such as: iconv -f WINDOWS-1252 -t UTF-8 FILE > prompts.jsonl",
    "bytes that are not UTF-8": "convert the file, such as: iconv -f WINDOWS-1252 -t UTF-8 FILE > prompts.csv",
    "not JSON (": f"{_LINES}; of plain text, jq -Rc '{{prompt: .}}' FILE makes such lines",
    "not a JSON object but str": "jq -c '{prompt: .}' FILE makes objects, of an array jq -c '.[] | {prompt: .}' FILE",
    "not a JSON object but list": "jq -c '{messages: .}' FILE makes objects, of an array jq -c '.[] | {messages: .}' FILE",
}


def _refuse_unusable(rows: _Rows, source: str, *, strict: bool) -> None:
    first = "; ".join(f"{where.removesuffix(f' of {source}')}: {reason}" for where, reason in rows.first_quarantined)
    if not rows.row_ids:
        seen = f"none of its {rows.lines} lines is usable ({first})" if rows.lines else "the file is empty"
        raise PromptError(f"no prompts in {source}: {seen}", hint=_first_hint(rows))
    if strict and rows.quarantined:
        raise PromptError(
            f"{rows.quarantined} of {rows.lines} lines of {source} have no prompt ({first})",
            hint="correct them, or build without --strict: they are then listed in quarantine.jsonl and skipped",
        )


def _first_hint(rows: _Rows) -> str:
    reason = rows.first_quarantined[0][1] if rows.first_quarantined else ""
    hint = next((hint for beginning, hint in _HINTS.items() if reason.startswith(beginning)), _LINES)
    if rows.lines == 1 and hint is _OTHER_FIELDS:
        hint += "; if NAME is a list of them, jq -c '.NAME[]' FILE makes lines"
    return hint


def _write_files(
    rows: _Rows, spools: tuple[Path, Path], folder: Path, quarantine: FileDigest, rule: PromptRule
) -> PromptsRecord:
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
        rule=rule,
        answered=rows.answered,
        reasons=rows.reasons,
    )


def _unique_id(base: str, taken: set[str], next_suffix: dict[str, int]) -> str:
    """``base``, or the first free one of ``base-2``, ``base-3``, ...; linear in the number of rows that share ``base``."""
    candidate = base
    while candidate in taken:
        next_suffix[base] = next_suffix.get(base, 1) + 1
        candidate = f"{base}-{next_suffix[base]}"
    taken.add(candidate)
    return candidate


def _update_fingerprint(fingerprint: hashlib._Hash, prompt: Prompt) -> None:
    content = canonical_json(prompt.chat) if prompt.messages is not None else prompt.text or ""
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
