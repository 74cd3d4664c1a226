"""The draws of one epoch: which rows, how often, in which order. Pure functions of weights, seed and epoch.

Randomness is raw Philox words (Salmon et al. 2011), which numpy promises not to change; everything after them is IEEE
arithmetic in a fixed order, so an epoch is the same on every machine. Library functions that sample or shuffle are not used:
their streams may change between versions.

Systematic sampling (Madow 1949): one uniform offset, then evenly spaced points through the cumulative weights, so each row
is drawn floor or ceil of its quota. Every epoch cumulates the rows in another random order: along the stored
order, points would meet periodic data (pairs, languages in turn) always at the same place. There is no limit of 2^24 rows,
as ``torch.multinomial`` has.

Shapes: N rows, n draws, B values of a block. Price: 8 bytes a row while an epoch is drawn, 12 bytes a draw while it lasts,
and blocks of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError
from embstore.core.rows import slices

Method = Literal["systematic", "without_replacement", "iid"]

if TYPE_CHECKING:
    Rows = NDArray[np.uint32 | np.int64]

_BLOCK = 1 << 16
_TO_UNIT = 2.0**-53  # of the upper 53 bits of a word
_SWAP_TRIES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochDraws:
    """The draws of one epoch: draw i is row ``drawn_n[order_n[i]]``."""

    drawn_n: Rows
    order_n: NDArray[np.uint64]

    def rows(self, positions: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Rows at these positions of the epoch, int64."""
        rows: NDArray[np.int64] = self.drawn_n[self.order_n[positions].view(np.int64)].astype(np.int64)
        return rows


def draw(
    weights_N: NDArray[np.floating], num_samples: int, *, method: Method, seed: int, epoch: int, no_repeat_within: int
) -> tuple[EpochDraws, int]:
    """The draws of this seed and epoch, and how many repeats could not be kept ``no_repeat_within`` draws apart."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    row_type = np.uint32 if len(weights_N) <= 1 << 32 else np.int64
    if method == "iid":
        drawn_n = _independent(weights_N, num_samples, stream, row_type)
    else:
        ceiling = np.inf if method == "systematic" else inclusion(weights_N, num_samples)[0]
        drawn_n = _systematic(weights_N, num_samples, stream, row_type, ceiling)
    order_n = _shuffled(num_samples, stream)
    found = EpochDraws(drawn_n=drawn_n, order_n=order_n)
    return found, _spread(found, no_repeat_within, stream) if no_repeat_within else 0


def inclusion(weights_N: NDArray[np.floating], num_samples: int) -> tuple[float, float]:
    """Draws without replacement: weights of at least ``ceiling`` are certain, others have probability ``scale`` x weight.

    Probabilities are proportional to the weights where n p_i <= 1; above, they are compressed to 1.
    """
    ceiling, certain = np.inf, 0
    while True:
        rest = float(weights_N.sum(dtype=np.float64, where=weights_N < ceiling))
        if certain >= num_samples or rest <= 0:
            return ceiling, 0.0
        scale = (num_samples - certain) / rest
        lower = min(ceiling, 1.0 / scale)
        count = int(np.count_nonzero(weights_N >= lower))
        if count == certain:
            return ceiling, scale
        ceiling, certain = lower, count


def check_without_replacement(weights_N: NDArray[np.floating], num_samples: int) -> int:
    """Refuse a draw of every row; returns how many rows are certain to be drawn."""
    positive = int(np.count_nonzero(weights_N))
    if num_samples >= positive:
        raise ConfigError(
            f"without_replacement needs num_samples below {positive}, the rows with weight above 0, got {num_samples}: "
            "every row would be drawn once, whatever its weight",
            hint="give a smaller num_samples, or use method='systematic'",
        )
    return int(np.count_nonzero(weights_N >= inclusion(weights_N, num_samples)[0]))


def check_spread(weights_N: NDArray[np.floating], num_samples: int, no_repeat_within: int) -> None:
    """Refuse a distance that the largest quota makes impossible."""
    share = float(weights_N.max()) / float(weights_N.sum(dtype=np.float64))
    copies = int(np.ceil(num_samples * share))
    if (copies - 1) * no_repeat_within >= num_samples:
        raise ConfigError(
            f"no_repeat_within {no_repeat_within} cannot hold: row {int(weights_N.argmax())} is drawn up to {copies} times "
            f"in an epoch of {num_samples}",
            hint=f"give at most {(num_samples - 1) // max(1, copies - 1)}, or temper the weights",
        )


def _systematic(
    weights_N: NDArray[np.floating],
    num_samples: int,
    stream: np.random.Philox,
    row_type: type[np.uint32 | np.int64],
    ceiling: float,
) -> Rows:
    """Each row floor or ceil of its quota times, its copies side by side; weights of at least ``ceiling`` exactly once."""
    (offset,) = stream.random_raw(1)
    unit = (int(offset) >> 11) * _TO_UNIT
    row_N = _shuffled(len(weights_N), stream).view(np.int64)
    drawn_n = np.empty(num_samples, dtype=row_type)
    last = num_samples - (int(np.count_nonzero(weights_N >= ceiling)) if ceiling < np.inf else 0)
    # summed in the same order as below, so that the last running total equals the total exactly
    total = 0.0
    for _, _, running_B in _running(weights_N, row_N, ceiling):
        total = float(running_B[-1])
    filled, before = 0, 0
    for row_B, once_B, running_B in _running(weights_N, row_N, ceiling):
        edges_B = np.minimum((running_B / total * last + unit).astype(np.int64), last)
        counts_B = np.diff(edges_B, prepend=before)
        before = int(edges_B[-1])
        if once_B is not None:
            np.minimum(counts_B, 1, out=counts_B)  # rounding can make it 2 although the probability is below 1
            counts_B[once_B] = 1
        found_B = np.repeat(row_B.astype(row_type), counts_B)
        drawn_n[filled : filled + len(found_B)] = found_B
        filled += len(found_B)
    if filled < num_samples:  # only without replacement, if a rounding error lost a draw
        drawn_n = _completed(drawn_n, filled, weights_N)
    return drawn_n


def _running(
    weights_N: NDArray[np.floating], row_N: NDArray[np.int64], ceiling: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_] | None, NDArray[np.float64]]]:
    """Blocks of the rows in this order: rows, which of them reach the ceiling, running totals of the others' weights."""
    total = 0.0
    for block in slices(0, len(row_N), _BLOCK):
        row_B = row_N[block]
        weight_B = weights_N[row_B]
        once_B = weight_B >= ceiling if ceiling < np.inf else None
        running_B = weight_B.astype(np.float64)
        if once_B is not None:
            running_B[once_B] = 0.0
        running_B[0] += total
        np.cumsum(running_B, out=running_B)
        total = float(running_B[-1])
        yield row_B, once_B, running_B


def _completed(drawn_n: Rows, filled: int, weights_N: NDArray[np.floating]) -> Rows:
    """Fill draws lost to rounding with the last rows of weight above 0 that are not drawn yet."""
    free = np.setdiff1d(np.flatnonzero(weights_N), drawn_n[:filled])[filled - len(drawn_n) :]
    drawn_n[filled:] = free
    return drawn_n


def _independent(
    weights_N: NDArray[np.floating], num_samples: int, stream: np.random.Philox, row_type: type[np.uint32 | np.int64]
) -> Rows:
    """Rows of independent draws, in row order: sorted points and cumulative weights are merged in one sweep."""
    words_n = _words(stream, num_samples)
    words_n.sort()
    cumulative_N = np.cumsum(weights_N, dtype=np.float64)
    last = int(np.flatnonzero(weights_N)[-1])
    drawn_n = np.empty(num_samples, dtype=row_type)
    for block in slices(0, num_samples, _BLOCK):
        points_B = (words_n[block] >> np.uint64(11)).astype(np.float64) * _TO_UNIT * cumulative_N[-1]
        drawn_n[block] = np.minimum(np.searchsorted(cumulative_N, points_B, side="right"), last)
    return drawn_n


def _words(stream: np.random.Philox, count: int) -> NDArray[np.uint64]:
    words: NDArray[np.uint64] = stream.random_raw(count)
    return words


def _shuffled(num_samples: int, stream: np.random.Philox) -> NDArray[np.uint64]:
    """A random order of 0..n - 1: sorts words whose low bits are the position, so no two are equal and any sort will do."""
    order_n = _words(stream, num_samples)
    mask = np.uint64((1 << max(1, (num_samples - 1).bit_length())) - 1)
    for block in slices(0, num_samples, _BLOCK):
        order_n[block] &= ~mask
        order_n[block] |= np.arange(block.start, block.stop, dtype=np.uint64)
    order_n.sort()
    order_n &= mask
    return order_n


def _spread(found: EpochDraws, distance: int, stream: np.random.Philox) -> int:
    """Move repeats of a row apart, in place, by swapping them with other draws; returns how many stay too near.

    Only repeats that the shuffle put too near move, and only to places where neither swapped row is near its own copies.
    """
    order_n, drawn_n = found.order_n, found.drawn_n
    row_n = drawn_n[order_n]

    def is_near(row: int, position: int, leaving: int) -> bool:
        start = max(0, position - distance)
        near = np.flatnonzero(row_n[start : position + distance + 1] == row) + start
        return bool(np.any((near != position) & (near != leaving) & (np.abs(near - position) < distance)))

    left = 0
    for position in _near_repeats(row_n, distance).tolist():
        row = int(row_n[position])
        if not is_near(row, position, position):
            continue
        for word in _words(stream, _SWAP_TRIES).tolist():
            other = word % len(row_n)
            if row_n[other] != row and not is_near(row, other, position) and not is_near(int(row_n[other]), position, other):
                order_n[[position, other]] = order_n[[other, position]]
                row_n[[position, other]] = row_n[[other, position]]
                break
        else:
            left += 1
    return left


def _near_repeats(row_n: Rows, distance: int) -> NDArray[np.int64]:
    """Positions whose row was also drawn less than ``distance`` earlier."""
    by_row = np.argsort(row_n, kind="stable")
    same = row_n[by_row[1:]] == row_n[by_row[:-1]]
    near = same & (np.diff(by_row) < distance)
    return np.sort(by_row[1:][near])
