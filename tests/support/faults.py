"""Faults in process: the n-th system call on a store fails, or kills.

A kill raises ``Killed`` and from then on every call on the store raises it again, so no ``finally`` of the dying build can
tidy up what a SIGKILL would leave. Descriptors are still closed, which frees the lock as the kernel does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.power import Disk, File, Folder, Link, Node, Resize, Write

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_BY_DESCRIPTOR = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
SYNCS = ("fsync", "fdatasync")
SYNC_DATA = "fdatasync" if hasattr(os, "fdatasync") else "fsync"
_BY_PATH = ("open", "rename", "unlink", "symlink", "mkdir", "rmdir")


class Killed(BaseException):
    """The process is dead."""


@dataclass(frozen=True, slots=True)
class Call:
    """One system call on the store: its name and the path it touches (the new name of a rename or link), relative.

    ``source``: the old name of a rename, relative too, or what a link points at. ``flags``: of an open.
    """

    name: str
    path: str
    source: str = field(default="", compare=False)
    flags: int = field(default=0, compare=False)


@dataclass(kw_only=True)
class SystemCalls:
    """Records calls under ``root``; call ``fail_at`` (1-based, 0 never) dies or raises ``error``.

    A sync of a file that fails loses what it should have made durable.

    ``torn``: a write that dies writes its first half. Syncs are not passed on to the kernel: what they make durable is the
    business of ``disk``, a model; ``before_sync`` is told of each, and may look at what a power cut would leave.
    ``leaves_out``: given the calls so far, whether the last of them, a sync, does nothing; to prove that it is missed.
    """

    root: Path
    fail_at: int = 0
    error: int | None = None
    torn: bool = False
    disk: Disk | None = None
    before_sync: Callable[[], None] | None = None
    leaves_out: Callable[[list[Call]], bool] | None = None
    calls: list[Call] = field(default_factory=list)
    is_dead: bool = False
    _open: dict[int, tuple[str, Node | None]] = field(default_factory=dict)
    _count: int = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[SystemCalls]:
        """Patch ``os`` for the time of one "process"."""
        with pytest.MonkeyPatch.context() as patch:
            real_close = os.close
            patch.setattr(os, "close", lambda handle: (self._open.pop(handle, None), real_close(handle))[1])
            for name in (*_BY_DESCRIPTOR, *_BY_PATH):
                if not hasattr(os, name):  # macOS has no fdatasync
                    continue
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = self._touched(name, args, options)
            if path is None:
                return real(*args, **options)
            if name != "open" or args[1] & _WRITING:
                self._account(name, path, args, real)
            if name in SYNCS:
                self._sync(args[0])
                return None
            is_new = name == "open" and not os.path.lexists(path)
            result = real(*args, **options)
            if name == "open":
                self._open[result] = (path, self._opened(path, args[1], is_new=is_new) if self.disk is not None else None)
            elif self.disk is not None:
                self._tell(self.disk, name, path, args, result)
            return result

        return call

    def _touched(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        """The absolute path this call touches, None when it is not under the store."""
        if name in _BY_DESCRIPTOR:
            return self._open[args[0]][0] if args[0] in self._open else None
        target = os.fspath(args[1] if name in ("rename", "symlink") else args[0])
        folder = options.get("dir_fd")
        if folder is not None:
            return f"{self._open[folder][0]}/{target}" if folder in self._open else None
        root = os.fspath(self.root)
        return target if target == root or str(target).startswith(f"{root}/") else None

    def _account(self, name: str, path: str, args: tuple[Any, ...], real: Callable[..., Any]) -> None:
        if self.is_dead:
            raise Killed
        source = os.fspath(args[0]) if name in ("rename", "symlink") else ""
        flags = args[1] if name == "open" else 0
        self.calls.append(Call(name, self._relative(path), self._relative(source) if name == "rename" else source, flags))
        self._count += 1  # who watches may note other things among the calls
        if self._count != self.fail_at:
            return
        if self.error is not None:
            node = self._open[args[0]][1] if name in SYNCS else None
            if isinstance(node, File):
                node.fail_to_sync()
            raise OSError(self.error, os.strerror(self.error), path)
        if self.torn and name in ("write", "pwrite"):
            # half a block cannot be written directly; the journal stays in append mode
            flags = fcntl.fcntl(args[0], fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0)
            fcntl.fcntl(args[0], fcntl.F_SETFL, flags)
            half = memoryview(args[1]).cast("B")[: memoryview(args[1]).nbytes // 2]
            written = real(args[0], half, *args[2:])
            if self.disk is not None:
                self._tell(self.disk, name, path, (args[0], half, *args[2:]), written)
        self.is_dead = True
        raise Killed

    def _relative(self, path: str) -> str:
        return path[len(os.fspath(self.root)) + 1 :] or "."

    def _sync(self, handle: int) -> None:
        if self.before_sync is not None:
            self.before_sync()
        path, node = self._open[handle]
        if self.disk is not None and node is not None and not (self.leaves_out and self.leaves_out(self.calls)):
            self.disk.synced(path, node)

    def _opened(self, path: str, flags: int, *, is_new: bool) -> Node:
        assert self.disk is not None
        if is_new:
            return self.disk.created(path, File())
        node = self.disk.find(path)
        if flags & os.O_TRUNC and isinstance(node, File):
            node.change(Resize(0))
        return node

    def _tell(self, disk: Disk, name: str, path: str, args: tuple[Any, ...], result: Any) -> None:
        """A call that succeeded, told to the model."""
        if name in ("write", "pwrite", "ftruncate"):
            file = self._open[args[0]][1]
            assert isinstance(file, File)
            if name == "ftruncate":
                file.change(Resize(args[1]))
                return
            offset = args[2] if name == "pwrite" else os.lseek(args[0], 0, os.SEEK_CUR) - result
            file.change(Write(offset, bytes(memoryview(args[1]).cast("B")[:result])))
        elif name == "rename":
            disk.renamed(os.fspath(args[0]), path)
        elif name in ("unlink", "rmdir"):
            disk.removed(path)
        else:
            disk.created(path, Link(os.fspath(args[0])) if name == "symlink" else Folder())


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
