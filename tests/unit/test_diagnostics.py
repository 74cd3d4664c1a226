"""Figures about weights and neighbours against formulas on data that is easy to see through; and when they warn."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from embstore import build, inspect, open_store, recompute_weights
from embstore.cli import app
from embstore.core import diagnostics
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, WeightingConfig
from embstore.core.diagnostics import Hubness, concerns, hubness, rank_correlation
from embstore.views.terminal import print_info
from tests.support.fake import FakeSource

FINE = {"ess_share": 0.5, "hubs": None, "floored_share": 0.0, "noise_floor": 1e-3, "correlation": -1.0}


def test_hubness_is_the_skewness_of_how_often_vectors_are_neighbours() -> None:
    # row 0 is everybody's neighbour; rows 4 and 5 are copies of 1, and -1 stands for no neighbour
    ids = np.array([[1, 2], [0, 2], [0, 1], [0, -1], [0, 2], [0, 2]])
    groups = np.array([0, 1, 2, 3, 1, 1])
    counts = np.array([3, 2, 2, 0])
    deviation = counts - counts.mean()
    found = hubness(ids, groups, 2)
    assert found is not None
    assert found.skewness == pytest.approx((deviation**3).mean() / (deviation**2).mean() ** 1.5)
    assert (found.k, found.most, found.antihub_share) == (2, 3, 0.25)
    first_only = hubness(ids, groups, 1)
    assert first_only is not None
    assert (first_only.most, first_only.antihub_share) == (3, 0.5)
    ring = hubness(np.roll(np.arange(5), 1)[:, None], np.arange(5), 1)
    assert ring is not None
    assert ring.skewness is None
    assert hubness(ids, np.full(6, -1), 2) is None


def test_hubness_of_many_blocks_makes_one_array_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is that of the neighbours, not of N for each block of them."""
    count, k = 4000, 5
    ids = np.random.default_rng(0).integers(0, count, (count, k))
    whole = hubness(ids, np.arange(count), k)
    monkeypatch.setattr(diagnostics, "_BLOCK_ROWS", 10)
    made = 0
    for name in ("bincount", "zeros"):
        genuine = getattr(np, name)

        def counted(*given: Any, genuine: Any = genuine, **options: Any) -> Any:
            nonlocal made
            array = genuine(*given, **options)
            made += array.size
            return array

        monkeypatch.setattr(np, name, counted)
    assert hubness(ids, np.arange(count), k) == whole
    assert whole is not None
    assert whole.most == np.unique(ids, return_counts=True)[1].max()
    assert made <= 2 * count


def test_rank_correlation_is_pearsons_of_the_ranks_with_ties_at_their_mean() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(0, 9, 200).astype(float), random.standard_normal(200)
    ranks = [np.array([(values < one).sum() + (values == one).sum() / 2 for one in values]) for values in (first, second)]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(first, np.exp(first)) == 1
    assert rank_correlation(np.ones(4), first[:4]) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ess_share": 0.05}, "effective sample size 5.0% of the rows"),
        ({"hubs": Hubness(k=10, skewness=4.0, antihub_share=0.2, most=1500)}, "skewness 4.0 (above 3)"),
        ({"floored_share": 0.2}, "20.0% of the rows have a mean distance below the noise floor 1.0e-03"),
        ({"correlation": 0.4}, "weights rise with density (rank correlation +0.40)"),
    ],
)
def test_each_concern_is_said_alone_and_only_beyond_its_limit(change: dict[str, object], words: str) -> None:
    (warning,) = concerns(**(FINE | change))  # type: ignore[arg-type]
    assert words in warning
    limits = {"ess_share": 0.1, "hubs": Hubness(k=10, skewness=3.0, antihub_share=0.1, most=9), "floored_share": 0.01}
    assert concerns(**(FINE | limits | {"correlation": None})) == []  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {index}"}) + "\n" for index in range(120)))
    config = BuildConfig(embedding=EmbeddingConfig(model="fake"), density=DensityConfig(knn="exact"))
    build(prompts, out=tmp_path / "store", config=config, source=FakeSource())
    return tmp_path / "store"


def shown(store: Path) -> str:
    console = Console(record=True, width=300, file=io.StringIO())
    print_info(console, inspect(store))
    return console.export_text()


def test_figures_are_in_the_metadata_and_warnings_on_the_terminal(store: Path) -> None:
    opened = open_store(store)
    metadata = opened.metadata
    counts = np.bincount(np.asarray(opened.neighbor_ids[:, :10]).ravel(), minlength=120)
    deviation = counts - counts.mean()
    assert metadata["hubness"]["skewness"] == pytest.approx((deviation**3).mean() / (deviation**2).mean() ** 1.5)
    assert metadata["weight_density_correlation"] == pytest.approx(-1, abs=1e-6)
    assert (metadata["share_below_noise_floor"], metadata["limited_rows"], metadata["warnings"]) == (0.0, 0, [])
    assert metadata["weighting"] == {
        "weighting": "inverse-density",
        "k": 10,
        "gamma": 1.0,
        "target_ess": None,
        "uniform_mix": 0.0,
        "max_ratio": 10.0,
        "duplicates": "collapse",
    }
    assert "the weighting is mild: sampling is close to uniform" in shown(store)


def test_weights_that_leave_few_prompts_or_favour_crowds_say_so(store: Path) -> None:
    metadata = recompute_weights(store, WeightingConfig(gamma=200, max_ratio=None))
    assert metadata["ess_share"] < 0.1
    assert any("effective sample size" in warning for warning in metadata["warnings"])
    text = shown(store)
    assert "a small part of the prompts carries nearly all weight" in text
    assert "mild" not in text
    inverted = recompute_weights(store, WeightingConfig(weighting="legacy-inverse"))
    assert inverted["weight_density_correlation"] == pytest.approx(1, abs=1e-6)
    assert "crowded prompts are favoured" in shown(store)


def test_the_command_line_gives_every_option_to_the_weights(store: Path) -> None:
    command = ["weights", str(store), "--max-ratio", "inf", "--duplicates", "keep", "--gamma", "9", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    weighting = json.loads(result.stdout)["weighting"]
    assert (weighting["max_ratio"], weighting["duplicates"], weighting["gamma"]) == (None, "keep", 9.0)
    refused = CliRunner().invoke(app, ["weights", str(store), "--target-ess", "0.05"])
    assert refused.exit_code == 2
    assert "with max_ratio 10 it is at least 0.1" in refused.stderr
    assert "raise max_ratio to 20 or more" in refused.stderr


def test_a_limit_that_lowered_weights_says_how_many(store: Path) -> None:
    metadata = recompute_weights(store, WeightingConfig(gamma=30, max_ratio=3.0))
    assert metadata["max_over_mean"] == pytest.approx(3, rel=1e-5)
    assert metadata["max_over_mean_vector"] == pytest.approx(3, rel=1e-5)
    at_limit = np.isclose(open_store(store).weights, open_store(store).weights.max(), rtol=1e-6)
    assert metadata["limited_rows"] == at_limit.sum()
    assert f"max_ratio 3 lowered the weights of {metadata['limited_rows']} rows" in shown(store)
