"""Durable files, directories and the writer lock: the only module that syncs, renames or locks.

Every published file goes temp -> write -> fsync -> rename -> fsync(directory). A failed fsync is never retried on the same
file: Linux marks the pages clean, so a second fsync would lie. Shared rule: temp files live beside their target, named
``.<target>.<pid>.tmp``, and belong to nobody once the writer that made them is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from embstore.core.errors import CorruptStoreError, EmbstoreError, ExitCode, StorageError, StoreLockedError
from embstore.core.format import DOCUMENT_BYTES, FileDigest
from embstore.storage.direct import DirectBuffer, drop_cache, open_direct

Buffer = bytes | bytearray | memoryview

_TEMP_NAME = re.compile(r"\..+\.\d+\.tmp")
_BUFFER_BYTES = 1 << 20  # rows of a JSONL file are small: one write call a MiB, not one a row
_READ_BYTES = 8 << 20
# what open says of links (with O_NOFOLLOW), folders (for writing), sockets and FIFOs, and files in place of folders
_IRREGULAR = (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_WRONG_PLACE = (*_NOT_ALLOWED, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


@contextlib.contextmanager
def storage_errors(doing: str, path: Path, *, opening: bool = False) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was being done, where, and what to do next.

    ``opening``: the store is not open yet, so a place that cannot be written is a wrong --out, not an unfinished build.
    """
    try:
        yield
    except EmbstoreError:  # some are OSErrors too, and say more than their errno
        raise
    except OSError as error:
        if isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(path):
            path = Path(error.filename)  # a file below the folder that is being worked on
        hint = "mend the file system, then run the command again (a build: with --resume)"
        if error.errno in _FULL:
            hint = "free some space, then run the command again (a build: with --resume)"
        elif error.errno in _NOT_ALLOWED or (opening and error.errno in _WRONG_PLACE):
            hint = "make the folder writable, or choose another --out"
        failure = StorageError(f"{doing} {path} failed: {error.strerror or error}", hint=hint)
        failure.errno = error.errno
        if opening and error.errno in _WRONG_PLACE:
            failure.exit_code = ExitCode.ERROR
        raise failure from error


def open_regular(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Descriptor of the file ``name`` of a store, which may be anybody's: no link is followed, no FIFO waited for.

    Raises
    ------
    CorruptStoreError
        It is no regular file, or lies behind a link: whoever made the store could have pointed it anywhere.
    """
    folders = Path(name).parents[:-1]  # without "."
    linked = next((folder for folder in folders if (root / folder).is_symlink()), None)
    if linked is not None:
        raise irregular(linked.as_posix())
    try:
        handle = os.open(root / name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise irregular(name) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise irregular(name)
    return handle


def file_size(root: Path, name: str) -> int | None:
    """Bytes of the file ``name`` of a store, None if it is missing; anything but a regular file is a CorruptStoreError."""
    with storage_errors("reading", root / name):
        try:
            handle = open_regular(root, name)
        except FileNotFoundError:
            return None
        size = os.fstat(handle).st_size
        os.close(handle)
        return size


def reading_problem(root: Path, name: str, error: OSError) -> str:
    """What an error of reading says about the file: that it is gone, or that the disk cannot read it.

    Raises
    ------
    StorageError
        It says nothing about the file: out of descriptors or memory, not permitted. Nothing may be called damaged for that.
    """
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno == errno.EIO:
        return f"cannot be read ({os.strerror(errno.EIO)})"
    with storage_errors("reading", root / name):
        raise error


def irregular(name: str) -> CorruptStoreError:
    """The error for a link, device or folder where a store has a file of its own."""
    return CorruptStoreError(
        f"{name} is a link or no regular file; a store holds its files and folders itself",
        hint="if you moved it to another disk, move it back or mount the disk there",
    )


def read_blocks(root: Path, name: str) -> Iterator[bytes]:
    """The file ``name`` of a store, a few MiB at a time."""
    handle = open_regular(root, name)
    try:
        offset = 0
        while block := os.pread(handle, _READ_BYTES, offset):
            yield block
            offset += len(block)
    finally:
        os.close(handle)


def read_all(handle: int, name: str, limit: int) -> bytes:
    """Every byte of an open file; a larger one than ``limit`` is refused unread, however little of it is on the disk."""
    size = os.fstat(handle).st_size
    if size > limit:
        raise CorruptStoreError(f"{name} has {size} bytes, at most are {limit}", hint="is this a store?")
    return pread_all(handle, size, 0)


def pread_all(handle: int, size: int, offset: int) -> bytes:
    """``size`` bytes from ``offset``, fewer where the file ends; one call of the kernel gives at most 2 GiB."""
    blocks = []
    while size and (block := os.pread(handle, min(_READ_BYTES, size), offset)):
        blocks.append(block)
        size, offset = size - len(block), offset + len(block)
    return b"".join(blocks)


def read_committed(root: Path, name: str, *, limit: int | None = DOCUMENT_BYTES) -> bytes:
    """Bytes of a JSON file that a commit promised; that it is missing is damage (CorruptStoreError), not a wrong path.

    A larger file than ``limit`` is refused. None is for files that grow with the rows: they are read up to the first zero
    byte, which JSON never holds and every hole of a sparse file gives.
    """
    with storage_errors("reading", root / name):
        try:
            if limit is None:
                return b"".join(_text_blocks(root, name))
            handle = open_regular(root, name)
            try:
                return read_all(handle, name, limit)
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise CorruptStoreError(f"{name} is missing", hint=f"run embstore verify {root}") from None


def _text_blocks(root: Path, name: str) -> Iterator[bytes]:
    for block in read_blocks(root, name):
        if b"\0" in block:
            raise CorruptStoreError(f"{name} holds a zero byte", hint=f"run embstore verify {root}")
        yield block


def fsync_directory(path: Path) -> None:
    """Make renames and new names in ``path`` durable."""
    with storage_errors("syncing folder", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_directory(path: Path, *, opening: bool = False, resync: bool = False) -> None:
    """Create ``path`` and missing parents, each made durable in its own parent.

    A writer that died may have made a folder and not lived to sync its name. ``resync`` syncs that of ``path`` if it is
    there, ``opening`` that of the last folder that is. At the root of a store the journal does it.
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
            if error.errno not in (errno.EACCES, errno.EPERM):  # what may not be opened was not made by us
                raise


def write_all(handle: int, data: Buffer) -> None:
    """Write every byte; the kernel may take fewer than asked."""
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

    Use as a context manager: leaving it normally publishes, an exception leaves no trace. ``digest`` is valid afterwards.
    ``sync_directory=False`` leaves the directory fsync to the caller, who may group many renames under one.
    ``direct`` writes past the page cache where the file system can, for large files that nobody is about to read. The temp
    file lies in ``folder`` on the same file system, default beside the target: whoever removes that folder keeps it from
    ever being published.
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
        self._temp = (folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
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
                self._handle = os.open(self._temp, flags, 0o644)
            else:
                self._handle, is_direct = open_direct(self._temp, flags, 0o644)
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
            raise AssertionError("this file was opened without a digest")
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


def replace_link(link: Path, target: str) -> bool:
    """Point the symbolic link ``link`` at ``target`` (relative), atomically; True asks the caller to sync the folder."""
    if link.is_symlink() and os.readlink(link) == target:
        return False
    temp = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with storage_errors("linking", link):
        os.symlink(target, temp)
        os.rename(temp, link)
    return True


def remove_temp_files(folder: Path) -> None:
    """Delete temp files of writers that are gone; only the lock holder may call this. Other people's files stay."""
    with storage_errors("reading folder", folder), os.scandir(folder) as entries:
        stale = [entry.path for entry in entries if _TEMP_NAME.fullmatch(entry.name)]
    for path in stale:
        with storage_errors("removing", Path(path)):
            os.unlink(path)


def remove_folder(path: Path, *, missing_ok: bool = False) -> None:
    """Delete a folder and what is in it, or whatever lies in its place, never what a link leads to.

    One nested deeper than Python can go stays, and a FIFO is not opened: ``rmtree`` would wait for its writer.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=missing_ok)
        return
    try:
        shutil.rmtree(path, ignore_errors=missing_ok)
    except RecursionError:
        raise CorruptStoreError(
            f"{path} is nested too deep to be deleted", hint=f"delete {path}, then run it again"
        ) from None


def take_away(path: Path) -> None:
    """Delete a folder that another process may be writing into: it is renamed first, so that no path of theirs leads on.

    What it has open it may still write, but never rename to anywhere. Nothing is there when this returns, or before.
    """
    gone = path.with_name(f"gone-{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        remove_folder(gone, missing_ok=True)


class WriterLock:
    """One writer per store: flock on a permanent file. The kernel drops it when the process dies, so it is never stale.

    A forked child shares the parent's lock and would keep it after the parent's death, so it closes its copy at once. What a
    child starts by ``exec`` never has it.
    """

    def __init__(self, path: Path) -> None:
        with storage_errors("opening", path, opening=True):
            self._handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
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
        # for the message above only: nobody decides anything by this text
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with storage_errors("writing", path, opening=True):
            os.ftruncate(self._handle, 0)
            pwrite_all(self._handle, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Let the next writer in; the file stays."""
        _held.discard(self)
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # it is closed all the same, and no data of ours waits in it
                os.close(self._handle)
        self._handle = -1


# writers of this process, for the one moment when there are two processes that have their locks
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _leave_locks_to_parent() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_locks_to_parent)
