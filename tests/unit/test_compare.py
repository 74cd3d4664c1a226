"""Two weightings beside each other, against scipy and plain arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from embstore import compare, open_store
from embstore.cli import app
from embstore.core.config import WeightingConfig
from embstore.core.diagnostics import rank_correlation
from embstore.core.errors import ConfigError, IncompleteStoreError, StoreNotFoundError
from embstore.flow.artifact import recompute_weights
from tests.support.stores import build_small, small_lines, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")


def test_two_names_of_one_store(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=3, k=5), name="sharp")
    opened = open_store(store)
    left, right = (opened.named_weights(name).astype(np.float64) for name in ("default", "sharp"))
    found = compare(store, f"{store}:sharp")
    assert (found.left.name, found.right.name, found.common) == ("default", "sharp", 70)
    assert found.tv == pytest.approx(np.abs(left - right).sum() / 2, abs=1e-9)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(left, right).statistic, abs=1e-12)
    change = right - left
    ids = np.array(opened.ids)
    assert change[ids == found.rose[0].id] == change.max()
    assert change[ids == found.fell[0].id] == change.min()
    assert found.rose[0].right == pytest.approx(right[ids == found.rose[0].id][0] * 70, rel=1e-5)
    assert len(found.rose) == len(found.fell) == 5
    assert found.left.ess_share > found.right.ess_share
    assert (found.left.alone, found.left.alone_weight) == (0, 0.0)


def test_the_same_weights_have_not_moved(store: Path) -> None:
    found = compare(f"{store}:default", store)
    assert (found.tv, found.rose, found.fell) == (0.0, [], [])
    assert found.spearman == pytest.approx(1.0)


def test_two_stores_are_joined_by_id(store: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"New: {index}"} for index in range(20)] + small_lines()[10:][::-1]
    build_small(write_lines(tmp_path / "other.jsonl", lines), tmp_path / "other")
    found = compare(store, tmp_path / "other")
    left_store, right_store = open_store(store), open_store(tmp_path / "other")
    common = [row_id for row_id in left_store.ids if row_id in right_store.ids]
    assert found.common == len(common)
    assert found.left.alone == 70 - len(common)
    left, right = (
        np.array([opened.weights[opened.row_of(row_id)] for row_id in common], dtype=np.float64)
        for opened in (left_store, right_store)
    )
    assert found.tv == pytest.approx(np.abs(left / left.sum() - right / right.sum()).sum() / 2, abs=1e-9)
    assert found.right.alone_weight == pytest.approx(1 - right.sum(), abs=1e-6)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(left, right).statistic, abs=1e-12)


def test_ids_that_name_other_texts_are_counted(store: Path, tmp_path: Path) -> None:
    lines = [{"id": "given-0", "prompt": "another text"}, {"id": "given-1", "prompt": "With an id 1"}]
    build_small(write_lines(tmp_path / "p.jsonl", lines), tmp_path / "other")
    assert (compare(store, tmp_path / "other").common, compare(store, tmp_path / "other").differing_texts) == (2, 1)


def test_a_side_without_order_has_no_rank_correlation(store: Path) -> None:
    recompute_weights(store, WeightingConfig(weighting="uniform"), name="flat")
    # rows that share a vector share a weight, so uniform over vectors still has an order; one value has none
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None
    assert compare(store, f"{store}:flat").tv > 0


def test_a_folder_with_a_colon_in_its_name(store: Path, tmp_path: Path) -> None:
    colon = Path(shutil.copytree(store, tmp_path / "run:3", symlinks=True))
    assert compare(colon, f"{colon}:default").tv == 0


def test_what_cannot_be_compared(store: Path, unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no weights called 'mine'; it has default"):
        compare(store, f"{store}:mine")
    with pytest.raises(IncompleteStoreError):
        compare(store, unfinished)
    with pytest.raises(StoreNotFoundError):
        compare(tmp_path / "nowhere", store)
    build_small(write_lines(tmp_path / "p.jsonl", [{"prompt": "quite another"}, {"prompt": "pool"}]), tmp_path / "other")
    with pytest.raises(ConfigError, match="no id in common"):
        compare(store, tmp_path / "other")


def test_the_command_prints_both_ways(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=3), name="sharp")
    shown = CliRunner().invoke(app, ["compare", str(store), f"{store}:sharp"])
    assert shown.exit_code == 0
    assert "70 common prompts" in shown.output
    assert "rose" in shown.output
    told = json.loads(CliRunner().invoke(app, ["compare", str(store), f"{store}:sharp", "--count", "2", "--json"]).output)
    assert told["common"] == 70
    assert len(told["fell"]) == 2
