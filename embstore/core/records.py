"""Records of the journal and of the chunk table, and their lines on disk. Pure: bytes in, values out.

``replay`` folds a journal into the committed state; ``storage.journal`` makes lines durable.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from embstore.core.config import FIRST_RULE, USUAL_FIELDS, PromptFields, PromptRule
from embstore.core.decode import Crc32c, Sha256, from_json, parse_json, shown
from embstore.core.errors import CorruptStoreError
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    CHUNKS,
    COORDINATE_MAP,
    FORMAT_VERSION,
    JOURNAL_LINE_BYTES,
    MAX_CHUNKS,
    MAX_ROWS,
    SPEC,
    STAGE0_FILES,
    FileDigest,
    JsonObject,
    canonical_json,
    check_format_version,
    check_rule,
    parse_document,
)
from embstore.core.rows import RowRange


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsRecord:
    """Journal: stage 0 is durable. ``files`` are the digests of its files.

    ``rule`` says how lines became prompts, ``answered`` how many of them have a chat that ends in an assistant turn,
    ``reasons`` counts quarantined lines by kind of reason (core.reasons). A store from before December 2026 lacks all three.
    """

    rows: int
    lines: int
    quarantined: int
    repeats: int
    fingerprint: Sha256
    files: dict[str, FileDigest]
    rule: PromptRule = FIRST_RULE
    fields: PromptFields = USUAL_FIELDS
    answered: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OriginRecord:
    """Journal, before the prompts: they come from a dataset of the hub at commit ``revision``."""

    dataset: str
    revision: str
    config: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecRecord:
    """Journal: spec, basis or map, array metadata and the preallocated coordinate files are durable; rows may follow."""

    files: dict[str, FileDigest]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReusedStore:
    """A store whose rows are reused, and the ``digest`` of those rows.

    ``found`` of its ``rows`` are prompts of the new store; ``reused`` of them are copied. Rows that failed in the model, or
    that an earlier store supplies, are not.
    """

    digest: Sha256
    rows: int
    found: int
    reused: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseRecord:
    """Journal, before the spec: rows are copied from these stores; the first store that has a prompt supplies its row."""

    stores: list[ReusedStore]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRecord:
    """One chunk file: its index, size in bytes, and crc32c of the encoded bytes before their 4-byte trailer (hex)."""

    index: int
    bytes: int
    crc32c: Crc32c


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRow:
    """A row without a vector, kept under ``--on-error quarantine``."""

    row: int
    reason: str


REFUSED_BY_TEMPLATE = "the chat template refuses it"
_REFUSAL_CHARACTERS = 200


def refused_by_template(words: str) -> str:
    r"""The reason of a row whose chat the model's template refuses, with the template's own words on one line.

    Examples
    --------
    >>> refused_by_template("System role\n  not supported")
    'the chat template refuses it: System role not supported'
    """
    return f"{REFUSED_BY_TEMPLATE}: {' '.join(words.split())[:_REFUSAL_CHARACTERS]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateRecord:
    """Journal, before the spec: the chat template was asked for the text of all ``chats`` that the model is to compute.

    ``asked`` is a digest of the template and of the stores whose rows are copied instead. Of ``refused`` chats, which
    ``format.REFUSED`` lists, ``first`` are the first few.
    """

    asked: Sha256
    chats: int
    refused: int
    first: list[FailedRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRecord:
    """Journal: the commit of one window. Each ``*_crc32c`` covers the window's slice of a row file.

    ``sequences_crc32c`` is None in a store without ``sequences.npy``.
    """

    window: int
    start: int
    stop: int
    chunks: list[ChunkRecord]
    coordinates_crc32c: Crc32c
    residuals_crc32c: Crc32c
    sequences_crc32c: Crc32c | None
    tokens: int
    truncated: int
    splits: int
    failed: list[FailedRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReusingWindowRecord(WindowRecord):
    """Journal: the commit of a window with copied rows; ``reused`` are ranges [start, stop) of those rows.

    ``tokens``, ``truncated`` and ``splits`` count computed rows only.
    """

    reused: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemotedRecord:
    """Journal: ``verify --repair`` found window ``window`` damaged; a resume recomputes it."""

    window: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftRecord:
    """Journal: rows after this line were computed on other hardware or threads (``--allow-drift``)."""

    fields: list[str]


JournalRecord = (
    OriginRecord
    | PromptsRecord
    | ReuseRecord
    | TemplateRecord
    | SpecRecord
    | WindowRecord
    | ReusingWindowRecord
    | DemotedRecord
    | DriftRecord
)

_RECORDS: Mapping[str, type[JournalRecord]] = {
    "origin": OriginRecord,
    "prompts": PromptsRecord,
    "reuse": ReuseRecord,
    "template": TemplateRecord,
    "spec": SpecRecord,
    "window": WindowRecord,
    "window-reused": ReusingWindowRecord,
    "demoted": DemotedRecord,
    "drift": DriftRecord,
}
_RECORD_NAMES = {record_type: name for name, record_type in _RECORDS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalState:
    """The committed state: the fold of the records of a journal, in order."""

    origin: OriginRecord | None = None
    prompts: PromptsRecord | None = None
    reuse: ReuseRecord | None = None
    template: TemplateRecord | None = None
    spec: SpecRecord | None = None
    windows: Mapping[int, WindowRecord] = dataclasses.field(default_factory=dict)
    drifts: tuple[DriftRecord, ...] = ()
    had_windows: bool = False  # also where each was demoted since

    @property
    def committed_rows(self) -> int:
        """Rows in committed windows."""
        return sum(window.stop - window.start for window in self.windows.values())

    @property
    def failed(self) -> list[FailedRow]:
        """Rows without a vector, over all committed windows, by row."""
        return sorted((row for window in self.windows.values() for row in window.failed), key=lambda failed: failed.row)

    @property
    def reused(self) -> list[RowRange]:
        """Rows that were copied from other stores, as ranges in row order; adjacent ranges are joined."""
        joined: list[RowRange] = []
        for window in self.windows.values():
            for start, stop in window.reused if isinstance(window, ReusingWindowRecord) else ():
                if joined and joined[-1].stop == start:
                    joined[-1] = RowRange(joined[-1].start, stop)
                else:
                    joined.append(RowRange(start, stop))
        return joined

    @property
    def voids_identity(self) -> bool:
        """Whether drift or an out-of-memory split means that the bytes may differ from an uninterrupted build."""
        return bool(self.drifts) or any(window.splits for window in self.windows.values())


def replay(records: Iterable[JournalRecord]) -> JournalState:
    """Fold journal records into the committed state; the last record of a window wins."""
    state = JournalState()
    windows: dict[int, WindowRecord] = {}
    had_windows = False
    for record in records:
        match record:
            case OriginRecord():
                state = dataclasses.replace(state, origin=record)
            case PromptsRecord():
                state = dataclasses.replace(state, prompts=record)
            case ReuseRecord():
                state = dataclasses.replace(state, reuse=record)
            case TemplateRecord():
                state = dataclasses.replace(state, template=record)
            case SpecRecord():
                state = dataclasses.replace(state, spec=record)
            case WindowRecord():
                windows[record.window] = record
                had_windows = True
            case DemotedRecord():
                windows.pop(record.window, None)
            case DriftRecord():
                state = dataclasses.replace(state, drifts=(*state.drifts, record))
    return dataclasses.replace(state, windows=dict(sorted(windows.items())), had_windows=had_windows)


def encode_journal_header() -> bytes:
    """The first line of a journal."""
    return _journal_line({"record": "header", "format_version": FORMAT_VERSION, "seq": 0})


def encode_journal_record(seq: int, record: JournalRecord) -> bytes:
    """One journal line: canonical JSON, a tab, the crc32 of the JSON in hex, a newline."""
    name = _RECORD_NAMES[type(record)]
    return _journal_line({"record": name, "seq": seq, **dataclasses.asdict(record)})


def decode_journal(content: bytes, *, name: str) -> tuple[list[JournalRecord], int]:
    """Records of a journal and the number of bytes they take; what follows is a torn tail.

    Parameters
    ----------
    content
        All bytes of the file.
    name
        The file, for messages.

    Returns
    -------
    records, valid_bytes
        ``valid_bytes < len(content)`` means that the last line is torn, as after a crash; it was never acknowledged.

    Raises
    ------
    CorruptStoreError
        A line before the last one is damaged, lines are missing, repeated or out of order, or a record is impossible.
    IdentityMismatchError
        Another format version.
    """
    records: list[JournalRecord] = []
    offset = 0
    seq = 0
    hint = "restore this file from a copy of the store, or build into another --out: only this file lists what was committed"
    while offset < len(content):
        end = content.find(b"\n", offset)
        value = None if end < 0 else _parse_journal_line(content[offset:end], f"{name} line {seq + 1}")
        if value is None:
            if seq == 0 and not encode_journal_header().startswith(content.rstrip(b"\0")):
                # removing a torn tail must never empty a file that is not a journal
                raise CorruptStoreError(f"{name} does not begin with a journal header", hint="is this a store?")
            if 0 <= end < len(content) - 1:
                raise CorruptStoreError(f"{name}: line {seq + 1} (byte {offset}) fails its checksum", hint=hint)
            break
        found, kind = value.pop("seq", None), value.pop("record", None)
        if type(found) is not int or found != seq:
            raise CorruptStoreError(f"{name}: line {seq + 1} has sequence number {shown(found)}, expected {seq}", hint=hint)
        if seq == 0:
            check_format_version(value.get("format_version"), name=name)
        elif isinstance(kind, str) and kind in _RECORDS:
            records.append(_decode_record(_RECORDS[kind], value, f"{name} line {seq + 1}"))
        else:
            raise CorruptStoreError(f"{name}: line {seq + 1} is of unknown kind {shown(kind)}", hint=hint)
        offset = end + 1
        seq += 1
    return records, offset


def chunk_table(chunks: Sequence[ChunkRecord]) -> bytes:
    """``chunks.json``: the committed chunks by index, one per line so that two tables can be compared with diff."""
    rows = ",\n".join(canonical_json([chunk.index, chunk.bytes, chunk.crc32c]) for chunk in chunks)
    return f'{{"format_version":{FORMAT_VERSION},"columns":["index","bytes","crc32c"],"chunks":[\n{rows}\n]}}\n'.encode()


def decode_chunk_table(content: bytes) -> list[ChunkRecord]:
    """Read ``chunks.json``."""
    rows = parse_document(content, name=CHUNKS).get("chunks")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        raise CorruptStoreError(f"{CHUNKS} is not a table of chunks", hint="run embstore verify STORE")
    fields = ("index", "bytes", "crc32c")
    return [
        from_json(ChunkRecord, dict(zip(fields, row, strict=True)), name=f"{CHUNKS} row {position}")
        for position, row in enumerate(rows)
    ]


def _journal_line(value: JsonObject) -> bytes:
    body = canonical_json(value).encode()
    return body + b"\t%08x\n" % zlib.crc32(body)


def _parse_journal_line(line: bytes, name: str) -> JsonObject | None:
    """The object on a line, None if the line is damaged; a line with a valid checksum but no object is an error."""
    if len(line) > JOURNAL_LINE_BYTES:
        raise CorruptStoreError(f"{name} has {len(line)} bytes, the limit is {JOURNAL_LINE_BYTES}", hint="is this a store?")
    body, _, crc = line.rpartition(b"\t")
    if b"%08x" % zlib.crc32(body) != crc:
        return None
    value = parse_json(body, name=name)
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name}: expected an object, found {type(value).__name__}", hint="is this a store?")
    return value


def _decode_record(record_type: type[JournalRecord], value: JsonObject, name: str) -> JournalRecord:
    if record_type is PromptsRecord:
        unrecorded: JsonObject = {"rule": dataclasses.asdict(FIRST_RULE), "fields": dataclasses.asdict(USUAL_FIELDS)}
        value = {**unrecorded, "answered": 0, "reasons": {}, **value}
        check_rule(value["rule"], name=name)
    if issubclass(record_type, WindowRecord):
        value = {"sequences_crc32c": None, **value}  # stores from before December 2026 do not say
    record = from_json(record_type, value, name=name)
    problem = _problem(record)
    if problem is not None:
        raise CorruptStoreError(f"{name}: {problem}", hint="is this a store?")
    return record


def _problem(record: JournalRecord) -> str | None:  # noqa: PLR0911 - one return per reason
    """What is impossible in a record, or None; ``core.plan`` checks windows against their spec."""
    match record:
        case PromptsRecord():
            if not 0 < record.rows <= min(record.lines, MAX_ROWS):
                return f"{record.rows} rows from {record.lines} lines"
            return _foreign_file(record.files, STAGE0_FILES)
        case SpecRecord():
            if SPEC not in record.files:
                return f"does not commit {SPEC}"
            return _foreign_file(record.files, (SPEC, BASIS, COORDINATE_MAP, ARRAY_METADATA))
        case WindowRecord():
            if not record.start < record.stop <= MAX_ROWS or len(record.chunks) > MAX_CHUNKS:
                return f"a window of rows {record.start} to {record.stop - 1} in {len(record.chunks)} chunks"
            outside = next((failed.row for failed in record.failed if not record.start <= failed.row < record.stop), None)
            if outside is not None:
                return f"row {outside} failed, but is not in the window"
            return _ranges_problem(record) if isinstance(record, ReusingWindowRecord) else None
        case TemplateRecord():
            if not len(record.first) <= record.refused <= record.chats <= MAX_ROWS:
                return f"{record.refused} of {record.chats} chats refused"
            return None
        case ReuseRecord():
            return next((f"{each.reused} of {each.rows} rows reused" for each in record.stores if not _is_reuse(each)), None)
    return None


def _ranges_problem(record: ReusingWindowRecord) -> str | None:
    end = record.start
    for bounds in record.reused:
        if len(bounds) != 2 or not end <= bounds[0] < bounds[1] <= record.stop:
            return f"reused rows {shown(bounds)} are outside the window or out of order"
        end = bounds[1]
    return None


def _is_reuse(store: ReusedStore) -> bool:
    return store.reused <= store.found <= store.rows <= MAX_ROWS


def _foreign_file(files: Mapping[str, FileDigest], known: Iterable[str]) -> str | None:
    foreign = sorted(set(files) - set(known))
    return f"commits {shown(foreign[0])}, which does not belong to it" if foreign else None
