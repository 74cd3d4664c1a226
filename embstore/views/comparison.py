"""Compares two weightings, of one store or of two: how far apart they are, and which prompts moved most. No torch.

Prompts are joined by row id. The weights of each side are scaled to sum 1 over the common prompts, so that stores of
different size are comparable; the weight of the other prompts is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import effective_sample_size, total_variation
from embstore.core.errors import ConfigError
from embstore.storage.reader import EmbeddingStore, open_store


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
    right_rows = {row_id: row for row, row_id in enumerate(right_store.ids)}
    pairs = [(row, right_rows[row_id]) for row, row_id in enumerate(left_store.ids) if row_id in right_rows]
    if not pairs:
        raise ConfigError(f"{left} and {right} have no id in common", hint="compare stores of the same prompts")
    rows_CP = np.array(pairs, dtype=np.int64)
    left_C, left_side = _side(left_store, left_name, rows_CP[:, 0])
    right_C, right_side = _side(right_store, right_name, rows_CP[:, 1])
    change_C = right_C - left_C
    order = np.argsort(change_C, kind="stable")

    def moved(positions: NDArray[np.int64]) -> list[Moved]:
        chosen = [int(position) for position in positions]
        texts = [prompt.rendered for prompt in left_store.prompts.sample([int(rows_CP[at, 0]) for at in chosen])]
        return [
            Moved(
                id=left_store.ids[rows_CP[at, 0]],
                left=float(left_C[at] * len(pairs)),
                right=float(right_C[at] * len(pairs)),
                text=" ".join(text[:400].split())[:100],
            )
            for at, text in zip(chosen, texts, strict=True)
        ]

    return Comparison(
        left=left_side,
        right=right_side,
        common=len(pairs),
        differing_texts=int(np.count_nonzero(left_store.keys[rows_CP[:, 0]] != right_store.keys[rows_CP[:, 1]])),
        tv=total_variation(left_C, right_C),
        spearman=spearman(left_C, right_C),
        rose=moved(order[change_C[order] > 0][::-1][:count]),
        fell=moved(order[change_C[order] < 0][:count]),
    )


def spearman(left_C: NDArray[np.float64], right_C: NDArray[np.float64]) -> float | None:
    """Rank correlation, ties at their mean rank (Spearman 1904); None if all values of a side are equal."""
    ranks = [_mean_ranks(values) for values in (left_C, right_C)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = [float(np.linalg.norm(rank)) for rank in centred]
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if all(norms) else None


def _mean_ranks(values_C: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values_C, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean_ranks


def _opened(place: str | Path) -> tuple[EmbeddingStore, str]:
    folder, colon, name = str(place).rpartition(":")
    if colon and folder and not Path(place).exists():
        return open_store(folder), name
    return open_store(place), "default"


def _side(store: EmbeddingStore, name: str, rows_C: NDArray[np.int64]) -> tuple[NDArray[np.float64], Side]:
    """Weights of the common prompts, scaled to sum 1, and a summary of this side."""
    weights_N = store.named_weights(name).astype(np.float64)
    common_C = weights_N[rows_C]
    total = float(common_C.sum())
    if total <= 0:
        raise ConfigError(f"the common prompts have no weight in {store.root}:{name}")
    return common_C / total, Side(
        store=str(store.root),
        name=name,
        rows=store.num_rows,
        alone=store.num_rows - len(rows_C),
        alone_weight=max(0.0, 1.0 - total / float(weights_N.sum())),
        ess_share=effective_sample_size(common_C) / len(rows_C),
        weighting=store.named_metadata(name)["weighting"],
    )
