"""Prompts in Parquet files and in Hugging Face datasets saved on disk.

Every row becomes one record, and ``core.prompts.prompt_of`` decides what it means. Files are read batch by batch with
pyarrow alone: no ``datasets``, no pandas, nothing unpickled. Binary columns are left out, unless they have the name of a
prompt field.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from embstore.core.config import USUAL_FIELDS, PromptFields
from embstore.core.decode import parse_json, shown
from embstore.core.errors import CorruptStoreError, PromptError

_PARQUET_MAGIC = b"PAR1"
_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20  # per column of a Parquet file; without it pyarrow reads a whole row group
_INSTALL = "pip install 'embstore[parquet]'"


def is_table(source: Path) -> bool:
    """Whether ``source`` is a folder or a Parquet file, by content."""
    with contextlib.suppress(OSError, ValueError):  # the caller opens it as a file and reports the problem
        if source.is_dir():
            return True
        with source.open("rb") as file:
            return file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    return False


def table_lines(source: Path) -> Iterator[bytes]:
    """Rows of a table as JSON lines by rule 1, for stores from before December 2026, and for whoever reads lines."""
    for record in table_records(source, None):
        yield json.dumps(_plain(record)).encode() + b"\n"


def table_records(source: Path, fields: PromptFields | None = USUAL_FIELDS) -> Generator[dict[str, Any], None, None]:
    """Rows of a Parquet file, of a folder of them in the order of their names, or of a saved dataset, as Python values.

    ``fields`` name binary columns that are text; None: there are none.

    Raises
    ------
    PromptError
        pyarrow is missing, or the file or folder is damaged or of another kind.
    """
    if source.is_dir() and not (source / _STATE).is_file() and not _parquet_files(source):
        raise _no_table(source)
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
    except ImportError:
        raise PromptError(f"reading {source} needs pyarrow", hint=_INSTALL) from None
    try:
        for batch in _batches(source, _texts(fields)):
            decode = _decoder(pa.struct(batch.schema)) if fields is not None else None
            for record in batch.to_pylist():
                yield record if decode is None else decode(record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"reading prompts {source} failed: {error}", hint="the file is damaged or truncated") from error


def _texts(fields: PromptFields | None) -> frozenset[str]:
    """Columns that are text, also where they are stored as bytes."""
    return fields.names | {"conversations", "conversation", "tools", "chat_template_kwargs"} if fields else frozenset()


def _batches(source: Path, texts: frozenset[str]) -> Iterator[Any]:
    if source.is_file():
        yield from _parquet_batches(source, texts)
    elif (source / _STATE).is_file():
        for path in _saved_files(source):
            yield from _arrow_batches(path, texts)
    else:
        for path in _parquet_files(source):
            yield from _parquet_batches(path, texts)


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def _parquet_batches(path: Path, texts: frozenset[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        columns = [field.name for field in file.schema_arrow if field.name in texts or not _is_binary(field.type)]
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False)


def _arrow_batches(path: Path, texts: frozenset[str]) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415 - an extra

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            batch.validate(full=True)  # offsets in a damaged file may point anywhere
            kept = batch.select([field.name for field in batch.schema if field.name in texts or not _is_binary(field.type)])
            for start in range(0, kept.num_rows, _BATCH_ROWS):
                yield kept.slice(start, _BATCH_ROWS)


def _saved_files(folder: Path) -> list[Path]:
    """Data files of a dataset that ``save_to_disk`` wrote, in order."""
    state = _document(folder / _STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PromptError(f"{folder / _STATE} does not name data files", hint="save the dataset again with save_to_disk")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise PromptError(
            f"{folder} is a dataset with an index file that selects rows",
            hint="call flatten_indices() on it, then save_to_disk",
        )
    return [folder / str(name) for name in names]


def _no_table(folder: Path) -> PromptError:
    if (folder / _SPLITS).is_file():
        splits = _document(folder / _SPLITS)
        names = splits.get("splits") if isinstance(splits, dict) else None
        first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "train"
        return PromptError(f"{folder} contains several splits: {shown(names)}", hint=f"give one of them: {folder}/{first}")
    return PromptError(
        f"{folder} contains neither Parquet files nor a saved dataset",
        hint="give a JSONL or Parquet file, or a folder written by save_to_disk of the datasets library",
    )


def _document(path: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        return parse_json(path.read_bytes(), name=str(path))
    except CorruptStoreError as error:
        raise PromptError(str(error), hint="save the dataset again with save_to_disk") from error


def _is_binary(kind: Any) -> bool:  # noqa: ANN401 - a pyarrow type
    from pyarrow import types  # noqa: PLC0415 - an extra

    is_view = getattr(types, "is_binary_view", lambda _: False)  # newer than the oldest supported version
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or is_view(kind))


def _decoder(kind: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401 - a pyarrow type
    """What replaces JSON text in a value of this type by what it stands for, where its type says so (``arrow.json``)."""
    from pyarrow import types  # noqa: PLC0415 - an extra

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _from_json
    if types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _decoder(field.type)) is not None}
        return (lambda value: value and {**value, **{name: inner[name](value[name]) for name in inner}}) if inner else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _decoder(kind.value_type)
        return (lambda value: value and [item(each) for each in value]) if item is not None else None
    return None


def _from_json(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of a table
    """The value as JSON can express it."""
    if isinstance(value, dict):
        plain = {str(name): _plain(item) for name, item in value.items()}
        return {name: item for name, item in plain.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)
