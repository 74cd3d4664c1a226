"""What a file system or a person does to a running build: an error with the right code, nothing committed lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from embstore.core.errors import (
    BuildInterruptedError,
    ExitCode,
    StorageError,
    StoreExistsError,
)
from embstore.storage.journal import read_journal
from embstore.views.export import export_store
from embstore.views.report.write import write_report
from tests.support.fake import FakeSource
from tests.support.faults import SYNCS, Call, Killed, SystemCalls
from tests.support.power import EXTREMES, Disk
from tests.support.stores import (
    WINDOWS,
    Acknowledged,
    HookedSource,
    Stopped,
    build_small,
    snapshot,
    whole_tree,
)
from tests.support.tally import Counter

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _first_of_a_kind(calls: list[Call]) -> list[int]:
    """Points that fail at different places in the code: temp files of one folder are alike."""
    seen: dict[tuple[str, str], int] = {}
    for point, call in enumerate(calls, start=1):
        folder, _, name = call.path.rpartition("/")
        is_published = name.endswith(".tmp") or call.name == "rename"
        seen.setdefault((call.name, "/".join(folder.split("/")[:2]) if is_published else call.path), point)
    return sorted(seen.values())


def test_a_disk_error_at_any_place_ends_the_build_and_a_resume_finishes_it(
    small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    """Every error at every call, from the kernel, is test_system_calls's; this needs no strace.

    A failed sync loses what it should have written. The power is cut after the resume: nothing that it acknowledged may rest
    on what only the page cache had.
    """
    with SystemCalls(root=tmp_path).watching() as whole:
        build_small(small_prompts, tmp_path / "store")
    points = _first_of_a_kind(whole.calls)
    assert {whole.calls[point - 1].name for point in points} == {call.name for call in whole.calls}
    reference = snapshot(finished_store)
    for number, point in enumerate(points):
        folder = tmp_path / f"disk-{point}"
        folder.mkdir()
        disk, store = Disk(folder), folder / "store"
        acknowledged, source = Acknowledged(), FakeSource()
        code = DISK_ERRORS[number % len(DISK_ERRORS)]
        with SystemCalls(root=folder, fail_at=point, error=code, disk=disk).watching() as calls:
            error = _storage_error(small_prompts, store, acknowledged)
            failed = calls.calls[point - 1]
            if error is None:
                assert failed.path.startswith("store/work"), f"{failed}: only scratch files are not worth failing for"
            else:
                assert error.errno == code
                assert os.strerror(code) in str(error)
                assert str(folder) in str(error)
                assert error.hint is not None
                assert error.exit_code == ExitCode.INCOMPLETE
            if failed.name in SYNCS:  # pages of a failed fsync are marked clean: a second one would lie
                assert failed not in calls.calls[point:], f"{failed} was tried again"
            build_small(small_prompts, store, source=source)
        assert snapshot(store) == reference, failed
        disk.cut(EXTREMES["synced"])
        # scratch files may be back
        assert reference.items() <= snapshot(store).items(), f"{failed}, and a power cut after the resume"
        build_small(None, store)
        assert snapshot(store) == reference, failed
        assert not set(source.calls) & set(acknowledged.windows)
        tally("ENOSPC, EDQUOT or EIO at the n-th call, in process")
        shutil.rmtree(folder)


def _storage_error(prompts: Path, store: Path, acknowledged: Acknowledged) -> StorageError | None:
    try:
        build_small(prompts, store, observer=acknowledged)
    except StorageError as error:
        return error
    return None


def test_a_folder_that_cannot_be_written_is_refused_with_a_hint(small_prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for code in (errno.EROFS, errno.EACCES, errno.EPERM):
        with (
            SystemCalls(root=store, fail_at=1, error=code).watching() as calls,
            pytest.raises(StorageError, match="store") as caught,
        ):
            build_small(small_prompts, store)
        assert calls.calls == [Call("mkdir", ".")]
        assert caught.value.exit_code == ExitCode.ERROR, "there is nothing to resume"
        assert caught.value.hint == "make the folder writable, or choose another --out"
        assert not store.exists()


def test_a_path_below_a_file_is_refused(small_prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises((StorageError, StoreExistsError)) as caught:
            build_small(small_prompts, store)
        assert caught.value.exit_code == ExitCode.ERROR
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_full_disk_while_logging_the_run_is_a_storage_error(
    unfinished: Path, small_prompts: Path, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("embstore.storage.writer.RUNS", "no such folder/runs.jsonl")
        with pytest.raises(StorageError, match=r"runs\.jsonl"):
            build_small(small_prompts, unfinished)
    build_small(small_prompts, unfinished)
    assert snapshot(unfinished) == snapshot(finished_store)


def test_a_signal_during_a_window_commits_it_and_stops(small_prompts: Path, tmp_path: Path, finished_store: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        store = tmp_path / number.name
        source = HookedSource(lambda row, number=number: signal.raise_signal(number) if row == 32 else None)
        with pytest.raises(BuildInterruptedError, match="after committing") as caught:
            build_small(small_prompts, store, source=source)
        assert caught.value.exit_code == ExitCode.INTERRUPTED == 130
        assert "--resume" in str(caught.value.hint)
        assert source.calls == WINDOWS[:2]
        assert [(window.start, window.stop) for window in read_journal(store).windows.values()] == WINDOWS[:2]
        assert not (store / "manifest.json").exists()
        again = FakeSource()
        build_small(None, store, source=again)
        assert again.calls == WINDOWS[2:]
        assert snapshot(store) == snapshot(finished_store)


def test_a_second_signal_abandons_the_window_and_writes_nothing_more(small_prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    before: dict[str, str] = {}

    def twice(row: int) -> None:
        if row == 32:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            before.update(whole_tree(store))

    with pytest.raises(BuildInterruptedError, match="abandoned") as caught:
        build_small(small_prompts, store, source=HookedSource(twice))
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert list(read_journal(store).windows) == [0]
    after = whole_tree(store)
    # the chunk at hand may still land, as nobody's; no commit, no other file
    assert {name for name in after if after[name] != before.get(name)} <= {"embeddings.zarr/c.2.0"}


def test_a_signal_outside_a_window_stops_at_once(small_prompts: Path, tmp_path: Path, finished_store: Path) -> None:
    store = tmp_path / "store"

    def interrupt(event: object) -> None:
        if type(event).__name__ == "Preflight":
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(BuildInterruptedError, match="SIGTERM"):
        build_small(small_prompts, store, observer=interrupt)
    assert not read_journal(store).windows
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)


def test_handlers_for_signals_are_given_back(small_prompts: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    build_small(small_prompts, tmp_path / "store")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_in_the_embedder_publishes_nothing(small_prompts: Path, tmp_path: Path) -> None:
    def stop(row: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        build_small(small_prompts, tmp_path / "store", source=HookedSource(stop))
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert not list((tmp_path / "store").rglob("*.tmp"))


@pytest.mark.parametrize("names", [["thesis.tex"], [".lock", "thesis.tex"], ["weights"]])
def test_a_folder_of_somebody_elses_files_is_never_written_to(names: list[str], small_prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    with pytest.raises(StoreExistsError, match="not empty and is not a store"):
        build_small(small_prompts, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert {path.read_text() for path in folder.iterdir()} == {"mine"}


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b'{"my": "journal"}\n', b"one\ntwo\n"])
def test_a_journal_that_is_not_ours_is_never_cut(content: bytes, small_prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(Exception, match=r"journal\.jsonl") as caught:
        build_small(small_prompts, tmp_path)
    assert caught.value.exit_code == ExitCode.CORRUPT  # type: ignore[attr-defined]
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_a_store_is_not_built_over_without_resume(store: Path, small_prompts: Path) -> None:
    before = whole_tree(store)
    with pytest.raises(StoreExistsError, match="already contains a store") as caught:
        build_small(small_prompts, store, resume=False)
    assert "--resume" in str(caught.value.hint)
    assert whole_tree(store) == before


def test_a_build_outside_the_main_thread_leaves_signals_alone(
    small_prompts: Path, tmp_path: Path, finished_store: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []
    source = HookedSource(lambda row: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=lambda: build_small(small_prompts, tmp_path / "store", source=source))
    thread.start()
    thread.join()
    assert seen == [before] * 5
    assert snapshot(tmp_path / "store") == snapshot(finished_store)


def test_an_export_that_fails_leaves_no_half_file(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with SystemCalls(root=out).watching() as whole:
        paths = export_store(store, out, format="kat")
    expected = {path.name: path.read_bytes() for path in paths}
    for point in range(1, len(whole.calls) + 1):
        out = tmp_path / f"out-{point}"
        with (
            SystemCalls(root=out, fail_at=point, error=errno.ENOSPC).watching(),
            pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)),
        ):
            export_store(store, out, format="kat")
        left = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert left.items() <= expected.items()


@pytest.mark.parametrize(
    "write",
    [
        lambda store, out: export_store(store, out, format="npy"),
        lambda store, out: export_store(store, out, format="kat"),
        lambda store, out: write_report(store, html=out / "report.html"),
    ],
    ids=["export", "export for kat scripts", "report"],
)
def test_what_was_killed_can_be_run_again_by_a_process_with_the_same_id(
    write: Callable[[Path, Path], object], store: Path, tmp_path: Path
) -> None:
    """In a container every run may be process 1."""
    out = tmp_path / "out"
    out.mkdir()
    with SystemCalls(root=out).watching() as calls:
        write(store, out)
    first = [call.name for call in calls.calls].index("rename") + 1
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    out.mkdir()
    with SystemCalls(root=out, fail_at=first).watching(), pytest.raises(Killed):
        write(store, out)
    left = {path.name for path in out.iterdir()}
    assert len(left) == 1, "the temporary file of the first one"
    write(store, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name not in left} == expected
