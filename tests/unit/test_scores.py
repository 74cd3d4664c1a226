"""embstore weights with scores and shares: files are joined by prompt or id, and a wrong line is never ignored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.config import WeightingConfig
from embstore.core.density import mean_distance
from embstore.core.errors import ConfigError, ExitCode, PromptError
from embstore.core.factors import FactorConfig
from embstore.flow.artifact import recompute_weights
from embstore.flow.weight_factors import make_factors
from embstore.storage.reader import open_store
from embstore.training import load_weights
from tests.support.stores import small_lines, write_lines


def scores() -> list[float]:
    """A score for each of the small lines, which are the rows in their order."""
    return [(7 * row % 11) / 10 for row in range(len(small_lines()))]


def score_file(path: Path, by: str, format: str) -> Path:
    """The scores in another order than the store's, joined by the prompt or by the row's id."""
    ids = json.loads((path.parent / "store" / "ids.json").read_text())
    rows: list[dict[str, Any]] = []
    for row, (line, score) in enumerate(zip(small_lines(), scores(), strict=True)):
        prompt = {name: line[name] for name in ("prompt", "messages") if name in line}
        rows.append({**(prompt if by == "prompt" else {"id": ids[row]}), "pass_rate": score})
    rows.reverse()
    if format == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "pass_rate"])
            writer.writeheader()
            writer.writerows(rows)
    elif format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif format == "json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    return path


@pytest.mark.parametrize(
    ("by", "format"), [("prompt", "jsonl"), ("id", "jsonl"), ("id", "csv"), ("id", "parquet"), ("prompt", "json")]
)
def test_a_file_in_any_format_and_order_is_joined(store: Path, tmp_path: Path, by: str, format: str) -> None:
    path = score_file(tmp_path / f"scores.{format}", by, format)
    config = FactorConfig(scores=str(path), score="p*(1-p)")
    found = make_factors(store, config)
    expected = np.array(scores()) * (1 - np.array(scores()))
    np.testing.assert_allclose(found.score_N, expected)
    metadata = recompute_weights(store, WeightingConfig(max_ratio=None), factors=found)
    distance = np.maximum(mean_distance(open_store(store).neighbor_distances, 10), metadata["noise_floor"])
    copies = np.bincount(open_store(store).groups)[open_store(store).groups]
    weights = distance * expected / copies
    np.testing.assert_allclose(load_weights(store).array, weights / weights.sum(), rtol=1e-5)
    assert metadata["factors"]["score"]["column"] == "pass_rate"
    assert str(tmp_path) not in json.dumps(metadata)  # a listed file names no path


def test_equal_scores_have_one_digest_whatever_file_they_came_in(store: Path, tmp_path: Path) -> None:
    digests = set()
    for by, format in (("prompt", "jsonl"), ("id", "csv")):
        path = score_file(tmp_path / f"scores.{format}", by, format)
        described = make_factors(store, FactorConfig(scores=str(path))).described
        assert described is not None
        digests.add(described["score"]["sha256"])  # type: ignore[index]
    assert len(digests) == 1


def test_scores_of_a_field_and_shares_of_another(tmp_path: Path) -> None:
    from tests.support.stores import build_small

    lines = [{**line, "quality": row % 5 + 1} for row, line in enumerate(small_lines())]
    store = tmp_path / "built"
    build_small(write_lines(tmp_path / "prompts.jsonl", lines), store)
    words = ["weights", str(store), "--score-field", "quality", "--score", "power:2", "--by", "src"]
    words += ["--shares", "a=3,b=1,chat=1", "--missing-group", "drop", "--max-ratio", "inf"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    weights = load_weights(store).array.astype(np.float64)
    source = np.array([str(line.get("src")) for line in lines])
    for name, share in {"a": 0.6, "b": 0.2, "chat": 0.2, "None": 0.0}.items():
        assert weights[source == name].sum() == pytest.approx(share, abs=1e-6)
    mine = source == "a"
    distance = np.maximum(mean_distance(open_store(store).neighbor_distances, 10), 1e-3)
    expected = (distance * np.array([line["quality"] for line in lines]) ** 2)[mine]
    np.testing.assert_allclose(weights[mine], 0.6 * expected / expected.sum(), rtol=1e-5)
    shown = result.stdout
    assert "score from field quality, power:2" in shown
    assert "shares by src: a 60.0% (30 rows), b 20.0% (30 rows), chat 20.0% (4 rows)" in shown
    for part in ("density", "score", "shares", "limits"):
        assert f"after {part}" in shown
    assert "shares by src" in CliRunner().invoke(app, ["inspect", str(store)]).stdout


def lines_of_scores(store: Path) -> list[dict[str, Any]]:
    ids = json.loads((store / "ids.json").read_text())
    return [{"id": name, "score": 0.5} for name in ids]


def test_everything_that_is_wrong_is_counted_with_the_first_three(store: Path, tmp_path: Path) -> None:
    lines: list[Any] = lines_of_scores(store)
    lines[3]["score"], lines[4]["score"], lines[5]["score"], lines[6]["score"] = "much", 1.5, None, True
    lines[7]["score"] = float("nan")
    lines[8]["score"] = float("inf")
    lines += [{"id": f"unknown {number}", "score": 0.1} for number in range(5)]
    lines += [{"id": lines[0]["id"], "score": 0.6}, {"score": 0.6}, {"id": lines[1]["id"]}, b"no JSON\n"]
    path = write_lines(tmp_path / "scores.jsonl", lines)
    with pytest.raises(PromptError) as caught:
        make_factors(store, FactorConfig(scores=str(path), score="p*(1-p)"))
    message = str(caught.value)
    for part in (
        "3 have a score that is not a number: line 4",
        "1 have a score outside 0 to 1: line 5",
        "have a score that is not finite: line 8",
        "5 are of prompts that the store does not have: line 71",
        "line 73",
        "1 give a prompt another score than a line before: line 76",
        "0.5 and 0.6",
        "1 have neither a prompt nor an id: line 77",
        "1 have no field 'score': line 78",
        "1 cannot be read: line 79",
    ):
        assert part in message, message
    assert "line 74" not in message  # of each kind, three
    assert open_store(store).metadata.get("factors") is None  # nothing was written


def test_lines_that_agree_are_one(store: Path, tmp_path: Path) -> None:
    lines = lines_of_scores(store)
    path = write_lines(tmp_path / "scores.jsonl", [*lines, *lines[:9]])
    np.testing.assert_array_equal(make_factors(store, FactorConfig(scores=str(path))).score_N, np.full(70, 0.5))


def test_missing_scores_are_refused_or_have_a_policy(store: Path, tmp_path: Path) -> None:
    lines = lines_of_scores(store)
    for number, line in enumerate(lines):
        line["score"] = 0.25 + number % 2 / 2  # factors 0.1875, 0.1875: the mean is theirs
    path = str(write_lines(tmp_path / "scores.jsonl", lines[2:]))
    ids = [line["id"] for line in lines]
    with pytest.raises(ConfigError, match=f"2 of 70 prompts have no score, the first: '{ids[0]}', '{ids[1]}'"):
        make_factors(store, FactorConfig(scores=path))

    def first(policy: str, score: str = "linear") -> list[float]:
        config = FactorConfig(scores=path, score=score, missing_score=policy)
        return list(make_factors(store, config).score_N[:2])  # type: ignore[index]

    assert first("drop") == [0, 0]
    assert first("mean") == [0.5, 0.5]
    assert first("mean", "p*(1-p)") == [0.1875, 0.1875]
    assert first("0.1", "p*(1-p)") == pytest.approx([0.09, 0.09])


def test_several_numbers_need_a_name(store: Path, tmp_path: Path) -> None:
    lines = [{"id": line["id"], "reward": 1, "length": 7} for line in lines_of_scores(store)]
    path = str(write_lines(tmp_path / "scores.jsonl", lines))
    with pytest.raises(ConfigError, match="2 numbers that could be the score: 'reward', 'length'"):
        make_factors(store, FactorConfig(scores=path))
    found = make_factors(store, FactorConfig(scores=path, score_column="length")).score_N
    np.testing.assert_array_equal(found, np.full(70, 7.0))


def test_rows_without_a_group_are_refused_named_or_left_out(store: Path) -> None:
    with pytest.raises(ConfigError, match="6 of 70 prompts have no field 'src', the first"):
        make_factors(store, FactorConfig(by="src", shares="equal"))
    with pytest.raises(ConfigError, match="no prompt has a field 'source'") as caught:
        make_factors(store, FactorConfig(by="source", shares="equal"))
    assert "the input lines have 'src'" in str(caught.value.hint)
    with pytest.raises(PromptError, match=r"'src' cannot be used as scores: 64 are not numbers: '[0-9a-f]+': 'a', "):
        make_factors(store, FactorConfig(score_field="src"))
    named = make_factors(store, FactorConfig(by="src", shares="equal", missing_group="none"))
    assert named.names == ("a", "b", "chat", "none")
    left_out = make_factors(store, FactorConfig(by="src", shares="equal", missing_group="drop"))
    assert left_out.names == ("a", "b", "chat")
    assert left_out.group_N is not None
    assert np.count_nonzero(left_out.group_N < 0) == 6


def test_a_star_stands_for_all_other_groups_together(store: Path) -> None:
    config = FactorConfig(by="src", shares="a=1,*=3", missing_group="none")
    recompute_weights(store, WeightingConfig(), factors=make_factors(store, config))
    weights = load_weights(store).array.astype(np.float64)
    source = np.array([str(line.get("src")) for line in small_lines()])
    assert weights[source == "a"].sum() == pytest.approx(0.25, abs=1e-6)
    assert (weights > 0).all()
    all_named = FactorConfig(by="src", shares="a=1,b=1,chat=1,none=1,*=1", missing_group="none")
    factors = make_factors(store, all_named)
    with pytest.raises(ConfigError, match=r"1 of 5 shares are of groups without rows that can be drawn: '\*'"):
        recompute_weights(store, WeightingConfig(), factors=factors)


def test_the_command_line_refuses_a_rule_before_it_reads_the_store(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["weights", str(tmp_path / "none"), "--scores", "f", "--score", "eval(x)"])
    assert result.exit_code == ExitCode.USAGE
    assert "'eval(x)' is not a score rule" in result.stderr


def test_new_weights_without_factors_are_those_of_density_alone(store: Path, tmp_path: Path) -> None:
    before = load_weights(store).array.copy()
    path = str(
        write_lines(
            tmp_path / "scores.jsonl", [{**line, "score": 1 + row} for row, line in enumerate(lines_of_scores(store))]
        )
    )
    recompute_weights(store, WeightingConfig(), name="scored", factors=make_factors(store, FactorConfig(scores=path)))
    np.testing.assert_array_equal(load_weights(store).array, before)
    assert not np.allclose(load_weights(store, name="scored").array, before)
    metadata = recompute_weights(store, WeightingConfig())
    assert "factors" not in metadata
    np.testing.assert_array_equal(load_weights(store).array, before)
