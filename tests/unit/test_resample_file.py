"""embstore resample: the copy is the plan of the joined weights, item by item, in both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.errors import ConfigError, KeyMismatchError, StoreExistsError
from embstore.training import file_resampling, load_weights, resample_file, resample_indices
from tests.support.stores import small_lines, write_lines


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


def test_parquet_rows_are_drawn_by_blocks_of_draws_and_row_groups(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_resampling, "_BLOCK_DRAWS", 64)
    chats = [
        {"prompt": line.get("messages") or [{"role": "user", "content": line["prompt"]}], "uid": f"u{number}"}
        for number, line in enumerate(small_lines())
        if "messages" in line
    ]
    ids = [{"uid": name, "extra": {"ground_truth": number}} for number, name in enumerate(store_ids(finished_store))]
    for name, rows, join in (("chats", chats, {}), ("ids", ids, {"id_column": "uid"})):
        source, out = tmp_path / f"{name}.parquet", tmp_path / f"{name}-out.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=9)
        resample_file(finished_store, source, out, num_samples=150, seed=2, **join)  # type: ignore[arg-type]
        weights = load_weights(finished_store).for_dataset(rows, **join)  # type: ignore[arg-type]
        plan = resample_indices(weights, 150, seed=2)
        assert pq.read_table(out).to_pylist() == [{**rows[row], "embstore_draw": number} for number, row in enumerate(plan)]


def store_ids(store: Path) -> list[str]:
    found: list[str] = json.loads((store / "ids.json").read_text())
    return found


def test_what_cannot_be_resampled_leaves_nothing(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "data.jsonl", [*items()[:3], b"no JSON\n", {"prompt": "nobody"}])
    with pytest.raises(
        KeyMismatchError, match=r"2 of 5 items .* item 4, 'nobody'; 1 without a prompt, the first is item 3: not JSON"
    ):
        resample_file(finished_store, source, tmp_path / "out.jsonl")
    for wrong, complaint in (((source, "out.parquet"), "both"), ((tmp_path / "none.jsonl", "o.jsonl"), "is not a file")):
        with pytest.raises(ConfigError, match=complaint):
            resample_file(finished_store, wrong[0], tmp_path / wrong[1])
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        resample_file(finished_store, tmp_path / "bad.parquet", tmp_path / "out.parquet")
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
