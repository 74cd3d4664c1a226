"""What a power cut leaves of a folder: a model of a POSIX disk, in process, for any file system and any user.

A file's bytes are durable as of the last fsync of that file, a folder's names as of the last fsync of that folder. Whatever
was not synced may be there or not; the three images are the extremes a journalling file system can show.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Image = Literal["synced", "names-first", "data-first"]
IMAGES: tuple[Image, ...] = ("synced", "names-first", "data-first")


@dataclass(frozen=True, slots=True)
class _Entry:
    inode: int
    is_folder: bool
    link: str | None


@dataclass(kw_only=True)
class Disk:
    """The folder ``root`` as it is now, and what of it is durable.

    "synced": nothing that was not synced survives. "names-first": every rename and new name survives, but of each file only
    synced bytes (what ext4 does to those who rename before fsync). "data-first": all bytes survive under synced names only.
    ``deaf_to``: relative paths, as a shell pattern, whose syncs do nothing; to prove that a missing sync is noticed.
    """

    root: Path
    deaf_to: str = ""
    _bytes: dict[int, bytes] = field(default_factory=dict)
    _names: dict[int, dict[str, _Entry]] = field(default_factory=dict)

    def created(self, path: str) -> None:
        """A new file: an inode number that was used before means nothing now."""
        self._bytes.pop(Path(path).lstat().st_ino, None)

    def synced(self, path: str) -> None:
        """``path`` was synced, a file or a folder."""
        if fnmatch.fnmatch(os.path.relpath(path, self.root), self.deaf_to):
            return
        found = Path(path).lstat()
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = _names_now(Path(path))
        else:
            self._bytes[found.st_ino] = Path(path).read_bytes()

    def write_image(self, target: Path, image: Image) -> None:
        """Lay what survives of ``root`` into the new folder ``target``."""
        paths = {path.lstat().st_ino: path for path in self.root.rglob("*")} if image == "data-first" else {}
        self._write_folder(self.root.lstat().st_ino, self.root, target, image, paths)

    def _write_folder(self, inode: int, source: Path, target: Path, image: Image, paths: dict[int, Path]) -> None:
        target.mkdir()
        names = _names_now(source) if image == "names-first" else self._names.get(inode, {})
        for name, entry in names.items():
            if entry.is_folder:
                self._write_folder(entry.inode, source / name, target / name, image, paths)
            elif entry.link is not None:
                (target / name).symlink_to(entry.link)
            else:
                current = paths.get(entry.inode)
                survives = current.read_bytes() if current is not None else self._bytes.get(entry.inode, b"")
                (target / name).write_bytes(survives)


def _names_now(folder: Path) -> dict[str, _Entry]:
    with os.scandir(folder) as entries:
        return {
            entry.name: _Entry(
                entry.inode(),
                entry.is_dir(follow_symlinks=False),
                str(Path(entry.path).readlink()) if entry.is_symlink() else None,
            )
            for entry in entries
        }
