"""From neighbour distances to sampling weights, in pure numpy.

The one rule of signs: *distance up, density down, weight up*. Density here is the unnormalised score 1 / r, with r the mean
distance to the k nearest distinct vectors; the textbook k / (n V_d r^d) (Loftsgaarden & Quesenberry 1965) under- or
overflows at these dimensions and ranks the same. A prompt's weight is its inverse density, r, raised to ``gamma``: the
inverse-propensity form of density sampling in Sachdeva et al. 2024 (arXiv:2402.09668), with a kNN estimate of density.

Shapes: N rows, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError

# float16 rows carry about 2e-4 of rounding noise each, so distances below this say nothing (docs/decisions/0005).
NOISE_FLOOR = 1e-3
# The floor of the original method, kept for --weighting legacy-inverse only.
LEGACY_FLOOR = 1e-6
# Above this effective sample size, as a share of the rows, sampling is close to uniform: people are told so.
MILD_ESS_SHARE = 0.9

FloatVector = NDArray[np.float64]
Statistic = Literal["uniform", "inverse-density", "legacy-inverse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsResult:
    """Weights with what was resolved on the way.

    ``weights`` is float32 [N], finite, >= 0, with a float64 sum within 1e-6 of 1. ``method`` differs from the requested one
    only when there were too few rows. ``gamma`` is the exponent used (solved when an ESS was asked for).
    """

    weights: NDArray[np.float32]
    method: Statistic
    gamma: float
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


def sampling_weights(mean_distance_N: FloatVector, groups_N: NDArray[np.integer], config: WeightingConfig) -> WeightsResult:
    """Sampling weights from mean neighbour distances; see the module docstring for the method.

    Parameters
    ----------
    mean_distance_N
        float64 [N]; +inf for rows without enough neighbours.
    groups_N
        The first row with the same vector (itself for most), -1 for rows without a vector. Each member of a group gets its
        vector's weight divided by the group's size; a row without a vector gets 0 and counts in nothing.
    config
        Method, ``k``, ``gamma`` or ``target_ess``, ``uniform_mix``.

    Returns
    -------
    WeightsResult

    Raises
    ------
    ConfigError
        No row has a vector.

    Notes
    -----
    Monotone: among rows with equal group size a larger distance never gets a smaller weight. Scale-free above the noise
    floor. With fewer than k + 1 distinct vectors there is no density to estimate: weights are uniform over vectors, and a
    warning says so.
    """
    valid_N = groups_N >= 0
    if not valid_N.any():
        raise ConfigError(
            "no row has a vector: every prompt failed in the model", hint="see the failed rows in journal.jsonl"
        )
    sizes = np.bincount(groups_N[valid_N], minlength=len(groups_N))
    share_N = np.where(valid_N, 1.0 / np.maximum(sizes[groups_N], 1), 0.0)
    usable = bool(np.isfinite(mean_distance_N[valid_N]).all())
    warnings: list[str] = []
    method: Statistic = config.weighting
    gamma = config.gamma
    if not usable:
        method = "uniform"
        if config.weighting != "uniform":
            warnings.append(f"fewer than k + 1 = {config.k + 1} distinct vectors: weights are uniform")
    if method == "uniform":
        weights_N = share_N.copy()
    elif method == "legacy-inverse":
        warnings.append(
            "legacy-inverse is the original formula 1 / mean distance, which favours crowded prompts; for comparison only"
        )
        weights_N = share_N / np.maximum(np.where(valid_N, mean_distance_N, 1.0), LEGACY_FLOOR)
    else:
        log_r_N = np.log(np.maximum(np.where(valid_N, mean_distance_N, 1.0), NOISE_FLOOR))
        log_r_N -= log_r_N[valid_N].max()  # largest becomes 1: powers cannot overflow
        if config.target_ess is not None:
            gamma, reached = _solve_gamma(log_r_N, share_N, config.target_ess)
            if not reached:
                warnings.append(f"target ESS/N {config.target_ess} is out of reach; used gamma {gamma:.4g}")
        weights_N = share_N * np.exp(gamma * log_r_N)
    weights_N /= weights_N.sum()
    if config.uniform_mix:
        weights_N = (1 - config.uniform_mix) * weights_N + config.uniform_mix * share_N / share_N.sum()
    return WeightsResult(weights=normalise_float32(weights_N), method=method, gamma=gamma, warnings=tuple(warnings))


def normalise_float32(weights_N: FloatVector) -> NDArray[np.float32]:
    """Round normalised weights to float32 so that their float64 sum stays within 1e-6 of 1.

    Raises
    ------
    CorruptStoreError
        A value is not finite or is negative, or the sum cannot be brought to 1: a fault upstream, never silently saved.
    """
    if not np.isfinite(weights_N).all() or (weights_N < 0).any():
        raise CorruptStoreError("weights are not finite and non-negative", hint="run embstore verify")
    rounded: NDArray[np.float32] = (weights_N / weights_N.sum()).astype(np.float32)
    total = float(rounded.sum(dtype=np.float64))
    if abs(total - 1) > 1e-6:
        raise CorruptStoreError(f"weights sum to {total!r}, not 1", hint="run embstore verify")
    return rounded


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


def _solve_gamma(log_r_N: FloatVector, share_N: FloatVector, target: float) -> tuple[float, bool]:
    """The gamma in [0, 1024] at which ESS/N of ``share * r ** gamma`` falls to ``target``; bisection, ESS falls in gamma."""

    def ess(gamma: float) -> float:
        return effective_sample_size(share_N * np.exp(gamma * log_r_N)) / np.count_nonzero(share_N)

    low, high = 0.0, 1024.0
    if ess(low) <= target:
        return low, ess(low) == target
    if ess(high) > target:
        return high, False
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(middle) > target else (low, middle)
    return high, True
