"""embstore resample: the copy is the plan of the joined weights, item by item, in both formats."""

from __future__ import annotations

import datetime
import errno
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.errors import ConfigError, KeyMismatchError, PromptError, StorageError, StoreExistsError
from embstore.host.memory import read_memory
from embstore.training import DensitySampler, dataset_file, load_weights, resample_file, resample_indices
from tests.support.stores import small_lines, write_lines
from tests.unit.test_prompt_inputs import pipe, zstd


def items() -> list[dict[str, Any]]:
    """A dataset of another order than the store's, with answers."""
    return [{**line, "answer": f"é {number}"} for number, line in enumerate(small_lines()[::-1])]


def test_lines_are_drawn_verbatim_in_the_order_of_the_plan(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "data.jsonl", [b"\n", *items()[:30], b"  \n", *items()[30:]])
    report = resample_file(finished_store, source, tmp_path / "out.jsonl", num_samples=200, seed=4, epoch=1)
    plan = resample_indices(load_weights(finished_store).for_dataset(items()), 200, seed=4, epoch=1)
    expected = [{**items()[row], "embstore_draw": number} for number, row in enumerate(plan)]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected
    assert (report.num_items, report.num_samples, report.distinct_items) == (70, 200, len(set(plan.tolist())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]
    with pytest.raises(StoreExistsError, match="exists already"):
        resample_file(finished_store, source, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is resampled already"):
        resample_file(finished_store, tmp_path / "out.jsonl", tmp_path / "again.jsonl")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_copy_is_on_the_disk_before_it_has_its_name(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    source, out = tmp_path / f"data.{format}", tmp_path / f"out.{format}"
    if format == "jsonl":
        write_lines(source, items())
    else:
        pq.write_table(pa.Table.from_pylist([{"uid": name} for name in store_ids(finished_store)]), source)
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        seen.append("file" if name.startswith(f".{out.name}.") else name)
        fsync(handle)

    def replaced(old: Path, new: Path) -> None:
        seen.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    resample_file(finished_store, source, out, id_column=None if format == "jsonl" else "uid")
    assert seen == ["file", "rename", tmp_path.name]
    out.unlink()

    def refused(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(StorageError, match="Input/output error"):
        resample_file(finished_store, source, out, id_column=None if format == "jsonl" else "uid")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("block_bytes", [1, 3000, 64 << 20])
def test_parquet_rows_of_every_type_are_those_of_the_plan(
    block_bytes: int, finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many runs and blocks there are, and where each row group has another dictionary."""
    monkeypatch.setattr(dataset_file, "_BLOCK_DRAWS", 64)
    monkeypatch.setattr(dataset_file, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(dataset_file, "_BATCH_ROWS", 4)
    ids = store_ids(finished_store)
    rows = [
        {
            "uid": name,
            "extra": {"ground_truth": number, "style": None if number % 3 else "rule"},
            "chat": [{"role": "user", "content": "é" * (number % 5)}] * (number % 4) if number % 7 else None,
            "score": number / 3 if number % 2 else None,
            "when": datetime.datetime(2026, 12, 1) + datetime.timedelta(hours=number),
        }
        for number, name in enumerate(ids)
    ]
    table = pa.Table.from_pylist(rows)
    kinds = [pa.array([f"kind {number // 9}-{number % 2}"]).dictionary_encode() for number in range(70)]
    table = table.append_column("kind", pa.chunked_array(kinds))
    table = table.append_column("data", pa.array([json.dumps({"n": n}) for n in range(70)]).cast(pa.json_(pa.string())))
    table = table.append_column("vector", pa.array([[n, n + 1.5] for n in range(70)], pa.list_(pa.float32(), 2)))
    table = table.append_column("view", pa.array([f"a text that is kept apart {n}" for n in range(70)], pa.string_view()))
    table = table.replace_schema_metadata({"written by": "a test"})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=9)
    resample_file(
        finished_store, tmp_path / "data.parquet", tmp_path / "out.parquet", num_samples=200, seed=2, id_column="uid"
    )
    plan = resample_indices(load_weights(finished_store).for_dataset(rows, id_column="uid"), 200, seed=2)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["embstore_draw"].to_pylist() == list(range(200))
    expected = table.to_pylist()
    assert found.drop_columns("embstore_draw").to_pylist() == [expected[row] for row in plan]
    written = pq.read_schema(tmp_path / "data.parquet")
    assert found.schema.equals(written.append(pa.field("embstore_draw", pa.int64())), check_metadata=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "out.parquet"]


def test_a_table_with_chats_is_joined_by_content(finished_store: Path, tmp_path: Path) -> None:
    chats = [
        {"prompt": line.get("messages") or [{"role": "user", "content": line["prompt"]}], "uid": f"u{number}"}
        for number, line in enumerate(small_lines())
        if "messages" in line
    ]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "data.parquet", row_group_size=2)
    resample_file(finished_store, tmp_path / "data.parquet", tmp_path / "out.parquet", num_samples=150, seed=2)
    plan = resample_indices(load_weights(finished_store).for_dataset(chats), 150, seed=2)
    expected = [{**chats[row], "embstore_draw": number} for number, row in enumerate(plan)]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == expected


class CountedBytes(io.RawIOBase):
    """A file in memory that counts what is read of it."""

    total = 0

    def __init__(self, content: pa.Buffer) -> None:
        super().__init__()
        self._file = pa.PythonFile(io.BytesIO(content.to_pybytes()), "r")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        found: int = self._file.seek(offset, whence)
        return found

    def tell(self) -> int:
        found: int = self._file.tell()
        return found

    def read(self, size: int = -1) -> bytes:
        found: bytes = self._file.read(None if size < 0 else size)
        CountedBytes.total += len(found)
        return found


def test_each_row_group_is_read_once_however_many_rows_are_drawn(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten million draws of a file of 10 GB read it 153 times."""
    monkeypatch.setattr(dataset_file, "_BLOCK_DRAWS", 100)
    texts = np.random.default_rng(0).bytes(70 * 4000)  # does not compress
    rows = [
        {"uid": name, "text": texts[4000 * number : 4000 * (number + 1)].hex()}
        for number, name in enumerate(store_ids(finished_store))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=5)
    size = (tmp_path / "data.parquet").stat().st_size
    monkeypatch.setattr(pa, "BufferReader", lambda content: pa.PythonFile(CountedBytes(content), "r"))
    seen = {}
    for draws in (1, 700, 5000):
        CountedBytes.total = 0
        out = tmp_path / f"{draws}.parquet"
        resample_file(finished_store, tmp_path / "data.parquet", out, num_samples=draws, seed=1, id_column="uid")
        assert pq.read_metadata(out).num_rows == draws
        seen[draws] = CountedBytes.total
    assert size <= seen[700] == seen[5000] <= 1.2 * size
    assert seen[1] <= 0.2 * size  # row groups of which nothing is drawn are not read


_RESAMPLE = """
import sys
import pyarrow.parquet
from embstore.host.memory import MemoryMeter
from embstore.training import dataset_file, file_resampling

dataset_file._BLOCK_BYTES = 4 << 20
with MemoryMeter() as meter:
    meter.set_baseline()
    file_resampling.resample_file(*sys.argv[1:4], num_samples=int(sys.argv[4]), id_column="uid")
    print(meter.peak_anonymous_bytes)
"""


@pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
def test_the_rows_in_memory_are_few_however_many_are_drawn(finished_store: Path, tmp_path: Path) -> None:
    rows = [{"uid": name, "text": f"{number} " * 2000} for number, name in enumerate(store_ids(finished_store))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=10)
    arguments = [finished_store, tmp_path / "data.parquet", tmp_path / "out.parquet", 32_000]
    command = [sys.executable, "-c", _RESAMPLE, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 140 << 20  # the drawn rows are 190 MB; pyarrow takes 70 at its first use


def test_a_disk_that_is_full_of_scratch_is_an_expected_error(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ids = store_ids(finished_store)
    pq.write_table(pa.Table.from_pylist([{"uid": name} for name in ids]), tmp_path / "data.parquet")
    monkeypatch.setattr(dataset_file.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(StorageError, match="No space left on device") as caught:
        resample_file(finished_store, tmp_path / "data.parquet", tmp_path / "out.parquet", id_column="uid")
    assert str(caught.value.hint).startswith("free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]


def store_ids(store: Path) -> list[str]:
    found: list[str] = json.loads((store / "ids.json").read_text())
    return found


def test_what_cannot_be_resampled_leaves_nothing(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "data.jsonl", [*items()[:3], b"no JSON\n", {"prompt": "nobody"}])
    with pytest.raises(
        KeyMismatchError, match=r"2 of 5 items .* item 4, 'nobody'; 1 without a prompt, the first is item 3: not JSON"
    ):
        resample_file(finished_store, source, tmp_path / "out.jsonl")
    wrong: list[tuple[Path, str, str]] = [
        (source, "out.parquet", "must both be JSON or both Parquet"),
        (tmp_path / "none.jsonl", "out.jsonl", "No such file"),
        (tmp_path, "out.jsonl", "is not a file"),
        (_written(tmp_path / "bad.parquet", b"no Parquet"), "out.parquet", "must both be JSON or both Parquet"),
        (_written(tmp_path / "cut.parquet", b"PAR1\x15\x04" + bytes(40)), "out.parquet", "not a Parquet file"),
        (
            _written(tmp_path / "list.json", json.dumps(items()).encode()),
            "out.parquet",
            "must both be JSON or both Parquet",
        ),
        (_written(tmp_path / "cut.json", json.dumps(items()).encode()[:-1]), "out.json", "cut.json is not valid JSON"),
        (_written(tmp_path / "none.json", b"[]\n"), "out.json", "none.json has no records"),
        (_written(tmp_path / "text.jsonl", b'{"prompt": "a"}'.decode().encode("utf-16")), "out.jsonl", "is UTF-16 text"),
        (_written(tmp_path / "empty.jsonl", b""), "out.jsonl", "is empty"),
        (_written(tmp_path / "cut.jsonl.gz", gzip.compress(source.read_bytes())[:-9]), "out.jsonl", "failed"),
    ]
    for dataset, out, complaint in wrong:
        with pytest.raises((ConfigError, PromptError), match=complaint) as caught:
            resample_file(finished_store, dataset, tmp_path / out)
        assert caught.value.hint
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "q.parquet")
    with pytest.raises(ConfigError, match="it has question"):
        resample_file(finished_store, tmp_path / "q.parquet", tmp_path / "out.parquet")
    assert not list(tmp_path.glob("*out*"))
    report = resample_file(finished_store, source, tmp_path / "out.jsonl", num_samples=40, on_missing="drop")
    drawn = {
        json.loads(line)["prompt" if "nobody" in line else "answer"]
        for line in (tmp_path / "out.jsonl").read_text().splitlines()
    }
    assert report.distinct_items == len(drawn) == 3


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", ["pipe", "fifo", "gzip", "zstd", "gzip pipe", "standard input"])
def test_lines_are_drawn_however_they_arrive(
    form: str, finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "data.jsonl", [b"\n", *items()])
    resample_file(finished_store, source, tmp_path / "expected.jsonl", seed=5)
    content = source.read_bytes()
    packed = zstd(content) if form == "zstd" else gzip.compress(content) if "gzip" in form else content
    out = tmp_path / "found.jsonl"
    if form == "fifo":
        os.mkfifo(tmp_path / "fifo")
        feeder = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(packed))
        feeder.start()
        resample_file(finished_store, tmp_path / "fifo", out, seed=5)
        feeder.join()
    elif "pipe" in form:
        with pipe(packed, [1, 5, 1000]) as path:
            resample_file(finished_store, path, out, seed=5)
    elif form == "standard input":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(packed)))
        resample_file(finished_store, "-", out, seed=5)
    else:
        resample_file(finished_store, _written(tmp_path / "packed", packed), out, seed=5)
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_parquet_is_drawn_from_a_pipe_and_with_json_columns(finished_store: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": json.dumps(line.get("messages") or line["prompt"]), "n": row} for row, line in enumerate(small_lines())
    ]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(0, "prompt", table["prompt"].cast(pa.json_(pa.string())))
    pq.write_table(table, tmp_path / "data.parquet")
    resample_file(finished_store, tmp_path / "data.parquet", tmp_path / "a.parquet", seed=3)
    with pipe((tmp_path / "data.parquet").read_bytes()) as path:
        resample_file(finished_store, path, tmp_path / "b.parquet", seed=3)
    plan = resample_indices(load_weights(finished_store).for_dataset(small_lines()), seed=3)
    for name in "ab":
        assert pq.read_table(tmp_path / f"{name}.parquet")["n"].to_pylist() == plan.tolist()


SPREAD = {
    "a line": lambda: json.dumps(items(), ensure_ascii=False),
    "indented": lambda: "\ufeff" + json.dumps(items(), indent=2, ensure_ascii=False),
    "no array": lambda: "\r\n".join(json.dumps(item, indent=1) for item in items()),
}


@pytest.mark.parametrize("form", SPREAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_json_array_is_drawn_as_its_lines_are(form: str, packed: bool, finished_store: Path, tmp_path: Path) -> None:
    """As LLaMA-Factory's own data files are."""
    content = SPREAD[form]().encode()
    source = _written(tmp_path / "data.json", gzip.compress(content) if packed else content)
    for name in ("out.jsonl", "out.json"):
        resample_file(finished_store, source, tmp_path / name, num_samples=200, seed=4)
    resample_file(finished_store, write_lines(tmp_path / "l.jsonl", items()), tmp_path / "e.jsonl", num_samples=200, seed=4)
    expected = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert len(expected) == 200
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected
    text = (tmp_path / "out.json").read_text()
    assert (json.loads(text) if form != "no array" else [json.loads(line) for line in text.splitlines()]) == expected


def test_a_disk_that_is_full_of_an_arrays_lines_is_an_expected_error(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = _written(tmp_path / "data.json", SPREAD["a line"]().encode())
    monkeypatch.setattr("embstore.training.drawn_lines.tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(StorageError, match="No space left on device"):
        resample_file(finished_store, source, tmp_path / "out.json")


@pytest.mark.parametrize("kind", [int, str])
def test_a_column_is_renumbered_in_both_formats(kind: type, finished_store: Path, tmp_path: Path) -> None:
    rows = [
        {"n": kind(900 - row), "uid": name, "é": {"a": [row, 0.1]}} for row, name in enumerate(store_ids(finished_store))
    ]
    write_lines(tmp_path / "data.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=9)
    options: dict[str, Any] = {"num_samples": 200, "seed": 2, "id_column": "uid", "reindex": "n"}
    for suffix in ("jsonl", "parquet"):
        resample_file(finished_store, tmp_path / f"data.{suffix}", tmp_path / f"out.{suffix}", **options)
    plan = resample_indices(load_weights(finished_store).for_dataset(rows, id_column="uid"), 200, seed=2)
    expected = [{**rows[row], "n": kind(draw), "embstore_draw": draw} for draw, row in enumerate(plan)]
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert "é" in lines[0]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == expected
    assert table.schema.field("n") == pq.read_schema(tmp_path / "data.parquet").field("n")


def test_a_column_that_cannot_be_renumbered_is_named(finished_store: Path, tmp_path: Path) -> None:
    rows = [{"uid": name, "score": 0.5} for name in store_ids(finished_store)]
    write_lines(tmp_path / "data.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    for suffix, column, complaint in (
        ("jsonl", "index", r"line 1 of .* has no number or text in the field index, .*; it has uid, score"),
        ("jsonl", "score", "no number or text in the field score"),
        ("parquet", "index", "has no column index; it has uid, score"),
        ("parquet", "score", "has double in the column score; --reindex takes a column of numbers or texts"),
    ):
        with pytest.raises(ConfigError, match=complaint) as caught:
            resample_file(
                finished_store,
                tmp_path / f"data.{suffix}",
                tmp_path / f"out.{suffix}",
                id_column="uid",
                reindex=column,
            )
        assert caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_the_command_writes_the_same_file(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "data.jsonl", [*items(), {"prompt": "nobody"}])
    options = ["--dataset", str(source), "--out", str(tmp_path / "a.jsonl"), "--seed", "3", "--on-missing", "0.5"]
    done = CliRunner().invoke(app, ["resample", str(finished_store), *options])
    assert done.exit_code == 0, done.output
    assert "71 draws" in done.output
    resample_file(finished_store, source, tmp_path / "b.jsonl", seed=3, on_missing=0.5)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    refused = CliRunner().invoke(app, ["resample", str(finished_store), *options[:3], str(tmp_path / "c.jsonl")])
    assert refused.exit_code == 1
    assert np.array_equal(sorted(path.name for path in tmp_path.iterdir()), ["a.jsonl", "b.jsonl", "data.jsonl"])


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_spare_draws_come_behind_the_others(finished_store: Path, tmp_path: Path, format: str) -> None:
    """A file with spare draws begins with the file without them, so a run can go on with it."""
    rows = [{"uid": name, "n": number} for number, name in enumerate(store_ids(finished_store))]
    source = tmp_path / f"data.{format}"
    if format == "jsonl":
        write_lines(source, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=9)

    def drawn(name: str, *options: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{name}.{format}"
        line = ["--dataset", str(source), "--out", str(out), "--num-samples", "200", "--id-column", "uid", *options]
        done = CliRunner().invoke(app, ["resample", str(finished_store), *line])
        assert done.exit_code == 0, done.output
        assert ("200 draws and 30 to spare" in done.output) == ("--over" in options)
        found = pq.read_table(out).to_pylist() if format == "parquet" else map(json.loads, out.read_text().splitlines())
        return list(found)

    apart = ("--no-repeat-within", "8")
    plain, longer = drawn("plain", *apart), drawn("longer", *apart, "--over", "30")
    assert longer[:200] == plain
    assert [row["embstore_draw"] for row in longer] == list(range(230))
    weights = load_weights(finished_store).for_dataset(rows, id_column="uid")
    spare = DensitySampler(weights, num_samples=30, no_repeat_within=8).plan(2**64 - 1)
    assert [row["n"] for row in longer[200:]] == spare.tolist()
    numbers = [row["n"] for row in plain]
    assert all(len(set(numbers[start : start + 8])) == 8 for start in range(193))


def test_a_byte_order_mark_stays_out_and_a_broken_line_is_never_drawn(finished_store: Path, tmp_path: Path) -> None:
    marked = write_lines(
        tmp_path / "marked.jsonl", [b"\xef\xbb\xbf" + json.dumps(items()[0]).encode() + b"\n", *items()[1:9]]
    )
    resample_file(finished_store, marked, tmp_path / "a.jsonl", num_samples=40)
    drawn = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in items()[:9]} >= set(drawn)
    assert len(drawn) == 40
    broken = write_lines(tmp_path / "broken.jsonl", [*items()[:9], b'{"prompt": "cut of', b"\n", b"[1]\n"])
    for policy in ("mean", 2.0):
        with pytest.raises(PromptError, match=r"line 10 of .*broken.jsonl: not JSON .* cannot be drawn") as caught:
            resample_file(finished_store, broken, tmp_path / "b.jsonl", on_missing=policy)  # type: ignore[arg-type]
        assert "--on-missing drop" in str(caught.value.hint)
    resample_file(finished_store, broken, tmp_path / "b.jsonl", num_samples=100, on_missing="drop")
    assert all("answer" in json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines())


def test_items_that_cannot_be_read_keep_their_places_in_a_join_by_ids(finished_store: Path, tmp_path: Path) -> None:
    ids = store_ids(finished_store)[:6]
    lines: list[Any] = [{"uid": name, "n": number} for number, name in enumerate(ids)]
    source = write_lines(tmp_path / "data.jsonl", [*lines[:2], b"no JSON\n", *lines[2:], b"[1]\n"])
    with pytest.raises(KeyMismatchError, match=r"2 of 8 items .*: 2 without a prompt, the first is item 2: not JSON"):
        resample_file(finished_store, source, tmp_path / "out.jsonl", id_column="uid")
    with pytest.raises(PromptError, match=r"line 3 of .* cannot be drawn"):
        resample_file(finished_store, source, tmp_path / "out.jsonl", id_column="uid", on_missing="mean")
    resample_file(finished_store, source, tmp_path / "out.jsonl", id_column="uid", on_missing="drop", num_samples=60, seed=3)
    drawn = [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    known = load_weights(finished_store).for_dataset(lines, id_column="uid").array
    plan = resample_indices(np.insert(known, [2, 6], 0), 60, seed=3)
    assert drawn == [row - (row > 2) for row in plan.tolist()]
    # the same of a table, whose ids are JSON
    texts = pa.array([json.dumps(ids[0]), "no quotes", json.dumps(ids[1])]).cast(pa.json_(pa.string()))
    table = pa.table({"uid": texts, "n": [0, 1, 2]})
    pq.write_table(table, tmp_path / "data.parquet")
    stored = load_weights(finished_store)
    for join in (
        lambda **policy: stored.for_dataset(table, id_column="uid", **policy),
        lambda **policy: resample_file(
            finished_store, tmp_path / "data.parquet", tmp_path / "out.parquet", id_column="uid", **policy
        ),
    ):
        with pytest.raises(KeyMismatchError, match=r"1 of 3 items .* item 1: its id is JSON that cannot be read"):
            join()
        assert join(on_missing="drop") is not None
    assert set(pq.read_table(tmp_path / "out.parquet")["n"].to_pylist()) <= {0, 2}


def test_a_copy_that_cannot_be_written_is_an_expected_error(finished_store: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", items()[:9])
    pq.write_table(pa.Table.from_pylist([{"prompt": line["prompt"]} for line in items()[10:]]), tmp_path / "data.parquet")
    for kind in ("jsonl", "parquet"):
        with pytest.raises(StorageError, match=r"writing .*nowhere.* failed"):
            resample_file(finished_store, tmp_path / f"data.{kind}", tmp_path / "nowhere" / f"out.{kind}")


def test_the_command_notes_in_which_form_prompts_were_found(finished_store: Path, tmp_path: Path) -> None:
    chats = [{"prompt": [{"role": "user", "content": line["prompt"]}]} for line in small_lines()[1:9]]
    source = write_lines(tmp_path / "data.jsonl", chats)
    done = CliRunner().invoke(
        app, ["resample", str(finished_store), "--dataset", str(source), "--out", str(tmp_path / "o.jsonl")]
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith(f"note: {finished_store} contains plain texts")
