"""The order of calls as the kernel sees them: what is told to be durable was synced before, whoever made the call.

The twin of this, in process, patches ``os``; here one whole build is traced, so nothing goes around it unseen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from embstore.core.records import WindowRecord
from tests.support.faults import SYNCS, Call
from tests.support.order import below, problems
from tests.support.stores import NUM_CHUNKS, WINDOWS, journal_records
from tests.support.strace import CHANGING, TracedCall, Tracer, WarmServer, find_strace, parse_trace

IN_PLACE = ("journal.jsonl", "coordinates.npy", "residuals.npy", ".lock")
WRITES = ("write", "pwrite64", "ftruncate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Every call of one build, in order; ``store`` is what it built."""

    store: Path
    pid: int
    calls: list[TracedCall]

    def path(self, name: str) -> str:
        """The absolute path of a file of the store."""
        return str(self.store / name)

    def temp(self, name: str) -> str:
        """The absolute path of its temporary name."""
        return str((self.store / name).with_name(f".{Path(name).name}.{self.pid}.tmp"))

    def where(self, names: str | tuple[str, ...], path: str) -> list[int]:
        """Positions of calls of these kinds on a path."""
        kinds = (names,) if isinstance(names, str) else names
        return [
            position
            for position, call in enumerate(self.calls)
            if call.name in kinds and call.path == path and not call.failed
        ]

    def only(self, names: str | tuple[str, ...], path: str) -> int:
        """The position of the one such call."""
        found = self.where(names, path)
        assert len(found) == 1, f"{names} {path}: {len(found)} calls"
        return found[0]

    def after(self, position: int, names: str | tuple[str, ...], path: str) -> int:
        """The position of the next such call; far away if there is none."""
        return next((found for found in self.where(names, path) if found > position), len(self.calls))

    @property
    def ours(self) -> Iterator[tuple[int, TracedCall]]:
        """Calls that touch the store's folder or anything in it."""
        for position, call in enumerate(self.calls):
            if any(path == str(self.store) or path.startswith(f"{self.store}/") for path in call.paths):
                yield position, call

    @property
    def commits(self) -> list[int]:
        """Positions of the journal's lines: its header, then one line a record."""
        return self.where("write", self.path("journal.jsonl"))


@pytest.fixture(scope="module")
def trace(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """One uninterrupted build."""
    folder = tmp_path_factory.mktemp("traced")
    tracer = Tracer(program=find_strace(), log=folder / "trace")
    store = folder / "new" / "store"
    with WarmServer() as server:
        child = server.start("build", store, small_prompts, held=True)
        code, calls = tracer.follow(child)
    assert code == 0, child.lines
    return Trace(store=store, pid=child.pid, calls=calls)


# --- nothing is missing -----------------------------------------------------------------------------------------------


def test_no_kind_of_call_changes_the_store_that_is_not_tested(trace: Trace) -> None:
    unknown = {call.name for _, call in trace.ours if not call.only_reads} - {*CHANGING}
    assert not unknown, f"not in CHANGING, so no fault is injected: {sorted(unknown)}"
    assert {call.name for _, call in trace.ours} >= {"openat", "write", "pwrite64", "fsync", "fdatasync", "flock"}
    # their reads and writes are in no trace
    assert not [call.name for call in trace.calls if call.name.startswith("io_") and call.name != "io_destroy"]


def test_one_thread_makes_every_call_on_the_store(trace: Trace) -> None:
    # strace counts a thread's calls on their own, so the n-th call is one call only then
    assert {call.thread for _, call in trace.ours} == {trace.pid}


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


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_kernel_sees_the_order_that_the_writer_asks_for(trace: Trace) -> None:
    found = problems(below(list(_as_recorded(trace)), str(trace.store)))
    assert not found, "\n".join(found)


def _as_recorded(trace: Trace) -> Iterator[Call]:
    """Calls on the store and the folders above it as the recorder in process names them, without scratch and logs.

    What the build said is a write to its pipe.
    """
    plain = {"openat": "open", "pwrite64": "pwrite", "unlinkat": "unlink"}
    above = {str(folder) for folder in trace.store.parents}
    inside = {call.path for _, call in trace.ours}
    left_out = tuple(trace.path(name) for name in ("work/", "runs.jsonl"))
    for call in trace.calls:
        if call.name == "write" and call.text.startswith("committed "):
            yield Call("acknowledged", call.text.removesuffix("\\n"))
        if call.name not in CHANGING or call.name == "flock" or call.only_reads or call.failed:
            continue
        if call.path in above or (call.path in inside and not call.path.startswith(left_out)):
            flags = [getattr(os, name) for name in re.findall(r"O_[A-Z]+", call.args)] if call.name == "openat" else []
            source = call.paths[0] if call.name == "rename" else ""
            yield Call(plain.get(call.name, call.name), call.path, source, sum(flags))


def test_a_window_is_committed_after_all_it_vouches_for_is_durable(trace: Trace) -> None:
    records = journal_records(trace.store)
    assert len(trace.commits) == 1 + len(records)
    folder, journal = trace.path("embeddings.zarr"), trace.path("journal.jsonl")
    before = 0
    num_chunks = 0
    for record, line in zip(records, trace.commits[1:], strict=True):
        assert trace.after(line, "fdatasync", journal) == _next_of_ours(trace, line), "a line is synced before anything else"
        if isinstance(record, WindowRecord):
            for chunk in record.chunks:
                name = f"embeddings.zarr/c.{chunk.index}.0"
                opened = trace.only("openat", trace.temp(name))
                assert {"O_CREAT", "O_EXCL"} <= set(re.findall(r"O_[A-Z]+", trace.calls[opened].args))
                writes = trace.where(WRITES, trace.temp(name))
                synced, renamed = trace.only("fsync", trace.temp(name)), trace.only("rename", trace.path(name))
                assert trace.calls[renamed].paths[0] == trace.temp(name)
                assert (
                    before < opened < min(writes) <= max(writes) < synced < renamed < trace.after(renamed, "fsync", folder)
                )
                assert trace.after(renamed, "fsync", folder) < line
                num_chunks += 1
            for name in ("coordinates.npy", "residuals.npy"):
                written = [position for position in trace.where("pwrite64", trace.path(name)) if before < position < line]
                assert len(written) == 1
                assert trace.after(written[0], "fdatasync", trace.path(name)) < line
        before = line
    assert num_chunks == NUM_CHUNKS


def _next_of_ours(trace: Trace, position: int) -> int:
    return next(found for found, _ in trace.ours if found > position)


def test_a_window_is_told_after_its_line_is_durable(trace: Trace) -> None:
    told = [position for position, call in enumerate(trace.calls) if call.text.startswith("committed ")]
    lines = [
        position
        for position, record in zip(trace.commits[1:], journal_records(trace.store), strict=True)
        if isinstance(record, WindowRecord)
    ]
    assert len(told) == len(lines) == len(WINDOWS)
    for line, position in zip(lines, told, strict=True):
        assert line < trace.after(line, "fdatasync", trace.path("journal.jsonl")) < position


def test_the_name_of_a_new_folder_is_durable_before_anything_in_it_is_committed(trace: Trace) -> None:
    flip = trace.only("rename", trace.path("manifest.json"))
    made = [call.path for call in trace.calls if call.name == "mkdir" and not call.failed]
    inside = sorted(os.path.relpath(path, trace.store) for path in made)
    assert inside[:4] == [".", "..", "embeddings.zarr", "neighbors"]
    assert "weights" in inside
    for path in made:
        created = trace.only("mkdir", path) if path != trace.path("work") else trace.where("mkdir", path)[0]
        commit = next(position for position in (*trace.commits, flip) if position > created)
        assert created < trace.after(created, "fsync", str(Path(path).parent)) < commit, path


def test_the_manifest_is_renamed_last_when_all_it_lists_is_durable(trace: Trace) -> None:
    flip = trace.only("rename", trace.path("manifest.json"))
    temp = trace.temp("manifest.json")
    assert trace.only("openat", temp) < trace.where("write", temp)[-1] < trace.only("fsync", temp) < flip
    assert trace.after(flip, "fsync", str(trace.store)) == _next_sync(trace, flip)
    listed = json.loads((trace.store / "manifest.json").read_bytes())["files"]
    assert {"coordinates.npy", "prompts.jsonl", "chunks.json"} < listed.keys()
    for name in listed:
        renamed = trace.only("rename", trace.path(name))
        assert trace.where(WRITES, trace.temp(name))[-1] < trace.only("fsync", trace.temp(name)) < renamed
        assert renamed < trace.after(renamed, "fsync", str((trace.store / name).parent)) < flip, name
        for written in trace.where(WRITES, trace.path(name)):
            assert written < trace.after(written, SYNCS, trace.path(name)) < flip, name
    after = {
        os.path.relpath(call.path, trace.store)
        for position, call in trace.ours
        if position > flip and not call.only_reads and call.name not in SYNCS and not call.failed
    }
    links = {
        name for link in ("density_weights.npy", "embeddings_metadata.json") for name in (link, f".{link}.{trace.pid}.tmp")
    }
    assert after == {*links, "runs.jsonl", "work", "work/centred.npy"}


def _next_sync(trace: Trace, position: int) -> int:
    return next(found for found, call in enumerate(trace.calls) if found > position and call.name in SYNCS)


def test_what_is_published_is_never_opened_to_be_emptied_or_written(trace: Trace) -> None:
    seen = set()
    for _, call in trace.ours:
        if call.name != "openat" or call.only_reads or call.failed:
            continue
        name = os.path.relpath(call.path, trace.store)
        flags = set(re.findall(r"O_[A-Z]+", call.args))
        if name.startswith("work/"):
            continue
        assert "O_TRUNC" not in flags, name
        if re.fullmatch(rf"(.*/)?\.[^/]+\.{trace.pid}\.tmp", name):
            assert {"O_CREAT", "O_EXCL"} <= flags, name
        elif name == "runs.jsonl":
            assert "O_APPEND" in flags
        else:
            seen.add(name)
    assert seen == set(IN_PLACE)


def test_only_scratch_and_logs_are_left_unsynced(trace: Trace) -> None:
    written = {call.path for _, call in trace.ours if call.name in WRITES}
    unsynced = {
        os.path.relpath(path, trace.store)
        for path in written
        if trace.after(trace.where(WRITES, path)[-1], SYNCS, path) == len(trace.calls)
    }
    scratch = {name for name in unsynced if name.startswith("work/")}
    assert scratch
    assert unsynced - scratch == {".lock", "runs.jsonl"}
