"""Compares two weightings, of one store or of two: how far apart they are, and which prompts moved most. No torch.

Prompts are joined by row id. The weights of each side are scaled to sum 1 over the common prompts, so that stores of
different size are comparable; the weight of the other prompts is reported. In memory are a few numbers a row, never ids.

Shapes: N rows of a side, C prompts that both sides have, B rows of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.diagnostics import effective_sample_size, rank_correlation
from embstore.core.errors import ConfigError
from embstore.core.rows import slices
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store

_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two weightings: its rows, the rows that the other side lacks, and their share of its weight.

    ``ess_share`` is the effective sample size as a share of the common prompts.
    """

    store: str
    name: str
    rows: int
    alone: int
    alone_weight: float
    ess_share: float
    weighting: dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """One prompt whose weight moved: weights are in units of the mean weight of the common prompts."""

    id: str
    left: float
    right: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What ``embstore compare`` prints.

    ``tv`` is the total-variation distance of the two distributions over the common prompts: the share of draws that would
    differ. ``spearman`` is the correlation of the weights' ranks, None if all weights of a side are equal.
    """

    left: Side
    right: Side
    common: int
    differing_texts: int
    tv: float
    spearman: float | None
    rose: list[Moved]
    fell: list[Moved]


def compare(left: str | Path, right: str | Path, *, count: int = 5) -> Comparison:
    """Compare two weightings, each given as ``STORE`` or ``STORE:NAME``.

    Parameters
    ----------
    left, right
        Folder of a finished store, and after a colon the name of one of its weightings (default: "default").
    count
        How many of the prompts that rose most, and of those that fell most, by the change of their probability.

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError, CorruptStoreError, ConfigError
        A store or name does not exist, a store is unfinished or damaged, or the stores have no id in common.
    """
    (left_store, left_name), (right_store, right_name) = _opened(left), _opened(right)
    left_rows_C, right_rows_C = _common_rows(left_store.prompts, right_store.prompts)
    if not len(left_rows_C):
        raise ConfigError(f"{left} and {right} have no id in common", hint="compare stores of the same prompts")
    left_C, left_side = _side(left_store, left_name, left_rows_C)
    right_C, right_side = _side(right_store, right_name, right_rows_C)
    correlation = rank_correlation(left_C, right_C)
    left_mean, right_mean = left_C.mean(dtype=np.float64), right_C.mean(dtype=np.float64)
    change_C = right_C / right_mean
    change_C -= left_C / left_mean
    moved_weight = float(np.abs(change_C).sum())
    order = np.argsort(change_C, kind="stable")

    def moved(positions: NDArray[np.int64]) -> list[Moved]:
        prompts = left_store.prompts.sample([int(row) for row in left_rows_C[positions]])
        return [
            Moved(
                id=str(prompt.id),
                left=float(left_C[at] / left_mean),
                right=float(right_C[at] / right_mean),
                text=" ".join(prompt.rendered[:400].split())[:100],
            )
            for at, prompt in zip(positions, prompts, strict=True)
        ]

    rising, falling = order[::-1][:count], order[:count]
    return Comparison(
        left=left_side,
        right=right_side,
        common=len(left_rows_C),
        differing_texts=_differing(left_store.keys, left_rows_C, right_store.keys, right_rows_C),
        tv=moved_weight / 2 / len(change_C),
        spearman=correlation,
        rose=moved(rising[change_C[rising] > 0]),
        fell=moved(falling[change_C[falling] < 0]),
    )


def _common_rows(left: PromptTable, right: PromptTable) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows of the prompts whose ids both sides have, in the order of the left side: int32 [C] each.

    Ids are compared by 64-bit hashes with a key of this process, so nobody can choose two that are equal; by chance, two of
    10 million ids in each store are with probability 5e-6.
    """
    right_hash_N = np.empty(len(right), dtype=np.int64)
    filled = 0
    for hash_B in _hashes(right):
        right_hash_N[filled : filled + len(hash_B)] = hash_B
        filled += len(hash_B)
    order_N = np.argsort(right_hash_N, kind="stable")
    right_hash_N = right_hash_N[order_N]
    order_N = order_N.astype(np.int32)
    last = len(right_hash_N) - 1
    found_N = np.empty(len(left), dtype=np.int32)
    filled = 0
    for hash_B in _hashes(left):
        slot_B = np.minimum(np.searchsorted(right_hash_N, hash_B), last)
        found_N[filled : filled + len(hash_B)] = np.where(right_hash_N[slot_B] == hash_B, order_N[slot_B], -1)
        filled += len(hash_B)
    left_rows_C = np.flatnonzero(found_N >= 0).astype(np.int32)
    return left_rows_C, found_N[left_rows_C]


def _hashes(table: PromptTable) -> Iterator[NDArray[np.int64]]:
    hashes = map(hash, table.ids())
    while len(hash_B := np.fromiter(itertools.islice(hashes, _BLOCK), dtype=np.int64)):
        yield hash_B


def _differing(
    left_N: NDArray[np.uint64], left_C: NDArray[np.int32], right_N: NDArray[np.uint64], right_C: NDArray[np.int32]
) -> int:
    return sum(
        int(np.count_nonzero(left_N[left_C[block]] != right_N[right_C[block]])) for block in slices(0, len(left_C), _BLOCK)
    )


def _opened(place: str | Path) -> tuple[EmbeddingStore, str]:
    folder, colon, name = str(place).rpartition(":")
    if colon and folder and not Path(place).exists():
        return open_store(folder), name
    return open_store(place), "default"


def _side(store: EmbeddingStore, name: str, rows_C: NDArray[np.int32]) -> tuple[NDArray[np.float32], Side]:
    """Weights of the common prompts as stored, and a summary of this side."""
    weights_N = store.named_weights(name)
    common_C = weights_N[rows_C]
    total = float(common_C.sum(dtype=np.float64))
    if total <= 0:
        raise ConfigError(f"the common prompts have no weight in {store.root}:{name}")
    return common_C, Side(
        store=str(store.root),
        name=name,
        rows=store.num_rows,
        alone=store.num_rows - len(rows_C),
        alone_weight=max(0.0, 1.0 - total / float(weights_N.sum(dtype=np.float64))),
        ess_share=effective_sample_size(common_C) / len(rows_C),
        weighting=store.named_metadata(name)["weighting"],
    )
