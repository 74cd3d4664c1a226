"""Workers that die, fail, lie elsewhere or dawdle: no committed window is lost or made twice, and nothing hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import embstore
from embstore.core.errors import EngineError, ExitCode
from embstore.core.events import Event, Notice, RowsCommitted, WorkersChanged
from embstore.core.format import WORK
from embstore.engines import dispatch
from embstore.engines.ray import RayEngine
from embstore.storage.journal import read_journal
from embstore.storage.prompt_table import PromptTable
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.ray_session import ray_engine, ray_session, through_ray
from tests.support.stores import WINDOWS, build_small, journal_records, snapshot
from tests.support.tally import Counter
from tests.support.workers import Script, ScriptedSource, Squares

__all__ = ["ray_session"]

pytestmark = pytest.mark.usefixtures("ray_session")
_HANGS_SECONDS = 300.0
ROOT = Path(embstore.__file__).parent.parent


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script")


def build_by_workers(prompts: Path | None, out: Path, script: Script, **options: Any) -> list[Event]:
    events: list[Event] = []
    engine = options.pop("engine", {})
    config = through_ray(options.pop("config", CONFIG), **engine)
    source = options.pop("source", None) or ScriptedSource(script.folder)
    build_small(prompts, out, config=config, source=source, observer=events.append, **options)
    return events


def windows_committed(store: Path) -> list[int]:
    return [record.window for record in journal_records(store) if hasattr(record, "window")]


def last_workers(events: list[Event]) -> WorkersChanged:
    return [event for event in events if isinstance(event, WorkersChanged)][-1]


# --- workers and tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", pytest.param("raise", marks=pytest.mark.slow)])
def test_a_worker_that_dies_or_fails_is_replaced_and_its_window_made_again(
    fault: str, script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    script.at(32, fault)
    store = tmp_path / "store"
    events = build_by_workers(small_prompts, store, script)
    assert [call.start for call in script.calls].count(32) == 2
    assert sorted(windows_committed(store)) == [0, 1, 2]  # each once
    workers = last_workers(events)
    assert (workers.retries, workers.lost) == (1, 1)
    is_wrong = snapshot(store) != snapshot(finished_store) or bool(verify(store).findings)
    tally("a worker killed (SIGKILL) or failing, through Ray", losses=int(is_wrong))
    assert not is_wrong


def test_a_worker_killed_while_it_writes_leaves_nothing_that_is_adopted(
    script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    """Killed with a temp file open and a chunk of its window already in place."""
    store = tmp_path / "store"
    source = ScriptedSource(script.folder)
    source.killed_at_chunk = 1
    events = build_by_workers(small_prompts, store, script, source=source)
    assert last_workers(events).lost == 1
    assert list(store.rglob("*.tmp")) == []
    assert not (store / "work").exists()
    assert sorted(windows_committed(store)) == [0, 1, 2]
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("fault", [pytest.param("kill", marks=pytest.mark.slow), "raise"])
def test_a_window_that_fails_every_time_ends_the_build_and_is_named(
    fault: str, script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    script.at(32, fault, times=3)
    store = tmp_path / "store"
    with pytest.raises(EngineError) as caught:
        build_by_workers(small_prompts, store, script)
    first, last = (prompt.id for prompt in PromptTable(store / "prompts.jsonl", 70).sample([32, 63]))
    assert f"window 1 (rows 32 to 63, prompts {first!r}" in str(caught.value)
    assert f"{last!r}) failed 3 times" in str(caught.value)
    assert "--resume" in str(caught.value.hint)
    assert fault == "kill" or "RuntimeError: the device is out of order" in str(caught.value)
    assert [call.start for call in script.calls].count(32) == 3
    committed = {(window.start, window.stop) for window in read_journal(store).windows.values()}
    again = Script(tmp_path / "again")
    build_by_workers(None, store, again)
    assert {(call.start, call.stop) for call in again.calls} == set(WINDOWS) - committed
    assert snapshot(store) == snapshot(finished_store)


def test_a_slow_worker_keeps_nobody_from_going_on(script: Script, tmp_path: Path) -> None:
    script.at(0, "await 40")  # until the last task has begun
    engine = ray_engine(tmp_path / "shared")
    results = engine.map(
        Squares(script.folder), range(40), check=lambda: None, is_stopping=lambda: False, observer=lambda event: None
    )
    order = [task for task, _ in results]
    assert sorted(order) == list(range(40))
    assert order.index(0) >= 38  # also what was reserved for the slow one went to the other


def test_windows_are_committed_while_one_is_slow(
    script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    script.at(0, "sleep 2")
    store = tmp_path / "store"
    events = build_by_workers(small_prompts, store, script)
    assert [event.start for event in events if isinstance(event, RowsCommitted)][-1] == 0
    assert windows_committed(store)[-1] == 0
    assert snapshot(store) == snapshot(finished_store)


def test_a_task_that_takes_long_is_named_meanwhile(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_SILENT_SECONDS", 0.5)
    script.at(0, "sleep 3")
    events: list[Event] = []
    results = ray_engine(tmp_path / "shared").map(
        Squares(script.folder), [0], check=lambda: None, is_stopping=lambda: False, observer=events.append
    )
    assert [task for task, _ in results] == [0]
    said = [event.message for event in events if isinstance(event, Notice)]
    assert any("no task has finished for 0.5 s; running: number 0 on " in message for message in said)


# --- workers that are no use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, "another store's"])
def test_a_worker_that_does_not_see_the_store_is_refused(
    found: str | None, script: Script, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that mounts another file system under the same path."""
    connect = RayEngine._connect

    def connected(self: RayEngine) -> None:
        connect(self)
        token = self._shared / "token"
        token.unlink()
        if found is not None:
            token.write_text(found)

    monkeypatch.setattr(RayEngine, "_connect", connected)
    with pytest.raises(EngineError, match="does not see the store") as caught:
        build_by_workers(small_prompts, tmp_path / "store", script)
    assert str(tmp_path / "store" / WORK / "engine-") in str(caught.value)
    assert re.search(f"contains {found or 'nothing'} there, [0-9a-f]{{32}} here", str(caught.value))
    assert "every machine mounts under the same path" in str(caught.value.hint)
    assert script.calls == []


def test_a_worker_with_another_embstore_is_refused(
    script: Script, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = embstore.__version__
    monkeypatch.setattr(embstore, "__version__", "99.0")
    with pytest.raises(EngineError, match=rf"has embstore {re.escape(here)}, this process 99\.0"):
        build_by_workers(small_prompts, tmp_path / "store", script)
    assert script.calls == []


def test_a_worker_on_other_hardware_is_refused(script: Script, small_prompts: Path, tmp_path: Path) -> None:
    source = ScriptedSource(script.folder)
    source.wrong_capability_elsewhere = "OTHER"
    with pytest.raises(EngineError, match="capability OTHER here, FAKE in the store's spec"):
        build_by_workers(small_prompts, tmp_path / "store", script, source=source)
    assert script.calls == []


def test_a_worker_with_another_model_is_refused(script: Script, small_prompts: Path, unfinished: Path) -> None:
    source = ScriptedSource(script.folder)
    source.other_weights_elsewhere = True
    with pytest.raises(EngineError, match=r"model\.weights_sha256 xxxx.* here, wwww.* in the store's spec"):
        build_by_workers(None, unfinished, script, source=source)
    assert script.calls == []


def test_where_no_worker_can_start_the_build_says_what_is_missing(
    script: Script, small_prompts: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, embedding=dataclasses.replace(CONFIG.embedding, threads=64))
    with pytest.raises(EngineError, match=r"no worker could start within 2 s: each needs 64 CPUs; 4 CPUs"):
        build_by_workers(small_prompts, tmp_path / "store", script, config=config, engine={"start_seconds": 2})
    assert script.calls == []


def test_workers_that_die_where_they_start_end_the_build(script: Script, small_prompts: Path, tmp_path: Path) -> None:
    source = ScriptedSource(script.folder)
    source.dies_elsewhere = True
    with pytest.raises(EngineError, match="3 workers in a row could not start"):
        build_by_workers(small_prompts, tmp_path / "store", script, source=source)


# --- the driver ------------------------------------------------------------------------------------------------------

DRIVER = """
    import sys
    from pathlib import Path
    from embstore.core.errors import EmbstoreError
    from tests.support.ray_session import through_ray
    from tests.support.stores import build_small
    from tests.support.workers import ScriptedSource
    if __name__ == "__main__":
        try:
            build_small(Path(sys.argv[1]), Path(sys.argv[2]), config=through_ray(), source=ScriptedSource(Path(sys.argv[3])))
        except EmbstoreError as error:
            print(error)
            sys.exit(int(error.exit_code))
"""


@contextlib.contextmanager
def driver(prompts: Path, store: Path, script: Script) -> Iterator[subprocess.Popen[str]]:
    """A build with a Ray of its own, in a process group of its own as a shell's job is."""
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(prompts), str(store), str(script.folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        process_group=0,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + _HANGS_SECONDS
    while not condition():
        assert time.monotonic() < limit, "it hangs"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_driver_that_is_killed_takes_its_workers_along_and_is_resumed(
    script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    store = tmp_path / "store"
    script.at(64, "sleep 600").at(32, "sleep 1.5")
    with driver(small_prompts, store, script) as process:
        wait_until(lambda: (store / "journal.jsonl").exists() and 0 in read_journal(store).windows)
        wait_until(lambda: {64} <= {call.start for call in script.calls})
        process.kill()
        process.wait()
        committed = {(window.start, window.stop) for window in read_journal(store).windows.values()}
        workers = {call.pid for call in script.calls}
        wait_until(lambda: not any(is_alive(pid) for pid in workers))
    again = Script(tmp_path / "again")
    build_small(None, store, config=dataclasses.replace(CONFIG, trust_journal=False), source=ScriptedSource(again.folder))
    assert {(call.start, call.stop) for call in again.calls} == set(WINDOWS) - committed
    assert list(store.rglob("*.tmp")) == []
    is_wrong = snapshot(store) != snapshot(finished_store)
    tally("the driver killed (SIGKILL) while workers compute, through Ray", losses=int(is_wrong))
    assert not is_wrong


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_lets_windows_under_way_finish_and_ends_the_workers(
    number: signal.Signals, script: Script, small_prompts: Path, finished_store: Path, tmp_path: Path
) -> None:
    """SIGINT as a terminal sends it: to every process of the job."""
    store = tmp_path / "store"
    script.at(0, "sleep 2").at(32, "sleep 2").at(64, "sleep 2")
    with driver(small_prompts, store, script) as process:
        wait_until(lambda: len(script.calls) == 2)
        time.sleep(0.3)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=_HANGS_SECONDS)
    assert process.returncode == ExitCode.INTERRUPTED, output
    assert output == "stopped after committing the window in flight\n"  # and no word of Ray's
    begun = {(call.start, call.stop) for call in script.calls}
    assert len(begun) == 2
    assert {(window.start, window.stop) for window in read_journal(store).windows.values()} == begun
    wait_until(lambda: not any(is_alive(call.pid) for call in script.calls))
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)
