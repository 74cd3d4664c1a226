"""Folders: shards of every kind in the order of their names, partitions, snapshots of the hub, questions about a choice."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import WHOLE, DatasetChoice
from embstore.core.errors import PromptError
from embstore.core.events import Event, Notice
from embstore.core.file_kinds import DATA, PACKED, ending_of
from embstore.storage.array_file import open_array
from embstore.storage.csv_source import delimiter_of
from embstore.storage.ingest import ingest
from embstore.storage.prompt_folder import is_data_file, shards
from tests.support.build_fake import CONFIG
from tests.support.stage0 import Stage0, ingested, read_stage0
from tests.support.stores import build_small, small_lines, write_lines

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
pq = pytest.importorskip("pyarrow.parquet")


def read(
    source: Path | str, out: Path, *, split: str | None = None, config: str | None = None, notices: list[str] | None = None
) -> Stage0:
    def observe(event: Event) -> None:
        if notices is not None and isinstance(event, Notice):
            notices.append(event.message)

    out.mkdir()
    choice = DatasetChoice(split=split, config=config)
    return read_stage0(out, ingest(source, out, out, strict=False, limit=None, choice=choice, observer=observe))


def refused(source: Path, match: str, *, hint: str, **choice: Any) -> None:
    out = source.parent / "refused"
    out.mkdir(exist_ok=True)
    with pytest.raises(PromptError, match=match) as caught:
        ingest(source, out, out, strict=False, limit=None, choice=DatasetChoice(**choice))
    assert hint in str(caught.value.hint)
    assert list(out.iterdir()) == []


def parquet(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), path)


def texts(name: str, count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {row}"} for row in range(count)]


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_shards_of_every_kind_are_one_pool_in_the_order_of_their_names(tmp_path: Path) -> None:
    lines = [{"prompt": f"Text {row}", "src": "ab"[row % 2]} for row in range(60)]
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "part-2.jsonl").write_bytes(jsonl(lines[:10]))
    (folder / "more" / "part-10.jsonl.gz").write_bytes(gzip.compress(jsonl(lines[10:20])))
    (folder / "part-1.jsonl.bz2").write_bytes(bz2.compress(jsonl(lines[20:30])))
    parquet(folder / "part-3.parquet", lines[30:40])
    with (
        pa.OSFile(str(folder / "part-20.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.Table.from_pylist(lines[:1]).schema) as w,
    ):
        w.write_table(pa.Table.from_pylist(lines[40:50]))
    (folder / "part-100.json").write_text(json.dumps(lines[50:]))
    for name in ("README.md", ".gitattributes", "_SUCCESS", ".part-1.jsonl.crc", "dataset_infos.json", "notes.txt"):
        (folder / name).write_text('{"prompt": "not this"}\n')
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "part-0.jsonl").write_bytes(jsonl(texts("not this")))
    notices: list[str] = []
    found = read(folder, tmp_path / "found", notices=notices)
    expected = ingested(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "expected")
    assert found.files == expected.files
    assert found.record == expected.record
    assert notices == [f"{folder}: 6 files are read, more/part-2.jsonl to part-100.json"]


def test_folders_on_the_way_add_their_fields(tmp_path: Path) -> None:
    folder = tmp_path / "hive"
    parquet(folder / "src=code%2Fpython" / "year=2026" / "part-0.parquet", [{"prompt": "print"}])
    (folder / "src=maths" / "year=__HIVE_DEFAULT_PARTITION__").mkdir(parents=True)
    (folder / "src=maths" / "year=__HIVE_DEFAULT_PARTITION__" / "p.jsonl").write_bytes(
        jsonl([{"prompt": "2 + 2?", "src": "own"}, {"prompt": "3 + 3?"}])
    )
    found = read(folder, tmp_path / "found")
    assert [(prompt["prompt"], prompt["fields"]) for prompt in found.prompts] == [
        ("print", {"src": "code/python", "year": "2026"}),
        ("2 + 2?", {"src": "own"}),
        ("3 + 3?", {"src": "maths"}),
    ]


def snapshot(folder: Path) -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for number in range(count):
            parquet(folder / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet", texts(f"{split} {number}"))
    (folder / "README.md").write_text("---\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return folder


def test_a_folder_of_several_splits_asks_which(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "snapshot")
    refused(folder, "contains several splits: test, train", hint="choose one with --split test, or --split all")
    refused(folder, "has no split 'dev'; it has test, train", hint="--split", split="dev")
    assert read(folder, tmp_path / "a", split="train").texts == [
        f"train {part} {row}" for part in range(2) for row in range(3)
    ]
    assert read(folder, tmp_path / "b", split="test").record.rows == 3
    assert read(folder, tmp_path / "c", split="all").record.rows == 9
    for path in folder.glob("data/test*"):
        path.unlink()
    assert read(folder, tmp_path / "d").record.rows == 6  # one split needs no choice


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.jsonl", "test.jsonl"], "test, train"),
        (["train/a.jsonl", "validation/a.jsonl"], "train, validation"),
        (["my_train_v2.jsonl", "my-dev.jsonl"], "validation, train"),
        (["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"], "test_sft, train_sft"),
    ],
)
def test_splits_are_known_by_the_names_that_people_give(names: list[str], splits: str, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jsonl(texts(name)))
    refused(folder, f"contains several splits: {splits}$", hint="--split")


def test_files_beside_a_split_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for name in ("train.jsonl", "extra.jsonl"):
        (folder / name).write_bytes(jsonl(texts(name)))
    refused(folder, "several splits: train, and files of none of them: 'extra.jsonl'", hint="--split train, or --split all")
    assert read(folder, tmp_path / "found", split="train").record.rows == 3


def test_files_of_other_names_are_one_pool(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for name in ("trains.jsonl", "latest.jsonl", "contest.jsonl", "part-00000-of-00001.jsonl"):
        (folder / name).write_bytes(jsonl(texts(name)))
    assert read(folder, tmp_path / "found").record.rows == 12
    refused(folder, "has no split 'train'; it has none", hint="leave out --split", split="train")


def test_a_folder_of_several_configurations_asks_which(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    for config in ("main", "socratic"):
        parquet(folder / config / "train-00000-of-00001.parquet", texts(config))
    refused(folder, "contains several configurations: main, socratic", hint="choose one with --config main")
    refused(folder, "has no configuration 'x'; it has main, socratic", hint="--config", config="x")
    assert read(folder, tmp_path / "found", config="socratic").texts == ["socratic 0", "socratic 1", "socratic 2"]


def test_the_same_lines_twice_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    parquet(folder / "prompts.parquet", texts("a"))
    (folder / "prompts.jsonl.gz").write_bytes(gzip.compress(jsonl(texts("a"))))
    refused(folder, r"prompts\.jsonl\.gz and prompts\.parquet, which seem to be the same lines twice", hint="give one")


def test_a_shard_that_the_numbers_promise_is_missed(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    for number in (0, 2):
        parquet(folder / f"train-{number:05d}-of-00004.parquet", texts(str(number)))
    notices: list[str] = []
    assert read(folder, tmp_path / "found", notices=notices).record.rows == 6
    assert notices[1] == (
        f"{folder} lacks train-00001-of-00004.parquet, train-00003-of-00004.parquet, which the numbers of the other files "
        "promise"
    )


@pytest.mark.parametrize(
    "name", ["b.parquet", "b.arrow", "b.feather", "b.jsonl.gz", "b.jsonl.bz2", "b.jsonl.xz", "b.jsonl.zst"]
)
@pytest.mark.parametrize("content", [b"", bytes(200), b"\x8b\xff\n" * 50])
def test_a_shard_whose_first_bytes_are_damaged_is_not_a_shard_of_bad_lines(
    name: str, content: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(texts("a")))
    (folder / name).write_bytes(content)
    refused(folder, rf"{name} failed: its first bytes are not those of a \.", hint="damaged or truncated")


def test_text_that_is_named_as_compressed_is_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(jsonl([{"prompt": "é" * 5000}]))
    assert read(tmp_path / "p.jsonl.gz", tmp_path / "found").record.rows == 1


def test_a_folder_without_prompts_says_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    refused(folder, "contains no prompts file: it is empty", hint=".jsonl")
    (folder / "notes.txt").write_text("text")
    refused(folder, r"contains no prompts file: 'notes\.txt'", hint=".zst")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    refused(write_lines(tmp_path / "p.jsonl", texts("a")), "is one file", hint="leave out --split", split="train")


def test_a_saved_dataset_has_no_splits_or_no_configurations(tmp_path: Path) -> None:
    """What was chosen and cannot be is said, not left out silently."""
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several / "train"):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "p.jsonl"}]}')
        (folder / "p.jsonl").write_bytes(jsonl(texts("a")))
    (several / "dataset_dict.json").write_text('{"splits": ["train"]}')
    refused(one, "is one saved dataset: it has neither splits nor", hint="leave out --split", split="train")
    refused(one, "is one saved dataset", hint="leave out --split and --config", split="all", config="main")
    refused(several, "is a saved dataset: it has no configurations", hint="leave out --config", split="train", config="x")
    assert read(one, tmp_path / "a").texts == read(several, tmp_path / "b", split="train").texts == ["a 0", "a 1", "a 2"]


def test_names_of_equal_numbers_have_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the file system lists them."""
    folder = tmp_path / "pool"
    folder.mkdir()
    names = ["part-001", "part-01", "part-1", "part-2"]
    for name in names:
        (folder / f"{name}.jsonl").write_bytes(jsonl(texts(name, 1)))
        np.save(folder / f"{name}.npy", np.full((1, 2), names.index(name), np.float32))
    listed = sorted(folder.iterdir())
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda self, pattern, order=order: iter(order))
        monkeypatch.setattr(Path, "glob", lambda self, pattern, order=order: (each for each in order if each.match(pattern)))
        assert [shard.path.stem for shard in shards(folder, WHOLE)] == names
        assert open_array(folder).read(0, 4)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("packing", ["", *PACKED])
@pytest.mark.parametrize("ending", DATA)
def test_every_ending_of_data_is_known_wherever_endings_are(ending: str, packing: str, tmp_path: Path) -> None:
    name = f"Prompts{ending.upper()}{packing}"
    assert ending_of(name) == ending
    assert is_data_file(name)
    separator = delimiter_of(b"question,\n", name, frozenset({"prompt"}))
    assert separator == {".csv": ",", ".tsv": "\t", ".tab": "\t"}.get(ending)


def test_one_id_for_two_texts_names_both_lines_with_their_files(tmp_path: Path) -> None:
    """Ids that are numbered in each source, as pools that were joined from several have them."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for name in ("code", "maths"):
        (folder / f"{name}.jsonl").write_bytes(
            jsonl([{"id": 7 + row, "prompt": f"{name} {row}", "uid": f"{name}{row}"} for row in range(3)])
        )
    refused(folder, rf"line 1 of {folder}/code\.jsonl and line 1 of {folder}/maths\.jsonl", hint="--id-field FIELD")
    lines = [
        line for name in ("code", "maths") for line in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    ]
    single = write_lines(tmp_path / "p.jsonl", lines)
    refused(single, rf"'7' names two different prompts: line 1 of {single} and line 4 of {single}", hint="--id-field FIELD")


def test_a_quarantined_line_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(texts("a")))
    (folder / "b.jsonl").write_bytes(jsonl(texts("b")) + b"no JSON\n")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(PromptError, match=rf"line 4 of {folder}/b\.jsonl: not JSON"):
        ingest(folder, out, out, strict=True, limit=None)


def test_a_build_of_a_folder_is_that_of_its_lines(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    lines = small_lines()
    (folder / "train-0.jsonl").write_bytes(jsonl(lines[:33]))
    (folder / "train-1.jsonl.gz").write_bytes(gzip.compress(jsonl(lines[33:])))
    (folder / "test.jsonl").write_bytes(jsonl(texts("other")))
    config = dataclasses.replace(CONFIG, dataset=DatasetChoice(split="train"))
    build_small(folder, tmp_path / "a", config=config)
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


@pytest.mark.parametrize("log", ["_delta_log/00000.json", ".hoodie/hoodie.properties", "metadata/v1.metadata.json"])
def test_a_table_whose_files_contain_removed_rows_is_refused(tmp_path: Path, log: str) -> None:
    parquet(tmp_path / "table" / "part-0.parquet", texts("removed"))
    (tmp_path / "table" / log).parent.mkdir()
    (tmp_path / "table" / log).write_text("{}")
    refused(tmp_path / "table", "rows that were removed", hint="write_table")
