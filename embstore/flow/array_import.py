"""Build a store from existing embeddings: the same pipeline, with an array in place of a model.

Row i of the array is row i of the store; rows are never merged. Rows with bit-equal vectors share a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError
from embstore.core.events import Observer, ignore, stage
from embstore.flow.build import BuildReport, build
from embstore.storage.array_file import open_array
from embstore.storage.journal import read_journal
from embstore.storage.prompt_source import check_source
from embstore.storage.row_ids import RowIds


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
        ``.npy`` file, folder of such files, or folder of a Zarr array: [N, D] of float16, bfloat16, float32 or float64. It
        is read in pieces, and its rows are scaled to length 1, so distances order rows as cosine similarity does.
    out
        The store's folder; created when absent.
    ids
        Ids of the rows: a text file with one id per line, a JSON list, or JSONL (which may also contain prompts). None: the
        row numbers, or on a resume the ids in the store.
    config
        As for ``build``; of ``embedding`` only threads, chunk_rows, window_rows and compressor are used.
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
        The array, the ids, or a row of the array is not usable; and as ``build``.
    """
    config = config or BuildConfig()
    if config.embedding.model is not None or config.embedding.space is not None:
        raise ConfigError("model and space do not apply to an imported array", hint="leave them out")
    if config.engine.is_remote:
        raise ConfigError("an array is imported by one process", hint="leave out the engine")
    config = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, device="cpu"))
    rows = open_array(array)
    begun = read_journal(Path(out))
    has_names = resume and begun.prompts is not None
    if begun.prompts is not None and not begun.had_windows:  # another array may take its place
        has_names &= begun.prompts.rows == min(rows.num_rows, config.limit or rows.num_rows)
    names = None if ids is None and has_names else RowIds(path=None if ids is None else Path(ids), num_rows=rows.num_rows)
    if ids is not None:
        check_source(ids)
    with stage(observer, "imports") if "torch" not in sys.modules else contextlib.nullcontext():
        from embstore.model.array_embedder import ArraySource  # noqa: PLC0415 - imports torch
    return build(names, out=out, config=config, resume=resume, observer=observer, source=ArraySource(rows))
