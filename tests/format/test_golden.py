"""A store written by the first release of format version 1, kept in git: every later version must read it the same.

A failure means that stores people have can no longer be read, or read differently. Do not regenerate to make it pass: a
change of the format needs a new version and a new folder. Made with ``python -m tests.format.test_golden`` on an empty
``tests/format/data/v1``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import embstore
from embstore.core.config import WeightingConfig
from embstore.core.errors import IdentityMismatchError
from embstore.core.rows import RowRange
from embstore.training import load_weights
from tests.support.stores import build_small, write_small_prompts

GOLDEN = Path(__file__).parent / "data" / "v1"
ROWS_SHA256 = "8e1dc50c5a94531afb01bb6373d70269b337b80387302e2ab3e5bff43babdd84"
WEIGHTS_SHA256 = "870ed9b72a4033ef0c8851c0ba6fda015f323b2b775203a6f3e6886d08316535"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "store", symlinks=True))


def test_verifies(golden: Path) -> None:
    report = embstore.verify(golden)
    assert report.is_complete
    assert (report.findings, report.notes) == ([], [])


def test_rows_are_the_same_bytes_through_every_reader(golden: Path) -> None:
    store = embstore.open_store(golden)
    rows = store.rows(store.ids)
    assert hashlib.sha256(rows.tobytes()).hexdigest() == ROWS_SHA256
    np.testing.assert_array_equal(zarr.open_array(golden / "embeddings.zarr", mode="r")[:], rows)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(golden / "embeddings.zarr")}}
    np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), rows)


def test_weights_and_prompts_are_the_same(golden: Path) -> None:
    weights = load_weights(golden, expect_len=70)
    assert weights.fingerprint == WEIGHTS_SHA256
    store = embstore.open_store(golden)
    assert store.prompts.read(RowRange(3, 4))[0].text == "Explain number 3."
    assert store.aliases["alias-3"] == 3
    assert int(store.multiplicity[3]) == 3
    assert store.neighbors(store.ids[0]).distances[0] == pytest.approx(float(store.neighbor_distances[0, 0]))


def test_new_weights_can_be_made_of_it(golden: Path) -> None:
    metadata = embstore.recompute_weights(golden, WeightingConfig(target_ess=0.5), name="sharp")
    assert metadata["ess_share"] == pytest.approx(0.5, abs=1e-3)
    assert embstore.verify(golden).findings == []


def test_another_version_is_refused_by_name(golden: Path) -> None:
    manifest = json.loads((golden / "manifest.json").read_text())
    (golden / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(IdentityMismatchError, match=r"format_version.*2.*1"):
        embstore.open_store(golden)


def main() -> None:
    """Write the golden store, and print the digests to put above."""
    prompts = write_small_prompts(GOLDEN.parent / "prompts.jsonl")
    build_small(prompts, GOLDEN)
    prompts.unlink()
    for name in (".lock", "runs.jsonl"):
        (GOLDEN / name).unlink()
    store = embstore.open_store(GOLDEN)
    print(hashlib.sha256(store.rows(store.ids).tobytes()).hexdigest(), load_weights(GOLDEN).fingerprint)


if __name__ == "__main__":
    main()
