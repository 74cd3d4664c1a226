"""Formats of prompts beside JSONL: JSON arrays, CSV, Feather and Arrow; and files that are something else, named."""

from __future__ import annotations

import csv
import datetime
import io
import json
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embstore.core.config import USUAL_FIELDS, PromptFields
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt, Rejected
from embstore.storage.prompt_source import open_source
from tests.support.stage0 import Stage0, ingested
from tests.support.stores import small_lines, write_lines

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")


def same(left: Stage0, right: Stage0) -> None:
    assert left.files == right.files
    assert left.record == right.record


def read(source: Path, names: PromptFields = USUAL_FIELDS) -> list[Prompt | Rejected]:
    with open_source(source, names) as prompts:
        return list(prompts)


def reasons(source: Path) -> list[str]:
    return [each.reason if isinstance(each, Rejected) else "" for each in read(source)]


# --- JSON arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_json_array_is_the_lines_it_would_be(indent: int | None, tmp_path: Path) -> None:
    lines: list[Any] = [*small_lines(), "no object", {"prompt": "  "}, {"prompt": "Explain number 3.", "id": "alias"}]
    (tmp_path / "p.json").write_text(json.dumps(lines, indent=indent))
    same(
        ingested(tmp_path / "p.json", tmp_path / "found"), ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "x")
    )


def test_objects_over_several_lines_are_the_lines_they_would_be(tmp_path: Path) -> None:
    lines = small_lines()
    (tmp_path / "p.json").write_text("\n".join(json.dumps(line, indent=4) for line in lines))
    same(
        ingested(tmp_path / "p.json", tmp_path / "found"), ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "x")
    )


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(_VALUES, max_size=6), indent=st.sampled_from([None, 0, 3]), block=st.integers(1, 40))
def test_elements_of_an_array_are_what_json_loads_gives(
    values: list[Any], indent: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks in which it is read: a number, an escape or a character may lie across two of them."""
    from embstore.core import json_text

    monkeypatch.setattr(json_text, "_READ_BYTES", block)
    content = json.dumps(values, indent=indent, ensure_ascii=block % 2 == 0).encode("utf-8", "surrogatepass")
    if values:
        expected = json.loads(content.decode("utf-8", "surrogatepass"))
        found = [json.loads(each.decode("utf-8", "surrogatepass")) for each in json_text.elements(io.BytesIO(content), "f")]
        assert found == expected
    else:
        assert list(json_text.elements(io.BytesIO(content), "f")) == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', "element 2"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "element 1 is followed by neither a comma nor the end"),
        ('[{"prompt": "a"},]', "element 2"),
        ('[{"prompt": "a"}', "element 1 is followed by neither a comma nor the end"),
        ('[{"prompt": "a"},\n{"prompt": "b"}]\n[1]', "the array is followed by more text"),
        ("[" * 100_000, "nested too deep"),
        ('{\n "prompt": "a"\n}\n{\n "prompt"', "element 2"),
    ],
)
def test_a_broken_array_is_refused_with_its_place(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(PromptError, match=match) as caught:
        ingested(tmp_path / "p.json", tmp_path / "out")
    assert caught.value.hint


def test_a_bad_element_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(
        b'[{"prompt": "a"}, {"prompt": "caf\xe9"}, {"prompt": 1, "prompt": 2}, {"prompt": "b"}]'
    )
    assert reasons(tmp_path / "p.json") == ["", "not UTF-8 (byte 15)", "the key 'prompt' occurs twice in an object", ""]


def test_lines_are_not_taken_for_an_array(tmp_path: Path) -> None:
    """A first line that is a list, or begins like one, is one bad line."""
    for content in (
        b'["a"]\n{"prompt": "b"}\n',
        b'["a"] x\n{"prompt": "b"}\n',
        b'[broken\n{"prompt": "b"}\n',
        b'{"a":\n{"prompt": "b"}\n',
        b'{"a": 1} x\n{"prompt": "b"}\n',
        b'{"a": 1\n{"prompt": "b"}\n',
    ):
        (tmp_path / "p.jsonl").write_bytes(content)
        first, second = read(tmp_path / "p.jsonl")
        assert isinstance(first, Rejected)
        assert isinstance(second, Prompt)


_ELEMENTS = ['{"prompt": "a"}', '{"id":\n{"x": 1},\n"prompt": "b"}', '{"prompt": "c"}', '{"prompt": "d"}']


@pytest.mark.parametrize(
    "content",
    [
        "[" + ",\n".join(_ELEMENTS) + "\n]\n",
        "[" + ",\n".join(reversed(_ELEMENTS)) + "\n]\n",
        "[\n" + ",\n".join(_ELEMENTS) + "\n]",
        "[ " + "\n, ".join(_ELEMENTS) + "\n]",
        "[" + _ELEMENTS[0] + ",\n\n" + _ELEMENTS[2] + "\n]\n",
        "[" + _ELEMENTS[0] + "\n,\n" + _ELEMENTS[2] + "\n]\n",
        "[" + _ELEMENTS[1] + "\n]\n",
        '[{"id":\n{"x": 1}\n, "prompt": "b"}\n]\n',
        '{"id":\n{"x": 1}\n, "prompt": "b"}\n',
        "\n".join(_ELEMENTS[1:]),
        '{"prompt": "a",\n"id": "x"}\n' + _ELEMENTS[0],
    ],
)
def test_an_array_is_known_however_its_elements_lie_on_lines(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    count = content.count('"prompt"')
    assert reasons(tmp_path / "p.jsonl") == [""] * count


def test_an_element_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embstore.core.json_text.MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "x" * (5 << 20)}]))
    with pytest.raises(PromptError, match="element 2 is longer than 1 MiB"):
        ingested(tmp_path / "p.json", tmp_path / "out")


# --- CSV ---------------------------------------------------------------------------------------------------------------

_CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from('",;\t\n'), max_size=12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_CELLS, _CELLS), min_size=1, max_size=6), kind=st.sampled_from([",", "\t", ";"]))
def test_a_csv_file_is_the_records_it_was_written_from(rows: list[tuple[str, str]], kind: str, tmp_path: Path) -> None:
    with (tmp_path / "any name").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=kind, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "src"), *rows])
    lines = [{name: cell for name, cell in zip(("prompt", "src"), row, strict=True) if cell} for row in rows]
    expected = read(write_lines(tmp_path / "p.jsonl", lines))
    assert [each if isinstance(each, Prompt) else None for each in read(tmp_path / "any name")] == [
        each if isinstance(each, Prompt) else None for each in expected
    ]


def test_a_csv_file_is_known_by_its_name_or_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("question\tn\nWhat?\t1\n")
    (found,) = read(tmp_path / "q.tsv", PromptFields(text="question"))
    assert isinstance(found, Prompt)
    assert (found.text, found.fields) == ("What?", {"n": "1"})
    (tmp_path / "bom").write_bytes('\ufeffid,prompt\r\na,"two\r\nlines"\r\n'.encode())
    (found,) = read(tmp_path / "bom")
    assert isinstance(found, Prompt)
    assert (found.id, found.text) == ("a", "two\r\nlines")
    (tmp_path / "chat.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""hi""}]"\n')
    (found,) = read(tmp_path / "chat.csv")
    assert isinstance(found, Prompt)
    assert found.messages == ({"role": "user", "content": "hi"},)


def test_a_bad_row_of_a_csv_file_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'id,prompt\n1,a\n2\n3,caf\xe9\n4,"x"y\n5,b\n')
    with open_source(tmp_path / "p.csv", USUAL_FIELDS) as prompts:
        found = list(prompts)
        places = [prompts.where(record) for record in range(1, len(found) + 1)]
    assert places == [f"line {line} of {tmp_path / 'p.csv'}" for line in (2, 3, 4, 5, 6)]
    assert reasons(tmp_path / "p.csv") == [
        "",
        "1 values, but the header names 2",
        "bytes that are not UTF-8 (byte 3)",
        "not a CSV row (',' expected after '\"')",
        "",
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("last", ['x,"said"', 'x,5 inches"', '"x",y', 'x,an ""a""\n"x",y', 'x,"b",c\nx,"d"', 'x"'])
def test_a_quotation_mark_too_many_loses_no_line_without_counting_it(last: str, ending: str, tmp_path: Path) -> None:
    """Whatever the mark is that ends the value again, each line is a record, with its own line number."""
    rows = ["id,prompt", "good,text", '0,"no end', *(f"{row},text {row}" for row in range(50)), *last.split("\n"), "y,end"]
    path = tmp_path / f"p.{ending}"
    path.write_text("\n".join(rows).replace(",", {"csv": ",", "tsv": "\t"}[ending]) + "\n")
    with open_source(path, USUAL_FIELDS) as prompts:
        found = list(prompts)
        assert [prompts.where(record + 1) for record in range(len(found))] == [
            f"line {line} of {path}" for line in range(2, len(rows) + 1)
        ]
    assert isinstance(found[0], Prompt)
    assert isinstance(found[-1], Prompt)
    lost = [each.reason for each in found if isinstance(each, Rejected)]
    assert len(lost) >= 52
    assert all(reason.endswith("are read as one row") for reason in lost[:52])
    assert "lines 3 to 5" in lost[0]


def test_long_values_of_a_csv_file_are_values(tmp_path: Path) -> None:
    """Code, prose and a small table over several lines: what follows them keeps its line number."""
    values = ["\n".join(f"f({row}, {row})" if row % 3 else "pass" for row in range(200)), "a, b\n" * 9, "a\n" * 500]
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "prompt"), *enumerate(values), ("last",)])
    with open_source(tmp_path / "p.csv", USUAL_FIELDS) as prompts:
        *found, bad = prompts
        places = [prompts.where(record).split()[1] for record in range(1, 5)]
    assert [each.text for each in found if isinstance(each, Prompt)] == values
    assert isinstance(bad, Rejected)
    assert places == ["2", "202", "212", "713"]


def test_a_quoted_value_that_does_not_end_names_the_line_where_its_row_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{row},text {row}\n" for row in range(100))
    (tmp_path / "p.csv").write_text(f'id,prompt\na,"two\nlines"\n0,"no end\n{rows}')
    match = r"a quoted value of the row that begins on line 4 does not end \(read to line 104\)"
    with pytest.raises(PromptError, match=match):
        ingested(tmp_path / "p.csv", tmp_path / "out")
    (tmp_path / "p.csv").write_text("id,prompt\n" + 'x","y\n' * 1000)
    monkeypatch.setattr("embstore.storage.csv_source.MAX_LINE_BYTES", 100)  # the reader would hold every value
    with pytest.raises(PromptError, match=r"begins on line 2 does not end \(read to line 18\)"):
        ingested(tmp_path / "p.csv", tmp_path / "out")
    (tmp_path / "p.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(PromptError, match="names 'prompt' twice"):
        ingested(tmp_path / "p.csv", tmp_path / "out")


# --- Arrow -------------------------------------------------------------------------------------------------------------


def _write(kind: str, table: Any, path: Path) -> None:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind.startswith("feather"):
        feather.write_feather(table, str(path), compression=kind.partition(" ")[2], chunksize=9)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=9)


KINDS = ["parquet", "feather lz4", "feather zstd", "feather uncompressed", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_the_lines_it_would_be(kind: str, tmp_path: Path) -> None:
    lines = [*small_lines(), {"prompt": "  "}, {"src": "no prompt"}]
    names = {name: None for line in lines for name in line}
    _write(kind, pa.Table.from_pylist([{**names, **line} for line in lines]), tmp_path / "table")
    found, expected = (
        ingested(tmp_path / "table", tmp_path / "found"),
        ingested(write_lines(tmp_path / "p", lines), tmp_path / "x"),
    )
    found.files.pop("quarantine.jsonl"), expected.files.pop("quarantine.jsonl")  # a table has every field on every row
    assert found.files == expected.files
    assert found.record.quarantined == expected.record.quarantined == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("binary", ["binary", "large_binary", "binary_view"])
def test_text_and_ids_that_are_stored_as_binary_are_text(kind: str, binary: str, tmp_path: Path) -> None:
    if kind == "parquet" and binary == "binary_view":
        pytest.skip("Parquet gives it back as binary")
    type_ = getattr(pa, binary)()
    table = pa.table(
        {
            "id": pa.array([b"r0", b"r1", b"r2"], type_),
            "prompt": pa.array(["Wie heißt du?".encode(), b"caf\xe9", b"b"], type_),
            "image": pa.array([b"\x89PNG"] * 3, type_),
            "nested": pa.array([{"bytes": b"x", "path": "p"}] * 3, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "src": ["a"] * 3,
        }
    )
    _write(kind, table, tmp_path / "table")
    found = ingested(tmp_path / "table", tmp_path / "found")
    assert found.prompts == [
        {"id": "r0", "prompt": "Wie heißt du?", "fields": {"src": "a"}},
        {"id": "r2", "prompt": "b", "fields": {"src": "a"}},
    ]
    assert found.quarantine == [(2, "bytes that are not UTF-8 (byte 3)")]


def test_chats_of_binary_text_are_chats(tmp_path: Path) -> None:
    message = pa.struct({"role": pa.binary(), "content": pa.binary()})
    pq.write_table(
        pa.table({"messages": pa.array([[{"role": b"user", "content": b"hi"}]], pa.list_(message))}), tmp_path / "p.parquet"
    )
    assert ingested(tmp_path / "p.parquet", tmp_path / "out").prompts[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_text_column_that_is_not_utf8_costs_only_its_rows(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"better"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    assert reasons(tmp_path / "p.parquet") == ["", "bytes that are not UTF-8 (byte 3)", ""]


def _bad_texts(kind: Any) -> Any:
    """A column of a text type whose second value is not UTF-8."""
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}[kind]
    return pa.array([b"good", b"caf\xe9", b"better"]).cast(binary).view(kind)


def _bad_columns() -> dict[str, Any]:
    """Columns of which pyarrow gives the first and the last value, and not the second; of some it gives a wrong one."""
    text, each = _bad_texts(pa.string()), pa.array([0, 1, 2, 3], pa.int32())
    numbers = {
        pa.timestamp("us"): (0, 1 << 62),
        pa.timestamp("s"): (0, 1 << 62),
        pa.timestamp("ms", tz="UTC"): (0, -(1 << 62)),
        pa.duration("s"): (0, 1 << 62),
        pa.date32(): (0, 1 << 30),
        pa.date64(): (0, 1 << 62),
        pa.time32("s"): (0, 1 << 30),
        pa.time64("us"): (0, 1 << 62),
    }
    wide = pa.array([b"\1" + bytes(15), b"\xff" * 15 + b"\x7f", b"\1" + bytes(15)], pa.binary(16))
    times = pa.array([0, 1 << 62, 0], pa.timestamp("us"))
    return {
        **{str(kind): pa.array([good, bad, good], kind) for kind, (good, bad) in numbers.items()},
        **{str(kind): _bad_texts(kind) for kind in (pa.string(), pa.large_string(), pa.string_view())},
        "decimal": wide.view(pa.decimal128(5, 1)),
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), text),
        "list": pa.ListArray.from_arrays(each, text),
        "large list": pa.LargeListArray.from_arrays(each.cast(pa.int64()), text),
        "fixed list": pa.FixedSizeListArray.from_arrays(text, 1),
        "struct": pa.StructArray.from_arrays([text, pa.array([1, 2, 3])], names=["a", "b"]),
        "map": pa.MapArray.from_arrays(each, text, text),
        "deep": pa.ListArray.from_arrays(each, pa.StructArray.from_arrays([times, text], names=["when", "a"])),
    }


BAD = _bad_columns()
# pyarrow does not write the first three, and of the last it refuses to read any value
NOT_PARQUET = {"timestamp[s]", "date64[ms]", "decimal", "dictionary"}


@pytest.mark.parametrize("kind", ["parquet", "feather zstd", "stream"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_beside_the_prompt_costs_neither_the_build_nor_the_row(bad: str, kind: str, tmp_path: Path) -> None:
    if kind == "parquet" and bad in NOT_PARQUET:
        pytest.skip("pyarrow does not write it, or does not read it")
    texts = ["first", "second", "third"]
    for name in ("other", "id"):
        _write(kind, pa.table({"prompt": texts, name: BAD[bad], "src": ["a"] * 3}), tmp_path / name)
        found = read(tmp_path / name)
        assert [each.text for each in found if isinstance(each, Prompt)] == texts
        assert all(each.fields["src"] == "a" for each in found if isinstance(each, Prompt))
    other = [each.fields.get("other") for each in read(tmp_path / "other") if isinstance(each, Prompt)]
    assert other[0] is not None
    assert other[2] is not None
    ids = [each.id for each in read(tmp_path / "id") if isinstance(each, Prompt)]
    if pa.types.is_temporal(BAD[bad].type) or "string" in bad or bad == "dictionary":
        assert ids[0] is not None
        assert ids[2] is not None


@pytest.mark.parametrize("kind", ["parquet", "feather zstd", "stream"])
@pytest.mark.parametrize("bad", ["string", "large_string", "string_view", "dictionary", "timestamp[us]", "date32[day]"])
def test_a_bad_value_in_place_of_the_prompt_costs_that_line(bad: str, kind: str, tmp_path: Path) -> None:
    if kind == "parquet" and bad in NOT_PARQUET:
        pytest.skip("pyarrow does not write it, or does not read it")
    _write(kind, pa.table({"prompt": BAD[bad], "other": BAD["deep"]}), tmp_path / "texts")
    found = reasons(tmp_path / "texts")
    assert found[::2] == ["", ""]
    assert found[1].startswith(("bytes that are not UTF-8 (byte 3)", "a value that cannot be read ("))
    each = pa.array([0, 1, 2, 3], pa.int32())
    turn = pa.StructArray.from_arrays(
        [pa.array(["user"] * 3), BAD["string"], BAD["timestamp[us]"]], names=["role", "content", "x"]
    )
    _write(kind, pa.table({"messages": pa.ListArray.from_arrays(each, turn)}), tmp_path / "chats")
    assert [bool(reason) for reason in reasons(tmp_path / "chats")] == [False, True, False]


def test_times_finer_than_microseconds_need_no_pandas(tmp_path: Path) -> None:
    when = pa.array([1, 2000, 3], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "when": when, "src": ["x"] * 3}), tmp_path / "p.parquet")
    code = """
import sys
class NoPandas:
    def find_spec(self, name, *others):
        if name == "pandas":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPandas())
from embstore.core.config import USUAL_FIELDS
from embstore.storage.prompt_source import open_source
with open_source(sys.argv[1], USUAL_FIELDS) as prompts:
    print([(prompt.text, dict(prompt.fields)) for prompt in prompts])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "p.parquet"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(
        [("a", {"src": "x"}), ("b", {"when": "1970-01-01 00:00:00.000002", "src": "x"}), ("c", {"src": "x"})]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_one_name_are_refused_where_they_are_of_a_prompt(kind: str, tmp_path: Path) -> None:
    columns = [pa.array(["a", "b"]), pa.array(["c", "d"])]
    _write(kind, pa.Table.from_arrays(columns, names=["prompt", "prompt"]), tmp_path / "twice")
    with pytest.raises(PromptError, match=r"twice has 2 columns named 'prompt'") as caught:
        read(tmp_path / "twice")
    assert caught.value.hint
    _write(kind, pa.Table.from_arrays([*columns, *columns], names=["prompt", "src", "src", "n"]), tmp_path / "other")
    assert [each.fields for each in read(tmp_path / "other") if isinstance(each, Prompt)] == [{"n": "c"}, {"n": "d"}]
    same_name = pa.StructArray.from_arrays(columns, names=["x", "x"])
    _write(kind, pa.table({"prompt": columns[0], "other": same_name}), tmp_path / "inner")
    assert reasons(tmp_path / "inner") == ["", ""]


CHATS: list[dict[str, Any]] = [
    {"id": "c0", "messages": [{"role": "user", "content": "How warm is it?"}], "answer": {"n": 1}},
    {"id": "c1", "messages": [{"role": "user", "content": "[1, 2]"}, {"role": "assistant", "content": ""}], "answer": "x"},
]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_a_json_type_are_decoded_at_every_depth(kind: str, tmp_path: Path) -> None:
    json_type = pa.json_(pa.string())
    whole = pa.table(
        {
            "id": [chat["id"] for chat in CHATS],
            "messages": pa.array([_json(chat["messages"]) for chat in CHATS]).cast(json_type),
            "answer": pa.array([_json(chat["answer"]) for chat in CHATS]).cast(json_type),
        }
    )
    storage = pa.array([[_json(message) for message in chat["messages"]] for chat in CHATS])
    lists = whole.set_column(1, "messages", storage.cast(pa.list_(json_type)))
    expected = ingested(write_lines(tmp_path / "p.jsonl", CHATS), tmp_path / "expected")
    for name, table in {"whole": whole, "lists": lists}.items():
        _write(kind, table, tmp_path / name)
        same(ingested(tmp_path / name, tmp_path / f"{name}-out"), expected)


def test_texts_of_a_json_type_lose_their_quotation_marks(tmp_path: Path) -> None:
    """A column that holds chats and texts, as ``datasets`` writes it with on_mixed_types="use_json"."""
    values: list[Any] = ["How cold is it?", CHATS[0]["messages"], None]
    texts = [None if value is None else _json(value) for value in values] + ["{broken"]
    pq.write_table(pa.table({"prompt": pa.array(texts).cast(pa.json_(pa.string()))}), tmp_path / "p.parquet")
    text, chat, absent, broken = read(tmp_path / "p.parquet")
    assert isinstance(text, Prompt)
    assert text.text == "How cold is it?"
    assert isinstance(chat, Prompt)
    assert chat.messages == tuple(CHATS[0]["messages"])
    assert isinstance(absent, Rejected)
    assert isinstance(broken, Rejected)
    assert broken.reason.startswith("JSON that cannot be read (Expecting property name")


def test_what_datasets_writes_with_json_features_is_what_it_was(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("datasets without the Json feature")
    features = datasets.Features(
        {"id": datasets.Value("string"), "messages": datasets.List(datasets.Json()), "answer": datasets.Json()}
    )
    dataset = datasets.Dataset.from_list(CHATS, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "p.parquet"))
    expected = ingested(write_lines(tmp_path / "p.jsonl", CHATS), tmp_path / "expected")
    same(ingested(tmp_path / "saved", tmp_path / "a"), expected)
    same(ingested(tmp_path / "p.parquet", tmp_path / "b"), expected)


def test_maps_and_uuids_are_objects_and_ids(tmp_path: Path) -> None:
    names = [uuid.UUID(int=number) for number in (1, 2)]
    table = pa.table(
        {
            "id": pa.array([name.bytes for name in names], pa.binary(16)).cast(pa.uuid()),
            "messages": pa.array(
                [[[("role", "user"), ("content", f"hi {row}")]] for row in range(2)],
                pa.list_(pa.map_(pa.string(), pa.string())),
            ),
            "when": [datetime.date(2026, 1, 2)] * 2,
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = ingested(tmp_path / "p.parquet", tmp_path / "out")
    assert found.ids == [str(name) for name in names]
    assert [prompt["messages"][0]["content"] for prompt in found.prompts] == ["hi 0", "hi 1"]


# --- other kinds -------------------------------------------------------------------------------------------------------


def _zip(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, '{"prompt": "a"}\n' * 3)


def _numpy(path: Path, write: Callable[..., object]) -> None:
    with path.open("wb") as file:
        write(file, np.ones(3))


def _sqlite(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table t (prompt text)")
    connection.commit()
    connection.close()


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("p.jsonl"))


def _torch(path: Path, *, zipped: bool = True) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)


def _safetensors(path: Path) -> None:
    pytest.importorskip("safetensors.numpy").save_file({"a": np.ones(3)}, path)


LINES = '{"prompt": "a"}\n{"prompt": "b"}\n'
OTHERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "zip": (lambda path: _zip(path, ["p.jsonl"]), "a ZIP archive", "unzip -p"),
    "xlsx": (lambda path: _zip(path, ["[Content_Types].xml", "xl/workbook.xml"]), "an Excel workbook", "CSV"),
    "npz": (lambda path: _numpy(path, np.savez), "a NumPy archive", "embstore import"),
    "npy": (lambda path: _numpy(path, np.save), "a NumPy array", "embstore import"),
    "pt": (_torch, "a PyTorch file", "lines of JSON"),
    "old pt": (lambda path: _torch(path, zipped=False), "a PyTorch file", "lines of JSON"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(["a"])), "a pickle", "lines of JSON"),
    "safetensors": (_safetensors, "a safetensors file", "--model"),
    "utf-16": (lambda path: path.write_bytes(LINES.encode("utf-16")), "UTF-16 text", "iconv -f UTF-16 "),
    "utf-16le": (lambda path: path.write_bytes(LINES.encode("utf-16-le")), "UTF-16 text", "iconv -f UTF-16LE "),
    "utf-16be": (lambda path: path.write_bytes(LINES.encode("utf-16-be")), "UTF-16 text", "iconv -f UTF-16BE "),
    "utf-32": (lambda path: path.write_bytes(LINES.encode("utf-32")), "UTF-32 text", "iconv -f UTF-32 "),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>"), "an HTML page", "download"),
    "sqlite": (_sqlite, "a SQLite database", "sqlite3 -json"),
    "tar": (_tar, "a tar archive", "tar -xf"),
    "orc": (
        lambda path: pytest.importorskip("pyarrow.orc").write_table(pa.table({"a": [1]}), str(path)),
        "an ORC file",
        "orc",
    ),
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "a picture (PNG)", "lines of JSON"),
    "pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "a PDF document", "lines of JSON"),
    "7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(20)), "a 7z archive", "unpack"),
    "lz4": (lambda path: path.write_bytes(b"\x04\x22\x4d\x18" + bytes(20)), "an lz4 stream", "lz4 -dc"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_prompts_is_named(kind: str, tmp_path: Path) -> None:
    """By content, also where it is compressed as a whole; it is not read as lines of JSON, and not unpickled."""
    import gzip

    write, name, hint = OTHERS[kind]
    path = tmp_path / "prompts.jsonl"
    write(path)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, packed):
        with pytest.raises(PromptError) as caught:
            ingested(source, tmp_path / "out")
        assert str(caught.value).startswith(f"{source} is {name}")
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize("word", ["PAR1", "ORC", "BZh9", "ARROW1", "GGUF", "Rar!", "FEA1", "LZIP", "7z", "PK"])
def test_text_that_begins_like_another_kind_is_text(word: str, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text(f"{word}\nanother id\n")
    from embstore.storage.row_ids import RowIds

    names = RowIds(path=tmp_path / "ids.txt", num_rows=2)
    assert [prompt.id for prompt in names.prompts()] == [word, "another id"]
