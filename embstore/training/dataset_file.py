"""A trainer's file of prompts, JSON or Parquet: its items in order, and a copy of some of them in any order.

Draws have a random order. Lines are found by offset, but a row group of Parquet can only be read as a whole, so its rows are
sorted outside of memory: each row group is read once, in file order, drawn rows go to a scratch file, and from there to the
copy. Memory is a few words per item and per draw, plus blocks of rows of a fixed size.

Shapes: n draws, B draws or rows of a block.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embstore.core.arrow_values import decoders, records
from embstore.core.errors import ConfigError
from embstore.core.file_kinds import PARQUET
from embstore.core.inputs import INSTALL_PARQUET, open_input
from embstore.core.json_text import is_elements
from embstore.core.rows import slices
from embstore.training.drawn_lines import Lines, one_a_line
from embstore.training.reading import PromptReading
from embstore.training.resample import DRAW_COLUMN

_BATCH_ROWS = 1024  # of Parquet that are decoded at a time
_BLOCK_BYTES = 32 << 20  # of rows of Arrow in memory at a time
_BLOCK_DRAWS = 1 << 16


@contextlib.contextmanager
def open_table(
    dataset: str | Path, scratch: Path | None = None, *, reindex: str | None = None, keeps_arrays: bool = False
) -> Iterator[Lines | ParquetRows]:
    """The items of a file, which is opened once and mapped.

    Parameters
    ----------
    dataset
        JSONL or a JSON array (also compressed, a pipe, or ``-`` for standard input), or Parquet, by content.
    scratch
        Folder for an uncompressed copy of what cannot be mapped, and for the lines of an array; default: the system's.
    reindex
        Column to renumber in a copy.
    keeps_arrays
        A copy of an array is one.

    Raises
    ------
    ConfigError, PromptError
        It is a folder, empty, or neither JSON nor Parquet; or ``reindex`` is not a column of numbers or texts.
    """
    if Path(dataset).is_dir():
        raise ConfigError(
            f"{dataset} is not a file",
            hint="give the file that the trainer reads; - reads several files of lines from a pipe, as cat *.jsonl | ...",
        )
    with open_input(dataset) as opened:
        if opened.kind not in (None, PARQUET):
            raise ConfigError(
                f"{opened.name} is {opened.kind.name}, neither JSON nor Parquet", hint="convert it to one of them"
            )
        if not opened.head:
            raise ConfigError(f"{opened.name} is empty", hint="give the prompts file that the trainer reads")
        if opened.kind is PARQUET:
            with opened.mapped(scratch) as content:
                yield ParquetRows(opened.name, content, reindex=reindex)
            return
        is_array = opened.head.removeprefix(BOM_UTF8).lstrip()[:1] == b"[" and is_elements(opened.head)
        with one_a_line(opened, scratch) as content:
            yield Lines(opened.name, content, reindex=reindex, as_array=is_array and keeps_arrays)


class ParquetRows:
    """A Parquet file, read by row groups."""

    kind, suffixes = "Parquet", (".parquet",)
    unreadable = None

    def __init__(self, name: str, content: mmap.mmap, *, reindex: str | None = None) -> None:
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
        self.reindex = -1 if reindex is None else self._column_to_renumber(reindex)

    def _column_to_renumber(self, column: str) -> int:
        schema, types = self.file.schema_arrow, self.arrow.types
        at: int = schema.get_field_index(column)
        kind = schema.field(at).type if at >= 0 else None
        if kind is None or not any(
            is_one(kind) for is_one in (types.is_integer, types.is_string, types.is_large_string, types.is_string_view)
        ):
            found = (
                f"has {kind} in the column {column}" if kind else f"has no column {column}; it has {', '.join(schema.names)}"
            )
            raise ConfigError(
                f"{self.name} {found}; --reindex takes a column of numbers or texts",
                hint="name the column by which the trainer finds an item",
            )
        return at

    def records(self, reading: PromptReading, id_column: str | None) -> Iterator[dict[str, Any]]:
        """Every item, with the columns that identify its prompt."""
        present = self.file.schema_arrow.names
        if id_column is not None and id_column not in present:
            raise ConfigError(f"{self.name} has no column {id_column}; it has {', '.join(present)}", hint="set --id-column")
        wanted = reading.choose(present) if id_column is None else [id_column]
        to_decode = decoders(self.file.schema_arrow, wanted)
        for batch in self.file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
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
                if self.reindex >= 0:
                    field = table.schema.field(self.reindex)
                    table = table.set_column(self.reindex, field, numbers.cast(field.type))  # noqa: PLW2901
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
