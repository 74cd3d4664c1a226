"""Finds the row of a store for each item of a dataset: by content (row keys) or by id, never by position.

Trainers filter, shuffle and pair prompts, so a dataset rarely has the store's rows in the store's order. An item without a
row is an error unless a policy gives such items a weight, in units of the mean weight of the other items. A fixed number
(the original used 1.0, where weights are about 1 / N) would give them nearly all of the probability.

Shapes: N rows of the store, M items of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.errors import ConfigError, KeyMismatchError, PromptError
from embstore.core.prompts import Rejected, parse_line

OnMissing = Literal["error", "drop", "mean"] | float
Duplicates = Literal["repeat", "divide"]

_PROMPT_COLUMNS = ("prompt", "messages", "prefix")


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """Rows int64 [M] of the items (-1: not in the store), and how to name an item without a row."""

    rows_M: NDArray[np.int64]
    names: Sequence[str] | NDArray[np.uint64]
    reasons: Mapping[int, str]

    def name(self, position: int) -> str:
        """The item as an error message names it."""
        if position in self.reasons:
            return self.reasons[position]
        given = self.names[position]
        return f"id {given!r}" if isinstance(given, str) else f"key {int(given):016x}"


def rows_of_keys(stored_N: NDArray[np.uint64], wanted_M: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Row of each key, -1 where the store has none. Price: one sort of the store's keys.

    Raises
    ------
    KeyMismatchError
        A wanted key belongs to two rows: the first 64 bits of their sha256 are equal.
    """
    order_N = np.argsort(stored_N, kind="stable")
    sorted_N = stored_N[order_N]
    slot_M = np.searchsorted(sorted_N, wanted_M)
    last = len(sorted_N) - 1
    is_row_M = sorted_N[np.minimum(slot_M, last)] == wanted_M
    is_twice_M = is_row_M & (slot_M < last) & (sorted_N[np.minimum(slot_M + 1, last)] == wanted_M)
    if is_twice_M.any():
        key = int(wanted_M[int(np.argmax(is_twice_M))])
        raise KeyMismatchError(
            f"two rows of the store have the key {key:016x}", hint="join by ids: for_dataset(id_column=...)"
        )
    return np.where(is_row_M, order_N[np.minimum(slot_M, last)], -1)


def align_weights(
    weights_N: NDArray[np.float32], join: Join, *, store: str, on_missing: OnMissing, duplicates: Duplicates
) -> NDArray[np.float32]:
    """Weights float32 [M] of sum 1 in the dataset's order; see ``Weights.align``."""
    if isinstance(on_missing, str) and on_missing not in ("error", "drop", "mean"):
        raise ConfigError(f"on_missing must be 'error', 'drop', 'mean' or a number, got {on_missing!r}")
    if not isinstance(on_missing, str) and not (np.isfinite(on_missing) and on_missing >= 0):
        raise ConfigError(f"on_missing must be a finite multiple >= 0 of the mean weight, got {on_missing}")
    if duplicates not in ("repeat", "divide"):
        raise ConfigError(f"duplicates must be 'repeat' or 'divide', got {duplicates!r}")
    rows_M = join.rows_M
    is_row_M = rows_M >= 0
    num_missing = len(rows_M) - int(np.count_nonzero(is_row_M))
    if num_missing and (on_missing == "error" or num_missing == len(rows_M)):
        first = int(np.argmin(is_row_M))
        raise KeyMismatchError(
            f"{num_missing} of {len(rows_M)} items are not in {store} ({len(weights_N)} rows); "
            f"the first is at position {first}: {join.name(first)}",
            hint="build a store of these prompts, or choose a weight for such items: on_missing='drop', 'mean', or a "
            "multiple of the mean weight",
        )
    aligned_M = np.where(is_row_M, weights_N[np.maximum(rows_M, 0)].astype(np.float64), 0.0)
    if duplicates == "divide":
        items_N = np.bincount(rows_M[is_row_M], minlength=len(weights_N))
        aligned_M[is_row_M] /= items_N[rows_M[is_row_M]]
    if num_missing and on_missing != "drop":
        multiple = 1.0 if isinstance(on_missing, str) else on_missing
        aligned_M[~is_row_M] = multiple * aligned_M[is_row_M].mean()
    total = aligned_M.sum()
    if not total > 0:
        raise KeyMismatchError(
            f"none of the {len(rows_M)} items has a weight above 0 in {store}",
            hint="see failed_rows in embeddings_metadata.json: these prompts failed in the model",
        )
    normalised_M: NDArray[np.float32] = (aligned_M / total).astype(np.float32)
    return normalised_M


def prompt_keys(dataset: Iterable[Any], key_column: str | None = None) -> NDArray[np.uint64]:
    """Row keys of a dataset's prompts, uint64 [M], as the store makes them: content, whitespace collapsed.

    Parameters
    ----------
    dataset
        Mappings (a Hugging Face dataset, or records), texts, or lists of messages.
    key_column
        The column with the prompt: text, a list of messages, or ``{"messages": [...]}``. None looks for ``prompt``,
        ``messages``, ``prefix``, in this order, as a build does.

    Raises
    ------
    PromptError
        An item has no prompt.
    ConfigError
        There is no such column.
    """
    keys_M, reasons = read_prompt_keys(dataset, key_column)
    for position, reason in reasons.items():
        raise PromptError(f"item {position} has no prompt: {reason}", hint="filter such items out, or set key_column")
    return keys_M


def read_prompt_keys(dataset: Iterable[Any], key_column: str | None) -> tuple[NDArray[np.uint64], dict[int, str]]:
    """Row keys uint64 [M], and the reason for each item without a prompt, by position."""
    reasons: dict[int, str] = {}

    def keys() -> Iterator[int]:
        for position, item in enumerate(_columns(dataset, (key_column,) if key_column else _PROMPT_COLUMNS)):
            # the same function as in a build, so that both read a prompt alike
            prompt = parse_line(json.dumps(_record(item, key_column, position)).encode())
            if isinstance(prompt, Rejected):
                reasons[position] = prompt.reason
                yield 0
            else:
                yield int.from_bytes(prompt.digest[:8], "little")

    return np.fromiter(keys(), dtype=np.uint64), reasons


def read_ids(dataset: Iterable[Any], id_column: str) -> list[str]:
    """The ids of a dataset's items, as text."""
    ids = []
    for position, item in enumerate(_columns(dataset, (id_column,))):
        if not isinstance(item, Mapping) or id_column not in item:
            raise _no_column(id_column, item, position)
        ids.append(str(item[id_column]))
    return ids


def is_ids(keys: ArrayLike | Sequence[str]) -> bool:
    """Whether row keys were given as ids (text) and not as uint64."""
    if isinstance(keys, np.ndarray):
        return keys.dtype.kind in "UO"
    return isinstance(keys, Sequence) and bool(len(keys)) and isinstance(keys[0], str)


def _columns(dataset: Iterable[Any], names: Sequence[str]) -> Iterable[Any]:
    """Select the columns that are read; otherwise a Hugging Face dataset decodes every column of a row, images too."""
    present = getattr(dataset, "column_names", None)
    if not isinstance(present, list) or not hasattr(dataset, "select_columns"):
        return dataset
    wanted = [name for name in names if name in present]
    if not wanted:
        raise ConfigError(
            f"the dataset has no column {' or '.join(names)}; it has {', '.join(present)}", hint="set key_column"
        )
    selected: Iterable[Any] = dataset.select_columns(wanted)
    return selected


def _record(item: object, key_column: str | None, position: int) -> dict[str, object]:
    """One item as the line of a prompts file."""
    if isinstance(item, str) or (isinstance(item, Sequence) and not isinstance(item, Mapping)):
        return {"prompt": item}
    if not isinstance(item, Mapping):
        raise ConfigError(
            f"item {position} is of type {type(item).__name__}, expected a record, a text or a list of messages",
            hint="pass a Hugging Face dataset, a list of records, or the prompts themselves",
        )
    if key_column is None:
        return {name: item[name] for name in _PROMPT_COLUMNS if name in item}
    if key_column not in item:
        raise _no_column(key_column, item, position)
    content = item[key_column]
    if key_column == "prefix" or isinstance(content, Mapping):
        return {"prefix": content}
    return {"prompt": content}


def _no_column(name: str, item: object, position: int) -> ConfigError:
    present = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"no columns ({type(item).__name__})"
    return ConfigError(f"item {position} has no column {name!r}; it has {present}", hint="name the column that contains it")
