"""A disk in memory that forgets what was not synced: what a power cut may leave of a folder, on any system, for any user.

A file's bytes are durable as of the last sync of that file, a folder's names as of the last sync of that folder. Of what
came later ANY part may survive: each name change or none (a rename in a folder is one change), each sector of each write,
the size of a file without its bytes (they read as zeros). The live folder is the page cache: a killed process takes nothing
away from it, and makes nothing of it durable. A sync that fails loses what it should have written: the page cache shows it
and takes it for clean, so no later sync writes it; only who writes those bytes again can make them durable. Names are not
lost so: file systems with a log turn read-only after an error there.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

SECTORS = (512, 4096)  # what disks write whole


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


Tree = dict[str, "bytes | Link | Tree"]
"""A folder as plain values."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that were written and not synced."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A truncation, to any length, that was not synced."""

    size: int


@dataclass(slots=True, eq=False)
class File:
    """Bytes on the disk as of the last sync, bytes in the page cache now, and the changes that are still to be written.

    After a failed sync the first two differ by more than the changes.
    """

    durable: bytes = b""
    content: bytearray = field(default_factory=bytearray)
    changes: list[Write | Resize] = field(default_factory=list)

    def change(self, change: Write | Resize) -> None:
        """Something happened to the bytes."""
        self.changes.append(change)
        apply(change, self.content)

    def sync(self) -> None:
        """What was still to be written cannot be lost any more."""
        self.durable = self.written
        self.changes.clear()

    def fail_to_sync(self) -> None:
        """What was still to be written never will be, although it can be read."""
        self.changes.clear()

    @property
    def written(self) -> bytes:
        """What the disk has once everything that is still to be written was."""
        content = bytearray(self.durable)
        for change in self.changes:
            apply(change, content)
        return bytes(content)


@dataclass(frozen=True, slots=True)
class NameChange:
    """One entry goes, one comes, or both at once."""

    gone: str | None
    come: str | None
    node: Node | None


@dataclass(slots=True, eq=False)
class Folder:
    """Names as of the last sync, names now, and the changes between them."""

    durable: dict[str, Node] = field(default_factory=dict)
    names: dict[str, Node] = field(default_factory=dict)
    changes: list[NameChange] = field(default_factory=list)

    def change(self, *, gone: str | None = None, come: str | None = None, node: Node | None = None) -> None:
        """Something happened to the names."""
        self.changes.append(NameChange(gone, come, node))
        rename(self.changes[-1], self.names)

    def sync(self) -> None:
        """None of these names can be lost any more; what lies in a new folder still can."""
        self.durable = dict(self.names)
        self.changes.clear()


Node = File | Folder | Link


class Survival(Protocol):
    """Decides what of the changes since a sync is there after the power cut."""

    def names(self, changes: Sequence[NameChange]) -> Sequence[NameChange]:
        """Which name changes of one folder survive."""

    def content(self, file: File) -> bytes:
        """Which bytes of a file survive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extreme:
    """Everything of a kind or nothing of it."""

    has_names: bool = False
    has_sizes: bool = False
    has_data: bool = False

    def names(self, changes: Sequence[NameChange]) -> Sequence[NameChange]:
        return changes if self.has_names else ()

    def content(self, file: File) -> bytes:
        if self.has_data:
            return file.written
        size = len(file.written)
        return file.durable[:size].ljust(size, b"\0") if self.has_sizes else file.durable


# names-first is what ext4 does to those who rename before they sync; data-first what it does to those who sync no folder
EXTREMES: Mapping[str, Survival] = {
    "synced": Extreme(),
    "names-first": Extreme(has_names=True),
    "sizes-first": Extreme(has_names=True, has_sizes=True),
    "data-first": Extreme(has_data=True, has_sizes=True),
}


class Lottery:
    """Any subset: every name change and every sector is drawn; how much survives at all is drawn first."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        shares = (0.0, 0.2, 0.5, 0.8, 1.0)
        self._names, self._data = chance.choice(shares), chance.choice(shares)
        self._is_log = chance.random() < 0.25  # names in the order in which they were given, as a journalling system has it
        self._sector = chance.choice(SECTORS)

    def names(self, changes: Sequence[NameChange]) -> Sequence[NameChange]:
        if self._is_log:
            return changes[: self._chance.randint(0, len(changes))]
        return [change for change in changes if self._chance.random() < self._names]

    def content(self, file: File) -> bytes:
        survives, sizes = bytearray(file.durable), [len(file.durable)]
        for change in file.changes:
            if isinstance(change, Resize):
                sizes.append(change.size)
                if self._chance.random() < self._data:
                    apply(change, survives)
                continue
            sizes.append(max(sizes[-1], change.offset + len(change.data)))
            for piece in _sectors(change, self._sector):
                if self._chance.random() < self._data:
                    apply(piece, survives)
        apply(Resize(self._chance.choice(sizes)), survives)
        return bytes(survives)


def apply(change: Write | Resize, content: bytearray) -> None:
    """Do to ``content`` what was done to the file; what nobody wrote reads as zeros."""
    end = change.size if isinstance(change, Resize) else change.offset + len(change.data)
    content.extend(b"\0" * (end - len(content)))
    if isinstance(change, Resize):
        del content[end:]
    else:
        content[change.offset : end] = change.data


def rename(change: NameChange, names: dict[str, Node]) -> None:
    """Do to ``names`` what was done to the folder."""
    if change.gone is not None:
        names.pop(change.gone, None)
    if change.come is not None and change.node is not None:
        names[change.come] = change.node


def _sectors(write: Write, size: int) -> Iterator[Write]:
    """A write in pieces that a disk writes whole or not: they end where a sector of the file ends."""
    start = 0
    while start < len(write.data):
        stop = start + size - (write.offset + start) % size
        yield Write(write.offset + start, write.data[start:stop])
        start = stop


class Disk:
    """The folder ``root`` as it is now, and what of it is durable: at first, all of it.

    Who wraps the system calls tells it of each that succeeded. What was written past those wrappers is found by looking.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._top = Folder()
        self.look()
        _sync_all(self._top)

    def find(self, path: str) -> Node:
        """The file or folder at ``path``."""
        node: Node = self._top
        for name in Path(path).relative_to(self.root).parts:
            if not isinstance(node, Folder):
                raise NotADirectoryError(path)
            if name not in node.names:
                self.look()
            node = node.names[name]
        return node

    def created(self, path: str, node: Node) -> Node:
        """A new name for a new file, folder or link."""
        self._folder_of(path).change(come=Path(path).name, node=node)
        return node

    def renamed(self, old: str, new: str) -> None:
        """A new name for what had another; between folders that is two changes, and a crash may show either, or none."""
        node, folder, before = self.find(old), self._folder_of(new), self._folder_of(old)
        if folder is before:
            folder.change(gone=Path(old).name, come=Path(new).name, node=node)
        else:
            folder.change(come=Path(new).name, node=node)
            before.change(gone=Path(old).name)

    def removed(self, path: str) -> None:
        """A name is gone."""
        folder, name = self._folder_of(path), Path(path).name
        if name not in folder.names:  # made by Python's ``open`` since we looked: the power cut may bring it back
            folder.change(come=name, node=File())
        folder.change(gone=name)

    def synced(self, path: str, node: Node) -> None:
        """A file or folder was synced; ``path`` is the name by which it was opened."""
        assert not isinstance(node, Link)
        if isinstance(node, Folder):
            _look(node, Path(path), is_deep=False)
        node.sync()

    def look(self) -> None:
        """Take note of files that were written without a system call of ours: memory maps, and ``open`` of Python."""
        _look(self._top, self.root, is_deep=True)

    def image(self, survival: Survival) -> Tree:
        """What is there when the power comes back. Call ``look`` first."""
        return _image(self._top, survival)

    def cut(self, survival: Survival) -> None:
        """Cut the power: the live folder becomes what survived, and all of it is durable."""
        self.look()
        tree = self.image(survival)
        shutil.rmtree(self.root)
        lay(tree, self.root)
        self.__init__(self.root)  # type: ignore[misc]  # a disk that was just mounted

    def _folder_of(self, path: str) -> Folder:
        folder = self.find(str(Path(path).parent))
        assert isinstance(folder, Folder)
        return folder


def _sync_all(folder: Folder) -> None:
    folder.sync()
    for node in folder.names.values():
        if isinstance(node, Folder):
            _sync_all(node)
        elif isinstance(node, File):
            node.sync()


def _look(folder: Folder, path: Path, *, is_deep: bool) -> None:
    with os.scandir(path) as entries:
        found = {entry.name: entry for entry in entries}
    for name in folder.names.keys() - found.keys():
        folder.change(gone=name)
    for name, entry in found.items():
        if name not in folder.names:
            if entry.is_symlink():
                folder.change(come=name, node=Link(str(Path(entry.path).readlink())))
            else:
                folder.change(come=name, node=Folder() if entry.is_dir() else File())
        node = folder.names[name]
        if isinstance(node, Folder) and is_deep:
            _look(node, path / name, is_deep=True)
        elif isinstance(node, File) and is_deep:
            _look_into(node, path / name)


def _look_into(file: File, path: Path) -> None:
    content = path.read_bytes()
    if content == file.content:
        return
    start = len(file.content) if content.startswith(file.content) else 0
    file.change(Write(start, content[start:]))
    if len(content) < len(file.content):
        file.change(Resize(len(content)))


def _image(folder: Folder, survival: Survival) -> Tree:
    names = dict(folder.durable)
    for change in survival.names(folder.changes):
        rename(change, names)
    tree: Tree = {}
    for name, node in names.items():
        if isinstance(node, Link):
            tree[name] = node
        else:
            tree[name] = _image(node, survival) if isinstance(node, Folder) else survival.content(node)
    return tree


def lay(tree: Tree, target: Path) -> None:
    """Write a tree as the new folder ``target``."""
    target.mkdir()
    for name, value in tree.items():
        if isinstance(value, Link):
            (target / name).symlink_to(value.target)
        elif isinstance(value, bytes):
            (target / name).write_bytes(value)
        else:
            lay(value, target / name)


def fingerprint(tree: Tree) -> str:
    """Equal for equal trees."""
    total = hashlib.sha256()
    for name in sorted(tree):
        value = tree[name]
        kind = type(value).__name__
        content = value if isinstance(value, bytes) else value.target if isinstance(value, Link) else fingerprint(value)
        total.update(f"{kind} {len(content)} {name}\0".encode())
        total.update(content if isinstance(content, bytes) else content.encode())
    return total.hexdigest()
