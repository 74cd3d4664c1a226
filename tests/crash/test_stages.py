"""An exception in any stage leaves no manifest, no temp file and no lock; the same command finishes the store."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import IncompleteStoreError, StoreNotFoundError
from embstore.flow.artifact import recompute_weights
from embstore.storage.reader import open_store
from embstore.training import load_weights
from embstore.views.info import inspect, verify
from tests.support.build_fake import CONFIG_HNSW
from tests.support.stores import build_small, snapshot
from tests.support.tally import Counter

# one function of each stage, in the order of the flow
STAGES = {
    "stage 0": "embstore.flow.stage0.ingest",
    "stage 0, writing": "embstore.storage.ingest._write_files",
    "probing the model": "tests.support.fake.FakeSource.create",
    "preflight": "embstore.flow.admission.check_fits",
    "preallocating": "embstore.storage.writer.preallocate",
    "reading prompts": "embstore.storage.prompt_table.PromptTable.read",
    "embedding": "tests.support.fake.FakeEmbedder._coordinates",
    "encoding a chunk": "embstore.storage.chunk_writer.encode_chunk",
    "writing rows": "embstore.storage.writer.StoreWriter._write_rows",
    "building a graph": "embstore.search.node_search.hnsw_candidates",
    "audit": "embstore.search.graph.sample_nodes",
    "writing neighbours": "embstore.flow.build.write_neighbors",
    "weights": "embstore.flow.artifact.sampling_weights",
    "writing weights": "embstore.flow.build.write_weights",
    "sealing": "embstore.storage.writer.StoreWriter.seal_rows",
    "publishing": "embstore.storage.writer.StoreWriter.publish",
}
FAULTS = (RuntimeError, MemoryError, KeyboardInterrupt)


@contextlib.contextmanager
def _failing(target: str, fault: type[BaseException]) -> Iterator[None]:
    """The function ``target`` raises ``fault``, and so must what is called meanwhile."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise fault("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(fault, match="on purpose"):
            yield


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_in_a_stage_publishes_nothing_and_a_resume_finishes(
    stage: str, small_prompts: Path, tmp_path: Path, without_syncs: None, tally: Counter
) -> None:
    whole = tmp_path / "whole"
    build_small(small_prompts, whole, config=CONFIG_HNSW)
    for fault in FAULTS:
        store = tmp_path / fault.__name__
        with _failing(STAGES[stage], fault):
            build_small(small_prompts, store, config=CONFIG_HNSW)
        assert not (store / "manifest.json").exists()
        assert not list(store.rglob("*.tmp"))
        assert not inspect(store).is_complete
        report = verify(store)
        assert (report.is_complete, report.findings) == (False, [])
        for reader in (load_weights, open_store):
            with pytest.raises((IncompleteStoreError, StoreNotFoundError)):
                reader(store)
        build_small(small_prompts, store, config=CONFIG_HNSW)
        assert snapshot(store) == snapshot(whole)
        tally("exception in a stage")


@pytest.mark.parametrize("stage", ["weights", "publishing"])
def test_an_exception_while_weights_are_replaced_leaves_the_old_ones(
    stage: str, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    store = Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))
    with _failing(STAGES[stage], RuntimeError):
        recompute_weights(store, WeightingConfig(gamma=3))
    assert load_weights(store).fingerprint == load_weights(finished_store).fingerprint
    assert verify(store).findings == []
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)
    tally("exception in a stage")
