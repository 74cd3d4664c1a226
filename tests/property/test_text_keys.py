"""Keys of many texts at once are the canonical ones, or the text is left to the canonical function, whatever it is."""

from __future__ import annotations

import json
import sys

import datasets
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.prompts import Prompt, prompt_of
from embstore.training import prompt_keys
from embstore.training.text_keys import text_keys

SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
PARTS = st.one_of(
    st.sampled_from(SPACES),
    st.sampled_from(["", "a", "[", "{", "é", "漢", "😀", "\0", "\ud800", "[{}]"]),
    st.text(max_size=5),
)
JSON = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.sampled_from(["a", " ", "é"])})
SHAREGPT = st.fixed_dictionaries({"from": st.just("human"), "value": st.sampled_from(["a", ""])})
CHATS = st.lists(st.one_of(TURNS, SHAREGPT), max_size=2)
CHAT_OBJECTS = st.dictionaries(st.sampled_from(["messages", "conversations", "conversation", "prompt", "tools"]), CHATS)
TEXTS = st.one_of(
    st.lists(PARTS, max_size=8).map("".join),
    st.sampled_from(["[1]", "[", " [ a", "{", "{}", " { a }", "{name}"]),
    st.tuples(
        st.sampled_from(["", " ", "\n\t", "\u2003", "\ufeff", "a"]),
        st.one_of(CHATS, CHAT_OBJECTS, JSON, st.one_of(CHATS, CHAT_OBJECTS).map(json.dumps), CHATS.map(str)).map(json.dumps),
        st.sampled_from(["", " ", "\n", "."]),
    ).map("".join),
)
OTHERS = st.sampled_from([None, 7, 1.5, b"bytes", ["a"], [{"role": "user", "content": "a"}], float("nan")])


@settings(max_examples=300)
@given(st.lists(st.one_of(TEXTS, OTHERS), max_size=12))
def test_a_key_that_is_made_at_once_is_the_canonical_one(values: list[object]) -> None:
    keys, others = text_keys(values)
    assert len(keys) == len(values)
    for position, value in enumerate(values):
        if position in others:
            continue
        prompt = prompt_of({"prompt": value})
        assert isinstance(prompt, Prompt)
        assert prompt.text is not None
        assert int(keys[position]) == int.from_bytes(prompt.digest[:8], "little")


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=12))
def test_texts_join_as_records_do(texts: list[str]) -> None:
    """The public function, over texts alone and over records that are read one by one."""
    found = [prompt_of({"prompt": text}) for text in texts]
    usable = [text for text, prompt in zip(texts, found, strict=True) if isinstance(prompt, Prompt)]
    digests = [int.from_bytes(prompt.digest[:8], "little") for prompt in found if isinstance(prompt, Prompt)]
    assert prompt_keys(usable).tolist() == digests
    assert prompt_keys([{"prompt": text, "answer": 1} for text in usable]).tolist() == digests
    for kind in (pa.string(), pa.large_string()) if all(map(_is_unicode, usable)) else ():
        table = pa.table({"prompt": pa.array(usable, kind)})
        assert prompt_keys(table).tolist() == digests
        assert prompt_keys(datasets.Dataset(table)).tolist() == digests


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def test_plain_texts_do_not_go_the_slow_way() -> None:
    texts = ["one", " two  words ", "three\nlines\tof text", "漢字 and é", "a\0b"]
    assert text_keys(texts)[1] == []
    assert text_keys(["", " ", "[x", "a\u2003b", "\ud800", None, " {x", '"[x'])[1] == list(range(8))


def test_every_whitespace_character_of_python_is_known() -> None:
    """A character that a later Unicode adds would otherwise change keys."""
    for space in SPACES:
        keys, others = text_keys([f"a{space}b", "a b"])
        assert others == ([] if ord(space) < 128 else [0])
        assert others or keys[0] == keys[1]
