"""What inspect tells of a store, against its arrays; and of a store that is not finished."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import ConfigError, EmbstoreError, IncompleteStoreError
from embstore.flow.artifact import recompute_weights
from embstore.storage.reader import open_store
from embstore.views.info import StoreInfo, inspect, neighbors_of
from tests.support.build_fake import CONFIG
from tests.support.faults import Killed, SystemCalls
from tests.support.stores import NUM_ROWS, build_small, with_weighting, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")


def test_a_finished_store_is_described_by_what_it_holds(finished_store: Path) -> None:
    info, store = inspect(finished_store), open_store(finished_store)
    assert (info.is_complete, info.stage) == (True, "complete")
    assert (info.committed_rows, info.total_rows, info.committed_windows, info.total_windows) == (70, 70, 3, 3)
    assert (info.lines, info.quarantined_lines, info.repeated_lines, info.failed_rows) == (73, 1, 2, 0)
    assert info.stored_bytes == sum(path.stat().st_size for path in (finished_store / "embeddings.zarr").glob("c.*"))
    assert info.metadata == store.metadata
    assert info.spec is not None
    assert info.spec["model"]["name"] == "fake"


def test_metadata_statistics_are_those_of_the_arrays(finished_store: Path) -> None:
    store = open_store(finished_store)
    weights = np.asarray(store.weights, dtype=np.float64)
    found = store.metadata
    expected = {"min": weights.min(), "max": weights.max(), "mean": weights.mean(), "std": weights.std()}
    for name, value in expected.items():
        assert found[f"weights_{name}"] == pytest.approx(value, rel=1e-12)
    assert (found["n_prompts"], found["n_items"], found["embedding_dim"]) == store.embeddings.shape[
        :1
    ] * 2 + store.embeddings.shape[1:]
    assert (found["embedding_dtype"], found["weights_dtype"], found["normalization"]) == ("float16", "float32", "l2")
    assert found["ess"] == pytest.approx(1 / np.square(weights / weights.sum()).sum())
    assert found["ess_share"] == pytest.approx(found["ess"] / NUM_ROWS)
    assert found["max_over_mean"] == pytest.approx(weights.max() * NUM_ROWS)
    assert found["tv_to_uniform"] == pytest.approx(np.abs(weights - 1 / NUM_ROWS).sum() / 2, abs=1e-7)
    assert found["vector_groups"] == {"groups": 1, "rows": 3}
    mean_distance = np.asarray(store.neighbor_distances, dtype=np.float64)[:, :10].mean(axis=1)
    assert found["mean_distance"]["median"] == pytest.approx(np.median(mean_distance))
    assert found["residual"]["max"] == pytest.approx(float(store.residuals.max()))
    assert found["direction"] == "distance up, density down, weight up"


def test_the_histogram_counts_every_row_once_in_units_of_the_mean(finished_store: Path) -> None:
    info, store = inspect(finished_store), open_store(finished_store)
    relative = np.asarray(store.weights, dtype=np.float64) * NUM_ROWS
    inside = ((relative >= info.histogram_edges[0]) & (relative <= info.histogram_edges[-1])).sum()
    assert sum(info.weights_histogram) == inside >= 0.98 * NUM_ROWS
    assert len(info.histogram_edges) == len(info.weights_histogram) + 1


def test_the_rarest_and_the_most_crowded_are_the_ends_of_the_distances(finished_store: Path) -> None:
    info, store = inspect(finished_store, count=4), open_store(finished_store)
    distances = np.asarray(store.neighbor_distances, dtype=np.float64)[:, :10].mean(axis=1)
    assert [item.mean_distance for item in info.rarest] == sorted(distances, reverse=True)[:4]
    assert [item.mean_distance for item in info.most_crowded] == sorted(distances)[:4]
    for item in (*info.rarest, *info.most_crowded):
        assert item.id == store.ids[item.row]
        assert item.text == store.prompts.sample([item.row])[0].rendered
        assert item.weight == pytest.approx(float(store.weights[item.row]) * NUM_ROWS)
        assert item.multiplicity == store.multiplicity[item.row]


def test_shares_by_a_field_add_up_to_one(finished_store: Path) -> None:
    store = open_store(finished_store)
    shares = {share.value: share for share in inspect(finished_store, by="src").shares}
    assert {value: share.rows for value, share in shares.items()} == {"a": 30, "b": 30, "chat": 4, "(none)": 6}
    assert sum(share.weight_share for share in shares.values()) == pytest.approx(1, abs=1e-6)
    assert shares["a"].weight_share == pytest.approx(float(np.asarray(store.weights)[0:60:2].sum()), rel=1e-6)
    assert shares["chat"].row_share == pytest.approx(4 / 70)
    weight_shares = [share.weight_share for share in inspect(finished_store, by="src").shares]
    assert weight_shares == sorted(weight_shares, reverse=True)
    with pytest.raises(EmbstoreError, match="no prompt has a field 'colour'"):
        inspect(finished_store, by="colour")


def test_named_weights_are_described_by_name(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=4, k=2), name="sharp")
    sharp, default = inspect(store, name="sharp"), inspect(store)
    assert sharp.metadata is not None
    assert sharp.metadata["weighting"]["gamma"] == 4
    assert sharp.weights_histogram != default.weights_histogram
    assert default.metadata == inspect(store).metadata != sharp.metadata
    with pytest.raises(ConfigError, match="has no weights called 'blunt'"):
        inspect(store, name="blunt")


def test_every_stage_of_a_build_can_be_inspected(small_prompts: Path, tmp_path: Path) -> None:
    """Cut short at any system call, a store still says how far it is, and never further than it was."""
    with SystemCalls(root=tmp_path / "whole").watching() as whole:
        build_small(small_prompts, tmp_path / "whole")
    seen: list[StoreInfo] = []
    for point in range(12, len(whole.calls), 6):  # before, there is no journal
        store = tmp_path / "store"
        with SystemCalls(root=store, fail_at=point).watching(), pytest.raises(Killed):
            build_small(small_prompts, store)
        seen.append(inspect(store))
        shutil.rmtree(store)
    stages = list(dict.fromkeys(info.stage for info in seen))
    assert stages == ["empty", "prompts committed", "embedding", "rows committed, weights missing", "complete"]
    assert [info.committed_rows for info in seen] == sorted(info.committed_rows for info in seen)
    assert {info.committed_rows for info in seen} == {0, 32, 64, 70}
    for info in seen:
        assert info.is_complete == (info.stage == "complete") == (info.metadata is not None)
        assert (info.spec is not None) == (info.total_windows == 3)


def test_neighbours_of_an_unfinished_store_are_not_there(partial_store: Path) -> None:
    with pytest.raises(IncompleteStoreError):
        neighbors_of(partial_store, "given-0")


def test_a_long_prompt_is_shown_in_one_line(tmp_path: Path) -> None:
    lines = [{"prompt": f"{index} line\n" + "word \t" * 500} for index in range(12)]
    build_small(write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "store", config=with_weighting(k=3))
    for item in inspect(tmp_path / "store").rarest:
        assert len(item.text) == 100
        assert "\n" not in item.text
        assert item.text.endswith("…")


def test_a_store_of_one_row_and_one_of_failed_rows_are_described(tmp_path: Path) -> None:
    build_small(write_lines(tmp_path / "one.jsonl", [{"prompt": "alone"}]), tmp_path / "one")
    info = inspect(tmp_path / "one")
    assert (info.is_complete, info.rarest) == (True, [])
    assert info.metadata is not None
    assert "fewer than k + 1" in info.metadata["warnings"][0]
    assert np.asarray(open_store(tmp_path / "one").weights).tolist() == [1.0]
    prompts = write_lines(tmp_path / "bad.jsonl", [{"prompt": "FAIL"}, {"prompt": "FAIL 2"}])
    with pytest.raises(ConfigError, match="every prompt failed"):
        build_small(prompts, tmp_path / "bad", config=dataclasses.replace(CONFIG, on_error="quarantine"))
    assert inspect(tmp_path / "bad").failed_rows == 2


def test_looking_writes_nothing_and_needs_no_model(partial_store: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in partial_store.rglob("*")}
    inspect(partial_store)
    open_store(partial_store, partial=True).rows([])
    assert {path: path.stat().st_mtime_ns for path in partial_store.rglob("*")} == before
