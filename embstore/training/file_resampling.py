"""A density-resampled copy of a prompts file, for trainers that take a file and no sampler. JSON, and Parquet with pyarrow.

Items are joined to the store by content or id. The copy appears under its name when it is complete and on the disk.

Shapes: n draws.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, PromptError, StoreExistsError
from embstore.core.files import fsync_directory, storage_errors, temp_path
from embstore.training.dataset_file import ParquetRows, open_table
from embstore.training.drawn_lines import Lines
from embstore.training.draws import Method
from embstore.training.join import Duplicates, OnMissing
from embstore.training.resample import resample_indices
from embstore.training.weights import load_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ResampleReport:
    """What was written: items of the dataset, draws, spare ones behind them, distinct items, and ESS in items."""

    out: Path
    num_items: int
    num_samples: int
    num_spare: int
    distinct_items: int
    ess: float


def resample_file(
    store: str | Path,
    dataset: str | Path,
    out: str | Path,
    *,
    name: str = "default",
    num_samples: int | None = None,
    over: int = 0,
    seed: int = 0,
    epoch: int = 0,
    method: Method = "systematic",
    no_repeat_within: int = 0,
    key_column: str | None = None,
    id_column: str | None = None,
    on_missing: OnMissing = "error",
    duplicates: Duplicates = "repeat",
    reindex: str | None = None,
) -> ResampleReport:
    """Write the drawn items of a dataset, in order, each with the number of its draw as ``embstore_draw``.

    Parameters
    ----------
    store, name
        A finished store, and the name of its weighting.
    dataset, out
        JSONL or a JSON array (also compressed, a pipe, or ``-`` for standard input), or Parquet, by content; ``out``, which
        must not exist, has the format's suffix: ``.jsonl`` or ``.parquet``. Of an array, ``.json`` is an array, too.
    num_samples, over, seed, epoch, method, no_repeat_within
        See ``resample_indices``; default: one draw per item, none to spare.
    key_column, id_column, on_missing, duplicates
        See ``Weights.for_dataset``.
    reindex
        A column of numbers or texts that gets the numbers of the draws, 0 to n - 1: for trainers that find or group items by
        it, where two draws of one item must be two items.

    Raises
    ------
    ConfigError, PromptError, StoreExistsError, KeyMismatchError, WeightsError
        The formats differ, the dataset cannot be read, ``out`` exists, or items are not in the store.
    """
    target = Path(out)
    if os.path.lexists(target):
        raise StoreExistsError(f"{target} exists already", hint="give another --out, or remove it")
    with open_table(dataset, target.parent, reindex=reindex, keeps_arrays=target.suffix == ".json") as table:
        if target.suffix not in table.suffixes:
            raise ConfigError(
                f"dataset and copy must both be JSON or both Parquet: {table.name} is {table.kind}, and the copy is named "
                f"{target.name}",
                hint=f"give --out the suffix {table.suffixes[0]}; a copy is never compressed",
            )
        stored = load_weights(store, name=name)
        weights = stored.for_dataset(
            table.records(stored.reading(key_column), id_column),
            key_column=key_column,
            id_column=id_column,
            on_missing=on_missing,
            duplicates=duplicates,
        )
        if table.unreadable is not None and on_missing not in ("error", "drop"):
            raise PromptError(
                f"{table.unreadable}: such a line cannot be drawn", hint="correct it, or leave it out with --on-missing drop"
            )
        rows_n = resample_indices(
            weights, num_samples, over=over, seed=seed, epoch=epoch, method=method, no_repeat_within=no_repeat_within
        )
        _write(table, target, rows_n)
    return ResampleReport(
        out=target,
        num_items=len(weights),
        num_samples=len(rows_n) - over,
        num_spare=over,
        distinct_items=len(np.unique(rows_n)),
        ess=weights.ess(),
    )


def _write(table: Lines | ParquetRows, target: Path, rows_n: NDArray[np.int64]) -> None:
    """Write the copy durably; it has its name once it is complete."""
    unfinished = temp_path(target)
    with storage_errors("writing", target, opening=True):
        try:
            table.write(unfinished, rows_n)
            with unfinished.open("rb") as copy:
                os.fsync(copy.fileno())
            unfinished.replace(target)
            fsync_directory(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)
