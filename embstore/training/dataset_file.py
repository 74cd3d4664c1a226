"""A trainer's file of prompts, JSONL or Parquet: its items in order, and a copy of some of them in any order.

Draws have a random order. Lines are found by offset, but a row group of Parquet can only be read as a whole, so its rows are
sorted outside of memory: each row group is read once, in file order, drawn rows go to a scratch file, and from there to the
copy. Memory is a few words per item and per draw, plus blocks of rows of a fixed size.

Shapes: n draws, B draws or rows of a block.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embstore.core.arrow_values import decoders, records
from embstore.core.errors import ConfigError
from embstore.core.file_kinds import LINES, PARQUET
from embstore.core.inputs import INSTALL_PARQUET, open_input
from embstore.core.prompts import Rejected, decode_object
from embstore.core.rows import slices
from embstore.training.reading import PromptReading
from embstore.training.resample import DRAW_COLUMN

_BATCH_ROWS = 1024  # of Parquet that are decoded at a time
_BLOCK_BYTES = 32 << 20  # of rows of Arrow in memory at a time
_BLOCK_DRAWS = 1 << 16


@contextlib.contextmanager
def open_table(dataset: str | Path, scratch: Path | None = None) -> Iterator[Lines | ParquetRows]:
    """The items of a file, which is opened once and mapped.

    Parameters
    ----------
    dataset
        JSONL (also compressed, a pipe, or ``-`` for standard input) or Parquet, by content.
    scratch
        Folder for an uncompressed copy of what cannot be mapped; default: the system's.

    Raises
    ------
    ConfigError
        It is a folder, empty, or neither JSONL nor Parquet.
    """
    if Path(dataset).is_dir():
        raise ConfigError(f"{dataset} is not a file", hint="give the prompts file that the trainer reads")
    with open_input(dataset) as opened:
        is_list = opened.kind is None and opened.head.lstrip()[:1] == b"["
        if is_list or opened.kind not in (None, PARQUET):
            kind = opened.kind.name if opened.kind is not None else "a JSON array"
            raise ConfigError(
                f"{opened.name} is {kind}, neither JSONL nor Parquet",
                hint="jq -c '.[]' makes lines of a JSON array" if is_list else "convert it to one of them",
            )
        if not opened.head:
            raise ConfigError(f"{opened.name} is empty", hint="give the prompts file that the trainer reads")
        with opened.mapped(scratch) as content:
            yield ParquetRows(opened.name, content) if opened.kind is PARQUET else Lines(opened.name, content)


class Lines:
    """Lines of JSON that are found by offset; blank lines do not count as items."""

    kind, suffixes = "JSONL", LINES

    def __init__(self, name: str, content: mmap.mmap) -> None:
        self.name = name
        self.content = content
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
        elif DRAW_COLUMN in record:
            raise ConfigError(
                f"{self.name} has a field {DRAW_COLUMN}: it is resampled already", hint="resample the original"
            )
        return record

    def write(self, out: Path, rows_n: NDArray[np.int64]) -> None:
        """Write the lines of these items, verbatim, with one more field at the end."""
        with out.open("wb") as copy:
            for number, row in enumerate(rows_n):
                self.content.seek(self.offsets[row])
                body = self.content.readline().rstrip()[:-1].rstrip()
                comma = b"" if body.endswith(b"{") else b", "
                copy.write(body + comma + f'"{DRAW_COLUMN}": {number}}}\n'.encode())


class ParquetRows:
    """A Parquet file, read by row groups."""

    kind, suffixes = "Parquet", (".parquet",)
    unreadable = None

    def __init__(self, name: str, content: mmap.mmap) -> None:
        try:
            import pyarrow  # noqa: PLC0415 - only who has such a file needs it
            import pyarrow.parquet  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError("Parquet needs pyarrow", hint=INSTALL_PARQUET) from error
        self.name = name
        self.arrow: Any = pyarrow
        self.parquet: Any = pyarrow.parquet
        try:
            self.file: Any = self.parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(content)))
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(
                f"{name} is not a Parquet file ({str(error)[:80]})", hint="the file is damaged or truncated"
            ) from error
        if DRAW_COLUMN in self.file.schema_arrow.names:
            raise ConfigError(f"{name} has a column {DRAW_COLUMN}: it is resampled already", hint="resample the original")

    def records(self, reading: PromptReading, id_column: str | None) -> Iterator[dict[str, Any]]:
        """Every item, with the columns that identify its prompt."""
        present = self.file.schema_arrow.names
        if id_column is not None and id_column not in present:
            raise ConfigError(f"{self.name} has no column {id_column}; it has {', '.join(present)}", hint="set --id-column")
        wanted = reading.choose(present) if id_column is None else [id_column]
        to_decode = decoders(self.file.schema_arrow, wanted)
        for batch in self.file.iter_batches(batch_size=1024, columns=wanted):
            yield from records(batch, to_decode, frozenset(wanted))

    def write(self, out: Path, rows_n: NDArray[np.int64]) -> None:
        """Write the rows of these items with their numbers.

        Price: each row group with a drawn row is read once, and all drawn rows are written to a scratch file, uncompressed.
        """
        schema = self.file.schema_arrow.append(self.arrow.field(DRAW_COLUMN, self.arrow.int64()))
        with tempfile.TemporaryFile(dir=out.parent) as scratch, self.parquet.ParquetWriter(out, schema) as writer:
            draw_n, ends = self._write_runs(scratch, rows_n)
            for first, table in self._merged(scratch, draw_n, ends):
                numbers = self.arrow.array(np.arange(first, first + len(table)))
                writer.write_table(table.append_column(schema.field(DRAW_COLUMN), numbers).cast(schema))

    def _write_runs(self, scratch: BinaryIO, rows_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
        """Write the drawn rows in runs of a few MiB: near each other in the dataset, and among themselves in drawn order.

        Returns the numbers of the draws, int64 [n], as they were written, and where each run ends among them.
        """
        draw_n = np.argsort(rows_n, kind="stable")
        ends = [0]
        with self.arrow.ipc.new_stream(scratch, self._schema_to_take()) as runs:
            for row_B, table in self._blocks(rows_n, draw_n):
                stop = int(np.searchsorted(rows_n, row_B[-1], side="right", sorter=draw_n))
                step = max(1, _BLOCK_BYTES * len(table) // max(1, table.nbytes))  # a row may be drawn any number of times
                for part in slices(ends[-1], stop, step):
                    draw_B = draw_n[part]
                    draw_B.sort()  # in place; the rows after this part stay sorted, and only those are searched
                    for batch in table.take(np.searchsorted(row_B, rows_n[draw_B])).to_batches():
                        runs.write_batch(batch)
                        ends.append(ends[-1] + len(batch))
        scratch.flush()
        return draw_n, ends

    def _blocks(self, rows_n: NDArray[np.int64], draw_n: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Any]]:
        """Tables of a few MiB, and the numbers of their rows, of the row groups with a row that is drawn."""
        sizes = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        is_drawn = np.diff(np.searchsorted(rows_n, starts, sorter=draw_n)) > 0
        numbers: list[NDArray[np.int64]] = []
        batches: list[Any] = []
        size = 0
        for group in np.flatnonzero(is_drawn):
            row = int(starts[group])
            for batch in self.file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[int(group)]):
                numbers.append(np.arange(row, row + len(batch)))
                batches.append(batch)
                row, size = row + len(batch), size + batch.nbytes
                if size >= _BLOCK_BYTES:
                    yield np.concatenate(numbers), self._table(batches)
                    numbers, batches, size = [], [], 0
        if batches:
            yield np.concatenate(numbers), self._table(batches)

    def _table(self, batches: list[Any]) -> Any:  # noqa: ANN401 - pyarrow's
        table, schema = self.arrow.Table.from_batches(batches), self._schema_to_take()
        return table if table.schema == schema else table.cast(schema)

    def _schema_to_take(self) -> Any:  # noqa: ANN401 - pyarrow's
        """The schema with plain columns in place of views, of which pyarrow 26 cannot take rows."""
        plain = {
            self.arrow.string_view(): self.arrow.large_string(),
            self.arrow.binary_view(): self.arrow.large_binary(),
        }
        schema = self.file.schema_arrow
        fields = [field.with_type(plain.get(field.type, field.type)) for field in schema]
        return self.arrow.schema(fields, metadata=schema.metadata)

    def _merged(self, scratch: BinaryIO, draw_n: NDArray[np.int64], ends: list[int]) -> Iterator[tuple[int, Any]]:
        """Tables of a few MiB in drawn order, and the number of their first draw."""
        mapped = mmap.mmap(scratch.fileno(), 0, access=mmap.ACCESS_READ)
        runs = list(self.arrow.ipc.open_stream(self.arrow.py_buffer(mapped)))  # rows stay in the file until they are copied
        at = np.array(ends[:-1])
        step = min(_BLOCK_DRAWS, max(1, _BLOCK_BYTES * len(draw_n) // len(mapped)))
        for block in slices(0, len(draw_n), step):
            parts, numbers = [], []
            for index, run in enumerate(runs):
                start = int(at[index])
                count = int(np.searchsorted(draw_n[start : ends[index + 1]], block.stop))
                parts.append(run.slice(start - ends[index], count))
                numbers.append(draw_n[start : start + count])
                at[index] += count
            yield block.start, self.arrow.Table.from_batches(parts).take(np.argsort(np.concatenate(numbers)))
