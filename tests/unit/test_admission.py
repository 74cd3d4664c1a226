"""Sizes that are decided before the first row: of chunks and windows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.errors import ConfigError
from embstore.flow.cost import CHUNK_BYTES, fit_rows

WIDTH = 50_304


def fitted(num_rows: int, config: BuildConfig | None = None, *, columns: int = WIDTH) -> tuple[int, int]:
    embedder: Any = SimpleNamespace(
        spec=SimpleNamespace(dimension=columns), max_window_rows=4096, memory_bytes=lambda rows: 16 * rows * columns
    )
    nothing: Any = SimpleNamespace(memory_bytes=lambda rows: 0)
    return fit_rows(config or BuildConfig(embedding=EmbeddingConfig(model="m")), embedder, num_rows, nothing)


@pytest.mark.parametrize("num_rows", [1, 40, 400, 1024, 2560, 2561, 28_000, 10_000_000])
def test_a_small_store_has_smaller_chunks(num_rows: int) -> None:
    chunk_rows, window_rows = fitted(num_rows)
    size, chunks = 2 * WIDTH * chunk_rows, -(-num_rows // chunk_rows)
    assert chunk_rows % 16 == 0
    assert window_rows % chunk_rows == 0
    assert size <= CHUNK_BYTES
    assert chunks >= 8 or size <= 4 << 20
    assert chunks <= 12 or size > CHUNK_BYTES - 16 * 2 * WIDTH - 4096  # and no smaller than that


def test_narrow_rows_share_a_chunk_all_the_same() -> None:
    assert fitted(1000, columns=500)[0] == 1008


def test_a_chosen_chunk_is_taken_as_it_is() -> None:
    config = BuildConfig(embedding=EmbeddingConfig(model="m", chunk_rows=48))
    assert fitted(1024, config)[0] == 48


@pytest.mark.parametrize(
    ("window_rows", "chunk_rows"), [(640, 320), (40, 40), (100, 100), (3200, 320), (1000, 250), (4096, 256)]
)
def test_a_chosen_window_has_a_whole_number_of_chunks(window_rows: int, chunk_rows: int) -> None:
    config = BuildConfig(embedding=EmbeddingConfig(model="m", window_rows=window_rows))
    assert fitted(28_000, config) == (chunk_rows, window_rows)


def test_a_window_of_no_whole_number_of_chunks_is_refused_with_one_that_would_do() -> None:
    with pytest.raises(ConfigError, match="a window of 4001 rows") as caught:
        fitted(28_000, BuildConfig(embedding=EmbeddingConfig(model="m", window_rows=4001)))
    assert caught.value.hint == "give --window-rows 4160, or --chunk-rows as well"
    assert fitted(28_000, BuildConfig(embedding=EmbeddingConfig(model="m", window_rows=4160))) == (320, 4160)


def test_a_window_and_chunks_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="window_rows must be a multiple of chunk_rows, got 40 and 16"):
        EmbeddingConfig(window_rows=40, chunk_rows=16)
