"""Which rows are drawn together: as in a simple random sample, whatever period the data has.

Expected counts are right for many samples that no one should use: every second row of a file of pairs is always the same
half of a pair. So these tests look at two rows at a time, and at classes of rows, over 1,000 seeds. The oracles are the
hypergeometric distribution for equal weights; for others the variance that Hartley and Rao (1962) give for systematic
sampling along a random order, the one of independent rounding as an upper bound, and every order of five rows.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.training import DensitySampler
from embstore.training.draws import Method

ROWS, RUNS = 4096, 1000
HALF = ROWS // 2
LIMIT = 1.1  # of an sd over 1,000 runs: 4.5 standard errors above 1
SIGMAS = 5.0
PERIODS = (2, 3, 4, 8, 64)
METHODS: tuple[Method, ...] = ("systematic", "without_replacement")
Counts = NDArray[np.uint8]


WEIGHTS = {
    "equal": np.ones(ROWS),
    "within 0.2 %": np.random.default_rng(5).normal(1, 0.002, size=ROWS),
    "within 2 %": np.random.default_rng(5).normal(1, 0.02, size=ROWS),
    "in turn": np.tile([1.5, 0.5], HALF),
    "in turns of four": np.tile([0.4, 1.6, 0.8, 1.2], ROWS // 4),
    "skewed": np.random.default_rng(5).gamma(1.0, size=ROWS),
}


@cache
def seeds(method: Method, draws: int, kind: str = "equal") -> Counts:
    """How often each row is drawn: a line of ROWS counts for each seed."""
    samplers = (DensitySampler(WEIGHTS[kind], num_samples=draws, method=method, seed=seed) for seed in range(RUNS))
    return np.stack([counts(sampler.plan(0)) for sampler in samplers])


@cache
def epochs() -> Counts:
    """As ``seeds``, for the epochs of one seed."""
    sampler = DensitySampler(WEIGHTS["equal"], num_samples=HALF, seed=11)
    return np.stack([counts(sampler.plan(epoch)) for epoch in range(RUNS)])


def counts(rows: NDArray[np.int64]) -> Counts:
    return np.bincount(rows, minlength=ROWS).astype(np.uint8)


@cache
def classes() -> tuple[list[str], NDArray[np.float32]]:
    """Classes of rows that real files have: every p-th row from each start, and each p-th part of the file.

    Names, and a matrix [ROWS, classes] of 0 and 1.
    """
    row, found = np.arange(ROWS), {}
    for period in PERIODS:
        found |= {f"row % {period} == {start}": row % period == start for start in range(period)}
        found |= {f"part {part} of {period}": row * period // ROWS == part for part in range(period)}
    return list(found), np.stack(list(found.values()), axis=1).astype(np.float32)


def hypergeometric_sd(members: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Of the number of drawn members of classes of this size, in a simple random sample."""
    share = members / ROWS
    return np.sqrt(draws * share * (1 - share) * (ROWS - draws) / (ROWS - 1))


def assert_as_varied(found: Counts, expected: NDArray[np.float64], sd_of_classes: NDArray[np.float64]) -> None:
    """The draws of each class of rows: right on average, and not more varied."""
    names, is_member = classes()
    drawn = found.astype(np.float32) @ is_member  # whole numbers below 2^24: exact
    drawn = drawn.astype(np.float64)
    ratio = drawn.std(axis=0) / sd_of_classes
    assert ratio.max() <= LIMIT, names[int(ratio.argmax())]
    errors = np.abs(drawn.mean(axis=0) - expected @ is_member) / (sd_of_classes / math.sqrt(len(found)))
    assert errors.max() <= SIGMAS, names[int(errors.argmax())]


def assert_as_varied_as_simple_random(found: Counts, draws: int) -> None:
    members = classes()[1].sum(axis=0, dtype=np.float64)
    assert_as_varied(found, np.full(ROWS, draws / ROWS), hypergeometric_sd(members, draws))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("divisor", [2, 3, 4, 64])
def test_no_class_of_rows_varies_more_than_in_a_simple_random_sample(method: Method, divisor: int) -> None:
    """At n = N/2 of equal weights, points in the stored order took only even rows, or only odd ones."""
    draws = ROWS // divisor
    assert_as_varied_as_simple_random(seeds(method, draws), draws)


def test_epochs_of_one_seed_vary_as_seeds_do() -> None:
    found = epochs()
    assert_as_varied_as_simple_random(found, HALF)
    four = found.reshape(RUNS // 4, 4, ROWS).sum(axis=1)[:, ::2].sum(axis=1)  # even rows in four epochs together
    assert four.std() <= 1.2 * 2 * hypergeometric_sd(np.array(HALF), HALF)  # 4.5 standard errors of 250 runs


def test_an_epoch_says_nothing_of_the_next() -> None:
    """The rows of one are a class like any other for the next: the overlap is hypergeometric."""
    found = epochs()
    overlap = (found[1:] & found[:-1]).sum(axis=1)
    sd = float(hypergeometric_sd(np.array(HALF), HALF))
    assert abs(overlap.mean() - HALF / 2) <= SIGMAS * sd / math.sqrt(len(overlap))
    assert overlap.std() <= LIMIT * sd


@pytest.mark.parametrize("rank", [0, 3])
def test_each_rank_draws_a_simple_random_sample(rank: int) -> None:
    found = [
        counts(np.array(list(DensitySampler(WEIGHTS["equal"], num_samples=HALF, seed=seed, rank=rank, num_replicas=4))))
        for seed in range(RUNS)
    ]
    assert_as_varied_as_simple_random(np.stack(found), HALF // 4)


def test_the_first_draws_of_an_epoch_are_a_simple_random_sample() -> None:
    found = [counts(DensitySampler(WEIGHTS["equal"], num_samples=HALF, seed=seed).plan(0)[:64]) for seed in range(RUNS)]
    assert_as_varied_as_simple_random(np.stack(found), 64)


def pairs() -> dict[str, NDArray[np.int64]]:
    """Disjoint pairs of rows."""
    row = np.arange(ROWS)
    return {
        "adjacent": row.reshape(-1, 2),
        "adjacent, from row 1": np.roll(row, -1).reshape(-1, 2),
        "at distance N/2": row.reshape(2, -1).T,
        "random": np.random.default_rng(1).permutation(row).reshape(-1, 2),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", pairs())
def test_pairs_are_drawn_together_as_in_a_simple_random_sample(kind: str, method: Method) -> None:
    first, second = pairs()[kind].T
    found = seeds(method, HALF)
    both = found[:, first] & found[:, second]
    two, four = (math.perm(HALF, k) / math.perm(ROWS, k) for k in (2, 4))
    assert np.abs(both.mean(axis=0) - two).max() <= SIGMAS * math.sqrt(two * (1 - two) / RUNS)  # each pair over the seeds
    number = len(first)
    variance = number * two * (1 - two) + number * (number - 1) * (four - two**2)
    assert abs(both.sum(axis=1).mean() - number * two) <= SIGMAS * math.sqrt(variance / RUNS)  # all of them


def hartley_rao_sd(inclusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the number of drawn members of each class, for systematic sampling along a random order (Hartley and Rao 1962)."""
    draws, is_member = inclusion.sum(), classes()[1]
    centred = is_member - inclusion @ is_member / draws
    return np.sqrt((inclusion * (1 - (draws - 1) / draws * inclusion)) @ centred**2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["within 0.2 %", "within 2 %"])
def test_weights_that_differ_little_show_no_period_either(kind: str, method: Method) -> None:
    found = seeds(method, HALF, kind)
    inclusion = HALF * WEIGHTS[kind] / WEIGHTS[kind].sum()
    assert_as_varied(found, inclusion, hartley_rao_sd(inclusion))


@pytest.mark.parametrize(
    ("kind", "draws", "method"),
    [
        *itertools.product(("in turn", "in turns of four"), (HALF,), METHODS),
        *itertools.product(("in turn", "in turns of four", "skewed"), (ROWS,), METHODS[:1]),
    ],
)
def test_quotas_are_rounded_apart(kind: str, draws: int, method: Method) -> None:
    """What is random is which quotas are rounded up. At most as varied as if each were rounded on its own: in a random order
    under evenly spaced points, a row that is rounded up leaves less for the others."""
    found = seeds(method, draws, kind)
    quota = draws * WEIGHTS[kind] / WEIGHTS[kind].sum()
    rounded_up = quota % 1
    assert_as_varied(found, quota, np.sqrt((rounded_up * (1 - rounded_up)) @ classes()[1]))


@pytest.mark.parametrize("vector", [(1, 2, 3, 4, 5), (1, 1, 4, 4, 4), (9, 2, 1, 2, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("draws", [2, 3])
def test_two_rows_are_drawn_together_as_over_every_order_of_the_rows(vector: tuple[int, ...], draws: int) -> None:
    """Exact moments of the design, from all 120 orders and all offsets."""
    runs = 3000
    sampler = DensitySampler(np.array(vector, dtype=np.float64), num_samples=draws, seed=2)
    found = np.stack([np.bincount(sampler.plan(epoch), minlength=len(vector)) for epoch in range(runs)]).astype(np.float64)
    together = found.T @ found / runs
    expected, of_squares = exact_moments(vector, draws)
    error = np.sqrt(np.maximum(of_squares - expected**2, 0) / runs)
    assert (np.abs(together - expected) <= SIGMAS * error + 1e-9).all()


def exact_moments(vector: tuple[int, ...], draws: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the products of two rows' counts, and of their squares, over all orders and offsets."""
    size = len(vector)
    mean, of_squares = np.zeros((size, size)), np.zeros((size, size))
    for order in itertools.permutations(range(size)):
        ends = draws * np.cumsum([vector[row] for row in order]) / sum(vector)
        steps = np.unique(np.r_[0.0, (-ends) % 1, 1.0])  # between them, no count depends on the offset
        for low, high in itertools.pairwise(steps):
            edges = np.floor(ends + (low + high) / 2)
            count = np.zeros(size)
            count[list(order)] = np.diff(edges, prepend=0.0)
            product = np.outer(count, count)
            mean += (high - low) * product
            of_squares += (high - low) * product**2
    return mean / math.factorial(size), of_squares / math.factorial(size)
