"""Keys of many texts at once are the canonical ones, or the text is left to the canonical function, whatever it is."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from embstore.core.prompts import Prompt, prompt_of
from embstore.training import prompt_keys
from embstore.training.text_keys import text_keys

SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
PARTS = st.one_of(
    st.sampled_from(SPACES), st.sampled_from(["", "a", "[", "é", "漢", "😀", "\0", "\ud800", "[{}]"]), st.text(max_size=5)
)
TEXTS = st.one_of(
    st.lists(PARTS, max_size=8).map("".join),
    st.sampled_from(['[{"role": "user", "content": "a"}]', ' [{"role": "user", "content": "a"}]', "[1]", "[", " [ a"]),
)
OTHERS = st.sampled_from([None, 7, 1.5, b"bytes", ["a"], [{"role": "user", "content": "a"}], float("nan")])


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


@given(st.lists(TEXTS, min_size=1, max_size=12))
def test_texts_join_as_records_do(texts: list[str]) -> None:
    """The public function, over texts alone and over records that are read one by one."""
    found = [prompt_of({"prompt": text}) for text in texts]
    usable = [text for text, prompt in zip(texts, found, strict=True) if isinstance(prompt, Prompt)]
    digests = [int.from_bytes(prompt.digest[:8], "little") for prompt in found if isinstance(prompt, Prompt)]
    assert prompt_keys(usable).tolist() == digests
    assert prompt_keys([{"prompt": text, "answer": 1} for text in usable]).tolist() == digests


def test_plain_texts_do_not_go_the_slow_way() -> None:
    texts = ["one", " two  words ", "three\nlines\tof text", "漢字 and é", "a\0b"]
    assert text_keys(texts)[1] == []
    assert text_keys(["", " ", "[x", "a\u2003b", "\ud800", None])[1] == list(range(6))


def test_every_whitespace_character_of_python_is_known() -> None:
    """A character that a later Unicode adds would otherwise change keys."""
    for space in SPACES:
        keys, others = text_keys([f"a{space}b", "a b"])
        assert others == ([] if ord(space) < 128 else [0])
        assert others or keys[0] == keys[1]
