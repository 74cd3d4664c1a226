"""Where prompts come from: JSONL files, gzip, standard input, tables, and the names of an array's rows."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from embstore.core.config import PromptFields, PromptRule
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt, Rejected, parse_line, prompt_of
from embstore.storage.parquet_source import is_table, table_lines, table_records

# A longer line means that the file is not JSONL; reading stays bounded in memory.
MAX_LINE_BYTES = 64 << 20
_GZIP_MAGIC = b"\x1f\x8b"


class RowNames(Protocol):
    """Names of the rows of an array, in the array's order. Each name is one row: rows differ by id."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    def prompts(self, rule: PromptRule) -> Generator[Prompt, None, None]:
        """One prompt per row, each with an id; raises if an id is missing, or if there are not as many prompts as rows."""


PromptSource = str | Path | RowNames


@contextlib.contextmanager
def open_prompts(source: str | Path) -> Iterator[Iterator[bytes]]:
    """Lines of a prompts file: JSONL, gzip by content, ``-`` for standard input, or a table (see ``parquet_source``).

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
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
                reason = error.strerror if isinstance(error, OSError) else error
                raise PromptError(
                    f"cannot read prompts {source}: {reason}", hint="give a JSONL or Parquet file, one prompt per line"
                ) from error
        buffered = io.BufferedReader(raw) if not isinstance(raw, io.BufferedReader) else raw  # type: ignore[type-var]
        stream: BinaryIO = buffered
        if buffered.peek(2)[:2] == _GZIP_MAGIC:
            stream = stack.enter_context(gzip.GzipFile(fileobj=buffered))  # type: ignore[assignment]
        yield _lines(stream, str(source))


@contextlib.contextmanager
def open_source(source: PromptSource, fields: PromptFields, rule: PromptRule) -> Iterator[Iterator[Prompt | Rejected]]:
    """Prompts of a source, one for each line or row; a line without a prompt is ``Rejected``. ``fields`` is for files."""
    if not isinstance(source, str | Path):
        with contextlib.closing(source.prompts(rule)) as prompts:
            yield prompts
    elif rule.version > 1 and str(source) != "-" and is_table(Path(source)):
        with contextlib.closing(table_records(Path(source), fields)) as records:
            yield (prompt_of(record, fields, rule) for record in records)
    else:
        with open_prompts(source) as lines:
            yield (_read(line, fields, rule) for line in lines)


def _read(line: bytes, fields: PromptFields, rule: PromptRule) -> Prompt | Rejected:
    if len(line) > MAX_LINE_BYTES:
        return Rejected(reason=f"longer than {MAX_LINE_BYTES >> 20} MiB")
    return parse_line(line, fields, rule)


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    first = True
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                # skip the rest piece by piece; the caller sees one line that is too long
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_LINE_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise PromptError(f"reading prompts {name} failed: {error}", hint="the file is damaged or truncated") from error
        if not line:
            return
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False
