"""Whatever the lines: each is a row, a repeat or quarantined, rows are numbered by first occurrence, and ids are unique."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.errors import PromptError
from tests.support.stage0 import Stage0, ingested
from tests.support.stores import write_lines

WORDS = ["alpha", "beta", "gamma", "delta"]
TEXT = st.builds(str.format, st.sampled_from(["{0}", " {0}\n", "{0}\t{0}", "{0} {0}"]), st.sampled_from(WORDS))
GOOD = st.builds(lambda text, src: json.dumps({"prompt": text, "src": src}).encode() + b"\n", TEXT, st.sampled_from("ab"))
CHAT = st.builds(lambda text: json.dumps({"messages": [{"role": "user", "content": text}]}).encode() + b"\n", TEXT)
BAD = st.sampled_from([b"\n", b"no JSON\n", b"[]\n", b'{"prompt": ""}\n', b'{"text": "a"}\n', b"\xff\n", b'{"prompt": 1}\n'])
LINES = st.lists(GOOD | CHAT | BAD, min_size=1, max_size=25)


def _stage0(lines: list[bytes], *, limit: int | None = None) -> Stage0 | None:
    with tempfile.TemporaryDirectory() as scratch:
        source = write_lines(Path(scratch) / "prompts.jsonl", lines)
        try:
            return ingested(source, Path(scratch) / "out", limit=limit)
        except PromptError:
            return None


def _identity(line: bytes) -> object:
    """What makes two lines the same row; None for a line without a prompt. Written from the documentation, not the code."""
    try:
        record = json.loads(line)
        text, messages = record.get("prompt"), record.get("messages")
    except (ValueError, AttributeError):
        return None
    if isinstance(text, str) and text.strip():
        return " ".join(text.split())
    return ("chat", messages[0]["content"]) if messages else None


@settings(deadline=None, max_examples=40)
@given(LINES)
def test_every_line_is_a_row_a_repeat_or_quarantined(lines: list[bytes]) -> None:
    identities = [_identity(line) for line in lines]
    rows = list(dict.fromkeys(identity for identity in identities if identity is not None))
    found = _stage0(lines)
    if not rows:
        assert found is None
        return
    assert found is not None
    assert found.line_rows == [-1 if identity is None else rows.index(identity) for identity in identities]
    assert found.multiplicity == [identities.count(identity) for identity in rows]
    assert [line for line, _ in found.quarantine] == [n for n, identity in enumerate(identities, 1) if identity is None]
    assert found.record.rows == len(found.ids) == len(set(found.ids)) == len(rows)
    assert found.record.rows + found.record.repeats + found.record.quarantined == found.record.lines == len(lines)
    assert [found.aliases[row_id] for row_id in found.ids] == list(range(len(rows)))
    firsts = [json.loads(lines[identities.index(identity)]) for identity in rows]
    assert [prompt.get("fields", {}).get("src") for prompt in found.prompts] == [first.get("src") for first in firsts]


@settings(deadline=None, max_examples=25)
@given(LINES, st.data())
def test_a_repeat_raises_multiplicity_and_a_bad_line_nothing(lines: list[bytes], data: st.DataObject) -> None:
    before = _stage0(lines)
    if before is None:
        return
    again = data.draw(st.sampled_from(lines), label="repeated")
    after = _stage0([*lines, again, b"bad\n"])
    assert after is not None
    row = before.line_rows[lines.index(again)]
    assert after.record.fingerprint == before.record.fingerprint
    assert (after.ids, after.texts, after.keys) == (before.ids, before.texts, before.keys)
    assert after.multiplicity == [count + (index == row) for index, count in enumerate(before.multiplicity)]
    assert after.line_rows == [*before.line_rows, row, -1]


@settings(deadline=None, max_examples=25)
@given(LINES, st.integers(1, 6))
def test_a_limit_gives_the_first_rows_of_the_whole(lines: list[bytes], limit: int) -> None:
    whole, part = _stage0(lines), _stage0(lines, limit=limit)
    if whole is None or part is None:
        assert whole is part
        return
    rows = min(limit, whole.record.rows)
    assert part.texts == whole.texts[:rows]
    assert part.line_rows == whole.line_rows[: part.record.lines]
    assert max(part.line_rows) == rows - 1
