"""Finds the row of a store for each item of a dataset: by content (row keys) or by id, never by position.

Trainers filter, shuffle and pair prompts, so a dataset rarely has the store's rows in the store's order. An item without a
row is an error unless a policy gives such items a weight, in units of the mean weight of the other items. A fixed number
(the original used 1.0, where weights are about 1 / N) would give them nearly all of the probability.

Shapes: N rows of the store, M items of the dataset, B items of a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.config import CURRENT_RULE, PromptRule
from embstore.core.decode import printable
from embstore.core.errors import ConfigError, KeyMismatchError, PromptError
from embstore.core.prompts import Prompt, Rejected
from embstore.core.reasons import by_kind, count_reason
from embstore.core.row_keys import StoredKeys, key_of
from embstore.core.values import Unusable, plain
from embstore.training.items import blocks_of
from embstore.training.reading import (
    BlockPrompts,
    PromptReading,
    is_bare,
    no_column,
    other_form,
    record_of,
)

OnMissing = Literal["error", "drop", "mean"] | float
Duplicates = Literal["repeat", "divide"]

_SHOWN_START, _SHOWN_END = 160, 60  # characters of the first missing item
# when so many items have no row in either form, the rest is not looked up in the other one
_TRIES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """Rows int64 [M] of the items (-1: not in the store), and what is to be said about them.

    ``unknown`` says which prompt is the first without a row, ``rejected`` counts the items that could not be read by kind of
    reason, ``first_rejected`` says which is the first of these, and why. ``form`` is "text" if chats of one user turn were
    found as that turn's text, "chat" if texts were found as such chats. ``has_answers``: there are chats that end in an
    assistant turn.
    """

    rows_M: NDArray[np.int64]
    unknown: str = ""
    rejected: Mapping[str, int] = field(default_factory=dict)
    first_rejected: str = ""
    form: Literal["", "text", "chat"] = ""
    has_answers: bool = False


def join_keys(stored_N: NDArray[np.uint64], keys_M: NDArray[np.uint64]) -> Join:
    """Join by keys that ``prompt_keys`` made."""
    rows_M = StoredKeys(stored_N).rows(keys_M)
    unknown_m = np.flatnonzero(rows_M < 0)
    unknown = f"item {unknown_m[0]}, key {int(keys_M[unknown_m[0]]):016x}" if len(unknown_m) else ""
    return Join(rows_M=rows_M, unknown=unknown)


def join_ids(aliases: Mapping[str, int], ids: Sequence[str | Rejected]) -> Join:
    """Join by ids of the prompts file or of rows."""
    rows_M = np.full(len(ids), -1, dtype=np.int64)
    rejected = _RejectedItems()
    unknown = ""
    for position, name in enumerate(ids):
        if isinstance(name, Rejected):
            rejected.add(name.reason, position)
        elif (row := aliases.get(name, -1)) >= 0:
            rows_M[position] = row
        else:
            unknown = unknown or f"item {position}, id {printable(repr(name[:_SHOWN_START]))}"
    return Join(rows_M=rows_M, unknown=unknown, rejected=rejected.counts, first_rejected=rejected.first)


def join_dataset(stored_N: NDArray[np.uint64], dataset: object, reading: PromptReading) -> Join:
    """Join by content: each item's prompt as a build with the store's rule reads it.

    Where no item has a row as it is, a chat of one user turn is looked up as that turn's text, and a text as such a chat.

    Raises
    ------
    ConfigError
        It is not a dataset, or lacks the columns.
    """
    search = _Search(StoredKeys(stored_N), reading)
    for block in blocks_of(dataset, reading.choose):
        search.add(reading.read(block), block.positions_B)
    return search.finish()


class _RejectedItems:
    """Items that could not be read, counted by kind of reason; ``first`` says which is the first of them, and why."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first = ""
        self._position = -1

    def add(self, reason: str, position: int) -> None:
        """Count one item; they do not come in order."""
        count_reason(self.counts, reason)
        if not self.first or position < self._position:
            self.first, self._position = f"item {position}: {printable(reason.removeprefix('no prompt: '))}", position


class _Search:
    """What is found block by block, and what is missing."""

    def __init__(self, stored: StoredKeys, reading: PromptReading) -> None:
        self.stored, self.reading = stored, reading
        self.blocks: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # positions and rows
        self.rejected = _RejectedItems()
        self.unknown: tuple[int, Prompt] | None = None  # the first item without a row, and its prompt
        self.any_row = self.has_answers = False
        # while no item has a row as it is: positions and rows of those that have one in their other form
        self.others = array("q"), array("q")
        self.tried = 0
        self.other_text = False  # the other form is a text
        self.unknown_in_both: tuple[int, Prompt] | None = None

    def add(self, prompts: BlockPrompts, positions_B: NDArray[np.int64]) -> None:
        """Look up one block."""
        rows_B = self.stored.rows(prompts.keys_B)
        rows_B[list(prompts.rejected)] = -1
        missing = {index: prompts.prompt(index) for index in np.flatnonzero(rows_B < 0).tolist()}
        for index, row in self._rows_as(self.reading.respelled, missing).items():
            rows_B[index] = row
            del missing[index]
        self.has_answers |= prompts.has_answers
        self.any_row |= len(missing) < len(rows_B)
        others: dict[int, int] = {}
        if not self.any_row and self.tried < _TRIES:
            others = self._rows_as(other_form, missing)
            self.tried += 0 if others or self.others[0] else len(missing)
        for index, prompt in missing.items():
            position = int(positions_B[index])
            if isinstance(prompt, Rejected):
                self.rejected.add(prompt.reason, position)
                continue
            self.unknown = _first(self.unknown, position, prompt)
            if index in others:
                self.others[0].append(position)
                self.others[1].append(others[index])
                self.other_text = prompt.messages is not None
            else:
                self.unknown_in_both = _first(self.unknown_in_both, position, prompt)
        self.blocks.append((positions_B, rows_B))

    def finish(self) -> Join:
        """Everything in the dataset's order."""
        rows_M = np.full(sum(len(rows_B) for _, rows_B in self.blocks), -1, dtype=np.int64)
        for positions_B, rows_B in self.blocks:
            rows_M[positions_B] = rows_B
        form: Literal["", "text", "chat"] = ""
        unknown = self.unknown
        if not self.any_row and self.others[0]:
            rows_M[np.asarray(self.others[0])] = np.asarray(self.others[1])
            form = "text" if self.other_text else "chat"
            unknown = self.unknown_in_both
        shown = ""
        if unknown is not None:
            has_other = bool(self._rows_as(other_form, dict([unknown])))
            shown = f"item {unknown[0]}, {_shown(unknown[1])}" + _OTHER_FORM * has_other
        return Join(
            rows_M=rows_M,
            unknown=shown,
            rejected=self.rejected.counts,
            first_rejected=self.rejected.first,
            form=form,
            has_answers=self.has_answers,
        )

    def _rows_as(self, spell: Callable[[Prompt], Prompt | None], prompts: Mapping[int, Prompt | Rejected]) -> dict[int, int]:
        """Rows of the prompts that the store has in another spelling."""
        spelled = {index: spell(prompt) for index, prompt in prompts.items() if isinstance(prompt, Prompt)}
        keys = {index: key_of(prompt) for index, prompt in spelled.items() if prompt is not None}
        rows = self.stored.rows(np.fromiter(keys.values(), dtype=np.uint64, count=len(keys)))
        return {index: row for index, row in zip(keys, rows.tolist(), strict=True) if row >= 0}


_OTHER_FORM = " (its text is in the store, but one of the two is a chat)"
_LOOKED_UP = {
    "": "",
    "text": "; no item is in the store as it is, so chats were looked up by the text of their one user turn",
    "chat": "; no item is in the store as it is, so texts were looked up as chats of one user turn",
}


def _first(known: tuple[int, Prompt] | None, position: int, prompt: Prompt) -> tuple[int, Prompt]:
    return known if known is not None and known[0] < position else (position, prompt)


def _shown(prompt: Prompt) -> str:
    """A prompt as an error message shows it: one short line, its start and its end."""
    text = prompt.rendered
    if len(text) > _SHOWN_START + _SHOWN_END + 5:
        text = f"{text[:_SHOWN_START]} ... {text[-_SHOWN_END:]}"
    return printable(repr(text))


def notices(join: Join, rule: PromptRule, store: str) -> list[str]:
    """What a user should know of a join that succeeded."""
    found = []
    if join.form == "text":
        found.append(
            f"{store} contains plain texts: the chats of this dataset were joined by the text of their one user turn. The "
            "weights are those of the bare texts, without a chat template"
        )
    elif join.form == "chat":
        found.append(
            f"{store} contains chats: the texts of this dataset were joined to those whose one user turn they are. The "
            "weights are those of the chats, with their chat template"
        )
    if join.has_answers and rule.turns == "prompt":
        found.append(
            f"{store} was built with --turns prompt: chats that end in an assistant turn were joined by what comes before it"
        )
    return found


def _described(join: Join, num_missing: int) -> str:
    """How many items are missing, the first of them, and those that could not be read by kind of reason."""
    num_rejected = sum(join.rejected.values())
    parts = []
    if num_missing > num_rejected:
        parts.append(f"{num_missing - num_rejected} not in the store, the first is {join.unknown}")
    if num_rejected:
        kinds = f" ({printable(by_kind(join.rejected))})" if len(join.rejected) > 1 else ""
        parts.append(f"{num_rejected} without a prompt, the first is {join.first_rejected}{kinds}")
    return "; ".join(parts)


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
    if not len(rows_M):
        raise KeyMismatchError("the dataset has no items", hint="is it the split that is trained on?")
    aligned_M = np.where(is_row_M, weights_N[np.maximum(rows_M, 0)].astype(np.float64), 0.0)
    if num_missing and (on_missing == "error" or num_missing == len(rows_M)):
        num_failed = int(np.count_nonzero(is_row_M & (aligned_M == 0)))
        failed = f"; {num_failed} more failed in the build and have weight 0" * bool(num_failed)
        raise KeyMismatchError(
            f"{num_missing} of {len(rows_M)} items have no row in {store} ({len(weights_N)} rows): "
            f"{_described(join, num_missing)}{_LOOKED_UP[join.form]}{failed}",
            hint="join by the column that was embedded (key_column) or by ids (id_column), build a store of these prompts, "
            "or choose a weight for such items: on_missing='drop', 'mean', or a multiple of the mean weight",
        )
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


def prompt_keys(dataset: Iterable[object], key_column: str | None = None) -> NDArray[np.uint64]:
    """Row keys of a dataset's prompts, uint64 [M], as a store of today makes them: by content (``docs/prompts.md``).

    Parameters
    ----------
    dataset
        See ``Weights.for_dataset``.
    key_column
        The column with the prompt. None looks for those that a build looks for.

    Raises
    ------
    PromptError
        An item has no prompt.
    ConfigError
        There is no such column, or it is not a dataset.
    """
    reading = PromptReading(rule=CURRENT_RULE, column=key_column)
    found: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
    for block in blocks_of(dataset, reading.choose):
        prompts = reading.read(block)
        for index, reason in sorted(prompts.rejected.items()):
            raise PromptError(
                f"item {block.positions_B[index]} has no prompt: {reason}", hint="filter such items out, or set key_column"
            )
        found.append((block.positions_B, prompts.keys_B))
    keys_M = np.zeros(sum(len(keys_B) for _, keys_B in found), dtype=np.uint64)
    for positions_B, keys_B in found:
        keys_M[positions_B] = keys_B
    return keys_M


def read_ids(dataset: object, id_column: str) -> list[str | Rejected]:
    """The ids of a dataset's items, as text; an item that cannot be read keeps its place.

    Raises
    ------
    ConfigError
        It is not a dataset, or an item has no such column.
    """

    def choose(present: Sequence[str]) -> list[str]:
        if id_column not in present:
            raise ConfigError(f"the dataset has no column {id_column}; it has {', '.join(present)}", hint="set id_column")
        return [id_column]

    ids: dict[int, str | Rejected] = {}
    for block in blocks_of(dataset, choose):
        positions = block.positions_B.tolist()
        if block.columns is not None:
            ids.update(zip(positions, map(_id, block.columns[id_column]), strict=True))
            continue
        for position, item in zip(positions, block.items, strict=True):
            if isinstance(item, Rejected):
                ids[position] = item
                continue
            record = None if is_bare(item) else record_of(item, position)
            if record is None or id_column not in record:
                raise no_column(id_column, item if record is None else record, position)
            ids[position] = _id(record[id_column])
    return [ids[position] for position in range(len(ids))]


def _id(value: object) -> str | Rejected:
    """An id as a build reads it; empty, which is never an id, where there is none."""
    try:
        value = plain(value)
    except Unusable as error:
        return Rejected(reason=f"its id is {error}")
    return "" if value is None else str(value)


def is_ids(keys: ArrayLike | Sequence[str]) -> bool:
    """Whether row keys were given as ids (text) and not as uint64."""
    if isinstance(keys, np.ndarray):
        return keys.dtype.kind in "UO"
    return isinstance(keys, Sequence) and bool(len(keys)) and isinstance(keys[0], str)
