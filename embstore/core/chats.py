"""The canonical form of chats: one spelling for what JSON, Arrow, pandas, ``datasets`` and ShareGPT write differently.

Fields are null where they do not apply; objects with different keys are JSON text, because a table cannot hold them in one
column; texts are lists of parts. ``chat_of`` undoes this (docs/decisions/0049). Pure; what cannot be a prompt is an
``Unusable``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping

from embstore.core.decode import MAX_NESTING, RepeatedKeyError, shown, unique_keys
from embstore.core.values import TOO_DEEP, JsonValue, Opaque, Unusable, plain, valid_text

# What a turn may consist of instead of text.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CHAT_NAMES = ("messages", "conversations", "conversation")
_TEXT_PARTS = ("text", "input_text", "output_text")
# what other parts are; a reason quotes any other word, so that it is not counted as another kind (core.reasons)
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file",
                "input_file", "document", "refusal", "thinking", "tool_use", "tool_result")  # fmt: skip


# --- JSON text, and structs of lists -----------------------------------------------------------------------------------


def _decoded(value: JsonValue, levels: int) -> JsonValue:
    """What a text that is a JSON object or list stands for; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return plain(json.loads(value, object_pairs_hook=unique_keys), levels)
    except RepeatedKeyError as error:
        raise Unusable(str(error)) from None
    except RecursionError:
        raise Unusable(TOO_DEEP) from None
    except ValueError:
        return value  # a text that only begins like JSON


def _turned(value: dict[str, JsonValue]) -> list[JsonValue] | None:
    """A struct of equally long lists as a list of structs, as which a table may hold the same; None for anything else."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return None
    rows = (dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True))
    return [{name: item for name, item in row.items() if item is not None} for row in rows]


def _listed(value: JsonValue, levels: int) -> JsonValue:
    """A list of objects, however it is written: as JSON text as a whole or by item, or as a struct of lists."""
    value = _decoded(value, levels)
    if isinstance(value, dict):
        value = _turned(value) or value
    return [_decoded(item, levels - 1) for item in value] if isinstance(value, list) else value


# --- messages ----------------------------------------------------------------------------------------------------------


def chat_of(value: object) -> list[dict[str, JsonValue]]:
    """Messages in canonical form: each has a text ``role`` and a text ``content``; tool calls have objects as arguments.

    Parameters
    ----------
    value
        A list of messages (role and content, or ShareGPT's from and value), JSON text of one, a struct of lists, or an
        object with ``messages``.

    Raises
    ------
    Unusable
        It is something else, or a message has parts that are not text.

    Examples
    --------
    >>> chat_of([{"from": "human", "value": "2 + 2?"}])
    [{'role': 'user', 'content': '2 + 2?'}]
    >>> chat_of({"role": ["user"], "content": [[{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]]})
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    levels = MAX_NESTING - 1
    if type(value) is not list:
        value = _decoded(plain(value, levels), levels)
        if isinstance(value, dict):
            value = next((value[name] for name in _CHAT_NAMES if name in value), value)
        value = _listed(value, levels)
    if not isinstance(value, list):
        raise Unusable(f"the prompt is neither text nor a list of messages but {_kind(value)}")
    if not value:
        raise Unusable("the list of messages is empty")
    messages = [_message(message, position, levels - 1) for position, message in enumerate(value)]
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        raise Unusable("every message is empty")
    return messages


def is_chat_text(text: str) -> bool:
    """Whether a text is JSON of a list of messages, or of an object with one, as a whole: a chat in a column of texts.

    Examples
    --------
    >>> is_chat_text('[{"role": "user", "content": "2 + 2?"}]'), is_chat_text("[1, 2] and [3]"), is_chat_text("[1, 2]")
    (True, False, False)
    """
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(found, dict):
        found = next((found[name] for name in _CHAT_NAMES if name in found), None)
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in found)
    )


# Python's own notation, JSON in JSON, a list of JSON texts, or JSON that is cut
_LIKE_MESSAGES = re.compile(r"""\s*"?\[\s*['"]?\s*\{\s*\\*['"](?:role|from|content|value)\\*['"]\s*:""")


def refuse_like_chat(text: str, name: str, *, is_text: bool) -> None:
    """Refuse text that was meant as a list of messages but is not JSON; where a text is expected, only if it ends as one.

    Raises
    ------
    Unusable

    Examples
    --------
    >>> refuse_like_chat("[{'role': 'user', 'content': '2 + 2?'}] is a list", "prompt", is_text=True)
    >>> refuse_like_chat("[{'role': 'user', 'content': '2 + 2?'}]", "messages", is_text=False)
    Traceback (most recent call last):
    embstore.core.values.Unusable: messages looks like a list of messages, but is not JSON; write it with json.dumps
    """
    if _LIKE_MESSAGES.match(text) and (not is_text or text.rstrip().endswith(("]", ']"'))):
        raise Unusable(f"{name} looks like a list of messages, but is not JSON; write it with json.dumps")


def _message(value: object, position: int, levels: int) -> dict[str, JsonValue]:
    if type(value) is dict and len(value) == 2:
        role, content = value.get("role"), value.get("content")
        if type(role) is str and type(content) is str:  # nearly every message
            return {"role": valid_text(role), "content": valid_text(content)}
    try:
        message = _decoded(plain(value, levels), levels)
    except Opaque as error:
        _refuse_part(value, position)
        raise Unusable(f"message {position} contains {error}") from None
    if not isinstance(message, dict):
        raise Unusable(f"message {position} is {_kind(message)}, not an object with role and content")
    if "role" not in message and "from" in message:
        message = _of_sharegpt(message, levels - 1)
    role = message.pop("role", None)
    if not isinstance(role, str):
        raise Unusable(f"message {position} has no text role; its fields are {', '.join(map(repr, message)) or 'none'}")
    for name in ("tool_calls", "function_call"):
        if name in message:
            message[name] = _calls(message[name], name, position, levels - 1)
    content = _content(message.pop("content", None), message, position, levels - 1)
    return {"role": role, "content": content, **message}


def _of_sharegpt(message: dict[str, JsonValue], levels: int) -> dict[str, JsonValue]:
    given = message.pop("from")
    message["role"] = _SHAREGPT_ROLES.get(given, given) if isinstance(given, str) else given
    if "content" not in message:
        message["content"] = message.pop("value", None)
    call = _decoded(message["content"], levels - 2) if given == "function_call" else None
    if isinstance(call, dict) and "name" in call:
        message["content"], message["tool_calls"] = None, [{"type": "function", "function": call}]
    return message


def _content(value: JsonValue, message: dict[str, JsonValue], position: int, levels: int) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        if any(message.get(name) for name in _INSTEAD_OF_CONTENT):
            return ""
        raise Unusable(f"message {position} has neither content nor tool calls")
    if isinstance(value, dict):  # one part, or parts as a struct of lists
        if not (parts := _turned(value)) and value.keys().isdisjoint(("type", "text")):
            raise Unusable(f"the content of message {position} is an object, not text; its fields are {', '.join(value)}")
        value = parts or [value]
    if not isinstance(value, list):
        raise Unusable(f"the content of message {position} is {_kind(value)}, not text")
    return "".join(_part(_decoded(part, levels), position) for part in value if part is not None)


def _refuse_part(message: object, position: int) -> None:
    """Name the kind of a part that holds what JSON cannot express, such as a decoded image."""
    content = message.get("content") if isinstance(message, Mapping) else None
    for part in content if isinstance(content, Iterable) else ():
        if isinstance(part, Mapping) and _kind_of_part(part) not in _TEXT_PARTS:
            raise Unusable(_NOT_TEXT.format(position, _kind_of_part(part)))


_NOT_TEXT = "message {} has a part of kind {}; only parts of kind text can be embedded"


def _kind_of_part(part: Mapping[str, object]) -> str:
    named = part.get("type", "text" if "text" in part else ", ".join(part) or "none")
    return named if named in (*_TEXT_PARTS, *_OTHER_PARTS, "none") else shown(named)


def _part(part: JsonValue, position: int) -> str:
    """Text of one part of a message; templates that take parts write them one after the other, without a separator."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Unusable(f"message {position} has a part that is {_kind(part)}, not text")
    kind = _kind_of_part(part)
    if kind not in _TEXT_PARTS:
        raise Unusable(_NOT_TEXT.format(position, kind))
    text = part.get("text", "")
    if "text" not in part and len(part) > 1:
        raise Unusable(f"message {position} has a part of kind {kind} without a text; its fields are {', '.join(part)}")
    if not isinstance(text, str):
        raise Unusable(f"message {position} has a part of kind {kind} whose text is {_kind(text)}")
    return text


def _calls(value: JsonValue, name: str, position: int, levels: int) -> JsonValue:
    """Tool calls with objects as arguments, as templates expect them; OpenAI's own format has JSON text there."""
    calls = [_decoded(value, levels)] if name == "function_call" else _listed(value, levels)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        said = "is {}, not an object" if name == "function_call" else "are {}, not objects"
        raise Unusable(f"the {name} of message {position} {said.format(_kind(value))}")
    for call in calls:
        if "function" in call:
            call["function"] = _decoded(call["function"], levels - 2)
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(Unusable):  # a model wrote this text, and it need not be JSON
                arguments = _decoded(function["arguments"], levels - 3)
                function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return calls[0] if name == "function_call" else calls


# --- what a template gets besides messages -----------------------------------------------------------------------------


def tools_of(value: object) -> list[dict[str, JsonValue]] | None:
    """The tools of a chat: a list of objects, also as JSON text as a whole, by item or by schema; None if there are none.

    Raises
    ------
    Unusable
        Anything else.
    """
    levels = MAX_NESTING - 1
    try:
        tools = _listed(plain(value, levels), levels)
    except Opaque as error:
        raise Unusable(f"tools contains {error}") from None
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools is not a list of objects, which is what a chat template takes")
    return [_with_schema(tool, levels - 2) for tool in tools]


def _with_schema(tool: dict[str, JsonValue], levels: int) -> dict[str, JsonValue]:
    for name in ("function", "parameters", "properties", "input_schema", "output_schema", "return"):
        if name in tool:
            inner = _decoded(tool[name], levels)
            tool[name] = _with_schema(inner, levels - 1) if isinstance(inner, dict) else inner
    return tool


def template_kwargs_of(value: object) -> dict[str, JsonValue] | None:
    """Variables for the chat template, as an object or as JSON text of one; None if there are none.

    Raises
    ------
    Unusable
        Anything else, or a variable that the store's own settings decide.
    """
    levels = MAX_NESTING - 1
    try:
        found = _decoded(plain(value, levels), levels)
    except Opaque as error:
        raise Unusable(f"chat_template_kwargs contains {error}") from None
    if not found:
        return None
    if not isinstance(found, dict):
        raise Unusable(f"chat_template_kwargs is {_kind(found)}, not an object")
    decided = sorted(_DECIDED & found.keys())
    if decided:
        raise Unusable(f"chat_template_kwargs sets {', '.join(decided)}, which embstore sets itself for every prompt")
    return found


# arguments of apply_chat_template that are not variables of a template
_DECIDED = frozenset(
    {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "sanitize_control_tokens"}
)

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    """What a JSON value is, as a message says it."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
