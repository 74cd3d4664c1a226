"""The numbers behind the charts of a report: histograms and weight against length. Plain numbers, for any plotting library.

Shapes: N rows, B rows of a block, X bins of length, Y bins of weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.rows import slices
from embstore.views.report.data import ReportData

_BINS = 60
_LENGTH_BINS, _WEIGHT_BINS = 56, 44
_TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)
_ENOUGH = 10  # prompts of about one length, for their median to say something
_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """``counts`` between ``edges``; ``above`` more lie beyond the last edge."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    above: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightByLength:
    """``counts`` int64 [Y, X] of prompts by weight and length, and the middle half of the weights at each length.

    ``length_edges`` are even in the logarithm; the last row of ``counts`` also holds what lies above it. ``centre``,
    ``low``, ``median`` and ``high`` (quartiles) have one entry for each length that enough prompts have.
    """

    length_edges: NDArray[np.float64]
    weight_edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    centre: NDArray[np.float64]
    low: NDArray[np.float64]
    median: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Charts:
    """What the pages and the picture draw; None where too few prompts have a value.

    ``reach`` is the largest ``|log2 weight|`` with its own colour, ``ticks`` the weights that the colour bar names.
    """

    weight: Histogram
    mean_distance: Histogram | None
    weight_by_length: WeightByLength
    reach: float
    ticks: list[float]


def charts_of(data: ReportData) -> Charts:
    """All charts of a report."""
    has_vector_N = np.isfinite(data.weight)
    mean_distance = _distances(data.mean_distance[has_vector_N & np.isfinite(data.mean_distance)])
    weight_N = data.weight[has_vector_N]
    top = max(2.0, float(np.quantile(weight_N, 0.999)))
    log_N = np.maximum(weight_N, 1e-6)
    low, high = np.quantile(np.log2(log_N, out=log_N), [0.01, 0.99], overwrite_input=True)
    del log_N
    reach = float(np.clip(max(-low, high), 0.25, 4.0))
    return Charts(
        weight=_histogram(weight_N, 0.0, top),
        mean_distance=mean_distance,
        weight_by_length=_weight_by_length(data.length[has_vector_N], weight_N, top),
        reach=reach,
        ticks=[tick for tick in (_FINE_TICKS if reach < 1 else _TICKS) if abs(np.log2(tick)) <= reach],
    )


def _distances(distance_N: NDArray[np.float64]) -> Histogram | None:
    if len(distance_N) < 2:
        return None
    return _histogram(distance_N, float(distance_N.min()), float(np.quantile(distance_N, 0.999)))


def _histogram(values: NDArray[np.float64], low: float, high: float) -> Histogram:
    if high - low <= 1e-6 * high:  # nearly equal values: bins still need a width
        low, high = 0.99 * low, 1.01 * high + 1e-6
    inside = values[values <= high]
    counts, edges = np.histogram(inside, bins=_BINS, range=(low, high))
    return Histogram(edges=edges, counts=counts, above=len(values) - len(inside))


def _weight_by_length(length_N: NDArray[np.int32], weight_N: NDArray[np.float64], top: float) -> WeightByLength:
    first, last = (float(np.log10(max(int(length), 1))) for length in (length_N.min(), length_N.max()))
    if last - first < 0.1:  # nearly one length: the chart still needs a width
        first, last = first - 0.05, last + 0.05
    log_edges = np.linspace(first, last, _LENGTH_BINS + 1)
    weight_edges = np.linspace(0, top, _WEIGHT_BINS + 1)
    counts = np.zeros((_WEIGHT_BINS, _LENGTH_BINS), dtype=np.int64)
    bin_N = np.empty(len(length_N), dtype=np.uint8)
    size_X = np.zeros(_LENGTH_BINS, dtype=np.int64)
    for block in slices(0, len(length_N), _BLOCK_ROWS):
        log_B = np.log10(np.maximum(length_N[block], 1))
        found, _, _ = np.histogram2d(np.minimum(weight_N[block], top), log_B, bins=(weight_edges, log_edges))
        counts += found.astype(np.int64)
        bin_N[block] = np.clip(np.searchsorted(log_edges, log_B, side="right") - 1, 0, _LENGTH_BINS - 1)
        size_X += np.bincount(bin_N[block], minlength=_LENGTH_BINS)
    enough = np.flatnonzero(size_X >= _ENOUGH)
    quartiles = np.array([np.quantile(weight_N[bin_N == index], [0.25, 0.5, 0.75]) for index in enough]).reshape(-1, 3)
    middles = (log_edges[:-1] + log_edges[1:]) / 2
    return WeightByLength(
        length_edges=10**log_edges,
        weight_edges=weight_edges,
        counts=counts,
        centre=10 ** middles[enough],
        low=quartiles[:, 0],
        median=quartiles[:, 1],
        high=quartiles[:, 2],
    )
