"""From neighbour distances to sampling weights, in pure numpy.

The rule of signs: *distance up, density down, weight up*. Density here is the unnormalised score 1 / r, where r is the mean
distance to the k nearest distinct vectors. The textbook estimate k / (n V_d r^d) (Loftsgaarden & Quesenberry 1965) ranks
rows in the same order, but under- or overflows at these dimensions. A prompt's weight is its inverse density, r, raised to
``gamma``: the inverse-propensity form of density sampling in Sachdeva et al. 2024 (arXiv:2402.09668), with a kNN estimate.

Rows with equal vectors divide their vector's weight (or each get all of it). A row's *share* is therefore 1 / copies (or
1), and its weight is share * v, where v is the weight of its vector. ``docs/density.md`` has the formulas.

Shapes: N rows, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError
from embstore.core.factors import NO_FACTORS, Factors
from embstore.core.weight_parts import PartEffect, WeightParts, mixed

# float16 rows carry about 2e-4 of rounding noise each, so distances below this are noise (docs/decisions/0005).
NOISE_FLOOR = 1e-3
# The floor of the original method, kept for --weighting legacy-inverse only.
LEGACY_FLOOR = 1e-6

FloatVector = NDArray[np.float64]
Statistic = Literal["uniform", "inverse-density", "legacy-inverse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsResult:
    """Weights, and the settings that were resolved while computing them.

    ``weights`` is float32 [N], finite, >= 0, with a float64 sum within 1e-6 of 1. ``method`` differs from the requested one
    only when there were too few rows. ``gamma`` is the exponent used (solved for if a target ESS was given).
    ``limited_rows`` counts rows whose weight ``max_ratio`` lowered; ``max_over_mean_vector`` is the largest v divided by the
    mean of v. ``effects`` says what each part of the weights does, if there are factors besides density.
    """

    weights: NDArray[np.float32]
    method: Statistic
    gamma: float
    limited_rows: int
    max_over_mean_vector: float
    effects: tuple[PartEffect, ...] = ()
    warnings: tuple[str, ...] = ()


def mean_distance(distances_NK: NDArray[np.floating], k: int) -> FloatVector:
    """Mean metric distance of each row to its ``k`` nearest distinct vectors, float64 [N].

    Parameters
    ----------
    distances_NK
        Metric (not squared) distances, ascending, self excluded; +inf where a neighbour is missing.
    k
        1 <= k <= K.

    Returns
    -------
    float64 [N]; +inf for a row with fewer than ``k`` neighbours.

    Raises
    ------
    ConfigError
        ``k`` is outside 1..K.

    Examples
    --------
    >>> mean_distance(np.array([[1.0, 3.0, 9.0]]), 2)
    array([2.])
    """
    if not 1 <= k <= distances_NK.shape[1]:
        raise ConfigError(
            f"k must lie in 1..{distances_NK.shape[1]} (the neighbours kept on disk), got {k}",
            hint="a larger k needs a new search: build with another --out",
        )
    mean_N: FloatVector = np.mean(distances_NK[:, :k], axis=1, dtype=np.float64)
    return mean_N


def sampling_weights(
    mean_distance_N: FloatVector,
    groups_N: NDArray[np.integer],
    config: WeightingConfig,
    *,
    noise_floor: float = NOISE_FLOOR,
    factors: Factors = NO_FACTORS,
) -> WeightsResult:
    """Sampling weights from mean neighbour distances; see the module docstring for the method.

    Parameters
    ----------
    mean_distance_N
        float64 [N]; +inf for rows without enough neighbours.
    groups_N
        The first row with the same vector (itself for most), -1 for rows without a vector. Each member of a group gets its
        vector's weight divided by the group's size (``duplicates`` "keep": undivided). A row without a vector gets 0 and
        is left out of all statistics.
    config
        Method, ``k``, ``gamma`` or ``target_ess``, ``uniform_mix``, ``max_ratio``, ``duplicates``.
    noise_floor
        Smaller distances are noise and are raised to this value.
    factors
        Scores and shares of groups.

    Returns
    -------
    WeightsResult

    Raises
    ------
    ConfigError
        No row has a vector, or none of them can be drawn; a group's share is wrong, or out of reach of ``max_ratio``; or
        legacy-inverse was given factors.

    Notes
    -----
    Monotone: among rows with equal group size and equal factors a larger distance never gets a smaller weight. Scale-free
    above the noise floor. With fewer than k + 1 distinct vectors there is no density to estimate: it is left out, and a
    warning says so. ``target_ess``, ``max_ratio`` and shares hold for the returned weights: each group is limited and mixed
    in itself, so that its share stays, and gamma is solved for with all of it applied. A mix is uniform over the rows of a
    group that can be drawn. ``legacy-inverse`` is never limited.
    """
    valid_N = groups_N >= 0
    if not valid_N.any():
        raise ConfigError(
            "no row has a vector: every prompt failed in the model", hint="journal.jsonl lists the failed rows with reasons"
        )
    sizes = np.bincount(groups_N[valid_N], minlength=len(groups_N))
    copies_N = np.maximum(sizes[groups_N], 1) if config.duplicates == "collapse" else np.ones(len(groups_N))
    share_N = np.where(valid_N, 1.0 / copies_N, 0.0)
    usable = bool(np.isfinite(mean_distance_N[valid_N]).all())
    warnings: list[str] = []
    method: Statistic = config.weighting
    if not usable:
        method = "uniform"
        if config.weighting != "uniform":
            warnings.append(f"there are fewer than k + 1 = {config.k + 1} distinct vectors: weights are uniform")
    if method == "legacy-inverse":
        if factors is not NO_FACTORS:
            raise ConfigError(
                "legacy-inverse takes no scores and no shares: it is for comparison with the original scripts only",
                hint="leave out --weighting, or the scores and shares",
            )
        warnings.append(
            "legacy-inverse is the original formula 1 / mean distance, which favours crowded prompts: for comparison only"
        )
        weights_N = share_N / np.maximum(np.where(valid_N, mean_distance_N, 1.0), LEGACY_FLOOR)
        weights_N = mixed(weights_N / weights_N.sum(), share_N, config.uniform_mix)
        return _result(weights_N, share_N, method, config.gamma, 0, (), warnings)
    if method == "uniform" and factors is NO_FACTORS:
        return _result(share_N / share_N.sum(), share_N, method, config.gamma, 0, (), warnings)
    distance_N = np.where(valid_N, mean_distance_N, 1.0) if method == "inverse-density" else np.ones(len(groups_N))
    parts = WeightParts(np.log(np.maximum(distance_N, noise_floor)), share_N, config, factors)
    gamma = config.gamma
    if method == "inverse-density" and config.target_ess is not None:
        gamma, reached = parts.solve_gamma(config.target_ess)
        if not reached:
            warnings.append(f"target ESS/N {config.target_ess} is out of reach of any gamma; used gamma {gamma:.4g}")
    weights_N, limited_rows = parts.weights(gamma)
    if limited_rows and config.target_ess is None:
        warnings.append(f"max_ratio {config.max_ratio:g} lowered the weights of {limited_rows} rows below r ** gamma")
    effects = parts.effects(gamma, weights_N) if factors is not NO_FACTORS else ()
    return _result(weights_N, share_N, method, gamma, limited_rows, effects, warnings)


def _result(
    weights_N: FloatVector,
    share_N: FloatVector,
    method: Statistic,
    gamma: float,
    limited_rows: int,
    effects: tuple[PartEffect, ...],
    warnings: list[str],
) -> WeightsResult:
    has_vector_N = share_N > 0
    vector_N = weights_N[has_vector_N] / share_N[has_vector_N]
    return WeightsResult(
        weights=normalise_float32(weights_N),
        method=method,
        gamma=gamma,
        limited_rows=limited_rows,
        max_over_mean_vector=float(vector_N.max() * share_N.sum() / weights_N.sum()),
        effects=effects,
        warnings=tuple(warnings),
    )


def normalise_float32(weights_N: FloatVector) -> NDArray[np.float32]:
    """Round normalised weights to float32 so that their float64 sum stays within 1e-6 of 1.

    Raises
    ------
    CorruptStoreError
        A value is negative or not finite, or the sum cannot be brought to 1. Such weights are a fault upstream.
    """
    if not np.isfinite(weights_N).all() or (weights_N < 0).any():
        raise CorruptStoreError("weights are not finite and non-negative", hint="run embstore verify")
    rounded: NDArray[np.float32] = (weights_N / weights_N.sum()).astype(np.float32)
    total = float(rounded.sum(dtype=np.float64))
    if abs(total - 1) > 1e-6:
        raise CorruptStoreError(f"weights sum to {total!r}, not 1", hint="run embstore verify")
    return rounded
