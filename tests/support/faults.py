"""Faults in process: the n-th system call on a store fails, or kills.

A kill raises ``Killed`` and from then on every call on the store raises it again, so no ``finally`` of the dying build can
tidy up what a SIGKILL would leave. Descriptors are still closed, which frees the lock as the kernel does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.power import Disk

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_BY_DESCRIPTOR = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
SYNCS = ("fsync", "fdatasync")
SYNC_DATA = "fdatasync" if hasattr(os, "fdatasync") else "fsync"
_BY_PATH = ("open", "rename", "unlink", "symlink", "mkdir", "rmdir")


class Killed(BaseException):
    """The process is dead."""


@dataclass(frozen=True, slots=True)
class Call:
    """One system call on the store: its name and the path it touches (the new name of a rename or link), relative."""

    name: str
    path: str


@dataclass(kw_only=True)
class SystemCalls:
    """Records calls under ``root``; call ``fail_at`` (1-based, 0 never) dies or raises ``error``.

    ``torn``: a write that dies writes its first half. Syncs are not passed on to the kernel: what they make durable is the
    business of ``disk``, a model; ``before_sync`` is told of each, and may look at what a power cut would leave.
    """

    root: Path
    fail_at: int = 0
    error: int | None = None
    torn: bool = False
    disk: Disk | None = None
    before_sync: Callable[[], None] | None = None
    calls: list[Call] = field(default_factory=list)
    is_dead: bool = False
    _paths: dict[int, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[SystemCalls]:
        """Patch ``os`` for the time of one "process"."""
        with pytest.MonkeyPatch.context() as patch:
            real_close = os.close
            patch.setattr(os, "close", lambda handle: (self._paths.pop(handle, None), real_close(handle))[1])
            for name in (*_BY_DESCRIPTOR, *_BY_PATH):
                if not hasattr(os, name):  # macOS has no fdatasync
                    continue
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = self._touched(name, args, options)
            if path is not None and (name != "open" or args[1] & _WRITING):
                self._account(name, path, args, real)
            if path is not None and name in SYNCS:
                if self.before_sync is not None:
                    self.before_sync()
                if self.disk is not None:
                    self.disk.synced(path)
                return None
            is_new = name == "open" and path is not None and not os.path.lexists(path)
            result = real(*args, **options)
            if name == "open" and path is not None:
                self._paths[result] = path
                if is_new and self.disk is not None:
                    self.disk.created(path)
            return result

        return call

    def _touched(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        """The absolute path this call touches, None when it is not under the store."""
        if name in _BY_DESCRIPTOR:
            return self._paths.get(args[0])
        target = os.fspath(args[1] if name in ("rename", "symlink") else args[0])
        folder = options.get("dir_fd")
        if folder is not None:
            return f"{self._paths[folder]}/{target}" if folder in self._paths else None
        root = os.fspath(self.root)
        return target if target == root or str(target).startswith(f"{root}/") else None

    def _account(self, name: str, path: str, args: tuple[Any, ...], real: Callable[..., Any]) -> None:
        if self.is_dead:
            raise Killed
        self.calls.append(Call(name, path[len(os.fspath(self.root)) + 1 :] or "."))
        if len(self.calls) != self.fail_at:
            return
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), path)
        if self.torn and name in ("write", "pwrite"):
            real(args[0], memoryview(args[1])[: memoryview(args[1]).nbytes // 2], *args[2:])
        self.is_dead = True
        raise Killed


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
