"""What multiplies the density part of a weight: a score of the user's own, and the shares of groups.

A weight is density part × score part × share part. The score part is a closed formula of one number per row
(``ScoreRule``), the share part brings each group, such as a source, to its share of the draws (``ShareRule``). Limits come
last (``core.density``).

Shapes: N rows, G groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.declared import documented, option
from embstore.core.decode import shown
from embstore.core.errors import ConfigError

FloatVector = NDArray[np.float64]

SCORE_RULES = "p*(1-p), band:LOW:HIGH, power:A or linear"
SHARE_RULES = 'NAME=SHARE,NAME=SHARE,*=SHARE, a JSON object {"NAME": SHARE}, equal or natural'
OTHERS = "*"  # in place of a name: all groups that are not named, as one


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRule:
    """How a score becomes a factor of the weight.

    ``p*(1-p)`` is the variance of a pass rate p in 0..1, largest at 0.5. ``band:LOW:HIGH`` keeps rows whose score is in the
    band, both ends included, and leaves out all others. ``power:A`` is score ** A; ``linear`` is the score itself. A row
    whose factor is 0 is never drawn: no mix brings it back.
    """

    kind: Literal["variance", "band", "power", "linear"]
    low: float = 0.0  # of the band; the exponent of a power is ``exponent``
    high: float = math.inf
    exponent: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ScoreRule:
        """The rule that ``--score`` spells.

        Raises
        ------
        ConfigError
            It spells none, or its numbers are out of range.

        Examples
        --------
        >>> ScoreRule.parse("band:0.1:0.9").factor(np.array([0.05, 0.1, 0.5, 0.95]))
        array([0., 1., 1., 0.])
        """
        kind, *rest = text.replace(" ", "").split(":")
        try:
            numbers = [float(each) for each in rest]
        except ValueError:
            numbers = [math.nan]
        if not all(math.isfinite(each) for each in numbers):
            raise ConfigError(f"score rule {shown(text)} has parts that are not numbers", hint=f"give {SCORE_RULES}")
        if kind in ("p*(1-p)", "(1-p)*p") and not numbers:
            return cls(kind="variance", high=1.0)
        if kind == "linear" and not numbers:
            return cls(kind="linear")
        if kind == "power" and len(numbers) == 1:
            return cls(kind="power", exponent=numbers[0])
        if kind == "band" and len(numbers) == 2:
            if numbers[0] > numbers[1]:
                raise ConfigError(f"score rule {shown(text)}: the band's low end {numbers[0]:g} is above its high end")
            return cls(kind="band", low=numbers[0], high=numbers[1])
        raise ConfigError(f"{shown(text)} is not a score rule", hint=f"give {SCORE_RULES}")

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest score that the rule takes."""
        return (-math.inf, math.inf) if self.kind == "band" else (0.0, self.high)

    def takes(self, scores: FloatVector) -> NDArray[np.bool_]:
        """Whether each score is finite and in range; a power with a negative exponent takes no 0."""
        low, high = self.range
        with np.errstate(invalid="ignore"):
            is_taken: NDArray[np.bool_] = np.isfinite(scores) & (scores >= low) & (scores <= high)
        return is_taken & (scores > 0) if self.kind == "power" and self.exponent < 0 else is_taken

    def factor(self, scores: FloatVector) -> FloatVector:
        """The factor of each score, float64, >= 0; scores must be ones that the rule takes."""
        if self.kind == "variance":
            return scores * (1 - scores)
        if self.kind == "band":
            return ((scores >= self.low) & (scores <= self.high)).astype(np.float64)
        factors: FloatVector = scores**self.exponent if self.kind == "power" else scores.astype(np.float64)
        return factors


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareRule:
    """Which share of the draws each group gets.

    ``shares`` by name, relative to each other, ``*`` for all others together; or the same for all (``equal``); or in
    proportion to its vectors that can be drawn (``natural``).
    """

    kind: Literal["given", "equal", "natural"]
    shares: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ShareRule:
        """The rule that ``--shares`` spells.

        Raises
        ------
        ConfigError
            It spells none, a share is not a positive number, or a name comes twice.

        Examples
        --------
        >>> ShareRule.parse("maths=3, code=1").shares
        (('maths', 3.0), ('code', 1.0))
        """
        if text in ("equal", "natural"):
            return cls(kind="equal" if text == "equal" else "natural")
        pairs = _json_pairs(text) if text.lstrip().startswith("{") else _plain_pairs(text)
        names = [name for name, _ in pairs]
        if not pairs or len(set(names)) < len(names):
            raise ConfigError(f"shares {shown(text)} name a group twice, or none", hint=f"give {SHARE_RULES}")
        shares: list[tuple[str, float]] = []
        for name, share in pairs:
            if not (isinstance(share, int | float) and math.isfinite(share) and share > 0):
                raise ConfigError(
                    f"the share of {shown(name)} must be a positive number, got {shown(share)}",
                    hint="a group is left out by --missing-group drop, or by a band of scores",
                )
            shares.append((name, float(share)))
        return cls(kind="given", shares=tuple(shares))

    def merged(self, group_N: NDArray[np.integer], names: Sequence[str]) -> tuple[NDArray[np.integer], tuple[str, ...]]:
        """The groups with those that ``*`` stands for as one: codes [N], and names [G]."""
        given = [name for name, _ in self.shares]
        if OTHERS not in given:
            return group_N, tuple(names)
        kept = [name for name in names if name in given and name != OTHERS]
        has_others = len(kept) < len(names)
        place_of = {name: place for place, name in enumerate(kept)}
        places = np.array([place_of.get(name, len(kept)) for name in names], dtype=np.int32)
        return np.where(group_N >= 0, places[group_N], -1), (*kept, OTHERS) if has_others else tuple(kept)

    def targets(self, names: Sequence[str], sizes_G: FloatVector) -> FloatVector:
        """Shares float64 [G] of sum 1, for groups with these names and numbers of drawable vectors.

        Raises
        ------
        ConfigError
            A group has no share, or a group with a share has no rows that can be drawn.
        """
        if self.kind == "equal":
            return np.full(len(names), 1 / len(names))
        if self.kind == "natural":
            return np.asarray(sizes_G / sizes_G.sum())
        given = dict(self.shares)
        if without := [name for name in names if name not in given]:
            raise ConfigError(
                f"{len(without)} of {len(names)} groups have no share: {_named(without)}",
                hint="give each a share, as in --shares 'NAME=1'; *=1 stands for all others together",
            )
        empty = [name for name in given if name not in names]
        if empty:
            raise ConfigError(
                f"{len(empty)} of {len(given)} shares are of groups without rows that can be drawn: {_named(empty)}",
                hint=f"there are the groups {_named(names)}",
            )
        shares_G = np.array([given[name] for name in names])
        return np.asarray(shares_G / shares_G.sum())


def _plain_pairs(text: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for part in text.split(","):
        name, _, share = part.rpartition("=")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if math.isnan(number) or not name.strip():
            raise ConfigError(f"{shown(part)} in the shares is not NAME=NUMBER", hint=f"give {SHARE_RULES}")
        found.append((name.strip(), number))
    return found


def _json_pairs(text: str) -> list[tuple[str, object]]:
    try:
        return list(json.loads(text, object_pairs_hook=list))
    except (ValueError, TypeError):
        raise ConfigError(f"shares {shown(text)} are not a JSON object", hint=f"give {SHARE_RULES}") from None


def _named(names: Sequence[str], count: int = 5) -> str:
    listed = ", ".join(shown(name) for name in names[:count])
    return listed + (f" and {len(names) - count} more" if len(names) > count else "")


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class FactorConfig:
    """What multiplies density in a weighting: a score, and the shares of groups.

    Raises
    ------
    ConfigError
        A rule is not one, or options do not belong together.
    """

    scores: str | None = option(
        None, "File with one number a line, and the prompt or its id: JSONL, CSV, Parquet. - for stdin.", "weights"
    )
    score: str = option(
        "linear", f"How a score becomes a factor of the weight: {SCORE_RULES}. A factor of 0 is never drawn.", "weights"
    )
    score_field: str | None = option(None, "Field of the input lines with the score, instead of a file.", "weights")
    score_column: str | None = option(None, "Field of the scores file with the number. Default: score, or its only number.")
    missing_score: str = option(
        "error", "Prompts without a score: error, drop (never drawn), mean (the mean factor of the others), or a score."
    )
    by: str | None = option(None, "Field of the input lines whose values are groups, such as the source.", "weights")
    shares: str | None = option(
        None,
        "Share of the draws of each group of --by: NAME=3,*=7 (* for all others) or JSON, equal, or natural.",
        "weights",
    )
    missing_group: str | None = option(None, "Group of prompts without the field of --by; drop leaves them out.")

    def __post_init__(self) -> None:
        if self.scores is not None and self.score_field is not None:
            raise ConfigError(
                f"scores come from a file ({self.scores}) or from a field ({self.score_field}), not from both",
                hint="leave out --scores or --score-field",
            )
        has_scores = self.scores is not None or self.score_field is not None
        if not has_scores and (self.score, self.missing_score) != ("linear", "error"):
            raise ConfigError(
                f"there is a rule for scores ({self.score}, missing: {self.missing_score}), but there are no scores",
                hint="give --scores FILE or --score-field NAME",
            )
        if self.score_column is not None and self.scores is None:
            raise ConfigError(
                f"--score-column {self.score_column} names a field of a file, but --scores is missing",
                hint="a field of the input lines is named by --score-field",
            )
        if (self.by is None) != (self.shares is None):
            raise ConfigError(
                f"shares are those of a field's values: got --by {self.by} and --shares {self.shares}",
                hint="give both --by FIELD and --shares, or neither",
            )
        if self.missing_group is not None and self.by is None:
            raise ConfigError(
                f"--missing-group {self.missing_group} is for prompts without the field of --by, and --by is missing",
                hint="give --by FIELD as well",
            )
        if self.missing_score not in ("error", "drop", "mean"):
            _ = self.missing_factor
        _ = self.score_rule, self.share_rule  # refuses what is not a rule

    @property
    def score_rule(self) -> ScoreRule:
        """The rule of ``score``."""
        return ScoreRule.parse(self.score)

    @property
    def share_rule(self) -> ShareRule | None:
        """The rule of ``shares``."""
        return None if self.shares is None else ShareRule.parse(self.shares)

    @property
    def missing_factor(self) -> float:
        """The factor of a missing score that is given as a number."""
        try:
            score = np.array([float(self.missing_score)])
        except ValueError:
            score = np.array([np.nan])
        if not self.score_rule.takes(score)[0]:
            raise ConfigError(
                f"--missing-score must be error, drop, mean or a score that {self.score} takes, got {self.missing_score}"
            )
        return float(self.score_rule.factor(score)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """What ``embstore weights`` takes."""

    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    factors: FactorConfig = field(default_factory=FactorConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The factors of one weighting.

    ``score_N`` float64 [N], >= 0: rows of factor 0 are never drawn. ``group_N`` int [N] is the position of each row's group
    in ``names``, -1 for rows that are left out; ``rule`` gives the groups their shares. ``described`` is what the metadata
    say of where they come from.
    """

    score_N: FloatVector | None = None
    group_N: NDArray[np.integer] | None = None
    names: tuple[str, ...] = ()
    rule: ShareRule | None = None
    described: Mapping[str, object] | None = None


NO_FACTORS = Factors()
