"""Writers of a finished store, killed at any system call: readers see the old artefact or the new one, at every instant."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.format import chunk_name
from embstore.flow.artifact import recompute_weights
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.faults import SYNCS, Killed, SystemCalls
from tests.support.stores import build_small, snapshot, with_density

Action = Callable[[Path], object]


def _new_weights(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=3))


def _new_density(store: Path) -> None:
    build_small(None, store, config=with_density(seed=7))


def _damaged(finished_store: Path, target: Path) -> Path:
    store = Path(shutil.copytree(finished_store, target, symlinks=True))
    path = store / chunk_name(2)
    path.write_bytes(path.read_bytes()[:-1])
    return store


def _killed_at(action: Action, store: Path, point: int) -> SystemCalls:
    with SystemCalls(root=store, fail_at=point).watching() as calls, contextlib.suppress(Killed):
        action(store)
    return calls


def _points(action: Action, store: Path) -> list[int]:
    """Kill points that differ in what they leave; ``store`` is used up."""
    calls = _killed_at(action, store, 0).calls
    points = [point for point, call in enumerate(calls, start=1) if call.name not in SYNCS]
    assert len(points) > 5
    return points


@pytest.mark.parametrize("action", [_new_weights, _new_density], ids=["weights", "density"])
def test_training_maps_the_old_weights_or_the_new_at_every_instant(
    action: Action, finished_store: Path, tmp_path: Path
) -> None:
    new_store = Path(shutil.copytree(finished_store, tmp_path / "new", symlinks=True))
    points = _points(action, new_store)
    old, new = load_weights(finished_store), load_weights(new_store)
    assert old.fingerprint != new.fingerprint or old.path.name != new.path.name
    seen = set()
    for point in points:
        store = Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))
        assert _killed_at(action, store, point).is_dead
        found = load_weights(store)  # validates digest, length and sum
        assert found.path.name in (old.path.name, new.path.name)
        assert np.array_equal(found.array, (old if found.path.name == old.path.name else new).array)
        seen.add(found.path.name)
        action(store)
        assert snapshot(store) == snapshot(new_store), f"killed at call {point}"
        assert verify(store).findings == []
        assert verify(store).notes == []
        shutil.rmtree(store)
    assert seen == {old.path.name, new.path.name}


def test_a_writer_that_died_before_its_flip_is_undone_by_the_next(finished_store: Path, tmp_path: Path) -> None:
    """Half-made files of the dead writer are swept, also when the next one wants nothing of them."""
    reference = snapshot(finished_store)
    store = Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))
    with SystemCalls(root=store).watching() as calls:
        _new_weights(store)
    flip = next(point for point, call in enumerate(calls.calls, start=1) if call.path == "manifest.json")
    for point in range(1, flip + 1):
        shutil.rmtree(store)
        shutil.copytree(finished_store, store, symlinks=True)
        assert _killed_at(_new_weights, store, point).is_dead
        build_small(None, store)
        assert snapshot(store) == reference


def test_a_repair_killed_at_any_system_call_is_done_by_the_next(finished_store: Path, tmp_path: Path) -> None:
    def repair(store: Path) -> None:
        verify(store, repair=True)

    reference = snapshot(finished_store)
    for point in _points(repair, _damaged(finished_store, tmp_path / "count")):
        store = _damaged(finished_store, tmp_path / "store")
        assert _killed_at(repair, store, point).is_dead
        if (store / "manifest.json").exists():
            repair(store)
        build_small(None, store)
        assert snapshot(store) == reference, f"killed at call {point}"
        shutil.rmtree(store)
