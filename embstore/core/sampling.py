"""Seeded orders and samples that never change: the same count and key give the same rows on any machine.

They are computed from raw Philox words (Salmon et al. 2011), whose stream numpy promises to keep (NEP 19). numpy makes no
such promise for its ``Generator`` methods. Draws for training have their own rules (``training.draws``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def shuffled(count: int, key: int | Sequence[int]) -> NDArray[np.int64]:
    """The numbers 0 to ``count`` - 1 in a fixed random order, int64. Sorting takes 16 bytes of memory per number.

    Examples
    --------
    >>> [int(number) for number in shuffled(5, 0)]
    [0, 2, 1, 4, 3]
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def seeded_draw(count: int, size: int, key: int | Sequence[int]) -> NDArray[np.int64]:
    """At most ``size`` distinct numbers below ``count``, int64, in the order in which they are drawn.

    Every number is equally likely at every place. Price: time and memory of ``size`` words, whatever ``count`` is. Numbers
    are words modulo ``count``, which favours none by more than ``count`` / 2^64; a number drawn before is passed over.

    Examples
    --------
    >>> [int(number) for number in seeded_draw(50, 3, 0)]
    [9, 8, 49]
    """
    if 2 * size >= count:  # about as many words would be passed over
        return shuffled(count, key)[:size]
    words = np.random.Philox(key=key).random_raw(2 * size + 64) % np.uint64(count)  # enough of them are new, nearly always
    while True:
        numbers, first = np.unique(words, return_index=True)
        if len(numbers) >= size:
            drawn: NDArray[np.int64] = words[np.sort(first)[:size]].astype(np.int64)
            return drawn
        words = np.random.Philox(key=key).random_raw(2 * len(words)) % np.uint64(count)


def seeded_sample(count: int, size: int, key: int | Sequence[int]) -> NDArray[np.int64]:
    """As ``seeded_draw``, ascending.

    Examples
    --------
    >>> [int(number) for number in seeded_sample(50, 3, 0)]
    [8, 9, 49]
    """
    return np.sort(seeded_draw(count, size, key))
