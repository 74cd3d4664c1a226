"""The parts of weights put together: density, score and shares, then limits, so that all of them hold at once.

Each group is solved alone. Let q be its share of the draws, and S_g its part of all S vectors that can be drawn. Its weights
are proportional to ``share * r ** gamma * score``, limited to ``max_ratio * S_g / (S q)`` times their mean, mixed with
uniform weights over its drawable rows, and scaled to q. The share then holds exactly, the limit in units of the mean weight
of all vectors, and the mix within each group. Without groups, everything is one group of share 1.

Shapes: N rows, D rows that can be drawn, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.decode import shown
from embstore.core.diagnostics import effective_sample_size, total_variation
from embstore.core.errors import ConfigError
from embstore.core.factors import NO_FACTORS, Factors

FloatVector = NDArray[np.float64]

_LARGEST_GAMMA = 1024.0
_CLOSE = 1e-12  # of the target, or of gamma
_LOG_SMALLEST = -600.0  # exp of this is a normal float64, with room for sums


@dataclass(frozen=True, kw_only=True, slots=True)
class PartEffect:
    """What one part of the weights does: density, score, shares, or limits (``max_ratio`` and ``uniform_mix``).

    ``ess`` is the effective sample size, in rows, of this part and those before it. ``tv_without`` is the total variation
    between the weights and those without this part; None if the others need it, as a share may.
    """

    part: str
    ess: float
    tv_without: float | None


class WeightParts:
    """Weights as a function of gamma.

    Parameters
    ----------
    log_r_N
        Logarithm of each row's distance, float64 [N]; any finite value for rows without a share.
    share_N
        float64 [N]: what each row gets of its vector's weight; 0 for rows without a vector.
    config
        ``max_ratio`` and ``uniform_mix`` are used.
    factors
        Scores and groups.

    Raises
    ------
    ConfigError
        No row can be drawn, or a group cannot have its share.
    """

    def __init__(self, log_r_N: FloatVector, share_N: FloatVector, config: WeightingConfig, factors: Factors) -> None:
        self._given = log_r_N, share_N, config, factors
        is_drawn_N = share_N > 0
        if factors.score_N is not None:
            is_drawn_N &= factors.score_N > 0
        if factors.group_N is not None:
            is_drawn_N &= factors.group_N >= 0
        self._rows_D = np.flatnonzero(is_drawn_N)
        if not len(self._rows_D):
            raise ConfigError(
                f"none of {np.count_nonzero(share_N > 0)} rows can be drawn: each has a factor of 0, or no group",
                hint="check the scores and the rule, --score",
            )
        self._num_rows = len(share_N)
        self._num_with_vector = np.count_nonzero(share_N > 0)
        self._log_r_D = log_r_N[self._rows_D]
        self._log_r_D -= self._log_r_D.max()  # the largest distance becomes 1: powers cannot overflow
        self._share_D = share_N[self._rows_D]
        self._log_score_D = None if factors.score_N is None else np.log(factors.score_N[self._rows_D])
        self._mix = config.uniform_mix
        self._members: Sequence[slice | NDArray[np.int64]] = [slice(None)]
        self._targets_G = np.ones(1)
        if factors.group_N is not None and factors.rule is not None:
            group_D = factors.group_N[self._rows_D]
            order_D = np.argsort(group_D, kind="stable")
            present, starts = np.unique(group_D[order_D], return_index=True)
            self._members = np.split(order_D, starts[1:])
            names = [factors.names[code] for code in present]
            self._targets_G = factors.rule.targets(names, self._sizes())
            self._ratios_G = self._ratios(config.max_ratio, names)
        else:
            self._ratios_G = self._ratios(config.max_ratio, [""])

    def weights(self, gamma: float) -> tuple[FloatVector, int]:
        """Weights float64 [N] of sum 1, and the number of rows that ``max_ratio`` lowered."""
        weights_D, limited_rows = self._drawn(gamma)
        weights_N = np.zeros(self._num_rows)
        weights_N[self._rows_D] = weights_D
        return weights_N, limited_rows

    def solve_gamma(self, target: float) -> tuple[float, bool]:
        """The gamma in [0, 1024] at which the effective sample size falls to ``target``, a share of the rows with a vector.

        Returns it, and whether the target is reached. Without factors the size falls with every gamma; a score may make it
        rise first, and gamma is then one of several solutions. By the Illinois method (Dowell & Jarratt 1971, BIT 11:168).
        """
        by_distance = self._sorted()

        def excess(gamma: float) -> float:
            ess = effective_sample_size(by_distance._drawn(gamma)[0])
            return math.log(ess / (target * self._num_with_vector))

        low, high = 0.0, 1.0
        above = excess(low)
        if above <= 0:
            return low, above > -1e-9
        while (below := excess(high)) > 0:
            if high >= _LARGEST_GAMMA:
                return high, False
            low, above, high = high, below, 2 * high
        nearest, moved_high = (high, below), False
        while abs(nearest[1]) > _CLOSE and high - low > _CLOSE * high:
            gamma = (low * below - high * above) / (below - above)
            found = excess(gamma)
            if abs(found) < abs(nearest[1]):
                nearest = gamma, found
            if found > 0:
                low, above, below, moved_high = gamma, found, below if moved_high else below / 2, False
            else:
                high, below, above, moved_high = gamma, found, above / 2 if moved_high else above, True
        return nearest[0], True

    def effects(self, gamma: float, weights_N: FloatVector) -> tuple[PartEffect, ...]:
        """What each part does to the finished weights, in the order in which they are put together."""
        config, factors = self._given[2], self._given[3]
        no_limits = dataclasses.replace(config, max_ratio=None, uniform_mix=0.0)
        no_score = dataclasses.replace(factors, score_N=None)
        no_groups = dataclasses.replace(factors, group_N=None)
        parts = [("density", self._tv(weights_N, 0.0, config, factors), no_limits, NO_FACTORS)]
        if factors.score_N is not None:
            parts.append(("score", self._tv(weights_N, gamma, config, no_score), no_limits, no_groups))
        if factors.group_N is not None:
            parts.append(("shares", self._tv(weights_N, gamma, config, no_groups), no_limits, factors))
        parts.append(("limits", self._tv(weights_N, gamma, no_limits, factors), config, factors))
        return tuple(
            PartEffect(
                part=part,
                ess=effective_sample_size(WeightParts(*self._given[:2], limits, used).weights(gamma)[0]),
                tv_without=without,
            )
            for part, without, limits, used in parts
        )

    def _tv(self, weights_N: FloatVector, gamma: float, config: WeightingConfig, factors: Factors) -> float | None:
        try:
            others_N, _ = WeightParts(*self._given[:2], config, factors).weights(gamma)
        except ConfigError:  # such as a share that is in reach only with the part
            return None
        return total_variation(weights_N, others_N)

    def _drawn(self, gamma: float) -> tuple[FloatVector, int]:
        """Weights float64 [D] of sum 1, and the number of rows that were lowered."""
        log_v_D = gamma * self._log_r_D
        if self._log_score_D is not None:
            log_v_D += self._log_score_D
        weights_D = np.empty(len(log_v_D))
        limited_rows = 0
        for mine, target, ratio in zip(self._members, self._targets_G, self._ratios_G, strict=True):
            found, lowered = _group_weights(log_v_D[mine], self._share_D[mine], ratio, self._mix)
            weights_D[mine] = found * target
            limited_rows += lowered
        return weights_D, limited_rows

    def _sorted(self) -> Self:
        """The same rows by falling distance: ``_limited`` sorts on every call, and sorted input is cheap to sort."""
        order_D = np.argsort(-self._log_r_D, kind="stable")
        found = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        found._log_r_D, found._share_D = self._log_r_D[order_D], self._share_D[order_D]
        found._rows_D = self._rows_D[order_D]
        found._log_score_D = None if self._log_score_D is None else self._log_score_D[order_D]
        if len(self._members) > 1:
            group_D = np.empty(len(order_D), dtype=np.int64)
            for number, mine in enumerate(self._members):
                group_D[mine] = number
            group_D = group_D[order_D]
            starts = np.searchsorted(np.sort(group_D), np.arange(1, len(self._members)))
            found._members = np.split(np.argsort(group_D, kind="stable"), starts)
        return found

    def _sizes(self) -> FloatVector:
        """Drawable vectors of each group, float64 [G]."""
        return np.array([self._share_D[mine].sum() for mine in self._members])

    def _ratios(self, max_ratio: float | None, names: Sequence[str]) -> list[float | None]:
        """The limit of each group, in units of the mean of its vectors."""
        if max_ratio is None:
            return [None] * len(names)
        sizes_G = self._sizes()
        most_G = sizes_G / self._share_D.sum() * max_ratio
        for name, size, most, target in zip(names, sizes_G, most_G, self._targets_G, strict=True):
            if most < target * (1 - 1e-9):
                raise ConfigError(
                    f"the group {shown(name)} cannot have {target:.2%} of the draws: with max_ratio {max_ratio:g}, its "
                    f"{size:,.0f} of {self._share_D.sum():,.0f} vectors that can be drawn have at most {most:.2%}",
                    hint=f"raise max_ratio to {target / most * max_ratio:.3g} or more, or lower the share",
                )
        return [max(1.0, float(ratio)) for ratio in most_G / self._targets_G]


def mixed(weights_D: FloatVector, share_D: FloatVector, mix: float) -> FloatVector:
    """Weights with a part of uniform ones."""
    return (1 - mix) * weights_D + mix * share_D / share_D.sum() if mix else weights_D


def _group_weights(
    log_v_D: FloatVector, share_D: FloatVector, max_ratio: float | None, mix: float
) -> tuple[FloatVector, int]:
    """Normalised ``share * v``, limited, then mixed, and the number of limited rows. All shares are positive."""
    log_v_D = log_v_D - log_v_D.max()
    weights_D = share_D * np.exp(log_v_D)
    weights_D /= weights_D.sum()
    limited_rows = 0
    if max_ratio is not None and mix < 1:
        before_mix = (max_ratio - mix) / (1 - mix)  # (1 - mix) * before_mix + mix is max_ratio
        if (weights_D / share_D).max() * share_D.sum() > before_mix * (1 + 1e-12):
            weights_D, limited_rows = _limited(log_v_D, share_D, before_mix)
    return mixed(weights_D, share_D, mix), limited_rows


def _limited(log_v_D: FloatVector, share_N: FloatVector, max_ratio: float) -> tuple[FloatVector, int]:
    """Normalised min(v, c), where c is ``max_ratio`` times the mean of min(v, c), and the number of rows above c.

    Let the m largest v be lowered to c, let C of all shares S be theirs, and let W be the weight of the other rows. Then
    c S = max_ratio (c C + W). The right m is the first whose c is not below the next v. The computation is in logarithms,
    because under a large gamma all but the largest v underflow to 0.
    """
    order_N = np.argsort(-log_v_D, kind="stable")
    sorted_N, shares_N = log_v_D[order_N], share_N[order_N]
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
    weights_N = share_N * np.exp(np.minimum(log_v_D - log_cap, 0.0))
    return weights_N / weights_N.sum(), int(np.count_nonzero(log_v_D > log_cap))
