"""A store of embeddings that exist already: the pipeline of ``build``, with an array instead of a model.

Row i of the array is row i of the store, whatever its id and however often it occurs. Rows with bit-equal vectors are found
later, and share a weight.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError
from embstore.core.events import Observer, ignore
from embstore.core.format import JOURNAL
from embstore.flow.build import BuildReport, build
from embstore.storage.import_source import RowIds, open_given
from embstore.storage.journal import read_journal


def import_array(
    array: str | Path,
    *,
    out: str | Path,
    ids: str | Path | None = None,
    config: BuildConfig | None = None,
    resume: bool = False,
    observer: Observer = ignore,
) -> BuildReport:
    """Build a store from an array of embeddings, or continue one.

    Parameters
    ----------
    array
        ``.npy`` file or folder of a Zarr array, [N, D] of float16, float32 or float64. It is read in pieces, and its rows
        are scaled to length 1: distances are those between directions, as cosine similarity has them.
    out
        The store's folder; created when absent.
    ids
        Ids of the rows: a text file with one id a line, a JSON list, or JSONL (which may contain prompts, too). None: row
        numbers, or on a resume the ids in the store.
    config
        As for ``build``; of ``embedding`` only threads, rows of chunks and windows, and the compressor are used.
    resume
        Continue what is at ``out``.
    observer
        As for ``build``.

    Returns
    -------
    BuildReport

    Raises
    ------
    ArrayError, PromptError, RowError
        The array or the ids cannot be read, or a row cannot be scaled to length 1; and as ``build``.
    """
    from embstore.model.array_embedder import ArraySource  # noqa: PLC0415 - torch loads once the array is known to be one

    config = config or BuildConfig()
    if config.embedding.model is not None or config.embedding.space is not None:
        raise ConfigError("model and space do not apply to an imported array", hint="leave them out")
    if config.engine.is_remote:
        raise ConfigError("an array is imported by one process", hint="leave out the engine")
    config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, device="cpu"))
    rows = open_given(array)
    has_names = os.path.lexists(Path(out) / JOURNAL) and read_journal(Path(out)).prompts is not None
    names = None if ids is None and has_names else RowIds(path=None if ids is None else Path(ids), num_rows=rows.num_rows)
    return build(names, out=out, config=config, resume=resume, observer=observer, source=ArraySource(rows))
