"""Seeded samples: distinct, even, the same for ever, and of the sample's size only."""

from __future__ import annotations

import numpy as np
import pytest

from embstore.core.sampling import seeded_draw, seeded_sample


def test_a_sample_of_a_trillion_numbers_takes_no_memory_of_a_trillion() -> None:
    sample = seeded_sample(10**12, 256, 0)
    assert len(np.unique(sample)) == 256
    assert sample.dtype == np.int64
    assert 0.4 < sample.mean() / 10**12 < 0.6


@pytest.mark.parametrize(("count", "size"), [(1000, 499), (1000, 500), (10, 20), (7, 1), (1, 1), (64, 31)])
def test_a_sample_is_distinct_ascending_and_complete(count: int, size: int) -> None:
    for key in range(50):
        sample = seeded_sample(count, size, key)
        assert len(sample) == min(count, size)
        assert (np.diff(sample) > 0).all()
        assert (sample >= 0).all()
        assert (sample < count).all()


@pytest.mark.parametrize("size", [3, 12])  # drawn one by one, and as the begin of an order
def test_every_number_is_as_likely_at_every_place(size: int) -> None:
    draws = np.array([seeded_draw(20, size, key) for key in range(8000)])
    for place in (0, size - 1):
        counts = np.bincount(draws[:, place], minlength=20)
        assert ((counts - 400) ** 2 / 400).sum() < 45  # chi-square of 19 degrees: 0.0007 above


def test_smaller_samples_are_the_first_of_larger_ones() -> None:
    whole = seeded_draw(100_000, 4000, [3, 1])
    assert np.array_equal(seeded_draw(100_000, 50, [3, 1]), whole[:50])


def test_samples_never_change() -> None:
    assert seeded_draw(1000, 6, 0).tolist() == [259, 458, 49, 556, 803, 725]
    assert seeded_sample(10**9, 3, [7, 2]).tolist() == [778191725, 808182782, 834784026]
