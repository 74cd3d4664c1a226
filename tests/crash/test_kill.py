"""Real processes, really killed: at seeded moments, after an acknowledged window, and by strace at the n-th system call."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embstore.storage.journal import read_journal
from tests.support.fake import FakeSource
from tests.support.faults import SystemCalls
from tests.support.stores import build_small, snapshot, write_lines

NUM_ROWS = 400
NUM_WINDOWS = 13
# calls that only the store makes; openat is also what imports do, so it is left to the tests in process
INJECTED = ("mkdir", "write", "pwrite64", "fsync", "fdatasync", "rename", "ftruncate", "symlink", "unlink", "rmdir")


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows that a build lasts long enough to be hit in the middle."""
    path = tmp_path_factory.mktemp("many") / "prompts.jsonl"
    return write_lines(path, [{"prompt": f"Explain number {index}."} for index in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def many_rows(many_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same build, uninterrupted."""
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    build_small(many_prompts, store)
    return snapshot(store)


def _command(prompts: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.build_fake", str(prompts), str(store)]


def _run(prompts: Path, store: Path, *, kill_after: tuple[int, float] | None) -> tuple[int, list[str]]:
    """One build in a process of its own: its return code, and the windows it acknowledged, as lines.

    ``kill_after`` (lines, seconds): SIGKILL that long after that many acknowledged windows.
    """
    with subprocess.Popen(_command(prompts, store), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        lines: list[str] = []
        if kill_after is not None:
            lines += itertools.islice(process.stdout, kill_after[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=kill_after[1])
            process.kill()
        lines += process.stdout
    return process.returncode, lines


@pytest.mark.parametrize("seed", range(3))
def test_a_build_killed_again_and_again_ends_as_if_it_never_was(
    seed: int, many_prompts: Path, many_rows: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    chance = random.Random(seed)
    acknowledged: list[str] = []
    # two kills at any moment from the first system call on, two as soon as some window was acknowledged
    moments = [
        (0, chance.uniform(0, 0.15)),
        (chance.randint(1, 3), 0.0),
        (0, chance.uniform(0, 0.15)),
        (chance.randint(1, 4), 0.0),
    ]
    for moment in moments:
        code, lines = _run(many_prompts, store, kill_after=moment)
        assert code in (0, -signal.SIGKILL)
        acknowledged += lines
    code, lines = _run(many_prompts, store, kill_after=None)
    assert code == 0
    acknowledged += lines
    assert len(set(acknowledged)) == len(acknowledged), "an acknowledged window was computed again"
    # a window may be committed by a process that was killed before it could say so
    assert len(acknowledged) <= NUM_WINDOWS == len(read_journal(store).windows)
    assert snapshot(store) == many_rows


def test_the_lock_of_a_killed_process_is_free(many_prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, _ = _run(many_prompts, store, kill_after=(1, 0.0))
    assert code == -signal.SIGKILL
    assert b'"pid"' in (store / ".lock").read_bytes()
    build_small(many_prompts, store)


def _need_strace() -> str:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run([strace, "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()}")
    return strace


def _kill_at(strace: str, call: str, count: int, prompts: Path, store: Path) -> bool:
    """A build that is killed entering the ``count``-th system call ``call``; False when it makes fewer."""
    injection = [
        strace,
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=KILL:when={count}",
    ]
    done = subprocess.run(
        injection + _command(prompts, store),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    killed = done.returncode != 0
    acknowledged = {line for line in done.stdout.splitlines() if line.startswith("committed")}
    source = FakeSource()
    with SystemCalls(root=store).watching():
        build_small(prompts, store, source=source)
    assert not {f"committed {start} {stop}" for start, stop in source.calls} & acknowledged
    return killed


@pytest.mark.parametrize(("call", "count"), [("fsync", 12), ("rename", 20), ("fdatasync", 8), ("symlink", 2)])
def test_a_kill_by_the_kernel_at_a_system_call_is_resumed(
    call: str, count: int, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    assert _kill_at(_need_strace(), call, count, small_prompts, tmp_path / "store")
    assert snapshot(tmp_path / "store") == snapshot(finished_store)


@pytest.mark.faults
@pytest.mark.parametrize("call", INJECTED)
def test_a_kill_by_the_kernel_at_every_system_call_is_resumed(
    call: str, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    strace = _need_strace()
    reference = snapshot(finished_store)
    for count in itertools.count(1):
        store = tmp_path / "store"
        killed = _kill_at(strace, call, count, small_prompts, store)
        assert snapshot(store) == reference, f"killed at {call} {count}"
        shutil.rmtree(store)
        if not killed:
            assert count > 1, f"a build makes no {call}"
            return
