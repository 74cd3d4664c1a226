"""Durable files, directories and the writer lock: the only module that syncs, renames or locks.

Every published file goes temp -> write -> fsync -> rename -> fsync(directory). A failed fsync is never retried on the same
file: Linux marks the pages clean, so a second fsync would report success for data that was never written. Temp files are
named ``.<target>.<token>.tmp`` in the target's folder; once the writer of a store is gone, the next one deletes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError, StorageError, StoreLockedError
from embstore.core.files import TEMP_NAME, Buffer, array_header, fsync_directory, read_blocks, storage_errors, temp_path
from embstore.core.format import FileDigest
from embstore.storage.direct import DirectBuffer, drop_cache, open_direct

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS)  # the last one: VirtualBox
_BUFFER_BYTES = 1 << 20  # rows of a JSONL file are small: one write per MiB, not one per row


def make_directory(path: Path, *, opening: bool = False, resync: bool = False) -> None:
    """Create ``path`` and missing parents, each made durable in its own parent.

    A writer that died may have created a folder without syncing its name. ``resync`` syncs the name of ``path`` if it exists
    already, ``opening`` that of the last folder that does. For the files at the root of a store, the journal does this.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with storage_errors("creating folder", folder, opening=opening):
            folder.mkdir(exist_ok=True)  # another writer may be first here, and then has the lock
        fsync_directory(folder.parent)
    if opening or (resync and not missing):
        existing = missing[-1].parent if missing else path
        try:
            fsync_directory(existing.parent)
        except StorageError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):  # a folder that we may not open was not created by us
                raise


def write_all(handle: int, data: Buffer) -> None:
    """Write every byte; one call may write fewer than it was given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(handle, view) :]


def sync_data(handle: int) -> None:
    """Fdatasync where the platform has it (macOS has only fsync); never retried."""
    getattr(os, "fdatasync", os.fsync)(handle)


def pwrite_all(handle: int, data: Buffer, offset: int) -> None:
    """Write every byte at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


class DurableFile:
    """A new file that appears under its name complete and synced, or not at all.

    Use it as a context manager: leaving it normally publishes the file, an exception deletes it. ``digest`` is valid
    afterwards. ``sync_directory=False`` leaves the fsync of the directory to the caller, who may group many renames under
    one. ``direct`` writes past the page cache where the file system can, for large files that nobody is about to read. The
    temp file is in ``folder``, which must be on the same file system (default: the target's folder); if that folder is
    removed, the file can no longer be published.
    """

    def __init__(
        self,
        path: Path,
        *,
        sync_directory: bool = True,
        sha256: bool = True,
        direct: DirectBuffer | None = None,
        folder: Path | None = None,
    ) -> None:
        self._path = path
        self._temp = temp_path(path, folder)
        self._sync_directory = sync_directory
        self._direct = direct
        self._leaves_cache = direct is not None
        self._sha256 = hashlib.sha256() if sha256 else None
        self._size = 0
        self._pending = bytearray()
        self._handle = -1

    def __enter__(self) -> Self:
        with storage_errors("creating", self._path):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            if self._direct is None:
                self._handle = os.open(self._temp, flags, 0o666)
            else:
                self._handle, is_direct = open_direct(self._temp, flags, 0o666)
                if is_direct:
                    self._direct.begin(self._handle)
                else:
                    self._direct = None
        return self

    def write(self, data: Buffer) -> int:
        """Append bytes (also the interface ``numpy.lib.format`` writes to)."""
        size = memoryview(data).nbytes
        self._size += size
        if self._sha256 is not None:
            self._sha256.update(data)
        if self._direct is not None:
            with storage_errors("writing", self._path):
                self._direct.write(data)
        elif size < _BUFFER_BYTES:
            self._pending += data
            if len(self._pending) >= _BUFFER_BYTES:
                self._flush()
        else:
            self._flush()
            with storage_errors("writing", self._path):
                write_all(self._handle, data)
        return size

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of what was written."""
        if self._sha256 is None:
            raise AssertionError("this file was opened with sha256=False")
        return FileDigest(bytes=self._size, sha256=self._sha256.hexdigest())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._discard()
            return
        try:
            with storage_errors("writing", self._path):
                try:
                    self._flush()
                    os.fsync(self._handle)
                    if self._leaves_cache and self._direct is None:
                        drop_cache(self._handle)
                finally:
                    os.close(self._handle)
                os.rename(self._temp, self._path)
        except BaseException:
            self._discard()
            raise
        if self._sync_directory:
            fsync_directory(self._path.parent)

    def _flush(self) -> None:
        if self._direct is not None:
            self._direct.finish()
        elif self._pending:
            with storage_errors("writing", self._path):
                write_all(self._handle, self._pending)
            self._pending = bytearray()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._temp)


def write_durable(path: Path, data: Buffer) -> FileDigest:
    """Publish ``data`` as the file ``path``."""
    with DurableFile(path) as file:
        file.write(data)
    return file.digest


def save_array(path: Path, array: NDArray[np.generic], *, sync_directory: bool = True) -> FileDigest:
    """Publish ``array`` as a ``.npy`` file, never pickled."""
    with DurableFile(path, sync_directory=sync_directory) as file:
        file.write(array_header(array.dtype, array.shape))
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return file.digest


def replace_link(link: Path, target: str) -> bool:
    """Point the symbolic link ``link`` at a file (relative), atomically; True asks the caller to sync the folder.

    Where the file system has no symbolic links (FAT, CIFS), ``link`` becomes a copy of the file.
    """
    if link.is_symlink() and os.readlink(link) == target:
        return False
    temp = temp_path(link)
    with storage_errors("linking", link):
        try:
            os.symlink(target, temp)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _replace_copy(link, target)
        os.rename(temp, link)
    return True


def _replace_copy(copy: Path, target: str) -> bool:
    folder = copy.parent
    if copy.is_file() and filecmp.cmp(copy, folder / target, shallow=False):
        return False
    with DurableFile(copy, sync_directory=False, sha256=False) as file:
        for block in read_blocks(folder, target):
            file.write(block)
    return True


def remove_temp_files(folder: Path) -> None:
    """Delete temp files of writers that are gone; only the holder of the lock may call this. Other files stay."""
    with storage_errors("reading folder", folder), os.scandir(folder) as entries:
        stale = [entry.path for entry in entries if TEMP_NAME.fullmatch(entry.name)]
    for path in stale:
        with storage_errors("removing", Path(path)):
            os.unlink(path)


def remove_folder(path: Path, *, missing_ok: bool = False) -> None:
    """Delete a folder with its contents, or whatever has taken its place; links are deleted, not followed.

    Anything but a folder is unlinked, because ``rmtree`` would wait for the writer of a FIFO. A folder that is nested deeper
    than Python can recurse is a CorruptStoreError.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=missing_ok)
        return
    try:
        shutil.rmtree(path, ignore_errors=missing_ok)
    except RecursionError:
        raise CorruptStoreError(
            f"{path} is nested too deep to be deleted", hint=f"delete {path} yourself, then run the command again"
        ) from None


def remove_busy_folder(path: Path) -> None:
    """Delete a folder that another process may be writing into; nothing has this name when the call returns.

    The folder is renamed first, so that the other process can no longer reach it by its path: files that are open may still
    be written, but not renamed to anywhere.
    """
    gone = path.with_name(f"gone-{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        remove_folder(gone, missing_ok=True)


class WriterLock:
    """One writer per store: flock on a permanent file. The kernel drops it when the process dies, so it is never stale.

    A forked child shares the parent's lock and would keep it after the parent's death, so it closes its copy at once.
    Programs that are started by ``exec`` do not inherit it.
    """

    def __init__(self, path: Path) -> None:
        with storage_errors("opening", path, opening=True):
            self._handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            self._acquire(path)
        except BaseException:
            os.close(self._handle)
            raise
        _held.add(self)

    def _acquire(self, path: Path) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
            holder = "".join(character for character in text if character.isprintable()) or "unknown"
            raise StoreLockedError(
                f"another process is writing {path.parent}: {holder}", hint="wait for it to end, or stop it"
            ) from None
        except OSError as error:
            raise StoreLockedError(
                f"the file system of {path.parent} cannot lock files ({error.strerror})",
                hint="build on a local disk, then copy the finished store",
            ) from error
        if not _has_name(self._handle, path):
            raise StoreLockedError(f"another process has just deleted {path.parent}", hint="run the command again")
        # only for the message above: nothing depends on this text
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with storage_errors("writing", path, opening=True):
            os.ftruncate(self._handle, 0)
            pwrite_all(self._handle, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Let the next writer in; the file stays."""
        _held.discard(self)
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # the descriptor is closed all the same, and the file has no data of ours
                os.close(self._handle)
        self._handle = -1


def _has_name(handle: int, path: Path) -> bool:
    """Whether an open file still has this name: a lock on a deleted file would keep nobody out."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    return False


# locks of this process: a fork must release them in the child
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _leave_locks_to_parent() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_locks_to_parent)
