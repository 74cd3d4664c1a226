"""Sizes that are decided before the first row: of chunks and windows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from embstore.core.config import BuildConfig, EmbeddingConfig
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
