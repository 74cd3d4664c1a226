"""Parquet files and saved datasets give the rows that the same lines of JSONL give; whatever is no table is refused."""

from __future__ import annotations

import datetime
import decimal
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embstore.core.config import PromptFields
from embstore.core.errors import PromptError
from tests.support.stage0 import Stage0, ingested
from tests.support.stores import small_lines, write_lines

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
pq = pytest.importorskip("pyarrow.parquet")

CHAT = [{"role": "user", "content": "hi"}]


def _whole(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every field on every line, null where it does not apply, as a table has it."""
    names = {name: None for line in lines for name in line}
    return [{**names, **line} for line in lines]


def _parquet(path: Path, lines: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(_whole(lines)), path, **options)
    return path


def _same(left: Stage0, right: Stage0) -> None:
    assert left.files == right.files
    assert left.record == right.record


def test_parquet_is_the_jsonl_it_would_be(tmp_path: Path) -> None:
    lines = [*small_lines(), {"prompt": "  "}, {"src": "no prompt"}, {"prompt": "Explain number 3.", "id": "alias-3"}]
    expected = ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "expected")
    assert expected.record.quarantined == 2
    _same(ingested(_parquet(tmp_path / "p.parquet", lines, row_group_size=7), tmp_path / "found"), expected)
    # by content, not by name
    _same(ingested((tmp_path / "p.parquet").rename(tmp_path / "p.bin"), tmp_path / "renamed"), expected)


def test_a_folder_of_parquet_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    lines = small_lines()
    (tmp_path / "shards").mkdir()
    for number in (2, 0, 1):
        _parquet(tmp_path / "shards" / f"train-{number:05d}.parquet", lines[number * 25 : (number + 1) * 25])
    expected = ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "expected")
    _same(ingested(tmp_path / "shards", tmp_path / "found"), expected)


def test_a_saved_dataset_is_the_jsonl_it_would_be(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lines = small_lines()
    expected = ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "expected")
    dataset = datasets.Dataset.from_list(_whole(lines))
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    _same(ingested(tmp_path / "saved", tmp_path / "found"), expected)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(PromptError, match=r"several splits: train, test$") as caught:
        ingested(tmp_path / "splits", tmp_path / "refused")
    assert caught.value.hint == "choose one with --split train, or --split all"
    _same(ingested(tmp_path / "splits" / "test", tmp_path / "split"), expected)
    # rows in another order than they lie
    turned = list(reversed(range(len(lines))))
    dataset.select(turned).save_to_disk(str(tmp_path / "selected"))
    reversed_lines = write_lines(tmp_path / "r.jsonl", [lines[row] for row in turned])
    _same(ingested(tmp_path / "selected", tmp_path / "picked"), ingested(reversed_lines, tmp_path / "turned"))


def test_values_that_json_lacks(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "score": [float("nan"), 0.5],
            "when": [datetime.date(2026, 1, 2), None],
            "price": [decimal.Decimal("1.50"), None],
            "image": [b"\x89PNG", b""],
            "tags": [["x", None], []],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = ingested(tmp_path / "p.parquet", tmp_path / "found")
    assert [prompt["fields"] for prompt in found.prompts] == [
        {"when": "2026-01-02", "price": "1.50", "tags": ["x", None]},
        {"score": 0.5, "tags": []},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_of_other_names(kind: str, tmp_path: Path) -> None:
    lines = [
        {"question": "2 + 2?", "uid": "q1", "prompt": "not this", "answer": "4"},
        {"talk": CHAT, "uid": "q2"},
        {"uid": "q3", "prompt": "not this"},
    ]
    source = write_lines(tmp_path / "p", lines) if kind == "jsonl" else _parquet(tmp_path / "p", lines)
    from embstore.storage.ingest import ingest
    from tests.support.stage0 import read_stage0

    out = tmp_path / "out"
    out.mkdir()
    names = PromptFields(text="question", messages="talk", id="uid")
    found = read_stage0(out, ingest(source, out, out, strict=False, limit=None, fields=names))
    assert found.ids == ["q1", "q2"]
    assert found.prompts[0] == {"id": "q1", "prompt": "2 + 2?", "fields": {"prompt": "not this", "answer": "4"}}
    assert found.prompts[1] == {"id": "q2", "messages": CHAT}
    assert found.quarantine == [(3, "no prompt: none of the fields question, talk; the fields are uid, prompt")]


def _refused(source: Path, match: str) -> None:
    out = source.parent / "refused"
    out.mkdir(exist_ok=True)
    with pytest.raises(PromptError, match=match) as caught:
        ingested(source, out)
    assert caught.value.hint
    assert list(out.iterdir()) == []


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "contains no prompts file")
    whole = _parquet(tmp_path / "whole.parquet", small_lines()).read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], whole[:4], whole[:-40] + bytes(40))):
        (tmp_path / f"{number}.parquet").write_bytes(content)
        _refused(tmp_path / f"{number}.parquet", "reading prompts .* failed")
    saved = tmp_path / "saved"
    saved.mkdir()
    for state, match in (
        ("{", "not valid JSON"),
        ("[]", "does not name data files"),
        ('{"_data_files": [{"filename": "../whole.parquet"}]}', "does not name data files"),
        (
            '{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}',
            "index file that selects rows",
        ),
        ('{"_data_files": [{"filename": "missing.arrow"}]}', r"missing\.arrow: No such file"),
    ):
        (saved / "state.json").write_text(state)
        _refused(saved, match)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pa.OSFile(str(saved / "good.arrow"), "wb") as file:
        table = pa.table({"prompt": [f"text {index}" for index in range(50)]})
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    content = (saved / "good.arrow").read_bytes()
    for start in range(0, len(content) - 200, 97):  # wherever it is damaged: rows, or a refusal, never a crash
        (saved / "a.arrow").write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
        try:
            ingested(saved, tmp_path / "maybe")
        except PromptError as error:
            assert error.hint  # noqa: PT017


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _parquet(tmp_path / "p.parquet", small_lines())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError, match="needs pyarrow") as caught:
        ingested(source, tmp_path / "out")
    assert caught.value.hint == "pip install 'embstore[parquet]'"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_reading_takes_bounded_memory(kind: str, tmp_path: Path) -> None:
    """150 MB of texts in one row group: what a process takes to read them does not grow with the file."""
    text = "x" * 10_000
    source = tmp_path / "p.parquet"
    table = pa.table({"prompt": [f"{index} {text}" for index in range(15_000)]})
    if kind == "parquet":
        pq.write_table(table, source, row_group_size=15_000, compression="none", use_dictionary=False)
    else:
        source = tmp_path / "saved"
        source.mkdir()
        (source / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
        with pa.OSFile(str(source / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    code = """
import sys
from pathlib import Path
from embstore.host.memory import MemoryMeter
from embstore.storage.prompt_source import open_records
import pyarrow.parquet
with MemoryMeter() as meter:
    meter.set_baseline()
    with open_records(sys.argv[1]) as records:
        print(sum(1 for record in records), meter.peak_anonymous_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code, source], check=True, capture_output=True, text=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 15_000
    assert peak < 64 << 20
