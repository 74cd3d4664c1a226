"""Real file systems in image files: filled to the last block, cut off from power, mounted again. Linux, as root.

A power cut is FS_IOC_SHUTDOWN: from then on nothing reaches the disk, with or without what the log held in memory. btrfs has
no such call: its image lies on an xfs that can clone it, and a clone made while a build runs is what a cut leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Literal

import pytest

Kind = Literal["ext4", "xfs", "btrfs", "tmpfs"]

_FS_IOC_SHUTDOWN = 0x8004587D
_FICLONE = 0x40049409
_MIB = 1 << 20
# xfs refuses less than 300 MB, btrfs less than 109 MiB; images are sparse. mkfs.ext4 would take 1 KiB blocks here.
_IMAGE_BYTES = {"ext4": 64 * _MIB, "xfs": 320 * _MIB, "btrfs": 160 * _MIB}
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_PACKAGE = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
_BUSY_SECONDS = 120.0  # only against a hang


class Log(IntEnum):
    """What becomes of the log that a power cut finds in memory."""

    FLUSHED = 1
    LOST = 2

    @property
    def words(self) -> str:
        return "log flushed" if self is Log.FLUSHED else "log not flushed"


class Disk:
    """One file system, mounted at ``path``; made by ``new_disk``."""

    def __init__(self, kind: Kind, folder: Path, *, num_bytes: int | None = None) -> None:
        self.kind = kind
        self.path = folder / "mounted"
        self.path.mkdir()
        self._size = num_bytes or _IMAGE_BYTES.get(kind, 16 * _MIB)
        self._image = folder / f"{kind}.img"
        if kind != "tmpfs":
            with self._image.open("wb") as file:
                file.truncate(self._size)
            _run([*_MKFS[kind], str(self._image)])
        self.mount()

    def mount(self) -> None:
        """Mount it; what the log holds is replayed."""
        if self.kind == "tmpfs":
            _run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "embstore-test", str(self.path)])
        else:
            command = ["mount", "-t", self.kind, "-o", "loop", str(self._image), str(self.path)]
            # the loop device of the last mount may take a moment to let go of the image
            _patiently(command, "already mounted")

    def unmount(self) -> None:
        """Unmount it; the loop device goes with it."""
        # a killed process may take a moment to let go of its files
        _patiently(["umount", str(self.path)], "busy")

    def settle(self) -> None:
        """Make everything on it durable."""
        self.unmount()
        self.mount()

    def cut(self, log: Log) -> None:
        """Power off: nothing reaches the disk any more. ``restore`` follows, once nobody uses it."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _FS_IOC_SHUTDOWN, struct.pack("I", log))
        finally:
            os.close(handle)

    def restore(self) -> None:
        """Power on again after a cut."""
        self.settle()

    def clear(self) -> None:
        """Delete every file on it, durably."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.settle()

    @property
    def free_bytes(self) -> int:
        """What a process without privileges may still write."""
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    def fill(self, leave_bytes: int) -> None:
        """Leave that many bytes free, and not one more; ``free`` undoes it."""
        with (self.path / "ballast").open("wb") as file:
            size = 0
            while (rest := self.free_bytes - leave_bytes) > 0:
                # ext4 counts blocks for extents apart: it may take more than was asked for, or refuse the last
                os.posix_fallocate(file.fileno(), 0, size := size + max(4096, rest - rest % 4096))
                os.fsync(file.fileno())

    def free(self) -> None:
        """Delete what ``fill`` wrote."""
        (self.path / "ballast").unlink()


class ClonedDisk(Disk):
    """A disk whose power cut is a clone of its image, taken while it is in use; the image lies on an xfs of its own."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        (folder / "host").mkdir()
        self._host = Disk("xfs", folder / "host", num_bytes=1024 * _MIB)
        try:
            (self._host.path / "disk").mkdir()
            super().__init__(kind, self._host.path / "disk")
        except BaseException:
            self._host.unmount()
            raise

    def cut(self, log: Log) -> None:  # a clone knows nothing of logs
        clone = self._image.with_suffix(".clone")
        with self._image.open("rb") as source, clone.open("wb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())

    def restore(self) -> None:
        self.unmount()
        self._image.with_suffix(".clone").replace(self._image)
        self.mount()

    def close(self) -> None:
        self.unmount()
        self._host.unmount()


@contextlib.contextmanager
def new_disk(kind: Kind, *, num_bytes: int | None = None) -> Iterator[Disk]:
    """An empty disk, mounted; unmounted and deleted afterwards, whatever happened. Skips the test where that cannot be."""
    _need(kind)
    memory = Path("/dev/shm")  # an image in memory: syncs take no time, and no disk is worn
    folder = Path(tempfile.mkdtemp(prefix="embstore-disk-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        disk = ClonedDisk(kind, folder) if kind == "btrfs" else Disk(kind, folder, num_bytes=num_bytes)
        yield disk
    finally:
        _take_down(folder)


def _take_down(folder: Path) -> None:
    """Unmount everything below ``folder``, the innermost first, and delete it; what is busy goes when it is let go."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder}/")]):
        if subprocess.run(["umount", mount], capture_output=True, check=False).returncode != 0:
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _need(kind: Kind) -> None:
    """Skip, with the reason, where such a disk cannot be made."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    if kind == "tmpfs":
        return
    for one in {"btrfs": ("btrfs", "xfs")}.get(kind, (kind,)):
        if shutil.which(_MKFS[one][0]) is None:
            pytest.skip(f"{_MKFS[one][0]} is not installed (package {_PACKAGE[one]})")
        if f"\t{one}\n" not in Path("/proc/filesystems").read_text():
            pytest.skip(f"this kernel has no {one}")
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")


def _run(command: list[str]) -> None:
    _patiently(command, None)


def _patiently(command: list[str], passing: str | None) -> None:
    """Run a command; again and again while it complains of what passes by itself."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        problem = done.stderr.strip()
        if command[0] == "mount" and "permission denied" in problem:
            pytest.skip(f"this machine may not mount: {problem}")
        assert passing is not None, f"{' '.join(command)}: {problem}"
        assert passing in problem, f"{' '.join(command)}: {problem}"
        assert time.monotonic() < deadline, f"{' '.join(command)}: {problem}, for {_BUSY_SECONDS} s"
        time.sleep(0.01)
