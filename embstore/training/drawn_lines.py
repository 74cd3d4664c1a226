"""Drawn items of a file of JSON records: JSONL, a JSON array, or objects over several lines.

Lines are found by offset in the mapped file. Other records are first written to a scratch file, one per line; a line
break between the parts of a record is white space, and a text cannot contain one.

Shapes: n draws.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import tempfile
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError
from embstore.core.file_kinds import LINES
from embstore.core.files import storage_errors
from embstore.core.inputs import Input
from embstore.core.json_text import elements, is_elements
from embstore.core.prompts import Rejected, decode_object
from embstore.training.reading import PromptReading
from embstore.training.resample import DRAW_COLUMN

_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


@contextlib.contextmanager
def one_a_line(opened: Input, scratch: Path | None) -> Iterator[mmap.mmap]:
    """All records of a text, mapped, each on its own line: the file itself, or a copy in ``scratch``.

    Raises
    ------
    ConfigError, PromptError, StorageError
        There are no records, the text is not JSON, or the copy cannot be written.
    """
    if not is_elements(opened.head):
        with opened.mapped(scratch) as content:
            yield content
        return
    folder = scratch or Path(tempfile.gettempdir())
    with contextlib.ExitStack() as closing:
        with storage_errors("writing to", folder):
            copy = closing.enter_context(tempfile.TemporaryFile(dir=folder))
            for element in elements(opened.stream, opened.name):
                copy.write(element.translate(_ONE_LINE) + b"\n")
            copy.flush()
        if not copy.tell():
            raise ConfigError(f"{opened.name} has no records", hint="give the prompts file that the trainer reads")
        yield mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)


class Lines:
    """Lines of JSON that are found by offset; blank lines do not count as items.

    Parameters
    ----------
    name, content
        The name of the input, and its bytes with one record a line.
    reindex
        A field to renumber in the copy.
    as_array
        The copy is a JSON array.
    """

    kind, suffixes = "JSON", LINES

    def __init__(self, name: str, content: mmap.mmap, *, reindex: str | None = None, as_array: bool = False) -> None:
        self.name = name
        self.content = content
        self.reindex = reindex
        self.as_array = as_array
        self.offsets = array("q")  # of the items, once they have been read
        self.unreadable: str | None = None  # the first line that is not a JSON object

    def records(self, reading: PromptReading, id_column: str | None) -> Iterator[dict[str, Any] | Rejected]:
        """Every item, in order; a line that is not a JSON object has no prompt."""
        self.offsets = array("q")
        offset = len(BOM_UTF8) if self.content[: len(BOM_UTF8)] == BOM_UTF8 else 0
        self.content.seek(offset)
        for number, line in enumerate(iter(self.content.readline, b""), start=1):
            if line.strip():
                self.offsets.append(offset)
                yield self._record(line, number, reading)
            offset += len(line)

    def _record(self, line: bytes, number: int, reading: PromptReading) -> dict[str, Any] | Rejected:
        record = decode_object(line, reading.rule)
        if isinstance(record, Rejected):
            self.unreadable = self.unreadable or f"line {number} of {self.name}: {record.reason}"
            return record
        if DRAW_COLUMN in record:
            raise ConfigError(
                f"{self.name} has a field {DRAW_COLUMN}: it is resampled already", hint="resample the original"
            )
        if self.reindex is not None and type(record.get(self.reindex)) not in (int, str):
            raise ConfigError(
                f"line {number} of {self.name} has no number or text in the field {self.reindex}, which --reindex names; "
                f"it has {', '.join(record) or 'no fields'}",
                hint="name the field by which the trainer finds an item",
            )
        return record

    def write(self, out: Path, rows_n: NDArray[np.int64]) -> None:
        """Write the lines of these items, verbatim but for a renumbered field, with one more field at the end."""
        opening, between, closing = (b"[\n", b",\n", b"\n]\n") if self.as_array else (b"", b"\n", b"\n")
        with out.open("wb") as copy:
            for number, row in enumerate(rows_n):
                self.content.seek(self.offsets[row])
                body = self._renumbered(self.content.readline(), number).rstrip()[:-1].rstrip()
                comma = b"" if body.endswith(b"{") else b", "
                copy.write((between if number else opening) + body + comma + f'"{DRAW_COLUMN}": {number}}}'.encode())
            copy.write(closing)

    def _renumbered(self, line: bytes, number: int) -> bytes:
        if self.reindex is None:
            return line
        record = json.loads(line)
        record[self.reindex] = type(record[self.reindex])(number)
        return json.dumps(record, ensure_ascii=False).encode()
