"""Stage 0 numbers rows and names them as one plain pass with dicts would, however lines fall into batches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.errors import PromptError
from embstore.storage import key_index, placing
from tests.support.stage0 import Stage0, ingested

TEXTS = st.sampled_from(["a", " a ", "b", "c", "d", "e", "a b", "a  b"])
DERIVED = [hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:16] for text in ("a", "b", "c", "a b")]
IDS = st.sampled_from([None, "one", "two", "three", *DERIVED, *(f"{name}-2" for name in DERIVED), f"{DERIVED[0]}-3"])


def _chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


LINES = st.lists(
    st.one_of(
        st.just(None),  # a line without a prompt
        st.tuples(TEXTS.flatmap(lambda text: st.sampled_from([{"prompt": text}, _chat(text)])), IDS),
    ),
    max_size=30,
)


def _expected(lines: list[Any], limit: int | None) -> dict[str, Any] | None:
    """Rows, ids and aliases in one pass over plain dicts; None if an id is given to two prompts."""
    rows: dict[str, int] = {}
    line_rows: list[int] = []
    given: dict[str, int] = {}
    firsts: list[tuple[str, str | None]] = []  # derived id, given id
    for line in lines:
        if limit is not None and len(rows) == limit:
            break
        if line is None:
            line_rows.append(-1)
            continue
        content, prompt_id = line
        text = " ".join(content["prompt"].split()) if "prompt" in content else content["messages"][0]["content"]
        key = json.dumps(["prompt" in content, text])
        if key not in rows:
            rows[key] = len(rows)
            first = " ".join(text.split())
            firsts.append((hashlib.md5(first.encode(), usedforsecurity=False).hexdigest()[:16], prompt_id))
        if prompt_id is not None and given.setdefault(prompt_id, rows[key]) != rows[key]:
            return None
        line_rows.append(rows[key])
    taken = set(given)
    ids: list[str] = []
    for derived, prompt_id in firsts:
        name, ending = prompt_id or derived, 1
        while prompt_id is None and name in taken:
            ending += 1
            name = f"{derived}-{ending}"
        taken.add(name)
        ids.append(name)
    counts = Counter(row for row in line_rows if row >= 0)
    return {
        "line_rows": line_rows,
        "ids": ids,
        "aliases": {**{name: row for row, name in enumerate(ids)}, **given},
        "multiplicity": [counts[row] for row in range(len(rows))],
    }


@settings(max_examples=150, deadline=None)
@given(
    lines=LINES,
    limit=st.none() | st.integers(1, 8),
    batch=st.integers(1, 4),
    is_large=st.booleans(),
)
def test_rows_and_ids_are_those_of_a_plain_pass(
    lines: list[Any], limit: int | None, batch: int, is_large: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = folder / "prompts.jsonl"
    encoded = [b"bad" if line is None else json.dumps({**line[0], "id": line[1]}).encode() for line in lines]
    source.write_bytes(b"".join(line + b"\n" for line in encoded))
    expected = _expected(lines, limit)
    with pytest.MonkeyPatch.context() as patch:
        for module in (placing, key_index):
            patch.setattr(module, "BATCH_BYTES", 1 << 20 if is_large else 100)
            patch.setattr(module, "BATCH_KEYS", batch)
        patch.setattr(key_index, "_FIRST_SLOTS", 2)
        if expected is None or not expected["ids"]:
            with pytest.raises(PromptError):
                ingested(source, folder / "out", limit=limit)
            return
        found: Stage0 = ingested(source, folder / "out", limit=limit)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.keys == sorted(set(found.keys), key=found.keys.index)
    assert len(found.keys) == len(found.ids) == len(found.prompts)
