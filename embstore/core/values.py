"""The canonical form of values: one spelling for what JSON, Arrow, numpy, pandas and ``datasets`` write differently.

A table has every field on every row and in every message, null where it does not apply. pandas gives lists as arrays, and
integers of a column with gaps as floats. ``plain`` undoes this (docs/decisions/0049). Pure.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from embstore.core.decode import MAX_NESTING

JsonValue = Any  # None, bool, int, finite float, str, list or dict

TOO_DEEP = f"nested more than {MAX_NESTING} levels deep"
LONE_SURROGATE = "contains a lone surrogate, which is not valid Unicode"

# The order in which people and templates write these keys; the others follow by name. Templates print nested objects as they
# are, and a model has seen them in this order.
_FIRST_KEYS = ("role", "content", "id", "type", "function", "name", "description", "parameters", "properties", "required")
_RANKS = {name: rank for rank, name in enumerate(_FIRST_KEYS)}
_EXACT_FLOAT = 1 << 53  # larger floats do not say which integer was meant
_MISSING = ("NAType", "NaTType")  # pandas' own nulls, without importing pandas


class Unusable(Exception):
    """A value that no prompt may contain; the text is the reason that ``quarantine.jsonl`` states."""


class Opaque(Unusable):
    """A value that JSON cannot express, such as an image; as another field of a line it is left out."""


class Unreadable:
    """Stands in for a value of a table that Python cannot express: only a prompt that it belongs to is lost.

    ``plain`` calls ``as_py`` as of any value of pyarrow, and gets the reason.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def as_py(self) -> object:
        """Raise Opaque with the reason."""
        raise Opaque(self._reason)


def plain(value: object, levels: int = MAX_NESTING - 1) -> JsonValue:  # noqa: PLR0911 - one return per kind
    """The value as JSON expresses it, in its one spelling.

    Objects lose their null fields and have their keys in one order, integral floats are integers, NaN and infinities are
    null, bytes are UTF-8 text, arrays of any library are lists, dates and decimals are text.

    Parameters
    ----------
    value
        As Python, numpy, pandas or pyarrow give it.
    levels
        How deep it may be nested: what a line of ``MAX_NESTING`` levels has left.

    Raises
    ------
    Unusable
        Too deep, or not valid Unicode.
    Opaque
        Of a type that JSON does not have.

    Examples
    --------
    >>> plain({"unit": None, "city": "Oslo", "days": 2.0, "name": b"weather"})
    {'name': 'weather', 'city': 'Oslo', 'days': 2}
    """
    kind = type(value)
    if kind is str:
        return valid_text(value)  # type: ignore[arg-type]
    if value is None or kind is bool or kind is int:
        return value
    if kind is float:
        return _number(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return _object(value, levels)
    if isinstance(value, list | tuple):
        _descend(levels)
        if value and all(type(item) is tuple and len(item) == 2 and isinstance(item[0], str) for item in value):
            return _object(dict(value), levels)  # a map of Arrow
        return [plain(item, levels - 1) for item in value]
    return _foreign(value, levels)


def as_json(value: Any, *, drops_nulls: bool) -> JsonValue:  # noqa: ANN401 - any value of a table or dataset
    """The value as rule 1 wrote it into a line: bytes as hex, dates and decimals as text, without NaN and infinities.

    ``drops_nulls``: objects lose their null fields, as those of tables did.
    """
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        value = value.tolist()
    if isinstance(value, Unreadable):
        return None
    if isinstance(value, Mapping):
        items = {str(name): as_json(item, drops_nulls=drops_nulls) for name, item in value.items()}
        return {name: item for name, item in items.items() if item is not None} if drops_nulls else items
    if isinstance(value, list | tuple):
        return [as_json(item, drops_nulls=drops_nulls) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)


def valid_text(text: str) -> str:
    """The text, if a UTF-8 file can hold it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable(LONE_SURROGATE) from None
    return text


def _descend(levels: int) -> None:
    if levels < 1:
        raise Unusable(TOO_DEEP)


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) <= _EXACT_FLOAT else value


def _object(value: Mapping[Any, object], levels: int) -> dict[str, JsonValue]:
    _descend(levels)
    items = {plain_key(name): plain(item, levels - 1) for name, item in value.items() if item is not None}
    return {name: items[name] for name in sorted(items, key=_rank) if items[name] is not None}


def plain_key(name: object) -> str:
    """The name of a field as text."""
    return valid_text(name if isinstance(name, str) else str(plain(name)))


def _rank(name: str) -> tuple[int, str]:
    return _RANKS.get(name, len(_RANKS)), name


def _foreign(value: Any, levels: int) -> JsonValue:  # noqa: ANN401 - of any library
    name = type(value).__name__
    if name in _MISSING:
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise Opaque(f"bytes that are not UTF-8 (byte {error.start})") from None
    for base in (bool, int, float, str):  # subclasses, such as numpy.float64 and enumerations
        if isinstance(value, base):
            return plain(base(value), levels)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    # arrays and scalars of numpy, pandas, torch, pyarrow and polars, by the method that each has
    for method in ("tolist", "to_pylist", "as_py", "to_list"):
        convert: Callable[[], object] | None = getattr(value, method, None)
        if callable(convert):
            return plain(convert(), levels)
    raise Opaque(f"a value of type {name}")
