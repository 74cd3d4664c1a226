"""One form of a chat: what writers spell differently, what is quarantined and why, and what the template gets."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import PromptFields, PromptRule
from embstore.core.prompts import Prompt, Rejected, decode_row, encode_row, parse_line, prompt_of
from tests.support.stage0 import ingested
from tests.support.stores import write_lines
from tests.support.templates import PRINTS_ALL, rendered

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
ASKED = {"role": "user", "content": "How warm is it?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "content": "4 degrees", "tool_call_id": "c1"}


def taken(record: dict[str, Any], **options: Any) -> Prompt:
    found = prompt_of(record, **options)
    assert isinstance(found, Prompt), found
    assert decode_row(encode_row(found)) == found
    assert decode_row(encode_row(found)).digest == found.digest
    return found


def reason(record: dict[str, Any], **options: Any) -> str:
    found = prompt_of(record, **options)
    assert isinstance(found, Rejected), found
    return found.reason


def chat(record: dict[str, Any], **options: Any) -> list[Any]:
    messages = taken(record, **options).messages
    assert messages is not None
    return list(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWERED],
        [ASKED, {"role": "assistant", "tool_calls": [CALL]}, ANSWERED],
        [{**ASKED, "name": None, "tool_calls": None}, {**CALLED, "tool_call_id": None}, {**ANSWERED, "name": None}],
        [ASKED, {**CALLED, "tool_calls": [{**CALL, "index": None}]}, ANSWERED],
        # the keys of another writer, in another order
        [dict(reversed(list(message.items()))) for message in (ASKED, CALLED, ANSWERED)],
        [
            ASKED,
            {**CALLED, "tool_calls": [{**CALL, "function": {"arguments": {"days": 2, "city": "Oslo"}, "name": "weather"}}]},
            ANSWERED,
        ],
        # arguments as OpenAI gives them, and as tables must
        [
            ASKED,
            {
                **CALLED,
                "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"days": 2.0, "city": "Oslo"}'}}],
            },
            ANSWERED,
        ],
        [ASKED, {**CALLED, "tool_calls": [json.dumps(CALL)]}, ANSWERED],
        [ASKED, {**CALLED, "tool_calls": json.dumps([CALL])}, ANSWERED],
        [ASKED, {**CALLED, "tool_calls": {"id": ["c1"], "type": ["function"], "function": [CALL["function"]]}}, ANSWERED],
        # nulls and floats of Arrow and pandas, at every depth
        [
            ASKED,
            {
                **CALLED,
                "tool_calls": [
                    {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2.0, "hour": None}}}
                ],
            },
            ANSWERED,
        ],
        np.array([ASKED, {**CALLED, "tool_calls": np.array([CALL], dtype=object)}, ANSWERED], dtype=object),
        (ASKED, CALLED, ANSWERED),
        # a map of Arrow is a list of pairs
        [list(ASKED.items()), CALLED, ANSWERED],
        # texts as bytes
        [{"role": b"user", "content": b"How warm is it?"}, CALLED, ANSWERED],
        # JSON text of the whole, and of each message
        json.dumps([ASKED, CALLED, ANSWERED]),
        f"  {json.dumps([ASKED, CALLED, ANSWERED], indent=2)}\n",
        [json.dumps(ASKED), CALLED, ANSWERED],
        # a struct of lists
        {
            "role": ["user", "assistant", "tool"],
            "content": ["How warm is it?", None, "4 degrees"],
            "tool_calls": [None, [CALL], None],
            "tool_call_id": [None, None, "c1"],
            "name": None,
        },
        {"messages": [ASKED, CALLED, ANSWERED]},
        # parts
        [
            {"role": "user", "content": [{"type": "text", "text": "How warm "}, {"type": "text", "text": "is it?"}]},
            CALLED,
            ANSWERED,
        ],
        [
            {"role": "user", "content": [{"text": "How warm is it?", "type": "text", "image_url": None}]},
            {**CALLED, "content": []},
            ANSWERED,
        ],
        [{"role": "user", "content": ["How warm is it?"]}, CALLED, ANSWERED],
        [{"role": "user", "content": {"type": "text", "text": "How warm is it?"}}, CALLED, ANSWERED],
        [{"role": "user", "content": {"type": ["text", "text"], "text": ["How warm ", "is it?"]}}, CALLED, ANSWERED],
        [{"role": "user", "content": np.array([{"type": "input_text", "text": "How warm is it?"}])}, CALLED, ANSWERED],
        # ShareGPT
        [
            {"from": "human", "value": "How warm is it?"},
            {"from": "gpt", "value": None, "tool_calls": [CALL]},
            {"from": "tool", "value": "4 degrees", "tool_call_id": "c1"},
        ],
    ],
)
@pytest.mark.parametrize("column", ["messages", "prompt", "prefix", "conversations"])
def test_every_spelling_is_the_same_chat(column: str, messages: Any) -> None:
    expected = taken({"messages": [ASKED, CALLED, ANSWERED]})
    found = taken({column: messages})
    assert json.dumps(found.chat) == json.dumps(expected.chat)
    assert (found.digest, found.verbatim_digest, found.fields) == (expected.digest, expected.verbatim_digest, {})
    assert rendered([found], PRINTS_ALL) == rendered([expected], PRINTS_ALL)


def test_what_differs_is_another_row() -> None:
    spellings: list[dict[str, Any]] = [
        {"messages": [ASKED, CALLED, ANSWERED]},
        {"messages": [ASKED, CALLED]},
        {"messages": [ASKED, CALLED, {**ANSWERED, "tool_call_id": "c2"}]},
        {"messages": [ASKED, {**CALLED, "tool_calls": [CALL, CALL]}, ANSWERED]},
        {"messages": [{**ASKED, "name": "ana"}, CALLED, ANSWERED]},
        {"messages": [ASKED, CALLED, ANSWERED], "tools": [TOOL]},
        {"messages": [ASKED, CALLED, ANSWERED], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [ASKED, CALLED, ANSWERED], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [ASKED, CALLED, ANSWERED], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    found = [taken(spelling) for spelling in spellings]
    assert len({prompt.digest for prompt in found}) == len({prompt.verbatim_digest for prompt in found}) == len(spellings)


def test_plain_prompts_keep_their_keys() -> None:
    """Keys of b2eabab: what stores and trainers have of texts and of chats with nothing but role and content."""
    assert taken({"prompt": " 2 +\n2? "}).digest[:8].hex() == "f9ff7feff8425d95"
    plain = taken({"messages": [{"role": "system", "content": "be  brief"}, {"content": "ünïcode\n", "role": "user"}]})
    assert plain.digest[:8].hex() == "90da1a8387ae67c1"


def test_texts_stay_as_they_are() -> None:
    for text in ("[1, 2]", '{"a": 1}', '"quoted"', "[INST] hi [/INST]", "null", "[]", '["a"]', " [ "):
        assert taken({"prompt": text}).text == text
        assert chat({"messages": text}) == [{"role": "user", "content": text}]
        assert chat({"messages": [{"role": "user", "content": text}]})[0]["content"] == text


def test_a_text_that_is_a_chat_is_that_chat() -> None:
    """In a column of texts, too: a column of JSON that a reader gives as text."""
    assert chat({"prompt": json.dumps([ASKED])}) == [ASKED]
    assert chat({"question": json.dumps({"messages": [ASKED]})}, names=PromptFields(text="question")) == [ASKED]
    assert taken({"prompt": f"Repeat this: {json.dumps([ASKED])}"}).messages is None


def test_what_only_looks_like_a_chat_is_not_a_turn() -> None:
    """What pandas and datasets write into CSV, numpy prints, or a second json.dumps makes of messages."""
    called = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    for spelled in (
        str([ASKED, ANSWERED]),
        str(called),
        str(np.array([ASKED, ANSWERED])),
        str([json.dumps(ASKED)]),
        json.dumps(json.dumps([ASKED])),
        json.dumps([{"from": "human", "value": "2 + 2?"}])[:-1] + ",]",
    ):
        for name in ("messages", "prompt", "conversations"):
            assert f"{name} looks like a list of messages" in reason({name: spelled}), spelled
        assert taken({"prompt": f"Repeat: {spelled}"}).text
        assert taken({"prompt": f"{spelled} is what I have"}).text
    assert "looks like" in reason({"messages": json.dumps([ASKED])[:-4]})
    assert "looks like" in reason({"chat": str([ASKED])}, names=PromptFields(messages="chat"))


def test_arguments_that_are_no_json_object_stay_text() -> None:
    for text in ("", "city=Oslo", '{"city": ', "[1]", '{"a": 1, "a": 2}'):
        call = {"function": {"name": "f", "arguments": text}}
        message = chat({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]})[1]
        assert message["tool_calls"][0]["function"]["arguments"] == text


def test_legacy_and_bare_calls() -> None:
    legacy = chat(
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            ]
        }
    )
    assert legacy[1] == {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"a": 1}}}
    single = chat({"messages": [ASKED, {**CALLED, "tool_calls": CALL}]})
    assert single == [ASKED, CALLED]
    bare = chat({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"arguments": '{"a": 1}', "name": "f"}]}]})
    assert bare[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    thought = chat({"messages": [ASKED, {"role": "assistant", "content": None, "reasoning_content": "hm"}]})
    assert thought[1] == {"role": "assistant", "content": "", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("critic", "critic"),
    ],
)
def test_roles_of_sharegpt(given: str, role: str) -> None:
    assert chat({"conversations": [{"from": given, "value": "x", "weight": 1.0}]}) == [
        {"role": role, "content": "x", "weight": 1}
    ]


def test_a_function_call_of_sharegpt_is_a_tool_call() -> None:
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'},
    ]
    assert chat({"conversations": turns})[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}],
    }


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [{**TOOL, "strict": None}],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [{"type": "function", "function": json.dumps(TOOL["function"])}],
        [{"type": "function", "function": {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}}],
        np.array([TOOL], dtype=object),
        {"type": ["function"], "function": [TOOL["function"]]},
    ],
)
def test_tools_go_to_the_template_however_they_are_written(tools: Any) -> None:
    found = taken({"messages": [ASKED], "tools": tools, "chat_template_kwargs": '{"enable_thinking": false}', "src": "x"})
    assert found.fields == {"src": "x"}
    expected = [ASKED], [TOOL], {"enable_thinking": False}
    assert (list(found.messages or ()), list(found.tools or ()), found.template_kwargs) == expected
    assert rendered([found], PRINTS_ALL) == [f"{json.dumps([ASKED])}|{json.dumps([TOOL])}|True"]


def test_no_tools_are_no_tools() -> None:
    expected = taken({"messages": [ASKED]})
    for tools in (None, [], "[]", np.array([]), math.nan):
        for variables in (None, {}, "{}", math.nan):
            assert taken({"messages": [ASKED], "tools": tools, "chat_template_kwargs": variables}).digest == expected.digest


def test_tools_beside_a_text_are_a_field_like_any_other() -> None:
    assert taken({"prompt": "a text", "tools": "hammer", "chat_template_kwargs": 1}).fields == {
        "tools": "hammer",
        "chat_template_kwargs": 1,
    }


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASKED, {"role": "user", "content": [{"type": "image_url"}]}]}, "1 has a part of kind image_url;"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}, {"type": "input_audio"}]}]}, "kind input_audio"),
        ({"messages": [{"role": "user", "content": [{"image": "x.png"}]}]}, "message 0 has a part of kind image"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": object()}]}]}, "0 has a part of kind image;"),
        ({"messages": [{"role": "user", "content": np.array([{"image": object()}])}]}, "0 has a part of kind image;"),
        ({"messages": [{"role": "user", "content": object()}]}, "message 0 contains a value of type object"),
        ({"messages": [{"role": "user", "content": [b"\xff"]}]}, "message 0 contains bytes that are not UTF-8"),
        ({"messages": [{"role": "user", "content": [7]}]}, "message 0 has a part that is a number"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "message 1 has neither content nor tool calls"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": []}]}, "message 1 has neither content nor tool calls"),
        ({"messages": [ASKED, {"role": "assistant", "content": 4}]}, "the content of message 1 is a number, not text"),
        ({"messages": [ASKED, {"role": "tool", "content": {"temp": 3}}]}, "an object, not text; its fields are temp"),
        ({"messages": [ASKED, {**ASKED, "content": [{"type": "text", "value": "a"}]}]}, "without a text; its fields are"),
        ({"messages": [ASKED, {"content": "a", "who": "me"}]}, "message 1 has no text role; its fields are 'content',"),
        ({"messages": [ASKED, "more"]}, "message 1 is text, not an object with role and content"),
        ({"messages": [ASKED, None]}, "message 1 is null, not an object"),
        ({"messages": [ASKED, {**CALLED, "tool_calls": "weather"}]}, "the tool_calls of message 1 are text, not objects"),
        ({"messages": [ASKED, {**CALLED, "function_call": 1}]}, "the function_call of message 1 is a number, not an object"),
        ({"messages": {"role": ["user", "user"], "content": ["a"]}}, "neither text nor a list of messages but an object"),
        ({"prompt": 7}, "neither text nor a list of messages but a number"),
        ({"prompt": b"\xff"}, "bytes that are not UTF-8 (byte 0)"),
        ({"prompt": "half \ud83d"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "lone surrogate"),
        ({"prompt": "a", "src": "half \ud83d"}, "lone surrogate"),
        ({"messages": [ASKED], "tools": ["hammer"]}, "tools is not a list of objects"),
        ({"messages": [ASKED], "tools": "hammer"}, "tools is not a list of objects"),
        ({"messages": [ASKED], "tools": [object()]}, "tools contains a value of type object"),
        ({"messages": [ASKED], "chat_template_kwargs": [1]}, "chat_template_kwargs is a list, not an object"),
        ({"messages": [ASKED], "chat_template_kwargs": {"add_generation_prompt": True}}, "sets add_generation_prompt"),
        ({"messages": [ASKED], "chat_template_kwargs": {"chat_template": "{{ 7 }}"}}, "sets chat_template"),
        ({"input": "b", "output": "c"}, "the fields prompt, messages, prefix, conversations; the fields are input, output"),
        ({"data": {"prompt": "a"}}, "the fields are data"),
        ({}, "no field has a value"),
        ({"messages": None}, "no field has a value"),
        ({"prompt": None, "messages": math.nan}, "the fields are messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_prompt_says_why(record: dict[str, Any], expected: str) -> None:
    assert expected in reason(record)


def test_a_line_names_the_fields_that_are_there_and_no_more_than_a_dozen() -> None:
    found = reason({f"field {number} {'x' * 100}": "a" for number in range(40)}, names=PromptFields(messages="talk"))
    assert found.startswith("no prompt: none of the fields talk; the fields are field 0 xxx")
    assert found.endswith(", ...")
    assert len(found) < 700


def test_what_json_lacks_costs_a_field_and_never_the_line() -> None:
    line = b'{"prompt": "a", "score": NaN, "low": -Infinity, "large": 1e999, "deep": [{"x": NaN, "y": 1}], "n": 3.0}'
    found = parse_line(line)
    assert isinstance(found, Prompt)
    assert found.fields == {"deep": [{"y": 1}], "n": 3}
    values = {
        "image": b"\x89PNG",
        "object": object(),
        "nested": {"object": object()},
        "when": datetime.date(2026, 1, 2),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "vector": np.array([1.0, 0.5, math.nan]),
        "time": np.datetime64("NaT"),
        "text": b"caf\xc3\xa9",
        7: "seven",
    }
    assert taken({"prompt": "a", **values}).fields == {  # type: ignore[dict-item]
        "when": "2026-01-02",
        "count": 7,
        "flag": True,
        "vector": [1, 0.5, None],
        "text": "café",
        "7": "seven",
    }


def test_nulls_of_pandas() -> None:
    pd = pytest.importorskip("pandas")
    found = taken({"prompt": pd.NA, "messages": [{**ASKED, "name": pd.NaT}], "id": pd.NA, "src": pd.NA})
    assert (found.id, found.fields, found.messages) == (None, {}, (ASKED,))
    assert taken({"prompt": "a", "id": 3.0, "tags": pd.Series([1, 2])}) == Prompt(id="3", text="a", fields={"tags": [1, 2]})


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", "prompt": "b"}',
        b'{"id": 1, "id": 1, "prompt": "a"}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    ],
)
def test_a_key_twice_costs_the_line_and_is_named(line: bytes) -> None:
    found = parse_line(line)
    assert isinstance(found, Rejected)
    assert "occurs twice" in found.reason
    assert any(name in found.reason for name in ("'prompt'", "'id'", "'content'"))
    assert isinstance(parse_line(line, rule=PromptRule(version=1)), Prompt), "stores keep the rule that they began with"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, "7"),
        (7.0, "7"),
        (np.int64(7), "7"),
        (b"seven", "seven"),
        ("", None),
        (None, None),
        (math.nan, None),
        (True, None),
        (1.5, None),
        (["a"], None),
        (b"\xff", None),
        (object(), None),
    ],
)
def test_an_id_never_costs_the_prompt(given: object, expected: str | None) -> None:
    assert taken({"prompt": "a", "id": given}).id == expected


def test_a_key_twice_in_json_text_costs_the_line_unless_a_model_wrote_the_text() -> None:
    twice = '{"role": "user", "content": "a", "content": "b"}'
    for record in ({"messages": f"[{twice}]"}, {"messages": [twice]}, {"messages": [ASKED], "tools": [twice]}):
        assert "the key 'content' occurs twice" in reason(record)


def test_nesting_is_counted_through_json_text() -> None:
    """What is taken can be written and read again, however it was spelled."""

    def nested(levels: int) -> dict[str, Any]:
        arguments = f'{{"x": {"[" * levels}{"]" * levels}}}'
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]}

    assert isinstance(prompt_of(nested(80)), Prompt)
    for levels in (90, 95, 100, 150, 1000):
        found = prompt_of(nested(levels))
        if isinstance(found, Prompt):
            assert decode_row(encode_row(found)) == found
        else:
            assert "nested" in found.reason
    deep: Any = "text"
    for _ in range(5000):
        deep = [deep]
    assert "nested" in reason({"prompt": "a", "deep": deep})


# --- templates that take arguments in another form -----------------------------------------------------------------------

_CALLS = "{% for message in messages %}{% for call in message.tool_calls or [] %}"
_END = "{% endfor %}{% endfor %}"
ARGUMENTS = {
    "Qwen": _CALLS + "{{ call.function.arguments | tojson }}" + _END,
    "Qwen 3": _CALLS
    + "{% set given = call.function.arguments %}{% if given is string %}{{ given }}{% else %}{{ given | tojson }}{% endif %}"
    + _END,
    "Llama 4": _CALLS + "{% for name, value in call.function.arguments | items %}{{ name }}={{ value }};{% endfor %}" + _END,
    "DeepSeek": _CALLS + "{{ '```json\n' + call['function']['arguments'] + '\n```' }}" + _END,
    "printed": _CALLS + "{{ call.function.arguments }}" + _END,
}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Qwen", '{"city": "Oslo", "days": 2}'),
        ("Qwen 3", '{"city": "Oslo", "days": 2}'),
        ("Llama 4", "city=Oslo;days=2;"),
        ("DeepSeek", '```json\n{"city": "Oslo", "days": 2}\n```'),
        ("printed", '{"city": "Oslo", "days": 2}'),
    ],
)
def test_arguments_are_printed_as_json_by_every_family(family: str, expected: str) -> None:
    for arguments in (CALL["function"]["arguments"], '{"days":2,"city":"Oslo"}'):  # type: ignore[index]
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        found = taken({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]})
        assert rendered([found], ARGUMENTS[family]) == [expected]


# As those of LLaVA and SmolVLM: where a content is text, they print nothing of it.
_PARTS = {
    "by kind": "{% for message in messages %}{{ message.role }}:"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %};{% endfor %}",
    "one by one": "{% for message in messages %}{{ message.role }}"
    "{% if message['content'][0]['type'] == 'image' %} {% else %}:{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}",
}


@pytest.mark.parametrize("name", _PARTS)
def test_templates_that_print_only_parts_get_parts(name: str) -> None:
    for content in ("Hello, why?", [{"type": "text", "text": "Hello,"}, {"type": "text", "text": " why?"}]):
        found = taken({"messages": [{"role": "user", "content": content}, CALLED, ANSWERED]})
        assert rendered([found], _PARTS[name]) == ["user:Hello, why?;assistant:;tool:4 degrees;"]


def test_templates_that_take_texts_get_texts() -> None:
    either = "{% if messages[0].content is string %}text{% else %}parts{% endif %}"
    for template in (
        either + "{{ messages[0].content }}",
        either + "{{ raise_exception('no') if messages | length == 1 else '' }}",
        either,
    ):
        found = taken({"messages": [ASKED, CALLED, ANSWERED]})
        assert rendered([found], template)[0].startswith("text")


# --- which part of a chat --------------------------------------------------------------------------------------------------

PROMPT_TURNS = PromptRule(turns="prompt")


@pytest.mark.parametrize(
    ("roles", "left"),
    [
        ("user", "user"),
        ("user assistant", "user"),
        ("system user assistant", "system user"),
        ("user assistant user assistant", "user assistant user"),
        ("user assistant user", "user assistant user"),
        ("user assistant tool", "user assistant tool"),
        ("user assistant tool assistant", "user assistant tool"),
        ("user assistant assistant", "user assistant"),
    ],
)
def test_the_prompt_is_what_comes_before_the_answer(roles: str, left: str) -> None:
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles.split())]
    found, whole = taken({"messages": messages}, rule=PROMPT_TURNS), taken({"messages": messages})
    assert [message["role"] for message in found.messages or ()] == left.split()
    assert found.digest == taken({"messages": messages[: len(left.split())]}).digest
    assert found.is_answered == whole.is_answered == roles.endswith("assistant")
    assert list(whole.messages or ()) == messages
    assert taken({"prompt": "a text"}, rule=PROMPT_TURNS) == taken({"prompt": "a text"})


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "hello"}],
        [{"role": "user", "content": "  "}, {"role": "assistant", "content": "hello"}],
        [{"from": "gpt", "value": "hello"}],
    ],
)
def test_a_chat_of_which_nothing_is_left_says_so(messages: list[Any]) -> None:
    assert reason({"messages": messages}, rule=PROMPT_TURNS) == "nothing is left of the chat before the assistant's turn"


# --- tables ----------------------------------------------------------------------------------------------------------------


def test_texts_and_ids_as_bytes_in_a_table(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = {"prompt": [b"caf\xc3\xa9", b"\xff", b"tea"], "id": [b"a", b"b", b"\xff"], "image": [b"x", b"y", b"z"]}
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        table = pa.table({name: pa.array(column, type=kind) for name, column in values.items()})
        pq.write_table(table, tmp_path / "p.parquet")
        found = ingested(tmp_path / "p.parquet", tmp_path / "found")
        assert [(row["id"], row["prompt"]) for row in found.prompts] == [("a", "café"), (found.ids[1], "tea")]
        assert found.quarantine == [(2, "bytes that are not UTF-8 (byte 0)")]
        assert all("fields" not in row for row in found.prompts), "other bytes are left out, and not read"
        for path in (tmp_path / "found").iterdir():
            path.unlink()


def test_columns_of_json(tmp_path: Path) -> None:
    """A column whose type is JSON holds JSON of everything, texts too: they have no quotation marks around them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    if not hasattr(pa, "json_"):
        pytest.skip("this pyarrow has no type for JSON")
    prompts = [json.dumps('a "text"'), json.dumps([ASKED]), json.dumps({"messages": [ASKED, ANSWERED]}), "null", "not JSON"]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(prompts))
    pq.write_table(pa.table({"prompt": column, "src": ["a", "b", "c", "d", "e"]}), tmp_path / "p.parquet")
    found = ingested(tmp_path / "p.parquet", tmp_path / "found")
    assert [row.get("prompt", row.get("messages")) for row in found.prompts] == [
        'a "text"',
        [ASKED],
        [ASKED, ANSWERED],
    ]
    assert [line for line, _ in found.quarantine] == [4, 5]


def test_the_hint_names_the_options_where_no_line_has_a_prompt(tmp_path: Path) -> None:
    from embstore.core.errors import PromptError

    source = write_lines(tmp_path / "p.jsonl", [{"instruction": "Translate", "input": "tree"}])
    with pytest.raises(PromptError, match="the fields are instruction, input") as caught:
        ingested(source, tmp_path / "out")
    assert "--text-field" in str(caught.value.hint)
    assert "--messages-field" in str(caught.value.hint)
