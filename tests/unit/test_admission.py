"""Sizes that are decided before the first row: of chunks and windows."""

from __future__ import annotations

import re
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


def hinted(hint: str | None) -> list[EmbeddingConfig]:
    """The configs that a hint proposes: each group of options in it."""
    found = [dict(re.findall(r"--(window|chunk)-rows (\d+)", part)) for part in str(hint).split(",")]
    return [EmbeddingConfig(**{f"{name}_rows": int(rows) for name, rows in each.items()}) for each in found if each]


@pytest.mark.parametrize("window_rows", [4001, 4099, 2 * 1009, 1021, 331, 10_007, 257])
def test_a_window_that_no_chunks_divide_is_refused_before_anything_is_read(window_rows: int) -> None:
    with pytest.raises(ConfigError, match=f"a window of {window_rows} rows") as caught:
        EmbeddingConfig(window_rows=window_rows)
    proposed = hinted(caught.value.hint)
    assert len(proposed) == 2
    for embedding in proposed:
        assert embedding.window_rows is not None
        assert abs(embedding.window_rows - window_rows) <= 128
        for columns in (8, 500, WIDTH, 262_144):
            chunk_rows, taken = fitted(28_000, BuildConfig(embedding=embedding), columns=columns)
            assert taken == embedding.window_rows
            assert taken % chunk_rows == 0


@pytest.mark.parametrize(("window_rows", "chunk_rows"), [(40, 16), (100, 33), (16, 48), (4096, 100)])
def test_a_window_and_chunks_that_do_not_fit_are_refused_before_anything_is_read(window_rows: int, chunk_rows: int) -> None:
    says = f"window_rows must be a multiple of chunk_rows, got {window_rows} and {chunk_rows}"
    with pytest.raises(ConfigError, match=says) as caught:
        EmbeddingConfig(window_rows=window_rows, chunk_rows=chunk_rows)
    (proposed,) = hinted(caught.value.hint)
    assert proposed.chunk_rows == chunk_rows


@pytest.mark.parametrize("columns", [8, 500, 4096, WIDTH, 262_144])
def test_every_window_that_is_taken_has_chunks_of_a_useful_size(columns: int) -> None:
    usual, _ = fitted(28_000, columns=columns)
    for window_rows in (1, 7, 16, 17, 48, 127, 250, 251, 256, 1000, 1024, 3000, 4096, 8192):
        config = BuildConfig(embedding=EmbeddingConfig(window_rows=window_rows), memory_budget_bytes=1 << 40)
        chunk_rows, taken = fitted(28_000, config, columns=columns)
        assert taken == window_rows
        assert taken % chunk_rows == 0
        assert chunk_rows >= min(window_rows, usual // 8)
        assert chunk_rows <= max(usual, 256)
