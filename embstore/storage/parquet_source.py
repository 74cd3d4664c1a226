"""Parquet, Feather and Arrow as records: a row is a dict of the values that pyarrow gives, for ``core.prompts.prompt_of``.

Read batch by batch from mapped bytes with pyarrow alone: no ``datasets``, no pandas, nothing unpickled. What only the types
of columns tell is in ``core.arrow_values``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embstore.core.arrow_values import check_batch, decoders, kept_columns, records
from embstore.core.decode import parse_json, shown
from embstore.core.errors import CorruptStoreError, PromptError
from embstore.core.file_kinds import ARROW_FILE, PARQUET
from embstore.core.inputs import INSTALL_PARQUET, Input

STATE = "state.json"
_BATCH_ROWS = 256


def table_records(table: Input, wanted: frozenset[str] | None, scratch: Path | None) -> Iterator[dict[str, object]]:
    """Rows of a Parquet file, an Arrow file (Feather) or an Arrow stream, in order.

    ``wanted`` are the fields of a prompt; None reads a table as rule 1 does (``core.prompts``). Memory is that of
    ``_BATCH_ROWS`` rows, for Arrow files with compressed buffers that of one of their batches.

    Raises
    ------
    PromptError
        pyarrow is missing, the file is damaged, or two of its columns have the name of one field of a prompt.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
    except ImportError:
        raise PromptError(f"reading {table.name} needs pyarrow", hint=INSTALL_PARQUET) from None
    with table.mapped(scratch) as mapped:
        source = pa.BufferReader(pa.py_buffer(mapped))
        try:
            if table.kind is PARQUET:
                yield from _parquet_records(source, wanted, table.name)
            else:
                yield from _arrow_records(source, wanted, table.name, is_file=table.kind is ARROW_FILE)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"reading prompts {table.name} failed: {error}", hint="the file is damaged or truncated"
            ) from error


def _columns(schema: Any, wanted: frozenset[str] | None, name: str) -> list[str]:  # noqa: ANN401 - pyarrow's
    columns = kept_columns(schema, wanted)
    twice = [column for column, times in Counter(columns).items() if times > 1]
    if twice:
        raise PromptError(f"{name} has {columns.count(twice[0])} columns named {shown(twice[0])}", hint="rename all but one")
    return columns


def _parquet_records(source: Any, wanted: frozenset[str] | None, name: str) -> Iterator[dict[str, object]]:  # noqa: ANN401 - pyarrow's
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with pq.ParquetFile(source, pre_buffer=False) as file:
        columns = _columns(file.schema_arrow, wanted, name)
        to_decode = decoders(file.schema_arrow, columns if wanted is not None else [])
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
            yield from records(batch, to_decode, wanted)


def _arrow_records(source: Any, wanted: frozenset[str] | None, name: str, *, is_file: bool) -> Iterator[dict[str, object]]:  # noqa: ANN401
    from pyarrow import ipc  # noqa: PLC0415 - an extra

    opened = ipc.open_file if is_file else ipc.open_stream
    schema = opened(source).schema
    columns = _columns(schema, wanted, name)
    to_decode = decoders(schema, columns if wanted is not None else [])
    # what is not read is not unpacked
    options = ipc.IpcReadOptions(included_fields=[schema.names.index(column) for column in columns])
    source.seek(0)
    reader = opened(source, options=options)
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        check_batch(batch)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from records(batch.slice(start, _BATCH_ROWS), to_decode, wanted)


# --- saved datasets --------------------------------------------------------------------------------------------------


def saved_files(folder: Path) -> list[Path]:
    """Data files of a dataset that ``save_to_disk`` of the ``datasets`` library wrote, in order."""
    state = _document(folder / STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PromptError(f"{folder / STATE} does not name data files", hint="save the dataset again with save_to_disk")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise PromptError(
            f"{folder} is a dataset with an index file that selects rows",
            hint="call flatten_indices() on it, then save_to_disk",
        )
    return [folder / str(name) for name in names]


def saved_splits(document: Path) -> list[str]:
    """Names of the splits that ``dataset_dict.json`` lists; they are folders next to it."""
    found = _document(document)
    names = found.get("splits") if isinstance(found, dict) else None
    return [name for name in names if isinstance(name, str) and Path(name).name == name] if isinstance(names, list) else []


def _document(path: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        return parse_json(path.read_bytes(), name=str(path))
    except CorruptStoreError as error:
        raise PromptError(str(error), hint="save the dataset again with save_to_disk") from error
