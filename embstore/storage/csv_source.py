"""CSV and TSV files as records: the first line names the fields, every value is text, an empty one is absent.

Python's own reader, because a row that is not as the header says is then one bad row and not the end of the file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import PurePath
from typing import BinaryIO

from embstore.core.errors import PromptError
from embstore.core.prompts import Rejected
from embstore.storage.json_source import lines

Cell = str | bytes

_DELIMITERS = (",", "\t", ";")
_SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# a longer value means that a quotation mark is missing; the reader holds four bytes a character
_VALUE_CHARACTERS = 16 << 20
_PACKED = (".gz", ".bz2", ".xz", ".zst")


def delimiter_of(head: bytes, name: str, fields: frozenset[str]) -> str | None:
    """What separates the values of a table that begins with ``head``, None if it is not one.

    It is one if its name says so, or if its first line has several names and one of them is among ``fields``.

    Examples
    --------
    >>> delimiter_of(b"id;prompt", "-", frozenset({"prompt"}))
    ';'
    >>> delimiter_of(b"what is a prompt, then?", "-", frozenset({"prompt"})) is None
    True
    """
    path = PurePath(name.lower())
    suffix = PurePath(path.stem).suffix if path.suffix in _PACKED else path.suffix
    first = head.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].decode(errors="replace").rstrip("\r")
    if first.lstrip()[:1] in ("{", "["):
        return None
    for delimiter in _DELIMITERS:
        names = [cell.strip().strip('"') for cell in first.split(delimiter)]
        if len(names) > 1 and fields.intersection(names):
            return delimiter
    return _SUFFIXES.get(suffix)


def csv_records(stream: BinaryIO, name: str, delimiter: str) -> Iterator[dict[str, Cell] | Rejected]:
    """One record a row; values that are not UTF-8 stay bytes. A row of another width than the header is rejected.

    Raises
    ------
    PromptError
        The header names a field twice, or a quoted value does not end.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _VALUE_CHARACTERS))
    rows = csv.reader(_decoded(stream, name), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error) or "end of data" in str(error):
                raise PromptError(
                    f"{name}: a quoted value does not end (read to line {rows.line_num})",
                    hint='a quotation mark inside a value is written twice: "the ""word"""',
                ) from error
            if header is None:
                raise PromptError(
                    f"{name}: its first line is not a header ({error})", hint="name the columns there"
                ) from error
            yield Rejected(reason=f"not a CSV row ({error})")
            continue
        if header is None:
            header = _header(row, name)
        elif row and len(row) != len(header):
            yield Rejected(reason=f"{len(row)} values, but the header names {len(header)}")
        elif row:
            yield {field: _cell(value) for field, value in zip(header, row, strict=True) if value}


def _header(row: list[str], name: str) -> list[str]:
    names = [each.strip() for each in row]
    if len(set(names)) != len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise PromptError(f"{name}: its header names {twice!r} twice", hint="give each column its own name")
    return names


def _decoded(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(lines(stream), start=1):
        if isinstance(line, Rejected):
            raise PromptError(f"{name}: line {number} is {line.reason}", hint="is it a CSV file?")
        yield line.decode("utf-8", "surrogateescape")


def _cell(value: str) -> Cell:
    return (
        value
        if value.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in value)
        else value.encode("utf-8", "surrogateescape")
    )
