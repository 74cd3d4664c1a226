"""Disks that are really full: one more block is free in each build, until it fits; then the same bytes as anywhere else.

A ballast file leaves exactly so much room. Whatever the build was writing when that ran out, it ends with the code for "free
some space and resume", says where and what to do, and loses nothing. No mapped page may be what runs out: that is a SIGBUS.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from embstore.core.errors import ExitCode, StorageError
from embstore.core.format import BASIS, COORDINATES, EMBEDDINGS, RESIDUALS, RUNS, SEQUENCES, SPEC, STAGE0_FILES, chunk_name
from embstore.host.scratch import map_scratch
from embstore.training import load_weights
from tests.support.build_fake import MODEL
from tests.support.disks import Disk, Kind, new_disk
from tests.support.fork_server import BLIND, Child, ForkServer
from tests.support.served import Window, committed_windows, what_is_wrong
from tests.support.stores import WINDOWS, snapshot, write_lines
from tests.support.tally import Counter

BLOCK = 4096
# what a message names, below the store: what was being written
_PLACES = {
    "": "the folder",
    ".lock": "the folder",
    "journal.jsonl": "the folder",
    "work": "scratch files",
    **dict.fromkeys(STAGE0_FILES, "stage 0"),
    **dict.fromkeys((BASIS, COORDINATES, RESIDUALS, SEQUENCES, SPEC, RUNS, EMBEDDINGS), "the layout"),
    "neighbors": "neighbours",
    "weights": "weights",
    "chunks.json": "the manifest",
    "manifest.json": "the manifest",
}
EVERYWHERE = {*_PLACES.values(), "a chunk"}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Children whose preflight can be told that the disk is empty, so that they run into the full one."""
    with ForkServer() as server:
        yield server


class FullDisk:
    """Runs on a disk that is filled first."""

    def __init__(
        self, disk: Disk, server: ForkServer, prompts: Path, reference: Path, *, action: str = "build", model: str = ""
    ) -> None:
        self.disk = disk
        self.store = disk.path / "store"
        self._server = server
        self._prompts = prompts
        self._reference = reference
        self._action = action
        self._environment = {BLIND: "1", MODEL: model}

    def run(self, action: str | None = None) -> Child:
        """One run to its end."""
        child = self._server.start(action or self._action, self.store, self._prompts, environment=self._environment)
        child.wait()
        return child

    def wrong_at(self, num_blocks: int) -> tuple[str | None, list[str]]:
        """Build with so many blocks free, once more, then with enough: where it failed (None: nowhere), what was wrong."""
        self.disk.clear()
        self.disk.fill(num_blocks * BLOCK)
        first = self.run()
        wrong = self._judged(first, set())
        # what the first one left behind may have been in the way, so the second may fit
        second = self.run()
        wrong += self._judged(second, first.acknowledged)
        durable = committed_windows(self.store)
        self.disk.free()
        last = self.run()
        wrong += [] if last.wait() == 0 else [f"with enough room it ended with {last.wait()}: {last.lines[-1]}"]
        wrong += _made_again(last, durable)
        wrong += [] if snapshot(self.store) == snapshot(self._reference) else ["resumed to other bytes"]
        return _place(self.store, first), wrong

    def _judged(self, child: Child, durable: set[Window]) -> list[str]:
        wrong = what_is_wrong(self.store, self._reference, durable | child.acknowledged) + _made_again(child, durable)
        return wrong + ([] if child.wait() == 0 else _badly_said(self.store, child))


def _badly_said(store: Path, child: Child) -> list[str]:
    """What is wrong with how a run reported that the disk is full."""
    if child.wait() != ExitCode.INCOMPLETE:
        return [f"a full disk ended it with {child.wait()}: {child.lines[-1]}"]
    hint, error = child.lines[-2:]
    wrong = [] if hint.startswith("hint free some space, then run the command again") else [f"it gave the hint {hint!r}"]
    is_said = error.startswith("error storage: ") and str(store) in error and os.strerror(28) in error
    return wrong if is_said else [*wrong, f"it said {error!r}"]


def _place(store: Path, child: Child) -> str | None:
    found = re.search(rf"{re.escape(str(store))}/?(\S*) failed", child.lines[-1])
    if found is None:
        return None
    if child.lines[-1].startswith("error storage: committing to "):
        return "a journal line"
    folder, _, name = found[1].partition("/")
    return "a chunk" if name.startswith("c.") else _PLACES.get(folder)


def _made_again(child: Child, durable: set[Window]) -> list[str]:
    said = [line.split() for line in child.lines]
    computed = {(int(words[1]), int(words[2])) for words in said if words[0] == "computing"}
    return [f"window {window} was made again" for window in sorted(computed & durable)]


def _assert_nothing_lost(full: FullDisk, blocks: Iterable[int], tally: Counter) -> set[str]:
    """Build with each number of free blocks, until one is enough; the places that ran out of space."""
    places = set()
    for num_blocks in blocks:
        place, wrong = full.wrong_at(num_blocks)
        if place is not None or wrong:
            tally(f"full disk, {full.disk.kind}", losses=int(bool(wrong)))
        assert wrong == [], f"{num_blocks} blocks free, {place}"
        if place is None:
            break
        places.add(place)
    return places


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_build_on_a_full_disk_is_resumed_to_the_same_bytes(
    kind: Kind, server: ForkServer, small_prompts: Path, finished_store: Path, tally: Counter
) -> None:
    with new_disk(kind) as disk:
        places = _assert_nothing_lost(FullDisk(disk, server, small_prompts, finished_store), itertools.count(0, 2), tally)
    assert places >= {"the folder", "stage 0"}
    assert len(places) >= 4


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("num_rows", [70, 400])
def test_a_build_on_a_disk_full_at_any_block_is_resumed_to_the_same_bytes(
    kind: Kind, num_rows: int, server: ForkServer, small_prompts: Path, tmp_path: Path, tally: Counter
) -> None:
    prompts, reference = small_prompts, tmp_path / "reference"
    if num_rows == 400:  # enough that the journal needs a second block: 13 windows
        lines = [{"prompt": f"Explain number {index}."} for index in range(num_rows)]
        prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    assert server.start("build", reference, prompts).wait() == 0
    with new_disk(kind) as disk:
        places = _assert_nothing_lost(FullDisk(disk, server, prompts, reference), itertools.count(), tally)
    assert places == EVERYWHERE | ({"a journal line"} if num_rows == 400 else set())


def test_a_build_that_cannot_fit_is_refused_before_the_first_row(
    server: ForkServer, small_prompts: Path, finished_store: Path
) -> None:
    with new_disk("tmpfs") as disk:
        disk.fill(20 * BLOCK)  # enough for stage 0, which takes half of it
        store = disk.path / "store"
        child = server.start("build", store, small_prompts)
        assert child.wait() == ExitCode.ERROR
        hint, error = child.lines[-2:]
        assert hint == "hint free some space, choose another --out, or try --limit"
        assert re.fullmatch(rf"error budget: the store may need \S+ KiB, but the disk of {store} has \S+ KiB free", error)
        assert not (store / SPEC).exists()
        disk.free()
        assert server.start("build", store, small_prompts).wait() == 0
        assert snapshot(store) == snapshot(finished_store)


def test_new_weights_on_a_full_disk_leave_the_old_ones(
    server: ForkServer, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    target = Path(shutil.copytree(finished_store, tmp_path / "target", symlinks=True))
    assert server.start("weights", target).wait() == 0
    with new_disk("ext4") as disk:
        full = FullDisk(disk, server, small_prompts, finished_store)
        places = set()
        for num_blocks in itertools.count():
            disk.clear()
            shutil.copytree(finished_store, full.store, symlinks=True)
            disk.settle()
            disk.fill(num_blocks * BLOCK)
            child = full.run("weights")
            served = load_weights(full.store)
            expected = load_weights(finished_store if child.wait() != 0 else target)
            wrong = [] if np.array_equal(served.array, expected.array) else ["other weights are served"]
            del served
            wrong += _badly_said(full.store, child) if child.wait() != 0 else []
            disk.free()
            assert full.run("weights").wait() == 0
            wrong += [] if snapshot(full.store) == snapshot(target) else ["other bytes"]
            tally("full disk, ext4, new weights", losses=int(bool(wrong)))
            assert wrong == []
            if child.wait() == 0:
                break
            places.add(_place(full.store, child))
    assert places >= {"weights", "the manifest"}


def test_a_repair_on_a_full_disk_is_done_by_the_next(
    server: ForkServer, small_prompts: Path, finished_store: Path, tally: Counter
) -> None:
    with new_disk("ext4") as disk:
        full = FullDisk(disk, server, small_prompts, finished_store)
        shutil.copytree(finished_store, full.store, symlinks=True)
        os.truncate(full.store / chunk_name(2), 100)
        disk.settle()
        disk.fill(0)
        for _ in range(2):
            child = full.run("repair")
            wrong = _badly_said(full.store, child) if child.wait() != 0 else []
            wrong += what_is_wrong(full.store, finished_store, set(WINDOWS), damaged=frozenset({WINDOWS[1]}))
            tally("full disk, ext4, repair", losses=int(bool(wrong)))
            assert wrong == []
        disk.free()
        assert full.run("repair").wait() == 0
        child = full.run("build")
        assert child.wait() == 0
        assert child.acknowledged == {WINDOWS[1]}
        assert snapshot(full.store) == snapshot(finished_store)


def test_scratch_that_does_not_fit_is_refused_and_scratch_that_was_mapped_can_be_written() -> None:
    with new_disk("tmpfs") as disk:
        disk.fill(8 * BLOCK)
        with pytest.raises(
            StorageError, match=rf"reserving 39\.1 KiB in {disk.path}/scratch\.npy failed: No space left"
        ) as caught:
            map_scratch(disk.path / "scratch.npy", (10_000,), np.float32)
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("free some space")
        (disk.path / "scratch.npy").unlink()
        # in a process of its own: it would die of SIGBUS
        code = (
            "import sys, os, pathlib, numpy, embstore.host.scratch as scratch\n"
            "array = scratch.map_scratch(pathlib.Path(sys.argv[1]), (6, 1024), numpy.float32)\n"
            "assert not array.any()\n"
            "rest = os.statvfs(sys.argv[1]).f_bavail * 4096\n"
            "assert os.posix_fallocate(os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY), 0, rest) is None\n"
            "array[:] = 1\n"
        )
        subprocess.run([sys.executable, "-c", code, disk.path / "scratch.npy", disk.path / "rest"], check=True)
        assert disk.free_bytes == 0
        assert np.load(disk.path / "scratch.npy").sum() == 6 * 1024


@pytest.mark.faults
def test_a_real_model_on_a_full_disk_is_resumed_to_the_same_bytes(tmp_path: Path, tally: Counter) -> None:
    """A streamed head: its basis is made from pilot rows, and both lie in mapped scratch files while it is made."""
    from tests.support.models import make_model, make_tokenizer, save_model

    model = save_model(tmp_path / "model", make_model("nanochat"), make_tokenizer())
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": f"why does prime number {row} seven"} for row in range(48)]
    )
    reference = tmp_path / "reference"
    with ForkServer(torch=True) as server, new_disk("tmpfs") as disk:
        assert server.start("build-real", reference, prompts, environment={MODEL: str(model)}).wait() == 0
        full = FullDisk(disk, server, prompts, reference, action="build-real", model=str(model))
        places = _assert_nothing_lost(full, range(10, 64, 7), tally)
    # the layout fits where the sample's scratch file was: other tests fill the disk there
    assert places >= {"scratch files", "a chunk"}
