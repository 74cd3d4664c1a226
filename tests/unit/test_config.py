"""Options reach their fields, are checked where they enter, and sizes are read as people write them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.config import (
    BuildConfig,
    DatasetChoice,
    DensityConfig,
    EmbeddingConfig,
    EngineConfig,
    PromptFields,
    WeightingConfig,
    format_bytes,
    parse_bytes,
)
from embstore.core.errors import ConfigError, ExitCode

# a command line with every option that a build's config has, and the config that it means
EVERY_OPTION = shlex.split(
    """
    --model M --revision main --device cpu --dtype bfloat16 --max-tokens 64 --space logits --pooling last --vocab tokenizer
    --turns prompt --chat-date 2026-01-02 --split train --config en
    --compressor none --batch-tokens 128 --window-rows 32 --chunk-rows 16 --threads 3 --trust-tokenizer-pickle
    --trust-remote-code --memory-budget 512M --knn hnsw --shards 2 --center --weighting uniform --k 5 --gamma 2
    --uniform-mix 0.25 --max-ratio inf --duplicates keep --text-field question --messages-field talk --id-field uid
    --on-error quarantine --strict --limit 7 --max-quarantined 0.25 --allow-drift --trust-journal --reuse A,B --reuse C
    --model-memory 3GiB --engine ray --ray-address head:6379 --num-workers 4 --gpus-per-worker 0.5
    """
)
EVERY_FIELD = BuildConfig(
    embedding=EmbeddingConfig(
        model="M",
        revision="main",
        device="cpu",
        dtype="bfloat16",
        max_tokens=64,
        space="logits",
        pooling="last",
        vocab="tokenizer",
        compressor="none",
        batch_tokens=128,
        window_rows=32,
        chunk_rows=16,
        threads=3,
        trust_tokenizer_pickle=True,
        trust_remote_code=True,
        chat_date="2026-01-02",
    ),
    density=DensityConfig(knn="hnsw", shards=2, center=True),
    weighting=WeightingConfig(weighting="uniform", k=5, gamma=2.0, uniform_mix=0.25, max_ratio=None, duplicates="keep"),
    memory_budget_bytes=512 << 20,
    model_memory_bytes=3 << 30,
    on_error="quarantine",
    strict=True,
    limit=7,
    allow_drift=True,
    trust_journal=True,
    max_quarantined=0.25,
    turns="prompt",
    dataset=DatasetChoice(split="train", config="en"),
    reuse=("A,B", "C"),
    fields=PromptFields(text="question", messages="talk", id="uid"),
    engine=EngineConfig(engine="ray", ray_address="head:6379", num_workers=4, gpus_per_worker=0.5),
)


def config_of(*words: str, monkeypatch: pytest.MonkeyPatch) -> BuildConfig:
    """The config that the command line hands to the library."""
    found: list[BuildConfig] = []
    monkeypatch.setattr("embstore.flow.dry_run.preflight", lambda prompts, *, config, **others: found.append(config))
    result = CliRunner().invoke(app, ["build", "prompts.jsonl", "--out", "STORE", "--dry-run", "--json", *words])
    assert result.exit_code == 0, result.stderr
    (config,) = found
    return config


def test_every_option_of_a_build_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of(*EVERY_OPTION, monkeypatch=monkeypatch) == EVERY_FIELD
    assert config_of("--devices", "cuda:0, cuda:1", monkeypatch=monkeypatch).engine.devices == ("cuda:0", "cuda:1")
    assert config_of("--target-ess", "0.5", monkeypatch=monkeypatch).weighting.target_ess == 0.5
    listed = set(re.findall(r"^  (--[a-z-]+)", CliRunner().invoke(app, ["build", "--help-all"]).stdout, re.MULTILINE))
    own = {"--out", "--resume", "--dry-run", "--scratch", "--json", "--help", "--help-all", "--devices", "--target-ess"}
    assert listed - own == {word for word in EVERY_OPTION if word.startswith("--")}


def test_without_options_a_build_has_the_defaults_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of(monkeypatch=monkeypatch) == BuildConfig()


def test_a_size_that_cannot_be_read_is_wrong_use_of_the_command_line() -> None:
    result = CliRunner().invoke(app, ["build", "prompts.jsonl", "--out", "STORE", "--memory-budget", "2 XB"])
    assert result.exit_code == ExitCode.USAGE
    assert "error: not a size: '2 XB'\nhint: " in result.stderr


def test_help_in_python_names_field_choices_default_unit_and_meaning() -> None:
    lines = str(BuildConfig.__doc__).splitlines()
    at = lines.index("embedding.max_tokens : int | None, default None, in tokens")
    assert lines[at + 1].startswith("    Keep the first N tokens")
    assert "density.audit_rows : int, default 2000, in rows" in lines  # one that the command line does not have
    assert "weighting : {'inverse-density', 'legacy-inverse', 'uniform'}, default 'inverse-density'" in str(
        WeightingConfig.__doc__
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1048576", 1 << 20),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        (" 500 MB ", 500_000_000),
        ("0.5KiB", 512),
        ("3 tb", 3 * 10**12),
        ("2G", 2 << 30),
        ("512M", 512 << 20),
        ("0.5 k", 512),
        ("1T", 1 << 40),
        ("7b", 7),
        ("0", 0),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 GiB extra", "1,5GB", "1e9", "2 XB", "nan", "0x10", "٣ GiB x"])
def test_text_that_is_not_a_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (EmbeddingConfig, {"max_tokens": 0}, "max_tokens"),
        (EmbeddingConfig, {"batch_tokens": -1}, "batch_tokens"),
        (EmbeddingConfig, {"window_rows": 0}, "window_rows"),
        (EmbeddingConfig, {"chunk_rows": 0}, "chunk_rows"),
        (EmbeddingConfig, {"threads": 0}, "threads"),
        (DensityConfig, {"shards": 0}, "shards"),
        (DensityConfig, {"target_recall": 1.0}, "target_recall"),
        (DensityConfig, {"target_recall": 0.0}, "target_recall"),
        (DensityConfig, {"target_recall": float("nan")}, "target_recall"),
        (WeightingConfig, {"k": 0}, "k must"),
        (WeightingConfig, {"k": 33}, "k must"),
        (WeightingConfig, {"gamma": -0.1}, "gamma"),
        (WeightingConfig, {"gamma": float("nan")}, "gamma"),
        (WeightingConfig, {"gamma": float("inf")}, "gamma"),
        (WeightingConfig, {"target_ess": 0.0}, "target_ess"),
        (WeightingConfig, {"target_ess": 1.5}, "target_ess"),
        (WeightingConfig, {"uniform_mix": 1.01}, "uniform_mix"),
        (WeightingConfig, {"target_ess": 0.5, "weighting": "uniform"}, "target_ess"),
        (BuildConfig, {"limit": 0}, "limit"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(kind: type[Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**options)


def test_every_default_and_every_limit_is_allowed() -> None:
    BuildConfig(limit=1)
    EmbeddingConfig(max_tokens=1, batch_tokens=1, window_rows=1, chunk_rows=1, threads=1)
    WeightingConfig(k=32, gamma=0, uniform_mix=1)
    WeightingConfig(k=1, gamma=1024, target_ess=1.0)
    DensityConfig(shards=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 2}, "the engine is local"),
        ({"ray_address": "auto"}, "the engine is local"),
        ({"gpus_per_worker": 0.5}, "the engine is local"),
        ({"engine": "ray", "num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"engine": "ray", "gpus_per_worker": -1.0}, "gpus_per_worker must be above 0"),
        ({"engine": "ray", "gpus_per_worker": float("nan")}, "gpus_per_worker must be above 0"),
        ({"engine": "ray", "ray_address": "ray://head:10001"}, "a Ray address is auto or host:port"),
        ({"devices": ("cuda:0",), "ray_address": "auto"}, "one worker each, on this machine"),
        ({"devices": ("cuda:0", "cuda:1"), "num_workers": 3}, "one worker each, on this machine"),
        ({"devices": ("cuda",)}, "devices must be like cuda:0,cuda:1"),
        ({"devices": ("cuda:0", "cpu")}, "devices must be like cuda:0,cuda:1"),
        ({"devices": ("",)}, "devices must be like cuda:0,cuda:1"),
    ],
)
def test_options_of_the_engine_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_devices_choose_the_device_and_refuse_another() -> None:
    engine = EngineConfig(devices=("cuda:1", "cuda:2"))
    assert engine.is_remote
    assert BuildConfig(engine=engine).for_workers.embedding.device == "cuda:1"
    assert BuildConfig().for_workers.embedding.device is None
    with pytest.raises(ConfigError, match="device cpu contradicts devices cuda:1,cuda:2"):
        BuildConfig(engine=engine, embedding=EmbeddingConfig(device="cpu"))


def test_a_share_above_one_is_refused_with_the_share_that_may_have_been_meant() -> None:
    with pytest.raises(ConfigError, match="share of the rows") as caught:
        WeightingConfig(target_ess=50.0)
    assert caught.value.hint == "0.5 for half"
