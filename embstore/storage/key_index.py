"""A map from keys to numbers for as many keys as the disk takes: row numbers of prompts, lines of ids.

A hash table with linear probing in one numpy array, read and filled by batches, which is how Python is fast enough. A key is
the first 16 bytes of a cryptographic hash: two different ones are equal with a probability of 1e-24 among ten million. While
the table fits the given memory it is anonymous memory. Then it is a mapped file without a name, which the system deletes
whatever becomes of this process, and whose pages it can write back and drop.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import format_bytes
from embstore.core.events import Notice, Observer, ignore
from embstore.core.files import storage_errors
from embstore.host.scratch import map_scratch

KEY_BYTES = 16
BATCH_KEYS, BATCH_BYTES = 1024, 4 << 20  # of one batch, with the bytes of what its keys belong to
_FIRST_SLOTS = 1 << 12
_MOST_FILLED = 0.75  # of the slots, so that a search rarely takes more than a few steps
_COPIED_SLOTS = 1 << 16  # at a time, when the table grows

# Shapes: B keys of a batch, S slots, W words of 8 bytes: two of the key, one of each number.
Keys = NDArray[np.uint64]
Item = TypeVar("Item")


def batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in lists that are worth looking up together, each of ``BATCH_KEYS`` items or ``BATCH_BYTES`` at most."""
    batch: list[Item] = []
    num_bytes = 0
    for item in items:
        batch.append(item)
        num_bytes += size(item)
        if len(batch) >= BATCH_KEYS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def keys_of(digests: Sequence[bytes]) -> Keys:
    """Keys uint64 [B, 2] of hashes of at least 16 bytes."""
    return np.frombuffer(b"".join(digest[:KEY_BYTES] for digest in digests), dtype="<u8").reshape(-1, 2)


def text_keys(texts: Sequence[str]) -> Keys:
    """Keys uint64 [B, 2] of texts."""
    return keys_of([hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest() for text in texts])


class KeyIndex:
    """Numbers by key, each 0 or more. Not thread-safe.

    Parameters
    ----------
    width
        Numbers of a key.
    memory_bytes
        Memory that the table may take; while it grows, half as much again.
    folder
        Where the file of a larger table goes.
    name
        What it is, for the notice that it does not fit the memory.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, name: str, width: int = 1, observer: Observer = ignore) -> None:
        self._folder, self._memory_bytes, self._name, self._observer = folder, memory_bytes, name, observer
        self._width = width
        self._is_mapped = False
        self._count = 0
        self._table_SW = self._empty(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._count

    def find(self, keys_B2: Keys) -> NDArray[np.int64]:
        """Numbers int64 [B, width] of each key; -1 where the index does not have it."""
        numbers_BW = np.full((len(keys_B2), self._width), -1, dtype=np.int64)
        pending_P, slots_P = np.arange(len(keys_B2)), self._first_slots(keys_B2)
        while len(pending_P):
            entries_PW = self._table_SW[slots_P]
            is_used_P = entries_PW[:, 2] != 0
            is_same_P = is_used_P & (entries_PW[:, :2] == keys_B2[pending_P]).all(axis=1)
            numbers_BW[pending_P[is_same_P]] = entries_PW[is_same_P, 2:].astype(np.int64) - 1
            goes_on_P = is_used_P & ~is_same_P
            pending_P, slots_P = pending_P[goes_on_P], self._next(slots_P[goes_on_P])
        return numbers_BW

    def add(self, keys_B2: Keys, numbers_BW: NDArray[np.int64]) -> None:
        """Add keys that differ from each other and from those of the index, with numbers [B, width]."""
        while self._count + len(keys_B2) > _MOST_FILLED * len(self._table_SW):
            self._grow()
        self._place(np.concatenate([keys_B2, (numbers_BW + 1).astype(np.uint64)], axis=1))
        self._count += len(keys_B2)

    def change(self, keys_B2: Keys, numbers_BW: NDArray[np.int64]) -> None:
        """Give keys that the index has other numbers."""
        pending_P, slots_P = np.arange(len(keys_B2)), self._first_slots(keys_B2)
        while len(pending_P):
            is_same_P = (self._table_SW[slots_P, :2] == keys_B2[pending_P]).all(axis=1)
            self._table_SW[slots_P[is_same_P], 2:] = (numbers_BW[pending_P[is_same_P]] + 1).astype(np.uint64)
            pending_P, slots_P = pending_P[~is_same_P], self._next(slots_P[~is_same_P])

    def fill(self, number: int) -> None:
        """Give every key this number."""
        for start in range(0, len(self._table_SW), _COPIED_SLOTS):
            part_SW = self._table_SW[start : start + _COPIED_SLOTS]
            part_SW[part_SW[:, 2] != 0, 2:] = number + 1

    def _place(self, entries_BW: NDArray[np.uint64]) -> None:
        pending_P, slots_P = np.arange(len(entries_BW)), self._first_slots(entries_BW)
        while len(pending_P):
            is_free_P = self._table_SW[slots_P, 2] == 0
            taken_P = slots_P[is_free_P]
            self._table_SW[taken_P] = entries_BW[pending_P[is_free_P]]  # of several in one slot, the last one stays
            stays_P = (self._table_SW[slots_P, :2] == entries_BW[pending_P, :2]).all(axis=1)
            pending_P, slots_P = pending_P[~stays_P], self._next(slots_P[~stays_P])

    def _first_slots(self, keys_BW: Keys) -> NDArray[np.intp]:
        """Slots in the order of the keys: a table that grows is read and written from its beginning to its end."""
        slots: NDArray[np.intp] = (
            ((keys_BW[:, 0] >> np.uint64(32)) * np.uint64(len(self._table_SW))) >> np.uint64(32)
        ).astype(np.intp)
        return slots

    def _next(self, slots_P: NDArray[np.intp]) -> NDArray[np.intp]:
        return (slots_P + 1) % len(self._table_SW)

    def _grow(self) -> None:
        old_SW = self._table_SW
        self._table_SW = self._empty(2 * len(old_SW))
        for start in range(0, len(old_SW), _COPIED_SLOTS):
            part_SW = old_SW[start : start + _COPIED_SLOTS]
            self._place(part_SW[part_SW[:, 2] != 0])

    def _empty(self, num_slots: int) -> NDArray[np.uint64]:
        shape = num_slots, 2 + self._width
        num_bytes = 8 * shape[0] * shape[1]
        if num_bytes <= self._memory_bytes:
            return np.zeros(shape, dtype=np.uint64)
        if not self._is_mapped:
            self._observer(
                Notice(
                    message=f"{self._name} does not fit its share of --memory-budget: it goes on in a file of "
                    f"{format_bytes(num_bytes)} in {self._folder}, which doubles as it fills and is gone afterwards"
                )
            )
            self._is_mapped = True
        path = self._folder / f".index-{secrets.token_hex(8)}"
        try:
            return map_scratch(path, shape, np.uint64).view(np.ndarray)
        finally:
            with storage_errors("removing", path):
                path.unlink(missing_ok=True)  # the map keeps the file
