"""Stage 0: the prompts file becomes canonical rows, ids, a line map and a fingerprint, durable before any row is computed.

``storage.placing`` says which row each line is. Price: one pass over the source and one over a spool of the distinct rows
(derived ids must avoid the explicit ids, which are known only at the end). Nothing in memory grows with the number of rows:
indexes that outgrow their share of the memory budget go on in files, everything else is written as it comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import (
    CURRENT_RULE,
    DEFAULT_MEMORY_BYTES,
    USUAL_FIELDS,
    WHOLE,
    DatasetChoice,
    PromptFields,
    PromptRule,
)
from embstore.core.decode import shown
from embstore.core.errors import ConfigError, PromptError
from embstore.core.events import Notice, Observer, ignore, stage
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
from embstore.core.prompts import Prompt, decode_row, encode_row
from embstore.core.records import PromptsRecord
from embstore.host.scratch import large_array
from embstore.storage.atomic import DurableFile, save_array
from embstore.storage.key_index import BATCH_KEYS, KeyIndex, batches, text_keys
from embstore.storage.placing import Counts, Placing
from embstore.storage.prompt_source import PromptSource, open_source

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Spools:
    """Scratch files of one ingest, written in the first pass and read in the second.

    ``rows``: the distinct prompts. ``aliases``: ids that are not their row's own, as JSON pairs. ``lines``: the row of each
    line, int64. ``keys``: the first 8 bytes of each row's digest.
    """

    rows: BinaryIO
    aliases: BinaryIO
    lines: BinaryIO
    keys: BinaryIO


@contextlib.contextmanager
def _spools(folder: Path) -> Iterator[_Spools]:
    paths = [folder / f"{field.name}.spool" for field in dataclasses.fields(_Spools)]
    try:
        with storage_errors("writing to", folder), contextlib.ExitStack() as closing:
            yield _Spools(*(closing.enter_context(path.open("wb+")) for path in paths))
    finally:
        for path in paths:
            with storage_errors("removing", path):
                path.unlink(missing_ok=True)


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
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
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
    memory_bytes
        The memory budget; indexes take up to a quarter of it.
    choice, observer
        As for ``prompt_source.open_records``.

    Raises
    ------
    PromptError
        The file is unreadable or has no prompts, a line is bad under ``strict``, or one explicit id has two texts.
    """
    with _spools(spool_folder) as spools:
        with (
            stage(observer, "prompts", unit="lines") as advance,
            DurableFile(folder / QUARANTINE, sync_directory=False) as quarantine,
            open_source(source, fields, rule, choice, scratch=spool_folder, observer=observer) as prompts,
        ):
            placing = Placing(
                source,
                prompts,
                limit=limit,
                folder=spool_folder,
                memory_bytes=memory_bytes,
                observer=observer,
                advance=advance,
            )
            _write_spools(placing, spools, quarantine)
            refuse_unusable(placing.counts, source, fields, strict=strict)
            tell_undecoded(placing.counts, source, observer)
        with stage(observer, "rows", placing.counts.rows, "rows") as advance:
            record = _write_files(placing, spools, folder, spool_folder, rule, advance)
    record.files[QUARANTINE] = quarantine.digest
    return replace(record, fields=fields)


def _write_spools(placing: Placing, spools: _Spools, quarantine: DurableFile) -> None:
    for number, line in enumerate(placing, start=1):
        spools.lines.write(line.row.to_bytes(8, "little", signed=True))
        if line.reason is not None:
            quarantine.write(json.dumps({"line": number, "reason": line.reason}).encode() + b"\n")
        elif line.is_new:
            spools.rows.write(line.encoded)
            spools.keys.write(line.digest[:8])
        elif line.names:
            spools.aliases.write(_pair(str(line.id), line.row) + b"\n")


_NAMED = 3
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


def refuse_unusable(counts: Counts, source: PromptSource, fields: PromptFields, *, strict: bool) -> None:
    """Refuse a source without a prompt, or with a line without one under ``strict``.

    Raises
    ------
    ConfigError
        No line has one of the fields that were named.
    PromptError
    """
    name = name_of(source)
    named = [each for each in (fields.text, fields.messages) if each is not None]
    if named and set(counts.reasons) == {"no prompt"} and not counts.rows:
        there = counts.first_quarantined[0][1].partition("; ")[2]
        raise ConfigError(
            f"no line of {name} has a field {' or '.join(map(shown, named))}: {there} in the first one",
            hint="name one that has prompts: --text-field NAME if they are texts, --messages-field NAME if they are chats",
        )
    first = "; ".join(
        f"{where.removesuffix(f' of {name}')}: {reason}" for where, reason in counts.first_quarantined[:_NAMED]
    )
    if not counts.rows:
        seen = f"none of its {counts.lines} lines is usable ({first})" if counts.lines else "the file is empty"
        raise PromptError(f"no prompts in {name}: {seen}", hint=_first_hint(counts))
    if strict and counts.quarantined:
        raise PromptError(
            f"{counts.quarantined} of {counts.lines} lines of {name} have no prompt ({first})",
            hint="correct them, or build without --strict: they are then listed in quarantine.jsonl and skipped",
        )


def tell_undecoded(counts: Counts, source: PromptSource, observer: Observer) -> None:
    """Warn where most prompts seem to be JSON that was not decoded."""
    if 2 * counts.undecoded > counts.rows:
        message = f"{counts.undecoded:,} of {counts.rows:,} prompts of {name_of(source)} {_UNDECODED}"
        observer(Notice(message=message, is_warning=True))


def name_of(source: PromptSource) -> str:
    """What the source is called in messages."""
    return str(source) if isinstance(source, str | Path) else source.name


def _first_hint(counts: Counts) -> str:
    reason = counts.first_quarantined[0][1] if counts.first_quarantined else ""
    hint = next((hint for beginning, hint in _HINTS.items() if reason.startswith(beginning)), _LINES)
    if counts.lines == 1 and hint is _OTHER_FIELDS:
        hint += "; if NAME is a list of them, jq -c '.NAME[]' FILE makes lines"
    return hint


def _write_files(
    placing: Placing, spools: _Spools, folder: Path, work: Path, rule: PromptRule, advance: Callable[[int], None]
) -> PromptsRecord:
    """The second pass: every row gets its id, and all files but the list of quarantined lines are written."""
    counts = placing.counts
    fingerprint = hashlib.sha256()
    with (
        DurableFile(folder / PROMPTS, sync_directory=False) as prompts_file,
        DurableFile(folder / PROMPTS_LIST, sync_directory=False) as texts_file,
        DurableFile(folder / IDS, sync_directory=False) as ids_file,
        DurableFile(folder / ALIASES, sync_directory=False) as aliases_file,
    ):
        texts, ids, aliases = _Items(texts_file, b"[]"), _Items(ids_file, b"[]"), _Items(aliases_file, b"{}")
        spools.rows.seek(0)
        for row, (prompt, line) in enumerate(_with_ids(spools.rows, placing.ids)):
            prompts_file.write(line)
            texts.add(_json(prompt.rendered))
            ids.add(_json(str(prompt.id)))
            aliases.add(_pair(str(prompt.id), row))
            _update_fingerprint(fingerprint, prompt)
            if (row + 1) % BATCH_KEYS == 0:
                advance(BATCH_KEYS)
        spools.aliases.seek(0)
        for pair in spools.aliases:
            aliases.add(pair.rstrip(b"\n"))
        for items in (texts, ids, aliases):
            items.close()
    written = {PROMPTS: prompts_file, PROMPTS_LIST: texts_file, IDS: ids_file, ALIASES: aliases_file}
    files = {name: file.digest for name, file in written.items()}
    files[LINE_ROWS] = _publish_spool(spools.lines, array_header(np.dtype("<i8"), (counts.lines,)), folder / LINE_ROWS)
    files[KEYS] = _publish_spool(spools.keys, array_header(np.dtype("<u8"), (counts.rows,)), folder / KEYS)
    files[MULTIPLICITY] = save_array(
        folder / MULTIPLICITY, _lines_of_rows(spools.lines, counts.rows, work), sync_directory=False
    )
    fsync_directory(folder)
    return counts.record(rule, fingerprint=fingerprint.hexdigest(), files=files)


class _Items:
    """A JSON array or object that is written item by item; it has at least one."""

    def __init__(self, file: DurableFile, brackets: bytes) -> None:
        self._file, self._closing = file, brackets[1:]
        self._before = brackets[:1] + b"\n"

    def add(self, item: bytes) -> None:
        """Append an item, as JSON."""
        self._file.write(self._before + item)
        self._before = b",\n"

    def close(self) -> None:
        """Write the closing bracket."""
        self._file.write(b"\n" + self._closing + b"\n")


def _with_ids(lines: BinaryIO, ids: KeyIndex) -> Iterator[tuple[Prompt, bytes]]:
    """Every row with its id, and its canonical line: the id that was given, else one derived from the text.

    A derived id that is taken gets the first free one of the endings -2, -3, ... ``ids`` has all given ids, and from here on
    the last ending of each id as its second number.
    """
    ids.fill(1)
    for batch in batches(lines, len):
        prompts = list(map(decode_row, batch))
        derived = iter(_unique_ids([prompt.derived_id for prompt in prompts if prompt.id is None], ids))
        for prompt, line in zip(prompts, batch, strict=True):
            if prompt.id is not None:
                yield prompt, line
                continue
            named = replace(prompt, id=next(derived))
            yield named, encode_row(named)


def _unique_ids(bases: Sequence[str], ids: KeyIndex) -> list[str]:
    """For each base the first of ``base``, ``base-2``, ``base-3``, ... that no row has, in order; they are taken then."""
    counts = Counter(bases)
    keys_B2 = text_keys(list(counts))
    known = dict(zip(counts, ids.find(keys_B2)[:, 0].tolist(), strict=True))
    ending = {base: max(0, number) for base, number in known.items()}
    free: dict[str, list[str]] = {base: [] for base in counts}
    short = list(counts)
    while short:
        tried = [
            (base, number)
            for base in short
            for number in range(ending[base] + 1, ending[base] + 1 + counts[base] - len(free[base]))
        ]
        names = [base if number == 1 else f"{base}-{number}" for base, number in tried]
        numbers = ids.find(text_keys(names))[:, 0].tolist()
        for (base, number), name, found in zip(tried, names, numbers, strict=True):
            ending[base] = number
            if found < 0:
                free[base].append(name)
        short = [base for base in short if len(free[base]) < counts[base]]
    added = [name for names in free.values() for name in names]
    if added:
        ids.add(text_keys(added), np.array([(ending.get(name, 1), 0) for name in added], dtype=np.int64))
    ids.change(keys_B2, np.array([(ending[base], 0) for base in counts], dtype=np.int64).reshape(-1, 2))
    unused = {base: iter(names) for base, names in free.items()}
    return [next(unused[base]) for base in bases]


def _lines_of_rows(lines: BinaryIO, num_rows: int, work: Path) -> NDArray[np.int32]:
    """How many lines each row has."""
    path = work / "multiplicity.scratch"
    multiplicity_N = large_array(path, (num_rows,), np.int32)
    with storage_errors("removing", path):
        path.unlink(missing_ok=True)  # the map keeps the file
    lines.seek(0)
    while block := lines.read(_READ_BYTES):
        rows = np.frombuffer(block, dtype="<i8")
        np.add.at(multiplicity_N, rows[rows >= 0], 1)
    return multiplicity_N


def _json(value: str) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _pair(name: str, row: int) -> bytes:
    return _json(name) + b": %d" % row


def _update_fingerprint(fingerprint: hashlib._Hash, prompt: Prompt) -> None:
    content = canonical_json(prompt.chat) if prompt.messages is not None else prompt.text or ""
    for part in (prompt.id or "", "messages" if prompt.messages is not None else "text", content):
        data = part.encode()
        fingerprint.update(len(data).to_bytes(8, "little") + data)


def _publish_spool(spool: BinaryIO, header: bytes, path: Path) -> FileDigest:
    spool.seek(0)
    with DurableFile(path, sync_directory=False) as file:
        file.write(header)
        while block := spool.read(_READ_BYTES):
            file.write(block)
    return file.digest
