"""``embeddings.npy`` in a store's folder: known to verify, described by ``embeddings_metadata.json``, needed by nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.format import MANIFEST, METADATA_LINK, ROWS_COPY, WEIGHTS_LINK
from embstore.flow.artifact import recompute_weights
from embstore.storage.reader import open_store
from embstore.storage.rows_copy import copy_problem, write_copy
from embstore.storage.writer import StoreWriter
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.fake import DIMENSION
from tests.support.stores import NUM_ROWS, build_small, snapshot

pytestmark = pytest.mark.usefixtures("without_syncs")


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> Path:
    """A store with a copy of its rows."""
    root = shutil.copytree(finished_store, tmp_path / "store", symlinks=True)
    add_copy(root)
    return root


def add_copy(root: Path) -> None:
    with StoreWriter(root, resume=True) as writer:
        opened = open_store(root)
        write_copy(opened)
        writer.refresh_links(opened.published)


def check_undamaged(root: Path, *notes: str) -> None:
    report = verify(root)
    assert report.findings == []
    assert len(report.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(report.notes, notes, strict=True))


def described(root: Path) -> Any:
    assert not (root / METADATA_LINK).is_symlink()
    return json.loads((root / METADATA_LINK).read_bytes())


def test_the_copy_has_the_rows_and_its_description_the_originals_words(store: Path, finished_store: Path) -> None:
    opened = open_store(store)
    rows_NV = np.load(store / ROWS_COPY, allow_pickle=False)
    assert (rows_NV.dtype, rows_NV.shape) == (np.float32, (NUM_ROWS, DIMENSION))
    np.testing.assert_array_equal(rows_NV, np.asarray(opened.embeddings[:]).astype(np.float32))
    found = described(store)
    assert (found["embedding_dtype"], found["normalization"]) == ("float32", "L2 unit vectors")
    # everything else is what the store says, in its order, and the store says what it said before
    assert {**found, "embedding_dtype": "float16", "normalization": "l2"} == dict(opened.metadata)
    assert list(found) == list(opened.metadata)
    assert (store / MANIFEST).read_bytes() == (finished_store / MANIFEST).read_bytes()
    assert load_weights(store).metadata == load_weights(finished_store).metadata
    check_undamaged(store)


def test_new_default_weights_are_described_beside_the_copy(store: Path) -> None:
    recompute_weights(store, WeightingConfig(k=3))
    check_undamaged(store)
    assert described(store)["weighting"]["k"] == 3
    assert described(store)["weights_max"] == float(np.load(store / WEIGHTS_LINK).max())
    build_small(None, store)  # whoever opens the store for writing leaves it so
    assert described(store)["weighting"]["k"] == 10
    check_undamaged(store)


def test_a_deleted_copy_is_missed_by_nothing(store: Path, finished_store: Path) -> None:
    (store / ROWS_COPY).unlink()
    check_undamaged(store)
    build_small(None, store)
    assert (store / METADATA_LINK).is_symlink()
    assert snapshot(store) == snapshot(finished_store)


def test_a_link_beside_the_copy_is_no_damage_and_the_next_writer_replaces_it(store: Path) -> None:
    """What a kill between the two files leaves."""
    (store / METADATA_LINK).unlink()
    (store / METADATA_LINK).symlink_to(f"weights/{open_store(store).published.names['default']}.json")
    check_undamaged(store)
    build_small(None, store)
    assert described(store)["embedding_dtype"] == "float32"


@pytest.mark.parametrize("row", [0, 41, NUM_ROWS - 1])
def test_a_copy_of_other_rows_is_a_note(store: Path, row: int) -> None:
    rows_NV = np.load(store / ROWS_COPY, mmap_mode="r+")
    rows_NV[row, -1] += np.float32(2.0**-20)
    rows_NV.flush()
    assert copy_problem(open_store(store)) == f"differs from the rows of this store in row {row}"
    check_undamaged(store, f"{ROWS_COPY} differs from the rows of this store in row {row}; the store does not need")
    assert verify(store, repair=True).findings == []
    assert open_store(store).is_complete


def test_a_failed_row_is_the_same_in_the_copy(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": "FAIL" if row == 20 else f"prompt {row}"}) + "\n" for row in range(40)))
    build_small(lines, tmp_path / "store", config=dataclasses.replace(CONFIG, on_error="quarantine"))
    add_copy(tmp_path / "store")
    assert np.isnan(np.load(tmp_path / "store" / ROWS_COPY)[20]).all()
    check_undamaged(tmp_path / "store")


@pytest.mark.parametrize(
    "array", [np.zeros((NUM_ROWS, DIMENSION + 1), np.float32), np.zeros((NUM_ROWS, DIMENSION)), np.zeros(3, np.float32)]
)
def test_another_array_of_that_name_is_a_stray(finished_store: Path, tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    root = shutil.copytree(finished_store, tmp_path / "store", symlinks=True)
    np.save(root / ROWS_COPY, array)
    check_undamaged(root, f"{ROWS_COPY} is not a file of this store")
    build_small(None, root)
    assert (root / METADATA_LINK).is_symlink()


def test_a_link_of_that_name_is_a_stray_and_not_followed(store: Path, tmp_path: Path) -> None:
    (store / ROWS_COPY).rename(tmp_path / "elsewhere.npy")
    (store / ROWS_COPY).symlink_to(tmp_path / "elsewhere.npy")
    check_undamaged(store, f"{ROWS_COPY} is not a file of this store")


def test_a_description_of_something_else_is_damage(store: Path) -> None:
    changed = {**described(store), "weights_max": 0.5}
    (store / METADATA_LINK).write_text(json.dumps(changed, indent=2) + "\n")
    assert [finding.path for finding in verify(store).findings] == [METADATA_LINK]
    build_small(None, store)
    check_undamaged(store)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_manifest_is_found_beside_the_copy(store: Path, keep: int) -> None:
    content = (store / MANIFEST).read_bytes()
    (store / MANIFEST).unlink()
    (store / MANIFEST).write_bytes(content[:keep])
    report = verify(store)
    assert [finding.path for finding in report.findings] == [MANIFEST]
    assert not any(ROWS_COPY in note for note in report.notes)


def test_a_damaged_chunk_is_damage_whatever_the_copy_holds(store: Path) -> None:
    chunk = store / "embeddings.zarr" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    assert {finding.path for finding in verify(store, repair=True).findings} == {"embeddings.zarr/c.1.0"}
    assert (store / ROWS_COPY).exists()
    build_small(None, store)
    check_undamaged(store)
