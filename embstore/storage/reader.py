"""The read side: a finished store as arrays, ids and neighbours. Reads only; follows the manifest, never a fixed name.

Guarantee: only committed bytes are served. Opening checks the manifest, the size of every listed file, and the digests of
the small files it reads; each read of rows checks the checksums of its chunks; ``embstore verify`` reads everything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import K_MAX
from embstore.core.decode import parse_json, shown
from embstore.core.errors import CorruptStoreError, IncompleteStoreError, StoreNotFoundError
from embstore.core.files import (
    check_array,
    check_content,
    file_size,
    map_array,
    read_committed,
)
from embstore.core.format import (
    ALIASES,
    ARRAY_METADATA,
    CHUNKS,
    COORDINATES,
    DEFAULT_WEIGHTS,
    DOCUMENT_BYTES,
    EMBEDDINGS,
    IDS,
    JOURNAL,
    KEYS,
    LINE_ROWS,
    MANIFEST,
    MAX_ROWS,
    MULTIPLICITY,
    NEIGHBORS,
    PROMPTS,
    RESIDUALS,
    SEQUENCES,
    SPEC,
    TABLE_BYTES,
    WEIGHTS,
    FileDigest,
    JsonObject,
    Manifest,
    basis_file,
    decode_metadata,
    decode_neighbors_spec,
    follow_manifest,
    neighbors_paths,
    weights_paths,
    weights_problem,
)
from embstore.core.plan import grid_of, refuse_misfits
from embstore.core.records import ChunkRecord, JournalState, decode_chunk_table
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec, array_metadata, decode_spec
from embstore.storage.alias_file import AliasFile
from embstore.storage.chunks import decode_chunk, prefetch_chunk, read_chunk
from embstore.storage.journal import read_journal, require_store
from embstore.storage.prompt_table import PromptTable
from embstore.storage.row_files import check_rows, header_problem, row_files

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbors:
    """The nearest distinct vectors of one row: their rows and ids, and metric distances, ascending."""

    rows: NDArray[np.int32]
    ids: tuple[str, ...]
    distances: NDArray[np.float32]


class EmbeddingStore:
    """A store opened for reading; see ``open_store``.

    Neighbours and weights are mapped on opening, so they stay the same even if a writer replaces them meanwhile. Every array
    is compared with its commit when it is first used, which reads its file once.
    """

    def __init__(self, root: Path, manifest: Manifest | None, state: JournalState, spec: StoreSpec) -> None:
        self.root = root
        self.manifest = manifest
        self.journal = state
        self.spec = spec
        self._hint = f"run embstore verify {root}"
        committed = [record.files for record in (state.prompts, state.spec) if record is not None]
        self._digests = (
            manifest.files if manifest else {name: digest for files in committed for name, digest in files.items()}
        )
        replaceable = [name for name in (manifest.files if manifest else ()) if name.startswith((WEIGHTS, NEIGHBORS))]
        self._arrays = {name: self._map_replaceable(name) for name in replaceable if name.endswith(".npy")}
        self._documents = {name: self._document(name) for name in replaceable if name.endswith(".json")}
        self._sound: set[str] = set()

    @property
    def is_complete(self) -> bool:
        """Whether the store was published: all rows, density and weights."""
        return self.manifest is not None

    @property
    def num_rows(self) -> int:
        """N, the number of distinct prompts."""
        return self.spec.rows

    @property
    def committed_rows(self) -> list[RowRange]:
        """Rows that may be read, as ranges; a finished store has one range over all rows."""
        if self.is_complete:
            return [RowRange(0, self.num_rows)]
        return [RowRange(window.start, window.stop) for window in self.journal.windows.values()]

    def committed_digest(self, name: str) -> FileDigest:
        """What the manifest says of a file, or the journal while there is no manifest."""
        return self._digests[name]

    @functools.cached_property
    def embeddings(self) -> zarr.Array[Any]:
        """The Zarr v3 array, float16 [N, V], read-only; rows never written read as NaN.

        zarr reads the chunk files itself and checks sizes and checksums, but follows links. ``rows`` refuses links, too.
        """
        import zarr  # noqa: PLC0415 - a third of what inspect would spend on imports

        # the metadata of an untrusted array may name codecs that execute what they read
        if read_committed(self.root, ARRAY_METADATA) != array_metadata(self.spec):
            raise CorruptStoreError(f"{ARRAY_METADATA} does not match the array in spec.json", hint=self._hint)
        return zarr.open_array(self.root / EMBEDDINGS, mode="r", zarr_format=3)

    @functools.cached_property
    def coordinates(self) -> NDArray[np.float32]:
        """float32 [N, R], read-only memory map: rows in an orthonormal basis, distances preserved up to residuals."""
        return self._checked(
            COORDINATES, map_array(self.root, COORDINATES, "<f4", (self.num_rows, self.spec.embedding.rank))
        )

    @functools.cached_property
    def residuals(self) -> NDArray[np.float32]:
        """float32 [N], read-only memory map: L2 distance from each stored row to its coordinates."""
        return self._checked(RESIDUALS, map_array(self.root, RESIDUALS, "<f4", (self.num_rows,)))

    @functools.cached_property
    def sequences(self) -> NDArray[np.uint64] | None:
        """uint64 [N], read-only memory map: rows of one value, apart from 0, were made from the same tokens.

        None in a store from before December 2026.
        """
        if not self.spec.sequences:
            return None
        return self._checked(SEQUENCES, map_array(self.root, SEQUENCES, "<u8", (self.num_rows,)))

    @functools.cached_property
    def multiplicity(self) -> NDArray[np.int32]:
        """int32 [N]: how many input lines have this prompt."""
        return self._checked(MULTIPLICITY, map_array(self.root, MULTIPLICITY, "<i4", (self.num_rows,)), low=1)

    @functools.cached_property
    def line_rows(self) -> NDArray[np.int64]:
        """int64 [lines]: the row of each input line, -1 for none."""
        lines = map_array(self.root, LINE_ROWS, "<i8", (None,))
        if not self.num_rows <= len(lines) <= MAX_ROWS:
            raise CorruptStoreError(f"{LINE_ROWS} has {len(lines)} lines for {self.num_rows} rows", hint=self._hint)
        return self._checked(LINE_ROWS, lines, low=-1, high=self.num_rows - 1)

    @functools.cached_property
    def keys(self) -> NDArray[np.uint64]:
        """uint64 [N]: the first 8 bytes of each row's identity, little endian, for joins."""
        return self._checked(KEYS, map_array(self.root, KEYS, "<u8", (self.num_rows,)))

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Row ids in row order."""
        ids = parse_json(self._listed(IDS, limit=None), name=IDS)
        if not isinstance(ids, list) or len(ids) != self.num_rows or not all(isinstance(row_id, str) for row_id in ids):
            raise CorruptStoreError(f"{IDS} is not a list of {self.num_rows} ids", hint=self._hint)
        return tuple(ids)

    @functools.cached_property
    def aliases(self) -> dict[str, int]:
        """Every input id, and every row id, to its row."""
        aliases = parse_json(self._listed(ALIASES, limit=None), name=ALIASES)
        rows = aliases.values() if isinstance(aliases, dict) else [None]
        unlike = next((row for row in rows if type(row) is not int or not 0 <= row < self.num_rows), None)
        if not isinstance(aliases, dict) or unlike is not None:
            raise CorruptStoreError(
                f"{ALIASES} maps an id to {shown(unlike)}, which is not one of {self.num_rows} rows", hint=self._hint
            )
        return aliases

    @functools.cached_property
    def _aliases(self) -> AliasFile:
        return AliasFile(self.root, self.num_rows, self._digests.get(ALIASES))

    @functools.cached_property
    def prompts(self) -> PromptTable:
        """The prompts themselves, by row."""
        return PromptTable(self.root / PROMPTS, self.num_rows, self._digests.get(PROMPTS))

    @property
    def weights(self) -> NDArray[np.float32]:
        """float32 [N], read-only memory map of the current weights."""
        return self.named_weights(DEFAULT_WEIGHTS)

    def named_weights(self, name: str) -> NDArray[np.float32]:
        """float32 [N], read-only memory map of the weighting called ``name``."""
        path = weights_paths(self._weights_digest(name))[0]
        if path not in self._sound and (problem := weights_problem(self._arrays[path])) is not None:
            raise CorruptStoreError(f"{path} {problem}", hint=self._hint)
        return self._checked(path, self._arrays[path])

    @property
    def metadata(self) -> JsonObject:
        """Metadata of the current weights: settings, statistics, audit."""
        return self.named_metadata(DEFAULT_WEIGHTS)

    def named_metadata(self, name: str) -> JsonObject:
        """Metadata of the weighting called ``name``."""
        return self._documents[weights_paths(self._weights_digest(name))[1]]

    @property
    def neighbor_ids(self) -> NDArray[np.int32]:
        """int32 [N, K_max]: rows of the nearest distinct vectors, self excluded, -1 where there is none."""
        path = neighbors_paths(self.published.neighbors).ids
        return self._checked(path, self._arrays[path], low=-1, high=self.num_rows - 1)

    @property
    def neighbor_distances(self) -> NDArray[np.float32]:
        """float32 [N, K_max]: metric distances, ascending, +inf where there is no neighbour."""
        path = neighbors_paths(self.published.neighbors).distances
        return self._checked(path, self._arrays[path], low=0)

    @property
    def groups(self) -> NDArray[np.int32]:
        """int32 [N]: the first row that has the same vector (itself for most), -1 for a failed row."""
        path = neighbors_paths(self.published.neighbors).groups
        return self._checked(path, self._arrays[path], low=-1, high=self.num_rows - 1)

    @property
    def neighbor_spec(self) -> JsonObject:
        """How the neighbours were found, and what the audit measured."""
        return self._documents[neighbors_paths(self.published.neighbors).spec]

    def row_of(self, prompt_id: str) -> int:
        """Row of an input id or row id; an unknown id is a ConfigError. Price: one pass over the ids, which are not kept."""
        return self._aliases.rows_of([prompt_id])[0]

    def neighbors(self, prompt_id: str) -> Neighbors:
        """Nearest distinct vectors of one prompt, nearest first."""
        row = self.row_of(prompt_id)
        rows, distances = np.asarray(self.neighbor_ids[row]), np.asarray(self.neighbor_distances[row])
        found = rows >= 0
        ids = tuple(str(prompt.id) for prompt in self.prompts.each(rows[found].tolist()))
        return Neighbors(rows=rows[found], ids=ids, distances=distances[found])

    def rows(self, ids: Sequence[str]) -> NDArray[np.float16]:
        """Embedding rows of the given ids, float16 [len(ids), V]; each chunk is read and checked once.

        Raises
        ------
        CorruptStoreError, IncompleteStoreError
            The checksum of a chunk fails, or a row is not computed yet.
        """
        return self.rows_at(np.array(self._aliases.rows_of(ids), dtype=np.int64))

    def rows_at(self, rows_B: NDArray[np.int64]) -> NDArray[np.float16]:
        """As ``rows``, by row numbers: float16 [B, V]."""
        emb_BV = np.empty((len(rows_B), self.spec.embedding.dimension), dtype=np.float16)
        for index in np.unique(rows_B // self.spec.chunk_rows):
            mine = rows_B // self.spec.chunk_rows == index
            emb_BV[mine] = self.read_chunk(int(index))[rows_B[mine] - index * self.spec.chunk_rows]
        return emb_BV

    def iter_rows(self) -> Iterator[tuple[RowRange, NDArray[np.float16]]]:
        """All rows in order, one checked chunk at a time: memory is bounded by a chunk."""
        for index in range(grid_of(self.spec).num_chunks):
            yield grid_of(self.spec).chunk(index), self.read_chunk(index)

    def read_chunk(self, index: int, *, out: NDArray[np.float16] | None = None) -> NDArray[np.float16]:
        """Checked rows of one chunk, without padding; in ``out`` [chunk_rows, V] if it is given and rows are compressed."""
        record = self._chunks.get(index)
        if record is None:
            raise IncompleteStoreError(f"rows of chunk {index} are not computed yet", hint="run embstore build --resume")
        rows_BV = decode_chunk(read_chunk(self.root, self.spec, record), self.spec, index, out=out)
        return rows_BV[: grid_of(self.spec).chunk(index).num_rows]

    def prefetch_chunk(self, index: int) -> None:
        """Tell the kernel that a chunk will be read soon, so that the disk works while other chunks are decoded."""
        if index in self._chunks:
            prefetch_chunk(self.root, index)

    @functools.cached_property
    def _chunks(self) -> dict[int, ChunkRecord]:
        if self.is_complete:
            return {chunk.index: chunk for chunk in decode_chunk_table(self._listed(CHUNKS, limit=TABLE_BYTES))}
        return {chunk.index: chunk for window in self.journal.windows.values() for chunk in window.chunks}

    @property
    def published(self) -> Manifest:
        """The manifest; an unfinished store raises an IncompleteStoreError."""
        if self.manifest is None:
            raise unfinished(self.root, self.journal)
        return self.manifest

    def _weights_digest(self, name: str) -> str:
        return self.published.weighting(name, store=self.root)

    def _map_replaceable(self, name: str) -> NDArray[Any]:
        """An array of the neighbour graph or of weights; it has one possible shape."""
        paths = neighbors_paths(self.published.neighbors)
        layouts = {
            paths.ids: ("<i4", (self.num_rows, K_MAX)),
            paths.distances: ("<f4", (self.num_rows, K_MAX)),
            paths.groups: ("<i4", (self.num_rows,)),
        }
        return map_array(self.root, name, *layouts.get(name, ("<f4", (self.num_rows,))))

    def _document(self, name: str) -> JsonObject:
        decode = decode_neighbors_spec if name.startswith(NEIGHBORS) else decode_metadata
        return decode(self._listed(name), name=name)

    def _checked(self, name: str, array: NDArray[Any], *, low: float | None = None, high: float = np.inf) -> NDArray[Any]:
        """A mapped array, once it equals its commit and its values are in ``low`` to ``high``; read once, at first use."""
        if name in self._sound:
            return array
        if name in self._digests:
            check_array(self.root, name, array, self._digests[name])
        elif name not in row_files(self.spec):
            raise CorruptStoreError(f"{JOURNAL} does not commit {name}", hint=self._hint)
        else:  # of an unfinished store: each committed window has its own checksum
            for window in self.journal.windows.values():
                check_rows(name, array[window.start : window.stop].tobytes(), window)
        if low is not None:
            with np.errstate(invalid="ignore"):
                least, most = array.min(), array.max()
            if not (low <= least and most <= high):  # also refuses NaN
                message = f"{name} has values from {least} to {most}, allowed are {low} to {high}"
                raise CorruptStoreError(message, hint=self._hint)
        self._sound.add(name)
        return array

    def _listed(self, name: str, *, limit: int | None = DOCUMENT_BYTES) -> bytes:
        """Bytes of a small file, checked against the manifest, or against the journal while unfinished."""
        content = read_committed(self.root, name, limit=limit)
        if name in self._digests:
            check_content(self.root, name, [content], self._digests[name])
        return content


def open_store(path: str | Path, *, partial: bool = False) -> EmbeddingStore:
    """Open a store for reading.

    Parameters
    ----------
    path
        The store's folder.
    partial
        Also open a store that is not finished: only committed rows can be read, and there are no weights.

    Raises
    ------
    StoreNotFoundError
        There is no store, or it has no spec yet.
    IncompleteStoreError
        The store is not finished and ``partial`` is off.
    CorruptStoreError
        A listed file is missing or has another size, or a file that opening reads fails its digest.
    IdentityMismatchError
        Another format version.
    """
    root = Path(path)
    require_store(root)
    state = read_journal(root)
    if not os.path.lexists(root / MANIFEST):
        if not partial:
            raise unfinished(root, state)
        if state.spec is None:
            raise StoreNotFoundError(f"{root} has no spec yet", hint=f"run embstore build --resume --out {root}")
        content = read_committed(root, SPEC)
        check_content(root, SPEC, [content], state.spec.files[SPEC])
        spec = decode_spec(content)
        refuse_misfits(spec, state)
        return EmbeddingStore(root, None, state, spec)
    return follow_manifest(lambda: read_committed(root, MANIFEST), lambda manifest: _open(root, manifest, state))


def require_published(root: Path) -> None:
    """Refuse what is not a finished store.

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError
    """
    require_store(root)
    if not os.path.lexists(root / MANIFEST):
        raise unfinished(root, read_journal(root))


def open_published(root: Path) -> EmbeddingStore | None:
    """The store at ``root`` if it is published, None if it is missing or unfinished."""
    return open_store(root) if os.path.lexists(root / MANIFEST) else None


def _open(root: Path, manifest: Manifest, state: JournalState) -> EmbeddingStore:
    for name, digest in manifest.files.items():
        size = file_size(root, name)
        if size != digest.bytes:
            found = f"is missing, but {digest.bytes} bytes" if size is None else f"has {size} bytes, but {digest.bytes}"
            raise CorruptStoreError(f"{name} {found} were committed", hint=f"run embstore verify {root}")
    content = read_committed(root, SPEC)
    check_content(root, SPEC, [content], manifest.files[SPEC])
    spec = decode_spec(content)
    if (manifest.rows, manifest.dimension) != (spec.rows, spec.embedding.dimension):
        raise CorruptStoreError(
            f"{MANIFEST} publishes {manifest.rows} x {manifest.dimension}, "
            f"{SPEC} has {spec.rows} x {spec.embedding.dimension}",
            hint=f"run embstore verify {root}",
        )
    for name in (basis_file(spec.embedding.basis), *row_files(spec)):
        if name not in manifest.files:
            raise CorruptStoreError(
                f"{MANIFEST} does not list {name}, which {SPEC} asks for", hint=f"run embstore verify {root}"
            )
    for name in row_files(spec):
        if (problem := header_problem(root, spec, name)) is not None:
            raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root} --repair")
    refuse_misfits(spec, state)
    return EmbeddingStore(root, manifest, state, spec)


def unfinished(root: Path, state: JournalState) -> IncompleteStoreError:
    """The refusal of what only a finished store has."""
    total = state.prompts.rows if state.prompts else "an unknown number of"
    return IncompleteStoreError(
        f"{root} is not finished: {state.committed_rows} of {total} rows are committed, no weights are published",
        hint=f"run embstore build --resume --out {root}",
    )
