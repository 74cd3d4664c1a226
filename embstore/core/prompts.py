"""One prompt: how an input line becomes a canonical row, and how a row is identified. Pure functions on bytes and values.

Identity is content, never position: rows with the same whitespace-collapsed text, or the same messages, are one row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from embstore.core.config import USUAL_FIELDS, PromptFields
from embstore.core.decode import (
    MAX_NESTING,
    has_lone_surrogate,
    is_too_deep,
    parse_finite,
    parse_json,
    refuse_constant,
)
from embstore.core.errors import CorruptStoreError
from embstore.core.format import PROMPTS, canonical_json

Message = Mapping[str, object]

_TOO_DEEP = f"nested more than {MAX_NESTING} levels deep"
_LONE_SURROGATE = "contains a lone surrogate, which is not valid Unicode"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as written: either ``text`` or ``messages`` is set; ``fields`` are the line's other fields (such as src).

    ``text`` is empty only for a row of an imported array that was given without a text.
    """

    id: str | None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """Row identity where prompts are embedded: sha256 of the canonical rendering (32 bytes)."""
        if self.messages is not None:
            return hashlib.sha256(b"messages\0" + canonical_json(list(self.messages)).encode()).digest()
        return hashlib.sha256(b"text\0" + collapse_whitespace(self.text or "").encode()).digest()

    @property
    def id_digest(self) -> bytes:
        """Row identity where an array is imported: sha256 of the id (32 bytes), since a row may have no text."""
        return hashlib.sha256(b"id\0" + (self.id or "").encode()).digest()

    @property
    def verbatim_digest(self) -> bytes:
        """sha256 of exactly what the model reads (32 bytes); prompts of equal ``digest`` may differ in it by whitespace."""
        content = list(self.messages) if self.messages is not None else self.text
        return hashlib.sha256(json.dumps(content).encode()).digest()

    @property
    def derived_id(self) -> str:
        """First 16 hex digits of md5 of the whitespace-collapsed first user message or text, as in existing artefacts."""
        return hashlib.md5(collapse_whitespace(self._first_user_text()).encode(), usedforsecurity=False).hexdigest()[:16]

    @property
    def rendered(self) -> str:
        """The prompt as one string that needs no tokenizer: the text itself, or ``role: content`` lines."""
        if self.messages is not None:
            return render_messages(self.messages)
        return self.text or ""

    def _first_user_text(self) -> str:
        for message in self.messages or ():
            if message["role"] == "user":
                return str(message["content"])
        return self.rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A line without a usable prompt, with the reason that ``quarantine.jsonl`` states."""

    reason: str


def parse_line(line: bytes, names: PromptFields = USUAL_FIELDS) -> Prompt | Rejected:
    """Read one JSONL line.

    Accepts ``prompt`` (text), ``messages`` (a chat list) or ``prefix`` (``{"messages": [...]}`` or text), in this order; or
    the fields that ``names`` gives, text first.

    Examples
    --------
    >>> parse_line(b'{"prompt": "2 + 2?", "src": "maths"}').fields
    {'src': 'maths'}
    >>> parse_line(b'{"prompt": "  "}')
    Rejected(reason='the prompt is empty')
    >>> parse_line(b'{"question": "2 + 2?", "prompt": 7}', PromptFields(text="question")).text
    '2 + 2?'
    """
    record = _decode_object(line)
    if isinstance(record, Rejected):
        return record
    given = record.get(names.id or "id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        return Rejected(reason=f"the id is neither text nor a whole number but {type(given).__name__}")
    row_id = str(given) if given not in (None, "") else None
    fields = {name: value for name, value in record.items() if name not in names.names}
    content = _content(record, names)
    if isinstance(content, str):
        if not content.strip():
            return Rejected(reason="the prompt is empty")
        return Prompt(id=row_id, text=content, fields=fields)
    if content is None:
        looked_at = [name for name in (names.text, names.messages) if name is not None] or ["prompt", "messages", "prefix"]
        return Rejected(reason=f"no text: none of the fields {', '.join(looked_at)}")
    return _chat(row_id, content, fields)


def parse_named_row(line: bytes) -> Prompt | Rejected:
    """Read one JSONL line that names a row of an array: as ``parse_line``, but it may have no text, or be a bare id.

    Examples
    --------
    >>> parse_named_row(b'{"id": 7, "src": "maths"}')
    Prompt(id='7', text='', messages=None, fields={'src': 'maths'})
    >>> parse_named_row(b'"seven"').id
    'seven'
    """
    try:
        bare = json.loads(line) if line[:1] in b'"-0123456789' else None
    except ValueError:
        bare = None
    if bare is not None:
        return named_row(bare)
    record = _decode_object(line)
    if isinstance(record, Rejected):
        return record
    if all(record.get(name) is None for name in ("prompt", "messages", "prefix")):
        fields = {name: value for name, value in record.items() if name not in USUAL_FIELDS.names}
        named = named_row(record["id"]) if "id" in record else Prompt(id=None, text="")
        return named if isinstance(named, Rejected) else replace(named, fields=fields)
    return parse_line(line)


def named_row(value: object) -> Prompt | Rejected:
    """A row with an id and without a text.

    Examples
    --------
    >>> named_row(True)
    Rejected(reason='the id is neither text nor a whole number but bool')
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        return Rejected(reason=f"the id is neither text nor a whole number but {type(value).__name__}")
    if value == "" or has_lone_surrogate(str(value), value):
        return Rejected(reason="the id is empty" if value == "" else _LONE_SURROGATE)
    return Prompt(id=str(value), text="")


def _content(record: Mapping[str, Any], names: PromptFields) -> object:
    """Text or messages of a line, None if it has neither."""
    # in tables exported as JSONL every line has every field, null where it does not apply
    if names.text is not None or names.messages is not None:
        chosen = [record.get(name) for name in (names.text, names.messages) if name is not None]
        return next((value for value in chosen if value is not None), None)
    if record.get("prompt") is not None:
        return record["prompt"]
    content = record["messages"] if record.get("messages") is not None else record.get("prefix")
    if isinstance(content, dict):
        return content.get("messages")
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def collapse_whitespace(text: str) -> str:
    r"""Strip, and turn each run of whitespace into one space.

    Examples
    --------
    >>> collapse_whitespace("  a\n\t b ")
    'a b'
    """
    return " ".join(text.split())


def render_messages(messages: Sequence[Message]) -> str:
    """``role: content`` lines: the rendering for tokenizers without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def encode_row(prompt: Prompt) -> bytes:
    """The canonical line of a row in ``prompts.jsonl``, newline included; ``decode_row`` reads it back."""
    record: dict[str, object] = {"id": prompt.id}
    if prompt.messages is not None:
        record["messages"] = list(prompt.messages)
    else:
        record["prompt"] = prompt.text
    if prompt.fields:
        record["fields"] = dict(prompt.fields)
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def decode_row(line: bytes) -> Prompt:
    """A row of ``prompts.jsonl`` that ``encode_row`` wrote; any other line raises CorruptStoreError."""
    # the line's own fields are nested one level deeper than in the input
    record = parse_json(line, name=PROMPTS, levels=MAX_NESTING + 1)
    if isinstance(record, dict) and isinstance(record.get("id"), str | None) and isinstance(record.get("fields", {}), dict):
        content = record.get("prompt", record.get("messages"))
        if isinstance(content, str):
            return Prompt(id=record.get("id"), text=content, fields=record.get("fields", {}))
        prompt = _chat(record.get("id"), content, record.get("fields", {}))
        if isinstance(prompt, Prompt):
            return prompt
    raise CorruptStoreError(f"{PROMPTS}: a row is not a prompt ({_start(line)})", hint="run embstore verify STORE")


def _decode_object(line: bytes) -> dict[str, Any] | Rejected:  # noqa: PLR0911 - one return per reason
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(reason=f"not UTF-8 (byte {error.start})")
    if not text.strip():
        return Rejected(reason="empty line")
    try:
        record = json.loads(text, parse_constant=refuse_constant, parse_float=parse_finite)
    except ValueError as error:
        return Rejected(reason=f"not JSON ({str(error)[:80]})")
    except RecursionError:
        return Rejected(reason=_TOO_DEEP)
    if not isinstance(record, dict):
        return Rejected(reason=f"not a JSON object but {type(record).__name__}")
    if is_too_deep(text, record):
        return Rejected(reason=_TOO_DEEP)
    if has_lone_surrogate(text, record):
        return Rejected(reason=_LONE_SURROGATE)
    return record


def _chat(row_id: str | None, content: object, fields: Mapping[str, object]) -> Prompt | Rejected:
    if not isinstance(content, list):
        return Rejected(reason=f"the prompt is neither text nor a list of messages but {type(content).__name__}")
    if not content:
        return Rejected(reason="the list of messages is empty")
    for position, message in enumerate(content):
        if not isinstance(message, dict):
            return Rejected(reason=f"message {position} is not an object")
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return Rejected(reason=f"message {position} lacks a text role or text content")
    if not any(message["content"].strip() for message in content):
        return Rejected(reason="every message is empty")
    return Prompt(id=row_id, messages=tuple(content), fields=fields)


def _start(line: bytes) -> str:
    return ascii(line[:60].decode(errors="replace"))
