"""Durable files and the lock: published whole or not at all, synced once, held by one writer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embstore.core.errors import ExitCode, StorageError, StoreLockedError
from embstore.core.files import TEMP_NAME
from embstore.storage.atomic import (
    DurableFile,
    WriterLock,
    make_directory,
    pwrite_all,
    remove_temp_files,
    replace_link,
    write_all,
    write_durable,
)
from tests.support.faults import Call, SystemCalls
from tests.support.stores import Stopped

SIZES = [0, 1, 1000, (1 << 20) - 1, 1 << 20, 5]  # below, at and above the buffer


def test_a_file_appears_complete_with_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    pieces = [os.urandom(size) for size in SIZES]
    with DurableFile(path) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
            assert not path.exists()
    whole = b"".join(pieces)
    assert path.read_bytes() == whole
    assert (file.digest.bytes, file.digest.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert list(tmp_path.iterdir()) == [path]


def test_a_caller_may_reuse_its_buffer_after_each_write(tmp_path: Path) -> None:
    buffer = bytearray(b"first")
    with DurableFile(tmp_path / "file") as file:
        file.write(buffer)
        buffer[:] = b"wrong"
    assert (tmp_path / "file").read_bytes() == b"first"


@pytest.mark.parametrize("size", SIZES)
def test_an_exception_leaves_no_trace_and_the_old_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def stopped() -> None:
        with DurableFile(path) as file:
            file.write(bytes(size))
            raise Stopped

    with pytest.raises(Stopped):
        stopped()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_or_the_new_file_and_never_a_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durable(path, b"old" * 1000)
    with path.open("rb") as reader:
        write_durable(path, b"new" * 1000)
        assert reader.read() == b"old" * 1000
    assert path.read_bytes() == b"new" * 1000


def test_a_file_is_synced_before_its_rename_and_its_folder_after(tmp_path: Path) -> None:
    with SystemCalls(root=tmp_path).watching() as calls:
        write_durable(tmp_path / "file", b"x" * (3 << 20))
    temp = calls.calls[0].path
    assert TEMP_NAME.fullmatch(temp)
    assert calls.calls == [
        Call("open", temp),
        Call("write", temp),
        Call("fsync", temp),
        Call("rename", "file"),
        Call("fsync", "."),
    ]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_fsync_is_never_tried_again_and_publishes_nothing(code: int, tmp_path: Path) -> None:
    """Linux marks the pages of a failed fsync clean: a second one would succeed and lie."""
    with (
        SystemCalls(root=tmp_path, fail_at=3, error=code).watching() as calls,
        pytest.raises(StorageError, match=f"file failed: {os.strerror(code)}") as caught,
    ):
        write_durable(tmp_path / "file", b"x")
    assert [call.name for call in calls.calls] == ["open", "write", "fsync", "unlink"]
    assert list(tmp_path.iterdir()) == []
    assert caught.value.errno == code
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert ("space" in str(caught.value.hint)) == (code != errno.EIO)


def test_short_writes_of_the_kernel_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda handle, data: real_write(handle, data[:7]))
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real_pwrite(handle, data[:7], offset))
    data = os.urandom(100)
    handle = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    write_all(handle, data)
    pwrite_all(handle, data[::-1], 50)
    os.close(handle)
    assert (tmp_path / "file").read_bytes() == data[:50] + data[::-1]


def test_new_folders_are_durable_in_their_parents(tmp_path: Path) -> None:
    with SystemCalls(root=tmp_path).watching() as calls:
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b", resync=True)
    made = [Call("mkdir", "a"), Call("fsync", "."), Call("mkdir", "a/b"), Call("fsync", "a")]
    assert calls.calls == [*made, Call("fsync", "a")], "who finds a folder cannot know that its maker lived to sync it"


def test_a_link_is_replaced_at_once_and_left_alone_when_right(tmp_path: Path) -> None:
    link = tmp_path / "link"
    assert replace_link(link, "old")
    assert replace_link(link, "new")
    assert str(link.readlink()) == "new"
    with SystemCalls(root=tmp_path).watching() as calls:
        assert not replace_link(link, "new")
    assert calls.calls == []
    assert list(tmp_path.iterdir()) == [link]


def test_only_temp_files_are_leftovers(tmp_path: Path) -> None:
    for name in (".lock", "x.tmp", ".hidden", ".a.npy.77.tmp", ".a.npy.0c4f81d2.tmp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".link.77.tmp").symlink_to("nowhere")
    remove_temp_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".lock", "x.tmp"]


def test_a_second_opener_is_refused_with_the_holders_pid_and_host(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = WriterLock(path)
    with pytest.raises(StoreLockedError) as caught:
        WriterLock(path)
    assert caught.value.exit_code == ExitCode.LOCKED
    assert f'"pid": {os.getpid()}' in str(caught.value)
    assert socket.gethostname() in str(caught.value)
    held.release()
    WriterLock(path).release()
    assert path.exists(), "an unlinked lock could be held twice"


@pytest.mark.parametrize("content", [b"", b"\xff not JSON", b'{"pid": 1, "host": "elsewhere"}' * 400])
def test_what_a_lock_file_says_decides_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(content)
    lock = WriterLock(path)
    assert json.loads(path.read_bytes())["pid"] == os.getpid()
    path.write_bytes(content)
    with pytest.raises(StoreLockedError):
        WriterLock(path)
    lock.release()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(StoreLockedError, match="cannot lock files") as caught:
        WriterLock(tmp_path / ".lock")
    assert "local disk" in str(caught.value.hint)


def test_the_lock_of_a_killed_holder_is_free_although_its_child_lives(tmp_path: Path) -> None:
    """A holder starts helpers; one that outlives it must not keep the store locked."""
    path = tmp_path / ".lock"
    program = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from embstore.storage.atomic import WriterLock\n"
        "lock = WriterLock(Path(sys.argv[1]))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0, close_fds=False)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(StoreLockedError, match=f'"pid": {holder.pid}'):
            WriterLock(path)
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        os.kill(child, 0)  # it is alive
        WriterLock(path).release()
        os.kill(child, signal.SIGKILL)
