"""SIGINT and SIGTERM: the window in flight is committed, or abandoned at a second one; nothing is written afterwards."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.errors import BuildInterruptedError, ExitCode
from embstore.core.prompts import Prompt
from embstore.host.signals import StopSignals
from embstore.storage.journal import read_journal
from embstore.views.info import verify
from tests.support.fake import FakeEmbedder, FakeSource, RowBlock
from tests.support.fork_server import ForkServer
from tests.support.stores import WINDOWS, HookedSource, build_small, snapshot, whole_tree, write_lines
from tests.support.tally import Counter

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "prompts.jsonl"
    return write_lines(path, [{"prompt": f"Explain number {index}."} for index in range(400)])


@pytest.mark.parametrize("cycles", [16, pytest.param(120, marks=pytest.mark.faults)])
def test_builds_signalled_at_any_moment_stop_cleanly_and_resume(
    cycles: int, fork_server: ForkServer, many_prompts: Path, tmp_path: Path, tally: Counter
) -> None:
    reference = tmp_path / "whole"
    build_small(many_prompts, reference)
    chance = random.Random(0)
    stopped = 0
    while stopped < cycles:
        store = tmp_path / "store"
        child = fork_server.start("build", store, many_prompts)
        # handlers are in place once work began: before that there is nothing to stop cleanly
        child.wait_for(chance.choice(["computing", "computing 192", "stage knn", "stage publish"]))
        time.sleep(chance.uniform(0, 0.03))
        for _ in range(chance.choice([1, 2])):
            child.signal(chance.choice(SIGNALS))
            time.sleep(chance.uniform(0, 0.002))
        code = child.wait()
        # build() gives the handlers back: a second signal may then end the process as it would any other
        by_default = code == -signal.SIGTERM or child.lines[-1] == "traceback KeyboardInterrupt()"
        assert code in (0, ExitCode.INTERRUPTED) or by_default, child.lines
        committed = {(window.start, window.stop) for window in read_journal(store).windows.values()}
        wrong = ["lost a window"] if not committed >= child.acknowledged else []
        wrong += [finding.message for finding in verify(store).findings]
        again = fork_server.run("build", store, many_prompts)
        wrong += ["computed a committed window again"] if again.computed & committed else []
        wrong += ["other bytes"] if snapshot(store) != snapshot(reference) else []
        if code:
            stopped += 1
            tally("SIGINT or SIGTERM, once or twice", losses=int(bool(wrong)))
        assert wrong == [], child.lines
        shutil.rmtree(store)


@pytest.mark.parametrize("cycles", [4, pytest.param(60, marks=pytest.mark.faults)])
def test_the_command_line_ends_as_interrupted_however_many_signals_come(
    cycles: int, many_prompts: Path, tmp_path: Path, tally: Counter
) -> None:
    program = """
        import sys
        from embstore import cli
        from embstore.flow import first_checks
        from tests.support.fake import FakeSource
        first_checks.find_source = lambda *arguments: FakeSource()
        sys.argv = ["embstore", "build", sys.argv[1], "--model", "fake", "--out", sys.argv[2], "--chunk-rows", "16",
                    "--window-rows", "32", "--knn", "exact", "--resume"]
        cli.main()
    """
    store = tmp_path / "store"
    chance = random.Random(3)
    stopped = 0
    while stopped < cycles:
        command = [sys.executable, "-c", textwrap.dedent(program), str(many_prompts), str(store)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            # before it has the lock it is still importing, and has nothing to end well
            while process.poll() is None and not _has_lock(process.pid, store):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            for _ in range(chance.choice([1, 2, 3])):
                process.send_signal(chance.choice(SIGNALS))
                time.sleep(chance.uniform(0, 0.002))
            output = "".join(process.communicate())
        if output.startswith("complete"):  # too late: the report was out, the process was leaving
            shutil.rmtree(store)
        else:
            is_wrong = process.returncode != ExitCode.INTERRUPTED or "Traceback" in output
            stopped += 1
            tally("SIGINT and SIGTERM, up to three, at the command line", losses=int(is_wrong))
            assert not is_wrong, output


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_code_that_turns_the_interruption_into_its_own_error_does_not_hide_it(is_swallowed: bool) -> None:
    # pybind11 answers a signal during an extension's import with ImportError("initialization failed")
    def answer() -> None:
        with StopSignals() as stop:
            try:
                signal.raise_signal(signal.SIGTERM)
            except BuildInterruptedError as error:
                if not is_swallowed:
                    raise ImportError("initialization failed") from error
            with stop.deferred():
                pytest.fail("a window was begun after the signal")

    with pytest.raises(BuildInterruptedError, match="SIGTERM"):
        answer()


def _has_lock(pid: int, store: Path) -> bool:
    lock = store / ".lock"
    return lock.exists() and f'"pid": {pid},' in lock.read_text()


class OwnBuffers(FakeSource):
    """Its embedder remembers the memory of the blocks it gave, to spoil it later; with ``one`` it is always the same."""

    def __init__(self, *, one: bool = False) -> None:
        super().__init__()
        self.one = one
        self.buffers: list[np.ndarray] = []

    def _hook(self, embedder: FakeEmbedder) -> FakeEmbedder:
        compute = embedder._block

        def block(prompts: Sequence[Prompt], first_row: int) -> RowBlock:
            found = compute(prompts, first_row)
            if not (self.one and self.buffers):
                self.buffers.append(np.empty((16, 64), dtype=np.float16))
            buffer_BV = self.buffers[-1][: len(prompts)]
            buffer_BV[:] = found.emb_BV
            return dataclasses.replace(found, emb_BV=buffer_BV)

        embedder._block = block  # type: ignore[method-assign]
        return embedder

    def create(self, *given: object, **options: object) -> FakeEmbedder:
        return self._hook(super().create(*given, **options))  # type: ignore[arg-type]

    def reopen(self, *given: object, **options: object) -> FakeEmbedder:
        return self._hook(super().reopen(*given, **options))  # type: ignore[arg-type]


def test_an_embedder_that_reuses_its_buffer_is_refused_and_none_of_its_rows_committed(
    small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    """Chunks are encoded while the next one is computed: rows that change meanwhile would be stored as others."""
    store = tmp_path / "store"
    with pytest.raises(AssertionError, match="chunk 1 shares memory with a block that is not written yet"):
        build_small(small_prompts, store, source=OwnBuffers(one=True))
    assert not read_journal(store).windows
    build_small(None, store, source=OwnBuffers())
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("signals", [1, 2])
def test_what_a_caller_does_to_its_buffer_after_an_interrupt_reaches_no_file(
    signals: int, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    """A store that writes on behind the caller's back would take up the spoiled values (zarr-python does)."""
    store = tmp_path / "store"
    source = OwnBuffers()
    inner = FakeEmbedder.embed

    def embed(self: FakeEmbedder, prompts: Sequence[Prompt], *, first_row: int, **more: Any) -> Iterator[RowBlock]:
        for block in inner(self, prompts, first_row=first_row, **more):
            if first_row == 32:
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)
            yield block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEmbedder, "embed", embed)
        with pytest.raises(BuildInterruptedError):
            build_small(small_prompts, store, source=source)
    after = whole_tree(store)
    for buffer_BV in source.buffers:
        buffer_BV[:] = 7.0
    time.sleep(0.2)
    assert whole_tree(store) == after, "something was written after the exception reached the caller"
    assert len(read_journal(store).windows) == (2 if signals == 1 else 1)
    again = FakeSource()
    build_small(None, store, source=again)
    assert again.calls == WINDOWS[2 if signals == 1 else 1 :]
    assert snapshot(store) == snapshot(finished_store)


def test_a_signal_between_the_last_row_and_the_manifest_is_resumed_without_the_model(
    small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    for number in SIGNALS:
        store = tmp_path / number.name

        def interrupt(event: object, number: signal.Signals = number) -> None:
            if getattr(event, "stage", "") == "publish":
                signal.raise_signal(number)

        with pytest.raises(BuildInterruptedError, match=number.name):
            build_small(small_prompts, store, observer=interrupt)
        assert not (store / "manifest.json").exists()
        source = HookedSource(lambda row: pytest.fail("a committed row is computed again"))
        build_small(None, store, source=source)
        assert snapshot(store) == snapshot(finished_store)
