"""Writes past the page cache: the same bytes on every file system, whatever it says of such writes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embstore.core.errors import StorageError
from embstore.storage.atomic import DurableFile
from embstore.storage.direct import DirectBuffer

O_DIRECT = getattr(os, "O_DIRECT", 0)
PART = 4 << 20
SIZES = [0, 1, 4095, 4096, 4097, PART - 1, PART, PART + 1, 2 * PART + 12_345]

needs_direct = pytest.mark.skipif(not O_DIRECT, reason="this system has no O_DIRECT")


def written(path: Path, content: bytes, buffer: DirectBuffer) -> None:
    """Write in odd pieces."""
    with DurableFile(path, sha256=False, direct=buffer) as file:
        for start in range(0, len(content), 1_000_003):
            file.write(content[start : start + 1_000_003])


def test_files_of_every_length_one_after_the_other_from_one_buffer(tmp_path: Path) -> None:
    buffer = DirectBuffer()
    for size in [*SIZES, *reversed(SIZES)]:
        content = os.urandom(size)
        written(tmp_path / "file", content, buffer)
        assert (tmp_path / "file").read_bytes() == content, size
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_direct
def test_writes_are_direct_where_the_file_system_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_direct(tmp_path):
        pytest.skip(f"the file system of {tmp_path} takes no direct writes")
    flags: list[int] = []
    real = os.write
    monkeypatch.setattr(
        os, "write", lambda handle, data: flags.append(fcntl.fcntl(handle, fcntl.F_GETFL)) or real(handle, data)
    )
    written(tmp_path / "file", os.urandom(PART + 5), DirectBuffer())
    assert len(flags) == 2
    assert all(flag & O_DIRECT for flag in flags)


@needs_direct
def test_a_file_system_that_refuses_to_open_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        handle = real(path, flags & ~O_DIRECT, *args, **options)
        if not flags & O_DIRECT:
            return handle
        os.close(handle)  # Linux has made the file by then
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))

    monkeypatch.setattr(os, "open", refusing)
    content = os.urandom(PART + 5)
    written(tmp_path / "file", content, DirectBuffer())
    assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_direct
def test_a_file_system_that_refuses_a_write_gets_it_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", failing(os.write, errno.EINVAL, while_direct=True))
    content = os.urandom(PART + 5)
    written(tmp_path / "file", content, DirectBuffer())
    assert (tmp_path / "file").read_bytes() == content


@needs_direct
@pytest.mark.parametrize("taken", [100, 4096, 6000])
def test_what_the_kernel_takes_in_part_is_completed(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_direct(tmp_path):
        pytest.skip(f"the file system of {tmp_path} takes no direct writes")
    real = os.write
    calls = 0

    def partial(handle: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls != 1:
            return real(handle, data)
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~O_DIRECT)
        count = real(handle, data[:taken])
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
        return count

    monkeypatch.setattr(os, "write", partial)
    content = os.urandom(PART + 5)
    written(tmp_path / "file", content, DirectBuffer())
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_a_storage_error_and_leaves_no_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", failing(os.write, number, while_direct=False))
    with pytest.raises(StorageError) as caught:
        written(tmp_path / "file", os.urandom(PART + 5), DirectBuffer())
    assert os.strerror(number) in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_invalid_write_through_the_cache_is_an_error_not_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", failing(os.write, errno.EINVAL, while_direct=False))
    with pytest.raises(StorageError, match=os.strerror(errno.EINVAL)):
        written(tmp_path / "file", b"content", DirectBuffer())


def takes_direct(folder: Path) -> bool:
    """Whether the file system takes direct writes."""
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | O_DIRECT, 0o644))
    except OSError:
        return False
    finally:
        (folder / "probe").unlink(missing_ok=True)
    return True


def failing(real: Callable[[int, Any], int], number: int, *, while_direct: bool) -> Callable[[int, Any], int]:
    """``os.write`` that fails on files; ``while_direct``: as long as they are written past the cache."""

    def write(handle: int, data: Any) -> int:
        is_direct = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & O_DIRECT)
        if not while_direct or is_direct:
            raise OSError(number, os.strerror(number))
        return real(handle, data)

    return write
