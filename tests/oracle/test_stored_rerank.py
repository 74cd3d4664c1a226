"""Neighbours ranked by stored rows against float64 brute force over them; what is read, how often, in how much memory."""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.density import NOISE_FLOOR
from embstore.core.errors import CorruptStoreError, StorageError
from embstore.core.events import Event, Observer, StageAdvanced, StageFinished, StageStarted, ignore
from embstore.core.format import decode_neighbors_spec
from embstore.core.interfaces import PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.spec import EmbeddingSpec
from embstore.flow.build import build
from embstore.search.stored_rerank import RESIDUAL_FLOOR, Rerank, StoredRows, rerank_by_stored_rows
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.views.info import inspect
from embstore.views.terminal import print_info
from tests.support.fake import FakeEmbedder, FakeSource
from tests.support.models import make_model, make_prompts, make_tokenizer, save_model
from tests.support.stores import build_small, snapshot, write_lines

K = 5
KEPT = 12
Distances = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class World:
    """Stored rows whose first columns are their coordinates: float16 holds them exactly, so nothing is rounded."""

    rows_NV: NDArray[np.float16]
    rank: int
    first_of_N: NDArray[np.int32]

    @property
    def residual_N(self) -> NDArray[np.float32]:
        return np.linalg.norm(self.rows_NV[:, self.rank :].astype(np.float64), axis=1).astype(np.float32)

    def by_coordinates(self, kept: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """What the search gives: nearest distinct vectors by coordinates, ties by row."""
        distance_NN = all_distances(self.rows_NV[:, : self.rank])
        distance_NN[:, self.first_of_N != np.arange(len(self.first_of_N))] = np.inf
        distance_NN[np.arange(len(distance_NN)), self.first_of_N] = np.inf
        ids_NK = np.full((len(distance_NN), kept), -1, dtype=np.int32)
        distances_NK = np.full((len(distance_NN), kept), np.inf, dtype=np.float32)
        nearest = np.argsort(distance_NN, axis=1, kind="stable")[:, :kept]
        found = np.take_along_axis(distance_NN, nearest, 1)
        ids_NK[:, : nearest.shape[1]] = np.where(np.isfinite(found), nearest, -1)
        distances_NK[:, : nearest.shape[1]] = found
        return ids_NK, distances_NK

    def nearest(self, k: int) -> Distances:
        """The k smallest distances between stored rows of distinct vectors, [N, k]; a copy has those of its first row."""
        distance_NN = all_distances(self.rows_NV)[self.first_of_N]
        distance_NN[:, self.first_of_N != np.arange(len(self.first_of_N))] = np.inf
        distance_NN[np.arange(len(distance_NN)), self.first_of_N] = np.inf
        return np.sort(distance_NN, axis=1)[:, :k]


def all_distances(rows_NV: NDArray[np.floating]) -> Distances:
    rows = rows_NV.astype(np.float64)
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)


def make_world(
    num_rows: int, *, seed: int = 0, spread: float = 0.3, rank: int = 4, columns: int = 24, copies: int = 0
) -> World:
    """Coordinates of about 1 in every direction. Half of the rows leave the basis, by up to ``spread``, mostly less."""
    random = np.random.default_rng(seed)
    rows_NV = random.standard_normal((num_rows, columns))
    off_basis_NV = rows_NV[:, rank:]
    norm_N = spread * random.random(num_rows) ** 3
    norm_N[(norm_N < 2 * RESIDUAL_FLOOR) | (random.random(num_rows) < 0.5)] = 0
    off_basis_NV *= (norm_N / np.linalg.norm(off_basis_NV, axis=1))[:, None]
    first_of_N = np.arange(num_rows, dtype=np.int32)
    for copy in range(copies):
        rows_NV[num_rows - 1 - copy], first_of_N[num_rows - 1 - copy] = rows_NV[copy % 3], copy % 3
    return World(rows_NV=rows_NV.astype(np.float16), rank=rank, first_of_N=first_of_N)


class Reader:
    """Rows of a world as a store gives them; counts how often each chunk is decoded."""

    def __init__(self, rows_NV: NDArray[np.float16], chunk_rows: int = 16) -> None:
        self.rows_NV = rows_NV
        self.decoded = np.zeros(-(-len(rows_NV) // chunk_rows), dtype=int)
        self.stored = StoredRows(read=self.read, dimension=rows_NV.shape[1], chunk_rows=chunk_rows)

    def read(self, rows_B: NDArray[np.int64]) -> NDArray[np.float16]:
        assert (np.diff(rows_B) > 0).all()
        self.decoded[np.unique(rows_B // self.stored.chunk_rows)] += 1
        return self.rows_NV[rows_B]


@dataclasses.dataclass(frozen=True)
class Ranked:
    ids_NK: NDArray[np.int32]
    distances_NK: NDArray[np.float32]
    figures: Rerank


def reranked(
    world: World,
    reader: Reader,
    *,
    threads: int = 2,
    memory_bytes: int = 1 << 20,
    observer: Observer = ignore,
) -> Ranked:
    ids_NK, distances_NK = world.by_coordinates(KEPT)
    figures = rerank_by_stored_rows(
        ids_NK,
        distances_NK,
        world.first_of_N,
        world.residual_N,
        reader.stored,
        k=K,
        threads=threads,
        memory_bytes=memory_bytes,
        observer=observer,
    )
    return Ranked(ids_NK, distances_NK, figures)


def between_rows(world: World, ids_NK: NDArray[np.int32]) -> Distances:
    """Distances from each row's vector to those found, +inf where there is none."""
    distance_NN = all_distances(world.rows_NV)[world.first_of_N]
    return np.where(ids_NK < 0, np.inf, np.take_along_axis(distance_NN, ids_NK.astype(np.int64), 1))


@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.05, 0.3, 1.0, 3.0]),
    copies=st.integers(0, 4),
)
def test_kept_neighbours_are_ranked_as_brute_force_ranks_them(num_rows: int, seed: int, spread: float, copies: int) -> None:
    world = make_world(num_rows, seed=seed, spread=spread, copies=min(copies, num_rows // 2))
    found = reranked(world, Reader(world.rows_NV))
    before_ids, before_distances = world.by_coordinates(KEPT)
    assert np.array_equal(np.sort(found.ids_NK, axis=1), np.sort(before_ids, axis=1))  # the same ones
    expected = between_rows(world, found.ids_NK)
    assert np.allclose(found.distances_NK, expected, rtol=1e-6, atol=1e-7)
    order = np.lexsort((found.ids_NK, expected), axis=1)
    assert np.array_equal(np.where(found.ids_NK < 0, -1, np.take_along_axis(found.ids_NK, order, 1)), found.ids_NK)
    is_off_N = (world.residual_N > RESIDUAL_FLOOR) | (
        (world.residual_N[before_ids] > RESIDUAL_FLOOR) & (before_ids >= 0)
    ).any(1)
    assert np.array_equal(found.distances_NK[~is_off_N], before_distances[~is_off_N])
    assert found.figures.reranked_rows == np.count_nonzero(is_off_N)
    assert found.figures.off_basis_rows == np.count_nonzero(world.residual_N > RESIDUAL_FLOOR)
    nearest = world.nearest(K)
    k = nearest.shape[1]
    is_wrong_N = ~np.isclose(found.distances_NK[:, :k], nearest, rtol=1e-6, atol=1e-7).all(axis=1)
    assert np.count_nonzero(is_wrong_N) <= found.figures.uncertain_rows
    if num_rows - min(copies, num_rows // 2) <= KEPT + 1:  # the search left nothing out
        assert found.figures.uncertain_rows == 0


def test_ranking_by_rows_mends_most_of_what_coordinates_get_wrong() -> None:
    world = make_world(400, spread=1.0)
    found = reranked(world, Reader(world.rows_NV))
    nearest = world.nearest(K)
    wrong_before = (np.sort(between_rows(world, world.by_coordinates(KEPT)[0][:, :K]), axis=1) - nearest > 1e-6).any(axis=1)
    wrong_after = (found.distances_NK[:, :K] - nearest > 1e-6).any(axis=1)
    assert wrong_before.sum() > 40
    assert wrong_after.sum() <= found.figures.uncertain_rows < 30


def test_a_residual_of_rounding_alone_reads_nothing() -> None:
    """An affine head: rows lie in the basis, and float16 moves each by less than the floor."""
    random = np.random.default_rng(0)
    basis_VR = np.linalg.qr(random.standard_normal((320, 12)))[0]
    coord_NR = random.standard_normal((200, 12))
    coord_NR /= np.linalg.norm(coord_NR, axis=1, keepdims=True)
    world = World(rows_NV=coord_NR.astype(np.float32).astype(np.float16), rank=12, first_of_N=np.arange(200, dtype=np.int32))
    before = world.by_coordinates(KEPT)
    residual_N = np.linalg.norm((coord_NR @ basis_VR.T).astype(np.float16) - coord_NR @ basis_VR.T, axis=1)
    assert 1e-4 < residual_N.min() < residual_N.max() < RESIDUAL_FLOOR

    def read(rows_B: NDArray[np.int64]) -> NDArray[np.float16]:
        raise AssertionError("an affine head reads no row")

    after = before[0].copy(), before[1].copy()
    events: list[Event] = []
    figures = rerank_by_stored_rows(
        *after,
        world.first_of_N,
        residual_N.astype(np.float32),
        StoredRows(read=read, dimension=320, chunk_rows=16),
        k=K,
        threads=1,
        memory_bytes=1 << 20,
        observer=events.append,
    )
    assert figures == Rerank(k=K, residual_floor=RESIDUAL_FLOOR, off_basis_rows=0, reranked_rows=0, uncertain_rows=0)
    assert events == []
    assert all(np.array_equal(left, right) for left, right in zip(before, after, strict=True))


def test_rounding_moves_no_unit_row_by_more_than_the_floor() -> None:
    """Every mantissa is as badly rounded as can be, and the worst vocabulary is mostly subnormal."""
    worst = np.full(50_000, (1 + 2.0**-11 - 2.0**-30) * 2.0**-8)
    tail = np.full(1 << 20, 2.0**-14 - 2.0**-25 * 1.001)
    for row_V in (worst, np.concatenate([worst, tail])):
        lost = np.linalg.norm(row_V.astype(np.float16).astype(np.float64) - row_V) / np.linalg.norm(row_V)
        assert 4e-4 < lost < RESIDUAL_FLOOR
    assert NOISE_FLOOR == 2 * RESIDUAL_FLOOR


def test_copies_get_what_their_vector_gets() -> None:
    world = make_world(200, spread=1.0, copies=30)
    found = reranked(world, Reader(world.rows_NV))
    first = world.first_of_N
    assert np.array_equal(found.ids_NK, found.ids_NK[first])
    assert np.array_equal(found.distances_NK, found.distances_NK[first])
    assert (found.ids_NK == first[found.ids_NK]).all()


def test_a_group_leaves_the_basis_if_one_of_its_members_does() -> None:
    """Equal coordinates, other rows: the group is ranked again, by its first row."""
    rows_NV = np.zeros((4, 3), dtype=np.float16)
    rows_NV[:, 0] = [0, 0, 1, 1.25]
    rows_NV[1, 1] = 2
    found = reranked(World(rows_NV=rows_NV, rank=1, first_of_N=np.array([0, 0, 2, 3], dtype=np.int32)), Reader(rows_NV))
    assert found.figures.off_basis_rows == 1
    assert found.figures.reranked_rows == 4  # the group's two rows, and those that have it as a neighbour
    assert found.ids_NK[:2, :2].tolist() == [[2, 3], [2, 3]]
    assert found.distances_NK[:2, :2].tolist() == [[1, 1.25], [1, 1.25]]


def test_memory_and_decoding_stay_bounded_and_change_nothing() -> None:
    world = make_world(1200, spread=1.0, columns=2048, rank=12)
    whole = reranked(world, Reader(world.rows_NV), memory_bytes=1 << 30)
    budget = 3 << 19  # of 5 MiB of rows
    reader = Reader(world.rows_NV)
    ids_NK, distances_NK = world.by_coordinates(KEPT)
    residual_N = world.residual_N
    events: list[Event] = []
    tracemalloc.start()
    try:
        figures = rerank_by_stored_rows(
            ids_NK,
            distances_NK,
            world.first_of_N,
            residual_N,
            reader.stored,
            k=K,
            threads=2,
            memory_bytes=budget,
            observer=events.append,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    beside = 2 * (4 << 20) + 100 * 1200  # slabs of two threads, flags of rows
    assert peak < budget + beside
    held = budget // (2 * 2048 + 2048) - 4 * 16
    assert 3 <= reader.decoded.max() <= -(-1200 // held) + 2
    assert figures == whole.figures
    assert np.array_equal(ids_NK, whole.ids_NK)
    assert np.array_equal(distances_NK, whole.distances_NK)
    started, finished = events[0], events[-1]
    assert isinstance(started, StageStarted)
    assert isinstance(finished, StageFinished)
    assert sum(event.count for event in events if isinstance(event, StageAdvanced)) == started.total > 1000


def test_distances_of_every_float16_value_are_float64s() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    small = every[np.abs(every) < 0.5]  # NaN is not
    rows_NV = np.stack([small, np.random.default_rng(0).permutation(small), np.zeros_like(small), np.full_like(small, 0.25)])
    world = World(rows_NV=rows_NV, rank=1, first_of_N=np.arange(4, dtype=np.int32))
    found = reranked(world, Reader(rows_NV), memory_bytes=1)
    assert np.array_equal(found.distances_NK[:, :3], world.nearest(3).astype(np.float32))


# --- stores -----------------------------------------------------------------------------------------------------------


def test_a_soft_capped_store_is_brute_forces(tmp_path: Path) -> None:
    """A nanochat whose cap bends its logits: rows leave the basis by far more than rounding."""
    model = save_model(tmp_path / "model", make_model("nanochat", logit_std=14.0), make_tokenizer())
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt.text} for prompt in make_prompts(320)])
    embedding = EmbeddingConfig(model=str(model), dtype="float32", device="cpu", threads=1, chunk_rows=32)
    build(prompts, out=tmp_path / "store", config=BuildConfig(embedding=embedding))
    store = open_store(tmp_path / "store")
    assert np.median(store.residuals) > 20 * RESIDUAL_FLOOR
    figures = store.neighbor_spec["rerank"]
    assert figures == store.metadata["neighbors"]["rerank"]
    assert (figures["k"], figures["off_basis_rows"], figures["reranked_rows"], figures["uncertain_rows"]) == (
        10,
        320,
        320,
        0,
    )
    distance_NN = all_distances(np.concatenate([rows for _, rows in store.iter_rows()]))
    by_coordinates_NN = all_distances(np.asarray(store.coordinates))
    np.fill_diagonal(by_coordinates_NN, np.inf)
    nearest = np.argsort(by_coordinates_NN, axis=1)[:, :10]
    by_coordinates = np.sort(np.take_along_axis(distance_NN, nearest, 1), axis=1)
    np.fill_diagonal(distance_NN, np.inf)
    expected = np.sort(distance_NN, axis=1)[:, :10]
    assert np.count_nonzero((by_coordinates - expected > 1e-6).any(axis=1)) >= 10  # what coordinates alone get wrong
    assert store.neighbor_distances[:, :10] == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(store.neighbor_ids[:, :10], np.argsort(distance_NN, axis=1, kind="stable")[:, :10])


class OffBasisSource(FakeSource):
    """Fake rows with a part off the basis, up to half as long as the part in it."""

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        made = super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer)
        return _OffBasisEmbedder(self, made.spec, made.basis_VR)

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: Any) -> FakeEmbedder:
        return _OffBasisEmbedder(self, spec, basis_VR)


class _OffBasisEmbedder(FakeEmbedder):
    def _block(self, prompts: Sequence[Prompt], first_row: int) -> RowBlock:
        block = super()._block(prompts, first_row)
        for local, prompt in enumerate(prompts):
            random = np.random.default_rng(list(prompt.rendered.encode()))
            off_V = random.standard_normal(self.spec.dimension)
            off_V -= self.basis_VR @ (self.basis_VR.T @ off_V)
            off_V *= 0.5 * random.random() / np.linalg.norm(off_V)
            scale = 1 / np.hypot(1, np.linalg.norm(off_V))
            block.coord_BR[local] *= scale
            in_basis_V = self.basis_VR.astype(np.float64) @ block.coord_BR[local]
            block.emb_BV[local] = in_basis_V + scale * off_V
            block.residual_B[local] = np.linalg.norm(block.emb_BV[local] - in_basis_V)
        return block


def test_an_error_while_rows_are_read_publishes_nothing_and_a_resume_finishes(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_chunk, calls = EmbeddingStore.read_chunk, []

    def fail_later(store: EmbeddingStore, index: int) -> NDArray[np.float16]:
        calls.append(index)
        if len(calls) == 4:
            raise OSError("on purpose")
        return read_chunk(store, index)

    build_small(small_prompts, tmp_path / "whole", source=OffBasisSource())
    assert open_store(tmp_path / "whole").neighbor_spec["rerank"]["reranked_rows"] > 50
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "read_chunk", fail_later)
        with pytest.raises(StorageError, match="on purpose"):
            build_small(small_prompts, tmp_path / "store", source=OffBasisSource())
    assert not (tmp_path / "store" / "manifest.json").exists()
    build_small(small_prompts, tmp_path / "store", source=OffBasisSource())
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "whole")


def test_what_was_ranked_again_is_shown_where_rows_leave_the_basis(small_prompts: Path, tmp_path: Path) -> None:
    shown = {}
    for name, source in (("affine", FakeSource()), ("capped", OffBasisSource())):
        build_small(small_prompts, tmp_path / name, source=source)
        console = Console(file=io.StringIO(), width=200)
        print_info(console, inspect(tmp_path / name))
        shown[name] = console.file.getvalue()  # type: ignore[attr-defined]
    figures = open_store(tmp_path / "capped").neighbor_spec["rerank"]
    assert "leave the basis" not in shown["affine"]
    assert f"{figures['reranked_rows']:,} rows leave the basis" in shown["capped"]
    assert open_store(tmp_path / "affine").neighbor_spec["rerank"]["off_basis_rows"] == 0


@pytest.mark.parametrize("part", ["rerank", "refinement"])
def test_a_spec_may_lack_what_was_ranked_again_but_not_misstate_it(part: str, finished_store: Path) -> None:
    """``refinement`` is what stores of b2eabab and before have in its place: they stay readable."""
    spec = dict(open_store(finished_store).neighbor_spec)
    spec["refinement"] = {
        "k": 10,
        "off_basis_rows": 70,
        "certified_share": 0.5,
        "straddling_pairs": 3,
        "read_pairs": 3,
        "uncertain_rows": 0,
        "residual_floor": 5e-4,
    }
    assert decode_neighbors_spec(json.dumps(spec).encode(), name="spec.json") == spec
    spec[part] = {**spec[part], "off_basis_rows": "many"}
    with pytest.raises(CorruptStoreError, match="off_basis_rows"):
        decode_neighbors_spec(json.dumps(spec).encode(), name="spec.json")
    spec[part] = None
    with pytest.raises(CorruptStoreError, match=part):
        decode_neighbors_spec(json.dumps(spec).encode(), name="spec.json")
    del spec[part]
    assert decode_neighbors_spec(json.dumps(spec).encode(), name="spec.json") == spec
