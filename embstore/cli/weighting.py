"""How weights come from distances: the options that ``build`` and ``weights`` share."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from embstore.core.config import Duplicates, Weighting, WeightingConfig

Method = Annotated[
    Weighting,
    typer.Option("--weighting", help="legacy-inverse favours crowds, as the original did: for comparison only."),
]
K = Annotated[
    int, typer.Option("--k", help="Nearest distinct vectors whose mean distance is a prompt's rarity (at most 32).")
]
Gamma = Annotated[float, typer.Option("--gamma", help="Weight is proportional to mean distance ** gamma.")]
TargetEss = Annotated[
    float | None, typer.Option("--target-ess", help="Solve gamma for this effective sample size, as a share of the rows.")
]
UniformMix = Annotated[float, typer.Option("--uniform-mix", help="Share of uniform sampling mixed in.")]
MaxRatio = Annotated[
    float,
    typer.Option("--max-ratio", help="Largest weight of a vector, in units of their mean weight; inf for no limit."),
]
CopiesOf = Annotated[
    Duplicates,
    typer.Option("--duplicates", help="Rows with bit-equal vectors: collapse shares one weight among them, keep does not."),
]


def weighting_config(
    weighting: Weighting,
    k: int,
    gamma: float,
    target_ess: float | None,
    uniform_mix: float,
    max_ratio: float,
    duplicates: Duplicates,
) -> WeightingConfig:
    """The options above as a value."""
    return WeightingConfig(
        weighting=weighting,
        k=k,
        gamma=gamma,
        target_ess=target_ess,
        uniform_mix=uniform_mix,
        max_ratio=None if max_ratio == math.inf else max_ratio,
        duplicates=duplicates,
    )
