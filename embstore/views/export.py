"""A finished store in other formats: float32 rows for numpy users, the files of the original kat scripts, a Parquet table.

One chunk is in memory at a time. ``npy`` and ``kat`` have one entry per input *line* with a row, in line order, as readers
of the original files expect; the weight of a line is its row's weight divided by the row's multiplicity, so the sum stays 1.
``parquet`` has one row per distinct prompt, for joins by id.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR, mean_distance
from embstore.core.errors import ConfigError, StoreExistsError
from embstore.core.files import Buffer, array_header
from embstore.core.format import IDS, METADATA_LINK, PROMPTS_LIST, ROWS_COPY, WEIGHTS_LINK, document
from embstore.core.rows import RowRange
from embstore.storage.atomic import DurableFile, make_directory, save_array, write_durable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.rows_copy import in_original_words

ExportFormat = Literal["npy", "kat", "parquet"]

_PARQUET = "prompts.parquet"
_GROUP_ROWS = 4096


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
    write_durable(folder / IDS, document([store.ids[row] for row in rows_L]))
    if format == "kat":
        weights_L = store.weights[rows_L].astype(np.float64) / store.multiplicity[rows_L]
        save_array(folder / WEIGHTS_LINK, weights_L.astype(np.float32))
        texts = [prompt.rendered for prompt in store.prompts.sample([int(row) for row in rows_L])]
        write_durable(folder / PROMPTS_LIST, document(texts))
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
    header = array_header(np.dtype("<f4"), (len(rows_L), store.spec.embedding.dimension))
    held, held_index = np.empty((0, 0), dtype=np.float16), -1
    with DurableFile(path, sha256=False) as file:
        file.write(header)
        for row in rows_L:
            index = int(row) // chunk_rows
            if index != held_index:
                held, held_index = store.read_chunk(index), index
            file.write(held[int(row) - index * chunk_rows].astype("<f4").data.cast("B"))


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
    with DurableFile(path, sha256=False) as file, pq.ParquetWriter(_Sink(file), schema, compression="zstd") as writer:
        for rows in RowRange(0, store.num_rows).split(_GROUP_ROWS):
            writer.write_table(pa.Table.from_pydict(_columns(store, rows), schema=schema))
    return path


def _columns(store: EmbeddingStore, rows: RowRange) -> dict[str, list[object]]:
    part = rows.as_slice()
    mean_B = mean_distance(store.neighbor_distances[part], store.metadata["weighting"]["k"])
    has_vector_B = np.isfinite(mean_B)
    neighbors = [
        [{"id": store.ids[row], "distance": float(far)} for row, far in zip(near, distances, strict=True) if row >= 0]
        for near, distances in zip(store.neighbor_ids[part], store.neighbor_distances[part], strict=True)
    ]
    prompts = store.prompts.read(rows)
    return {
        "id": [prompt.id for prompt in prompts],
        "text": [prompt.rendered for prompt in prompts],
        "weight": list(store.weights[part]),
        "mean_distance": [float(r) if known else None for r, known in zip(mean_B, has_vector_B, strict=True)],
        "density": [
            1.0 / max(float(r), NOISE_FLOOR) if known else None for r, known in zip(mean_B, has_vector_B, strict=True)
        ],
        "multiplicity": list(store.multiplicity[part]),
        "neighbors": list(neighbors),
    }


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
