"""Stores whose coordinates come from a map of the head's inputs: which file they have, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import CorruptStoreError
from embstore.core.events import Event, Observer, Preflight
from embstore.core.interfaces import PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.records import SpecRecord
from embstore.core.spec import EmbeddingSpec
from embstore.flow.build import build
from embstore.storage.reader import open_store
from embstore.storage.verify import verify_store
from tests.support.build_fake import CONFIG
from tests.support.fake import DIMENSION, FakeEmbedder, FakeSource
from tests.support.forged import reseal_manifest
from tests.support.stores import build_small, journal_records, snapshot, write_small_prompts

MAP_ROWS = DIMENSION + 40  # inputs of a head with more of them than columns


class MapEmbedder(FakeEmbedder):
    """Rows of the fake embedder, from the first rows of a longer array."""

    def _block(self, prompts: Sequence[Prompt], first_row: int) -> RowBlock:
        return FakeEmbedder(self._source, self.spec, self.basis_VR[:DIMENSION])._block(prompts, first_row)


class MapSource(FakeSource):
    """The fake source with an affine head's map."""

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        made = super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer)
        map_MR = np.zeros((MAP_ROWS, made.spec.rank), dtype=np.float32)
        map_MR[:DIMENSION] = made.basis_VR
        return MapEmbedder(self, dataclasses.replace(made.spec, basis="gram"), map_MR)

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **settings: object) -> FakeEmbedder:
        assert basis_VR.shape == (MAP_ROWS, spec.rank)
        self.reopenings += 1
        return MapEmbedder(self, spec, basis_VR)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_small_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def store(prompts: Path, tmp_path: Path) -> Path:
    build_small(prompts, tmp_path / "store", source=MapSource())
    return tmp_path / "store"


def test_the_map_is_in_the_manifest_and_no_basis_is_made(store: Path) -> None:
    assert not (store / "basis.npy").exists()
    opened = open_store(store)
    assert opened.spec.embedding.basis == "gram"
    record = next(each for each in journal_records(store) if isinstance(each, SpecRecord))
    assert record.files["coordinate_map.npy"].sha256 == opened.spec.basis_sha256
    assert opened.published.files["coordinate_map.npy"].sha256 == opened.spec.basis_sha256
    report = verify_store(store)
    assert (report.findings, report.notes) == ([], [])


def test_a_resume_and_a_reuse_take_the_map(store: Path, prompts: Path, tmp_path: Path) -> None:
    source = MapSource()
    (store / "manifest.json").unlink()
    (store / "embeddings.zarr" / "c.4.0").unlink()  # the last window is computed again
    build_small(prompts, store, source=source)
    assert source.reopenings == 1
    fresh = tmp_path / "fresh"
    build_small(prompts, fresh, source=MapSource())
    assert snapshot(store) == snapshot(fresh)
    build(prompts, out=tmp_path / "reusing", config=dataclasses.replace(CONFIG, reuse=(str(store),)), source=MapSource())
    assert open_store(tmp_path / "reusing").spec.basis_sha256 == open_store(store).spec.basis_sha256
    assert verify_store(tmp_path / "reusing").findings == []


def test_a_damaged_map_is_found_and_only_a_new_build_helps(store: Path) -> None:
    content = bytearray((store / "coordinate_map.npy").read_bytes())
    content[-1] ^= 1
    (store / "coordinate_map.npy").write_bytes(content)
    finding = next(each for each in verify_store(store).findings if each.path == "coordinate_map.npy")
    assert "it cannot be recomputed" in finding.message


def test_a_basis_beside_the_map_is_a_stray(store: Path) -> None:
    (store / "basis.npy").write_bytes(b"")
    assert verify_store(store).notes == ["basis.npy is not a file of this store"]


@pytest.mark.parametrize(("made_by", "said"), [(FakeSource, "gram"), (MapSource, "head")])
def test_a_spec_that_asks_for_the_other_file_is_refused(
    made_by: type[FakeSource], said: str, prompts: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build_small(prompts, store, source=made_by())
    spec = json.loads((store / "spec.json").read_bytes())
    spec["embedding"]["basis"] = said
    (store / "spec.json").write_text(json.dumps(spec))
    reseal_manifest(store)
    wanted = "coordinate_map.npy" if said == "gram" else "basis.npy"
    with pytest.raises(CorruptStoreError, match=rf"manifest\.json does not list {wanted}, which spec\.json asks for"):
        open_store(store)


def test_a_manifest_with_both_files_is_refused(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    manifest["files"]["basis.npy"] = manifest["files"]["coordinate_map.npy"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptStoreError, match=r"lists 'basis\.npy', which is not a file of this store"):
        open_store(store)


def test_the_preflight_counts_a_basis_or_map_until_it_is_written(prompts: Path, tmp_path: Path) -> None:
    planned: list[int] = []

    def observer(event: Event) -> None:
        if isinstance(event, Preflight):
            planned.append(event.remaining_bytes)
            raise KeyboardInterrupt

    for source in (FakeSource(), MapSource()):
        with pytest.raises(KeyboardInterrupt):
            build_small(prompts, tmp_path / type(source).__name__, source=source, observer=observer)
    assert planned[1] - planned[0] == 4 * (MAP_ROWS - DIMENSION) * source.rank
