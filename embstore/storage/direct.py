"""Writes past the page cache, for large files that nobody is about to read.

Through the cache, the kernel copies every byte into fresh pages, writes them back, and drops them again. Past it, the disk
reads our own buffer (docs/decisions/0016). File systems without direct writes (some network and memory ones) get the same
bytes through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

# Every direct write starts and ends on a multiple of this: the largest block that disks have.
_ALIGNMENT = 4096
_BUFFER_BYTES = 4 << 20  # the disk works on one part while the next is copied; 1 MiB and 32 MiB are slower
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


def open_direct(path: Path, flags: int, mode: int) -> tuple[int, bool]:
    """Open a file for direct writes if its file system supports them; returns the descriptor and whether it does."""
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, mode), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        path.unlink(missing_ok=True)  # Linux makes the file before it refuses the flag
    return os.open(path, flags, mode), False


def drop_cache(handle: int) -> None:
    """Let the kernel reuse a synced file's pages for the next one, instead of taking memory from other processes."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


class DirectBuffer:
    """Collects bytes for one file and writes them in aligned parts; ``finish`` writes the rest and sets the file's length.

    Price: 4 MiB, which the next file reuses.
    """

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # a map is page-aligned; other memory may not be
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._handle = -1
        self._filled = 0
        self._size = 0

    def begin(self, handle: int) -> None:
        """Start again, for an empty file from ``open_direct``."""
        self._handle, self._filled, self._size = handle, 0, 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        while view:
            part = view[: _BUFFER_BYTES - self._filled]
            # numpy copies without the interpreter's lock, which the model's threads need
            np.copyto(self._bytes[self._filled : self._filled + len(part)], np.frombuffer(part, dtype=np.uint8))
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == _BUFFER_BYTES:
                self._flush()

    def finish(self) -> None:
        """Write the rest (without a sync) and cut the file after its last byte."""
        padded = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        self._memory[self._filled : padded] = bytes(padded - self._filled)
        self._filled = padded
        self._flush()
        if self._size % _ALIGNMENT:
            os.ftruncate(self._handle, self._size)

    def _flush(self) -> None:
        view = self._memory[: self._filled]
        while view:
            try:
                view = view[os.write(self._handle, view) :]
            except OSError as error:
                # the file system refuses direct writes after all, or a full disk cut the last write inside a block
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)
        self._filled = 0
