"""Where prompts come from: one file, pipe, folder or dataset; what it is, who reads it, and where each line was.

    source -> parts, one for each file or split -> core.inputs opens it, once -> what is it? -> records -> prompts

A record is a line of JSON as bytes, or a row of a table as a dict; ``core.prompts`` makes a prompt of either. To read one
more format, add its kind to ``core.file_kinds`` and its reader to ``_Reader``.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Protocol

from embstore.core.config import CURRENT_RULE, FIRST_RULE, USUAL_FIELDS, WHOLE, DatasetChoice, PromptFields, PromptRule
from embstore.core.errors import PromptError
from embstore.core.events import Notice, Observer, ignore
from embstore.core.file_kinds import PACKED, TABLES
from embstore.core.inputs import Input, check_input, open_input
from embstore.core.json_text import elements, is_elements, lines
from embstore.core.prompts import Prompt, Rejected, parse_line, prompt_fields, prompt_of
from embstore.core.values import as_json
from embstore.storage.csv_source import CsvRecords, delimiter_of
from embstore.storage.hub_dataset import HubDataset, streamed_parts
from embstore.storage.parquet_source import table_records
from embstore.storage.prompt_folder import Shard, missing_shards, refuse_choice, shards

Record = bytes | Mapping[str, object] | Rejected

_MOST_NAMED = 3


class RowNames(Protocol):
    """Names of the rows of an array, in the array's order. Each name is one row: rows differ by id."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    def prompts(self, rule: PromptRule) -> Generator[Prompt, None, None]:
        """One prompt per row, each with an id; raises if an id is missing, or if there are not as many prompts as rows."""


PromptSource = str | Path | HubDataset | RowNames


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One file or split: its records, and the fields that its place adds to each of them.

    ``line_of`` gives the line of a record, from 1, where records are not lines.
    """

    name: str
    records: Iterable[Record]
    is_lines: bool = False
    line_of: Callable[[int], int] = int
    columns: Mapping[str, str] = field(default_factory=dict)


class Records:
    """Lines and rows of a source, in order.

    ``columns`` are the fields that the place of the last one adds to it; ``is_lines`` says whether it is a line of text.
    """

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = parts
        self._starts: list[int] = []  # the first line of each part
        self._places: list[tuple[str, Callable[[int], int]]] = []
        self._count = 0
        self.columns: Mapping[str, str] = {}
        self.is_lines = False

    def __iter__(self) -> Iterator[Record]:
        for part in self._parts:
            self._starts.append(self._count)
            self._places.append((part.name, part.line_of))
            self.columns, self.is_lines = part.columns, part.is_lines
            for record in part.records:
                self._count += 1
                yield record

    def where(self, line: int) -> str:
        """Record ``line`` of the source, from 1, as a person finds it.

        Examples
        --------
        >>> records = Records([_Part(name="a", records=[b"1", b"2"]), _Part(name="b", records=[b"3"])])
        >>> len(list(records)), records.where(2), records.where(3)
        (3, 'line 2 of a', 'line 1 of b')
        """
        part = bisect.bisect_left(self._starts, line) - 1
        name, line_of = self._places[part]
        return f"line {line_of(line - self._starts[part])} of {name}"


@contextlib.contextmanager
def open_records(
    source: str | Path | HubDataset,
    names: PromptFields = USUAL_FIELDS,
    choice: DatasetChoice = WHOLE,
    *,
    rule: PromptRule = CURRENT_RULE,
    scratch: Path | None = None,
    observer: Observer = ignore,
) -> Iterator[Records]:
    """Records of a file, pipe (``-`` is standard input), folder or dataset of the hub. Each file is opened once.

    Parameters
    ----------
    source, choice
        What to read, and which split and configuration of it, if it has several.
    names
        Fields of a prompt: a table may leave out others, and is known by them.
    rule
        By rule 1, tables give what their JSON was.
    scratch
        Folder for a copy of a table that cannot be read from both ends; None: where temporary files go.
    observer
        Told which files of a folder are read.

    Raises
    ------
    PromptError
        The source is missing, unreadable, damaged, or of a kind that is not read.
    """
    reader = _Reader(names=names, rule=rule, scratch=scratch)
    with contextlib.closing(_parts(source, reader, choice, observer)) as parts:
        yield Records(parts)


def _parts(
    source: str | Path | HubDataset, reader: _Reader, choice: DatasetChoice, observer: Observer
) -> Generator[_Part, None, None]:
    if isinstance(source, HubDataset) and source.folder is None:
        for name, rows in streamed_parts(source, reader.names):
            yield _Part(name=name, records=rows)
        return
    path = source.folder if isinstance(source, HubDataset) else Path(source)
    if path is None or not _is_folder(path):
        refuse_choice(f"{source} is one file", split=choice.split, config=choice.config)
        with open_input(str(source)) as opened:
            yield reader.part(opened)
        return
    found = shards(path, choice)
    _tell(path, found, observer, is_copy=isinstance(source, HubDataset))
    for shard in found:
        with open_input(shard.path) as opened:
            yield reader.part(opened, shard.columns)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that cannot be one; opening it says why
        return False


def _tell(folder: Path, found: list[Shard], observer: Observer, *, is_copy: bool) -> None:
    """Say which files are read. A notice names missing numbers; in a copy that nobody made by hand they are refused."""
    names = [str(shard.path.relative_to(folder)) for shard in found]
    first = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    observer(Notice(message=f"{folder}: {len(names)} {'files are' if len(names) > 1 else 'file is'} read, {first}"))
    if missing := missing_shards(names):
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        message = f"{folder} lacks {', '.join(missing[:_MOST_NAMED])}{more}, which the numbers of the other files promise"
        if is_copy:
            raise PromptError(
                message, hint="the hub's cache has only a part of the dataset: download it again with a network"
            )
        observer(Notice(message=message))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """Who reads one open input: the table of formats."""

    names: PromptFields
    rule: PromptRule
    scratch: Path | None

    def part(self, opened: Input, columns: Mapping[str, str] | None = None) -> _Part:
        _refuse_misnamed(opened)
        kind, text, name = opened.kind, opened.stream, opened.name
        is_lines = False
        line_of: Callable[[int], int] = int
        records: Iterable[Record]
        if kind is not None and kind.table:
            is_first = self.rule.version == FIRST_RULE.version
            records = table_records(opened, None if is_first else prompt_fields(self.names), self.scratch)
        elif kind is not None:
            raise PromptError(f"{name} is {kind.name}", hint=kind.prompts.format(file=name))
        elif is_elements(opened.head):
            records = elements(text, name)
        elif (delimiter := delimiter_of(opened.head, name, self.names.names)) is not None:
            records = table = CsvRecords(text, name, delimiter)
            line_of = table.line_of
        else:
            records, is_lines = lines(text), True
        return _Part(name=name, records=records, is_lines=is_lines, line_of=line_of, columns=columns or {})


def _refuse_misnamed(opened: Input) -> None:
    """Refuse what is named as a table or as compressed and is not: with damaged first bytes it would look like bad lines.

    Text that is named as compressed is text: some servers unpack on the way.
    """
    suffix = PurePath(opened.name).suffix.lower()
    is_damaged = suffix in PACKED and not opened.is_packed and (not opened.head or not _is_text(opened.head))
    if opened.kind is None and (suffix in TABLES or is_damaged):
        raise PromptError(
            f"reading prompts {opened.name} failed: its first bytes are not those of a {suffix} file",
            hint="the file is damaged or truncated; a file of another kind needs another name",
        )


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


class Prompts:
    """Prompts of a source in order, one for each line or row; one without a prompt is ``Rejected``."""

    def __init__(self, prompts: Iterable[Prompt | Rejected], records: Records | None = None) -> None:
        self._prompts = prompts
        self._records = records

    def __iter__(self) -> Iterator[Prompt | Rejected]:
        return iter(self._prompts)

    def where(self, line: int) -> str:
        """Line ``line``, with its file where there is one."""
        return self._records.where(line) if self._records is not None else f"line {line}"


def check_source(source: PromptSource) -> None:
    """Refuse a file that is not there or cannot be opened; a pipe is not touched, because its bytes come only once.

    Raises
    ------
    PromptError
    """
    if isinstance(source, str | Path):
        check_input(source)


@contextlib.contextmanager
def open_source(
    source: PromptSource,
    names: PromptFields,
    rule: PromptRule = CURRENT_RULE,
    choice: DatasetChoice = WHOLE,
    *,
    scratch: Path | None = None,
    observer: Observer = ignore,
) -> Iterator[Prompts]:
    """Prompts of a source. For the names of an array's rows, only ``source`` counts; the rest is as for ``open_records``."""
    if isinstance(source, str | Path | HubDataset):
        with open_records(source, names, choice, rule=rule, scratch=scratch, observer=observer) as records:
            yield Prompts((_placed(read_record(record, names, rule), records.columns) for record in records), records)
    else:
        with contextlib.closing(source.prompts(rule)) as prompts:
            yield Prompts(prompts)


def read_record(record: Record, names: PromptFields = USUAL_FIELDS, rule: PromptRule = CURRENT_RULE) -> Prompt | Rejected:
    """The prompt of a line or row."""
    if isinstance(record, bytes):
        return parse_line(record, names, rule)
    if isinstance(record, Rejected):
        return record
    if rule.version == FIRST_RULE.version:  # a row was converted to JSON, and read as a line
        return parse_line(json.dumps(as_json(record, drops_nulls=True)).encode(), names, rule)
    return prompt_of(record, names, rule)


def _placed(prompt: Prompt | Rejected, columns: Mapping[str, str]) -> Prompt | Rejected:
    """The prompt with the fields of its folder; its own come first."""
    if not columns or isinstance(prompt, Rejected):
        return prompt
    return replace(
        prompt, fields={**prompt.fields, **{name: value for name, value in columns.items() if name not in prompt.fields}}
    )
