"""Edge shapes and edge values: every row through the writer and back through every reader, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.errors import EmbstoreError, ExitCode, PromptError, RowError
from embstore.core.events import Observer
from embstore.core.format import chunk_name
from embstore.core.interfaces import PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.spec import EmbeddingSpec
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.training import DensitySampler, load_weights
from embstore.views.export import export_store
from embstore.views.info import inspect, verify
from tests.support.build_fake import CONFIG
from tests.support.fake import DIMENSION, RANK, FakeEmbedder, FakeSource
from tests.support.stores import NUM_ROWS, WINDOWS, build_small, snapshot, with_embedding, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

K = CONFIG.weighting.k
QUARANTINE = dataclasses.replace(CONFIG, on_error="quarantine")
# the smallest subnormal, the largest, the smallest normal, the largest finite value of float16, and both zeros
EDGES = np.array([0x0001, 0x03FF, 0x0400, 0x7BFF, 0x0000, 0x8000], dtype="<u2").view("<f2")


class ValueSource(FakeSource):
    """A fake source whose rows are changed by ``change(emb_BV, coord_BR, first_row)`` before they are handed over."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.change = change

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        made = super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer)
        return _ValueEmbedder(self, made.spec, made.basis_VR)

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: Any) -> FakeEmbedder:
        self.reopenings += 1
        return _ValueEmbedder(self, spec, basis_VR)


class _ValueEmbedder(FakeEmbedder):
    def _block(self, prompts: Sequence[Prompt], first_row: int) -> RowBlock:
        block = super()._block(prompts, first_row)
        self._source.change(block.emb_BV, block.coord_BR, first_row)  # type: ignore[attr-defined]
        return block


def _prompts(path: Path, count: int) -> Path:
    return write_lines(path, [{"prompt": f"Explain number {index}."} for index in range(count)])


def _expected(store: EmbeddingStore) -> NDArray[np.float16]:
    """All rows as the plain fake embedder gives them."""
    embedder = FakeSource().reopen(store.spec.embedding, np.load(store.root / "basis.npy"))
    prompts = store.prompts.sample(range(store.num_rows))
    blocks = embedder.embed(prompts, first_row=0, chunk_rows=16, check=lambda: None)
    return np.concatenate([block.emb_BV for block in blocks])


def _readers(store: EmbeddingStore) -> dict[str, NDArray[np.float16]]:
    """All rows through every reader there is."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.root / 'embeddings.zarr'}/"}}
    found = {
        "rows by id": store.rows(store.ids),
        "rows by chunk": np.concatenate([block for _, block in store.iter_rows()]),
        "zarr": np.asarray(store.embeddings[:]),
        "zarr, row by row": np.stack([np.asarray(store.embeddings[row]) for row in range(store.num_rows)]),
        "zarr, opened anew": np.asarray(zarr.open_array(store.root / "embeddings.zarr", mode="r")[:]),
        "tensorstore": np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result()),
    }
    if store.spec.compressor == "none":
        shape = (store.spec.chunk_rows, store.spec.embedding.dimension)
        chunks = -(-store.num_rows // store.spec.chunk_rows)
        mapped = [np.memmap(store.root / chunk_name(index), "<f2", "r", shape=shape) for index in range(chunks)]
        found["memory map"] = np.concatenate(mapped)[: store.num_rows]
    return found


def _refuse_wrong_bytes(store: EmbeddingStore, expected: NDArray[np.float16]) -> None:
    for reader, rows in _readers(store).items():
        assert rows.dtype == np.float16, reader
        assert rows.shape == expected.shape, reader
        assert rows.tobytes() == expected.tobytes(), reader


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_no_rows_are_refused(tmp_path: Path) -> None:
    for number, lines in enumerate(([], [b"\n"], [b"no JSON\n"], [{"prompt": "   "}])):
        prompts = write_lines(tmp_path / f"{number}.jsonl", lines)
        with pytest.raises(PromptError, match="no prompts in") as caught:
            build_small(prompts, tmp_path / f"store-{number}")
        assert caught.value.exit_code == ExitCode.ERROR
        with pytest.raises(EmbstoreError):
            open_store(tmp_path / f"store-{number}", partial=True)
        # the same folder takes the mended file
        build_small(_prompts(tmp_path / "mended.jsonl", 3), tmp_path / f"store-{number}")
        assert verify(tmp_path / f"store-{number}").findings == []


@pytest.mark.parametrize("compressor", ["lz4", "none"])
@pytest.mark.parametrize(
    ("num_rows", "chunk_rows", "window_rows"),
    [
        (1, 16, 32),
        (2, 16, 32),
        (K, 16, 32),
        (K + 1, 16, 32),
        (K + 2, 16, 32),
        (15, 16, 16),
        (16, 16, 16),
        (17, 16, 16),
        (31, 16, 32),
        (32, 16, 32),
        (33, 16, 32),
        (5, 64, 64),
        (5, 64, 128),
        (7, 1, 1),
        (7, 1, 3),
        (7, 3, 6),
    ],
)
def test_a_store_of_any_shape_is_read_back_bit_for_bit(
    num_rows: int, chunk_rows: int, window_rows: int, compressor: str, tmp_path: Path
) -> None:
    config = with_embedding(chunk_rows=chunk_rows, window_rows=window_rows, compressor=compressor)
    prompts = _prompts(tmp_path / "prompts.jsonl", num_rows)
    source = FakeSource()
    report = build_small(prompts, tmp_path / "store", config=config, source=source)
    assert (report.num_rows, report.embedded_rows) == (num_rows, num_rows)
    assert source.calls == [(start, min(start + window_rows, num_rows)) for start in range(0, num_rows, window_rows)]
    store = open_store(tmp_path / "store")
    _refuse_wrong_bytes(store, _expected(store))
    assert len(list((store.root / "embeddings.zarr").glob("c.*"))) == -(-num_rows // chunk_rows)
    last = np.asarray(store.read_chunk((num_rows - 1) // chunk_rows))
    assert len(last) == num_rows - (num_rows - 1) // chunk_rows * chunk_rows, "padding is no row"
    weights = load_weights(store.root, expect_len=num_rows)
    assert weights.array.sum(dtype=np.float64) == pytest.approx(1)
    drawn = DensitySampler(weights, positional=True).plan(0)
    assert len(drawn) == num_rows
    assert set(drawn.tolist()) <= set(range(num_rows))
    for row in range(num_rows):
        found = store.neighbors(store.ids[row])
        assert len(found.rows) == min(num_rows - 1, 32)
        assert row not in found.rows
    assert inspect(store.root).committed_rows == num_rows
    assert (verify(store.root).findings, verify(store.root).notes) == ([], [])
    assert np.load(export_store(store.root, tmp_path / "out", format="npy")[0]).shape == (num_rows, DIMENSION)
    before = snapshot(store.root)
    build_small(None, store.root, config=config)
    assert snapshot(store.root) == before


def test_one_vector_shared_by_all_rows_gives_even_weights(tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"same: {index}"} for index in range(20)])
    build_small(prompts, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert set(np.asarray(store.groups)) == {0}
    np.testing.assert_allclose(store.weights, 1 / 20, rtol=1e-6)
    assert verify(store.root).findings == []


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["lz4", "none"])
def test_zeros_of_both_signs_and_subnormals_keep_every_bit(compressor: str, small_prompts: Path, tmp_path: Path) -> None:
    """Rows of unit norm in which every other column is at an edge of what float16 can hold."""
    small = EDGES[[0, 1, 2, 4, 5]]

    def edge(emb_BV: NDArray[np.float16], coord_BR: NDArray[np.float32], first_row: int) -> None:
        emb_BV[:] = np.resize(np.concatenate([small, -small]), DIMENSION)
        emb_BV[np.arange(len(emb_BV)), (first_row + np.arange(len(emb_BV))) % DIMENSION] = 1

    build_small(small_prompts, tmp_path / "store", source=ValueSource(edge), config=with_embedding(compressor=compressor))
    store = open_store(tmp_path / "store")
    expected = np.empty((NUM_ROWS, DIMENSION), dtype="<f2")
    edge(expected, np.empty((0, RANK), dtype=np.float32), 0)
    assert {0x0001, 0x03FF, 0x0400, 0x0000, 0x8000, 0x8001} <= set(expected.view("<u2").ravel().tolist())
    _refuse_wrong_bytes(store, expected)
    assert verify(store.root).findings == []
    restored = np.load(export_store(store.root, tmp_path / "out", format="npy")[0])
    assert restored.dtype == np.float32
    assert (restored.astype("<f2").view("<u2") == expected[store.line_rows[store.line_rows >= 0]].view("<u2")).all()


@pytest.mark.parametrize("compressor", ["lz4", "none"])
def test_the_largest_finite_value_keeps_every_bit_and_is_no_unit_row(
    compressor: str, small_prompts: Path, tmp_path: Path
) -> None:
    """The store keeps what it is given; that no row of a model looks like this is for verify to say."""

    def largest(emb_BV: NDArray[np.float16], coord_BR: NDArray[np.float32], first_row: int) -> None:
        emb_BV[:] = np.resize(EDGES, DIMENSION)
        emb_BV[1::2] *= -1

    build_small(small_prompts, tmp_path / "store", source=ValueSource(largest), config=with_embedding(compressor=compressor))
    store = open_store(tmp_path / "store")
    expected = np.empty((NUM_ROWS, DIMENSION), dtype="<f2")
    for start, stop in [(start, min(start + 16, NUM_ROWS)) for start in range(0, NUM_ROWS, 16)]:
        largest(expected[start:stop], np.empty((0, RANK), dtype=np.float32), start)
    assert np.isfinite(expected).all()
    assert {0x7BFF, 0xFBFF} <= set(expected.view("<u2").ravel().tolist())
    _refuse_wrong_bytes(store, expected)
    assert {finding.path for finding in verify(store.root).findings} == {chunk_name(index) for index in range(5)}


def _spoil(value: float, where: str) -> ValueSource:
    """A source that puts ``value`` into row 40 without saying that the row failed."""

    def change(emb_BV: NDArray[np.float16], coord_BR: NDArray[np.float32], first_row: int) -> None:
        if first_row == 32:
            (emb_BV if where == "row" else coord_BR)[8, 3] = value
            if where == "whole row":
                emb_BV[8] = coord_BR[8] = value

    return ValueSource(change)


@pytest.mark.parametrize("where", ["row", "coordinates", "whole row"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [CONFIG, QUARANTINE], ids=["stop", "quarantine"])
def test_a_value_that_is_not_finite_and_not_on_record_is_refused_or_found(
    config: BuildConfig, value: float, where: str, small_prompts: Path, tmp_path: Path
) -> None:
    try:
        build_small(small_prompts, tmp_path / "store", source=_spoil(value, where), config=config)
    except EmbstoreError:
        assert not (tmp_path / "store" / "manifest.json").exists()
        return
    findings = verify(tmp_path / "store").findings
    assert any("40" in finding.message for finding in findings) or {finding.window for finding in findings} == {1}


@pytest.mark.parametrize("compressor", ["lz4", "none"])
def test_failed_rows_are_nan_for_every_reader_and_nothing_else_is(compressor: str, tmp_path: Path) -> None:
    failed = [0, 15, 16, 31, 32, 69]
    lines = [{"prompt": f"FAIL {row}" if row in failed else f"Explain number {row}."} for row in range(NUM_ROWS)]
    config = dataclasses.replace(with_embedding(compressor=compressor), on_error="quarantine")
    build_small(write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "store", config=config)
    store = open_store(tmp_path / "store")
    assert [row.row for row in store.journal.failed] == failed
    for reader, rows in _readers(store).items():
        assert np.flatnonzero(np.isnan(rows).any(axis=1)).tolist() == failed, reader
        assert np.isnan(rows[failed]).all(), reader
    for array in (store.coordinates.sum(axis=1), store.residuals):
        assert np.flatnonzero(np.isnan(array)).tolist() == failed
    assert (store.neighbor_ids[failed] == -1).all()
    assert np.isposinf(store.neighbor_distances[failed]).all()
    assert np.flatnonzero(np.asarray(store.weights) == 0).tolist() == failed
    assert set(DensitySampler(load_weights(store.root), positional=True).plan(0)).isdisjoint(failed)
    assert (verify(store.root).findings, inspect(store.root).failed_rows) == ([], len(failed))


def test_a_nan_row_of_which_the_journal_knows_nothing_is_found(tmp_path: Path) -> None:
    """The same bytes, one line apart: a row that failed is sound, a row that is NaN is damage."""
    lines = [{"prompt": f"FAIL {row}" if row == 40 else f"Explain number {row}."} for row in range(NUM_ROWS)]
    build_small(write_lines(tmp_path / "failed.jsonl", lines), tmp_path / "failed", config=QUARANTINE)
    assert verify(tmp_path / "failed").findings == []
    source = _spoil(np.nan, "whole row")
    try:
        build_small(_prompts(tmp_path / "sound.jsonl", NUM_ROWS), tmp_path / "silent", source=source, config=QUARANTINE)
    except EmbstoreError:
        return
    assert chunk_name(2) in {finding.path for finding in verify(tmp_path / "silent").findings}


@pytest.mark.parametrize("num_rows", [1, 2, 20])
def test_a_store_of_failed_rows_only_publishes_no_weights_for_training(num_rows: int, tmp_path: Path) -> None:
    """There is nothing to draw: that is an error, or weights that no sampler takes, but never a plausible draw."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"FAIL {row}"} for row in range(num_rows)])
    try:
        build_small(prompts, tmp_path / "store", config=QUARANTINE)
    except EmbstoreError as error:
        assert not (tmp_path / "store" / "manifest.json").exists()
        assert error.hint  # noqa: PT017 - both ends are right
    else:
        with pytest.raises(EmbstoreError):
            DensitySampler(load_weights(tmp_path / "store"), positional=True)


def test_a_row_that_fails_stops_the_build_and_a_resume_may_quarantine_it(tmp_path: Path) -> None:
    lines = [{"prompt": f"prompt {row}" if row != 40 else "FAIL"} for row in range(NUM_ROWS)]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    with pytest.raises(RowError, match=r"\(row 40\) failed: the text says so") as caught:
        build_small(prompts, tmp_path / "store")
    assert "--on-error quarantine" in str(caught.value.hint)
    assert not (tmp_path / "store" / "embeddings.zarr" / "c.2.0").exists(), "nothing of its chunk is written"
    source = FakeSource()
    build_small(prompts, tmp_path / "store", config=QUARANTINE, source=source)
    assert source.calls == WINDOWS[1:]
    build_small(prompts, tmp_path / "whole", config=QUARANTINE)
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "whole")
