"""Scores and groups of a store's rows: from a file of the user's, or from a field of the input lines.

Each line of a file has one number, and the prompt or an id. It is read as a build reads prompts, and joined by the prompt
where it has one, otherwise by the id; never by position. Whatever is wrong with any line is counted and shown, and then no
score of the file is used: one that is missing or wrong in silence would move all weights.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable, shown
from embstore.core.errors import ConfigError, PromptError
from embstore.core.factors import FloatVector, ScoreRule
from embstore.core.format import JsonObject
from embstore.core.prompts import Prompt, Rejected, content_fields, decode_object, prompt_of
from embstore.core.row_keys import StoredKeys, key_of
from embstore.storage.prompt_source import Record, open_records, read_record
from embstore.storage.reader import EmbeddingStore

_BLOCK_LINES = 4096
_SHOWN = 3
_USUAL_COLUMN = "score"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """``values_N`` float64 [N], NaN for rows without a score; ``source`` says where they come from, without paths."""

    values_N: FloatVector
    source: JsonObject


@dataclass(kw_only=True, slots=True)
class _Faults:
    """What is wrong with lines: how many by kind, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.first.setdefault(kind, [])) < _SHOWN:
            self.first[kind].append(example)

    def described(self) -> str:
        """All kinds."""
        return "; ".join(f"{count:,} {kind}: {', '.join(self.first[kind])}" for kind, count in self.counts.items())


def read_scores(store: EmbeddingStore, path: str | Path, rule: ScoreRule, *, column: str | None = None) -> Scores:
    """The scores of a file: JSONL, JSON, CSV, Parquet or Arrow, also compressed, or a folder of them.

    Parameters
    ----------
    store
        A finished store.
    path
        The file; - for standard input.
    rule
        Which scores are in range.
    column
        The field with the number. None: ``score``, or the only other number.

    Raises
    ------
    PromptError
        The file cannot be read, or a line is of another prompt, lacks a score that the rule takes, or contradicts another.
    ConfigError
        There is no such field, or several fields could be meant.
    """
    with open_records(path, store.published.fields, rule=store.published.rule) as records:
        reader = _ScoreReader(store, rule, column, records.where)
        for line, record in enumerate(records, start=1):
            reader.add(record, line)
        values_N = reader.finish()
    if reader.faults.counts:
        raise PromptError(
            f"{path} cannot be used as scores: {reader.faults.described()}",
            hint=f"correct these lines, or leave them out and set --missing-score; scores lie in {_range(rule)}",
        )
    if not np.isfinite(values_N).any():
        raise PromptError(f"{path} has no scores", hint="each line needs a number, and a prompt or an id")
    return Scores(values_N=values_N, source={"column": reader.column, "sha256": digest(values_N)})


class _ScoreReader:
    """Lines to scores by row."""

    def __init__(self, store: EmbeddingStore, rule: ScoreRule, column: str | None, where: Callable[[int], str]) -> None:
        self._store, self._rule, self.column, self._where = store, rule, column, where
        self._keys = StoredKeys(store.keys)
        self._values_N = np.full(store.num_rows, np.nan)
        self.faults = _Faults()
        # lines that are joined by their prompt, until a block is looked up: key, score and number
        self._pending: list[tuple[int, float, int]] = []

    def add(self, record: Record, line: int) -> None:
        """Note one line."""
        names, rule = self._store.published.fields, self._store.published.rule
        row = decode_object(record, rule) if isinstance(record, bytes) else record
        if isinstance(row, Rejected):
            self.faults.add("cannot be read", f"{self._where(line)} ({printable(row.reason)})")
            return
        value = self._number(row, line)
        if value is None:
            return
        if any(row.get(name) is not None for name in content_fields(names)):
            prompt = prompt_of(row, names, rule) if isinstance(record, bytes) else read_record(record, names, rule)
            if isinstance(prompt, Rejected):
                self.faults.add("have no prompt", f"{self._where(line)} ({printable(prompt.reason)})")
                return
            self._pending.append((key_of(prompt), value, line))
            if len(self._pending) == _BLOCK_LINES:
                self._look_up()
            return
        name = row.get(names.id or "id")
        if name is None or isinstance(name, bool | float | Mapping | list):
            self.faults.add("have neither a prompt nor an id", self._where(line))
            return
        self._note(self._store.aliases.get(str(name), -1), value, line)

    def finish(self) -> FloatVector:
        """Scores of all rows."""
        self._look_up()
        return self._values_N

    def _number(self, row: Mapping[str, object], line: int) -> float | None:
        if self.column is None:
            self.column = self._only_number(row, line)
        if self.column not in row:
            self.faults.add(f"have no field {shown(self.column)}", self._where(line))
            return None
        given = row[self.column]
        number = number_of(given)
        if number is None:
            self.faults.add("have a score that is not a number", f"{self._where(line)}: {shown(given)}")
        elif not math.isfinite(number):
            self.faults.add("have a score that is not finite", f"{self._where(line)}: {shown(given)}")
        elif not self._rule.takes(np.array([number]))[0]:
            self.faults.add(f"have a score outside {_range(self._rule)}", f"{self._where(line)}: {number:g}")
        else:
            return number
        return None

    def _only_number(self, row: Mapping[str, object], line: int) -> str:
        if _USUAL_COLUMN in row:
            return _USUAL_COLUMN
        names = self._store.published.fields
        found = [name for name, value in row.items() if name != (names.id or "id") and number_of(value) is not None]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(map(shown, found[:5])) or "none"
        raise ConfigError(
            f"{self._where(line)} has {len(found)} numbers that could be the score: {listed}",
            hint=f"name the field: --score-column; there are {', '.join(shown(name) for name in list(row)[:10])}",
        )

    def _look_up(self) -> None:
        keys = np.array([key for key, _, _ in self._pending], dtype=np.uint64)
        for row, (_, value, line) in zip(self._keys.rows(keys).tolist(), self._pending, strict=True):
            self._note(row, value, line)
        self._pending.clear()

    def _note(self, row: int, value: float, line: int) -> None:
        if row < 0:
            self.faults.add("are of prompts that the store does not have", self._where(line))
        elif not math.isnan(before := self._values_N[row]) and before != value:
            self.faults.add(
                "give a prompt another score than a line before", f"{self._where(line)}: {before:g} and {value:g}"
            )
        else:
            self._values_N[row] = value


def scores_of_field(store: EmbeddingStore, name: str, rule: ScoreRule) -> Scores:
    """The numbers that the input lines have in a field; of several lines of one prompt, the first. Reads every prompt.

    Raises
    ------
    PromptError
        A value is not a number that the rule takes.
    ConfigError
        No prompt has the field.
    """
    values = array("d")
    faults = _Faults()
    for prompt in store.prompts:
        given = prompt.fields.get(name)
        number = number_of(given)
        if given is not None and number is None:
            faults.add("are not numbers", f"{shown(prompt.id)}: {shown(given)}")
        values.append(math.nan if number is None else number)
    values_N = np.array(values)
    refused = np.flatnonzero(~np.isnan(values_N) & ~rule.takes(values_N))
    for row, prompt in zip(refused.tolist(), store.prompts.each(refused.tolist()), strict=True):
        faults.add(f"lie outside {_range(rule)}", f"{shown(prompt.id)}: {values_N[row]:g}")
    if faults.counts:
        raise PromptError(
            f"the field {shown(name)} cannot be used as scores: {faults.described()}", hint="give a file: --scores"
        )
    if np.isnan(values_N).all():
        raise ConfigError(f"no prompt has a number in a field {shown(name)}", hint=fields_hint(store))
    return Scores(values_N=values_N, source={"field": name, "sha256": digest(values_N)})


def groups_of_field(store: EmbeddingStore, name: str, missing: str | None) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """The value of a field of each row as a group: codes int32 [N], -1 for rows left out, and the names, sorted.

    ``missing``: the group of rows without the field; ``drop`` leaves them out, None refuses them. Reads every prompt.

    Raises
    ------
    ConfigError
        No prompt has the field, or some do not and ``missing`` is None.
    """
    codes: dict[str, int] = {}
    code_N = np.full(store.num_rows, -1, dtype=np.int32)
    without: list[str] = []
    num_without = 0
    for row, prompt in enumerate(store.prompts):
        given = prompt.fields.get(name)
        if given is None:
            num_without += 1
            if len(without) < _SHOWN:
                without.append(str(prompt.id))
            if missing is None or missing == "drop":
                continue
        code_N[row] = codes.setdefault(missing if given is None and missing is not None else str(given), len(codes))
    if num_without == store.num_rows:
        raise ConfigError(f"no prompt has a field {shown(name)}", hint=fields_hint(store))
    if num_without and missing is None:
        raise ConfigError(
            f"{num_without:,} of {store.num_rows:,} prompts have no field {shown(name)}, the first: "
            f"{', '.join(map(shown, without))}",
            hint="--missing-group NAME gives them a group, --missing-group drop leaves them out",
        )
    names = sorted(codes)
    places = np.empty(len(names), dtype=np.int32)
    places[[codes[name] for name in names]] = np.arange(len(names))
    code_N[code_N >= 0] = places[code_N[code_N >= 0]]
    return code_N, tuple(names)


def number_of(value: object) -> float | None:
    """A value as a number, also from text, which all values of CSV are; None if it is not one.

    Examples
    --------
    >>> number_of("0.5"), number_of(2), number_of(True), number_of("much"), number_of(None)
    (0.5, 2.0, None, None, None)
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | int | float | np.integer | np.floating):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def digest(values_N: FloatVector) -> str:
    """sha256 of the scores as little-endian float64; missing ones are NaN of one pattern."""
    return hashlib.sha256(np.where(np.isnan(values_N), np.nan, values_N).astype("<f8").tobytes()).hexdigest()


def fields_hint(store: EmbeddingStore) -> str:
    """The fields that the first prompts have."""
    names = sorted({name for prompt in _first_prompts(store) for name in prompt.fields})
    return f"the input lines have {', '.join(map(shown, names[:20])) or 'only prompts'}"


def _first_prompts(store: EmbeddingStore, count: int = 1000) -> Iterator[Prompt]:
    return (prompt for prompt, _ in zip(store.prompts, range(count), strict=False))


def _range(rule: ScoreRule) -> str:
    low, high = ("infinity" if math.isinf(end) else f"{end:g}" for end in rule.range)
    return f"-{low} to {high}" if low == "infinity" else f"{low} to {high}"
