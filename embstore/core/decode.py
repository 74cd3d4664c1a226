"""Untrusted bytes to values: JSON, records, array headers. Any bytes give either a value or a typed error.

A store may come from a stranger, with matching checksums, so every range, digest and size is checked here, and nowhere
downstream again. Pure: no files, no numpy, nothing is evaluated or unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar

from embstore.core.errors import CorruptStoreError

# Python's JSON fails at a depth that depends on the caller's stack: what one run accepted, another could not read back.
MAX_NESTING = 100
# every integer of the format is a count, a size or a position
MAX_INTEGER = (1 << 63) - 1
# an .npy header of version 1.0 is read from this many bytes; numpy writes 118 for any plain array
HEADER_BYTES = 1024

Sha256 = Annotated[str, re.compile(r"[0-9a-f]{64}")]
Crc32c = Annotated[str, re.compile(r"[0-9a-f]{8}")]

_Record = TypeVar("_Record")

_HINT = "run embstore verify STORE"
_ARRAY_MAGIC = b"\x93NUMPY\x01\x00"
_FOREIGN_MAGICS = (_ARRAY_MAGIC, b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00")
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:b1|[iu][1248]|f[248]))', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\),? ?\} *\n"
)
_FOREIGN_HEADER = re.compile(_ARRAY_HEADER.pattern.replace(rb"(?:b1|[iu][1248]|f[248])", rb"[A-Za-z]\d{0,9}"))
# control characters (terminal escape sequences begin with one), line separators, bidirectional overrides, lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHOWN_CHARACTERS = 60
_HINTS: dict[type, dict[str, Any]] = {}


def printable(text: str) -> str:
    r"""The text, with characters escaped that a terminal would act on instead of showing.

    Examples
    --------
    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    """JSON of the same value, with the same characters escaped; they occur only in strings. Line breaks stay."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def shown(value: object) -> str:
    """An untrusted value for use in a message: one short line."""
    text = repr(value)
    return printable(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def words_of(error: object, characters: int = 300) -> str:
    r"""What an error of another library says, on one line: as many whole sentences as fit, or one that is visibly cut.

    Examples
    --------
    >>> words_of(ValueError("Not found. Set 'OFFLINE=0'.\nTry again."), 30)
    "Not found. Set 'OFFLINE=0'."
    >>> words_of(KeyError()), words_of("a very long sentence", 12)
    ('KeyError', 'a very long...')
    """
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if len(text) <= characters:
        return text
    end = text.rfind(". ", 0, characters)
    return text[: end + 1] if end > 0 else text[: characters + 1].rsplit(" ", 1)[0][:characters] + "..."


def parse_json(content: bytes, *, name: str, levels: int = MAX_NESTING) -> Any:  # noqa: ANN401 - JSON
    """JSON of a store file: UTF-8, finite numbers, unique keys, no lone surrogates, at most ``levels`` deep.

    Raises
    ------
    CorruptStoreError
        Anything else.
    """
    try:
        text = content.decode()
        value = json.loads(text, parse_constant=refuse_constant, parse_float=parse_finite, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise CorruptStoreError(f"{name} is not valid JSON ({str(error)[:80]})", hint=_HINT) from error
    except RecursionError:
        raise CorruptStoreError(f"{name} is nested more than {levels} levels deep", hint=_HINT) from None
    if is_too_deep(text, value, levels):
        raise CorruptStoreError(f"{name} is nested more than {levels} levels deep", hint=_HINT)
    if has_lone_surrogate(text, value):
        raise CorruptStoreError(f"{name} contains a lone surrogate, which is not valid Unicode", hint=_HINT)
    return value


def refuse_constant(literal: str) -> object:
    """``parse_constant`` for JSON: refuses NaN and infinities."""
    raise ValueError(f"{literal} is not a JSON number")


def parse_finite(literal: str) -> float:
    """``parse_float`` for JSON: refuses numbers beyond float64."""
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {literal[:20]} is too large")
    return value


def is_too_deep(text: str, value: object, levels: int = MAX_NESTING) -> bool:
    """Whether parsed JSON is nested deeper than ``levels``; for most text this takes only two counts."""
    if text.count("[") + text.count("{") <= levels:
        return False
    layer: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        children = (list(item.values()) if isinstance(item, dict) else item for item in layer)
        layer = [child for values in children for child in values if isinstance(child, dict | list)]
    return bool(layer)


def has_lone_surrogate(text: str, value: object) -> bool:
    """Whether parsed JSON has half a character (backslash-u-d800), which neither tokenizers nor UTF-8 files accept."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def from_json(record_type: type[_Record], value: object, *, name: str) -> _Record:
    """A frozen record from parsed JSON, nested records included; fields must match exactly.

    Integers must lie in 0..2**63 - 1, and a field annotated with a pattern must match it.

    Raises
    ------
    CorruptStoreError
        A field is missing, unknown, of another JSON type, or out of range.
    """
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name}: expected an object, found {type(value).__name__}", hint=_HINT)
    hints = _hints(record_type)
    if value.keys() != hints.keys():
        unlike = ", ".join(printable(field)[:_SHOWN_CHARACTERS] for field in sorted(value.keys() ^ hints.keys())[:10])
        raise CorruptStoreError(f"{name}: fields missing or unknown: {unlike}", hint=_HINT)
    return record_type(**{field: _convert(hints[field], value[field], f"{name}.{field}") for field in hints})


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayHeader:
    """The header of an ``.npy`` file; values begin at byte ``offset``."""

    descr: str
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int


def decode_array_header(start: bytes, *, name: str, foreign: bool = False) -> ArrayHeader:
    """Read the header of a plain ``.npy`` array (version 1.0) from the first ``HEADER_BYTES`` of its file.

    numpy's own reader evaluates the header as Python, and also reads pickled arrays and archives; this one does not.
    ``foreign``: the file is not a store's, so it may be of version 2.0 or 3.0, and of any type that is not structured.

    Raises
    ------
    CorruptStoreError
        The bytes are not such a header.
    """
    has_magic = start.startswith(_FOREIGN_MAGICS if foreign else _ARRAY_MAGIC)
    begin = 10 if start[6:7] == b"\x01" else 12
    size = int.from_bytes(start[8:begin], "little")
    pattern = _FOREIGN_HEADER if foreign else _ARRAY_HEADER
    found = pattern.fullmatch(start, begin, min(begin + size, len(start))) if has_magic else None
    lengths = [part.strip() for part in found[3].split(b",") if part.strip()] if found else []
    is_shape = len(lengths) <= 32 and all(part.isdigit() and int(part) <= MAX_INTEGER for part in lengths)
    if found is None or len(start) < begin + size or not is_shape:
        raise CorruptStoreError(f"{name} is not a plain .npy array", hint=_HINT)
    return ArrayHeader(
        descr=found[1].decode(),
        shape=tuple(int(part) for part in lengths),
        is_fortran=found[2] == b"True",
        offset=begin + size,
    )


def _hints(record_type: type) -> dict[str, Any]:
    if record_type not in _HINTS:  # a journal has thousands of records of five types
        _HINTS[record_type] = typing.get_type_hints(record_type, include_extras=True)
    return _HINTS[record_type]


def _convert(hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401, PLR0911 - type hints are data here
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if NoneType in arguments:
        return None if value is None else _convert(arguments[0], value, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, name=name)
    if origin is Annotated:
        if not isinstance(value, str) or not arguments[1].fullmatch(value):
            raise CorruptStoreError(f"{name}: expected {arguments[1].pattern}, found {shown(value)}", hint=_HINT)
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise CorruptStoreError(f"{name}: expected one of {', '.join(arguments)}, found {shown(value)}", hint=_HINT)
        return value
    expected: Any = origin if origin in (list, dict) else float | int if hint is float else hint
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise CorruptStoreError(f"{name}: expected {_plain(hint)}, found {type(value).__name__}", hint=_HINT)
    if origin is list:
        return [_convert(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return {key: _convert(arguments[1], item, f"{name}.{shown(key)}") for key, item in value.items()}
    if type(value) is int and not 0 <= value <= MAX_INTEGER:
        raise CorruptStoreError(f"{name}: expected 0 to {MAX_INTEGER}, found {shown(value)}", hint=_HINT)
    return value


def _plain(hint: Any) -> str:  # noqa: ANN401 - type hints are data here
    return hint.__name__ if isinstance(hint, type) else str(hint)


class RepeatedKeyError(ValueError):
    """An object has two values of one name; readers differ in which counts."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for JSON that raises RepeatedKeyError."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise RepeatedKeyError(f"the key {shown(twice)} occurs twice in an object")
    return value
