"""A chat is the same prompt whoever wrote it: every writer's file gives the same rows and the same rendered text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from embstore.core.config import CURRENT_RULE, USUAL_FIELDS
from embstore.core.prompts import Prompt, encode_row
from embstore.storage.prompt_source import open_source
from tests.support.pools import WRITERS, Record, pools
from tests.support.templates import PRINTS_ALL, rendered


def _read(source: Path) -> list[Prompt]:
    with open_source(source, USUAL_FIELDS, CURRENT_RULE) as prompts:
        found = list(prompts)
    assert all(isinstance(prompt, Prompt) for prompt in found), found
    return [prompt for prompt in found if isinstance(prompt, Prompt)]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "json"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(records=pools())
def test_a_pool_is_the_same_prompts_by_every_writer(name: str, records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        expected = _read(WRITERS["json"](Path(scratch) / "expected", records))
        found = _read(WRITERS[name](Path(scratch) / "found", records))
    assert [prompt.id for prompt in found] == [record["id"] for record in records]
    assert [prompt.digest for prompt in found] == [prompt.digest for prompt in expected]
    assert [prompt.verbatim_digest for prompt in found] == [prompt.verbatim_digest for prompt in expected]
    assert [json.dumps(prompt.chat) for prompt in found] == [json.dumps(prompt.chat) for prompt in expected]
    assert rendered(found, PRINTS_ALL) == rendered(expected, PRINTS_ALL)
    assert {prompt.fields.get("score") for prompt in found} == {prompt.fields.get("score") for prompt in expected}


@settings(deadline=None, max_examples=25)
@given(records=pools())
def test_a_canonical_row_is_canonical(records: list[Record]) -> None:
    """What prompts.jsonl holds is a fixed point: a store's own rows, given again, are the same rows."""
    with tempfile.TemporaryDirectory() as scratch:
        first = _read(WRITERS["json"](Path(scratch) / "first", records))
        (Path(scratch) / "again").write_bytes(b"".join(encode_row(prompt) for prompt in first))
        again = _read(Path(scratch) / "again")
    assert [prompt.digest for prompt in again] == [prompt.digest for prompt in first]
    assert [json.dumps(prompt.chat) for prompt in again] == [json.dumps(prompt.chat) for prompt in first]
