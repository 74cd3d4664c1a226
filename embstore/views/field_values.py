"""How rows and weight spread over the values of one field of the input lines.

A field may have as many values as there are rows, so values are counted by their hashes: 8 bytes a row while they are read,
at most 40 while they are counted, whatever the values are. Only the heaviest values are named.

Shapes: N rows, D distinct values, T of them named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable
from embstore.core.errors import ConfigError
from embstore.storage.prompt_table import PromptTable

NO_VALUE = "(none)"  # of a field that a prompt does not have
NAMED_VALUES = 1000
_NAMED_FIELDS = 64
_VALUE_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One value of a field, cut to 200 characters: its rows, their share of the rows, and their share of the weight."""

    value: str
    rows: int
    row_share: float
    weight_share: float

    @property
    def ratio(self) -> float:
        """How often a prompt with this value is drawn, in units of the mean."""
        return self.weight_share / self.row_share


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherValues:
    """The values of a field that are not named: how many, and as for ``Share`` together."""

    values: int
    rows: int
    row_share: float
    weight_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """``shares`` of the values with the most weight, heaviest first, and ``others`` if there are more than 1,000 values.

    ``code`` is int16 [N]: the position of a row's value in ``shares``, ``len(shares)`` for another one.
    """

    shares: list[Share]
    others: OtherValues | None
    code: NDArray[np.int16]


class FieldValues:
    """The values of one field, row by row; rows without the field have the value ``(none)``."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name = name
        self.is_present = False  # in any row so far
        # keyed by this process, so nobody can choose two values of one hash; by chance, 10 million have such two with
        # probability 3e-6
        self._hash_N = np.empty(num_rows, dtype=np.int64)

    @classmethod
    def read(cls, name: str, table: PromptTable) -> Self:
        """The values of all prompts.

        Raises
        ------
        ConfigError
            No prompt has the field.
        """
        found = cls(name, len(table))
        for row, prompt in enumerate(table):
            found.add(row, prompt.fields)
        if not found.is_present:
            raise missing_field(name, _field_names(table))
        return found

    def add(self, row: int, fields: Mapping[str, object]) -> None:
        """Note the value of one row."""
        self.is_present = self.is_present or fields.get(self.name) is not None
        self._hash_N[row] = hash(self._text(fields))

    def spread(self, table: PromptTable, weights_N: NDArray[np.float32]) -> Spread:
        """Shares of the values; this object cannot be used afterwards. The names are read from the prompts."""
        num_rows = len(weights_N)
        order_N, starts_D = self._grouped()
        weight_D = np.add.reduceat(weights_N[order_N], starts_D, dtype=np.float64)
        rows_T, named_T = _heaviest(weight_D, order_N, starts_D)
        labels = [self._label(prompt.fields) for prompt in table.each(rows_T.tolist())]
        by_weight = sorted(range(len(labels)), key=lambda place: (-weight_D[named_T[place]], labels[place]))
        code_N = np.full(num_rows, len(labels), dtype=np.int16)
        shares: list[Share] = []
        for place in by_weight:
            value = int(named_T[place])
            stop = int(starts_D[value + 1]) if value + 1 < len(starts_D) else num_rows
            mine = order_N[starts_D[value] : stop]
            code_N[mine] = len(shares)
            weight = float(weight_D[value])
            shares.append(Share(value=labels[place], rows=len(mine), row_share=len(mine) / num_rows, weight_share=weight))
        if len(labels) == len(starts_D):
            return Spread(shares=shares, others=None, code=code_N)
        rows = num_rows - sum(share.rows for share in shares)
        others = OtherValues(
            values=len(starts_D) - len(labels),
            rows=rows,
            row_share=rows / num_rows,
            weight_share=max(0.0, float(weight_D.sum()) - sum(share.weight_share for share in shares)),
        )
        return Spread(shares=shares, others=others, code=code_N)

    def _grouped(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows by value, in row order for each, and where each value begins among them; int32 holds every row number."""
        hash_N, self._hash_N = self._hash_N, np.empty(0, dtype=np.int64)
        by_hash_N = np.argsort(hash_N, kind="stable")
        hash_N = hash_N[by_hash_N]
        order_N: NDArray[np.int32] = by_hash_N.astype(np.int32)
        del by_hash_N
        is_first_N = np.ones(len(hash_N), dtype=np.bool_)
        np.not_equal(hash_N[1:], hash_N[:-1], out=is_first_N[1:])
        del hash_N
        return order_N, np.flatnonzero(is_first_N).astype(np.int32)

    def _text(self, fields: Mapping[str, object]) -> str:
        value = fields.get(self.name)
        return NO_VALUE if value is None else str(value)  # only rule 1 of prompts keeps nulls

    def _label(self, fields: Mapping[str, object]) -> str:
        text = self._text(fields)
        return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}…"


def _heaviest(
    weight_D: NDArray[np.float64], order_N: NDArray[np.int32], starts_D: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The values of the largest weight, ties by their first rows: first rows int32 [T], and positions int64 [T]."""
    likely = np.arange(len(weight_D))
    if len(weight_D) > NAMED_VALUES:
        least = np.partition(weight_D, len(weight_D) - NAMED_VALUES)[-NAMED_VALUES]
        likely = np.flatnonzero(weight_D >= least)
    first = order_N[starts_D[likely]]
    chosen = np.lexsort((first, -weight_D[likely]))[:NAMED_VALUES]
    return first[chosen], likely[chosen]


def missing_field(name: str, known: Iterable[str]) -> ConfigError:
    """The refusal of a field that no prompt has; ``known``: fields that prompts have."""
    named = ", ".join(printable(each) for each in known)
    return ConfigError(f"no prompt has a field {name!r}", hint=f"the input lines have {named or 'only prompts'}")


def _field_names(table: PromptTable) -> list[str]:
    """The first fields that occur; lines of any content may have a new one each."""
    names: dict[str, None] = {}
    for prompt in table:
        names.update(dict.fromkeys(prompt.fields))
        if len(names) >= _NAMED_FIELDS:
            break
    return list(names)[:_NAMED_FIELDS]
