"""Reading a store's files: regular files only, and what the system refuses to open is not called damaged."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.errors import CorruptStoreError, ExitCode, StorageError, StoreNotFoundError
from embstore.core.files import file_problem, map_array, open_regular, read_committed, read_if_present, storage_errors
from embstore.core.format import FileDigest
from embstore.storage.reader import open_store
from embstore.training import load_weights
from tests.support.stores import NUM_ROWS


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Let the kernel refuse one file, whoever asks for it."""
    for module in (os, io):
        real: Callable[..., Any] = module.open  # type: ignore[attr-defined]

        def refusing(given: Any, *args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if isinstance(given, str | Path) and Path(given) == path:
                raise OSError(code, os.strerror(code), str(given))
            return real(given, *args, **options)

        monkeypatch.setattr(module, "open", refusing)


def read_for_training(store: Path) -> None:
    """Everything that training reads of a store."""
    weights = load_weights(store, expect_keys=np.load(store / "keys.npy"))
    weights.align(["no such id"], on_missing="drop")


def read_for_people(store: Path) -> None:
    """What a reader serves of each file."""
    opened = open_store(store)
    _ = opened.weights, opened.keys, opened.aliases


@pytest.fixture(params=["manifest.json", "weights/*.npy", "weights/*.json", "keys.npy", "aliases.json"])
def file(request: pytest.FixtureRequest, finished_store: Path) -> Path:
    (found,) = finished_store.glob(request.param)
    return found


@pytest.mark.parametrize("read", [read_for_training, read_for_people])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(
    code: int, read: Callable[[Path], None], file: Path, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.load(finished_store / "keys.npy")
    refuse_to_open(monkeypatch, file, code)
    monkeypatch.setattr(np, "load", lambda path: keys)
    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        read(finished_store)
    assert str(file) in str(caught.value)
    assert caught.value.errno == code
    assert caught.value.exit_code != ExitCode.CORRUPT
    assert "verify" not in str(caught.value.hint)


def test_a_bare_file_of_weights_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "w.npy", np.array([0.5, 0.5], dtype=np.float32))
    refuse_to_open(monkeypatch, tmp_path / "w.npy", errno.EMFILE)
    with pytest.warns(UserWarning, match="bare"), pytest.raises(StorageError, match=os.strerror(errno.EMFILE)):
        load_weights(tmp_path / "w.npy")


def test_an_error_of_ours_is_not_taken_for_one_of_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError), storage_errors("reading", tmp_path):
        raise StoreNotFoundError("nothing there")


def test_a_committed_file_that_is_missing_is_damage(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    assert read_committed(tmp_path, "there") == read_if_present(tmp_path, "there") == b"x"
    assert read_if_present(tmp_path, "gone") is None
    with pytest.raises(CorruptStoreError, match="gone is missing"):
        read_committed(tmp_path, "gone")


@pytest.mark.parametrize("name", ["link", "folder/file", "fifo", "folder"])
def test_only_regular_files_of_the_store_itself_are_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CorruptStoreError, match="is a link or not a regular file"):
        open_regular(tmp_path, name)


def test_a_file_without_pread_is_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none."""
    values = np.arange(1 << 20, dtype="<i8")  # one block of reading
    np.save(tmp_path / "a.npy", np.concatenate([values, values]))
    content = (tmp_path / "a.npy").read_bytes()
    monkeypatch.delattr(os, "pread")
    assert read_committed(tmp_path, "a.npy", limit=1 << 30) == content
    assert np.array_equal(map_array(tmp_path, "a.npy"), np.concatenate([values, values]))


def test_a_digest_that_differs_behind_its_first_digits_is_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    found = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # sha256sum of x
    assert file_problem(tmp_path, "file", FileDigest(bytes=1, sha256=found)) is None
    other = found[:-1] + "0"
    assert file_problem(tmp_path, "file", FileDigest(bytes=1, sha256=other)) == (
        f"has sha256 {found}, but committed was {other}"
    )
    assert file_problem(tmp_path, "file", FileDigest(bytes=2, sha256=found)) == "has 1 bytes, but 2 were committed"


@pytest.mark.parametrize(
    ("dtype", "shape", "fits"),
    [
        (None, None, True),
        ("<i4", (NUM_ROWS,), True),
        ("<i4", (None,), True),
        ("<u4", (NUM_ROWS,), False),
        ("<i4", (NUM_ROWS + 1,), False),
        ("<i4", (NUM_ROWS, 1), False),
        ("<i4", (), False),
    ],
)
def test_an_array_is_mapped_only_in_the_shape_asked_for(
    dtype: str | None, shape: tuple[int | None, ...] | None, fits: bool, tmp_path: Path
) -> None:
    values = np.arange(NUM_ROWS, dtype=np.int32)
    np.save(tmp_path / "a.npy", values)
    if fits:
        assert np.array_equal(map_array(tmp_path, "a.npy", dtype, shape), values)
    else:
        with pytest.raises(CorruptStoreError, match=r"a\.npy contains <i4 of shape"):
            map_array(tmp_path, "a.npy", dtype, shape)
