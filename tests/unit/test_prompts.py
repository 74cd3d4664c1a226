"""One input line: what is a prompt, what is not and why, and what identifies it."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.errors import CorruptStoreError
from embstore.core.prompts import Prompt, Rejected, collapse_whitespace, decode_row, encode_row, parse_line, parse_named_row

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.strip())
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXTS}, optional={"name": TEXTS})


def prompt(value: object) -> Prompt:
    found = parse_line(json.dumps(value).encode())
    assert isinstance(found, Prompt), found
    return found


def reason(line: bytes) -> str:
    found = parse_line(line)
    assert isinstance(found, Rejected), found
    assert "\n" not in found.reason
    return found.reason


def test_text_is_kept_as_written_and_other_fields_beside_it() -> None:
    found = prompt({"id": "a", "prompt": " two\n words ", "src": "maths", "level": 3})
    assert (found.id, found.text, found.messages) == ("a", " two\n words ", None)
    assert found.fields == {"src": "maths", "level": 3}
    assert found.rendered == " two\n words "


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prefix": {"messages": [{"role": "user", "content": "hi"}]}},
        {"prefix": [{"role": "user", "content": "hi"}]},
        {"prefix": "hi"},
        {"messages": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": None, "messages": None, "prefix": {"messages": [{"role": "user", "content": "hi"}]}},
    ],
)
def test_a_chat_is_the_same_row_however_the_line_holds_it(line: object) -> None:
    found = prompt(line)
    assert found.messages == ({"role": "user", "content": "hi"},)
    assert found.fields == {}
    assert found.rendered == "user: hi"
    assert found.digest == prompt({"messages": [{"content": "hi", "role": "user"}]}).digest


def test_prompt_comes_before_messages_and_messages_before_prefix() -> None:
    chat = [{"role": "user", "content": "chat"}]
    assert prompt({"prefix": "prefix", "messages": chat, "prompt": "text"}).text == "text"
    assert prompt({"prefix": "prefix", "messages": chat}).rendered == "user: chat"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", "empty line"),
        (b"  \n", "empty line"),
        (b"nonsense", "not JSON"),
        (b'{"prompt": "cut', "not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        (b"\xff\xfe{\x00", "not UTF-8 (byte 0)"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 (byte 15)"),
        (b'["a"]', "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b"null", "not a JSON object but NoneType"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice in an object"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "a", "id": "\\uDFFF"}', "lone surrogate"),
        (b'{"prompt": "a", "\\udabc": 1}', "lone surrogate"),
        (b'{"prompt": " \\n\\t "}', "the prompt is empty"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"text": "a"}', "no prompt: none of the fields prompt, messages, prefix, conversations; the fields are text"),
        (b'{"prompt": null}', "no prompt"),
        (b'{"prefix": {"other": []}}', "neither text nor a list of messages but an object"),
        (b'{"prompt": 7}', "neither text nor a list of messages but a number"),
        (b'{"messages": []}', "the list of messages is empty"),
        (b'{"messages": ["hi"]}', "message 0 is text, not an object"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has neither content nor tool calls"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": 1, "content": "a"}]}', "message 1 has no text role"),
        (b'{"messages": [{"role": "user", "content": "  "}]}', "every message is empty"),
    ],
)
def test_a_line_without_a_prompt_says_why(line: bytes, expected: str) -> None:
    assert expected in reason(line)


@pytest.mark.parametrize("content", [b'{"prompt": "\\ud83d\\ude00"}', '{"prompt": "😀"}'.encode()])
def test_a_surrogate_pair_is_text(content: bytes) -> None:
    found = parse_line(content)
    assert isinstance(found, Prompt)
    assert found.text == "😀"


def test_a_number_id_is_its_digits_and_an_empty_id_is_none() -> None:
    assert prompt({"prompt": "a", "id": 7}).id == "7"
    assert prompt({"prompt": "a", "id": 10**30}).id == "1" + 30 * "0"
    assert prompt({"prompt": "a", "id": ""}).id is None
    assert prompt({"prompt": "a", "id": None}).id is None


def test_a_line_of_ten_megabytes_is_a_prompt_like_any_other() -> None:
    text = "long text " * 1_000_000
    found = prompt({"prompt": text})
    assert found.text == text
    assert found.digest == prompt({"prompt": text.strip()}).digest


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_beyond_what_can_be_written_again_is_refused(opening: str) -> None:
    """Whatever is taken can be encoded and decoded, also from deeper in the program's stack."""

    def deeper(levels: int, row: bytes) -> Prompt:
        return deeper(levels - 1, row) if levels else decode_row(row)

    taken = 0
    closing = "]" if opening == "[" else "}"
    for depth in (1, 10, 50, *range(100, sys.getrecursionlimit() + 200, 50)):
        found = parse_line(f'{{"prompt": "a", "deep": {opening * depth}0{closing * depth}}}'.encode())
        if isinstance(found, Prompt):
            taken = depth
            assert deeper(100, encode_row(found)) == found
        else:
            assert "nested" in found.reason
    assert taken >= 50


def test_identity_ignores_whitespace_around_and_between_words() -> None:
    first = prompt({"prompt": "two words"})
    assert first.digest == prompt({"prompt": "  two\n\twords\u3000", "id": "x", "src": "y"}).digest
    assert first.digest == hashlib.sha256(b"text\0two words").digest()
    assert first.digest != prompt({"prompt": "twowords"}).digest
    assert first.digest != prompt({"prompt": "Two words"}).digest


def test_identity_of_a_chat_is_every_message_verbatim() -> None:
    user = {"role": "user", "content": "hi"}
    digests = {
        prompt({"messages": messages}).digest
        for messages in (
            [user],
            [user, user],
            [{"role": "system", "content": "hi"}],
            [{"role": "user", "content": "hi "}],
            [{**user, "name": "x"}],
        )
    }
    assert len(digests) == 5
    assert prompt({"prompt": "user: hi"}).digest not in digests


def test_the_derived_id_is_that_of_existing_artefacts() -> None:
    expected = hashlib.md5(b"first question", usedforsecurity=False).hexdigest()[:16]
    assert prompt({"prompt": " first\nquestion "}).derived_id == expected
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first  question"},
        {"role": "user", "content": "second question"},
    ]
    assert prompt({"messages": chat}).derived_id == expected
    alone = prompt({"messages": [{"role": "system", "content": "be brief"}]})
    assert alone.derived_id == hashlib.md5(b"system: be brief", usedforsecurity=False).hexdigest()[:16]


@settings(deadline=None, max_examples=60)
@given(
    row_id=st.none() | TEXTS,
    content=TEXTS | st.lists(MESSAGE, min_size=1, max_size=3),
    fields=st.dictionaries(
        st.sampled_from(["src", "ü", "line\u2028break"]), st.none() | st.integers() | TEXTS | st.lists(TEXTS), max_size=3
    ),
)
def test_a_row_written_is_the_row_read(row_id: str | None, content: object, fields: dict[str, object]) -> None:
    messages = tuple(content) if isinstance(content, list) else None
    row = Prompt(id=row_id, text=None if messages else str(content), messages=messages, fields=fields)
    line = encode_row(row)
    assert line.count(b"\n") == 1
    assert b"\r" not in line, "rows are split at line ends"
    assert decode_row(line) == row
    again = decode_row(line)
    assert (again.digest, again.derived_id, again.rendered) == (row.digest, row.derived_id, row.rendered)


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_collapsing_whitespace_twice_changes_nothing(text: str) -> None:
    once = collapse_whitespace(text)
    assert collapse_whitespace(once) == once
    assert once.split() == text.split()


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_no_bytes_make_the_parser_fail(line: bytes) -> None:
    assert isinstance(parse_line(line), Prompt | Rejected)


@pytest.mark.parametrize(
    "damage",
    [{"tools": {}}, {"tools": [1]}, {"tools": "[]"}, {"chat_template_kwargs": []}, {"messages": [{"role": "user"}]}],
)
def test_a_damaged_row_with_tools_is_refused(damage: dict[str, object]) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}
    assert decode_row(json.dumps(row).encode()).tools == ({"type": "function"},)
    with pytest.raises(CorruptStoreError):
        decode_row(json.dumps({**row, **damage}).encode())


@pytest.mark.parametrize("line", [b'{"id": true, "prompt": "a"}', b'{"id": [1], "messages": "a"}', b'{"id": 1.5}'])
def test_a_row_of_an_array_needs_an_id_that_names_it(line: bytes) -> None:
    """An id that names nothing costs no prompt, but an array's rows are known by nothing else."""
    found = parse_named_row(line)
    assert isinstance(found, Rejected)
    assert "the id is neither text nor a whole number" in found.reason
