"""for_dataset takes what people hold datasets in, reads prompts as the store's build did, and says what it could not find.

The oracle of a join is a dictionary over the store's own rows.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import hashlib
import json
import random
import re
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.utils.data
from numpy.typing import NDArray

from embstore.core.config import FIRST_RULE, PromptFields
from embstore.core.errors import ConfigError, KeyMismatchError
from embstore.core.prompts import Prompt
from embstore.storage.prompt_source import read_record
from embstore.storage.reader import open_store
from embstore.training import Weights, load_weights, prompt_keys, resample_file
from embstore.training.reading import PromptReading, without_nulls
from tests.support.build_fake import CONFIG
from tests.support.stores import build_small, write_lines

QUESTIONS = [f"What is {number}  times\n{number + 1}?" for number in range(40)]


def chat(number: int) -> list[dict[str, Any]]:
    """One user turn; every fifth has a name, which Arrow gives the others as a null."""
    turn = {"role": "user", "content": QUESTIONS[number]}
    return [turn | {"name": "ana"} if number % 5 == 0 else turn]


RECORDS = [{"messages": chat(number), "level": number % 3, "id": f"q{number}"} for number in range(len(QUESTIONS))]


def build_of(folder: Path, lines: list[Any], **changes: Any) -> Path:
    """A store of these lines."""
    build_small(
        write_lines(folder / "prompts.jsonl", lines), folder / "store", config=dataclasses.replace(CONFIG, **changes)
    )
    return folder / "store"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_of(tmp_path_factory.mktemp("chats"), RECORDS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_of(tmp_path_factory.mktemp("texts"), [{"prompt": text} for text in QUESTIONS])


def expected(store: Path, numbers: list[int]) -> NDArray[np.float64]:
    """Weights of the questions with these numbers: the store's rows are in the order of the questions."""
    rows = open_store(store).weights[numbers].astype(np.float64)
    return rows / rows.sum()


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style dataset, as verl has it: rows of a data frame; no iterator, and no IndexError at its end."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.frame.iloc[index % len(self.frame)].to_dict()
        return row


def ways(records: list[dict[str, Any]], folder: Path) -> Iterator[tuple[str, Any]]:
    """One dataset in everything that holds datasets."""
    table = pa.Table.from_pylist(records)
    dataset = datasets.Dataset.from_list(records)
    dataset.to_parquet(str(folder / "rows.parquet"))
    frame = pd.read_parquet(folder / "rows.parquet")  # lists are arrays
    yield "list", records
    yield "tuple", tuple(records)
    yield "generator", (record for record in records)
    yield "the chats themselves", [record["messages"] for record in records]
    yield "datasets.Dataset", dataset
    for kind in ("numpy", "pandas", "torch", "arrow"):
        yield f"datasets.Dataset as {kind}", dataset.with_format(kind)
    yield (
        "a transform",
        dataset.remove_columns("messages").with_transform(
            lambda batch: {"messages": [chat(int(name[1:])) for name in batch["id"]]}
        ),
    )
    yield "a column of datasets", dataset["messages"]
    yield "datasets.IterableDataset", dataset.to_iterable_dataset(num_shards=3)
    yield "pandas.DataFrame", frame
    yield "pandas.Series", frame["messages"]
    yield "pandas records", frame.to_dict("records")
    yield "rows of pandas", [row for _, row in frame.iterrows()]
    yield "named tuples of pandas", list(frame.itertuples())
    yield "a shuffled index", frame.set_index(np.arange(len(frame))[::-1])
    yield "torch", Rows(frame)
    yield "torch Subset", torch.utils.data.Subset(dataset, list(range(len(records))))  # type: ignore[arg-type]
    yield "pyarrow.Table", table
    yield "pyarrow.RecordBatch", table.to_batches()[0]
    yield "pyarrow column", table["messages"]
    yield "numpy", np.fromiter((record["messages"] for record in records), dtype=object, count=len(records))
    columns = datasets.Dataset.from_list([{"messages": json.dumps(record["messages"])} for record in records])
    yield "JSON text", columns
    yield (
        "the Json type",
        datasets.Dataset.from_list(
            records,
            features=datasets.Features(
                {"messages": datasets.Json(), "level": datasets.Value("int64"), "id": datasets.Value("string")}
            ),
        ),
    )


def test_one_dataset_in_all_that_holds_datasets(chats: Path, tmp_path: Path) -> None:
    numbers = list(range(len(RECORDS)))
    random.Random(3).shuffle(numbers)
    for name, dataset in ways([RECORDS[number] for number in numbers], tmp_path):
        weights = load_weights(chats).for_dataset(dataset)
        assert weights.array == pytest.approx(expected(chats, numbers), rel=1e-6), name


def test_polars_frames_are_joined(chats: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(RECORDS[::-1])
    for dataset in (frame, frame["messages"], frame.to_dicts()):
        weights = load_weights(chats).for_dataset(dataset)
        assert weights.array == pytest.approx(expected(chats, list(range(len(RECORDS)))[::-1]), rel=1e-6)
    with pytest.raises(ConfigError, match="LazyFrame has no rows yet") as caught:
        load_weights(chats).for_dataset(frame.lazy())
    assert "collect()" in str(caught.value.hint)


def test_shuffled_filtered_and_repeated_selections_keep_their_order(chats: Path) -> None:
    whole = datasets.Dataset.from_list(RECORDS * 30)  # a selection of few rows is read in another way than one of many
    selections = {
        "shuffled": whole.shuffle(seed=4),
        "filtered": whole.filter(lambda record: record["level"] == 1),
        "repeated": whole.select([5, 5, 1, 1199, 5]),
        "few": whole.shuffle(seed=4).select(range(10)),
    }
    for name, dataset in selections.items():
        numbers = [int(record["id"][1:]) for record in dataset]
        assert load_weights(chats).for_dataset(dataset).array == pytest.approx(expected(chats, numbers), rel=1e-6), name


def test_rows_in_more_than_one_block_keep_their_order(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embstore.training.items.BLOCK_ITEMS", 7)
    numbers = [number % 40 for number in range(0, 600, 13)]
    records = [RECORDS[number] for number in numbers]
    dataset = datasets.Dataset.from_list(records)
    for given in (records, dataset, dataset.shuffle(seed=1), pd.DataFrame(records), pa.Table.from_pylist(records)):
        order = [int(record["id"][1:]) for record in given] if given is not dataset and "huffle" in repr(given) else numbers
        if isinstance(given, datasets.Dataset):
            order = [int(name[1:]) for name in given["id"]]
        assert load_weights(chats).for_dataset(given).array == pytest.approx(expected(chats, order), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "complaint", "hint"),
    [
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), test=datasets.Dataset.from_list(RECORDS)),
            "consists of splits: 'train', 'test'",
            r"for_dataset\(dataset\['train'\]\)",
        ),
        ({"a": pd.DataFrame(RECORDS)}, "consists of splits: 'a'", "join the one"),
        ({"prompt": QUESTIONS}, "a dict with the entries 'prompt' is not a dataset", "from_dict"),
        ("train.parquet", "'train.parquet' is a text or a path", "load the file first"),
        (Path("train.parquet"), "'train.parquet' is a text or a path", "load the file first"),
        (7, "a value of type int is not a dataset", "list of records"),
        ([7], "item 0 is of type int", "list of records"),
        (
            pd.DataFrame({"question": ["a"], "answer": ["b"]}),
            "no column prompt or messages or .*; it has question, answer",
            "key_column",
        ),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "several columns 'prompt'", "rename"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_is_not_a_dataset_is_named(chats: Path, given: Any, complaint: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_weights(chats).for_dataset(given)
    assert re.search(hint, str(caught.value.hint))


def test_ids_are_read_from_tables_too(chats: Path) -> None:
    numbers = [7, 3, 3, 39]
    frame = pd.DataFrame({"uid": [f"q{number}" for number in numbers], "other": 1})
    with sqlite3.connect(":memory:") as base:
        base.row_factory = sqlite3.Row
        frame.to_sql("rows", base, index=False)
        rows = base.execute("select * from rows").fetchall()
    base.close()
    for given in (frame, datasets.Dataset.from_pandas(frame), pa.Table.from_pandas(frame), frame.to_dict("records"), rows):
        weights = load_weights(chats).for_dataset(given, id_column="uid")
        assert weights.array == pytest.approx(expected(chats, numbers), rel=1e-6)
    with pytest.raises(ConfigError, match="no column name; it has uid, other"):
        load_weights(chats).for_dataset(frame, id_column="name")


def test_numeric_ids_are_those_of_the_build(tmp_path: Path) -> None:
    store = build_of(tmp_path, [{"id": number, "prompt": text} for number, text in enumerate(QUESTIONS)])
    frame = pd.DataFrame({"uid": [3, None, 5]}).dropna()  # whole numbers that pandas holds as floats
    weights = load_weights(store).for_dataset(frame, id_column="uid")
    assert weights.array == pytest.approx(expected(store, [3, 5]), rel=1e-6)


def test_the_fields_that_the_build_read_are_joined_without_naming_them(tmp_path: Path) -> None:
    lines = [{"question": text, "prompt": "Answer:", "uid": f"u{number}"} for number, text in enumerate(QUESTIONS)]
    store = build_of(tmp_path, lines, fields=PromptFields(text="question", id="uid"))
    for given in (lines[::-1], datasets.Dataset.from_list(lines[::-1]), pd.DataFrame(lines[::-1])):
        assert load_weights(store).for_dataset(given).array == pytest.approx(
            expected(store, list(range(40))[::-1]), rel=1e-6
        )
    # a dataset that has other columns is read as usual, and any column can be named
    renamed = datasets.Dataset.from_dict({"prompt": QUESTIONS[:5], "problem": QUESTIONS[5:10]})
    assert load_weights(store).for_dataset(renamed).array == pytest.approx(expected(store, [0, 1, 2, 3, 4]), rel=1e-6)
    named = load_weights(store).for_dataset(renamed, key_column="problem")
    assert named.array == pytest.approx(expected(store, [5, 6, 7, 8, 9]), rel=1e-6)


def test_items_without_columns_are_the_prompts_whatever_column_is_named(chats: Path, texts: Path, tmp_path: Path) -> None:
    """Texts by either way to their keys, and chats in every form."""
    messages = [record["messages"] for record in RECORDS]
    arrays = np.fromiter((np.array(each, dtype=object) for each in messages), dtype=object, count=len(messages))
    fields = build_of(tmp_path, [{"question": f"[{text}]"} for text in QUESTIONS], fields=PromptFields(text="question"))
    for column in ("question", "messages", "prompt", None):
        for store, given in (
            (texts, QUESTIONS),
            (texts, pd.Series(QUESTIONS)),
            (chats, messages),
            (chats, tuple(map(tuple, messages))),
            (chats, arrays),
            (chats, [json.dumps(each) for each in messages]),
            (fields, [f"[{text}]" for text in QUESTIONS]),
        ):
            weights = load_weights(store).for_dataset(given, key_column=column)
            assert weights.array == pytest.approx(expected(store, list(range(40))), rel=1e-6)
    with pytest.raises(ConfigError, match=r"item 0 has no column 'prompt'; it has no columns \(str\)"):
        load_weights(texts).for_dataset(QUESTIONS, id_column="prompt")


def test_tools_and_template_variables_are_part_of_a_chat(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    lines = [
        {"messages": chat(1)},
        {"messages": chat(1), "tools": [tool]},
        {"messages": chat(1), "chat_template_kwargs": {"thinking": True}},
    ]
    store = build_of(tmp_path, lines)
    assert len(load_weights(store)) == 3
    as_text = [{name: json.dumps(value) for name, value in line.items()} for line in lines]
    columns = datasets.Dataset.from_list(
        [{"messages": None, "tools": None, "chat_template_kwargs": None} | line for line in as_text]
    )
    for given in (lines[::-1], columns.select([2, 1, 0]), pd.DataFrame(lines[::-1])):
        assert load_weights(store).for_dataset(given).array == pytest.approx(expected(store, [2, 1, 0]), rel=1e-6)


# --- chats of one user turn, and their texts ---------------------------------------------------------------------------


def joined(store: Path, dataset: Any) -> tuple[Weights, list[str]]:
    """The weights, and what the warnings say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = load_weights(store).for_dataset(dataset)
    assert all(warning.filename == __file__ for warning in caught)  # where the user called
    return weights, [str(warning.message) for warning in caught]


def test_a_store_of_plain_texts_joins_chats_of_one_user_turn_and_says_so(texts: Path) -> None:
    answered = [{"messages": [*chat(number), {"role": "assistant", "content": "42"}]} for number in range(40)]
    parts = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": text}]}]} for text in QUESTIONS]
    for given in (RECORDS, datasets.Dataset.from_list(RECORDS), answered, parts):
        weights, said = joined(texts, given)
        assert weights.array == pytest.approx(expected(texts, list(range(40))), rel=1e-6)
        assert len(said) == 1
        assert "contains plain texts" in said[0]
        assert "by the text of their one user turn" in said[0]
        assert weights.steps[-1] == said[0]
    assert joined(texts, QUESTIONS)[1] == []


def test_a_store_of_such_chats_joins_their_texts_and_says_so(chats: Path) -> None:
    numbers = [number for number in range(40) if number % 5]
    weights, said = joined(chats, [QUESTIONS[number] for number in numbers])
    assert weights.array == pytest.approx(expected(chats, numbers), rel=1e-6)
    assert len(said) == 1
    assert "contains chats" in said[0]


def test_other_forms_are_not_tried_where_an_item_is_in_the_store_as_it_is(texts: Path) -> None:
    given = [*QUESTIONS[:3], chat(7), QUESTIONS[4]]
    with pytest.raises(KeyMismatchError, match=r"1 of 5 items .* the first is item 3") as caught:
        load_weights(texts).for_dataset(given)
    assert "its text is in the store, but one of the two is a chat" in str(caught.value)
    with pytest.raises(KeyMismatchError, match=r"1 of 2 items .* item 1, .*so chats were looked up by the text"):
        load_weights(texts).for_dataset([chat(1), [*chat(1), {"role": "assistant", "content": "2"}, *chat(1)]])


def test_chats_are_cut_as_the_store_records_and_a_warning_says_so(tmp_path: Path) -> None:
    answered = [{"messages": [*chat(number), {"role": "assistant", "content": f"It is {number}."}]} for number in range(40)]
    config = dataclasses.replace(CONFIG, turns="prompt")
    build_small(write_lines(tmp_path / "prompts.jsonl", answered), tmp_path / "store", config=config)
    other_answers = [{"messages": [*chat(number), {"role": "assistant", "content": "No."}]} for number in range(40)][::-1]
    for _ in range(2):  # the second time from the cache
        weights, said = joined(tmp_path / "store", datasets.Dataset.from_list(other_answers))
        assert weights.array == pytest.approx(expected(tmp_path / "store", list(range(40))[::-1]), rel=1e-6)
        assert len(said) == 1
        assert "--turns prompt" in said[0]
    assert joined(tmp_path / "store", [chat(number) for number in range(40)])[1] == []


def test_a_store_of_the_first_rule_is_joined_as_it_was_built(tmp_path: Path) -> None:
    """Its build kept the nulls of lines and dropped those of tables; a dataset may have them or not."""
    lines = [{"messages": [{"name": None, **turn} for turn in record["messages"]]} for record in RECORDS]  # type: ignore[attr-defined]
    without = [{"messages": record["messages"]} for record in RECORDS]
    for built, name in ((lines, "from-lines"), (without, "from-a-table")):
        source = write_lines(tmp_path / f"{name}.jsonl", built)
        build_small(source, tmp_path / name)
        as_first_rule(tmp_path / name, built)
    assert not np.array_equal(np.load(tmp_path / "from-lines" / "keys.npy"), np.load(tmp_path / "from-a-table" / "keys.npy"))
    table = datasets.Dataset.from_list(without)  # which gives every turn a name
    order = list(range(40))[::-1]
    for given in (lines[::-1], table.select(order), table.to_pandas().iloc[::-1], table.with_format("numpy").select(order)):
        weights = load_weights(tmp_path / "from-lines").for_dataset(given)
        assert weights.array == pytest.approx(expected(tmp_path / "from-lines", order), rel=1e-6)
    for given in (lines[::-1], without[::-1], table.select(order), table.to_pandas().iloc[::-1]):
        weights = load_weights(tmp_path / "from-a-table").for_dataset(given)
        assert weights.array == pytest.approx(expected(tmp_path / "from-a-table", order), rel=1e-6)


def test_by_the_first_rule_a_join_writes_values_as_a_build_of_a_table_did() -> None:
    """Bytes as hex, dates and decimals as text, no NaN."""
    turn = {"role": "user", "content": "a", "image": b"\x89P", "price": decimal.Decimal("1.50"), "loss": float("nan")}
    record = {"messages": [turn | {"when": datetime.date(2026, 1, 2), "name": None, "parts": [{"data": b"", "next": None}]}]}
    built = read_record(record, rule=FIRST_RULE)
    joined = PromptReading(rule=FIRST_RULE).prompt(record, 0)
    assert isinstance(built, Prompt)
    assert isinstance(joined, Prompt)
    assert without_nulls(joined) == Prompt(id=None, messages=built.messages)


def as_first_rule(store: Path, records: list[dict[str, Any]]) -> None:
    """Give a store the manifest and the keys that a release before the second rule wrote for these chats."""
    chats = [json.dumps(record["messages"], sort_keys=True, separators=(",", ":")) for record in records]
    digests = [hashlib.sha256(b"messages\0" + each.encode()).digest()[:8] for each in chats]
    np.save(store / "keys.npy", np.frombuffer(b"".join(digests), dtype="<u8"))
    manifest = json.loads((store / "manifest.json").read_bytes())
    del manifest["rule"], manifest["fields"]
    content = (store / "keys.npy").read_bytes()
    manifest["files"]["keys.npy"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (store / "manifest.json").write_text(json.dumps(manifest))


# --- what is missing ---------------------------------------------------------------------------------------------------


def test_a_failed_join_shows_the_text_of_the_first_missing_item_and_counts_by_cause(texts: Path, tmp_path: Path) -> None:
    long = "A prompt\x1b[2J that nobody embedded" + " and more" * 200 + " at its end."
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    given = [{"prompt": item} for item in [*QUESTIONS[:4], " ", long, "", "Another one", image, None]]
    with pytest.raises(KeyMismatchError) as caught:
        load_weights(texts).for_dataset(given[:4] + given[5:6])
    said = str(caught.value)
    assert "1 of 5 items have no row in" in said
    assert "(40 rows): 1 not in the store, the first is item 4, 'A prompt\\x1b[2J that nobody" in said
    assert said.endswith("and more at its end.'")
    assert len(said) < 500
    with pytest.raises(KeyMismatchError) as caught:
        load_weights(texts).for_dataset(given)
    said = str(caught.value)
    for part in (
        "6 of 10 items",
        "2 not in the store, the first is item 5, 'A prompt",
        "4 without a prompt, the first is item 4: the prompt is empty (the prompt is empty: 2, ",
        "message N has a part of kind image_url: 1, no prompt: 1)",
    ):
        assert part in said
    # the same for a file
    source = write_lines(tmp_path / "data.jsonl", [*given[:4], b'{"prompt": "a", "prompt": "b"}\n', given[7]])
    with pytest.raises(
        KeyMismatchError, match=r"1 not in the store, .* item 5, 'Another one'; 1 without .* item 4: .*occurs twice"
    ):
        resample_file(texts, source, tmp_path / "out.jsonl")


def test_items_that_failed_in_the_build_are_counted_apart(tmp_path: Path) -> None:
    lines = [{"prompt": "FAIL here"}, *({"prompt": text} for text in QUESTIONS)]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    build_small(prompts, tmp_path / "store", config=dataclasses.replace(CONFIG, on_error="quarantine"))
    with pytest.raises(KeyMismatchError, match=r"1 not in the store, .*; 1 more failed in the build"):
        load_weights(tmp_path / "store").for_dataset([*lines, {"prompt": "nobody asked"}])


# --- values of Arrow that are not what their type says ------------------------------------------------------------------

JSON_CHATS = [json.dumps([{"role": "user", "content": text}]) for text in QUESTIONS[:9]]
JSON_TYPE = pa.json_(pa.string())
AS_JSON = {b"ARROW:extension:name": b"arrow.json", b"ARROW:extension:metadata": b""}


def raw(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """Texts that need not be UTF-8."""
    return pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary()).view(kind)


def of_turns(texts: pa.Array) -> pa.Array:
    """Chats of one user turn, as Arrow holds them."""
    roles = pa.array(["user"] * len(texts))
    return pa.ListArray.from_arrays(
        pa.array(range(len(texts) + 1), pa.int32()), pa.StructArray.from_arrays([roles, texts], ["role", "content"])
    )


def as_maps(contents: list[str]) -> pa.Array:
    """The same, each turn as a map from names to JSON."""
    pairs = [[[("role", '"user"'), ("content", text)]] for text in contents]
    return pa.array(pairs, pa.list_(pa.map_(pa.string(), pa.string()))).cast(pa.list_(pa.map_(pa.string(), JSON_TYPE)))


UTF8, BAD_UTF8 = [text.encode() for text in QUESTIONS[:9]], b"caf\xe9 " * 3
STRANGE_COLUMNS = {
    "bad JSON": ("messages", pa.array([*JSON_CHATS, '[{"role": "user", "con']).cast(JSON_TYPE), None),
    "a key twice": (
        "messages",
        pa.array([*JSON_CHATS, '[{"role": "user", "content": "a", "content": "b"}]']).cast(JSON_TYPE),
        None,
    ),
    "JSON by metadata": ("messages", pa.array([*JSON_CHATS, "[{'role': 'user'}]"]), AS_JSON),
    "JSON text by metadata": ("prompt", pa.array([*map(json.dumps, QUESTIONS[:9]), "no quotes"]), AS_JSON),
    "maps to JSON": ("messages", as_maps([*map(json.dumps, QUESTIONS[:9]), "no quotes"]), None),
    "a text that is not UTF-8": ("prompt", raw([*UTF8, BAD_UTF8], pa.string()), None),
    "a large text that is not UTF-8": ("prompt", raw([*UTF8, BAD_UTF8], pa.large_string()), None),
    "a text of few that is not UTF-8": (
        "prompt",
        pa.DictionaryArray.from_arrays(pa.array(range(10), pa.int32()), raw([*UTF8, BAD_UTF8], pa.string())),
        None,
    ),
    "a content that is not UTF-8": ("messages", of_turns(raw([*UTF8, BAD_UTF8], pa.string())), None),
    "JSON that is not UTF-8": (
        "messages",
        pa.ExtensionArray.from_storage(JSON_TYPE, raw([*map(str.encode, JSON_CHATS), BAD_UTF8], pa.string())),
        None,
    ),
}


@pytest.mark.parametrize("kind", STRANGE_COLUMNS)
def test_tables_are_joined_as_a_build_reads_them(kind: str, tmp_path: Path) -> None:
    """The build of the same file is the oracle: it takes nine rows and says of the last one why it does not."""
    name, column, metadata = STRANGE_COLUMNS[kind]
    schema = pa.schema([pa.field(name, column.type, metadata=metadata), pa.field("uid", pa.int64())])
    table = pa.Table.from_arrays([column, pa.array(range(10))], schema=schema)
    pq.write_table(table, tmp_path / "p.parquet")
    build_small(tmp_path / "p.parquet", tmp_path / "store", config=dataclasses.replace(CONFIG, max_quarantined=0.5))
    (quarantined,) = map(json.loads, (tmp_path / "store" / "quarantine.jsonl").read_text().splitlines())
    assert quarantined["line"] == 10
    reason = re.escape(quarantined["reason"]).replace(
        "field\\ messages", "field\\ (messages|prompt)"
    )  # a column has no name
    said = f"1 of 10 items .* 1 without a prompt, the first is item 9: {reason}"
    weights = load_weights(tmp_path / "store")
    given = {"a table": table, "a batch": table.to_batches()[0]}
    if metadata is None:  # a column alone has none, nor has a dataset
        given |= {"a column": table[name], "an array": column}
    if metadata is None and "maps" not in kind and "few" not in kind:  # which ``datasets`` does not have
        given |= {"a dataset": datasets.Dataset(table), "turned": datasets.Dataset(table).select(list(range(9, -1, -1)))}
    for what, dataset in given.items():
        joined = weights.for_dataset(dataset, on_missing="drop")
        found = joined.array[::-1] if what == "turned" else joined.array
        assert found == pytest.approx([*expected(tmp_path / "store", list(range(9))), 0], rel=1e-6), what
        with pytest.raises(KeyMismatchError, match=said.replace("item 9", "item 0") if what == "turned" else said):
            weights.for_dataset(dataset)
    resample_file(tmp_path / "store", tmp_path / "p.parquet", tmp_path / "out.parquet", on_missing="drop", num_samples=300)
    assert set(pq.read_table(tmp_path / "out.parquet")["uid"].to_pylist()) == set(range(9))
    with pytest.raises(KeyMismatchError, match=said):
        resample_file(tmp_path / "store", tmp_path / "p.parquet", tmp_path / "again.parquet")


def test_a_dataset_without_items_is_not_a_join(texts: Path) -> None:
    with pytest.raises(KeyMismatchError, match="no items"):
        load_weights(texts).for_dataset([])


def test_keys_of_prompts_are_those_of_the_store_in_any_container(chats: Path) -> None:
    keys = np.load(chats / "keys.npy")
    dataset = datasets.Dataset.from_list(RECORDS)
    for given in (RECORDS, dataset, dataset.to_pandas()):
        assert np.array_equal(prompt_keys(given), keys)
    assert np.array_equal(prompt_keys(dataset.select([4, 1])), keys[[4, 1]])


def test_columns_of_json_that_a_reader_gives_as_text_are_joined(texts: Path, chats: Path) -> None:
    """As pandas and polars read a column of the type arrow.json: the same file was built from."""
    quoted = [json.dumps(text) for text in QUESTIONS]
    for given in (quoted, pd.DataFrame({"prompt": quoted}), [{"prompt": quoted[0]}, {"prompt": QUESTIONS[1]}]):
        joined = load_weights(texts).for_dataset(given)
        np.testing.assert_allclose(joined.array, expected(texts, list(range(len(given)))), rtol=1e-6)
    contents = [json.dumps(QUESTIONS[1]), json.dumps([{"type": "text", "text": QUESTIONS[2]}])]
    joined = load_weights(chats).for_dataset([{"messages": [{"role": "user", "content": each}]} for each in contents])
    np.testing.assert_allclose(joined.array, expected(chats, [1, 2]), rtol=1e-6)
    with pytest.raises(KeyMismatchError, match="1 not in the store"):
        load_weights(texts).for_dataset([*quoted, '"What is" it?'])
