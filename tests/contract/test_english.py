"""The rules of ``scripts/english.toml``: each catches its examples, and nothing that is right."""

from __future__ import annotations

import re
import tomllib

import pytest

from scripts import check_english
from scripts.check_english import Rule, find

DOCUMENT = tomllib.loads(check_english.RULES.read_text(encoding="utf-8"))
RULES = check_english.read_rules(DOCUMENT)
IS_NO = [Rule(pattern=re.compile("is no "), instead="is not", catches=(), allows=(), exceptions=("is no end",))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.catches[0])
def test_a_rule_catches_its_examples_and_allows_what_is_right(rule: Rule) -> None:
    assert rule.catches
    assert rule.allows
    assert [text for text in rule.catches if not list(rule.matches(text))] == []
    assert [text for text in rule.allows if list(rule.matches(text))] == []


def test_of_python_only_strings_and_comments_are_read_with_the_right_lines() -> None:
    source = "\n".join(
        [
            '"""A page that is',  # found across the lines of a docstring, reported where the phrase begins
            'no page."""',
            "beside = is_no = 1  # this is",
            "# no comment of the line above, and this is",
            "# no new sentence",
            "text = (f'{beside} is ' f'no store')",
            "text = f\"{len('that is no text')}\"",
            "# there is no end to it",
        ]
    )
    found = find(source, IS_NO, is_python=True)
    assert [(finding.line, finding.phrase) for finding in found] == [(line, "is no ") for line in (1, 4, 6, 7)]


def test_code_blocks_of_a_page_are_not_read() -> None:
    page = "this is\nno page\n\n```python\nx = 'is no page'\n```\n\nthat is no page\n"
    assert [finding.line for finding in find(page, IS_NO, is_python=False)] == [1, 8]


def test_an_exception_covers_its_phrase_only() -> None:
    assert not list(IS_NO[0].matches("there is no end"))
    assert len(list(IS_NO[0].matches("there is no end, and is no start"))) == 1


def test_every_exception_says_why() -> None:
    for entry in DOCUMENT.get("exception", []):
        assert entry["why"]
