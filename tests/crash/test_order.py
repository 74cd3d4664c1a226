"""The order of system calls: no writer vouches for anything before it is durable, and the kernel sees what is recorded.

Rules are in tests.support.order. They are held against calls recorded in process, for every kind of writer; a trace by
strace shows that nothing goes around the recorder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from embstore.core.format import chunk_name
from tests.support.build_fake import perform
from tests.support.faults import SYNCS, Call, SystemCalls
from tests.support.fork_server import ForkServer
from tests.support.order import JOURNAL, MANIFEST, WITHDRAWN, problems
from tests.support.scenarios import SCENARIOS
from tests.support.strace import CHANGING, TracedCall, Tracer, find_strace, parse_trace


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_writer_keeps_the_order(recorded: dict[str, list[Call]], scenario: str) -> None:
    assert problems(recorded[scenario]) == []


def test_a_repair_withdraws_before_it_demotes(recorded: dict[str, list[Call]]) -> None:
    calls = recorded["repair"]
    withdrawn = next(index for index, call in enumerate(calls) if (call.name, call.path) == ("rename", WITHDRAWN))
    assert calls[withdrawn].source == MANIFEST
    assert Call("write", JOURNAL) not in calls[:withdrawn]


# --- the rules have teeth ---------------------------------------------------------------------------------------------


def _swapped(first: Callable[[Call], bool], second: Callable[[Call], bool]) -> Callable[[list[Call]], list[Call]]:
    """The first call of one kind after the next one of another."""

    def swap(calls: list[Call]) -> list[Call]:
        start = next(index for index, call in enumerate(calls) if first(call))
        stop = next(index for index, call in enumerate(calls) if index > start and second(call))
        return [*calls[:start], *calls[start + 1 : stop + 1], calls[start], *calls[stop + 1 :]]

    return swap


def _made_truncating(calls: list[Call]) -> list[Call]:
    return [
        dataclasses.replace(call, flags=call.flags | os.O_TRUNC) if call.path == "coordinates.npy" else call
        for call in calls
    ]


def _made_in_place(calls: list[Call]) -> list[Call]:
    return [Call("open", MANIFEST, flags=os.O_CREAT | os.O_WRONLY) if call.path == MANIFEST else call for call in calls]


WRONG: dict[str, Callable[[list[Call]], list[Call]]] = {
    "a chunk is renamed before its bytes are synced": _swapped(
        lambda call: call.name == "fsync" and ".c.0.0." in call.path, lambda call: call.path == "embeddings.zarr/c.0.0"
    ),
    "a line before the coordinates": _swapped(
        lambda call: call.name in SYNCS and call.path == "coordinates.npy",
        lambda call: call.name == "write" and call.path == JOURNAL,
    ),
    "a line before its chunks are named": _swapped(
        lambda call: call.name == "rename" and call.path == "embeddings.zarr/c.1.0",
        lambda call: call.name == "write" and call.path == JOURNAL,
    ),
    "told before the line is synced": _swapped(
        lambda call: call.name == "write" and call.path == JOURNAL, lambda call: call.name == "acknowledged"
    ),
    "the manifest before the weights": _swapped(
        lambda call: call.name == "rename" and call.path.startswith("weights/"),
        lambda call: call.name == "rename" and call.path == MANIFEST,
    ),
    "the flip is not synced before the links": _swapped(
        lambda call: call.name == "rename" and call.path == MANIFEST, lambda call: call.name == "symlink"
    ),
    "a folder is filled before its parent is synced": _swapped(
        lambda call: call.name == "fsync" and call.path == "neighbors", lambda call: call.name == "open"
    ),
    "a published file is emptied": _made_truncating,
    "a file is written under its own name": _made_in_place,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_order_is_noticed(recorded: dict[str, list[Call]], wrong: str) -> None:
    assert problems(WRONG[wrong](recorded["build"]))


# --- the recorder misses nothing --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Every call that one process made, as the kernel saw it."""

    store: Path
    pid: int
    calls: list[TracedCall]

    @property
    def ours(self) -> Iterator[TracedCall]:
        """Calls on the store, on anything in it, and on the folder above it."""
        known = (str(self.store), str(self.store.parent))
        return (call for call in self.calls if any(path in known or path.startswith(f"{known[0]}/") for path in call.paths))


def _start(action: str, finished: Path, folder: Path) -> Path:
    """Where ``action`` begins: nothing, a finished store, or one with a damaged chunk."""
    folder.mkdir()
    store = folder / "store"
    if action != "build":
        shutil.copytree(finished, store, symlinks=True)
    if action == "repair":
        os.truncate(store / chunk_name(2), 100)
    return store


@pytest.fixture(scope="module", params=["build", "weights", "repair"])
def traced(
    request: pytest.FixtureRequest, small_prompts: Path, finished_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trace, list[Call]]:
    """One action traced by the kernel, and the same one recorded in process."""
    folder = tmp_path_factory.mktemp("traced")
    tracer = Tracer(program=find_strace(), log=folder / "trace")
    store = _start(request.param, finished_store, folder / "one")
    with ForkServer(warm=True) as server:
        child = server.start(request.param, store, small_prompts, held=True)
        code, calls = tracer.follow(child)
    assert code == 0, child.lines
    again = _start(request.param, finished_store, folder / "two")
    with SystemCalls(root=again.parent).watching() as recorder:
        assert perform(request.param, again, small_prompts, lambda line: None) == 0
    return Trace(store=store, pid=child.pid, calls=calls), recorder.calls


def test_the_kernel_sees_the_calls_that_are_recorded(traced: tuple[Trace, list[Call]]) -> None:
    """Scratch files and logs are left out: no promise depends on them."""
    trace, recorded = traced
    plain = {"openat": "open", "pwrite64": "pwrite", "unlinkat": "unlink", "renameat": "rename"}
    seen = [
        (plain.get(call.name, call.name), os.path.relpath(call.path, trace.store.parent))
        for call in trace.ours
        if call.name in CHANGING and call.name != "flock" and not call.only_reads
    ]
    assert _promised(seen) == _promised([(call.name, call.path) for call in recorded])


def _promised(calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (name, re.sub(r"\.[0-9a-f]+\.tmp$", ".PID.tmp", path))
        for name, path in calls
        if not path.startswith(("store/work", "store/runs.jsonl"))
    ]


def test_no_kind_of_call_changes_the_store_that_is_not_tested(traced: tuple[Trace, list[Call]]) -> None:
    trace, _ = traced
    unknown = {call.name for call in trace.ours if not call.only_reads} - {*CHANGING}
    assert not unknown, f"not in CHANGING, so no fault is injected: {sorted(unknown)}"
    assert {call.name for call in trace.ours} >= {"openat", "write", "fsync", "flock"}
    # their reads and writes are in no trace
    assert not [call.name for call in trace.calls if call.name.startswith("io_") and call.name != "io_destroy"]


def test_one_thread_makes_every_call_on_the_store(traced: tuple[Trace, list[Call]]) -> None:
    # strace counts a thread's calls on their own, so the n-th call is one call only then
    trace, _ = traced
    assert {call.thread for call in trace.ours} == {trace.pid}


_OTHER_WAYS = """
import mmap, os, sys
source = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
target = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
os.write(source, b"0" * 4096)
os.copy_file_range(source, target, 10)
os.sendfile(target, source, 0, 10)
os.pwritev(target, [b"0"], 0, os.RWF_DSYNC)
os.posix_fallocate(target, 0, 10)
os.chmod(sys.argv[1], 0o600)
os.link(sys.argv[1], sys.argv[1] + "2")
mmap.mmap(source, 4096)
mmap.mmap(source, 4096, access=mmap.ACCESS_READ)
"""


def test_another_way_to_change_a_file_would_be_noticed(tmp_path: Path) -> None:
    command = [find_strace(), "-f", "-qq", "-y", "-s", "32", "-e", "signal=none", "-o", str(tmp_path / "trace")]
    names = [str(tmp_path / "source"), str(tmp_path / "target")]
    subprocess.run([*command, sys.executable, "-S", "-E", "-c", _OTHER_WAYS, *names], check=True)
    with (tmp_path / "trace").open() as lines:
        made = [call for call in parse_trace(lines) if any(path.startswith(str(tmp_path)) for path in call.paths)]
    unknown = [call.name for call in made if not call.only_reads and call.name not in CHANGING]
    assert unknown == ["copy_file_range", "sendfile", "pwritev2", "fallocate", "chmod", "link", "mmap"]
