"""A build killed at any system call, torn or nested, is finished by the next one: the same bytes, no committed row again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embstore.storage.store import open_store
from tests.support.fake import FakeSource
from tests.support.faults import Killed, SystemCalls
from tests.support.stores import NUM_ROWS, WINDOWS, Acknowledged, build_small, snapshot

MOST_POINTS = 250


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A store's path whose files go as soon as the test ends: hundreds of builds would fill a disk."""
    yield tmp_path / "store"
    shutil.rmtree(tmp_path, ignore_errors=True)


def _kill(prompts: Path, store: Path, call: int, *, torn: bool = False) -> tuple[bool, list[tuple[int, int]], SystemCalls]:
    """One run that dies at system call ``call``: whether it died, and the windows it acknowledged."""
    acknowledged = Acknowledged()
    calls = SystemCalls(root=store, fail_at=call, torn=torn)
    with calls.watching():
        try:
            build_small(prompts, store, observer=acknowledged)
        except Killed:
            return True, acknowledged.windows, calls
    return False, acknowledged.windows, calls


def _finish(prompts: Path, store: Path, reference: dict[str, str], acknowledged: list[tuple[int, int]]) -> FakeSource:
    """Resume to the end and compare with the uninterrupted build."""
    source = FakeSource()
    with SystemCalls(root=store).watching():
        build_small(prompts, store, source=source)
    assert snapshot(store) == reference
    assert not set(source.calls) & set(acknowledged)
    return source


@pytest.fixture(scope="module")
def reference(finished_store: Path) -> dict[str, str]:
    return snapshot(finished_store)


@pytest.fixture(scope="module")
def num_calls(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    _, _, calls = _kill(small_prompts, tmp_path_factory.mktemp("count") / "store", 0)
    assert {"write", "pwrite", "fsync", "fdatasync", "rename", "open", "symlink", "mkdir"} <= {call.name for call in calls.calls}
    return len(calls.calls)


def _every_point(small_prompts: Path, folder: Path, reference: dict[str, str], points: range) -> None:
    for point in points:
        died, acknowledged, _ = _kill(small_prompts, folder, point)
        assert died, f"there is no call {point}"
        source = _finish(small_prompts, folder, reference, acknowledged)
        assert len(source.calls) >= len(WINDOWS) - len(acknowledged) - 1, "at most the window in flight is done twice"
        shutil.rmtree(folder)


def test_a_kill_at_any_system_call_is_resumed_to_the_same_bytes(
    small_prompts: Path, folder: Path, reference: dict[str, str], num_calls: int
) -> None:
    stride = -(-num_calls // MOST_POINTS)
    _every_point(small_prompts, folder, reference, range(1, num_calls + 1, stride))
