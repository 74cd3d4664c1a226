"""``sequences.npy``: rows that were made from the same tokens are one vector, also where their low bits differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import embstore
from embstore.core.config import BuildConfig
from embstore.core.errors import CorruptStoreError
from embstore.core.format import document
from embstore.core.interfaces import RowBlock
from embstore.core.prompts import Prompt
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeEmbedder, FakeSource
from tests.support.forged import journal_of, reseal, write_journal
from tests.support.stores import NUM_ROWS, WINDOWS, build_small, snapshot, with_density, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

Change = Callable[[RowBlock, int], RowBlock]

# of the same tokens, in the first, the second and the third window
SAME = (5, 40, 66)
LINES = [{"prompt": f"same: {row}" if row in SAME else f"Explain number {row}."} for row in range(NUM_ROWS)]


class ChangedSource(FakeSource):
    """A fake source whose blocks pass through ``change``, which is told their first row."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def create(self, *given: Any, **options: Any) -> FakeEmbedder:
        return self._changed(super().create(*given, **options))

    def reopen(self, *given: Any, **options: Any) -> FakeEmbedder:
        return self._changed(super().reopen(*given, **options))

    def _changed(self, embedder: FakeEmbedder) -> FakeEmbedder:
        compute = embedder._block

        def block(prompts: Sequence[Prompt], first_row: int) -> RowBlock:
            return self.change(compute(prompts, first_row), first_row)

        embedder._block = block  # type: ignore[method-assign]
        return embedder


def rounded_otherwise(block: RowBlock, first_row: int) -> RowBlock:
    """The same rows with other low bits in each window, as a GPU gives them in batches of another height."""
    coord_BR = block.coord_BR.copy()
    coord_BR[:, 0] += np.float32(1e-6 * (first_row // 32))
    return dataclasses.replace(block, coord_BR=coord_BR)


def unknown(block: RowBlock, first_row: int) -> RowBlock:
    """An embedder that says nothing of tokens."""
    return dataclasses.replace(rounded_otherwise(block, first_row), sequence_B=None)


def forged(block: RowBlock, first_row: int) -> RowBlock:
    """Row 0 and row 33, of other prompts, have one digest."""
    found = rounded_otherwise(block, first_row)
    assert found.sequence_B is not None
    rows = first_row + np.arange(len(found.sequence_B))
    return dataclasses.replace(found, sequence_B=np.where(np.isin(rows, (0, 33)), np.uint64(99), found.sequence_B))


def built(
    folder: Path, change: Change, *, config: BuildConfig = CONFIG, lines: list[dict[str, str]] = LINES
) -> EmbeddingStore:
    prompts = write_lines(folder.parent / f"{folder.name}.jsonl", lines)
    build_small(prompts, folder, config=config, source=ChangedSource(change))
    return open_store(folder)


def weights_of(store: EmbeddingStore) -> NDArray[np.float64]:
    return np.asarray(store.weights, dtype=np.float64)


@pytest.mark.parametrize("center", [False, True])
def test_prompts_cut_alike_in_three_windows_have_one_weight_together(center: bool, tmp_path: Path) -> None:
    config = with_density(center=center)
    store = built(tmp_path / "store", rounded_otherwise, config=config)
    vectors = [np.asarray(store.coordinates[row]).tobytes() for row in SAME]
    assert len(set(vectors)) == 3, "the low bits differ"
    groups = np.asarray(store.groups)
    assert groups[list(SAME)].tolist() == [SAME[0]] * 3
    assert len(set(groups.tolist())) == NUM_ROWS - 2
    once = built(
        tmp_path / "once",
        rounded_otherwise,
        config=config,
        lines=[LINES[row] for row in range(NUM_ROWS) if row not in SAME[1:]],
    )
    kept = [row for row in range(NUM_ROWS) if row not in SAME]
    weights, alone = weights_of(store), weights_of(once)
    assert weights[list(SAME)].sum() == pytest.approx(alone[SAME[0]], rel=1e-4)
    assert weights[SAME[0]] == weights[SAME[1]] == weights[SAME[2]]
    np.testing.assert_allclose(weights[kept], np.delete(alone, SAME[0]), rtol=1e-4)
    neighbours = np.asarray(store.neighbor_ids)
    assert not np.isin(neighbours, SAME[1:]).any(), "a vector is named by its first row"
    assert not np.isin(neighbours[list(SAME)], SAME).any(), "no row is its own neighbour"
    assert store.metadata["vector_groups"] == {"groups": 1, "rows": 3}
    assert verify(store.root).findings == []


def test_rows_whose_tokens_are_unknown_are_one_vector_only_by_their_bits(tmp_path: Path) -> None:
    store = built(tmp_path / "store", unknown)
    assert not np.asarray(store.sequences).any()
    assert np.asarray(store.groups).tolist() == list(range(NUM_ROWS))


def test_rows_that_are_apart_are_not_one_vector_whatever_their_digests(tmp_path: Path) -> None:
    store, honest = built(tmp_path / "store", forged), built(tmp_path / "honest", rounded_otherwise)
    assert store.sequences is not None
    assert store.sequences[0] == store.sequences[33] == 99
    np.testing.assert_array_equal(store.groups, honest.groups)
    np.testing.assert_array_equal(store.weights, honest.weights)


def test_other_sequences_are_other_neighbours(tmp_path: Path) -> None:
    stores = [built(tmp_path / change.__name__, change) for change in (rounded_otherwise, unknown, forged)]
    assert len({store.published.neighbors for store in stores}) == 3


def test_copied_rows_keep_their_digests(tmp_path: Path) -> None:
    old = built(tmp_path / "old", rounded_otherwise)
    config = dataclasses.replace(CONFIG, reuse=(str(old.root),))
    new = built(tmp_path / "new", rounded_otherwise, config=config, lines=[{"prompt": "new"}, {"prompt": "same: x"}, *LINES])
    assert new.journal.reused
    assert new.sequences is not None
    np.testing.assert_array_equal(new.sequences[2:], np.asarray(old.sequences))
    assert new.sequences[1] == new.sequences[2 + SAME[0]] != new.sequences[0] != 0
    assert np.asarray(new.groups)[[2 + row for row in SAME]].tolist() == [1, 1, 1]


def without_sequences(store: Path) -> Path:
    """The store as a release from before December 2026 left it."""
    (store / "sequences.npy").unlink()
    lines = journal_of(store)
    for line in lines:
        line.pop("sequences_crc32c", None)
    write_journal(store, lines)
    spec = json.loads((store / "spec.json").read_bytes())
    del spec["sequences"]
    (store / "spec.json").write_bytes(document(spec))
    manifest = json.loads((store / "manifest.json").read_bytes())
    del manifest["files"]["sequences.npy"]
    (store / "manifest.json").write_bytes(document(manifest))
    reseal(store)
    return store


def test_rows_copied_from_a_store_without_digests_are_unknown(tmp_path: Path) -> None:
    old = open_store(without_sequences(built(tmp_path / "old", rounded_otherwise).root))
    assert old.sequences is None
    assert verify(old.root).findings == []
    config = dataclasses.replace(CONFIG, reuse=(str(old.root),))
    new = built(tmp_path / "new", rounded_otherwise, config=config, lines=[{"prompt": "same: x"}, *LINES])
    assert new.sequences is not None
    assert new.sequences[0] != 0
    assert not new.sequences[1:].any()
    expected = list(range(NUM_ROWS + 1))
    expected[1 + SAME[0]] = 0  # the same bits: both are of a first window
    assert np.asarray(new.groups).tolist() == expected
    assert verify(new.root).findings == []


def test_a_search_of_a_store_without_digests_goes_by_bits(tmp_path: Path) -> None:
    root = without_sequences(built(tmp_path / "old", rounded_otherwise).root)
    build_small(None, root, config=with_density(seed=5))
    store = open_store(root)
    assert np.asarray(store.groups).tolist() == list(range(NUM_ROWS))
    assert "sequences.npy" not in store.published.files
    assert verify(root).findings == []


def test_an_imported_array_has_no_tokens(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    rows[30] = rows[3]
    np.save(tmp_path / "rows.npy", rows)
    embstore.import_array(tmp_path / "rows.npy", out=tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert np.array_equal(np.asarray(store.sequences), np.zeros(40, dtype=np.uint64))
    assert store.groups[30] == 3


# --- stores that disagree with themselves -----------------------------------------------------------------------------


def test_a_manifest_that_does_not_list_what_the_spec_asks_for_is_refused(tmp_path: Path) -> None:
    root = built(tmp_path / "store", rounded_otherwise).root
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["files"]["sequences.npy"]
    (root / "manifest.json").write_bytes(document(manifest))
    with pytest.raises(CorruptStoreError, match=r"does not list sequences\.npy, which spec\.json asks for"):
        open_store(root)
    assert [(found.path, found.window) for found in verify(root).findings] == [("manifest.json", None)]
    reference = snapshot(built(tmp_path / "again", rounded_otherwise).root)
    verify(root, repair=True)
    source = ChangedSource(rounded_otherwise)
    build_small(None, root, source=source)
    assert source.calls == []
    assert snapshot(root) == reference


def test_a_window_that_does_not_say_which_sequences_it_committed_is_made_again(tmp_path: Path) -> None:
    root = built(tmp_path / "store", rounded_otherwise).root
    reference = snapshot(root)
    lines = journal_of(root)
    next(line for line in lines if line.get("window") == 1)["sequences_crc32c"] = None
    write_journal(root, lines)
    assert {(found.path, found.window) for found in verify(root, repair=True).findings} == {("sequences.npy", 1)}
    source = ChangedSource(rounded_otherwise)
    build_small(None, root, source=source)
    assert source.calls == [WINDOWS[1]]
    assert snapshot(root) == reference
