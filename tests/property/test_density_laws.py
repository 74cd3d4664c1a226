"""Laws of the weights: which way they point, what cannot move them, and what they add up to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from embstore.core.config import WeightingConfig
from embstore.core.density import NOISE_FLOOR, mean_distance, normalise_float32, sampling_weights
from embstore.core.diagnostics import effective_sample_size, total_variation
from embstore.core.errors import ConfigError, CorruptStoreError

Vector = NDArray[np.float64]

# well above the noise floor, so that scaling by up to 10 stays there
DISTANCES = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0.02, 10))
CONFIGS = st.builds(
    WeightingConfig,
    gamma=st.floats(0, 8),
    uniform_mix=st.sampled_from([0.0, 0.25, 1.0]),
    weighting=st.sampled_from(["inverse-density", "uniform", "legacy-inverse"]),
    max_ratio=st.sampled_from([None, 10.0, 2.5, 1.0]),
)
DEFAULT = WeightingConfig()
FLOAT32 = {"rtol": 3e-6, "atol": 0}


def weights_of(distances: Vector, config: WeightingConfig = DEFAULT, groups: NDArray[np.int64] | None = None) -> Vector:
    """Weights as float64, checked for what every weighting promises."""
    groups = np.arange(len(distances)) if groups is None else groups
    weights = sampling_weights(distances, groups, config).weights
    assert weights.dtype == np.float32
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert abs(weights.sum(dtype=np.float64) - 1) <= 1e-6
    assert (weights[groups < 0] == 0).all()
    return weights.astype(np.float64)


def neighbor_distances(points: NDArray[np.float64], k: int) -> Vector:
    """Mean distance to the k nearest distinct vectors, by scikit-learn."""
    distances = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(points).kneighbors(points)[0]
    return mean_distance(distances[:, 1:], k)


@settings(deadline=None, max_examples=60)
@given(DISTANCES, CONFIGS)
def test_weights_are_a_distribution_whatever_the_settings(distances: Vector, config: WeightingConfig) -> None:
    weights_of(distances, config)


@settings(deadline=None, max_examples=60)
@given(DISTANCES, st.floats(0, 8))
def test_weights_are_the_distance_to_the_power_gamma(distances: Vector, gamma: float) -> None:
    expected = distances**gamma
    found = weights_of(distances, WeightingConfig(gamma=gamma, max_ratio=None))
    np.testing.assert_allclose(found, expected / expected.sum(), **FLOAT32)


@settings(deadline=None, max_examples=60)
@given(DISTANCES, CONFIGS)
def test_a_larger_distance_never_gets_a_smaller_weight(distances: Vector, config: WeightingConfig) -> None:
    order = np.argsort(distances, kind="stable")
    weights = weights_of(distances, config)[order]
    if config.weighting == "legacy-inverse":
        weights = weights[::-1]  # the original's formula points the wrong way: that is why it warns
    assert (np.diff(weights) >= 0).all()


def test_a_larger_distance_gets_a_larger_weight() -> None:
    assert (np.diff(weights_of(np.array([0.1, 0.2, 0.3]))) > 0).all()
    assert (np.diff(weights_of(np.array([0.1, 0.2, 0.3]), WeightingConfig(weighting="legacy-inverse"))) < 0).all()


def test_legacy_inverse_is_the_original_formula_and_warns() -> None:
    distances = np.array([0.5, 1.0, 0.0])
    found = sampling_weights(distances, np.arange(3), WeightingConfig(weighting="legacy-inverse"))
    expected = np.array([2.0, 1.0, 1e6])
    np.testing.assert_allclose(found.weights, expected / expected.sum(), rtol=1e-6)
    assert any("favours crowded prompts" in warning for warning in found.warnings)


@settings(deadline=None, max_examples=40)
@given(DISTANCES, CONFIGS, st.randoms(use_true_random=False))
def test_weights_follow_their_rows_through_any_reordering(
    distances: Vector, config: WeightingConfig, random: object
) -> None:
    order = np.arange(len(distances))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(weights_of(distances[order], config), weights_of(distances, config)[order], **FLOAT32)


@settings(deadline=None, max_examples=40)
@given(DISTANCES, st.floats(0.1, 10), st.floats(0, 4))
def test_the_unit_of_distance_does_not_matter_above_the_noise_floor(distances: Vector, scale: float, gamma: float) -> None:
    for max_ratio in (None, 2.5):
        config = WeightingConfig(gamma=gamma, max_ratio=max_ratio)
        np.testing.assert_allclose(weights_of(scale * distances, config), weights_of(distances, config), **FLOAT32)


def test_the_noise_floor_is_the_one_that_is_given() -> None:
    found = sampling_weights(np.array([0.01, 0.05, 0.1, 0.2]), np.arange(4), DEFAULT, noise_floor=0.1)
    np.testing.assert_allclose(found.weights, np.array([1, 1, 1, 2]) / 5, rtol=1e-6)


def test_distances_below_the_noise_floor_say_nothing() -> None:
    weights = weights_of(np.array([0.0, NOISE_FLOOR / 3, NOISE_FLOOR, 2 * NOISE_FLOOR]))
    np.testing.assert_allclose(weights, np.array([1, 1, 1, 2]) / 5, **FLOAT32)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), crowd=st.integers(12, 30))
def test_an_isolated_prompt_outweighs_each_member_of_a_crowd(seed: int, crowd: int) -> None:
    random = np.random.default_rng(seed)
    points = np.concatenate([random.normal(size=(crowd, 5)) * 0.01, [np.full(5, 1.0)]])
    weights = weights_of(neighbor_distances(points, 10))
    assert weights[-1] > 5 * weights[:-1].max()


@settings(deadline=None, max_examples=40)
@given(DISTANCES, CONFIGS, st.data())
def test_copies_of_a_vector_share_its_weight_and_move_nobody_elses(
    distances: Vector, config: WeightingConfig, data: st.DataObject
) -> None:
    copied = data.draw(st.integers(0, len(distances) - 1), label="copied")
    copies = data.draw(st.integers(1, 6), label="copies")
    before = weights_of(distances, config)
    groups = np.concatenate([np.arange(len(distances)), np.full(copies, copied)])
    after = weights_of(np.concatenate([distances, np.full(copies, distances[copied])]), config, groups)
    members = groups == copied
    np.testing.assert_allclose(after[members], before[copied] / (copies + 1), **FLOAT32)
    np.testing.assert_allclose(after[~members], before[np.arange(len(distances)) != copied], **FLOAT32)


@pytest.mark.parametrize("num_rows", [1, 2, 11, 1000])
def test_identical_rows_get_finite_uniform_weights(num_rows: int) -> None:
    found = sampling_weights(np.full(num_rows, np.inf), np.zeros(num_rows, dtype=np.int64), WeightingConfig())
    np.testing.assert_allclose(found.weights, np.full(num_rows, 1 / num_rows), rtol=1e-6)
    assert found.method == "uniform"
    assert "fewer than k + 1 = 11 distinct vectors" in found.warnings[0]


def test_with_too_few_vectors_weights_are_uniform_over_vectors_not_rows() -> None:
    found = sampling_weights(np.full(4, np.inf), np.array([0, 1, 1, 1]), WeightingConfig())
    np.testing.assert_allclose(found.weights, [1 / 2, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(DISTANCES, CONFIGS, st.data())
def test_a_failed_row_weighs_nothing_and_counts_in_nothing(
    distances: Vector, config: WeightingConfig, data: st.DataObject
) -> None:
    where = data.draw(st.integers(0, len(distances)), label="where")
    with_failed = np.insert(distances, where, np.inf)
    # groups name the first row with the vector, so they move with the rows
    groups = np.insert(np.arange(len(distances)) + (np.arange(len(distances)) >= where), where, -1)
    weights = weights_of(with_failed, config, groups)
    assert weights[where] == 0
    np.testing.assert_allclose(np.delete(weights, where), weights_of(distances, config), **FLOAT32)


def test_a_store_of_failed_rows_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="every prompt failed"):
        sampling_weights(np.full(3, np.inf), np.full(3, -1), WeightingConfig())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.12, 0.99))
def test_an_asked_for_effective_sample_size_is_reached(seed: int, target: float) -> None:
    distances = np.random.default_rng(seed).uniform(0.1, 1, 200)
    found = sampling_weights(distances, np.arange(200), WeightingConfig(target_ess=target))
    assert found.warnings == ()
    assert effective_sample_size(found.weights) / 200 == pytest.approx(target, rel=1e-4)
    assert found.max_over_mean_vector <= 10 * (1 + 1e-6)
    if not found.limited_rows:
        expected = distances**found.gamma
        np.testing.assert_allclose(found.weights, expected / expected.sum(), rtol=1e-4, atol=1e-12)


def test_an_effective_sample_size_out_of_reach_is_said_so() -> None:
    same = sampling_weights(np.full(10, 0.5), np.arange(10), WeightingConfig(target_ess=0.5))
    assert "out of reach" in same.warnings[0]
    np.testing.assert_allclose(same.weights, np.full(10, 0.1), rtol=1e-6)
    whole = sampling_weights(np.linspace(0.1, 1, 10), np.arange(10), WeightingConfig(target_ess=1.0))
    assert (whole.gamma, whole.warnings) == (0.0, ())


@settings(deadline=None, max_examples=40)
@given(DISTANCES, st.floats(0, 4), st.floats(0, 1))
def test_a_uniform_mix_is_that_share_of_uniform(distances: Vector, gamma: float, mix: float) -> None:
    alone = weights_of(distances, WeightingConfig(gamma=gamma, max_ratio=None))
    mixed = weights_of(distances, WeightingConfig(gamma=gamma, uniform_mix=mix, max_ratio=None))
    np.testing.assert_allclose(mixed, (1 - mix) * alone + mix / len(distances), rtol=1e-5)


def limit_by_bisection(vectors: Vector, ratio: float) -> Vector:
    """Normalised min(v, c) with c over their mean at ``ratio``: c found by halving, not from the sorted sums."""
    low, high = vectors.min(), vectors.max()
    for _ in range(200):
        middle = (low + high) / 2
        above = middle / np.minimum(vectors, middle).mean() > ratio
        low, high = (low, middle) if above else (middle, high)
    limited = np.minimum(vectors, high)
    return limited / limited.sum()


@settings(deadline=None, max_examples=80)
@given(DISTANCES, st.floats(0, 12), st.sampled_from([0.0, 0.2]), st.floats(1, 20))
def test_no_weight_is_above_the_largest_ratio_and_those_below_keep_their_proportions(
    distances: Vector, gamma: float, mix: float, ratio: float
) -> None:
    free = weights_of(distances, WeightingConfig(gamma=gamma, uniform_mix=mix, max_ratio=None))
    config = WeightingConfig(gamma=gamma, uniform_mix=mix, max_ratio=ratio)
    found = weights_of(distances, config)
    assert found.max() * len(found) <= ratio * (1 + 1e-6)
    power = distances**gamma / (distances**gamma).sum()
    exact = (1 - mix) * power + mix / len(distances)
    if exact.max() * len(exact) > ratio:
        exact = (1 - mix) * limit_by_bisection(power, (ratio - mix) / (1 - mix)) + mix / len(distances)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-12)
    result = sampling_weights(distances, np.arange(len(distances)), config)
    assert result.max_over_mean_vector == pytest.approx(found.max() * len(found), rel=1e-5)
    assert (result.limited_rows > 0) == any("max_ratio" in warning for warning in result.warnings)
    if result.limited_rows == 0:
        np.testing.assert_array_equal(found, free)


def test_a_limit_brings_back_weights_that_a_large_gamma_made_zero() -> None:
    distances = np.array([1e-3, 0.5, 2.0])
    found = weights_of(distances, WeightingConfig(gamma=1024, max_ratio=1.5))
    np.testing.assert_allclose(found, [0, 0.5, 0.5], atol=1e-6)  # the next vector, however far below, gets the rest


@pytest.mark.parametrize("max_ratio", [0.9, -1.0, float("nan"), float("inf")])
def test_a_largest_ratio_below_the_mean_is_refused(max_ratio: float) -> None:
    with pytest.raises(ConfigError, match="max_ratio is a multiple of the mean weight"):
        WeightingConfig(max_ratio=max_ratio)


@settings(deadline=None, max_examples=40)
@given(DISTANCES, st.floats(0, 8), st.sampled_from([None, 2.5]), st.data())
def test_copies_that_are_kept_weigh_as_much_as_if_they_were_vectors_of_their_own(
    distances: Vector, gamma: float, max_ratio: float | None, data: st.DataObject
) -> None:
    copied = data.draw(st.integers(0, len(distances) - 1), label="copied")
    repeated = np.concatenate([distances, np.full(3, distances[copied])])
    groups = np.concatenate([np.arange(len(distances)), np.full(3, copied)])
    config = WeightingConfig(gamma=gamma, duplicates="keep", max_ratio=max_ratio)
    np.testing.assert_array_equal(weights_of(repeated, config, groups), weights_of(repeated, config))
    shared = WeightingConfig(gamma=gamma, duplicates="collapse", max_ratio=max_ratio)
    assert weights_of(repeated, config, groups)[groups == copied].sum() >= weights_of(repeated, shared, groups)[
        groups == copied
    ].sum() * (1 - 1e-6)


def test_an_effective_sample_size_is_that_of_the_finished_weights() -> None:
    distances = np.random.default_rng(0).lognormal(size=500)
    for settings_of in ({"uniform_mix": 0.2}, {"max_ratio": 3.0}, {"uniform_mix": 0.1, "max_ratio": 4.0}):
        config = WeightingConfig(target_ess=0.5, **settings_of)  # type: ignore[arg-type]
        found = sampling_weights(distances, np.arange(500), config)
        assert effective_sample_size(found.weights) / 500 == pytest.approx(0.5, rel=1e-4)
        assert found.max_over_mean_vector <= (config.max_ratio or np.inf) * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(DISTANCES, st.floats(0, 1024), st.floats(1, 20))
def test_a_limit_bounds_the_effective_sample_size_from_below(distances: Vector, gamma: float, ratio: float) -> None:
    found = weights_of(distances, WeightingConfig(gamma=gamma, max_ratio=ratio))
    assert effective_sample_size(found) / len(found) >= (1 - 1e-6) / ratio


def test_an_effective_sample_size_below_what_the_limit_allows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_ess 0.05 is out of reach: with max_ratio 10 it is at least 0.1"):
        WeightingConfig(target_ess=0.05)
    WeightingConfig(target_ess=0.05, max_ratio=20.0)
    WeightingConfig(target_ess=0.05, max_ratio=None)


def test_gamma_as_large_as_allowed_stays_finite() -> None:
    weights = weights_of(np.array([1e-3, 0.5, 2.0]), WeightingConfig(gamma=1024))
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 8, width=32)),
    st.data(),
)
def test_mean_distance_is_that_of_the_first_k(distances: NDArray[np.float32], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, distances.shape[1]), label="k")
    np.testing.assert_allclose(mean_distance(distances, k), distances[:, :k].astype(np.float64).sum(axis=1) / k, rtol=1e-12)
    for outside in (0, distances.shape[1] + 1):
        with pytest.raises(ConfigError, match="k must lie in"):
            mean_distance(distances, outside)


def test_a_row_with_fewer_than_k_neighbours_has_no_mean_distance() -> None:
    distances = np.array([[0.1, 0.2, np.inf], [0.1, np.inf, np.inf]])
    assert np.isinf(mean_distance(distances, 2)).tolist() == [False, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_weights_that_are_no_distribution_are_never_rounded_into_one(bad: float) -> None:
    with pytest.raises(CorruptStoreError, match="not finite and non-negative"):
        normalise_float32(np.array([0.5, bad]))


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0.01, 1)), st.data())
def test_total_variation_is_the_largest_difference_over_any_set_of_rows(first: Vector, data: st.DataObject) -> None:
    second = data.draw(hnp.arrays(np.float64, len(first), elements=st.floats(0.01, 1)), label="second")
    difference = first / first.sum() - second / second.sum()
    assert total_variation(first, second) == pytest.approx(difference[difference > 0].sum(), abs=1e-12)
    assert total_variation(first, 3 * first) == pytest.approx(0, abs=1e-12)
