"""Bit rot: what a disk or a person does to the files of a store at rest, and what readers then make of it."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embstore.core.errors import EmbstoreError
from embstore.core.format import JOURNAL
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.training import load_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One fault in one file: its kind, what exactly is done, and how."""

    kind: str
    what: str
    apply: Callable[[Path], object]


def _rewritten(content: bytes) -> Callable[[Path], object]:
    # in place, as rot is: the same inode
    return lambda path: path.write_bytes(content)


def _flipped(content: bytes, offset: int, bit: int) -> Damage:
    changed = bytearray(content)
    changed[offset] ^= 1 << bit
    return Damage(kind="flipped bit", what=f"bit {bit} of byte {offset}", apply=_rewritten(bytes(changed)))


def flipped_bits(content: bytes, chance: random.Random, count: int) -> Iterator[Damage]:
    """A bit of the first byte, of the last one, and of ``count`` others."""
    for offset in (0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(count))):
        yield _flipped(content, offset, chance.randrange(8))


def every_byte_flipped(content: bytes, chance: random.Random) -> Iterator[Damage]:
    """One bit of each byte."""
    for offset in range(len(content)):
        yield _flipped(content, offset, chance.randrange(8))


def _truncated(content: bytes, chance: random.Random, count: int) -> Iterator[Damage]:
    lengths = {len(content) - 1, len(content) // 2, *(chance.randrange(1, len(content)) for _ in range(count))}
    for length in sorted(lengths - {0}):
        yield Damage(kind="truncated file", what=f"cut to {length} bytes", apply=_rewritten(content[:length]))


def _zeroed(content: bytes, chance: random.Random, count: int) -> Iterator[Damage]:
    stretches = [(0, len(content)), (len(content) // 2, len(content))]
    for _ in range(count):
        start = chance.randrange(len(content))
        stretches.append((start, start + chance.choice([1, 16, 512])))
    for start, stop in stretches:
        stretch = content[start:stop]
        if stretch.strip(b"\0"):  # some bytes of an array are zero
            changed = content[:start] + bytes(len(stretch)) + content[stop:]
            yield Damage(kind="zeroed stretch", what=f"bytes {start} to {stop} zeroed", apply=_rewritten(changed))


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _become_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def missing_or_replaced(*, other: Path) -> Iterator[Damage]:
    """The file is gone, or something else lies under its name; ``other`` is a file of other bytes."""
    yield Damage(kind="emptied file", what="emptied", apply=_rewritten(b""))
    yield Damage(kind="deleted file", what="deleted", apply=Path.unlink)
    yield Damage(kind="file replaced by a folder", what="became a folder", apply=_become_folder)
    for target in ("no such file", str(other)):
        what = f"became a link to {Path(target).name}"
        yield Damage(kind="file replaced by a link", what=what, apply=lambda path, to=target: _become_link(path, to))


def damages(content: bytes, chance: random.Random, *, count: int, other: Path) -> Iterator[Damage]:
    """Every kind of damage to a file of these bytes, at ``count`` places more than the usual ones."""
    yield from flipped_bits(content, chance, count)
    yield from _truncated(content, chance, count)
    yield from _zeroed(content, chance, count)
    yield Damage(kind="grown file", what="a byte longer", apply=_rewritten(content + b"\0"))
    yield from missing_or_replaced(other=other)


def remove(path: Path) -> None:
    """Remove whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_state(root: Path, *, apart_from: tuple[str, ...] = (), is_opened: bool = False) -> dict[str, tuple[object, ...]]:
    """Every entry of a tree by relative path, folders included: inode, time of change, and bytes or target.

    ``is_opened``: a writer may open the store, which puts a new file of the same bytes in the place of the journal.
    """
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name in apart_from:
            continue
        entry = path.lstat()
        if path.is_symlink():
            content: object = f"-> {path.readlink()}"
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = "folder"
        is_replaced = is_opened and name in (".", JOURNAL)
        found[name] = (content,) if is_replaced else (entry.st_ino, entry.st_mtime_ns, content)
    return found


def _neighbors(store: EmbeddingStore) -> object:
    found = [store.neighbors(prompt_id) for prompt_id in store.ids]
    return [(item.rows.tolist(), item.ids, item.distances.tobytes()) for item in found]


NAME = "sharp"  # weights that a store for ``readings`` has beside the default ones
# held against a checksum at each reading
CHECKED: dict[str, Callable[[EmbeddingStore], object]] = {
    "rows": lambda store: store.rows(store.ids).tobytes(),
    "chunks": lambda store: [block.tobytes() for _, block in store.iter_rows()],
    "ids": lambda store: store.ids,
    "aliases": lambda store: store.aliases,
    "metadata": lambda store: store.metadata,
    "named metadata": lambda store: store.named_metadata(NAME),
    "how neighbours were found": lambda store: store.neighbor_spec,
    "training": lambda store: load_weights(store.root, expect_keys=store.keys).array.tobytes(),
    "training metadata": lambda store: load_weights(store.root).metadata,
    "training by name": lambda store: load_weights(store.root, name=NAME).array.tobytes(),
}
# memory maps, and what is read through them
MAPPED: dict[str, Callable[[EmbeddingStore], object]] = {
    "neighbors": _neighbors,
    "neighbor_ids": lambda store: store.neighbor_ids.tobytes(),
    "neighbor_distances": lambda store: store.neighbor_distances.tobytes(),
    "groups": lambda store: store.groups.tobytes(),
    "weights": lambda store: store.weights.tobytes(),
    "named_weights": lambda store: store.named_weights(NAME).tobytes(),
    "coordinates": lambda store: store.coordinates.tobytes(),
    "residuals": lambda store: store.residuals.tobytes(),
    "sequences": lambda store: np.asarray(store.sequences).tobytes(),
    "multiplicity": lambda store: store.multiplicity.tobytes(),
    "line_rows": lambda store: store.line_rows.tobytes(),
    "keys": lambda store: store.keys.tobytes(),
    "prompts": lambda store: store.prompts.sample(range(store.num_rows)),
}


def readings(root: Path, readers: dict[str, Callable[[EmbeddingStore], object]]) -> dict[str, object]:
    """What each reader serves of a finished store; a refusal is its error."""
    store = outcome(lambda: open_store(root))
    if not isinstance(store, EmbeddingStore):
        return dict.fromkeys(readers, store)
    return {name: outcome(lambda read=read: read(store)) for name, read in readers.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Traceback:
    """An exception that is no refusal: no reader may ever give one."""

    error: str


def outcome(action: Callable[[], object]) -> object:
    """What an action returns, the refusal that it ends in, or the traceback of anything else."""
    try:
        return action()
    except EmbstoreError as error:
        return error
    except Exception as error:  # noqa: BLE001 - judged by the test, with the damage that caused it
        return Traceback(error=repr(error))


def served_wrongly(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """Readers that neither refused nor served what they served of the sound store."""
    return [
        f"{name} gave {value.error if isinstance(value, Traceback) else 'other values'}"
        for name, value in found.items()
        if not isinstance(value, EmbstoreError) and value != expected[name]
    ]
