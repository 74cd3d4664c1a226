"""A finished store in other formats: float32 rows for numpy users, the files of the original kat scripts, a Parquet table.

``npy`` and ``kat`` have one entry per input *line* with a row, in line order, as readers of the original files expect; the
weight of a line is its row's weight divided by the row's multiplicity, so the sum stays 1. ``parquet`` has one row per
distinct prompt, for joins by id.

In memory are one chunk, or the texts of one row group, and a few numbers a row or line. The ids that ``parquet`` has for
neighbours are in a scratch file next to the table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import format_bytes
from embstore.core.density import NOISE_FLOOR, mean_distance
from embstore.core.errors import BudgetError, ConfigError, StoreExistsError
from embstore.core.files import Buffer, array_header, storage_errors
from embstore.core.format import IDS, METADATA_LINK, PROMPTS_LIST, ROWS_COPY, WEIGHTS_LINK, document
from embstore.core.rows import RowRange
from embstore.storage.atomic import DurableFile, make_directory, save_array, write_durable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.rows_copy import in_original_words

ExportFormat = Literal["npy", "kat", "parquet"]

_PARQUET = "prompts.parquet"
_GROUP_ROWS = 4096
_GROUP_BYTES = 32 << 20  # of lines: long prompts make smaller row groups
_FILES = (ROWS_COPY, IDS, WEIGHTS_LINK, PROMPTS_LIST, METADATA_LINK, _PARQUET)


class _Export(Protocol):
    def __call__(self, path: str | Path, out: str | Path, *, format: ExportFormat = ...) -> list[Path]: ...


def _whole_or_nothing(export: _Export) -> _Export:
    """Where an export fails, delete what it has written: complete files would be in the way of the next one."""

    @functools.wraps(export)
    def run(path: str | Path, out: str | Path, *, format: ExportFormat = "npy") -> list[Path]:
        folder = Path(out)
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        files = [folder / name for name in _FILES if not os.path.lexists(folder / name)]
        try:
            return export(path, out, format=format)
        except BaseException:
            with contextlib.suppress(OSError):
                for file in files:
                    file.unlink(missing_ok=True)
                for each in made:
                    each.rmdir()
            raise

    return run


@_whole_or_nothing
def export_store(path: str | Path, out: str | Path, *, format: ExportFormat = "npy") -> list[Path]:
    """Write a store in another format.

    Parameters
    ----------
    path
        A finished store.
    out
        Folder for the files; it must not contain any of them.
    format
        ``npy``: ``embeddings.npy`` float32 [lines, V] and ``ids.json``. ``kat``: these, ``density_weights.npy`` float32
        [lines] with sum 1, ``prompts_list.json`` and ``embeddings_metadata.json``. ``parquet`` (needs pyarrow):
        ``prompts.parquet``, by row: ``id``, ``text``, ``weight`` float32, ``mean_distance`` and ``density`` float64 (its
        inverse above the noise floor; both null for a row without a vector), ``multiplicity`` int32, and ``neighbors``, a
        list of ``{id, distance}``, nearest first.

    Returns
    -------
    The files written.

    Raises
    ------
    IncompleteStoreError, CorruptStoreError, StoreExistsError, StorageError
        No file is left then.
    BudgetError
        The rows do not fit on the disk.
    ConfigError
        ``parquet`` without pyarrow.
    """
    if format == "parquet":
        return [_write_parquet(open_store(path), Path(out))]
    store = open_store(path)
    folder = Path(out)
    line_rows = np.asarray(store.line_rows)
    rows_L = line_rows[line_rows >= 0]
    names = [ROWS_COPY, IDS]
    if format == "kat":
        names += [WEIGHTS_LINK, PROMPTS_LIST, METADATA_LINK]
    for name in names:
        if (folder / name).exists():
            raise StoreExistsError(f"{folder / name} exists already", hint="choose another --out")
    make_directory(folder)
    _write_rows(store, folder / ROWS_COPY, rows_L)
    _write_texts(folder / IDS, (str(prompt.id) for prompt in store.prompts.each(rows_L)))
    if format == "kat":
        _write_texts(folder / PROMPTS_LIST, (prompt.rendered for prompt in store.prompts.each(rows_L)))
        weights_L = store.weights[rows_L] / store.multiplicity[rows_L].astype(np.float64)
        save_array(folder / WEIGHTS_LINK, weights_L.astype(np.float32))
        counts = {"n_prompts": len(rows_L), "n_items": len(rows_L)}
        statistics = {
            "weights_min": float(weights_L.min()),
            "weights_max": float(weights_L.max()),
            "weights_mean": float(weights_L.mean()),
            "weights_std": float(weights_L.std()),
        }
        metadata = {**in_original_words(store.metadata), **counts, **statistics}
        write_durable(folder / METADATA_LINK, document(metadata))
    return [folder / name for name in names]


def _write_rows(store: EmbeddingStore, path: Path, rows_L: NDArray[np.int64]) -> None:
    """Write float32 [L, V] in line order; consecutive lines of one chunk share a read, other repeats read it again."""
    chunk_rows = store.spec.chunk_rows
    needed, free = 4 * len(rows_L) * store.spec.embedding.dimension, shutil.disk_usage(path.parent).free
    if needed > free:
        raise BudgetError(
            f"{path} would have {format_bytes(needed)}, {path.parent} has {format_bytes(free)} free",
            hint="choose another --out, or read the rows from the store: its array is Zarr, in float16",
        )
    header = array_header(np.dtype("<f4"), (len(rows_L), store.spec.embedding.dimension))
    held, held_index = np.empty((0, 0), dtype=np.float16), -1
    with DurableFile(path, sha256=False) as file:
        file.write(header)
        for row in rows_L:
            index = int(row) // chunk_rows
            if index != held_index:
                held, held_index = store.read_chunk(index), index
            file.write(held[int(row) - index * chunk_rows].astype("<f4").data.cast("B"))


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    """A list of texts as ``document`` writes it, one text in memory at a time."""
    with DurableFile(path, sha256=False) as file:
        before = "[\n  "
        for text in texts:
            file.write(f"{before}{json.dumps(text, ensure_ascii=False)}".encode())
            before = ",\n  "
        file.write(b"\n]\n")


def _write_parquet(store: EmbeddingStore, folder: Path) -> Path:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise ConfigError("writing Parquet needs pyarrow", hint="pip install 'embstore[parquet]'") from None
    path = folder / _PARQUET
    if path.exists():
        raise StoreExistsError(f"{path} exists already", hint="choose another --out")
    neighbor = pa.struct([("id", pa.string()), ("distance", pa.float32())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("weight", pa.float32()),
            ("mean_distance", pa.float64()),
            ("density", pa.float64()),
            ("multiplicity", pa.int32()),
            ("neighbors", pa.list_(neighbor)),
        ]
    )
    make_directory(folder)
    with (
        _all_ids(store, folder, pa) as ids_N,
        DurableFile(path, sha256=False) as file,
        pq.ParquetWriter(_Sink(file), schema, compression="zstd") as writer,
    ):
        for rows in store.prompts.blocks(_GROUP_BYTES, _GROUP_ROWS):
            writer.write_table(pa.Table.from_arrays(_columns(store, rows, ids_N, pa), schema=schema))
    return path


@contextlib.contextmanager
def _all_ids(store: EmbeddingStore, folder: Path, pa: ModuleType) -> Iterator[Any]:
    """Ids of all rows as a column of Arrow, over a file without a name: 8 bytes a row in memory."""
    with storage_errors("writing to", folder), tempfile.TemporaryFile(dir=folder) as scratch:
        ends_N = np.zeros(store.num_rows + 1, dtype=np.int64)
        end = 0
        for row, row_id in enumerate(store.prompts.ids(), start=1):
            end += scratch.write(row_id.encode())
            ends_N[row] = end
        scratch.write(b"\0")  # an empty file cannot be mapped
        scratch.flush()
        mapped = mmap.mmap(scratch.fileno(), 0, access=mmap.ACCESS_READ)
        yield pa.LargeStringArray.from_buffers(store.num_rows, pa.py_buffer(ends_N), pa.py_buffer(mapped))


def _columns(store: EmbeddingStore, rows: RowRange, ids_N: Any, pa: ModuleType) -> list[Any]:  # noqa: ANN401 - pyarrow's
    """Arrays of one row group, in the order of the columns."""
    part = rows.as_slice()
    mean_B = mean_distance(store.neighbor_distances[part], store.metadata["weighting"]["k"])
    lacks_vector_B = ~np.isfinite(mean_B)
    near_BK, far_BK = store.neighbor_ids[part], store.neighbor_distances[part]
    is_found_BK = near_BK >= 0
    ends_B = np.cumsum(is_found_BK.sum(axis=1), dtype=np.int32)
    near = [ids_N.take(pa.array(near_BK[is_found_BK])).cast(pa.string()), pa.array(far_BK[is_found_BK])]
    return [
        ids_N[part].cast(pa.string()),
        pa.array((prompt.rendered for prompt in store.prompts.read(rows)), pa.string()),
        pa.array(store.weights[part]),
        pa.array(mean_B, mask=lacks_vector_B),
        pa.array(1.0 / np.maximum(mean_B, NOISE_FLOOR), mask=lacks_vector_B),
        pa.array(store.multiplicity[part]),
        pa.ListArray.from_arrays(
            np.concatenate([[0], ends_B]).astype(np.int32), pa.StructArray.from_arrays(near, ["id", "distance"])
        ),
    ]


class _Sink(io.RawIOBase):
    """Lets pyarrow write to a durable file, which the caller closes."""

    def __init__(self, file: DurableFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0

    def writable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def write(self, data: Buffer) -> int:  # type: ignore[override]  # collections.abc.Buffer needs Python 3.12
        """Append bytes."""
        written = self._file.write(data)
        self._position += written
        return written
