"""The factors of a weighting, made from what a user asks for, and what the metadata of the weights say of them.

Shapes: N rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import shown
from embstore.core.density import WeightsResult
from embstore.core.errors import ConfigError
from embstore.core.factors import NO_FACTORS, FactorConfig, Factors, FloatVector
from embstore.core.format import JsonObject
from embstore.flow.scores import groups_of_field, read_scores, scores_of_field
from embstore.storage.reader import EmbeddingStore, open_store

_NAMED_GROUPS = 1000
_SHOWN = 3


def make_factors(path: str | Path, config: FactorConfig) -> Factors:
    """The factors of a finished store's rows.

    Raises
    ------
    ConfigError, PromptError
        A score or group cannot be used, or prompts lack one.
    """
    if config == FactorConfig():
        return NO_FACTORS
    rule, shares = config.score_rule, config.share_rule
    store = open_store(path)
    described: JsonObject = {}
    score_N: FloatVector | None = None
    group_N: NDArray[np.integer] | None = None
    names: tuple[str, ...] = ()
    if config.scores is not None or config.score_field is not None:
        found = (
            read_scores(store, config.scores, rule, column=config.score_column)
            if config.scores is not None
            else scores_of_field(store, str(config.score_field), rule)
        )
        score_N = _score_factor(store, found.values_N, config)
        described["score"] = {"rule": config.score, "missing": config.missing_score, **found.source}
    if config.by is not None:
        codes_N, values = groups_of_field(store, config.by, config.missing_group)
        group_N, names = (codes_N, values) if shares is None else shares.merged(codes_N, values)
        described["shares"] = {"by": config.by, "rule": config.shares, "missing": config.missing_group}
    return Factors(score_N=score_N, group_N=group_N, names=names, rule=shares, described=described)


def _score_factor(store: EmbeddingStore, values_N: FloatVector, config: FactorConfig) -> FloatVector:
    """The factor of every row, with those without a score as ``missing_score`` says."""
    is_missing_N = np.isnan(values_N)
    factor_N = np.zeros(len(values_N))
    factor_N[~is_missing_N] = config.score_rule.factor(values_N[~is_missing_N])
    is_missing_N &= store.groups >= 0  # rows without a vector get no weight anyway
    if not is_missing_N.any() or config.missing_score == "drop":
        return factor_N
    if config.missing_score == "error":
        first = store.prompts.sample(np.flatnonzero(is_missing_N)[:_SHOWN].tolist())
        raise ConfigError(
            f"{np.count_nonzero(is_missing_N):,} of {len(values_N):,} prompts have no score, the first: "
            f"{', '.join(shown(prompt.id) for prompt in first)}",
            hint="--missing-score drop leaves them out, mean gives them the mean factor of the others, and a number is "
            "their score",
        )
    missing_N = factor_N[~np.isnan(values_N)].mean() if config.missing_score == "mean" else config.missing_factor
    factor_N[is_missing_N] = missing_N
    return factor_N


def factors_metadata(factors: Factors, result: WeightsResult, groups_N: NDArray[np.integer]) -> JsonObject:
    """What the metadata of weights say of their factors: origin, range, shares, and what each part does."""
    found: JsonObject = {**(factors.described or {}), "parts": [dataclasses.asdict(effect) for effect in result.effects]}
    is_valid_N = groups_N >= 0
    if factors.score_N is not None:
        mine = factors.score_N[is_valid_N]
        low, median, high = (float(value) for value in np.quantile(mine, [0.05, 0.5, 0.95]))
        found["score"] = {
            **found.get("score", {}),
            "factor": {"min": float(mine.min()), "q05": low, "median": median, "q95": high, "max": float(mine.max())},
            "never_drawn": int(np.count_nonzero(mine == 0)),
        }
    if factors.group_N is not None:
        in_group_N = (factors.group_N >= 0) & is_valid_N
        rows_G = np.bincount(factors.group_N[in_group_N], minlength=len(factors.names))
        weight_G = np.bincount(factors.group_N[in_group_N], weights=result.weights[in_group_N], minlength=len(factors.names))
        heaviest = np.argsort(-np.round(weight_G, 6), kind="stable")[:_NAMED_GROUPS]
        found["shares"] = {
            **found.get("shares", {}),
            "groups": [
                {"name": factors.names[group], "rows": int(rows_G[group]), "share": float(weight_G[group])}
                for group in heaviest.tolist()
            ],
            "all_groups": len(factors.names),
            "left_out": int(np.count_nonzero(is_valid_N & (factors.group_N < 0))),
        }
    return found
