"""Readers and training while a writer replaces weights and neighbours: the old set or the new, never a mixture."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import CorruptStoreError, IncompleteStoreError
from embstore.flow.artifact import recompute_weights
from embstore.flow.stored_weights import drop_weights, list_weights
from embstore.storage.reader import open_store
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.stores import build_small, with_density
from tests.support.tally import Counter


@pytest.mark.parametrize("replacements", [40, pytest.param(1000, marks=pytest.mark.faults)])
def test_readers_see_the_old_set_or_the_new_while_it_is_replaced(
    replacements: int, store: Path, without_syncs: None, tally: Counter
) -> None:
    command = [sys.executable, "-m", "tests.support.reader", str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for turn in itertools.count():
            # on a busy machine the reader gets less of a turn
            if turn >= replacements and (_sets_seen(store) > 3 or turn >= 50 * replacements):
                break
            if turn % 5 == 4:  # another graph now and then, the weights with it
                build_small(None, store, config=with_density(seed=turn))
            elif turn % 10 == 8:  # what was replaced stays until it is dropped
                drop_weights(store, [each.name for each in list_weights(store) if each.name != "default"])
            else:
                recompute_weights(store, WeightingConfig(gamma=1 + turn % 7))
        output, _ = reader.communicate()
    assert reader.returncode == 0, "a reader was killed, by SIGBUS perhaps"
    found = json.loads(output)
    tally("weights or neighbours replaced under a reader", cycles=replacements, losses=len(found["errors"]))
    assert found["errors"] == []
    assert len(found["seen"]) > 3, "the reader slept through the replacements"


def _sets_seen(store: Path) -> int:
    found = store.with_name("seen")
    return len(found.read_text().splitlines()) if found.exists() else 0


def test_an_open_store_serves_its_own_set_after_it_was_replaced(store: Path) -> None:
    opened, loaded = open_store(store), load_weights(store)
    weights, metadata, neighbors = np.array(opened.weights), opened.metadata, np.array(opened.neighbor_ids)
    recompute_weights(store, WeightingConfig(gamma=5))
    build_small(None, store, config=with_density(seed=9))
    drop_weights(store, [each.name for each in list_weights(store) if each.name != "default"])
    assert not loaded.path.exists(), "what nothing lists is deleted"
    assert np.array_equal(opened.weights, weights)
    assert np.array_equal(loaded.array, weights)
    assert opened.metadata == metadata
    assert np.array_equal(opened.neighbor_ids, neighbors)
    assert open_store(store).metadata != metadata


def test_a_listed_file_that_is_really_gone_is_damage(store: Path) -> None:
    load_weights(store).path.unlink()
    for reader in (load_weights, open_store):
        with pytest.raises(CorruptStoreError, match=r"weights/.*npy"):
            reader(store)
    assert next(finding.message for finding in verify(store).findings if finding.path.startswith("weights/")) == "is missing"


def test_a_store_that_a_repair_took_back_is_unfinished_not_damaged(store: Path) -> None:
    (store / "chunks.json").write_bytes(b"{}")
    verify(store, repair=True)
    for reader in (load_weights, open_store):
        with pytest.raises(IncompleteStoreError, match="not finished"):
            reader(store)


# --- weightings under other names -------------------------------------------------------------------------------------


def test_a_repair_keeps_sound_weightings_under_other_names(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=3), name="steep")
    recompute_weights(store, WeightingConfig(uniform_mix=0.5), name="mild")
    steep, mild = load_weights(store, name="steep"), load_weights(store, name="mild")
    before = (store / "manifest.json").read_bytes()
    chunk = store / "embeddings.zarr" / "c.2.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    verify(store, repair=True)
    build_small(None, store)
    assert verify(store).findings == []
    assert verify(store).notes == []
    assert (store / "manifest.json").read_bytes() == before
    for name, whole in (("steep", steep), ("mild", mild)):
        assert np.array_equal(load_weights(store, name=name).array, whole.array)


def test_a_repair_drops_only_the_weighting_that_is_damaged(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=3), name="steep")
    recompute_weights(store, WeightingConfig(uniform_mix=0.5), name="mild")
    path = load_weights(store, name="steep").path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert path.name in {Path(finding.path).name for finding in verify(store, repair=True).findings}
    build_small(None, store)
    assert verify(store).findings == []
    assert sorted(open_store(store).manifest.names) == ["default", "mild"]  # type: ignore[union-attr]
    recompute_weights(store, WeightingConfig(gamma=3), name="steep")
    load_weights(store, name="steep")
