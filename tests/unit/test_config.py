"""Options are checked where they enter, and sizes are read as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from embstore.core.config import (
    BuildConfig,
    DensityConfig,
    EmbeddingConfig,
    EngineConfig,
    WeightingConfig,
    format_bytes,
    parse_bytes,
)
from embstore.core.errors import ConfigError, ExitCode


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1048576", 1 << 20),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        (" 500 MB ", 500_000_000),
        ("0.5KiB", 512),
        ("3 tb", 3 * 10**12),
        ("7b", 7),
        ("0", 0),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 GiB extra", "1,5GB", "1e9", "2 XB", "nan", "0x10", "٣ GiB x"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
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
        ({"devices": ("cuda",)}, "devices are cuda:0,cuda:1 and so on"),
        ({"devices": ("cuda:0", "cpu")}, "devices are cuda:0,cuda:1 and so on"),
        ({"devices": ("",)}, "devices are cuda:0,cuda:1 and so on"),
    ],
)
def test_options_of_the_engine_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_devices_choose_the_device_and_refuse_another() -> None:
    engine = EngineConfig(devices=("cuda:1", "cuda:2"))
    assert engine.is_remote
    assert BuildConfig(engine=engine).for_workers.embedding.device == "cuda:1"
    assert BuildConfig().for_workers.embedding.device is None
    with pytest.raises(ConfigError, match="device cpu is not of the kind of devices cuda:1,cuda:2"):
        BuildConfig(engine=engine, embedding=EmbeddingConfig(device="cpu"))
