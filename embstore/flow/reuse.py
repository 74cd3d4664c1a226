"""Rows reused from other stores (``--reuse``): which rows, and where they come from.

A row is reused if an old store has exactly the same text or messages under the same model, settings and basis. It is then
what the model would compute again, up to the low bits that depend on its batch. Old stores are only read: each chunk is
checked against its commit when it is read, coordinates and residuals at first use. Of an unfinished store the committed
windows are taken; its digest is that of its journal, which only grows, so a resume finds those windows again. Price: about
one read of the old chunks if both pools have the same order; otherwise each window reads the chunks that it needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import BuildConfig
from embstore.core.errors import (
    ConfigError,
    FieldMismatch,
    IdentityMismatchError,
    IncompleteStoreError,
    StoreNotFoundError,
)
from embstore.core.events import Observer, ignore
from embstore.core.files import storage_errors
from embstore.core.format import CHUNKS, JOURNAL, PROMPTS, SPEC, basis_file, canonical_json
from embstore.core.plan import model_mismatches, refuse_drift, refuse_other_input, settings_mismatches
from embstore.core.prompts import Prompt
from embstore.core.records import ReusedStore, ReuseRecord, decode_journal, replay
from embstore.core.rows import RowRange
from embstore.core.spec import ModelIdentity
from embstore.storage.journal import journal_bytes
from embstore.storage.key_index import KeyIndex, keys_of
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.row_files import row_files

# New chunks in memory beyond those of an embedder alone: one being filled, one prepared, one waiting to be written.
_EXTRA_CHUNKS = 3
_BUDGET_SHARE = 8  # of --memory-budget, for the indexes of old rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Origin of each row: ``store_N`` int16 indexes ``stores`` (-1: the model), ``row_N`` int64 is the row in that store."""

    stores: tuple[EmbeddingStore, ...]
    record: ReuseRecord
    store_N: NDArray[np.int16]
    row_N: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Rows that are copied."""
        return int(np.count_nonzero(self.store_N >= 0))

    @property
    def dropped_rows(self) -> int:
        """Rows of the old stores whose prompts are not in the new one."""
        return sum(store.rows - store.found for store in self.record.stores)

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of anonymous memory for copying, besides the embedder's: new chunks, an old one and its file."""
        if not self.num_rows:
            return 0
        old_rows = max(store.spec.chunk_rows for store in self.stores)
        return 2 * self.stores[0].spec.embedding.dimension * (_EXTRA_CHUNKS * chunk_rows + 2 * old_rows)

    def count(self, rows: RowRange) -> int:
        """Rows of a range that are copied."""
        return int(np.count_nonzero(self.store_N[rows.as_slice()] >= 0))

    def missing(self, rows: RowRange) -> NDArray[np.int64]:
        """Rows of a range that the model computes."""
        return rows.start + np.flatnonzero(self.store_N[rows.as_slice()] < 0)

    def ranges(self, rows: RowRange) -> list[RowRange]:
        """Copied rows of a range, as ranges in row order."""
        is_copied = np.concatenate([[False], self.store_N[rows.as_slice()] >= 0, [False]])
        edges = rows.start + np.flatnonzero(is_copied[1:] != is_copied[:-1])
        return [RowRange(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def open_reused(paths: Sequence[str | Path], root: Path) -> list[EmbeddingStore]:
    """Stores to take rows from.

    Raises
    ------
    ConfigError, StoreNotFoundError, IncompleteStoreError, CorruptStoreError, IdentityMismatchError
        A path is the store being built, or is not a sound store of this format version with committed rows.
    """
    return [_open_other(path, root) for path in paths]


def _open_other(path: str | Path, root: Path) -> EmbeddingStore:
    is_same = root.exists() and Path(path).exists() and Path(path).samefile(root)
    if is_same or os.path.abspath(path) == os.path.abspath(root):  # noqa: PTH100 - a path that may be none at all
        raise ConfigError(f"{path} cannot be reused: it is the store being built", hint="give another --reuse or --out")
    store = open_store(path, partial=True)
    if not store.committed_rows:
        raise IncompleteStoreError(f"{path} has no committed rows to reuse", hint="leave out that --reuse")
    return store


def rows_digest(store: EmbeddingStore) -> str:
    """sha256 over the digests of all files that rows depend on; weights and neighbours do not change it.

    Of an unfinished store: sha256 of its journal, as far as it commits the rows that ``store`` shows.
    """
    if not store.is_complete:
        digests = list(_journal_digests(store.root))
        records, _ = decode_journal(journal_bytes(store.root), name=JOURNAL)
        # another process may have committed more since this store was opened
        lines = range(len(digests) - 1, -1, -1)
        shown = next(line for line in lines if replay(records[:line]).windows == store.journal.windows)
        return digests[shown]
    names = (SPEC, PROMPTS, basis_file(store.spec.embedding.basis), *row_files(store.spec), CHUNKS)
    files = {name: store.published.files[name].sha256 for name in names}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def _journal_digests(root: Path) -> Iterator[str]:
    """sha256 of the journal up to the end of each line, in order."""
    content = journal_bytes(root)
    _, valid_bytes = decode_journal(content, name=JOURNAL)
    total = hashlib.sha256()
    for line in content[:valid_bytes].splitlines(keepends=True):
        total.update(line)
        yield total.hexdigest()


def _as_it_was(store: EmbeddingStore, digest: str) -> EmbeddingStore | None:
    """The store with the rows that it had when ``rows_digest`` gave this digest; None if they are other rows."""
    if store.is_complete and rows_digest(store) == digest:
        return store
    for count, found in enumerate(_journal_digests(store.root)):
        if found == digest:
            records, _ = decode_journal(journal_bytes(store.root), name=JOURNAL)
            return EmbeddingStore(store.root, None, replay(records[:count]), store.spec)
    return None


def _committed_and_sound(store: EmbeddingStore) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows that are committed, and those of them that have a vector: both bool [N]."""
    if store.is_complete:
        return np.ones(store.num_rows, dtype=np.bool_), np.asarray(store.groups) >= 0
    committed_N = np.zeros(store.num_rows, dtype=np.bool_)
    for rows in store.committed_rows:
        committed_N[rows.as_slice()] = True
    sound_N = committed_N.copy()
    sound_N[[failed.row for failed in store.journal.failed]] = False
    return committed_N, sound_N


class RowMatcher:
    """Finds prompts in old stores, a batch at a time; the first store that has a prompt supplies its row.

    Memory is 10 bytes for each prompt, and an index of the old rows within a share of ``memory_bytes``, or in a file in
    ``folder``.
    """

    def __init__(
        self, stores: Sequence[EmbeddingStore], *, folder: Path, memory_bytes: int, observer: Observer = ignore
    ) -> None:
        self._stores = stores
        share = memory_bytes // (_BUDGET_SHARE * max(1, len(stores)))
        self._indexes = [
            KeyIndex(folder, memory_bytes=share, name=f"the index of {store.root}", observer=observer) for store in stores
        ]
        self._sound: list[NDArray[np.bool_]] = []
        self._committed = []
        for store, index in zip(stores, self._indexes, strict=True):
            is_committed, is_sound = _committed_and_sound(store)
            self._sound.append(is_sound)
            self._committed.append(int(np.count_nonzero(is_committed)))
            for batch in store.prompts.blocks():
                rows_B = batch.start + np.flatnonzero(is_committed[batch.as_slice()])
                if len(rows_B):
                    prompts = store.prompts.read(batch)
                    digests = [prompts[row - batch.start].verbatim_digest for row in rows_B]
                    index.add(keys_of(digests), rows_B[:, None])
        self._found = [0] * len(stores)
        self._store_parts: list[NDArray[np.int16]] = []
        self._row_parts: list[NDArray[np.int64]] = []

    def match(self, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """Look for the next prompts; bool [B]: those that a store supplies."""
        keys_B2 = keys_of([prompt.verbatim_digest for prompt in prompts])
        store_B = np.full(len(prompts), -1, dtype=np.int16)
        row_B = np.full(len(prompts), -1, dtype=np.int64)
        for at, (index, is_sound) in enumerate(zip(self._indexes, self._sound, strict=True)):
            old_B = index.find(keys_B2)[:, 0]
            self._found[at] += int(np.count_nonzero(old_B >= 0))
            is_taken = (old_B >= 0) & (store_B < 0)
            is_taken[is_taken] = is_sound[old_B[is_taken]]
            store_B[is_taken], row_B[is_taken] = at, old_B[is_taken]
        self._store_parts.append(store_B)
        self._row_parts.append(row_B)
        return store_B >= 0

    def reuse(self) -> Reuse:
        """What was found for all prompts, in their order."""
        store_N = np.concatenate([np.zeros(0, dtype=np.int16), *self._store_parts])
        row_N = np.concatenate([np.zeros(0, dtype=np.int64), *self._row_parts])
        record = ReuseRecord(
            stores=[
                ReusedStore(
                    digest=rows_digest(store),
                    rows=self._committed[at],
                    found=self._found[at],
                    reused=int(np.count_nonzero(store_N == at)),
                )
                for at, store in enumerate(self._stores)
            ]
        )
        return Reuse(stores=tuple(self._stores), record=record, store_N=store_N, row_N=row_N)


def match_rows(
    prompts: PromptTable, stores: Sequence[EmbeddingStore], *, folder: Path, memory_bytes: int, observer: Observer
) -> Reuse:
    """Find each prompt in the stores: see ``RowMatcher``."""
    matcher = RowMatcher(stores, folder=folder, memory_bytes=memory_bytes, observer=observer)
    for rows in prompts.blocks():
        matcher.match(prompts.read(rows))
    return matcher.reuse()


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedReuse:
    """Origin of all rows, for other processes that see the same files."""

    roots: tuple[Path, ...]
    record: ReuseRecord
    folder: Path

    @classmethod
    def save(cls, reuse: Reuse, folder: Path) -> SavedReuse:
        """Write the origin of all rows into ``folder``: 10 bytes a row."""
        with storage_errors("writing to", folder):
            np.save(folder / "reused_store.npy", reuse.store_N)
            np.save(folder / "reused_row.npy", reuse.row_N)
        return cls(roots=tuple(store.root.absolute() for store in reuse.stores), record=reuse.record, folder=folder)

    def open(self, root: Path) -> Reuse:
        """The saved value, with its stores opened again and its arrays mapped."""
        return Reuse(
            stores=tuple(open_again(self.roots, root, self.record)),
            record=self.record,
            store_N=np.load(self.folder / "reused_store.npy", mmap_mode="r"),
            row_N=np.load(self.folder / "reused_row.npy", mmap_mode="r"),
        )


def nothing_reused(num_rows: int) -> Reuse:
    """No row is reused: all are computed."""
    return Reuse(
        stores=(),
        record=ReuseRecord(stores=[]),
        store_N=np.broadcast_to(np.int16(-1), num_rows),  # one value, whatever N is
        row_N=np.broadcast_to(np.int64(-1), num_rows),
    )


def open_again(paths: Sequence[str | Path], root: Path, record: ReuseRecord) -> list[EmbeddingStore]:
    """The stores that a build began with; missing or different stores are an IdentityMismatchError with both digests."""
    mismatches = []
    stores = []
    if len(paths) != len(record.stores):
        mismatches.append(FieldMismatch(field="stores to reuse", stored=len(record.stores), given=len(paths)))
    for path, expected in zip(paths, record.stores, strict=False):
        try:
            store = _open_other(path, root)
        except StoreNotFoundError:
            given = f"no store at {path}"
        else:
            if (as_it_was := _as_it_was(store, expected.digest)) is not None:
                stores.append(as_it_was)
                continue
            given = rows_digest(store)[:16]
        mismatches.append(FieldMismatch(field=f"rows to reuse from {path}", stored=expected.digest[:16], given=given))
    if mismatches:
        raise IdentityMismatchError(
            mismatches,
            hint="give the stores that this build began with, in the same order, or add --allow-drift to compute the "
            "remaining rows (recorded; they may then differ in low bits from copied ones)",
        )
    return stores


def refuse_unlike(
    stores: Sequence[EmbeddingStore],
    config: BuildConfig,
    model: ModelIdentity | None,
    hardware: Mapping[str, object] | None,
) -> list[FieldMismatch]:
    """Compare options, model and hardware with the first store, and the stores with each other.

    ``model`` is None if none was given, ``hardware`` if no row will be computed. Windows, chunks and the compressor may
    differ.

    Returns
    -------
    Hardware and versions that differ, where ``allow_drift`` permits it.

    Raises
    ------
    IdentityMismatchError
        Hardware or versions differ without ``allow_drift``, or something else differs.
    """
    first = stores[0]
    given = dataclasses.replace(config.embedding, window_rows=None, chunk_rows=None, compressor=None)
    hint = "rows can only be reused under the settings they were made with: use those, or build without --reuse"
    try:
        drifted = refuse_other_input(first.spec, given, model, hardware)
        if drifted and not config.allow_drift:
            hint = (
                "build on the same hardware and threads with the same versions, or add --allow-drift (recorded; rows then "
                "differ in low bits)"
            )
            refuse_drift(drifted)
    except IdentityMismatchError as error:
        raise IdentityMismatchError(error.mismatches, hint=hint, reused=str(first.root)) from None
    # each with each: what one store does not record, two others may record differently
    for first, other in itertools.combinations(stores, 2):
        unlike = settings_mismatches(first.spec.embedding, other.spec.embedding)
        unlike += model_mismatches(first.spec.model, other.spec.model)
        digests = first.spec.basis_sha256[:16], other.spec.basis_sha256[:16]
        if digests[0] != digests[1]:
            unlike.append(FieldMismatch(field="basis_sha256", stored=digests[0], given=digests[1]))
        if unlike:
            raise IdentityMismatchError(
                unlike,
                reused=f"{first.root} and {other.root} together",
                hint="give only stores with the same settings and basis; --reuse passes a sampled basis on to later stores",
            )
    return drifted
