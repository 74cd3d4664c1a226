"""Seeded orders and samples that never change: the same count and key give the same rows on any machine and release.

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


def seeded_sample(count: int, size: int, key: int | Sequence[int]) -> NDArray[np.int64]:
    """At most ``size`` distinct numbers below ``count``, int64, ascending: the first of ``shuffled`` in order.

    Examples
    --------
    >>> [int(number) for number in seeded_sample(5, 3, 0)]
    [0, 1, 2]
    """
    return np.sort(shuffled(count, key)[:size])
