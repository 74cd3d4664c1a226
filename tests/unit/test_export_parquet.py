"""The exported table against the store it came from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from embstore import export_store, open_store
from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError, StoreExistsError
from tests.support.stores import build_small, small_lines, write_lines
from tests.unit.test_edges import QUARANTINE

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")

pytestmark = pytest.mark.usefixtures("without_syncs")


def test_one_row_a_prompt_with_weight_density_and_neighbours(finished_store: Path, tmp_path: Path) -> None:
    (path,) = export_store(finished_store, tmp_path / "out", format="parquet")
    store = open_store(finished_store)
    table = pq.read_table(path)
    assert table.column_names == ["id", "text", "weight", "mean_distance", "density", "multiplicity", "neighbors"]
    assert table["id"].to_pylist() == list(store.ids)
    assert table["text"].to_pylist() == [prompt.rendered for prompt in store.prompts]
    np.testing.assert_array_equal(table["weight"].to_numpy(), store.weights)
    np.testing.assert_array_equal(table["multiplicity"].to_numpy(), store.multiplicity)
    k = store.metadata["weighting"]["k"]
    expected = np.asarray(store.neighbor_distances, dtype=np.float64)[:, :k].mean(axis=1)
    np.testing.assert_allclose(table["mean_distance"].to_numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(table["density"].to_numpy(), 1 / np.maximum(expected, 1e-3), rtol=1e-6)
    for row_id, listed in zip(store.ids, table["neighbors"].to_pylist(), strict=True):
        found = store.neighbors(row_id)
        assert [entry["id"] for entry in listed] == list(found.ids)
        assert [entry["distance"] for entry in listed] == [float(distance) for distance in found.distances]


def test_a_row_without_a_vector_has_nulls(tmp_path: Path) -> None:
    config: BuildConfig = QUARANTINE
    lines = [*small_lines()[:20], {"prompt": "FAIL"}]
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "store", config=config)
    (path,) = export_store(tmp_path / "store", tmp_path / "out", format="parquet")
    last = pq.read_table(path).to_pylist()[-1]
    assert (last["weight"], last["mean_distance"], last["density"], last["neighbors"]) == (0.0, None, None, [])


def test_nothing_is_overwritten_and_the_extra_is_named(
    finished_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_store(finished_store, tmp_path, format="parquet")
    with pytest.raises(StoreExistsError, match=r"prompts\.parquet exists already"):
        export_store(finished_store, tmp_path, format="parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow") as caught:
        export_store(finished_store, tmp_path / "other", format="parquet")
    assert "embstore[parquet]" in str(caught.value.hint)
