"""A build that copies rows, killed at any moment or system call, ends as if nobody had been killed."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
from pathlib import Path

import pytest

from embstore.storage.journal import read_journal
from tests.support.build_fake import CONFIG, CONFIG_HNSW, REUSE
from tests.support.fake import FakeSource
from tests.support.faults import Call, Killed, SystemCalls
from tests.support.fork_server import ForkServer
from tests.support.rot import tree_state
from tests.support.stores import Acknowledged, build_small, small_lines, snapshot, write_lines
from tests.support.tally import Counter


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    lines = [line for index, line in enumerate(small_lines()) if index % 4]
    build_small(write_lines(folder / "old.jsonl", lines), folder / "old")
    return folder / "old"


def _run(prompts: Path, store: Path, old: Path, *, kill_at: int = 0) -> tuple[bool, list[tuple[int, int]], list[Call]]:
    acknowledged = Acknowledged()
    config = dataclasses.replace(CONFIG, reuse=(str(old),))
    given = prompts if read_journal(store).prompts is None else None
    with SystemCalls(root=store, fail_at=kill_at).watching() as calls:
        try:
            build_small(given, store, config=config, observer=acknowledged, source=FakeSource())
        except Killed:
            return True, acknowledged.windows, calls.calls
    return False, acknowledged.windows, calls.calls


@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.faults)])
def test_a_kill_at_any_system_call_is_resumed_to_the_same_bytes(
    step: int, small_prompts: Path, old: Path, tmp_path: Path, tally: Counter
) -> None:
    _, _, calls = _run(small_prompts, tmp_path / "whole", old)
    reference, untouched = snapshot(tmp_path / "whole"), tree_state(old)
    points = sorted({*range(1, len(calls) + 1, step), len(calls)})
    for point in points:
        store = tmp_path / "store"
        killed, first, _ = _run(small_prompts, store, old, kill_at=point)
        assert killed
        _, second, _ = _run(small_prompts, store, old)
        is_lost = snapshot(store) != reference or bool(set(first) & set(second))
        tally("kill at any call of a build that copies rows, in process", losses=int(is_lost))
        assert not is_lost, f"killed at call {point} of {len(calls)}"
        shutil.rmtree(store)
    assert tree_state(old) == untouched


def test_a_process_killed_at_random_moments_is_resumed_to_the_same_bytes(
    fork_server: ForkServer, tmp_path: Path, tally: Counter
) -> None:
    lines = [{"prompt": f"Explain number {index}."} for index in range(400)]
    build_small(write_lines(tmp_path / "old.jsonl", lines[:300]), tmp_path / "old", config=CONFIG_HNSW)
    prompts = write_lines(tmp_path / "new.jsonl", [*lines[350:], *lines[:350]])
    environment = {REUSE: str(tmp_path / "old")}
    assert fork_server.start("build-reuse", tmp_path / "whole", prompts, environment=environment).wait() == 0
    reference, untouched = snapshot(tmp_path / "whole"), tree_state(tmp_path / "old")
    chance, hits = random.Random(5), 0
    while hits < 6:
        store = tmp_path / "store"
        in_a_row = 0
        for _ in range(3):
            child = fork_server.start("build-reuse", store, prompts, environment=environment)
            child.wait_for(chance.choice(["ready", "computing", "committed", "stage knn", "stage publish"]))
            in_a_row += child.kill() == -signal.SIGKILL
        last = fork_server.start("build-reuse", store, prompts, environment=environment)
        is_lost = last.wait() != 0 or snapshot(store) != reference
        tally("SIGKILL at a random moment, copying rows", cycles=in_a_row, losses=in_a_row * is_lost)
        assert not is_lost, last.lines
        hits += in_a_row
        shutil.rmtree(store)
    assert tree_state(tmp_path / "old") == untouched
