"""Pools of chats as people have them, and every writer at hand: what a build and a join must read alike.

``pools`` draws lists of JSON records of one shape, because a table has one type per column; ``WRITERS`` write such records
to a file or folder that ``embstore build`` takes. A writer whose library is not installed is absent.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Record = dict[str, Any]
Writer = Callable[[Path, list[Record]], Path]

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
_QUARTERS = st.integers(-4000, 4000).map(lambda number: number / 4)  # JSON lines of pandas have 15 decimals
_WORD = st.sampled_from(["Oslo", "søndag", "雪", "a\u2028b", '{"a": 1}', "null"])


def _optional(draw: st.DrawFn, record: Record, name: str, value: st.SearchStrategy[Any]) -> None:
    """Set a field, set it to null, or leave it out."""
    choice = draw(st.sampled_from(["absent", "null", "set", "set"]))
    if choice != "absent":
        record[name] = draw(value) if choice == "set" else None


@st.composite
def _arguments(draw: st.DrawFn) -> Record:
    arguments: Record = {"unit": draw(_WORD), "city": draw(_WORD)}
    _optional(draw, arguments, "days", st.integers(-(2**40), 2**40))
    _optional(draw, arguments, "ratio", _QUARTERS)
    _optional(draw, arguments, "near", st.lists(_WORD, max_size=2))
    return arguments


@st.composite
def _call(draw: st.DrawFn, *, as_text: bool) -> Record:
    arguments = draw(_arguments())
    given = json.dumps(arguments, ensure_ascii=draw(st.booleans())) if as_text else arguments
    return {"type": "function", "id": draw(_WORD), "function": {"name": "weather", "arguments": given}}


@st.composite
def _message(draw: st.DrawFn, *, in_parts: bool, as_text: bool) -> Record:
    def content() -> object:
        texts = draw(st.lists(TEXT, min_size=1, max_size=3))
        return [{"type": "text", "text": text} for text in texts] if in_parts else texts[0]

    role = draw(st.sampled_from(["user", "user", "system", "assistant", "call", "tool"]))
    message: Record = {"role": "assistant" if role == "call" else role}
    if role == "call":
        message["tool_calls"] = draw(st.lists(_call(as_text=as_text), min_size=1, max_size=2))
        _optional(draw, message, "content", st.just(None))
    else:
        message["content"] = content()
    if role == "tool":
        message["tool_call_id"] = draw(_WORD)
    _optional(draw, message, "name", TEXT)
    return message


@st.composite
def _tool(draw: st.DrawFn) -> Record:
    properties: Record = {"unit": {"type": "string"}, "city": {"description": draw(_WORD), "type": "string"}}
    parameters = {"type": "object", "required": ["city"], "properties": properties}
    return {"type": "function", "function": {"parameters": parameters, "name": "weather", "description": draw(_WORD)}}


@st.composite
def pools(draw: st.DrawFn) -> list[Record]:
    """Some chats, each with a different id, and at least one user turn so that a table's columns have types."""
    in_parts, as_text = draw(st.booleans()), draw(st.booleans())
    records: list[Record] = []
    for number in range(draw(st.integers(1, 4))):
        messages = draw(st.lists(_message(in_parts=in_parts, as_text=as_text), max_size=3))
        first = [{"type": "text", "text": f"Chat {number}"}] if in_parts else f"Chat {number}"
        record: Record = {"id": f"c{number}", "messages": [{"role": "user", "content": first}, *messages]}
        _optional(draw, record, "tools", st.lists(_tool(), max_size=2))
        _optional(draw, record, "chat_template_kwargs", st.just({"enable_thinking": False}))
        _optional(draw, record, "score", _QUARTERS)
        records.append(record)
    return records


def whole(records: list[Record]) -> list[Record]:
    """Every field on every record, null where it does not apply, as a table has it."""
    names = {name: None for record in records for name in record}
    return [{**names, **record} for record in records]


def _jsonl(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _pyarrow(path: Path, records: list[Record]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(whole(records)), path)
    return path


def _pyarrow_json_text(path: Path, records: list[Record]) -> Path:
    """Every nested column as JSON text, as people do whose objects differ."""
    return _pyarrow(
        path,
        [
            {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in record.items()}
            for record in records
        ],
    )


def _pandas(path: Path, records: list[Record]) -> Path:
    import pandas as pd

    pd.DataFrame(records).to_parquet(path)
    return path


def _pandas_jsonl(path: Path, records: list[Record]) -> Path:
    import pandas as pd

    pd.DataFrame(records).to_json(path, orient="records", lines=True, double_precision=15)
    return path


def _datasets_arrow(path: Path, records: list[Record]) -> Path:
    import datasets

    datasets.Dataset.from_list(whole(records)).save_to_disk(str(path))
    return path


def _datasets_json_lines(path: Path, records: list[Record]) -> Path:
    import datasets

    datasets.Dataset.from_list(whole(records)).to_json(str(path))
    return path


def _datasets_parquet(path: Path, records: list[Record]) -> Path:
    import datasets

    datasets.Dataset.from_list(whole(records)).to_parquet(str(path))
    return path


def _with_json_features(records: list[Record], *, by_item: bool) -> Any:
    import datasets

    nested = {"messages", "tools"} if by_item else {"messages", "tools", "chat_template_kwargs"}
    rows = whole(records)
    plain = datasets.Dataset.from_list([{name: record[name] for name in record if name not in nested} for record in rows])
    column = datasets.List(datasets.Json()) if by_item else datasets.Json()
    features = {**plain.features, **{name: column for name in nested if name in rows[0]}}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _datasets_json(path: Path, records: list[Record]) -> Path:
    _with_json_features(records, by_item=False).to_parquet(str(path))
    return path


def _datasets_json_items(path: Path, records: list[Record]) -> Path:
    _with_json_features(records, by_item=True).save_to_disk(str(path))
    return path


def _polars(path: Path, records: list[Record]) -> Path:
    import polars as pl

    pl.DataFrame(whole(records), infer_schema_length=None).write_parquet(path)
    return path


def _polars_jsonl(path: Path, records: list[Record]) -> Path:
    import polars as pl

    pl.DataFrame(whole(records), infer_schema_length=None).write_ndjson(path)
    return path


def _installed(needs: str, writers: dict[str, Writer]) -> dict[str, Writer]:
    return writers if all(importlib.util.find_spec(name) for name in needs.split()) else {}


WRITERS: dict[str, Writer] = {
    "json": _jsonl,
    **_installed("pyarrow", {"pyarrow": _pyarrow, "JSON text in pyarrow": _pyarrow_json_text}),
    **_installed("pandas pyarrow", {"pandas": _pandas, "JSON lines of pandas": _pandas_jsonl}),
    **_installed(
        "datasets",
        {
            "datasets, Arrow": _datasets_arrow,
            "datasets, Parquet": _datasets_parquet,
            "datasets, JSON": _datasets_json_lines,
            "datasets, Json": _datasets_json,
            "datasets, List(Json)": _datasets_json_items,
        },
    ),
    **_installed("polars", {"polars": _polars, "JSON lines of polars": _polars_jsonl}),
}
