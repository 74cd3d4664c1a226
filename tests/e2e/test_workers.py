"""The command line with workers and a real model: the same bytes, a quiet terminal, results alone on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import embstore
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import small_lines, snapshot, write_lines

ROOT = Path(embstore.__file__).parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "embstore", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_model("llama"), make_tokenizer())


@pytest.mark.slow  # and tests/contract/test_engines.py, with rows that are not a model's
def test_two_workers_make_the_store_of_one_process(model: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", small_lines())
    common = ("build", prompts, "--model", model, "--window-rows", 16, "--chunk-rows", 16, "--knn", "hnsw", "--shards", 2)
    alone = run(*common, "--out", tmp_path / "alone", "--threads", 1)
    assert alone.returncode == 0, alone.stderr
    workers = run(*common, "--out", tmp_path / "workers", "--devices", "cpu,cpu", "--threads", 1, "--json")
    assert workers.returncode == 0, workers.stderr
    assert snapshot(tmp_path / "workers") == snapshot(tmp_path / "alone")
    report = json.loads(workers.stdout)  # and nothing else is there
    assert report["embedded_rows"] == 70
    assert report["worker_peak_bytes"] < 256 << 20
    assert 0 < report["worker_traffic_bytes"] < 8192 * 70 + 3 * (64 << 10)  # a job for each worker beside the rows
    lines = workers.stderr.splitlines()
    assert [line for line in lines if "ray" in line.lower() or "WARNING" in line] == []
    # how many have started by then, and how long the rest seemed to take, is the machine's business
    assert [line for line in lines if re.search(r"committed 70/70 rows, .*[12]/2 workers, \d+ s left", line)], lines


def test_a_cluster_that_is_not_there_is_an_error_with_the_next_step(model: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", small_lines())
    given = ("build", prompts, "--model", model, "--out", tmp_path / "store", "--engine", "ray")
    done = run(*given, "--ray-address", "127.0.0.1:1")
    assert done.returncode == 6, done.stderr
    assert "error: connecting to Ray on 127.0.0.1:1 failed: " in done.stderr
    assert "hint: check with `ray status`" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_without_an_engine_are_a_wrong_command(tmp_path: Path) -> None:
    done = run("build", "p.jsonl", "--model", "m", "--out", tmp_path / "store", "--num-workers", 2)
    assert done.returncode == 2, done.stderr
    assert "add --engine ray" in done.stderr
