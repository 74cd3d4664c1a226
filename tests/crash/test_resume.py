"""A build killed at any system call, torn or nested, is finished by the next one: the same bytes, no committed row again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from embstore.core.errors import IncompleteStoreError
from embstore.storage.journal import read_journal
from embstore.storage.reader import open_store
from tests.support.fake import FakeSource
from tests.support.faults import SYNC_DATA, SYNCS, Call, Killed, SystemCalls
from tests.support.stores import NUM_ROWS, WINDOWS, Acknowledged, build_small, snapshot
from tests.support.tally import Counter

Windows = list[tuple[int, int]]


def _run(
    prompts: Path, store: Path, *, kill_at: int = 0, torn: bool = False
) -> tuple[bool, FakeSource, Windows, list[Call]]:
    """One run in process: whether it was killed, its source, the windows it acknowledged, and its system calls."""
    acknowledged, source = Acknowledged(), FakeSource()
    given = prompts if read_journal(store).prompts is None else None  # to compare them again is another test's business
    with SystemCalls(root=store, fail_at=kill_at, torn=torn).watching() as calls:
        try:
            build_small(given, store, source=source, observer=acknowledged)
        except Killed:
            return True, source, acknowledged.windows, calls.calls
    return False, source, acknowledged.windows, calls.calls


@pytest.fixture(scope="module")
def reference(finished_store: Path) -> dict[str, str]:
    return snapshot(finished_store)


@pytest.fixture(scope="module")
def calls(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """Every system call of an uninterrupted build."""
    return _run(small_prompts, tmp_path_factory.mktemp("count") / "store")[3]


def _kill_and_resume(
    points: Iterable[int], prompts: Path, folder: Path, reference: dict[str, str], tally: Counter, *, torn: bool = False
) -> None:
    for point in points:
        loss = _loss(point, prompts, folder / "store", reference, torn=torn)
        tally("write torn by a kill, in process" if torn else "kill at any call, in process", losses=loss is not None)
        assert loss is None, f"killed at call {point}: {loss}"
        shutil.rmtree(folder / "store")


def _loss(point: int, prompts: Path, store: Path, reference: dict[str, str], *, torn: bool) -> str | None:
    """What a kill at one call costs, None if nothing."""
    killed, first, acknowledged, _ = _run(prompts, store, kill_at=point, torn=torn)
    assert killed, f"there is no call {point}"
    _, second, _, _ = _run(prompts, store)
    if snapshot(store) != reference:
        return "other bytes"
    if read_journal(store).committed_rows != NUM_ROWS:
        return "the journal cannot be read again"
    if set(second.calls) & set(acknowledged):
        return "an acknowledged window was computed again"
    if len(set(second.calls) & set(first.calls)) > 1 or set(first.calls) | set(second.calls) != set(WINDOWS):
        return "not only the window in flight was done twice"
    return None


def test_a_build_makes_every_kind_of_call_that_can_be_interrupted(calls: list[Call]) -> None:
    seen = {call.name for call in calls}
    assert seen >= {"open", "write", "pwrite", "fsync", SYNC_DATA, "rename", "symlink", "mkdir", "ftruncate", "unlink"}


def test_a_kill_at_any_system_call_is_resumed_to_the_same_bytes(
    small_prompts: Path, tmp_path: Path, reference: dict[str, str], calls: list[Call], tally: Counter
) -> None:
    # a sync changes no file, so a kill at it leaves what a kill at the next call leaves; power cuts have their own tests
    points = [point for point, call in enumerate(calls, start=1) if call.name not in SYNCS]
    assert len(points) <= 250
    _kill_and_resume(points, small_prompts, tmp_path, reference, tally)


def test_a_write_torn_by_a_kill_is_never_taken_for_a_commit(
    small_prompts: Path, tmp_path: Path, reference: dict[str, str], calls: list[Call], tally: Counter
) -> None:
    # files that are published by a rename cannot be torn in place; these are written where they lie
    in_place = ("journal.jsonl", "coordinates.npy", "residuals.npy", "sequences.npy", ".lock")
    points = [
        point for point, call in enumerate(calls, start=1) if call.name in ("write", "pwrite") and call.path in in_place
    ]
    assert len(points) == 1 + 5 + 3 + 3 + 3  # lock, five records, one slice a window in each row file
    _kill_and_resume(points, small_prompts, tmp_path, reference, tally, torn=True)


FIRST_CALLS = 30  # of a recovery: the journal, what is left over, row files, and the first chunks


def _die_again_and_again(
    prompts: Path, folder: Path, reference: dict[str, str], tally: Counter, *, first: int, second: int, depth: int
) -> str | None:
    """Killed at call ``first``, the resume at call ``second``, the next ones at drawn calls; then the bytes are the same.

    ``folder`` holds "once", the store after the first kill. What is lost, None if nothing is.
    """
    chance = random.Random(f"{first} {second}")
    store = Path(shutil.copytree(folder / "once", folder / "store", symlinks=True))
    acknowledged = {(window.start, window.stop) for window in read_journal(store).windows.values()}
    loss = None
    for level in range(2, depth + 2):
        point = second if level == 2 else chance.randint(1, chance.choice([12, FIRST_CALLS, 100])) if level <= depth else 0
        killed, source, now, _ = _run(prompts, store, kill_at=point, torn=chance.random() < 0.5)
        if set(source.calls) & acknowledged:
            loss = f"killed at {first}, then at {second}: an acknowledged window was computed again"
        acknowledged |= set(now)
    if not killed and snapshot(store) != reference:
        loss = f"killed at {first}, then at {second}: other bytes"
    tally(f"crash during recovery, {('', '', 'two', 'three', 'four', 'five')[depth]} deep", losses=loss is not None)
    shutil.rmtree(store)
    return loss


def _nested(
    firsts: Iterable[int],
    prompts: Path,
    folder: Path,
    reference: dict[str, str],
    tally: Counter,
    *,
    seconds: range,
    depths: tuple[int, ...],
) -> list[str]:
    losses = []
    for first in firsts:
        assert _run(prompts, folder / "once", kill_at=first, torn=first % 2 == 0)[0]
        for second in seconds:
            for depth in depths:
                loss = _die_again_and_again(prompts, folder, reference, tally, first=first, second=second, depth=depth)
                losses += [loss] if loss else []
        shutil.rmtree(folder / "once")
    return losses


def test_a_crash_during_the_recovery_of_a_recovery_loses_nothing(
    small_prompts: Path, tmp_path: Path, reference: dict[str, str], calls: list[Call], tally: Counter
) -> None:
    commits = [point for point, call in enumerate(calls, start=1) if call == Call("write", "journal.jsonl")]
    firsts = [commits[3], commits[3] + 1, len(calls) - 8]  # a torn commit, one that is not synced, a manifest without links
    seconds = range(1, FIRST_CALLS + 1)
    assert _nested(firsts, small_prompts, tmp_path, reference, tally, seconds=seconds, depths=(3,)) == []


@pytest.mark.faults
def test_crashes_in_every_first_call_of_every_recovery_lose_nothing(
    small_prompts: Path, tmp_path: Path, reference: dict[str, str], calls: list[Call], tally: Counter
) -> None:
    firsts = range(2, len(calls) + 1, 10)  # after the first call there is a folder
    seconds = range(1, FIRST_CALLS + 1)
    assert _nested(firsts, small_prompts, tmp_path, reference, tally, seconds=seconds, depths=(3, 5)) == []


def test_what_a_killed_build_serves_is_committed_rows_only(
    small_prompts: Path, tmp_path: Path, finished_store: Path, calls: list[Call]
) -> None:
    whole = open_store(finished_store)
    window_ends = [point for point, call in enumerate(calls, start=1) if call == Call("pwrite", "sequences.npy")]
    assert len(window_ends) == len(WINDOWS)
    for window, point in enumerate(window_ends):
        store = tmp_path / f"store-{point}"
        _run(small_prompts, store, kill_at=point)
        opened = open_store(store, partial=True)
        committed = [(rows.start, rows.stop) for rows in opened.committed_rows]
        assert committed == WINDOWS[:window]
        for start, stop in committed:
            ids = opened.ids[start:stop]
            assert opened.rows(ids).tobytes() == whole.rows(ids).tobytes()
            assert opened.coordinates[start:stop].tobytes() == whole.coordinates[start:stop].tobytes()
        # chunks of the window in flight lie on disk, but nothing vouches for them
        with pytest.raises(IncompleteStoreError, match="not computed yet"):
            opened.rows([opened.ids[WINDOWS[window][0]]])
