"""``--center`` against float64 numpy and scikit-learn: directions from the mean row, of copies and failed rows too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from embstore import build, open_store
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, WeightingConfig
from embstore.core.density import NOISE_FLOOR
from embstore.core.diagnostics import total_variation
from embstore.search.directions import directions_from_mean
from tests.support.fake import FakeSource


def cone(count: int, *, rank: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows that share one direction, as rows of logits do."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, rank)) * 0.05
    rows[:, 0] += 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def expected_directions(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    distinct = np.unique(rows.astype(np.float64), axis=0)
    difference = rows.astype(np.float64) - distinct.mean(axis=0)
    return difference / np.linalg.norm(difference, axis=1, keepdims=True)


def test_rows_become_directions_from_the_mean_of_distinct_rows(tmp_path: Path) -> None:
    rows = cone(3000)
    rows[700:900] = rows[3]
    failed = np.zeros(3000, dtype=np.bool_)
    failed[[5, 2999]] = True
    rows[failed] = np.nan
    found = directions_from_mean(rows, failed, tmp_path)
    assert np.isnan(found.coord_NR[failed]).all()
    np.testing.assert_allclose(found.coord_NR[~failed], expected_directions(rows[~failed]), atol=2e-7)
    assert (found.coord_NR[700:900] == found.coord_NR[3]).all()  # bit-equal, so still one node
    distinct = np.unique(rows[~failed].astype(np.float64), axis=0)
    spread = np.sqrt(np.square(distinct - distinct.mean(axis=0)).sum(axis=1).mean())
    assert found.stretch == pytest.approx(1 / spread, rel=1e-6)


def test_a_row_at_the_mean_has_no_direction(tmp_path: Path) -> None:
    rows = np.array([[1, 0.1], [1, -0.1], [1, 0], [1, NOISE_FLOOR / 2]], dtype=np.float32)
    found = directions_from_mean(rows, np.zeros(4, dtype=np.bool_), tmp_path).coord_NR
    assert (found[2:] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[:2], axis=1), 1, atol=1e-7)


def test_rows_that_are_all_one_and_rows_that_all_failed_have_no_directions(tmp_path: Path) -> None:
    same = directions_from_mean(np.ones((5, 3), dtype=np.float32), np.zeros(5, dtype=np.bool_), tmp_path)
    assert (same.coord_NR == 0).all()
    assert np.isfinite(same.stretch)
    none = directions_from_mean(np.full((5, 3), np.nan, dtype=np.float32), np.ones(5, dtype=np.bool_), tmp_path)
    assert np.isnan(none.coord_NR).all()


def test_a_centred_build_has_the_neighbours_and_weights_of_centred_rows(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"prompt {index}" for index in range(300)] + ["same: a", "same: b", "FAIL here"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def built(center: bool) -> Path:
        store = tmp_path / f"store {center}"
        config = BuildConfig(
            embedding=EmbeddingConfig(model="fake"),
            density=DensityConfig(knn="exact", center=center),
            weighting=WeightingConfig(gamma=2.0, max_ratio=None),
            on_error="quarantine",
        )
        build(prompts, out=store, config=config, source=FakeSource())
        return store

    store, plain = open_store(built(center=True)), open_store(built(center=False))
    valid = np.asarray(store.groups) >= 0
    directions = expected_directions(store.coordinates[valid])
    distinct, inverse, counts = np.unique(directions.round(6), axis=0, return_inverse=True, return_counts=True)
    assert counts.max() == 2
    distances = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(distinct).kneighbors()[0].mean(axis=1)
    np.testing.assert_allclose(np.mean(store.neighbor_distances[valid, :10], axis=1), distances[inverse], rtol=1e-4)
    expected = (distances**2 / counts)[inverse]
    np.testing.assert_allclose(store.weights[valid], expected / expected.sum(), rtol=1e-3)
    assert store.metadata["neighbors"]["center"] is True
    assert plain.metadata["neighbors"]["center"] is False
    assert plain.metadata["noise_floor"] == NOISE_FLOOR
    coordinates = np.unique(plain.coordinates[valid].astype(np.float64), axis=0)
    spread = np.sqrt(np.square(coordinates - coordinates.mean(axis=0)).sum(axis=1).mean())
    assert store.metadata["noise_floor"] == pytest.approx(NOISE_FLOOR / spread, rel=1e-5)
    assert total_variation(store.weights, plain.weights) > 1e-3
    # rows are the same: only the search was another
    assert (plain.root / "coordinates.npy").read_bytes() == (store.root / "coordinates.npy").read_bytes()


def test_another_centring_redoes_the_search_and_no_row(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {index}"}) + "\n" for index in range(80)))
    source = FakeSource()
    digests = []
    for center in (False, True, True):
        config = BuildConfig(embedding=EmbeddingConfig(model="fake"), density=DensityConfig(knn="exact", center=center))
        build(prompts, out=tmp_path / "store", config=config, resume=True, source=source)
        manifest = open_store(tmp_path / "store").manifest
        assert manifest is not None
        digests.append(manifest.neighbors)
    assert len(source.calls) == 3  # three windows, once
    assert digests[0] != digests[1] == digests[2]
