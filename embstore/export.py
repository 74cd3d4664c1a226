"""Other formats from a finished store: float32 rows for numpy users, and the original kat scripts' four files.

One chunk is in memory at a time. Output is one entry per input *line* that has a row, in line order, as the original's
readers expect; a line's weight is its row's weight over the row's multiplicity, so the sum stays 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import StoreExistsError
from embstore.core.format import WEIGHTS_LINK, document
from embstore.storage.arrays import array_header, save_array
from embstore.storage.atomic import DurableFile, make_directory, write_durable
from embstore.storage.store import EmbeddingStore, open_store

ExportFormat = Literal["npy", "kat"]


def export_store(path: str | Path, out: str | Path, *, format: ExportFormat = "npy") -> list[Path]:
    """Write a store in another format.

    Parameters
    ----------
    path
        A finished store.
    out
        Folder for the files; none of them may exist in it.
    format
        ``npy``: ``embeddings.npy`` float32 [lines, V] and ``ids.json``. ``kat``: these, ``density_weights.npy`` float32
        [lines] with sum 1, ``prompts_list.json`` and ``embeddings_metadata.json``.

    Returns
    -------
    The files written.

    Raises
    ------
    IncompleteStoreError, CorruptStoreError, StoreExistsError, StorageError
    """
    store = open_store(path)
    folder = Path(out)
    line_rows = np.asarray(store.line_rows)
    rows_L = line_rows[line_rows >= 0]
    names = ["embeddings.npy", "ids.json"]
    if format == "kat":
        names += [WEIGHTS_LINK, "prompts_list.json", "embeddings_metadata.json"]
    for name in names:
        if (folder / name).exists():
            raise StoreExistsError(f"{folder / name} exists already", hint="choose another --out")
    make_directory(folder)
    _write_rows(store, folder / "embeddings.npy", rows_L)
    write_durable(folder / "ids.json", document([store.ids[row] for row in rows_L]))
    if format == "kat":
        weights_L = store.weights[rows_L].astype(np.float64) / store.multiplicity[rows_L]
        save_array(folder / WEIGHTS_LINK, weights_L.astype(np.float32))
        texts = [prompt.rendered for prompt in store.prompts.sample([int(row) for row in rows_L])]
        write_durable(folder / "prompts_list.json", document(texts))
        counts = {"n_prompts": len(rows_L), "n_items": len(rows_L), "embedding_dtype": "float32"}
        statistics = {
            "weights_min": float(weights_L.min()),
            "weights_max": float(weights_L.max()),
            "weights_mean": float(weights_L.mean()),
            "weights_std": float(weights_L.std()),
        }
        write_durable(folder / "embeddings_metadata.json", document({**store.metadata, **counts, **statistics}))
    return [folder / name for name in names]


def _write_rows(store: EmbeddingStore, path: Path, rows_L: NDArray[np.int64]) -> None:
    """float32 [L, V] in line order: a run of lines in one chunk reads it once, a repeated line reads its chunk again."""
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
