"""The prompts of a store by row: every way to read them gives the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.errors import CorruptStoreError
from embstore.core.prompts import Prompt, encode_row
from embstore.core.rows import RowRange
from embstore.storage.prompt_table import PromptTable

IDS = [
    "plain",
    "",
    'a "quoted" one',
    "back\\slash",
    "tab\there",
    "é 雪 \U0001f600",
    "\u2028",
    "\x7f",
    '", "prompt": "',
    "a" * 3000,
]


def written(folder: Path, ids: list[str]) -> tuple[PromptTable, list[Prompt]]:
    prompts = [
        Prompt(id=row_id, text=f"text {row}") if row % 2 else Prompt(id=row_id, messages=({"role": "user", "content": "a"},))
        for row, row_id in enumerate(ids)
    ]
    (folder / "prompts.jsonl").write_bytes(b"".join(map(encode_row, prompts)))
    return PromptTable(folder / "prompts.jsonl", len(ids)), prompts


def test_every_reader_gives_the_rows_as_they_were_written(tmp_path: Path) -> None:
    table, prompts = written(tmp_path, IDS * 3)
    assert list(table) == prompts == table.read(RowRange(0, len(prompts)))
    assert list(table.ids()) == [prompt.id for prompt in prompts]
    rows = [7, 0, 29, 7]
    assert list(table.each(iter(rows))) == [prompts[row] for row in rows] == table.sample(rows)


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=8))
def test_ids_of_any_characters_are_read(ids: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    table, _ = written(tmp_path_factory.mktemp("any"), ids)
    assert list(table.ids()) == ids


@pytest.mark.parametrize(("max_bytes", "max_rows"), [(1, 100), (200, 100), (4000, 100), (1 << 20, 3), (1 << 20, 100)])
def test_blocks_are_all_rows_in_order_and_of_bounded_size(max_bytes: int, max_rows: int, tmp_path: Path) -> None:
    table, prompts = written(tmp_path, IDS * 3)
    sizes = [len(encode_row(prompt)) for prompt in prompts]
    blocks = list(table.blocks(max_bytes, max_rows))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(len(prompts)))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        size = sum(sizes[block.as_slice()])
        assert block.num_rows == 1 or (size <= max_bytes and block.num_rows <= max_rows)
        if following is not None:  # another row would have been too much
            assert block.num_rows == max_rows or size + sizes[following.start] > max_bytes


def test_a_line_that_is_not_a_row_is_damage_to_every_reader(tmp_path: Path) -> None:
    for line in (b'{"id": "\xff\xfe", "prompt": "some text"}\n', b'{"prompt": "no id, and not\\ud800 text"}\n'):
        (tmp_path / "prompts.jsonl").write_bytes(line)
        table = PromptTable(tmp_path / "prompts.jsonl", 1)
        for read in (lambda table=table: list(table.ids()), lambda table=table: list(table)):
            with pytest.raises(CorruptStoreError):
                read()


@pytest.mark.parametrize("short", [0, 3, 9])
def test_a_line_too_short_for_a_row_is_damage_wherever_it_is(short: int, tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(row), "prompt": "some text"}).encode() + b"\n" for row in range(10)]
    PromptTable(_file(tmp_path, lines), 10)
    lines[short] = b'{"id": "", "prompt":""}\n'
    with pytest.raises(CorruptStoreError, match="does not contain the 10 rows"):
        PromptTable(_file(tmp_path, lines), 10)


def _file(folder: Path, lines: list[bytes]) -> Path:
    (folder / "prompts.jsonl").write_bytes(b"".join(lines))
    return folder / "prompts.jsonl"
