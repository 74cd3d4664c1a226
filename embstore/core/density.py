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

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError

# float16 rows carry about 2e-4 of rounding noise each, so distances below this are noise (docs/decisions/0005).
NOISE_FLOOR = 1e-3
# The floor of the original method, kept for --weighting legacy-inverse only.
LEGACY_FLOOR = 1e-6
_LOG_SMALLEST = -600.0  # exp of this is a normal float64, with room for sums

FloatVector = NDArray[np.float64]
Statistic = Literal["uniform", "inverse-density", "legacy-inverse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsResult:
    """Weights, and the settings that were resolved while computing them.

    ``weights`` is float32 [N], finite, >= 0, with a float64 sum within 1e-6 of 1. ``method`` differs from the requested one
    only when there were too few rows. ``gamma`` is the exponent used (solved for if a target ESS was given).
    ``limited_rows`` counts rows whose weight ``max_ratio`` lowered; ``max_over_mean_vector`` is the largest v divided by the
    mean of v.
    """

    weights: NDArray[np.float32]
    method: Statistic
    gamma: float
    limited_rows: int
    max_over_mean_vector: float
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
    warning says so. ``target_ess`` and ``max_ratio`` hold for the returned weights: gamma is solved for with limit and mix
    applied, and the limit is set so that ``max_ratio`` holds after mixing. ``legacy-inverse`` is never limited.
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
    gamma = config.gamma
    if not usable:
        method = "uniform"
        if config.weighting != "uniform":
            warnings.append(f"there are fewer than k + 1 = {config.k + 1} distinct vectors: weights are uniform")
    limited_rows = 0
    if method == "uniform":
        weights_N = share_N / share_N.sum()
    elif method == "legacy-inverse":
        warnings.append(
            "legacy-inverse is the original formula 1 / mean distance, which favours crowded prompts: for comparison only"
        )
        weights_N = share_N / np.maximum(np.where(valid_N, mean_distance_N, 1.0), LEGACY_FLOOR)
        weights_N = _mixed(weights_N / weights_N.sum(), share_N, config.uniform_mix)
    else:
        log_r_N = np.log(np.maximum(np.where(valid_N, mean_distance_N, 1.0), noise_floor))
        log_r_N -= log_r_N[valid_N].max()  # largest becomes 1: powers cannot overflow
        if config.target_ess is not None:
            gamma, reached = _solve_gamma(log_r_N[valid_N], share_N[valid_N], config, config.target_ess)
            if not reached:
                warnings.append(f"target ESS/N {config.target_ess} is out of reach of any gamma; used gamma {gamma:.4g}")
        weights_N = np.zeros(len(share_N))
        weights_N[valid_N], limited_rows = _power_weights(log_r_N[valid_N], share_N[valid_N], gamma, config)
    if limited_rows and config.target_ess is None:
        warnings.append(f"max_ratio {config.max_ratio:g} lowered the weights of {limited_rows} rows below r ** gamma")
    return WeightsResult(
        weights=normalise_float32(weights_N),
        method=method,
        gamma=gamma,
        limited_rows=limited_rows,
        max_over_mean_vector=float((weights_N[valid_N] / share_N[valid_N]).max() * share_N.sum() / weights_N.sum()),
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


def _power_weights(
    log_r_N: FloatVector, share_N: FloatVector, gamma: float, config: WeightingConfig
) -> tuple[FloatVector, int]:
    """Normalised ``share * r ** gamma``, limited, then mixed, and the number of limited rows. All shares are positive."""
    weights_N = share_N * np.exp(gamma * log_r_N)
    weights_N /= weights_N.sum()
    limited_rows, mix = 0, config.uniform_mix
    if config.max_ratio is not None and mix < 1:
        before_mix = (config.max_ratio - mix) / (1 - mix)  # (1 - mix) * before_mix + mix is max_ratio
        if (weights_N / share_N).max() * share_N.sum() > before_mix * (1 + 1e-12):
            weights_N, limited_rows = _limited(gamma * log_r_N, share_N, before_mix)
    return _mixed(weights_N, share_N, mix), limited_rows


def _mixed(weights_N: FloatVector, share_N: FloatVector, mix: float) -> FloatVector:
    return (1 - mix) * weights_N + mix * share_N / share_N.sum() if mix else weights_N


def _limited(log_v_N: FloatVector, share_N: FloatVector, max_ratio: float) -> tuple[FloatVector, int]:
    """Normalised min(v, c), where c is ``max_ratio`` times the mean of min(v, c), and the number of rows above c.

    Let the m largest v be lowered to c, let C of all shares S be theirs, and let W be the weight of the other rows. Then
    c S = max_ratio (c C + W). The right m is the first whose c is not below the next v. The computation is in logarithms,
    because under a large gamma all but the largest v underflow to 0.
    """
    order_N = np.argsort(-log_v_N, kind="stable")
    sorted_N, shares_N = log_v_N[order_N], share_N[order_N]
    if sorted_N[-1] > _LOG_SMALLEST:
        log_rest_N = np.log(np.cumsum((shares_N * np.exp(sorted_N))[::-1])[::-1])  # row m and all after it
    else:
        log_rest_N = np.logaddexp.accumulate((sorted_N + np.log(shares_N))[::-1])[::-1]  # equal, but ten times slower
    free_N = shares_N.sum() - max_ratio * np.concatenate([[0.0], np.cumsum(shares_N)[:-1]])
    with np.errstate(invalid="ignore", divide="ignore"):
        log_cap_N = np.where(free_N > 0, np.log(max_ratio) + log_rest_N - np.log(free_N), np.inf)
    m = int(np.argmax(log_cap_N >= sorted_N))
    # if no cap qualifies (max_ratio 1), all weights are lowered to the smallest
    log_cap = log_cap_N[m] if np.isfinite(log_cap_N[m]) and log_cap_N[m] >= sorted_N[m] else sorted_N[-1]
    weights_N = share_N * np.exp(np.minimum(log_v_N - log_cap, 0.0))
    return weights_N / weights_N.sum(), int(np.count_nonzero(log_v_N > log_cap))


def _solve_gamma(log_r_N: FloatVector, share_N: FloatVector, config: WeightingConfig, target: float) -> tuple[float, bool]:
    """The gamma in [0, 1024] at which ESS/N of the finished weights falls to ``target``, by bisection."""
    order_N = np.argsort(-log_r_N, kind="stable")  # once: _limited sorts on every call, and sorted input is cheap to sort
    log_r_N, share_N = log_r_N[order_N], share_N[order_N]

    def ess(gamma: float) -> float:
        return effective_sample_size(_power_weights(log_r_N, share_N, gamma, config)[0]) / len(share_N)

    low, high = 0.0, 1024.0
    if ess(low) <= target:
        return low, math.isclose(ess(low), target, rel_tol=1e-9)
    if ess(high) > target:
        return high, False
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(middle) > target else (low, middle)
    return high, True
