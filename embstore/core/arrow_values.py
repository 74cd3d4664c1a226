"""Rows of Arrow tables as Python values, where the types of columns say more than the values do.

JSON types are decoded, binary columns are named: some writers do not mark text as text, but most such columns are pictures.
Types are looked at through pyarrow, which is an extra, so this is for whoever has a table in hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from embstore.core.decode import unique_keys
from embstore.core.prompts import Rejected

Decoder = Callable[[Any], Any]

_JSON_TYPE, _UUID_TYPE = "arrow.json", "arrow.uuid"


class _BadJson(ValueError):
    """A value of a JSON column that is not JSON."""


def records(
    batch: Any,  # noqa: ANN401 - pyarrow's
    decoders: dict[str, Decoder],
    wanted: frozenset[str] | None,
) -> Iterator[dict[str, object] | Rejected]:
    """Rows of a batch as values that ``prompts.prompt_of`` takes; one whose field in ``wanted`` is bad JSON is rejected."""
    for record in _rows(batch):
        reason = None
        for name, decode in decoders.items():
            try:
                record[name] = decode(record[name])
            except _BadJson as error:
                # another field may hold anything; a prompt that cannot be read is lost
                reason = f"the JSON of field {name} cannot be read ({str(error)[:80]})" if name in (wanted or ()) else reason
        yield record if reason is None else Rejected(reason=reason)


def _rows(batch: Any) -> list[dict[str, object]]:  # noqa: ANN401 - pyarrow's
    """Rows as Python values; texts that are not UTF-8 as bytes, so that only their rows are bad."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    try:
        rows: list[dict[str, object]] = batch.to_pylist()
    except UnicodeDecodeError:
        texts = {name: column.cast(pa.binary()) for name, column in zip(batch.schema.names, batch.columns, strict=True)
                 if pa.types.is_string(column.type)}  # fmt: skip
        for name, column in texts.items():
            batch = batch.set_column(batch.schema.names.index(name), name, column)
        rows = batch.to_pylist()
    return rows


def kept_columns(schema: Any, wanted: frozenset[str] | None) -> list[str]:  # noqa: ANN401 - pyarrow's
    """Columns to read: those in ``wanted``, and others without binary values. None: as rule 1 of prompts did."""
    if wanted is None:
        return [field.name for field in schema if not _is_binary(field.type)]
    return [field.name for field in schema if field.name in wanted or not _holds_binary(field.type)]


def _is_binary(kind: Any) -> bool:  # noqa: ANN401 - a pyarrow type
    from pyarrow import types  # noqa: PLC0415 - an extra

    names = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")  # the last is newer than pyarrow 17
    return any(getattr(types, name)(kind) for name in names if hasattr(types, name))


def _holds_binary(kind: Any) -> bool:  # noqa: ANN401 - a pyarrow type
    kind = _stored(kind)
    return _is_binary(kind) or any(_holds_binary(inner.type) for inner in _inner(kind))


def _stored(kind: Any) -> Any:  # noqa: ANN401 - a pyarrow type
    """The type without its dictionary or extension; a UUID is shown as text."""
    while True:
        if hasattr(kind, "storage_type"):
            import pyarrow as pa  # noqa: PLC0415 - an extra

            kind = pa.string() if kind.extension_name == _UUID_TYPE else kind.storage_type
        elif hasattr(kind, "index_type"):
            kind = kind.value_type
        else:
            return kind


def _inner(kind: Any) -> list[Any]:  # noqa: ANN401 - a pyarrow type
    """Fields of a struct, and of the items of a list or map."""
    return [kind.field(number) for number in range(kind.num_fields)] if kind.num_fields else []


def decoders(schema: Any, columns: list[str]) -> dict[str, Decoder]:  # noqa: ANN401 - pyarrow's
    """What decodes the JSON inside values of these columns, for those that have any."""
    found = {field.name: _decoder(field.type, field.metadata) for field in schema if field.name in columns}
    return {name: decode for name, decode in found.items() if decode is not None}


def _decoder(kind: Any, metadata: Any) -> Decoder | None:  # noqa: ANN401 - pyarrow's
    """What decodes the JSON inside values of a type; None if it has none."""
    from pyarrow import types  # noqa: PLC0415 - an extra

    extension = getattr(kind, "extension_name", (metadata or {}).get(b"ARROW:extension:name", b"").decode())
    if extension == _JSON_TYPE:
        return _decoded
    kind = _stored(kind)
    if types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _decoder(field.type, field.metadata)) is not None}
        return _of_struct(inner) if inner else None
    item = kind.item_field if types.is_map(kind) else getattr(kind, "value_field", None)
    decode = _decoder(item.type, item.metadata) if item is not None else None
    return _of_items(decode, is_map=types.is_map(kind)) if decode is not None else None


def _of_items(decode: Decoder, *, is_map: bool) -> Decoder:
    """For the items of a list, or of a map, which is a list of pairs."""
    if is_map:
        return lambda pairs: pairs and [(key, decode(value)) for key, value in pairs]
    return lambda values: values and [decode(value) for value in values]


def _of_struct(decoders: dict[str, Decoder]) -> Decoder:
    def decode(value: dict[str, object] | None) -> object:
        return value and {name: decoders[name](item) if name in decoders else item for name, item in value.items()}

    return decode


def _decoded(text: str | None) -> object:
    try:
        return None if text is None else json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _BadJson(str(error)) from None
