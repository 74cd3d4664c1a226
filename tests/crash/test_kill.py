"""Real processes, killed at seeded moments in every stage: the listed files end as if nobody had been killed.

Most of it on the fake embedder, in children that start in milliseconds; some on the real command line with a real model.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.flow.artifact import recompute_weights
from embstore.storage.journal import read_journal
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.build_fake import CONFIG_HNSW
from tests.support.fork_server import Child, ForkServer
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import build_small, snapshot, write_lines
from tests.support.tally import Counter

NUM_ROWS = 400
# the line a child says when a stage begins, and what a person would call the stage
STAGES = {
    "ready": "stage 0",
    "stage embed": "embedding",
    "stage knn": "neighbour search",
    "stage audit": "audit",
    "stage publish": "weights and publication",
}
KILLS_IN_A_ROW = 4  # then the build may finish


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows that a build lasts long enough to be hit in the middle."""
    path = tmp_path_factory.mktemp("many") / "prompts.jsonl"
    return write_lines(path, [{"prompt": f"Explain number {index}."} for index in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def uninterrupted(many_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that every killed build must end as: a graph in three shards; read it, never write to it."""
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    build_small(many_prompts, store, config=CONFIG_HNSW)
    return store


def _stage_seconds(server: ForkServer, prompts: Path, store: Path) -> dict[str, float]:
    """How long each stage of one build takes here and now."""
    child = server.start("build-hnsw", store, prompts)
    began = []
    for stage in STAGES:
        assert child.wait_for(stage)
        began.append(time.monotonic())
    assert child.wait() == 0
    ends = [*began[1:], time.monotonic()]
    return {stage: end - start for stage, start, end in zip(STAGES, began, ends, strict=True)}


def _killed_in(server: ForkServer, stage: str, after_seconds: float, prompts: Path, store: Path) -> tuple[int, Child]:
    child = server.start("build-hnsw", store, prompts)
    if child.wait_for(stage):
        time.sleep(after_seconds)
    return child.kill(), child


def _kill_in_every_stage(
    num_stores: int, server: ForkServer, prompts: Path, uninterrupted: Path, folder: Path, tally: Counter
) -> None:
    """Kill builds, each a few times before it may finish; judge every one by the next, and the last by its bytes."""
    reference = snapshot(uninterrupted)
    seconds = _stage_seconds(server, prompts, folder / "timed")
    chance = random.Random(0)
    turns = _turns(chance)
    num_hits = 0
    for _ in range(num_stores):
        store = folder / "store"
        committed: set[tuple[int, int]] = set()
        hits: list[str] = []
        for _ in range(KILLS_IN_A_ROW):
            stage = next(turns)
            # as the stage begins, or at any moment of it and a little later
            after_seconds = chance.choice([0.0, chance.uniform(0, 1.2 * seconds[stage])])
            code, child = _killed_in(server, stage, after_seconds, prompts, store)
            assert code in (0, -signal.SIGKILL), child.lines
            hits += [stage] if code else []
            assert not child.computed & committed, "a committed window was computed again"
            # what a dead writer committed may be more than it lived to say
            now = {(window.start, window.stop) for window in read_journal(store).windows.values()}
            assert now >= committed | child.acknowledged, "an acknowledged window is gone"
            committed = now
        last = server.run("build-hnsw", store, prompts)
        is_lost = last.wait() != 0 or bool(last.computed & committed) or snapshot(store) != reference
        for stage in hits:
            tally(f"SIGKILL at a random moment, {STAGES[stage]}", losses=int(is_lost))
        assert not is_lost, (hits, last.lines)
        num_hits += len(hits)
        shutil.rmtree(store)
    assert num_hits >= num_stores, "most builds ended before they were killed"


def _turns(chance: random.Random) -> Iterator[str]:
    """Stages in a row that a single store can go through: early ones first, each as often as the others."""
    while True:
        yield from sorted(chance.choices(list(STAGES), k=KILLS_IN_A_ROW), key=list(STAGES).index)


def test_builds_killed_in_every_stage_end_as_if_they_never_were(
    fork_server: ForkServer, many_prompts: Path, uninterrupted: Path, tmp_path: Path, tally: Counter
) -> None:
    _kill_in_every_stage(10, fork_server, many_prompts, uninterrupted, tmp_path, tally)


@pytest.mark.faults
def test_five_hundred_builds_killed_in_every_stage_end_as_if_they_never_were(
    fork_server: ForkServer, many_prompts: Path, uninterrupted: Path, tmp_path: Path, tally: Counter
) -> None:
    _kill_in_every_stage(160, fork_server, many_prompts, uninterrupted, tmp_path, tally)


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.faults)])
def test_writers_of_new_weights_killed_at_any_moment_leave_the_old_or_the_new(
    kills: int, fork_server: ForkServer, uninterrupted: Path, tmp_path: Path, tally: Counter
) -> None:
    new_store = Path(shutil.copytree(uninterrupted, tmp_path / "new", symlinks=True))
    recompute_weights(new_store, WeightingConfig(gamma=3))
    old, new = load_weights(uninterrupted), load_weights(new_store)
    chance = random.Random(1)
    hits = 0
    while hits < kills:
        store = Path(shutil.copytree(uninterrupted, tmp_path / "store", symlinks=True))
        child = fork_server.start("weights", store)
        child.wait_for("ready")
        time.sleep(chance.uniform(0, 0.06))
        hit = child.kill() != 0
        found = load_weights(store)
        is_wrong = not any(np.array_equal(found.array, whole.array) for whole in (old, new))
        again = fork_server.run("weights", store)
        is_wrong |= again.wait() != 0 or snapshot(store) != snapshot(new_store)
        if hit:
            hits += 1
            tally("SIGKILL at a random moment, new weights", losses=int(is_wrong))
        assert not is_wrong
        shutil.rmtree(store)


def test_the_lock_of_a_killed_process_is_free(fork_server: ForkServer, many_prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    child = fork_server.start("build", store, many_prompts)
    child.wait_for("committed")
    assert child.kill() == -signal.SIGKILL
    assert f'"pid": {child.pid}' in (store / ".lock").read_text()
    build_small(many_prompts, store)


# --- the real thing: command line, torch, a model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_model("llama"), make_tokenizer())


def _real(prompts: Path, model: Path, store: Path) -> subprocess.Popen[str]:
    small = ["--window-rows", "32", "--chunk-rows", "16", "--threads", "1"]
    command = [sys.executable, "-m", "embstore", "build", str(prompts), "--model", str(model), "--out", str(store)]
    return subprocess.Popen([*command, *small, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_journal(process: subprocess.Popen[str], store: Path) -> None:
    while process.poll() is None and not (store / "journal.jsonl").exists():
        time.sleep(0.005)


@pytest.mark.faults
def test_real_builds_killed_at_random_moments_end_as_if_they_never_were(
    many_prompts: Path, model: Path, tmp_path: Path, tally: Counter
) -> None:
    with _real(many_prompts, model, tmp_path / "whole") as process:
        _wait_for_journal(process, tmp_path / "whole")
        began = time.monotonic()
        output = process.communicate()[0]
    assert process.returncode == 0, output
    seconds = time.monotonic() - began
    reference = snapshot(tmp_path / "whole")
    chance = random.Random(2)
    hits = 0
    while hits < 20:
        store = tmp_path / "store"
        in_a_row = 0
        for _ in range(KILLS_IN_A_ROW):
            with _real(many_prompts, model, store) as process:
                if hits + in_a_row:  # the very first kill may fall anywhere, imports included
                    _wait_for_journal(process, store)
                time.sleep(chance.uniform(0, seconds))
                process.kill()
            in_a_row += process.returncode == -signal.SIGKILL
        with _real(many_prompts, model, store) as process:
            output = process.communicate()[0]
        is_lost = process.returncode != 0 or snapshot(store) != reference or verify(store).findings != []
        hits += in_a_row
        tally("SIGKILL at a random moment, command line with a real model", cycles=in_a_row, losses=in_a_row * is_lost)
        assert not is_lost, output
        shutil.rmtree(store)
