"""What is not the store's: noted by verify, never adopted, never deleted; and places that cannot be written to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.core.config import BuildConfig, WeightingConfig
from embstore.core.errors import CorruptStoreError, ExitCode, IncompleteStoreError, StorageError
from embstore.flow.artifact import recompute_weights
from embstore.flow.stored_weights import drop_weights, list_weights
from embstore.storage.reader import open_store
from embstore.storage.row_files import ROW_FILES
from embstore.training import load_weights
from embstore.views.info import inspect, verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.rot import CHECKED, NAME, readings, served_wrongly, tree_state
from tests.support.stores import (
    NUM_ROWS,
    WINDOWS,
    build_small,
    snapshot,
    whole_tree,
    with_density,
    with_embedding,
    write_lines,
)
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

# foreign files that look like ours, like another program's, or like nothing in particular
STRAYS = [
    "thesis.tex",
    ".x.tmp",
    ".hidden",
    "notes.tmp",
    ".c.3.0.abc.tmp",
    "spec.json.partial",
    "manifest.json~",
    "embeddings.zarr/c.5.0",
    "embeddings.zarr/c.99.0",
    "embeddings.zarr/c.0.1",
    "embeddings.zarr/c.00.0",
    "embeddings.zarr/c.-1.0",
    "embeddings.zarr/c.0.0.1234-5678.partial",
    "embeddings.zarr/.x.tmp",
    "embeddings.zarr/deeper/c.0.0",
    "backup/journal.jsonl",
]
# in the folders whose outdated files every writer removes
AMONG_WEIGHTS = ["weights/mine.npy", "weights/notes.txt", "weights/.x.tmp", "weights/deeper/mine.npy"]
AMONG_NEIGHBORS = ["neighbors/mine.txt", "neighbors/.x.tmp", "neighbors/mine/ids.npy"]
# temp files of a writer that died: .NAME.TOKEN.tmp beside NAME, or of an older version .NAME.PID.tmp
OURS = [
    ".spec.json.999.tmp",
    ".coordinates.npy.09afe1d2.tmp",
    ".manifest.json.424242.tmp",
    ".density_weights.npy.999.tmp",
    "embeddings.zarr/.c.3.0.999.tmp",
    "embeddings.zarr/.zarr.json.7.tmp",
]


def _put(store: Path, names: list[str]) -> None:
    for name in names:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(f"mine: {name}".encode())


def _kept(store: Path, names: list[str]) -> list[str]:
    return [name for name in names if (store / name).is_file() and (store / name).read_bytes() == f"mine: {name}".encode()]


def _noted(store: Path) -> set[str]:
    report = verify(store)
    assert report.findings == []
    return {note.split(" is not a file")[0] for note in report.notes}


def test_strays_in_a_finished_store_are_noted_and_outlive_every_writer(store: Path, small_prompts: Path) -> None:
    expected = readings(store, {name: read for name, read in CHECKED.items() if "name" not in name})
    _put(store, STRAYS + OURS)
    (store / "a link").symlink_to("/etc")
    assert _noted(store) == {*STRAYS, *OURS, "a link"}
    assert _kept(store, STRAYS + OURS) == STRAYS + OURS, "looking removes nothing"
    assert served_wrongly(readings(store, {name: CHECKED[name] for name in expected}), expected) == []
    build_small(small_prompts, store)
    recompute_weights(store, WeightingConfig(gamma=3), name=NAME)
    recompute_weights(store, WeightingConfig(gamma=2))
    verify(store, repair=True)
    assert _kept(store, STRAYS) == STRAYS
    assert _kept(store, OURS) == [], "those of a writer that died are swept"
    assert (store / "a link").is_symlink()
    assert _noted(store) == {*STRAYS, "a link"}


def test_strays_in_an_unfinished_store_are_noted_and_outlive_the_resume(unfinished: Path, finished_store: Path) -> None:
    _put(unfinished, STRAYS + OURS)
    assert _noted(unfinished) == {*STRAYS, *OURS}
    build_small(None, unfinished)
    assert _kept(unfinished, STRAYS) == STRAYS
    assert _kept(unfinished, OURS) == []
    found = snapshot(unfinished)
    assert {name: found[name] for name in found if name not in STRAYS} == snapshot(finished_store)


def test_strays_survive_a_repair_and_what_it_makes_again(store: Path, finished_store: Path) -> None:
    _put(store, STRAYS)
    path = store / "embeddings.zarr" / "c.2.0"
    path.write_bytes(path.read_bytes()[:-1])
    verify(store, repair=True)
    build_small(None, store)
    assert _kept(store, STRAYS) == STRAYS
    found = snapshot(store)
    assert {name: found[name] for name in found if name not in STRAYS} == snapshot(finished_store)


@pytest.mark.parametrize("names", [AMONG_WEIGHTS, AMONG_NEIGHBORS], ids=["weights", "neighbors"])
def test_strays_beside_what_is_removed_when_it_is_outdated_are_never_removed(names: list[str], store: Path) -> None:
    _put(store, names)
    assert _noted(store) == set(names)
    build_small(None, store)
    assert _kept(store, names) == names
    recompute_weights(store, WeightingConfig(gamma=2))
    assert _kept(store, names) == names
    build_small(None, store, config=with_density(seed=7))
    assert _kept(store, names) == names
    drop_weights(store, [each.name for each in list_weights(store) if each.name != "default"])
    assert _kept(store, names) == names
    assert len(list((store / "weights").glob("*.json"))) == 1, "what is dropped is removed all the same"
    assert len([path for path in (store / "neighbors").iterdir() if len(path.name) == 16]) == 1, "and what is outdated"
    assert _noted(store) == set(names)


# --- chunks that nothing commits --------------------------------------------------------------------------------------


def _other_chunks(kind: str, prompts: Path, finished: Path, folder: Path) -> Path:
    """A finished store whose chunk files are valid, and not of the store that they will be put in."""
    if kind == "the same":
        return finished
    config: BuildConfig = CONFIG
    if kind == "other prompts":
        prompts = write_lines(folder / "other.jsonl", [{"prompt": f"another {row}"} for row in range(NUM_ROWS)])
    elif kind == "another codec":
        config = with_embedding(compressor="none")
    else:
        config = with_embedding(chunk_rows=8, window_rows=32)
    build_small(prompts, folder / "other", config=config)
    return folder / "other"


@pytest.mark.parametrize("kind", ["the same", "other prompts", "another codec", "other chunks"])
def test_chunks_that_no_journal_line_vouches_for_are_noted_and_never_adopted(
    kind: str, unfinished: Path, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    """Whole files with valid checksums: they may come from anywhere, so they are computed again, the right ones too."""
    other = _other_chunks(kind, small_prompts, finished_store, tmp_path)
    for index in (2, 3, 4):
        shutil.copyfile(other / "embeddings.zarr" / f"c.{index}.0", unfinished / "embeddings.zarr" / f"c.{index}.0")
    report = verify(unfinished)
    assert report.findings == []
    assert [note.split()[0] for note in report.notes] == [f"embeddings.zarr/c.{index}.0" for index in (2, 3, 4)]
    assert all("not committed" in note for note in report.notes)
    opened = open_store(unfinished, partial=True)
    for row in (32, 50, 69):
        with pytest.raises(IncompleteStoreError):
            opened.rows([opened.ids[row]])
    assert inspect(unfinished).committed_rows == 32
    source = FakeSource()
    build_small(None, unfinished, source=source)
    is_right = snapshot(unfinished) == snapshot(finished_store)
    tally("foreign chunk", losses=not (is_right and source.calls == WINDOWS[1:]))
    assert source.calls == WINDOWS[1:]
    assert is_right


def test_rows_in_the_row_files_that_nothing_commits_are_never_adopted(
    unfinished: Path, finished_store: Path, tally: Counter
) -> None:
    for name in ("coordinates.npy", "residuals.npy", "sequences.npy"):
        content = bytearray((finished_store / name).read_bytes())
        committed = 128 + (len(content) - 128) * 32 // NUM_ROWS
        content[committed:] = b"\x3f" * (len(content) - committed)
        (unfinished / name).write_bytes(content)
    source = FakeSource()
    build_small(None, unfinished, source=source)
    is_right = snapshot(unfinished) == snapshot(finished_store)
    tally("foreign rows", losses=not is_right)
    assert source.calls == WINDOWS[1:]
    assert is_right


@pytest.mark.parametrize(
    "name", ["prompts.jsonl", "ids.json", "line_rows.npy", "basis.npy", "embeddings.zarr/zarr.json", "spec.json"]
)
def test_a_resume_never_builds_on_a_damaged_foundation(name: str, unfinished: Path, small_prompts: Path) -> None:
    content = bytearray((unfinished / name).read_bytes())
    content[len(content) // 2] ^= 1
    (unfinished / name).write_bytes(content)
    before = whole_tree(unfinished)
    source = FakeSource()
    with pytest.raises(CorruptStoreError, match=re.escape(name)):
        build_small(small_prompts, unfinished, source=source)
    assert source.calls == []
    assert whole_tree(unfinished) == before


# --- places that cannot be written to ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _mounted_read_only(folder: Path, at: Path) -> Iterator[Path]:
    """The folder once more, at a place where nothing can be written; skips where that cannot be had."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a read-only mount needs root and mount(8)")
    at.mkdir()
    done = subprocess.run(["mount", "--bind", folder, at], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine allows no bind mount: {done.stderr.strip()}")
    try:
        done = subprocess.run(["mount", "-o", "remount,bind,ro", at], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"this machine allows no read-only bind mount: {done.stderr.strip()}")
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("state", ["store", "unfinished"])
def test_a_store_on_a_read_only_file_system_is_read_and_refused_to_writers(
    state: str, small_prompts: Path, finished_store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root: Path = request.getfixturevalue(state)
    (root / "thesis.tex").write_text("mine")
    before = tree_state(root)
    with _mounted_read_only(root, tmp_path / "mounted") as store:
        report = verify(store)
        assert (report.findings, len(report.notes)) == ([], 1)
        assert report.is_complete == (state == "store")
        assert inspect(store).total_rows == NUM_ROWS
        if state == "store":
            whole = open_store(finished_store)
            assert open_store(store).rows(whole.ids).tobytes() == whole.rows(whole.ids).tobytes()
            assert load_weights(store).array.tobytes() == whole.weights.tobytes()
        for action in (
            lambda: build_small(small_prompts, store),
            lambda: build_small(None, store),
            lambda: verify(store, repair=True),
        ):
            with pytest.raises(StorageError, match=os.strerror(errno.EROFS)) as caught:
                action()
            assert caught.value.exit_code == ExitCode.ERROR, "a resume cannot help"
            assert caught.value.hint == "make the folder writable, or choose another --out"
        with pytest.raises(StorageError, match=os.strerror(errno.EROFS)):
            build_small(small_prompts, store / "new")
    assert tree_state(root) == before
    build_small(small_prompts, root)
    assert {name: digest for name, digest in snapshot(root).items() if name != "thesis.tex"} == snapshot(finished_store)


@pytest.fixture
def modes_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write to anything; here a file without a write bit is refused to it too, as the kernel refuses others."""
    real_open = os.open

    def checked(path: Any, flags: int, *args: Any, **options: Any) -> int:
        is_writing = flags & (os.O_WRONLY | os.O_RDWR)
        file = Path(path)
        if is_writing and "dir_fd" not in options and file.is_file() and not file.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", checked)


@pytest.mark.usefixtures("modes_matter")
@pytest.mark.parametrize("name", [".lock", "coordinates.npy", "residuals.npy", "sequences.npy"])
def test_a_file_that_cannot_be_written_is_named_and_a_resume_goes_on_once_it_can(
    name: str, unfinished: Path, small_prompts: Path, finished_store: Path
) -> None:
    (unfinished / name).chmod(0o444)
    before = whole_tree(unfinished)
    with pytest.raises(StorageError, match=re.escape(name)) as caught:
        build_small(small_prompts, unfinished)
    assert os.strerror(errno.EACCES) in str(caught.value)
    assert caught.value.hint == "make the folder writable, or choose another --out"
    after = whole_tree(unfinished)
    assert {entry for entry in before | after if before.get(entry) != after.get(entry)} <= {
        "embeddings.zarr/c.2.0",  # of the window in flight: nothing commits it
        "embeddings.zarr/c.3.0",
    }
    (unfinished / name).chmod(0o644)
    source = FakeSource()
    build_small(None, unfinished, source=source)
    assert source.calls == WINDOWS[1:]
    assert snapshot(unfinished) == snapshot(finished_store)


@pytest.mark.usefixtures("modes_matter")
def test_files_that_are_only_replaced_may_be_read_only(unfinished: Path, finished_store: Path) -> None:
    """Published files are never opened for writing: a rename takes their place."""
    for path in unfinished.rglob("*"):
        if path.is_file() and path.name not in (".lock", "runs.jsonl", *ROW_FILES):
            path.chmod(0o444)
    build_small(None, unfinished)
    assert snapshot(unfinished) == snapshot(finished_store)
