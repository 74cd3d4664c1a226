"""One prompt: how an input line becomes a canonical row, and how a row is identified. Pure functions on bytes and values.

Identity is content, never position: rows with the same whitespace-collapsed text, or the same chat, are one row. A chat has
one form, whoever wrote it (``core.chats``): it is what a row's digest covers, what ``prompts.jsonl`` holds, and what the
chat template gets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from embstore.core.chats import chat_of, is_chat_text, refuse_like_chat, template_kwargs_of, tools_of
from embstore.core.config import CURRENT_RULE, FIRST_RULE, USUAL_FIELDS, PromptFields, PromptRule
from embstore.core.decode import (
    MAX_NESTING,
    RepeatedKeyError,
    has_lone_surrogate,
    is_too_deep,
    parse_finite,
    parse_json,
    printable,
    refuse_constant,
    unique_keys,
)
from embstore.core.errors import CorruptStoreError
from embstore.core.format import PROMPTS, canonical_json
from embstore.core.values import LONE_SURROGATE, TOO_DEEP, Opaque, Unusable, plain, plain_key, valid_text

Message = Mapping[str, object]

_TOOLS, _KWARGS = TEMPLATE_FIELDS = "tools", "chat_template_kwargs"  # what a chat may have besides its messages
_SHAREGPT = ("conversations", "conversation")
_NAMED_FIELDS, _NAMED_CHARACTERS = 12, 40  # of a line without a prompt, in its reason
_REASON_CHARACTERS = 700


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt: either ``text``, or ``messages`` with what the chat template gets besides (``tools``, ``template_kwargs``).

    ``fields`` are the line's other fields (such as src). ``is_answered`` says whether the chat ended in an assistant turn as
    it was given. ``text`` is empty only for a row of an imported array that was given without a text.
    """

    id: str | None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, object], ...] | None = None
    template_kwargs: Mapping[str, object] | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    is_answered: bool = field(default=False, compare=False)

    @property
    def digest(self) -> bytes:
        """Row identity where prompts are embedded: sha256 of the canonical rendering (32 bytes)."""
        if self.messages is not None:
            return hashlib.sha256(b"messages\0" + canonical_json(self.chat).encode()).digest()
        return hashlib.sha256(b"text\0" + collapse_whitespace(self.text or "").encode()).digest()

    @property
    def chat(self) -> object:
        """What the chat template gets, as JSON: the messages alone where there is nothing else."""
        messages = list(self.messages or ())
        if self.tools is None and self.template_kwargs is None:
            return messages
        return {"messages": messages, _TOOLS: self.tools, _KWARGS: self.template_kwargs}

    @property
    def id_digest(self) -> bytes:
        """Row identity where an array is imported: sha256 of the id (32 bytes), since a row may have no text."""
        return hashlib.sha256(b"id\0" + (self.id or "").encode()).digest()

    @property
    def verbatim_digest(self) -> bytes:
        """sha256 of exactly what the model reads (32 bytes); prompts of equal ``digest`` may differ in it by whitespace."""
        content = self.chat if self.messages is not None else self.text
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

    def undecoded(self) -> Prompt | None:
        r"""The prompt with its texts decoded, if they are JSON: readers other than pyarrow's give columns of JSON so.

        None where a text is anything but JSON of a text or of a list of parts.

        Examples
        --------
        >>> Prompt(id=None, text='"2 + 2?"').undecoded().text
        '2 + 2?'
        >>> Prompt(id=None, text='"2 + 2" or "4"').undecoded()
        """
        try:
            texts = [self.text] if self.messages is None else [message["content"] for message in self.messages]
            if not all(str(text).lstrip().startswith(('"', "[", "{")) for text in texts):
                return None  # nearly all prompts: an exception for each would cost a tenth of reading them
            if self.messages is None:
                text = json.loads(self.text or "")
                return replace(self, text=valid_text(text)) if isinstance(text, str) else None
            messages = [{**message, "content": json.loads(str(message["content"]))} for message in self.messages]
            return replace(self, messages=tuple(chat_of(messages)))
        except (ValueError, RecursionError, Unusable):
            return None

    def _first_user_text(self) -> str:
        for message in self.messages or ():
            if message["role"] == "user":
                return str(message["content"])
        return self.rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A line without a usable prompt, with the reason that ``quarantine.jsonl`` states, short whatever the line is."""

    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > _REASON_CHARACTERS:
            object.__setattr__(self, "reason", f"{self.reason[:_REASON_CHARACTERS]}...")


def parse_line(line: bytes, names: PromptFields = USUAL_FIELDS, rule: PromptRule = CURRENT_RULE) -> Prompt | Rejected:
    """Read one JSONL line: strict JSON, then ``prompt_of``. A number that JSON does not have (NaN) counts as null.

    Examples
    --------
    >>> parse_line(b'{"prompt": "2 + 2?", "src": "maths", "loss": NaN}').fields
    {'src': 'maths'}
    >>> parse_line(b'{"prompt": "  "}')
    Rejected(reason='the prompt is empty')
    >>> parse_line(b'{"question": "2 + 2?", "prompt": 7}', PromptFields(text="question")).text
    '2 + 2?'
    """
    record = decode_object(line, rule)
    return record if isinstance(record, Rejected) else prompt_of(record, names, rule)


def prompt_of(
    record: Mapping[str, object], names: PromptFields = USUAL_FIELDS, rule: PromptRule = CURRENT_RULE
) -> Prompt | Rejected:
    """The prompt of one record: a line of a file, a row of a table, an item of a dataset.

    It is taken from ``prompt`` (text or a chat), ``messages``, ``prefix`` or ``conversations`` (chats, also ShareGPT's), in
    this order, or from the fields that ``names`` gives, text first. Values may be as Python, numpy, pandas or pyarrow give
    them: the prompt is the same (``core.chats``). A chat may have ``tools`` and ``chat_template_kwargs``.

    Examples
    --------
    >>> prompt_of({"messages": [{"role": "user", "content": "2 + 2?", "name": None}], "loss": float("nan")}).messages
    ({'role': 'user', 'content': '2 + 2?'},)
    >>> chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> len(prompt_of({"prompt": chat}, rule=PromptRule(turns="prompt")).messages)
    1
    >>> prompt_of({"question": "2 + 2?"})
    Rejected(reason='no prompt: none of the fields prompt, messages, prefix, conversations; the fields are question')
    """
    if rule.version == FIRST_RULE.version:
        return _by_first_rule(record, names)
    try:
        content = _content(record, names)
        if isinstance(content, str):
            if not content.strip():
                return Rejected(reason="the prompt is empty")
            return Prompt(id=_id(record, names), text=content, fields=_fields(record, prompt_fields(names, is_chat=False)))
        messages = chat_of(content)
        is_answered = messages[-1]["role"] == "assistant"
        if is_answered and rule.turns == "prompt":
            messages = messages[:-1]
            if not any(str(message["content"]).strip() or "tool_calls" in message for message in messages):
                return Rejected(reason="nothing is left of the chat before the assistant's turn")
        return Prompt(
            id=_id(record, names),
            messages=tuple(messages),
            tools=_tuple(tools_of(record.get(_TOOLS))),
            template_kwargs=template_kwargs_of(record.get(_KWARGS)),
            fields=_fields(record, prompt_fields(names)),
            is_answered=is_answered,
        )
    except Unusable as error:
        return Rejected(reason=str(error))


def content_fields(names: PromptFields = USUAL_FIELDS) -> list[str]:
    """Fields that may contain the prompt; the first of them that is not null does."""
    if names.text is not None or names.messages is not None:
        return [name for name in (names.text, names.messages) if name is not None]
    return ["prompt", "messages", "prefix", *_SHAREGPT]


def _content(record: Mapping[str, object], names: PromptFields) -> object:
    """Text, or what ``chat_of`` reads."""
    looked_at = content_fields(names)
    for name in looked_at:
        value = record.get(name)
        if type(value) is not str:
            if value is None:
                continue
            value = plain(value) if not isinstance(value, list | dict) else value
            if value is None:
                continue
        if not isinstance(value, str):
            return value
        if is_chat_text(value):
            return chat_of(value)
        refuse_like_chat(value, name, is_text=name in ("prompt", names.text))
        is_turn = name != "prompt" and name not in (names.text, names.messages)
        return [{"role": "user", "content": value}] if is_turn else valid_text(value)
    # a table has every field on every row
    fields = [printable(str(name))[:_NAMED_CHARACTERS] for name, value in record.items() if value is not None]
    more = ", ..." if len(fields) > _NAMED_FIELDS else ""
    sought = ", ".join(name for name in looked_at if name != _SHAREGPT[1])
    there = f"the fields are {', '.join(fields[:_NAMED_FIELDS])}{more}" if fields else "no field has a value"
    raise Unusable(f"no prompt: none of the fields {sought}; {there}")


def prompt_fields(names: PromptFields, *, is_chat: bool = True) -> frozenset[str]:
    """Fields that belong to the prompt; the others are kept with its row."""
    own = names.names
    if names.text is None and names.messages is None:
        own |= frozenset(_SHAREGPT)
    return own | {_TOOLS, _KWARGS} if is_chat else own


def _fields(record: Mapping[str, object], own: frozenset[str]) -> dict[str, object]:
    """The other fields; nulls, and what JSON cannot express, such as images, are left out."""
    fields: dict[str, object] = {}
    for name, value in record.items():
        if name in own or value is None:
            continue
        try:
            kept = plain(value, MAX_NESTING - 1)
        except Opaque:
            continue
        if kept is not None:
            fields[plain_key(name)] = kept
    return fields


def _id(record: Mapping[str, object], names: PromptFields) -> str | None:
    """The id as text; None where there is none, or one that names nothing, which never costs the prompt."""
    given = record.get(names.id or "id")
    if type(given) is not str:
        try:
            given = plain(given) if given is not None else None
        except Opaque:
            return None
        if isinstance(given, bool) or not isinstance(given, str | int):
            return None
    return valid_text(str(given)) or None


def _tuple(values: list[dict[str, Any]] | None) -> tuple[Mapping[str, object], ...] | None:
    return None if values is None else tuple(values)


def parse_named_row(line: bytes, rule: PromptRule = CURRENT_RULE) -> Prompt | Rejected:
    """Read one JSONL line that names a row of an array: as ``parse_line``, but it may have no text, or be a bare id.

    Examples
    --------
    >>> parse_named_row(b'{"id": 7, "src": "maths"}')
    Prompt(id='7', text='', messages=None, tools=None, template_kwargs=None, fields={'src': 'maths'}, is_answered=False)
    >>> parse_named_row(b'"seven"').id
    'seven'
    """
    try:
        bare = json.loads(line) if line[:1] in b'"-0123456789' else None
    except ValueError:
        bare = None
    if bare is not None:
        return named_row(bare)
    record = decode_object(line, rule)
    return record if isinstance(record, Rejected) else named_record(record, rule)


def named_record(record: Mapping[str, object], rule: PromptRule = CURRENT_RULE) -> Prompt | Rejected:
    """A row of an array by one record: as ``prompt_of``, but it may have no text, and an id has to name it."""
    has_prompt = any(record.get(name) is not None for name in ("prompt", "messages", "prefix", *_SHAREGPT))
    try:
        if has_prompt:
            unusable = named_row(plain(record["id"])) if record.get("id") not in (None, "") else None
            return unusable if isinstance(unusable, Rejected) else prompt_of(record, rule=rule)
        named = named_row(plain(record["id"])) if "id" in record else Prompt(id=None, text="")
        return named if isinstance(named, Rejected) else replace(named, fields=_fields(record, USUAL_FIELDS.names))
    except Unusable as error:
        return Rejected(reason=str(error))


def named_row(value: object) -> Prompt | Rejected:
    """A row with an id and without a text.

    Examples
    --------
    >>> named_row(True)
    Rejected(reason='the id is neither text nor a whole number but bool')
    """
    if value is None:
        return Rejected(reason="the id is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return Rejected(reason=f"the id is neither text nor a whole number but {type(value).__name__}")
    if value == "" or has_lone_surrogate(str(value), value):
        return Rejected(reason="the id is empty" if value == "" else LONE_SURROGATE)
    return Prompt(id=str(value), text="")


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
        record["messages"] = prompt.messages
    else:
        record["prompt"] = prompt.text
    if prompt.tools is not None:
        record[_TOOLS] = prompt.tools
    if prompt.template_kwargs is not None:
        record[_KWARGS] = prompt.template_kwargs
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
        prompt = _chat_as_written(record.get("id"), content, record.get("fields", {}))
        tools, kwargs = record.get(_TOOLS), record.get(_KWARGS)
        if tools is None and kwargs is None and isinstance(prompt, Prompt):
            return prompt
        is_usable = isinstance(kwargs, dict | None) and isinstance(tools, list | None)
        if is_usable and all(isinstance(tool, dict) for tool in tools or ()) and isinstance(prompt, Prompt):
            return replace(prompt, tools=_tuple(tools), template_kwargs=kwargs)
    raise CorruptStoreError(f"{PROMPTS}: a row is not a prompt ({_start(line)})", hint="run embstore verify STORE")


def decode_object(line: bytes, rule: PromptRule = CURRENT_RULE) -> dict[str, Any] | Rejected:  # noqa: PLR0911
    """A line that is a JSON object, as Python's json reads it, or why it is not one that a build takes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(reason=f"not UTF-8 (byte {error.start})")
    if not text.strip():
        return Rejected(reason="empty line")
    try:
        if rule.version == FIRST_RULE.version:
            record = json.loads(text, parse_constant=refuse_constant, parse_float=parse_finite)
        else:
            record = json.loads(text, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        return Rejected(reason=str(error))
    except ValueError as error:
        return Rejected(reason=f"not JSON ({str(error)[:80]})")
    except RecursionError:
        return Rejected(reason=TOO_DEEP)
    if not isinstance(record, dict):
        return Rejected(reason=f"not a JSON object but {type(record).__name__}")
    if is_too_deep(text, record):
        return Rejected(reason=TOO_DEEP)
    if has_lone_surrogate(text, record):
        return Rejected(reason=LONE_SURROGATE)
    return record


# --- rule 1: stores from before December 2026 --------------------------------------------------------------------------


def _by_first_rule(record: Mapping[str, Any], names: PromptFields) -> Prompt | Rejected:
    given = record.get(names.id or "id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        return Rejected(reason=f"the id is neither text nor a whole number but {type(given).__name__}")
    row_id = str(given) if given not in (None, "") else None
    fields = {name: value for name, value in record.items() if name not in names.names}
    content = _content_by_first_rule(record, names)
    if isinstance(content, str):
        if not content.strip():
            return Rejected(reason="the prompt is empty")
        return Prompt(id=row_id, text=content, fields=fields)
    if content is None:
        looked_at = [name for name in (names.text, names.messages) if name is not None] or ["prompt", "messages", "prefix"]
        return Rejected(reason=f"no text: none of the fields {', '.join(looked_at)}")
    prompt = _chat_as_written(row_id, content if isinstance(content, list | dict) else plain(content), fields)
    if isinstance(prompt, Prompt) and not any(str(message["content"]).strip() for message in prompt.messages or ()):
        return Rejected(reason="every message is empty")
    return prompt


def _content_by_first_rule(record: Mapping[str, Any], names: PromptFields) -> object:
    """Text or messages of a line, None if it has neither."""
    if names.text is not None or names.messages is not None:
        chosen = [record.get(name) for name in (names.text, names.messages) if name is not None]
        return next((value for value in chosen if value is not None), None)
    if record.get("prompt") is not None:
        return record["prompt"]
    content = record["messages"] if record.get("messages") is not None else record.get("prefix")
    if isinstance(content, dict):
        return content.get("messages")
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _chat_as_written(row_id: str | None, content: object, fields: Mapping[str, object]) -> Prompt | Rejected:
    """A chat whose messages stay as they are: of a canonical row, or by rule 1."""
    if not isinstance(content, list):
        return Rejected(reason=f"the prompt is neither text nor a list of messages but {type(content).__name__}")
    if not content:
        return Rejected(reason="the list of messages is empty")
    for position, message in enumerate(content):
        if not isinstance(message, dict):
            return Rejected(reason=f"message {position} is not an object")
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return Rejected(reason=f"message {position} lacks a text role or text content")
    return Prompt(id=row_id, messages=tuple(content), fields=fields)


def _start(line: bytes) -> str:
    return ascii(line[:60].decode(errors="replace"))
