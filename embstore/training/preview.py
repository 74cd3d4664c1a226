"""What a trainer would draw from a dataset: joined as the trainer would join it, without the trainer.

Shapes: n draws, B draws of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable
from embstore.core.errors import ConfigError
from embstore.core.prompts import Rejected, collapse_whitespace
from embstore.training.dataset_file import ParquetRows, open_table
from embstore.training.drawn_lines import Lines
from embstore.training.draws import Method
from embstore.training.join import Duplicates, OnMissing
from embstore.training.reading import PromptReading
from embstore.training.resample import resample_indices
from embstore.training.weights import load_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One draw: the number of the item in the dataset, how often the epoch draws it, and the prompt on one line."""

    item: int
    times: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What one epoch draws, and its first draws.

    ``steps`` and ``steps_with_repeats`` count whole steps of ``prompts_per_step`` draws, and those of them that draw an item
    twice; None if no such number was given.
    """

    dataset: str
    num_items: int
    num_samples: int
    distinct_items: int
    most_times: int
    never_drawn: int
    ess: float
    first: tuple[Drawn, ...]
    steps: int | None = None
    steps_with_repeats: int | None = None


def preview(
    store: str | Path,
    dataset: str | Path,
    *,
    name: str = "default",
    num_samples: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    method: Method = "systematic",
    no_repeat_within: int = 0,
    key_column: str | None = None,
    id_column: str | None = None,
    on_missing: OnMissing = "error",
    duplicates: Duplicates = "repeat",
    prompts_per_step: int | None = None,
    count: int = 5,
) -> Preview:
    """Join a file to a store's weights and draw an epoch, exactly as ``DensitySampler`` would.

    Parameters
    ----------
    store, name
        A finished store, and the name of its weighting.
    dataset
        The trainer's file, JSONL or Parquet.
    num_samples, seed, epoch, method, no_repeat_within
        See ``DensitySampler``; default: one draw per item.
    key_column, id_column, on_missing, duplicates
        See ``Weights.for_dataset``.
    prompts_per_step
        Draws of one step of the trainer: counts the steps with repeats.
    count
        How many draws to show.

    Raises
    ------
    ConfigError, PromptError, KeyMismatchError, WeightsError
        The dataset cannot be read, or items are not in the store.
    """
    if prompts_per_step is not None and prompts_per_step < 1:
        raise ConfigError(f"prompts_per_step must be at least 1, got {prompts_per_step}")
    stored = load_weights(store, name=name)
    reading = stored.reading(key_column)
    with open_table(dataset) as table:
        weights = stored.for_dataset(
            table.records(reading, id_column),
            key_column=key_column,
            id_column=id_column,
            on_missing=on_missing,
            duplicates=duplicates,
        )
        rows_n = resample_indices(
            weights, num_samples, seed=seed, epoch=epoch, method=method, no_repeat_within=no_repeat_within
        )
        times_N = np.bincount(rows_n, minlength=len(weights))
        first = rows_n[: max(0, count)].tolist()
        texts = _texts(table, reading, id_column, set(first))
    steps = len(rows_n) // prompts_per_step if prompts_per_step else None
    return Preview(
        dataset=table.name,
        num_items=len(weights),
        num_samples=len(rows_n),
        distinct_items=int(np.count_nonzero(times_N)),
        most_times=int(times_N.max()),
        never_drawn=int(np.count_nonzero(weights.array == 0)),
        ess=weights.ess(),
        first=tuple(Drawn(item=item, times=int(times_N[item]), text=texts[item]) for item in first),
        steps=steps,
        steps_with_repeats=None if steps is None or prompts_per_step is None else _repeats(rows_n, steps, prompts_per_step),
    )


def _texts(table: Lines | ParquetRows, reading: PromptReading, id_column: str | None, wanted: set[int]) -> dict[int, str]:
    """What identifies these items: their prompts, or ids. The table is read again, up to the last of them."""
    found: dict[int, str] = {}
    for position, record in enumerate(table.records(reading, id_column)):
        if len(found) == len(wanted):
            break
        if position in wanted:
            found[position] = printable(collapse_whitespace(_text(record, reading, id_column, position)))
    return found


def _text(record: object, reading: PromptReading, id_column: str | None, position: int) -> str:
    if id_column is not None and isinstance(record, dict):
        return str(record.get(id_column))
    prompt = reading.prompt(record, position)
    return prompt.reason if isinstance(prompt, Rejected) else prompt.rendered


def _repeats(rows_n: NDArray[np.int64], steps: int, prompts_per_step: int) -> int:
    """Steps in which an item is drawn more than once."""
    steps_SB = np.sort(rows_n[: steps * prompts_per_step].reshape(steps, prompts_per_step), axis=1)
    return int(np.count_nonzero((np.diff(steps_SB, axis=1) == 0).any(axis=1)))
