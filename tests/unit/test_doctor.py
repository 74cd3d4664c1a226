"""embstore doctor: what it prints is what the sampler draws from the joined dataset, and what the table of trainers says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.errors import ExitCode
from embstore.training import DensitySampler, load_weights, trainers
from embstore.training.trainer_entry import Trainer, Trap
from tests.support.stores import small_lines, write_lines

ENTRY = Trainer(
    name="rig",
    title="Rig [1]",
    versions="1.0",
    hook="a sampler",
    joined_by="the prompt",
    order="one draw each",
    resume="exact",
    traps=(Trap("it [drops] rows", test="tests/unit/test_doctor.py::test_traps_are_shown"),),
)


@pytest.fixture(autouse=True)
def one_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "TRAINERS", (ENTRY,))


def items() -> list[dict[str, Any]]:
    return small_lines()[::-1]  # not in the store's order


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_the_draws_are_those_of_the_sampler_over_the_joined_dataset(
    finished_store: Path, tmp_path: Path, format: str
) -> None:
    source = tmp_path / f"train.{format}"
    texts = [item["prompt"] for item in items() if isinstance(item.get("prompt"), str)]
    if format == "jsonl":
        write_lines(source, [{"prompt": text} for text in texts])
    elif format == "json":
        source.write_text(json.dumps([{"prompt": text} for text in texts], indent=1))
    else:
        pq.write_table(pa.table({"prompt": texts}), source)
    words = (finished_store, source, "--trainer", "rig", "--num-samples", "200", "--seed", "3", "--epoch", "2")
    found = json.loads(run(*words, "--count", "9", "--prompts-per-step", "16", "--json").stdout)["drawn"]
    sampler = DensitySampler(load_weights(finished_store).for_dataset(texts), num_samples=200, seed=3)
    plan = sampler.plan(2).tolist()
    times = Counter(plan)
    assert found["first"] == [
        {"item": item, "times": times[item], "text": " ".join(texts[item].split())} for item in plan[:9]
    ]
    assert (found["num_items"], found["distinct_items"], found["most_times"]) == (
        len(texts),
        len(times),
        max(times.values()),
    )
    steps = [plan[start : start + 16] for start in range(0, 192, 16)]
    assert found["steps"] == 12
    assert found["steps_with_repeats"] == sum(len(set(step)) < 16 for step in steps) > 0
    shown = run(*words, "--count", "2", "--prompts-per-step", "16").stdout
    assert f"draw 1: item {plan[1]} ({times[plan[1]]} x)" in shown
    assert f"{found['steps_with_repeats']} of 12 steps draw an item twice" in shown


def test_repeats_that_are_kept_apart_are_not_counted(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", items())
    words = (finished_store, source, "--trainer", "rig", "--prompts-per-step", "4", "--no-repeat-within", "4", "--json")
    assert json.loads(run(*words).stdout)["drawn"]["steps_with_repeats"] == 0


def test_traps_are_shown(finished_store: Path, tmp_path: Path) -> None:
    shown = run(finished_store, write_lines(tmp_path / "train.jsonl", items()), "--trainer", "rig").stdout
    for text in (
        "Rig [1] 1.0",
        "hook:      a sampler",
        "joined by: the prompt",
        "trap: it [drops] rows",
        "docs/train/rig.md",
    ):
        assert text in shown


def test_ids_that_join_a_file_without_prompts_are_shown(finished_store: Path, tmp_path: Path) -> None:
    ids = json.loads((finished_store / "ids.json").read_text())
    pq.write_table(pa.table({"uid": ids}), tmp_path / "train.parquet")
    words = (finished_store, tmp_path / "train.parquet", "--trainer", "rig", "--id-column", "uid", "--json")
    for draw in json.loads(run(*words).stdout)["drawn"]["first"]:
        assert draw["text"] == ids[draw["item"]]


def test_what_does_not_join_is_an_error_with_a_hint(finished_store: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", [*items(), {"prompt": "in no store"}])
    result = run(finished_store, source, "--trainer", "rig")
    assert result.exit_code == ExitCode.ERROR
    assert "1 of 71 items" in result.stderr
    dropped = run(finished_store, source, "--trainer", "rig", "--on-missing", "drop")
    assert "because their weight is 0: 1 items" in dropped.stdout


def test_an_unknown_trainer_is_named_before_anything_is_read(tmp_path: Path) -> None:
    result = run(tmp_path / "none", tmp_path / "none.jsonl", "--trainer", "rigg")
    assert result.exit_code == ExitCode.USAGE
    assert "'rigg' is not the name of a trainer: rig" in result.stderr
