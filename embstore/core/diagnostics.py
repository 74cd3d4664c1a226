"""Diagnostics of weights and neighbours: figures for the metadata, and the limits beyond which a build warns.

Shapes: N rows, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.rows import slices

# Fewer than a tenth of the prompts would then carry the training (docs/density.md).
MIN_ESS_SHARE = 0.1
# Above this, reports state that the weighting hardly differs from uniform sampling.
MILD_ESS_SHARE = 0.9
# At this skewness of unclustered points, a tenth are in no neighbour list and one is in hundreds (docs/density.md).
MAX_HUBNESS = 3.0
# Share of rows below the noise floor: the floor decides their weights, not their distances.
MAX_FLOORED_SHARE = 0.01
_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Hubness:
    """How often vectors occur among the ``k`` nearest of others (Radovanovic et al. 2010, JMLR 11:2487).

    ``skewness`` of the k-occurrence over distinct vectors, None where all occur equally often; ``antihub_share`` is the
    share of vectors that never occur; ``most`` the largest count.
    """

    k: int
    skewness: float | None
    antihub_share: float
    most: int


def hubness(ids_NK: NDArray[np.integer], groups_N: NDArray[np.integer], k: int) -> Hubness | None:
    """Hubness of a neighbour graph; None where no row has a vector.

    Parameters
    ----------
    ids_NK
        Rows of the nearest distinct vectors, each vector named by its first row, -1 for none.
    groups_N
        The first row with the same vector, -1 for rows without one. Copies count once.
    k
        1 <= k <= K.
    """
    first_G = np.flatnonzero(groups_N == np.arange(len(groups_N)))
    if not len(first_G):
        return None
    counts_N = np.zeros(len(groups_N), dtype=np.int64)
    for block in slices(0, len(first_G), _BLOCK_ROWS):
        found = ids_NK[first_G[block], :k]
        np.add.at(counts_N, found[found >= 0], 1)  # a bincount would make N counts for each block
    counts_G = counts_N[first_G].astype(np.float64)
    deviation_G = counts_G - counts_G.mean()
    variance = float(np.square(deviation_G).mean())
    return Hubness(
        k=k,
        skewness=float((deviation_G**3).mean() / variance**1.5) if variance > 0 else None,
        antihub_share=float((counts_G == 0).mean()),
        most=int(counts_G.max()),
    )


def rank_correlation(first_N: NDArray[np.floating], second_N: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either is constant. Memory: 24 bytes a value.

    Examples
    --------
    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([9.0, 4.0, 1.0]))
    -1.0
    """
    first_rank_N, second_rank_N = _twice_the_ranks(first_N), _twice_the_ranks(second_N)
    middle = len(first_N) + 1.0  # twice the mean rank, whatever the ties
    product = first_square = second_square = 0.0
    for block in slices(0, len(first_N), _BLOCK_ROWS):
        first_B, second_B = first_rank_N[block] - middle, second_rank_N[block] - middle
        product += float(first_B @ second_B)
        first_square += float(first_B @ first_B)
        second_square += float(second_B @ second_B)
    scale = float(np.sqrt(first_square * second_square))
    return float(np.clip(product / scale, -1.0, 1.0)) if scale > 0 else None


def _twice_the_ranks(values_N: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Twice the rank of each value, from 1, ties at their mean rank: a whole number, and uint32 holds that of every row."""
    order_N = np.argsort(values_N, kind="stable")
    sorted_N = values_N[order_N]
    order_N = order_N.astype(np.uint32)
    is_first_N = np.ones(len(sorted_N), dtype=np.bool_)
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=is_first_N[1:])
    del sorted_N
    starts = np.flatnonzero(is_first_N).astype(np.uint32)
    sizes = np.diff(starts, append=np.uint32(len(values_N)))
    starts *= 2
    starts += sizes + np.uint32(1)
    group_N = np.cumsum(is_first_N, dtype=np.uint32)
    ranks_N = np.empty(len(values_N), dtype=np.uint32)
    for block in slices(0, len(values_N), _BLOCK_ROWS):  # an index of uint32 is copied as int64
        ranks_N[order_N[block]] = starts[group_N[block] - 1]
    return ranks_N


def concerns(
    *, ess_share: float, hubs: Hubness | None, floored_share: float, noise_floor: float, correlation: float | None
) -> list[str]:
    """Warnings in words; empty when nothing is out of the ordinary."""
    found = []
    if ess_share < MIN_ESS_SHARE:
        found.append(
            f"effective sample size {ess_share:.1%} of the rows: a small part of the prompts carries nearly all weight; "
            "a lower gamma, a larger target_ess, a smaller max_ratio or some uniform_mix spreads it"
        )
    if hubs is not None and hubs.skewness is not None and hubs.skewness > MAX_HUBNESS:
        found.append(
            f"hubness: k-occurrence skewness {hubs.skewness:.1f} (above {MAX_HUBNESS:g}), one vector is a neighbour of "
            f"{hubs.most:,} others; center may lower it"
        )
    if floored_share > MAX_FLOORED_SHARE:
        found.append(
            f"{floored_share:.1%} of the rows have a mean distance below the noise floor {noise_floor:.1e}: "
            "they count as equally crowded"
        )
    if correlation is not None and correlation > 0:
        found.append(f"weights rise with density (rank correlation {correlation:+.2f}): crowded prompts are favoured")
    return found


def effective_sample_size(weights_N: NDArray[np.floating]) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2, in rows.

    Examples
    --------
    >>> effective_sample_size(np.array([0.25, 0.25, 0.25, 0.25]))
    4.0
    """
    weights = weights_N.astype(np.float64)
    return float(weights.sum() ** 2 / np.square(weights).sum())


def total_variation(first_N: NDArray[np.floating], second_N: NDArray[np.floating]) -> float:
    """Total-variation distance of two weightings, each normalised to sum 1: half the L1 distance, 0..1.

    Examples
    --------
    >>> total_variation(np.array([1.0, 0.0]), np.array([0.0, 2.0]))
    1.0
    """
    first = first_N / first_N.sum(dtype=np.float64)
    second = second_N / second_N.sum(dtype=np.float64)
    return float(np.abs(first - second).sum() / 2)
