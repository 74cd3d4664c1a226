"""Rows taken over from finished stores (``--reuse``): which rows, from where, and their blocks beside computed ones.

A row is reused if an old store has the very same text or messages under the same model, settings and basis: then it is what
the model would give again, up to what batch mates move it by. Old stores are only read; each of their chunks is checked
against its commit when it is read, coordinates and residuals when they are first used. Price: about one read of the old
chunks where both pools have the same order; where they have not, each window reads the chunks it needs for itself.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError, FieldMismatch, IdentityMismatchError, StoreNotFoundError
from embstore.core.files import storage_errors
from embstore.core.format import BASIS, CHUNKS, COORDINATES, PROMPTS, RESIDUALS, SPEC, canonical_json
from embstore.core.interfaces import RowBlock
from embstore.core.plan import grid_of, refuse_drift, refuse_other_input
from embstore.core.records import FailedRow, ReusedStore, ReuseRecord
from embstore.core.rows import RowRange
from embstore.core.spec import ModelIdentity, StoreSpec, diff_fields
from embstore.host.scratch import map_scratch
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store

_ROW_FILES = (SPEC, PROMPTS, BASIS, COORDINATES, RESIDUALS, CHUNKS)
_SCRATCH = "reused_rows.npy"
_CHUNKS_AHEAD = 2  # of an old store, on their way from the disk while one is decoded
# Computed rows come in smaller blocks than chunks, so that both kinds of memory fit where one kind did.
_BLOCKS_IN_CHUNK = 4
# New chunks in memory beyond those of an embedder alone: what is assembled, what is begun, what waits to be written.
_EXTRA_CHUNKS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Where each row comes from: ``store_N`` int16 indexes ``stores``, -1 is the model; ``row_N`` int64 is its row there."""

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
        """Rows of the old stores that are no prompts of the new one."""
        return sum(store.rows - store.found for store in self.record.stores)

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of anonymous memory that copying takes beside an embedder: new chunks, an old one and its file."""
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
    """Finished stores to take rows from.

    Raises
    ------
    ConfigError, StoreNotFoundError, IncompleteStoreError, CorruptStoreError, IdentityMismatchError
        A path is the store that is built, or holds no finished, sound store of this format version.
    """
    stores = []
    for path in paths:
        if root.exists() and Path(path).exists() and Path(path).samefile(root):
            raise ConfigError(
                f"{path} cannot be reused: it is the store that is built", hint="give another --reuse or --out"
            )
        stores.append(open_store(path))
    return stores


def rows_digest(store: EmbeddingStore) -> str:
    """sha256 over the digests of everything rows are read by; other weights or neighbours do not change it."""
    files = {name: store.published.files[name].sha256 for name in _ROW_FILES}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def match_rows(prompts: PromptTable, stores: Sequence[EmbeddingStore]) -> Reuse:
    """Find each prompt in the stores; the first that has it gives its row. Memory: about 150 bytes a row, while it runs."""
    wanted = {prompt.verbatim_digest: row for row, prompt in enumerate(prompts)}
    store_N = np.full(len(prompts), -1, dtype=np.int16)
    row_N = np.full(len(prompts), -1, dtype=np.int64)
    found = []
    for index, store in enumerate(stores):
        is_failed = np.asarray(store.groups) < 0
        count = 0
        for old_row, prompt in enumerate(store.prompts):
            row = wanted.get(prompt.verbatim_digest)
            count += row is not None
            if row is not None and store_N[row] < 0 and not is_failed[old_row]:
                store_N[row], row_N[row] = index, old_row
        found.append(count)
    record = ReuseRecord(
        stores=[
            ReusedStore(
                digest=rows_digest(store),
                rows=store.num_rows,
                found=found[index],
                reused=int(np.count_nonzero(store_N == index)),
            )
            for index, store in enumerate(stores)
        ]
    )
    return Reuse(stores=tuple(stores), record=record, store_N=store_N, row_N=row_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedReuse:
    """Where rows come from, for processes that see the same files."""

    roots: tuple[Path, ...]
    record: ReuseRecord
    folder: Path

    @classmethod
    def save(cls, reuse: Reuse, folder: Path) -> SavedReuse:
        """Put the places of all rows into ``folder``: 10 bytes a row."""
        with storage_errors("writing to", folder):
            np.save(folder / "reused_store.npy", reuse.store_N)
            np.save(folder / "reused_row.npy", reuse.row_N)
        return cls(roots=tuple(store.root.absolute() for store in reuse.stores), record=reuse.record, folder=folder)

    def open(self, root: Path) -> Reuse:
        """The same, with its stores opened again and the places of rows mapped."""
        return Reuse(
            stores=tuple(open_reused(self.roots, root)),
            record=self.record,
            store_N=np.load(self.folder / "reused_store.npy", mmap_mode="r"),
            row_N=np.load(self.folder / "reused_row.npy", mmap_mode="r"),
        )


def nothing_reused(num_rows: int) -> Reuse:
    """Every row is computed."""
    unknown_N = np.full(num_rows, -1, dtype=np.int64)
    return Reuse(stores=(), record=ReuseRecord(stores=[]), store_N=unknown_N.astype(np.int16), row_N=unknown_N)


def open_again(paths: Sequence[str | Path], root: Path, record: ReuseRecord) -> list[EmbeddingStore]:
    """The stores a build began with; others, changed ones or none are an IdentityMismatchError with both digests."""
    mismatches = []
    stores = []
    if len(paths) != len(record.stores):
        mismatches.append(FieldMismatch(field="stores to reuse", stored=len(record.stores), given=len(paths)))
    for path, expected in zip(paths, record.stores, strict=False):
        try:
            store = open_reused([path], root)[0]
        except StoreNotFoundError:
            given = f"no store at {path}"
        else:
            stores.append(store)
            given = rows_digest(store)[:16]
            if rows_digest(store) == expected.digest:
                continue
        mismatches.append(FieldMismatch(field=f"rows to reuse from {path}", stored=expected.digest[:16], given=given))
    if mismatches:
        raise IdentityMismatchError(
            mismatches,
            hint="give the stores this build began with, in their order, or add --allow-drift to compute the rows that are "
            "left (recorded; they may then differ in low bits from copied ones)",
        )
    return stores


def refuse_unlike(
    stores: Sequence[EmbeddingStore],
    config: BuildConfig,
    model: ModelIdentity | None,
    hardware: Mapping[str, object] | None,
) -> list[str]:
    """Compare options, model and hardware with the first store, and the other stores with it.

    ``model`` is None when none was given, ``hardware`` when no row will be computed. Windows, chunks and the compressor are
    the new store's own.

    Returns
    -------
    Hardware fields that differ and are allowed to.

    Raises
    ------
    IdentityMismatchError
        Anything else differs, or hardware does without ``allow_drift``.
    """
    first = stores[0]
    given = dataclasses.replace(config.embedding, window_rows=None, chunk_rows=None, compressor=None)
    hint = "rows can only be reused as they were made: give the old store's settings, or build without --reuse"
    try:
        drifted = refuse_other_input(first.spec, given, model, hardware)
        if drifted and hardware is not None and not config.allow_drift:
            hint = "build on the same hardware and threads, or add --allow-drift (recorded; rows then differ in low bits)"
            refuse_drift(first.spec, drifted, hardware)
    except IdentityMismatchError as error:
        raise IdentityMismatchError(error.mismatches, hint=hint, reused=str(first.root)) from None
    for other in stores[1:]:
        unlike = diff_fields(first.spec.embedding, other.spec.embedding, prefix="embedding.")
        unlike += [
            mismatch
            for mismatch in diff_fields(first.spec.model, other.spec.model, prefix="model.")
            if mismatch.field not in ("model.name", "model.trust_remote_code")
        ]
        digests = first.spec.basis_sha256[:16], other.spec.basis_sha256[:16]
        if digests[0] != digests[1]:
            unlike.append(FieldMismatch(field="basis_sha256", stored=digests[0], given=digests[1]))
        if unlike:
            raise IdentityMismatchError(
                unlike,
                reused=f"{first.root} and {other.root} together",
                hint="give only stores that were made alike; a basis that was made from a sample is handed on by --reuse",
            )
    return drifted


class RowCopier:
    """Blocks of windows that mix copied and computed rows.

    Where the old rows of a chunk lie together, chunks are assembled one at a time, each while the one before it is written;
    where a window's rows lie scattered, the whole window is assembled in a mapped scratch file, so that every old chunk is
    read once a window and no more.
    """

    def __init__(self, reuse: Reuse, spec: StoreSpec, work: Path) -> None:
        self._reuse = reuse
        self._spec = spec
        self._grid = grid_of(spec)
        self._scratch = work / _SCRATCH
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="embstore-copy")
        self._held: tuple[int, int] | None = None  # store and chunk of ...
        self._held_BV: NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self._decoded = self._held_BV  # fresh memory costs more than what is put into it
        self._free: list[NDArray[np.float16]] = []
        self._expected: dict[int, int] = {}  # of a store: the first chunk that nobody was told of

    @property
    def computed_chunk_rows(self) -> int:
        """Rows of the blocks that an embedder should give for what is computed."""
        return max(1, self._spec.chunk_rows // _BLOCKS_IN_CHUNK)

    def close(self) -> None:
        """End the thread that reads, and delete the scratch file."""
        self._reader.shutdown(cancel_futures=True)
        with storage_errors("removing", self._scratch):
            self._scratch.unlink(missing_ok=True)

    def blocks(self, window: int, computed: Iterator[RowBlock]) -> Iterator[RowBlock]:
        """All rows of a window, chunk by chunk; ``computed`` gives the missing ones, numbered from the window's start."""
        rows = self._grid.window(window)
        feed = _one_by_one(computed, rows.start)
        chunks = [chunk for _, chunk in self._grid.chunks(window)]
        for chunk, emb_BV in zip(chunks, self._buffers(window, chunks), strict=True):
            coord_BR, residual_B = self._coordinates(chunk)
            failed = []
            for row in self._reuse.missing(chunk):
                made = next(feed)
                local = int(row) - chunk.start
                emb_BV[local], coord_BR[local], residual_B[local] = made.emb_V, made.coord_R, made.residual
                if made.reason is not None:
                    failed.append(FailedRow(row=int(row), reason=made.reason))
            release = functools.partial(self._give_back, emb_BV)
            yield RowBlock(emb_BV=emb_BV, coord_BR=coord_BR, residual_B=residual_B, failed=tuple(failed), release=release)
        if next(feed, None) is not None:
            raise AssertionError(f"window {window} has more computed rows than it misses")

    def rereads(self, windows: Sequence[int]) -> float:
        """How many times the old chunks that these windows need are read, on average."""
        reads, distinct = 0, set[tuple[int, int]]()
        for window in windows:
            chunks = [chunk for _, chunk in self._grid.chunks(window)]
            needed = [self._needed(chunk) for chunk in chunks]
            together = set().union(*needed)
            reads += len(together) if self._is_scattered(chunks) else sum(map(len, needed))
            distinct |= together
        return reads / max(1, len(distinct))

    def _buffers(self, window: int, chunks: Sequence[RowRange]) -> Iterator[NDArray[np.float16]]:
        """float16 [rows, V] of each chunk with its copied rows; the others are still to be filled."""
        rows = self._grid.window(window)
        if self._is_scattered(chunks):
            with storage_errors("removing", self._scratch):
                self._scratch.unlink(missing_ok=True)
            whole_WV = map_scratch(self._scratch, (rows.num_rows, self._spec.embedding.dimension), np.float16)
            self._copy(rows, whole_WV)
            yield from (whole_WV[chunk.start - rows.start : chunk.stop - rows.start] for chunk in chunks)
            return
        ahead = self._reader.submit(self._gathered, chunks[0])
        for following in (*chunks[1:], None):
            emb_BV = ahead.result()
            if following is not None:
                ahead = self._reader.submit(self._gathered, following)
            yield emb_BV

    def _is_scattered(self, chunks: Sequence[RowRange]) -> bool:
        """Whether assembling chunk by chunk would read old chunks again and again."""
        by_chunk = [self._needed(chunk) for chunk in chunks]
        return sum(map(len, by_chunk)) > 2 * len(set().union(*by_chunk)) + len(by_chunk)

    def _needed(self, rows: RowRange) -> set[tuple[int, int]]:
        """Old chunks, as (store, index), that hold rows of a range."""
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        return {
            (number, int(index))
            for number, store in enumerate(self._reuse.stores)
            for index in np.unique(row_B[store_B == number] // store.spec.chunk_rows)
        }

    def _gathered(self, rows: RowRange) -> NDArray[np.float16]:
        """float16 [rows, V] with the copied rows of a range."""
        is_whole = rows.num_rows == self._spec.chunk_rows
        emb_BV = self._free.pop() if is_whole and self._free else self._empty(rows.num_rows)
        self._copy(rows, emb_BV)
        return emb_BV

    def _copy(self, rows: RowRange, emb_BV: NDArray[np.float16]) -> None:
        """Put the copied rows of a range in their places; each old chunk is read, checked and decoded once."""
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        # the chunk at hand first: the range before this one ended in it
        for number, index in sorted(self._needed(rows), key=lambda needed: (needed != self._held, needed)):
            chunk_rows = self._reuse.stores[number].spec.chunk_rows
            old_BV = self._old_chunk(number, index)
            # row by row: indexing by a list of rows would copy them twice
            for local in np.flatnonzero((store_B == number) & (row_B // chunk_rows == index)):
                emb_BV[local] = old_BV[row_B[local] - index * chunk_rows]

    def _give_back(self, emb_BV: NDArray[np.float16]) -> None:
        if emb_BV.flags.owndata and len(emb_BV) == self._spec.chunk_rows:  # no map, and not of the last, smaller chunk
            self._free.append(emb_BV)

    def _empty(self, num_rows: int) -> NDArray[np.float16]:
        return np.empty((num_rows, self._spec.embedding.dimension), dtype=np.float16)

    def _old_chunk(self, number: int, index: int) -> NDArray[np.float16]:
        if self._held != (number, index):
            store = self._reuse.stores[number]
            if self._held is None or self._held[0] != number:
                self._held_BV = self._decoded = self._empty(0)  # never the chunks of two stores at a time
                self._decoded = self._empty(store.spec.chunk_rows)
            self._expect(number, index)
            self._held = None  # what is read next may fail half-way
            self._held_BV = store.read_chunk(index, out=self._decoded)
            self._held = (number, index)
        return self._held_BV

    def _expect(self, number: int, index: int) -> None:
        """Pools keep most of their order: after a chunk come the next ones."""
        begun = max(self._expected.get(number, 0), index + 1)
        for following in range(begun, index + 1 + _CHUNKS_AHEAD):
            self._reuse.stores[number].expect_chunk(following)
        self._expected[number] = max(begun, index + 1 + _CHUNKS_AHEAD)

    def _coordinates(self, rows: RowRange) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        coord_BR = np.empty((rows.num_rows, self._spec.embedding.rank), dtype=np.float32)
        residual_B = np.empty(rows.num_rows, dtype=np.float32)
        store_B, row_B = self._reuse.store_N[rows.as_slice()], self._reuse.row_N[rows.as_slice()]
        for number, store in enumerate(self._reuse.stores):
            mine = store_B == number
            coord_BR[mine] = store.coordinates[row_B[mine]]
            residual_B[mine] = store.residuals[row_B[mine]]
        return coord_BR, residual_B


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    emb_V: NDArray[np.float16]
    coord_R: NDArray[np.float32]
    residual: np.float32
    reason: str | None


def _one_by_one(blocks: Iterator[RowBlock], first_row: int) -> Iterator[_Computed]:
    """Computed rows in order; a block is released when its last row was taken."""
    for block in blocks:
        reasons = {failed.row: failed.reason for failed in block.failed}
        for local in range(len(block.emb_BV)):
            yield _Computed(
                emb_V=block.emb_BV[local],
                coord_R=block.coord_BR[local],
                residual=block.residual_B[local],
                reason=reasons.get(first_row + local),
            )
        first_row += len(block.emb_BV)
        block.release()
