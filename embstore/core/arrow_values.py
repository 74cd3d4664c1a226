"""Rows of Arrow tables as Python values, where the types of columns say more than the values do.

JSON types are decoded, binary columns are named: some writers do not mark text as text, but most such columns are pictures.
Types are looked at through pyarrow, which is an extra, so this is for whoever has a table in hand.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from embstore.core.decode import unique_keys
from embstore.core.values import Unreadable

Decoder = Callable[[Any], Any]

_JSON_TYPE, _UUID_TYPE = "arrow.json", "arrow.uuid"
# checks for types of text, and the types that hold the same bytes; views are newer than pyarrow 17
_BINARY = {"is_string": "binary", "is_large_string": "large_binary", "is_string_view": "binary_view"}
# what pyarrow raises for one value, also through Python's dates and time zones; a lack of memory is something else
_BAD_VALUE = (ArithmeticError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)


class _BadJson(ValueError):
    """A value of a JSON column that is not JSON."""


def records(
    batch: Any,  # noqa: ANN401 - pyarrow's
    decoders: dict[str, Decoder],
    wanted: frozenset[str] | None,
) -> Iterator[dict[str, object]]:
    """Rows of a batch as values that ``prompts.prompt_of`` takes. A bad value costs nothing but itself.

    ``wanted`` are the fields of a prompt; None for rule 1 of prompts. Bad JSON in another field is text.
    """
    for record in _rows(batch):
        for name, decode in decoders.items():
            value = _read(record[name], decode)
            if name in (wanted or ()) or not isinstance(value, Unreadable):
                record[name] = value
        yield record


def values(column: Any, decode: Decoder | None = None) -> list[object]:  # noqa: ANN401 - a pyarrow array
    """Values of a column as ``prompts.prompt_of`` takes them. A bad value costs nothing but itself."""
    found = _values(column)
    return found if decode is None else [_read(value, decode) for value in found]


def _read(value: object, decode: Decoder) -> object:
    try:
        return value if isinstance(value, Unreadable) else decode(value)
    except _BadJson as error:
        return Unreadable(f"JSON that cannot be read ({str(error)[:80]})")


def _rows(batch: Any) -> list[dict[str, object]]:  # noqa: ANN401 - pyarrow's
    with contextlib.suppress(*_BAD_VALUE):
        rows: list[dict[str, object]] = batch.to_pylist()
        return rows
    columns = [_values(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[object]:  # noqa: ANN401 - a pyarrow array
    """Values as Python's; text that is not UTF-8 is bytes, what pyarrow cannot give is ``Unreadable``."""
    with contextlib.suppress(*_BAD_VALUE):
        values: list[object] = column.to_pylist()
        return values
    if hasattr(column, "chunks"):
        return [value for chunk in column.chunks for value in _values(chunk)]
    with contextlib.suppress(*_BAD_VALUE):
        column = column.view(_loose(column.type))
    return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> object:  # noqa: ANN401 - pyarrow's
    try:
        return _text(scalar.as_py())
    except _BAD_VALUE as error:
        return Unreadable(f"a value that cannot be read ({str(error)[:80]})")


def _text(value: object) -> object:
    """The value with those of its bytes as text that are UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list | tuple):
        return type(value)(map(_text, value)) if type(value) in (list, tuple) else value
    return {name: _text(item) for name, item in value.items()} if isinstance(value, dict) else value


def check_batch(batch: Any) -> None:  # noqa: ANN401 - pyarrow's
    """Raise pyarrow's error if offsets or indices of a damaged file point anywhere; a bad value alone is not damage."""
    batch.validate()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except _BAD_VALUE:
            column.view(_loose(column.type, any_number=True)).validate(full=True)


def _loose(kind: Any, *, any_number: bool = False) -> Any:  # noqa: ANN401, PLR0911 - a pyarrow type
    """The type with binary values in place of text, and with plain numbers in place of times and decimals."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    from pyarrow import types  # noqa: PLC0415

    def inner(field: Any) -> Any:  # noqa: ANN401
        return field.with_type(_loose(field.type, any_number=any_number))

    if getattr(kind, "extension_name", None) == _JSON_TYPE:
        kind = kind.storage_type
    for is_text, binary in _BINARY.items():
        if hasattr(types, is_text) and getattr(types, is_text)(kind):
            return getattr(pa, binary)()
    if types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        return (pa.list_ if types.is_list(kind) else pa.large_list)(inner(kind.value_field))
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _loose(kind.value_type, any_number=any_number), kind.ordered)
    if any_number and (types.is_time(kind) or types.is_date64(kind)):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    return pa.binary(kind.bit_width // 8) if any_number and types.is_decimal(kind) else kind


def kept_columns(schema: Any, wanted: frozenset[str] | None) -> list[str]:  # noqa: ANN401 - pyarrow's
    """Columns to read: those in ``wanted``, and others that have no binary values and share no name.

    None: as rule 1 of prompts did.
    """
    if wanted is None:
        return [field.name for field in schema if not _is_binary(field.type)]
    times = Counter(schema.names)
    return [
        field.name for field in schema if field.name in wanted or not (times[field.name] > 1 or _holds_binary(field.type))
    ]


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
    found = {field.name: decoder(field.type, field.metadata) for field in schema if field.name in columns}
    return {name: decode for name, decode in found.items() if decode is not None}


def decoder(kind: Any, metadata: Any = None) -> Decoder | None:  # noqa: ANN401 - pyarrow's
    """What decodes the JSON inside values of a type; None if it has none."""
    from pyarrow import types  # noqa: PLC0415 - an extra

    extension = getattr(kind, "extension_name", (metadata or {}).get(b"ARROW:extension:name", b"").decode())
    if extension == _JSON_TYPE:
        return _decoded
    kind = _stored(kind)
    if types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := decoder(field.type, field.metadata)) is not None}
        return _of_struct(inner) if inner else None
    item = kind.item_field if types.is_map(kind) else getattr(kind, "value_field", None)
    decode = decoder(item.type, item.metadata) if item is not None else None
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
