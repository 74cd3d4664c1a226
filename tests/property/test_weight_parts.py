"""Scores, shares, limits and mixes hold together: compared with closed forms, with a solver, and under any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from embstore.core.config import WeightingConfig
from embstore.core.density import WeightsResult, sampling_weights
from embstore.core.diagnostics import effective_sample_size, total_variation
from embstore.core.errors import ConfigError
from embstore.core.factors import FactorConfig, Factors, ScoreRule, ShareRule

Vector = NDArray[np.float64]


def factors_of(scores: Any = None, codes: Any = None, shares: str = "equal", rule: str = "linear") -> Factors:
    names = () if codes is None else tuple(f"group {code}" for code in range(max(codes) + 1))
    return Factors(
        score_N=None if scores is None else ScoreRule.parse(rule).factor(np.asarray(scores, dtype=float)),
        group_N=None if codes is None else np.asarray(codes),
        names=names,
        rule=None if codes is None else ShareRule.parse(shares),
        described={},
    )


def run(distances: Any, factors: Factors, groups: Any = None, **config: Any) -> WeightsResult:
    distances = np.asarray(distances, dtype=float)
    groups = np.arange(len(distances)) if groups is None else np.asarray(groups)
    return sampling_weights(distances, groups, WeightingConfig(**config), factors=factors)


def test_one_score_and_two_groups_by_hand() -> None:
    """r = 1, 2 | 4, 4, 8; scores 1, 1 | 2, 1, 1; shares 1:3. Within the groups 1:2 and 8:4:8."""
    found = run(
        [1, 2, 4, 4, 8], factors_of([1, 1, 2, 1, 1], [0, 0, 1, 1, 1], '{"group 0": 1, "group 1": 3}'), max_ratio=None
    )
    expected = [0.25 / 3, 0.5 / 3, 0.75 * 0.4, 0.75 * 0.2, 0.75 * 0.4]
    np.testing.assert_allclose(found.weights, expected, rtol=1e-6)


def test_a_limit_holds_within_a_share_by_hand() -> None:
    """Two groups of two vectors, half of the draws each, at most 1.5 x the mean 0.25: 0.375 in place of 0.45."""
    found = run([1, 9, 1, 1], factors_of(codes=[0, 0, 1, 1]), max_ratio=1.5)
    np.testing.assert_allclose(found.weights, [0.125, 0.375, 0.25, 0.25], rtol=1e-6)
    assert found.limited_rows == 1
    assert found.max_over_mean_vector == pytest.approx(1.5, rel=1e-9)


def test_a_mix_is_uniform_within_a_group_and_over_what_can_be_drawn() -> None:
    found = run([1, 1, 1, 1, 1], factors_of([0.0, 1, 3, 1, 1], [0, 0, 0, 1, 1], "natural"), uniform_mix=0.5, max_ratio=None)
    # two of four drawable vectors a group: 0.5 each; within the first 1:3, half mixed with 1:1
    np.testing.assert_allclose(found.weights, [0, 0.5 * 0.375, 0.5 * 0.625, 0.25, 0.25], rtol=1e-6)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Vector, Factors, NDArray[np.int64]]:
    rows = draw(st.integers(4, 40))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    distances = random.uniform(0.01, 2, rows)
    groups = np.where(random.random(rows) < 0.2, 0, np.arange(rows))  # some rows share the vector of row 0
    groups[0] = 0
    distances[groups == 0] = distances[0]
    codes = random.integers(0, draw(st.integers(1, 4)), rows)
    codes = np.unique(codes, return_inverse=True)[1]
    scores = np.where(random.random(rows) < 0.2, 0.0, random.uniform(0.1, 1, rows))
    scores[[np.flatnonzero(codes == code)[0] for code in range(codes.max() + 1)]] = 0.5  # each group can be drawn
    kind = draw(st.sampled_from(["scores", "groups", "both"]))
    shares = ",".join(f"group {code}={random.uniform(1, 2)}" for code in range(codes.max() + 1))
    factors = factors_of(
        None if kind == "groups" else scores,
        None if kind == "scores" else codes.tolist(),
        draw(st.sampled_from([shares, "equal", "natural"])),
    )
    return distances, factors, groups


@settings(deadline=None, max_examples=150)
@given(pools(), st.sampled_from([None, 30.0]), st.sampled_from([0.0, 0.3]), st.sampled_from([None, 0.3]))
def test_shares_limit_and_mix_hold_at_once(
    pool: tuple[Vector, Factors, NDArray[np.int64]], max_ratio: float | None, mix: float, target: float | None
) -> None:
    distances, factors, groups = pool
    found = run(distances, factors, groups, max_ratio=max_ratio, uniform_mix=mix, target_ess=target)
    weights = found.weights.astype(np.float64)
    copies = np.bincount(groups, minlength=len(groups))[groups]
    drawable = np.ones(len(weights), bool) if factors.score_N is None else factors.score_N > 0
    assert (weights[~drawable] == 0).all()
    if factors.group_N is not None and factors.rule is not None:
        mine = np.bincount(factors.group_N, weights=weights)
        sizes = np.bincount(factors.group_N, weights=drawable / copies)
        given_shares = dict(factors.rule.shares)
        wanted = {
            "natural": sizes,
            "equal": np.ones(len(mine)),
            "given": np.array([given_shares.get(name, 0.0) for name in factors.names]),
        }[factors.rule.kind]
        np.testing.assert_allclose(mine, wanted / wanted.sum(), atol=1e-6)
        if mix:  # the floor: this part of a group's share is spread evenly over its vectors
            floor = mix * (wanted / wanted.sum() / sizes)[factors.group_N] / copies
            assert (weights[drawable] >= floor[drawable] * (1 - 1e-5)).all()
    if max_ratio is not None:
        mean = 1 / (drawable / copies).sum()
        assert (weights * copies <= max_ratio * mean * (1 + 1e-5)).all()
    reached = effective_sample_size(weights) / len(weights)
    if target is not None and not any("out of reach" in each for each in found.warnings):
        assert reached == pytest.approx(target, rel=1e-4)


@settings(deadline=None, max_examples=80)
@given(pools(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_of_groups_changes_nothing(
    pool: tuple[Vector, Factors, NDArray[np.int64]], random: Any
) -> None:
    distances, factors, groups = pool
    weights = run(distances, factors, groups, max_ratio=40.0, uniform_mix=0.1).weights
    order = list(range(len(distances)))
    random.shuffle(order)
    new_row = np.argsort(order)
    renamed = list(range(len(factors.names)))
    random.shuffle(renamed)
    shares = list(factors.rule.shares) if factors.rule is not None else []
    random.shuffle(shares)
    moved = Factors(
        score_N=None if factors.score_N is None else factors.score_N[order],
        group_N=None if factors.group_N is None else np.array(renamed)[factors.group_N][order],
        names=tuple(factors.names[place] for place in np.argsort(renamed)) if renamed else (),
        rule=None if factors.rule is None else ShareRule(kind=factors.rule.kind, shares=tuple(shares)),
        described={},
    )
    again = run(distances[order], moved, new_row[groups][order], max_ratio=40.0, uniform_mix=0.1).weights
    np.testing.assert_allclose(again, weights[order], rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 32), st.floats(1.2, 5))
def test_the_limit_is_the_one_that_a_root_finder_finds(seed: int, max_ratio: float) -> None:
    """Within a group: min(v, c) with c such that the largest is max_ratio times the mean of all drawable vectors."""
    random = np.random.default_rng(seed)
    distances, scores = random.lognormal(0, 1, 30) + 0.01, random.uniform(0.1, 1, 30)
    codes = np.arange(30) % 2
    found = run(distances, factors_of(scores, codes.tolist()), max_ratio=max_ratio).weights
    for code in (0, 1):
        v = (distances * scores)[codes == code]
        allowed = max_ratio / 30

        def too_large(cap: float, v: Vector = v, allowed: float = allowed) -> float:
            limited = np.minimum(v, cap)
            return float(0.5 * limited.max() / limited.sum()) - allowed

        expected = 0.5 * v / v.sum()
        if too_large(v.max()) > 0:
            cap = brentq(too_large, v.min(), v.max(), xtol=1e-14)
            limited = np.minimum(v, cap)
            expected = 0.5 * limited / limited.sum()
        np.testing.assert_allclose(found[codes == code], expected, rtol=1e-5)


def test_effects_are_distances_to_weights_without_the_part() -> None:
    distances, scores, codes = [1, 2, 4, 4, 8, 3], [1, 1, 2, 1, 1, 0], [0, 0, 1, 1, 1, 0]
    settings = {"gamma": 2.0, "max_ratio": 2.5}
    found = run(distances, factors_of(scores, codes), **settings)
    effects = {effect.part: effect for effect in found.effects}
    assert list(effects) == ["density", "score", "shares", "limits"]
    without = {
        "density": run(distances, factors_of(scores, codes), gamma=0.0, max_ratio=2.5),
        "score": run(distances, factors_of(None, codes), **settings),
        "shares": run(distances, factors_of(scores), **settings),
        "limits": run(distances, factors_of(scores, codes), gamma=2.0, max_ratio=None),
    }
    for part, other in without.items():
        assert effects[part].tv_without == pytest.approx(total_variation(found.weights, other.weights), abs=1e-6)
    density = np.array(distances, dtype=float) ** 2
    assert effects["density"].ess == pytest.approx(effective_sample_size(density))
    assert effects["score"].ess == pytest.approx(effective_sample_size(density * scores))
    assert effects["limits"].ess == pytest.approx(effective_sample_size(found.weights), rel=1e-5)


def test_a_share_that_the_limit_cannot_reach_names_the_group_and_both_numbers() -> None:
    codes = [0] * 9 + [1]
    with pytest.raises(
        ConfigError, match=r"'group 1' cannot have 50.00% .* max_ratio 2, its 1 of 10 .* at most 20.00%"
    ) as caught:
        run(np.ones(10), factors_of(codes=codes), max_ratio=2.0)
    assert "raise max_ratio to 5 or more" in str(caught.value.hint)
    run(np.ones(10), factors_of(codes=codes), max_ratio=5.0)


def test_shares_and_groups_must_match() -> None:
    with pytest.raises(ConfigError, match="1 of 2 groups have no share: 'group 1'"):
        run(np.ones(4), factors_of(codes=[0, 0, 1, 1], shares="group 0=1"))
    with pytest.raises(ConfigError, match="1 of 3 shares are of groups without rows that can be drawn: 'other'"):
        run(np.ones(4), factors_of(codes=[0, 0, 1, 1], shares="group 0=1,group 1=1,other=2"))
    with pytest.raises(ConfigError, match="groups without rows that can be drawn: 'group 1'"):
        run(np.ones(4), factors_of([1, 1, 0, 0], [0, 0, 1, 1], shares="group 0=1,group 1=1"))
    with pytest.raises(ConfigError, match="none of 3 rows can be drawn"):
        run(np.ones(3), factors_of([0, 0, 0]))


def test_the_comparison_formula_takes_no_factors() -> None:
    with pytest.raises(ConfigError, match="legacy-inverse takes no scores and no shares"):
        run(np.ones(3), factors_of([1, 1, 2]), weighting="legacy-inverse")


def test_uniform_weights_with_scores_are_the_scores() -> None:
    found = run([5, 6, 7], factors_of([1, 2, 1]), weighting="uniform", max_ratio=None)
    np.testing.assert_allclose(found.weights, [0.25, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "scores", "factors", "refused"),
    [
        ("p*(1-p)", [0, 0.5, 0.9, 1], [0, 0.25, 0.09, 0], [-0.1, 1.1, np.nan, np.inf]),
        ("p * (1 - p)", [0.5], [0.25], [2]),
        ("band:0.1:0.9", [0.05, 0.1, 0.9, 0.95], [0, 1, 1, 0], [np.nan]),
        ("power:2", [0, 3], [0, 9], [-1]),
        ("power:-1", [2], [0.5], [0, -1]),
        ("linear", [0, 0.3], [0, 0.3], [-1, np.inf]),
    ],
)
def test_rules_of_scores(rule: str, scores: list[float], factors: list[float], refused: list[float]) -> None:
    parsed = ScoreRule.parse(rule)
    assert parsed.takes(np.array(scores, dtype=float)).all()
    np.testing.assert_allclose(parsed.factor(np.array(scores, dtype=float)), factors, atol=1e-15)
    assert not parsed.takes(np.array(refused, dtype=float)).any()


@pytest.mark.parametrize(
    "text", ["", "p", "band", "band:0.9:0.1", "band:a:b", "power", "power:1:2", "linear:1", "power:nan", "exit()"]
)
def test_what_is_not_a_rule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        FactorConfig(scores="f", score=text)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("a", "is not NAME=NUMBER"),
        ("a=1,b", "is not NAME=NUMBER"),
        ("a=x", "is not NAME=NUMBER"),
        ("a=1,a=2", "name a group twice"),
        ("a=0", "must be a positive number"),
        ("a=-1", "must be a positive number"),
        ("a=inf", "must be a positive number"),
        ("{", "are not a JSON object"),
        ('{"a": "1"}', "must be a positive number"),
        ("{}", "name a group twice, or none"),
    ],
)
def test_what_is_not_shares_is_refused(shares: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorConfig(by="src", shares=shares)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "f", "score_field": "g"}, "not from both"),
        ({"score": "power:2"}, "there are no scores"),
        ({"missing_score": "drop"}, "there are no scores"),
        ({"score_field": "g", "score_column": "c"}, "--scores is missing"),
        ({"by": "src"}, "got --by src and --shares None"),
        ({"shares": "equal"}, "got --by None and --shares equal"),
        ({"missing_group": "x"}, "and --by is missing"),
        ({"scores": "f", "score": "p*(1-p)", "missing_score": "2"}, "a score that p"),
        ({"scores": "f", "missing_score": "some"}, "must be error, drop, mean or a score"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorConfig(**options)
