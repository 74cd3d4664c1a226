"""Stores in folders of teams and of other systems: modes, links and syncs that are refused, errors that are not damage."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from embstore.core.config import WeightingConfig
from embstore.core.errors import ExitCode, StorageError
from embstore.core.events import Event, Notice
from embstore.core.files import fsync_directory
from embstore.core.format import METADATA_LINK, WEIGHTS_LINK
from embstore.flow.artifact import recompute_weights
from embstore.training import DensitySampler, load_weights
from embstore.training.file_resampling import resample_file
from embstore.views.export import export_store
from embstore.views.info import inspect, verify
from embstore.views.report.write import write_report
from embstore.views.terminal import print_info
from tests.support.stores import build_small, snapshot

LINKS = (WEIGHTS_LINK, METADATA_LINK)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


# --- modes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_the_umask_decides_who_may_write(
    mask: int, umask: Callable[[int], object], small_prompts: Path, tmp_path: Path
) -> None:
    """As it does for every program: a team's folder works under umask 002."""
    umask(mask)
    (tmp_path / "own").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    expected = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("own", "folder")}
    store = tmp_path / "store"
    build_small(small_prompts, store)
    recompute_weights(store, WeightingConfig(gamma=3))
    export_store(store, tmp_path / "out", format="npy")
    write_report(store, html=tmp_path / "report.html")
    resample_file(store, small_prompts, tmp_path / "copy.jsonl", num_samples=5, on_missing="drop")
    made = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert {"journal.jsonl", ".lock", "runs.jsonl", "coordinates.npy", "c.0.0"} <= {path.name for path in made}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == expected


# --- no symbolic links ----------------------------------------------------------------------------------------------------


def _refuse(code: int) -> Callable[..., object]:
    def refused(*args: object, **options: object) -> object:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("code", NO_LINKS)
def test_without_symbolic_links_everything_works(
    code: int, small_prompts: Path, tmp_path: Path, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(os, "symlink", _refuse(code))
    build_small(small_prompts, store)
    for _ in range(2):
        loaded = load_weights(store)
        assert np.load(store / WEIGHTS_LINK).tobytes() == loaded.array.tobytes()
        assert (store / METADATA_LINK).read_bytes() == loaded.path.with_suffix(".json").read_bytes()
        report = verify(store)
        assert report.findings == []
        assert [note.split()[:4] for note in report.notes] == [[name, "is", "a", "copy"] for name in LINKS]
        before = {name: (store / name).stat().st_ino for name in LINKS}
        verify(store, repair=True)
        assert {name: (store / name).stat().st_ino for name in LINKS} == before, "a copy that is right is not made again"
        recompute_weights(store, WeightingConfig(gamma=3))
    assert loaded.array.tobytes() != load_weights(finished_store).array.tobytes()
    build_small(None, store)
    assert (store / WEIGHTS_LINK).read_bytes() == (finished_store / WEIGHTS_LINK).read_bytes()


def test_a_store_that_was_copied_without_links_is_sound_and_gets_them_back(store: Path, tmp_path: Path) -> None:
    followed = Path(shutil.copytree(store, tmp_path / "cp -rL"))
    dropped = Path(shutil.copytree(store, tmp_path / "bucket"))
    for name in LINKS:
        (dropped / name).unlink()
    for copy, says in ((followed, "is a copy of weights/"), (dropped, "is missing")):
        report = verify(copy)
        assert report.findings == []
        assert [note.startswith(f"{name} {says}") for name, note in zip(LINKS, report.notes, strict=True)] == [True] * 2
        assert load_weights(copy).array.tobytes() == load_weights(store).array.tobytes()
        build_small(None, copy)
        assert snapshot(copy) == snapshot(store)


def test_a_file_of_other_weights_in_place_of_a_link_is_found(store: Path) -> None:
    content = (store / WEIGHTS_LINK).read_bytes()
    (store / WEIGHTS_LINK).unlink()
    (store / WEIGHTS_LINK).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [finding.path for finding in verify(store).findings] == [WEIGHTS_LINK]


# --- no sync of folders ------------------------------------------------------------------------------------------------


def _refuse_folders(patch: pytest.MonkeyPatch, code: int) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", NO_FOLDER_SYNC)
def test_where_folders_cannot_be_synced_a_build_says_so_and_inspect_knows(
    code: int, small_prompts: Path, tmp_path: Path, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        _refuse_folders(patch, code)
        build_small(small_prompts, store, observer=events.append)
    said = [event.message for event in events if isinstance(event, Notice) and "cannot sync folders" in event.message]
    assert len(said) == 1
    assert snapshot(store) == snapshot(finished_store)
    assert verify(store).findings == []
    assert not inspect(store).survives_power_cuts
    assert inspect(finished_store).survives_power_cuts
    for path, is_noted in ((store, True), (finished_store, False)):
        console = Console(width=300, record=True, quiet=True)
        console.quiet = False
        with console.capture() as shown:
            print_info(console, inspect(path))
        assert ("cannot sync folders: a power cut" in shown.get()) == is_noted


def test_other_errors_of_a_folder_s_sync_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fsync_directory(tmp_path)
    _refuse_folders(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match="syncing folder"):
        fsync_directory(tmp_path)


def test_new_weights_where_folders_cannot_be_synced_are_recorded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_folders(monkeypatch, errno.EINVAL)
    recompute_weights(store, WeightingConfig(gamma=3))
    assert not inspect(store).survives_power_cuts


# --- what is not damage -------------------------------------------------------------------------------------------------


class Failing:
    """The n-th call of the system on files of a store fails."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.fail_at, self.code, self.count = str(root), 0, 0, 0
        for module, name in (
            (os, "open"),
            (io, "open"),
            (os, "stat"),
            (os, "lstat"),
            (os, "fstat"),
            (os, "pread"),
            (mmap, "mmap"),
        ):
            patch.setattr(module, name, self._wrapped(getattr(module, name), name in ("open", "stat", "lstat")))

    def _wrapped(self, real: Callable[..., Any], by_path: bool) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **options: Any) -> Any:
            if self.fail_at and (not by_path or str(first).startswith(self.root)):
                self.count += 1
                if self.count == self.fail_at:
                    raise OSError(self.code, os.strerror(self.code))
            return real(first, *args, **options)

        return call


TRAINING: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "weights": lambda store, item: load_weights(store),
    "keys": lambda store, item: load_weights(store, expect_keys=np.load(store / "keys.npy")),
    "join": lambda store, item: load_weights(store).for_dataset([item]),
    "ids": lambda store, item: load_weights(store).for_dataset([item], id_column="id"),
    "pickle": lambda store, item: pickle.loads(pickle.dumps(load_weights(store))),
    "sampler": lambda store, item: DensitySampler(load_weights(store), positional=True),
}


@pytest.mark.parametrize("start", TRAINING)
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_training_takes_no_error_of_the_system_for_damage(
    start: str, code: int, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = json.loads((finished_store / "prompts.jsonl").read_text().splitlines()[0])
    with monkeypatch.context() as patch:
        failing = Failing(finished_store, patch)
        failing.fail_at = 1 << 30
        TRAINING[start](finished_store, item)
    assert failing.count > 5
    for point in range(1, failing.count + 1):
        with monkeypatch.context() as patch:
            failing = Failing(finished_store, patch)
            failing.fail_at, failing.code = point, code
            with pytest.raises(StorageError, match=re.escape(os.strerror(code))) as caught:
                TRAINING[start](finished_store, item)
        assert caught.value.exit_code != ExitCode.CORRUPT
        assert caught.value.errno == code
        assert "verify" not in str(caught.value.hint)
