"""The read side: a finished store as arrays, ids and neighbours. Reads only; follows the manifest, never a fixed name.

Guarantee: what is served was committed. Opening checks the manifest, the size of every listed file and the digests of the
small ones it reads; chunk checksums are checked at each read of rows; ``embstore verify`` reads everything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, CorruptStoreError, IncompleteStoreError, StoreNotFoundError
from embstore.core.format import (
    ALIASES,
    CHUNKS,
    COORDINATES,
    EMBEDDINGS,
    IDS,
    JOURNAL,
    KEYS,
    LINE_ROWS,
    MANIFEST,
    MULTIPLICITY,
    PROMPTS,
    RESIDUALS,
    SPEC,
    JsonObject,
    Manifest,
    StoreSpec,
    chunk_name,
    decode_manifest,
    decode_spec,
    neighbors_paths,
    weights_paths,
)
from embstore.core.plan import grid_of
from embstore.core.records import ChunkRecord, JournalState, decode_chunk_table
from embstore.core.rows import RowRange
from embstore.storage.atomic import read_committed
from embstore.storage.chunks import check_chunk, decode_chunk
from embstore.storage.journal import read_journal
from embstore.storage.prompts import PromptTable
from embstore.storage.writer import check_digest

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbors:
    """The nearest distinct vectors of one row: their rows and ids, and metric distances, ascending."""

    rows: NDArray[np.int32]
    ids: tuple[str, ...]
    distances: NDArray[np.float32]


class EmbeddingStore:
    """A store opened for reading; see ``open_store``."""

    def __init__(self, root: Path, manifest: Manifest | None, state: JournalState, spec: StoreSpec) -> None:
        self.root = root
        self.manifest = manifest
        self.journal = state
        self.spec = spec

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
        """Rows that may be read, as ranges; one range over everything for a finished store."""
        if self.is_complete:
            return [RowRange(0, self.num_rows)]
        return [RowRange(window.start, window.stop) for window in self.journal.windows.values()]

    @functools.cached_property
    def embeddings(self) -> zarr.Array[Any]:
        """The Zarr v3 array, float16 [N, V], read-only; rows never written read as NaN."""
        import zarr  # noqa: PLC0415 - a third of what inspect would spend on imports

        return zarr.open_array(self.root / EMBEDDINGS, mode="r")

    @functools.cached_property
    def coordinates(self) -> NDArray[np.float32]:
        """float32 [N, R], read-only memory map: rows in an orthonormal basis, distances preserved up to residuals."""
        return self._map(COORDINATES)

    @functools.cached_property
    def residuals(self) -> NDArray[np.float32]:
        """float32 [N], read-only memory map: L2 distance from each stored row to its coordinates."""
        return self._map(RESIDUALS)

    @functools.cached_property
    def multiplicity(self) -> NDArray[np.int32]:
        """int32 [N]: how many input lines hold this prompt."""
        return self._map(MULTIPLICITY)

    @functools.cached_property
    def line_rows(self) -> NDArray[np.int64]:
        """int64 [lines]: the row of each input line, -1 for none."""
        return self._map(LINE_ROWS)

    @functools.cached_property
    def keys(self) -> NDArray[np.uint64]:
        """uint64 [N]: the first 8 bytes of each row's identity, little endian, for joins."""
        return self._map(KEYS)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Row ids in row order."""
        return tuple(self._json(IDS))

    @functools.cached_property
    def aliases(self) -> dict[str, int]:
        """Every input id, and every row id, to its row."""
        return dict(self._json(ALIASES))

    @functools.cached_property
    def prompts(self) -> PromptTable:
        """The prompts themselves, by row."""
        return PromptTable(self.root / PROMPTS, self.num_rows)

    @property
    def weights(self) -> NDArray[np.float32]:
        """float32 [N], read-only memory map of the current weights."""
        return self.named_weights("default")

    def named_weights(self, name: str) -> NDArray[np.float32]:
        """float32 [N], read-only memory map of the weighting called ``name``."""
        return self._map(weights_paths(self._weights_digest(name))[0])

    @property
    def metadata(self) -> JsonObject:
        """Metadata of the current weights: settings, statistics, audit."""
        return self.named_metadata("default")

    def named_metadata(self, name: str) -> JsonObject:
        """Metadata of the weighting called ``name``."""
        value: JsonObject = self._json(weights_paths(self._weights_digest(name))[1])
        return value

    @functools.cached_property
    def neighbor_ids(self) -> NDArray[np.int32]:
        """int32 [N, K_max]: rows of the nearest distinct vectors, self excluded, -1 where there is none."""
        return self._map(neighbors_paths(self._published().neighbors).ids)

    @functools.cached_property
    def neighbor_distances(self) -> NDArray[np.float32]:
        """float32 [N, K_max]: metric distances, ascending, +inf where there is no neighbour."""
        return self._map(neighbors_paths(self._published().neighbors).distances)

    @functools.cached_property
    def groups(self) -> NDArray[np.int32]:
        """int32 [N]: the first row that has the same vector (itself for most), -1 for a failed row."""
        return self._map(neighbors_paths(self._published().neighbors).groups)

    @property
    def neighbor_spec(self) -> JsonObject:
        """How the neighbours were found, and what the audit measured."""
        value: JsonObject = self._json(neighbors_paths(self._published().neighbors).spec)
        return value

    def row_of(self, prompt_id: str) -> int:
        """Row of an input id or row id; an unknown id is a ConfigError."""
        row = self.aliases.get(prompt_id)
        if row is None:
            raise ConfigError(f"no prompt has the id {prompt_id!r}", hint="ids are in ids.json and aliases.json")
        return row

    def neighbors(self, prompt_id: str) -> Neighbors:
        """Nearest distinct vectors of one prompt, nearest first."""
        row = self.row_of(prompt_id)
        rows = np.asarray(self.neighbor_ids[row])
        found = rows >= 0
        ids = tuple(self.ids[neighbor] for neighbor in rows[found])
        return Neighbors(rows=rows[found], ids=ids, distances=np.asarray(self.neighbor_distances[row])[found])

    def rows(self, ids: Sequence[str]) -> NDArray[np.float16]:
        """Embedding rows of the given ids, float16 [len(ids), V]; each chunk is read and checked once.

        Raises
        ------
        CorruptStoreError
            A chunk's checksum fails.
        IncompleteStoreError
            A row is not computed yet.
        """
        wanted = np.array([self.row_of(prompt_id) for prompt_id in ids], dtype=np.int64)
        result = np.empty((len(wanted), self.spec.embedding.dimension), dtype=np.float16)
        chunks = wanted // self.spec.chunk_rows
        for index in np.unique(chunks):
            mine = chunks == index
            result[mine] = self.read_chunk(int(index))[wanted[mine] - index * self.spec.chunk_rows]
        return result

    def iter_rows(self) -> Iterator[tuple[RowRange, NDArray[np.float16]]]:
        """All rows in order, one checked chunk at a time: memory is bounded by a chunk."""
        for index in range(grid_of(self.spec).num_chunks):
            yield grid_of(self.spec).chunk(index), self.read_chunk(index)

    def read_chunk(self, index: int) -> NDArray[np.float16]:
        """Checked rows of one chunk, padding removed."""
        record = self._chunks.get(index)
        if record is None:
            raise IncompleteStoreError(f"rows of chunk {index} are not computed yet", hint="run embstore build --resume")
        path = self.root / chunk_name(index)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptStoreError(f"{chunk_name(index)} is missing", hint="run embstore verify STORE --repair") from error
        check_chunk(data, record)
        rows_BV = decode_chunk(
            data,
            chunk_rows=self.spec.chunk_rows,
            dimension=self.spec.embedding.dimension,
            compressor=self.spec.compressor,
        )
        return rows_BV[: grid_of(self.spec).chunk(index).num_rows]

    @functools.cached_property
    def _chunks(self) -> dict[int, ChunkRecord]:
        if self.is_complete:
            return {chunk.index: chunk for chunk in decode_chunk_table(self._listed(CHUNKS))}
        return {chunk.index: chunk for window in self.journal.windows.values() for chunk in window.chunks}

    def _published(self) -> Manifest:
        if self.manifest is None:
            raise _incomplete(self.root, self.journal)
        return self.manifest

    def _weights_digest(self, name: str) -> str:
        names = self._published().names
        if name not in names:
            raise ConfigError(f"no weights are called {name!r}; there are {', '.join(sorted(names))}")
        return names[name]

    def _map(self, name: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(self.root / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CorruptStoreError(f"{name} cannot be mapped ({error})", hint="run embstore verify STORE") from error
        return array

    def _json(self, name: str) -> Any:  # noqa: ANN401 - JSON
        return json.loads(self._listed(name))

    def _listed(self, name: str) -> bytes:
        """Bytes of a small file, checked against the manifest, or against the journal while unfinished."""
        content = read_committed(self.root, name)
        digests = self.manifest.files if self.manifest else self.journal.prompts.files if self.journal.prompts else {}
        if name in digests:
            check_digest(name, content, digests[name])
        return content


def open_store(path: str | Path, *, partial: bool = False) -> EmbeddingStore:
    """Open a store for reading.

    Parameters
    ----------
    path
        The store's folder.
    partial
        Also open a store that is not finished; only committed rows may be used, and there are no weights.

    Raises
    ------
    StoreNotFoundError
        There is no store, or no row of it was planned yet.
    IncompleteStoreError
        The store is not finished and ``partial`` is off.
    CorruptStoreError
        A listed file is missing or has another size, or a file that opening reads fails its digest.
    IdentityMismatchError
        Another format version.
    """
    root = Path(path)
    if not (root / JOURNAL).exists() and not (root / MANIFEST).exists():
        raise StoreNotFoundError(f"{root} holds no store", hint="run embstore build PROMPTS --model MODEL --out STORE")
    state = read_journal(root)
    if not (root / MANIFEST).exists():
        if not partial:
            raise _incomplete(root, state)
        if state.spec is None:
            raise StoreNotFoundError(f"{root} has no planned rows yet", hint="run embstore build --resume")
        content = read_committed(root, SPEC)
        check_digest(SPEC, content, state.spec.files[SPEC])
        return EmbeddingStore(root, None, state, decode_spec(content))
    manifest = decode_manifest(read_committed(root, MANIFEST))
    for name, digest in manifest.files.items():
        try:
            size = (root / name).stat().st_size
        except FileNotFoundError:
            size = None
        if size != digest.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CorruptStoreError(f"{name} {found}, committed were {digest.bytes}", hint=f"run embstore verify {root}")
    content = read_committed(root, SPEC)
    check_digest(SPEC, content, manifest.files[SPEC])
    return EmbeddingStore(root, manifest, state, decode_spec(content))


def open_published(root: Path) -> EmbeddingStore | None:
    """The store at ``root`` if it is published, None if it is not there or unfinished."""
    return open_store(root) if (root / MANIFEST).exists() else None


def _incomplete(root: Path, state: JournalState) -> IncompleteStoreError:
    total = state.prompts.rows if state.prompts else "an unknown number of"
    return IncompleteStoreError(
        f"{root} is not finished: {state.committed_rows} of {total} rows are committed, no weights are published",
        hint=f"run embstore build --resume --out {root}",
    )
