"""CSV and TSV files as records: the first line names the fields, every value is text, an empty one is null.

Python's own reader, because a row that is not as the header says is then one bad row and not the end of the file. After a
quotation mark too many, all lines up to the next mark are one value, so each line of such a row counts
(docs/decisions/0051).
"""

from __future__ import annotations

import bisect
import csv
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from embstore.core.errors import PromptError
from embstore.core.file_kinds import DELIMITERS, ending_of
from embstore.core.json_text import MAX_LINE_BYTES, lines
from embstore.core.prompts import Rejected

Cell = str | bytes
CsvRecord = dict[str, Cell | None] | Rejected

_DELIMITERS = (",", "\t", ";")
# a longer value means that a quotation mark is missing; the reader holds four bytes a character
_VALUE_CHARACTERS = 16 << 20
# so many lines in one row, each with as many delimiters as the header, are rows and not a value
_LIKE_ROWS = 10


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
    first = head.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].decode(errors="replace").rstrip("\r")
    if first.lstrip()[:1] in ("{", "["):
        return None
    for delimiter in _DELIMITERS:
        names = [cell.strip().strip('"') for cell in first.split(delimiter)]
        if len(names) > 1 and fields.intersection(names):
            return delimiter
    return DELIMITERS.get(ending_of(name))


class CsvRecords:
    """One record a row; values that are not UTF-8 stay bytes. A row of another width than the header is rejected.

    Of a row that is not CSV or whose lines look like rows, each line is rejected.
    """

    def __init__(self, stream: BinaryIO, name: str, delimiter: str) -> None:
        self._lines = _Lines(stream, name, delimiter)
        self._name, self._delimiter = name, delimiter
        # records that do not begin on the line after that of the one before
        self._records, self._starts = array("q"), array("q")

    def line_of(self, record: int) -> int:
        """The line on which a record begins; both are counted from 1."""
        last = bisect.bisect_right(self._records, record) - 1
        return self._starts[last] + record - self._records[last]

    def __iter__(self) -> Iterator[CsvRecord]:
        """Read on.

        Raises
        ------
        PromptError
            The header names a field twice, or a quoted value does not end.
        """
        due = 0
        for count, (line, record) in enumerate(self._rows(), start=1):
            if line != due:
                self._records.append(count)
                self._starts.append(line)
            due = line + 1
            yield record

    def _rows(self) -> Iterator[tuple[int, CsvRecord]]:
        """Records, each with its line."""
        csv.field_size_limit(max(csv.field_size_limit(), _VALUE_CHARACTERS))
        rows = csv.reader(self._lines, delimiter=self._delimiter, strict=True)
        header: list[str] = []
        while True:
            self._lines.begin()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "field larger" in str(error) or "end of data" in str(error):
                    raise self._lines.endless() from error
                if not header:
                    raise PromptError(
                        f"{self._name}: its first line is not a header ({error})", hint="name the columns there"
                    ) from error
                yield from self._each_line(f"not a CSV row ({error})")
                continue
            if not header:
                header = self._header(row)
            elif row and len(row) != len(header):
                yield from self._each_line(f"{len(row)} values, but the header names {len(header)}")
            elif self._lines.like_rows >= _LIKE_ROWS:
                yield from self._each_line("a quoted value over lines that look like rows")
            elif row:
                yield self._lines.first, {field: _cell(value) for field, value in zip(header, row, strict=True)}

    def _each_line(self, reason: str) -> Iterator[tuple[int, Rejected]]:
        """Each line of the row as one that is rejected: a mark that is missing may have made one row of many."""
        first, last = self._lines.first, self._lines.number
        more = f"; lines {first} to {last} are read as one row" if last > first else ""
        for line in range(first, last + 1):
            yield line, Rejected(reason=reason + more)

    def _header(self, row: list[str]) -> list[str]:
        names = [each.strip() for each in row]
        if len(set(names)) != len(names):
            twice = next(each for each in names if names.count(each) > 1)
            raise PromptError(f"{self._name}: its header names {twice!r} twice", hint="give each column its own name")
        self._lines.delimiters = len(names) - 1
        return names


class _Lines:
    """Lines of a file as text, and what is known of those of the row that is being read."""

    def __init__(self, stream: BinaryIO, name: str, delimiter: str) -> None:
        self._lines = lines(stream)
        self._name, self._delimiter = name, delimiter
        self.delimiters = 0  # of the header
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """The next line begins a row."""
        self.first = self.number + 1
        self.like_rows = 0  # lines between the first and the last with as many delimiters as the header
        self._are_alike = self.delimiters > 0
        self._characters = 0
        self._latest = ""

    def endless(self) -> PromptError:
        """The error for a quoted value of this row that does not end."""
        return PromptError(
            f"{self._name}: a quoted value of the row that begins on line {self.first} does not end "
            f"(read to line {self.number})",
            hint='a quotation mark inside a value is written twice: "the ""word"""',
        )

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if isinstance(line, Rejected):
            raise PromptError(f"{self._name}: line {self.number} is {line.reason}", hint="is it a CSV file?")
        if self.number > self.first + 1:  # the line before this one is neither the first nor the last of its row
            self._are_alike = self._are_alike and self._latest.count(self._delimiter) == self.delimiters
            self.like_rows = self.like_rows + 1 if self._are_alike else 0
        self._latest = line.decode("utf-8", "surrogateescape")
        self._characters += len(self._latest)
        if self._characters > MAX_LINE_BYTES:
            raise self.endless()
        return self._latest


def _cell(value: str) -> Cell | None:
    if value.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in value):
        return value or None
    return value.encode("utf-8", "surrogateescape")
