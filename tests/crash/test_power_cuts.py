"""Power cuts on real file systems, at any moment of a build, of its recovery, of new weights and of a repair.

After every cut the log is replayed and the store judged: what was acknowledged is there, nothing wrong is served. Then the
same store goes on to the next cut, until the work is done: the same bytes as without any cut, nothing durable made again.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embstore.core.errors import EmbstoreError
from embstore.core.format import chunk_name
from embstore.storage.journal import read_journal
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.disks import Disk, Kind, Log, new_disk
from tests.support.fork_server import Child, ForkServer, without
from tests.support.served import Window, committed_windows, what_is_wrong
from tests.support.stores import WINDOWS, snapshot, write_lines
from tests.support.tally import Counter

NUM_ROWS = 400
STAGES = {"stage 0", "recovery", "embed", "knn", "publish", "the end", "weights", "repair"}
_DAMAGED_CHUNK = 2
_DAMAGED = frozenset({WINDOWS[1]})


# what is left out, a call on paths in the store: one of each way to make something durable; the model leaves out every sync
LEFT_OUT = {
    "coordinates": ("fdatasync", "coordinates.npy"),
    "journal line": ("fdatasync", "journal.jsonl"),
    "manifest": ("fsync", ".manifest.json.*.tmp"),
    "every folder": ("fsync", "*/"),
}
_MOST_CUTS = 40


@dataclass(frozen=True, kw_only=True)
class Work:
    """A build to be cut off, and what it makes when it is not."""

    action: str
    prompts: Path
    reference: Path


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One power cut: the stage it fell in, what became of the log, and what was wrong afterwards."""

    stage: str
    log: Log
    wrong: list[str]


@dataclass(frozen=True, kw_only=True)
class Round:
    """A child that was cut off: where it was, what it had acknowledged by then, whether it had ended by itself before."""

    child: Child
    stage: str
    log: Log
    acknowledged: set[Window]
    has_ended: bool


@pytest.fixture(scope="module")
def works(fork_server: ForkServer, small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Work]:
    """Three builds, uninterrupted: 70 rows, and 400 rows with either search."""
    folder = tmp_path_factory.mktemp("references")
    many = write_lines(folder / "many.jsonl", [{"prompt": f"Explain number {index}."} for index in range(NUM_ROWS)])
    found = []
    for number, (action, prompts) in enumerate([("build", small_prompts), ("build", many), ("build-hnsw", many)]):
        store = folder / f"store-{number}"
        assert fork_server.run(action, store, prompts).wait() == 0
        found.append(Work(action=action, prompts=prompts, reference=store))
    return found


class PowerCuts:
    """Work on one disk, cut off again and again; each method yields its cuts and ends with the work done."""

    def __init__(
        self, disk: Disk, server: ForkServer, chance: random.Random, *, environment: dict[str, str] | None = None
    ) -> None:
        self._disk = disk
        self._server = server
        self._chance = chance
        self._environment = environment
        self._gaps: dict[str, dict[str, float]] = {}  # of an action: seconds after a line until the next one
        self.store = disk.path / "store"

    def endless(self, works: list[Work]) -> Iterator[Cut]:
        """Everything, in turns."""
        for work in itertools.cycle(works):
            yield from self.build(work)
            yield from self.weights(works[0])
            yield from self.repair(works[0])

    def builds(self, work: Work) -> Iterator[Cut]:
        """The same build over and over."""
        while True:
            yield from self.build(work)

    def build(self, work: Work) -> Iterator[Cut]:
        """A build from nothing."""
        self._measure(work.action, work.prompts)
        self._disk.clear()
        durable: set[Window] = set()
        has_ended = False
        while not has_ended:
            is_new = not read_journal(self.store).prompts
            # a build spends little time in stage 0, and passes it once
            early = is_new and self._chance.random() < 0.5
            cut = self._cut(work.action, work.prompts, after="ready" if early else None)
            stage = ("stage 0" if is_new else "recovery") if cut.stage == "ready" else cut.stage
            acknowledged, has_ended = cut.acknowledged, cut.has_ended
            wrong = _failure(cut.child) if has_ended else []
            is_finished = has_ended and not wrong
            wrong += what_is_wrong(self.store, work.reference, acknowledged | durable, is_finished=is_finished)
            wrong += [f"window {window} was made again" for window in sorted(_computed(cut.child) & durable)]
            if is_finished and not wrong:
                wrong += self._finish(work, durable | acknowledged)
            durable |= committed_windows(self.store) if not wrong else set()
            yield Cut(stage=stage, log=cut.log, wrong=wrong)

    def weights(self, work: Work) -> Iterator[Cut]:
        """New weights for a finished store: the old or the new ones are served, the new ones once that was said."""
        target = self._disk.path / "target"
        self._put(work.reference, target)
        self._server.run("weights", target)
        new, reference = load_weights(target), snapshot(target)
        new_name, new_values = new.path.name, np.array(new.array)
        del new
        self._measure("weights", None, finished=work.reference)
        self._put(work.reference)
        old = load_weights(work.reference)
        has_ended = False
        while not has_ended:
            cut = self._cut("weights", None)
            has_ended = cut.has_ended
            wrong = _failure(cut.child) if has_ended else []
            try:
                found = load_weights(self.store)
            except EmbstoreError as error:
                wrong.append(f"{error.kind}: {error}")
            else:
                served = {old.path.name: old.array, new_name: new_values}.get(found.path.name)
                if served is None or served.tobytes() != found.array.tobytes():
                    wrong.append("weights are served that are neither the old nor the new ones")
                if has_ended and found.path.name != new_name:
                    wrong.append("new weights were acknowledged, the old ones are served")
                del found
            if has_ended and not wrong:
                wrong += _failure(self._server.run("weights", self.store)) + _difference(self.store, reference)
            yield Cut(stage="weights", log=cut.log, wrong=wrong)

    def repair(self, work: Work) -> Iterator[Cut]:
        """A finished store with one damaged chunk: repaired, then built on, and only that window is made again."""
        self._measure("repair", None, finished=work.reference, damage=True)
        self._put(work.reference, damage=True)
        has_ended = False
        while not has_ended:
            cut = self._cut("repair", None)
            has_ended = cut.has_ended
            wrong = _failure(cut.child) if has_ended else []
            wrong += what_is_wrong(self.store, work.reference, set(WINDOWS), damaged=_DAMAGED)
            if has_ended and not wrong:
                durable = set(WINDOWS) - _DAMAGED
                if committed_windows(self.store) != durable:
                    wrong.append("the repair was acknowledged, and is not there")
                wrong += self._finish(work, durable)
            yield Cut(stage="repair", log=cut.log, wrong=wrong)

    def _cut(self, action: str, prompts: Path | None, *, after: str | None = None) -> Round:
        """Start an action, cut the power at some moment of it (after it said ``after``, or anything), restore the disk."""
        chance = self._chance
        log = chance.choice(list(Log))
        child = self._server.start(action, self.store, prompts, environment=self._environment)
        gaps = self._gaps[action]
        after = after or chance.choice([*gaps, "the end"])
        number = chance.randint(1, 4) if after == "committed" else 1
        while sum(line.startswith(after) for line in child.lines) < number and child.read(wait_seconds=1.0):
            pass
        time.sleep(chance.uniform(0, gaps.get(after, 0)))
        has_ended = not child.read()
        acknowledged = child.acknowledged
        stage = "the end" if has_ended else _stage(child.lines)
        self._disk.cut(log)
        child.kill()
        self._disk.restore()
        return Round(child=child, stage=stage, log=log, acknowledged=acknowledged, has_ended=has_ended)

    def _finish(self, work: Work, durable: set[Window]) -> list[str]:
        """What is wrong once the build ran to its end without a cut."""
        child = self._server.start(work.action, self.store, work.prompts, environment=self._environment)
        child.wait()
        wrong = _failure(child) + _difference(self.store, snapshot(work.reference))
        wrong += [f"window {window} was made again" for window in sorted(_computed(child) & durable)]
        report = verify(self.store)
        return wrong + [f"{finding.path} {finding.message}" for finding in report.findings] + report.notes

    def _measure(self, action: str, prompts: Path | None, *, finished: Path | None = None, damage: bool = False) -> None:
        """How long an action stays where it says it is, on this disk."""
        if action in self._gaps:
            return
        self._disk.clear()
        if finished is not None:
            self._put(finished, damage=damage)
        said: dict[str, list[float]] = collections.defaultdict(list)
        child = self._server.start(action, self.store, prompts)
        since, last = time.monotonic(), "ready"
        while child.read(wait_seconds=1.0):
            now = time.monotonic()
            said[last].append(now - since)
            since, last = now, _kind(child.lines[-1]) if child.lines else last
        said[last].append(time.monotonic() - since)
        assert child.wait() == 0, child.lines
        self._gaps[action] = {line: float(np.mean(gaps)) for line, gaps in said.items()}

    def _put(self, finished: Path, target: Path | None = None, *, damage: bool = False) -> None:
        """Lay a finished store on the disk, durably."""
        self._disk.clear()
        target = target or self.store
        shutil.copytree(finished, target, symlinks=True)
        if damage:
            os.truncate(target / chunk_name(_DAMAGED_CHUNK), 100)
        self._disk.settle()


def _kind(line: str) -> str:
    """A line as the first of its kind: what all of them begin with."""
    words = line.split()
    return line if words[0] == "stage" else words[0]


def _stage(lines: list[str]) -> str:
    said = [_kind(line) for line in lines] or ["ready"]
    return {"ready": "ready", "stage audit": "knn", "stage knn": "knn", "stage publish": "publish"}.get(said[-1], "embed")


def _computed(child: Child) -> set[Window]:
    said = [line.split() for line in child.lines]
    return {(int(words[1]), int(words[2])) for words in said if words[0] == "computing"}


def _failure(child: Child) -> list[str]:
    return [f"ended with {child.wait()}: {child.lines[-1]}"] if child.wait() != 0 else []


def _difference(store: Path, reference: dict[str, str]) -> list[str]:
    found = snapshot(store)
    names = sorted(name for name in reference.keys() | found.keys() if reference.get(name) != found.get(name))
    return [f"{name} differs from that of an uninterrupted run" for name in names]


def _assert_nothing_lost(cuts: Iterator[Cut], kind: Kind, count: int, tally: Counter) -> collections.Counter[str]:
    """Judge ``count`` cuts; returns how many fell in each stage."""
    stages: collections.Counter[str] = collections.Counter()
    for cut in itertools.islice(cuts, count):
        how = "copy of the disk" if kind == "btrfs" else cut.log.words
        tally(f"power cut, {kind}, {how}", losses=int(bool(cut.wrong)))
        assert cut.wrong == [], f"{kind}, {cut.log.words}, in {cut.stage}"
        stages[cut.stage] += 1
    return stages


@pytest.mark.parametrize(("kind", "count"), [("ext4", 20), ("xfs", 10)])
def test_a_power_cut_loses_nothing_acknowledged(
    kind: Kind, count: int, fork_server: ForkServer, works: list[Work], tally: Counter
) -> None:
    with new_disk(kind) as disk:
        cuts = PowerCuts(disk, fork_server, random.Random(0))
        stages = _assert_nothing_lost(cuts.endless(works), kind, count, tally)
    assert stages.keys() <= STAGES
    assert len(stages) > 2


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "count"), [("ext4", 440), ("xfs", 440), ("btrfs", 200)])
def test_a_power_cut_in_any_stage_loses_nothing_acknowledged(
    kind: Kind, count: int, fork_server: ForkServer, works: list[Work], tally: Counter
) -> None:
    with new_disk(kind) as disk:
        cuts = PowerCuts(disk, fork_server, random.Random(1))
        stages = _assert_nothing_lost(cuts.endless(works), kind, count, tally)
    assert stages.keys() == STAGES, "every stage was hit"


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("sync", LEFT_OUT)
def test_power_cuts_notice_a_sync_that_is_left_out(
    kind: Kind, sync: str, fork_server: ForkServer, works: list[Work], tally: Counter
) -> None:
    """The loop above has teeth.

    Some syncs a real disk cannot show missing. Chunks are written past the page cache, and the journal line's fdatasync
    flushes the same log, which has their sizes and renames. test_left_out_syncs leaves out every sync on the modelled disk.
    """
    with new_disk(kind) as disk:
        cuts = PowerCuts(disk, fork_server, random.Random(0), environment=without(*LEFT_OUT[sync]))
        is_noticed = any(cut.wrong for cut in itertools.islice(cuts.builds(works[1]), _MOST_CUTS))
    tally(f"left-out sync noticed: {sync}, {kind}", losses=int(not is_noticed))
    assert is_noticed


@pytest.mark.faults
def test_children_that_leave_no_sync_out_lose_nothing(fork_server: ForkServer, works: list[Work]) -> None:
    """The control of the test above."""
    with new_disk("ext4") as disk:
        cuts = PowerCuts(disk, fork_server, random.Random(0), environment=without("fsync", "no such file"))
        assert [cut.wrong for cut in itertools.islice(cuts.builds(works[1]), _MOST_CUTS)] == [[]] * _MOST_CUTS
