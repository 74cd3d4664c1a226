"""The order in which a writer of a store must call the system, and the kinds of syncs it makes.

``problems`` reads recorded calls and knows nothing of the code that made them: a commit (a line of the journal, the rename
of the manifest) comes after everything it vouches for is durable, names of new folders included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.faults import SYNCS, Call

JOURNAL, MANIFEST, WITHDRAWN = "journal.jsonl", "manifest.json", "manifest.withdrawn.json"
IN_PLACE = ("coordinates.npy", "residuals.npy", "sequences.npy", JOURNAL)  # everything else is published by a rename
_UNPROMISED = re.compile(r"work(/.*)?|\.lock|runs\.jsonl")  # scratch, and what is only for people
_TEMP = re.compile(r"\.(.+)\.[0-9a-f]+\.tmp")


def below(calls: Sequence[Call], store: str) -> list[Call]:
    """The same calls with paths relative to the store: "." is the store, ".." the folder that holds it."""
    return [
        Call(
            call.name,
            os.path.relpath(call.path, store) if call.name != "acknowledged" else call.path,
            os.path.relpath(call.source, store) if call.name == "rename" else call.source,
            call.flags,
        )
        for call in calls
    ]


def sync_kind(calls: Sequence[Call]) -> str:
    """What the last of these calls, a sync, is there for; calls of one kind stand at one place of the code."""
    *before, sync = calls
    since = [call for call in before[_last(before, "", sync.path) + 1 :] if _is_part(call, sync.path)]
    if sync.path == JOURNAL:
        return "journal, a line"
    if any(call.name in ("mkdir", "rename") for call in since):
        if sync.path.startswith(".."):
            return "parents of the store, after mkdir"
        return f"{_plain(sync.path)}, after {since[-1].name} {_plain(since[-1].path)}"
    return f"{_plain(sync.path)}, bytes" if since else f"{_plain(sync.path)}, on opening"


def _last(calls: Sequence[Call], name: str, path: str) -> int:
    """Index of the last sync of ``path``, or of the last call ``name`` on it; -1 if there is none."""
    names = (name,) if name else SYNCS
    return next(
        (index for index in range(len(calls) - 1, -1, -1) if calls[index].name in names and calls[index].path == path), -1
    )


def _is_part(call: Call, path: str) -> bool:
    """Whether a sync of ``path`` makes what ``call`` did durable."""
    if call.name in ("mkdir", "rename"):
        return folder_of(call.path) == path
    return call.name in ("write", "pwrite", "ftruncate") and call.path == path


def folder_of(path: str) -> str:
    """The folder that holds ``path``, relative to the store."""
    return os.path.normpath(f"{path}/..")


def _plain(path: str) -> str:
    """A path without what differs from run to run and from chunk to chunk."""
    if path.startswith(".."):
        return "parents of the store"
    folder, _, name = path.rpartition("/")
    temp = _TEMP.fullmatch(name)
    name = f"{temp[1]} (temp)" if temp else name
    name = re.sub(r"^c\.\d+\.0", "c.N.0", name)
    plain = f"{folder}/{name}" if folder else name if path != "." else "store"
    return re.sub(r"[0-9a-f]{16}", "DIGEST", plain)


@dataclass
class _Writer:
    """What one process wrote and did not sync yet: paths of files, and for each folder its changed names."""

    data: set[str] = field(default_factory=set)
    names: dict[str, list[str]] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)
    is_published: bool = False

    @property
    def unsynced(self) -> list[str]:
        return sorted(self.data | {path for paths in self.names.values() for path in paths})


def problems(calls: Sequence[Call]) -> list[str]:
    """What of the order is broken in the calls of one process."""
    writer = _Writer()
    found = []
    for index, call in enumerate(calls):
        following = next((later for later in calls[index + 1 :] if later.name != "acknowledged"), Call("end", ""))
        found += [f"{call.name} {call.path}: {problem}" for problem in _problems(writer, call, following)]
        _note(writer, call)
    first = next((index for index, call in enumerate(calls) if call.path == JOURNAL), len(calls))
    opening = [(call.name, call.path) for call in calls[first : first + 2]]
    if opening != [("rename", JOURNAL), ("fsync", ".")]:
        found.append(f"the journal was believed before it was rewritten: {opening}")
    return found + [f"{path} is never synced" for path in writer.unsynced]


def _problems(writer: _Writer, call: Call, following: Call) -> Iterator[str]:
    if _UNPROMISED.fullmatch(call.path):
        return
    if call.name == "mkdir" and (following.name, following.path) != ("fsync", folder_of(call.path)):
        yield "the parent of a new folder is synced next"
    if call.name == "open":
        if call.flags & os.O_TRUNC:
            yield "nothing is emptied"
        if call.path not in IN_PLACE and not (call.flags & os.O_EXCL and _is_temp(call.path)):
            yield "a file is made under a temporary name"
    if call.name in ("write", "pwrite") and call.path not in IN_PLACE and call.path not in writer.created:
        yield "only new files are written"
    if call.name == "symlink" and not _is_temp(call.path):
        yield "a link is made under a temporary name"
    if call.name == "rename":
        yield from _rename_problems(writer, call, following)
    if call.name == "write" and call.path == JOURNAL:
        if writer.unsynced:
            yield f"commits before {writer.unsynced} are synced"
        if following.name not in SYNCS or following.path != JOURNAL:
            yield "a line is synced at once"
    if call.name == "acknowledged" and writer.unsynced:
        yield f"told before {writer.unsynced} are synced"


def _rename_problems(writer: _Writer, call: Call, following: Call) -> Iterator[str]:
    if folder_of(call.path) != folder_of(call.source):
        yield "from another folder"
    is_flip = MANIFEST in (call.path, call.source)
    if call.source not in writer.created and call.source != MANIFEST:
        yield "of something that this process did not make"
    if call.source in writer.data:
        yield "before its bytes are synced"
    if is_flip and writer.unsynced:
        yield f"publishes before {writer.unsynced} are synced"
    if is_flip and (following.name, following.path) != ("fsync", "."):
        yield "the flip is synced at once"
    if writer.is_published and call.path not in ("density_weights.npy", "embeddings_metadata.json"):
        yield "after the manifest nothing is published but links"


def _note(writer: _Writer, call: Call) -> None:
    if _UNPROMISED.fullmatch(call.path):
        return
    if call.name in SYNCS:
        writer.data.discard(call.path)
        writer.names.pop(call.path, None)
    elif call.name in ("write", "pwrite", "ftruncate"):
        writer.data.add(call.path)
    elif call.name == "open" and call.flags & os.O_EXCL:
        writer.created.add(call.path)
        writer.data.add(call.path)
    elif call.name == "symlink":
        writer.created.add(call.path)
    elif call.name in ("mkdir", "rename"):
        writer.names.setdefault(folder_of(call.path), []).append(call.path)
        writer.data.discard(call.source)
        writer.is_published |= call.name == "rename" and call.path == MANIFEST


def _is_temp(path: str) -> bool:
    return _TEMP.fullmatch(path.rpartition("/")[2]) is not None
