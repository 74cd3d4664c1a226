"""The real command line on a tiny real model: build, kill, resume, inspect, verify, and every refusal a user may meet."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from embstore.cli import app
from embstore.storage.journal import read_journal
from embstore.training import load_weights
from tests.support.models import make_model, make_tokenizer, save_model

NUM_PROMPTS = 96
SMALL = ["--window-rows", "32", "--chunk-rows", "16", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_model("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other") / "tiny", make_model("llama", seed=1), make_tokenizer())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "saw",
        "two",
        "red",
        "birds",
        "fly",
        "over",
        "green",
        "hills",
        "at",
        "noon",
    ]
    random = np.random.default_rng(0)
    lines = [
        {"prompt": " ".join(random.choice(words, size=random.integers(3, 20))) + f" {index}", "src": "ab"[index % 2]}
        for index in range(NUM_PROMPTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    return path


@pytest.fixture(scope="module")
def built(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store; read it, never write to it."""
    store = tmp_path_factory.mktemp("built") / "store"
    result = run("build", prompts, "--model", model, "--out", store, *SMALL)
    assert result.exit_code == 0, result.stderr
    return store


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def listed(store: Path) -> dict[str, bytes]:
    """Every file the manifest lists, chunks included, and the manifest."""
    names = list(json.loads((store / "manifest.json").read_bytes())["files"])
    names += [f"embeddings.zarr/{path.name}" for path in (store / "embeddings.zarr").iterdir()]
    return {name: (store / name).read_bytes() for name in sorted({"manifest.json", *names})}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "runs.jsonl")
    }


def test_report_says_what_was_done_and_how_right_it_is(model: Path, prompts: Path, tmp_path: Path) -> None:
    result = run("build", prompts, "--model", model, "--out", tmp_path / "store", *SMALL, "--json")
    report = json.loads(result.stdout)
    assert report["num_rows"] == report["embedded_rows"] == NUM_PROMPTS
    metadata = report["metadata"]
    assert (metadata["n_prompts"], metadata["n_items"], metadata["embedding_dtype"]) == (NUM_PROMPTS, NUM_PROMPTS, "float16")
    assert metadata["neighbors"]["audit"]["recall"] > 0.99
    weights = np.load(tmp_path / "store" / "density_weights.npy", allow_pickle=False)
    assert metadata["weights_max"] == pytest.approx(float(weights.max()))
    assert metadata["weights_std"] == pytest.approx(float(weights.astype(np.float64).std()))
    assert report["rarest"][0] == int(np.argmax(weights))
    assert "1 of 97 lines (1.0%) contain no usable prompt" in result.stderr


def test_a_killed_build_resumes_to_the_same_bytes(built: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = ["--model", str(model), "--out", str(store), *SMALL, "--resume"]
    command = [sys.executable, "-m", "embstore", "build", str(prompts), *options]
    for windows in (1, 2):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "committed" in line and read_journal(store).committed_rows >= 32 * windows:
                    process.kill()
                    break
    result = run("build", "--out", store, "--resume", "--json")  # no prompts file, no model: both are known
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["embedded_rows"] <= NUM_PROMPTS - 32
    assert listed(store) == listed(built)


def test_inspect_shows_shares_neighbours_and_extremes(built: Path) -> None:
    info = json.loads(run("inspect", built, "--json", "--by", "src").stdout)
    assert info["is_complete"]
    assert info["quarantined_lines"] == 1
    assert {share["value"]: share["rows"] for share in info["shares"]} == {"a": 48, "b": 48}
    assert sum(share["weight_share"] for share in info["shares"]) == pytest.approx(1)
    assert sum(info["weights_histogram"]) == NUM_PROMPTS
    neighbors = json.loads(run("inspect", built, "--neighbors", info["rarest"][0]["id"], "--json").stdout)
    distances = [neighbor["distance"] for neighbor in neighbors]
    assert distances == sorted(distances)
    assert np.mean(distances) == pytest.approx(info["rarest"][0]["mean_distance"], rel=1e-6)
    text = run("inspect", built).stdout
    assert "rarest" in text
    assert "effective sample size" in text


def test_weights_named_and_default_are_mapped_by_training(built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store", symlinks=True))
    before = load_weights(store).array.copy()
    assert run("weights", store, "--target-ess", "0.5", "--name", "sharp").exit_code == 0
    np.testing.assert_array_equal(load_weights(store).array, before)
    sharp = load_weights(store, name="sharp", expect_len=NUM_PROMPTS)
    assert sharp.ess() / NUM_PROMPTS == pytest.approx(0.5, abs=1e-3)
    assert run("weights", store, "--weighting", "uniform").exit_code == 0
    np.testing.assert_allclose(load_weights(store).array, 1 / NUM_PROMPTS, rtol=1e-6)
    assert run("verify", store).exit_code == 0


def test_density_settings_redo_density_and_no_row(built: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store", symlinks=True))
    result = run("build", prompts, "--model", model, "--out", store, "--resume", "--knn", "exact", "--json")
    report = json.loads(result.stdout)
    assert report["embedded_rows"] == 0
    assert report["metadata"]["neighbors"]["knn"] == "exact"
    assert run("verify", store).exit_code == 0


def test_export_kat_has_one_entry_a_line(built: Path, tmp_path: Path) -> None:
    assert run("export", built, "--format", "kat", "--out", tmp_path / "kat").exit_code == 0
    rows = np.load(tmp_path / "kat" / "embeddings.npy", allow_pickle=False)
    weights = np.load(tmp_path / "kat" / "density_weights.npy", allow_pickle=False)
    assert (rows.dtype, len(rows), len(weights)) == (np.float32, NUM_PROMPTS, NUM_PROMPTS)
    assert weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert len(json.loads((tmp_path / "kat" / "ids.json").read_text())) == NUM_PROMPTS


def test_dry_run_writes_nothing(model: Path, prompts: Path, tmp_path: Path) -> None:
    result = run("build", prompts, "--model", model, "--out", tmp_path / "store", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["remaining_rows"] == NUM_PROMPTS
    assert not (tmp_path / "store").exists()


def test_limit_keeps_the_first_prompts(built: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run("build", prompts, "--model", model, "--out", store, *SMALL, "--limit", "32").exit_code == 0
    first = (built / "embeddings.zarr" / "c.0.0").read_bytes()
    assert (store / "embeddings.zarr" / "c.0.0").read_bytes() == first  # the first window is the same window
    assert len(load_weights(store)) == 32


def test_gzip_and_standard_input_give_the_same_prompts(built: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    packed = tmp_path / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress(prompts.read_bytes()))
    # a resume of a finished store compares the rows and does nothing else
    before = tree(built)
    assert run("build", packed, "--model", model, "--out", built, "--resume").exit_code == 0
    piped = CliRunner().invoke(
        app, ["build", "-", "--model", str(model), "--out", str(built), "--resume"], input=prompts.read_bytes()
    )
    assert piped.exit_code == 0, piped.stderr
    assert tree(built) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--dtype", "the other one"], "dtype"),
        (["--space", "hidden"], "space"),
        (["--pooling", "last"], "pooling"),
        (["--max-tokens", "7"], "max_tokens"),
        (["--threads", "2"], "threads"),
        (["--vocab", "tokenizer"], "vocab"),
        (["--compressor", "none"], "compressor"),
        (["--batch-tokens", "64"], "batch_tokens"),
        (["--chunk-rows", "32"], "chunk_rows"),
    ],
)
def test_a_resume_with_other_settings_is_refused(
    change: Sequence[str], field: str, built: Path, model: Path, prompts: Path
) -> None:
    if field == "dtype":  # auto takes either
        stored = json.loads((built / "spec.json").read_bytes())["embedding"]["dtype"]
        change = ["--dtype", "float32" if stored == "bfloat16" else "bfloat16"]
    before = tree(built)
    result = run("build", prompts, "--model", model, "--out", built, "--resume", *change)
    assert result.exit_code == 4
    assert field in result.stderr
    assert change[1] in result.stderr
    assert tree(built) == before


def test_a_resume_with_another_model_or_order_is_refused(
    built: Path, model: Path, other_model: Path, prompts: Path, tmp_path: Path
) -> None:
    before = tree(built)
    result = run("build", prompts, "--model", other_model, "--out", built, "--resume")
    assert result.exit_code == 4
    assert "model.weights_sha256" in result.stderr
    lines = prompts.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join([lines[1], lines[0], *lines[2:]]))
    result = run("build", turned, "--model", model, "--out", built, "--resume")
    assert result.exit_code == 4
    assert "row 0" in result.stderr
    assert tree(built) == before


def bad_input(case: str, model: Path, folder: Path) -> tuple[list[object], int, str]:  # noqa: PLR0911 - one a case
    """Arguments of a build that must be refused, its exit code, and what the message must say."""
    file = folder / "prompts.jsonl"
    good = json.dumps({"prompt": "a prompt"}) + "\n"
    out = folder / "store"
    content: dict[str, bytes] = {
        "empty": b"",
        "binary": os.urandom(5000),
        "utf16": good.encode("utf-16"),
        "two texts": b'{"id": "x", "prompt": "one"}\n{"id": "x", "prompt": "two"}\n',
        "truncated gzip": gzip.compress(good.encode() * 1000)[:-20],
    }
    says = {"empty": "empty", "binary": "none of its", "utf16": "UTF-8", "two texts": "line 2", "truncated gzip": "failed"}
    if case in content:
        file.write_bytes(content[case])
        return [file, "--model", model, "--out", out], 1, says[case]
    file.write_text(good)
    if case == "missing":
        return [folder / "nothing.jsonl", "--model", model, "--out", out], 1, "nothing.jsonl"
    if case == "strict":
        file.write_text(good + "bad\n")
        return [file, "--model", model, "--out", out, "--strict"], 1, "line 2"
    if case == "no weights":
        empty = folder / "model"
        shutil.copytree(model, empty)
        (empty / "model.safetensors").unlink()
        return [file, "--model", empty, "--out", out], 1, "contains no weights"
    if case == "no model option":
        return [file, "--out", out], 2, "no model was given"
    if case == "windows":
        return [file, "--model", model, "--out", out, "--window-rows", "100", "--chunk-rows", "33"], 2, "multiple of"
    if case == "no model":
        return [file, "--model", folder / "no-model", "--out", out], 1, "is not a folder"
    if case == "foreign folder":
        (out / "sub").mkdir(parents=True)
        return [file, "--model", model, "--out", out], 1, "is not a store"
    if case == "memory":
        return [file, "--model", model, "--out", out, "--memory-budget", "1MiB"], 1, "--memory-budget"
    if case == "size":
        return [file, "--model", model, "--out", out, "--memory-budget", "lots"], 2, "lots"
    if case == "device":
        return [file, "--model", model, "--out", out, "--device", "cuda:99"], 2, "cuda:99"
    if case == "existing store":
        assert run("build", file, "--model", model, "--out", out).exit_code == 0
        return [file, "--model", model, "--out", out], 1, "already contains a store"
    assert case == "format version"
    assert run("build", file, "--model", model, "--out", out).exit_code == 0
    spec = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**spec, "format_version": 2}))
    return [file, "--model", model, "--out", out, "--resume"], 4, "format_version"


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "empty",
        "binary",
        "utf16",
        "two texts",
        "truncated gzip",
        "strict",
        "no weights",
        "no model",
        "no model option",
        "windows",
        "foreign folder",
        "memory",
        "size",
        "device",
        "existing store",
        "format version",
    ],
)
def test_bad_input_gets_one_line_what_and_one_line_what_to_do(case: str, model: Path, tmp_path: Path) -> None:
    arguments, code, says = bad_input(case, model, tmp_path)
    before = tree(tmp_path)
    result = run("build", *arguments)
    assert result.exit_code == code, result.stderr
    assert "error: " in result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert tree(tmp_path) == before  # nothing lost, and nothing left
    out = tmp_path / "store"
    if case in ("existing store", "format version", "foreign folder"):
        return
    assert not out.exists()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a prompt"}) + "\n")
    result = run("build", tmp_path / "prompts.jsonl", "--model", model, "--out", out, "--memory-budget", "2G")
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow  # and tests/unit/test_prompts.py reads such a line without a model
def test_a_line_of_ten_megabytes_is_a_row_like_any_other(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    long = " ".join(["word"] * 2_100_000)
    file.write_text(json.dumps({"prompt": long}) + "\n" + json.dumps({"prompt": "short"}) + "\n")
    result = run("build", file, "--model", model, "--out", tmp_path / "store", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_rows"] == 2


def test_no_space_is_refused_before_a_row_is_computed(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(total=10**9, used=10**9 - 1000, free=1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = run("build", prompts, "--model", model, "--out", tmp_path / "store")
    assert result.exit_code == 1
    assert "1000 B free" in result.stderr
    assert not (tmp_path / "store" / "spec.json").exists()


def test_a_soft_capped_model_streams_and_stays_under_its_budget(prompts: Path, tmp_path: Path) -> None:
    capped = save_model(tmp_path / "capped", make_model("gemma2"), make_tokenizer())
    result = run("build", prompts, "--model", capped, "--out", tmp_path / "store", *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    info: dict[str, Any] = json.loads(run("inspect", tmp_path / "store", "--json").stdout)
    assert info["spec"]["embedding"]["head"]["kind"] == "capped"
    assert info["metadata"]["neighbors"]["meets_target"]
