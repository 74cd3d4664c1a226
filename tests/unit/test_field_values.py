"""Shares of a field's values against dictionaries of all values, however many there are."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.errors import EmbstoreError
from embstore.core.prompts import Prompt, encode_row
from embstore.storage.prompt_table import PromptTable
from embstore.views.field_values import NAMED_VALUES, FieldValues
from embstore.views.info import inspect
from embstore.views.report import data as report_data
from embstore.views.report.data import read_report
from embstore.views.report.page import render_page
from tests.support.large import large_store, unlike_lines

pytestmark = pytest.mark.usefixtures("without_syncs")


def table_of(folder: Path, fields: list[dict[str, Any]]) -> PromptTable:
    rows = [encode_row(Prompt(id=f"row-{row}", text="a text", fields=each)) for row, each in enumerate(fields)]
    (folder / "prompts.jsonl").write_bytes(b"".join(rows))
    return PromptTable(folder / "prompts.jsonl", len(rows))


def by_dictionary(values: list[str], weights: NDArray[np.float32]) -> dict[str, tuple[int, float]]:
    rows: dict[str, int] = defaultdict(int)
    weight: dict[str, float] = defaultdict(float)
    for value, each in zip(values, weights.tolist(), strict=True):
        rows[value] += 1
        weight[value] += each
    return {value: (rows[value], weight[value]) for value in rows}


@pytest.mark.parametrize("num_values", [3, NAMED_VALUES, NAMED_VALUES + 1, 2500])
def test_the_heaviest_values_are_named_and_the_others_counted(num_values: int, tmp_path: Path) -> None:
    random = np.random.default_rng(num_values)
    numbers = np.concatenate([np.arange(num_values - 1), random.integers(0, num_values - 1, 2500)])
    random.shuffle(numbers)
    fields: list[dict[str, Any]] = [{"src": f"source {number}"} for number in numbers]
    fields[7] = {"other": 1}  # the last value: none
    fields.append({"src": f"source {numbers[7]}"})
    values = [each.get("src", "(none)") for each in fields]
    weights = random.dirichlet(np.ones(len(fields))).astype(np.float32)
    table = table_of(tmp_path, fields)
    found = FieldValues.read("src", table).spread(table, weights)
    expected = sorted(by_dictionary(values, weights).items(), key=lambda item: (-item[1][1], item[0]))
    assert len(expected) == num_values
    named, rest = expected[:NAMED_VALUES], expected[NAMED_VALUES:]
    assert [(share.value, share.rows) for share in found.shares] == [(value, rows) for value, (rows, _) in named]
    np.testing.assert_allclose([share.weight_share for share in found.shares], [weight for _, (_, weight) in named])
    assert all(share.row_share == share.rows / len(fields) for share in found.shares)
    places = {value: place for place, (value, _) in enumerate(named)}
    assert found.code.tolist() == [places.get(value, len(named)) for value in values]
    assert (found.others is None) == (not rest)
    if found.others is not None:
        assert (found.others.values, found.others.rows) == (len(rest), sum(rows for _, (rows, _) in rest))
        assert found.others.weight_share == pytest.approx(sum(weight for _, (_, weight) in rest))
        assert found.others.row_share == found.others.rows / len(fields)


def test_of_equal_values_the_first_are_named(tmp_path: Path) -> None:
    table = table_of(tmp_path, [{"id2": row} for row in range(1500)])
    found = FieldValues.read("id2", table).spread(table, np.full(1500, 1 / 1500, dtype=np.float32))
    assert {share.value for share in found.shares} == {str(row) for row in range(NAMED_VALUES)}
    assert found.others is not None
    assert found.others.values == 500


def test_values_are_told_apart_by_all_they_hold_and_shown_in_part(tmp_path: Path) -> None:
    long = "x" * 300
    table = table_of(tmp_path, [{"note": long + "a"}, {"note": long + "b"}, {"note": ["a", 1]}, {"note": long + "a"}, {}])
    found = FieldValues.read("note", table).spread(table, np.array([0.3, 0.1, 0.1, 0.3, 0.2], dtype=np.float32))
    assert [(share.value, share.rows) for share in found.shares] == [
        ("x" * 200 + "…", 2),
        ("(none)", 1),
        ("['a', 1]", 1),
        ("x" * 200 + "…", 1),
    ]


def test_a_field_that_no_prompt_has_is_refused_and_names_a_few_others(tmp_path: Path) -> None:
    table = table_of(tmp_path, [{f"field {row}": 1, "of all": "(none)"} for row in range(100)])
    with pytest.raises(EmbstoreError, match="no prompt has a field 'colour'") as caught:
        FieldValues.read("colour", table)
    assert str(caught.value.hint).count("field ") == 63
    found = FieldValues.read("of all", table).spread(table, np.full(100, 0.01, dtype=np.float32))
    assert [(share.value, share.rows) for share in found.shares] == [("(none)", 100)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 1,500 rows with four fields that differ on each of them."""
    return large_store(tmp_path_factory.mktemp("many") / "store", unlike_lines(1500))


def test_inspect_by_a_field_of_many_values_ends_in_a_line_for_the_rest(many: Path) -> None:
    info = inspect(many, by="uuid")
    assert len(info.shares) == NAMED_VALUES
    assert info.other_values is not None
    assert (info.other_values.values, info.other_values.rows) == (500, 500)
    assert sum(share.weight_share for share in info.shares) + info.other_values.weight_share == pytest.approx(1, abs=1e-6)
    assert min(share.weight_share for share in info.shares) >= info.other_values.weight_share / 500
    shown = CliRunner().invoke(app, ["inspect", str(many), "--by", "uuid"]).output.splitlines()
    assert len([line for line in shown if line.startswith("0000")]) == NAMED_VALUES
    assert shown[-1].startswith("and 500 other values")
    told = json.loads(CliRunner().invoke(app, ["inspect", str(many), "--by", "uuid", "--json"]).output)
    assert (len(told["shares"]), told["other_values"]["values"]) == (NAMED_VALUES, 500)
    few = inspect(many, by="src")
    assert (len(few.shares), few.other_values) == (3, None)


def test_a_report_by_a_field_of_many_values_says_how_many(many: Path) -> None:
    data = read_report(many, by="url")
    assert (data.source_field, data.num_sources, len(data.sources), len(data.source_values)) == ("url", 1500, 1000, 1001)
    assert data.source_values[-1] == "(one of 500 other values)"
    assert np.bincount(data.source)[-1] == 500
    page = render_page(data)
    assert "Of 1,500 values (1,000 with the most draws were compared):" in page
    assert "Of 1,500 values" not in render_page(read_report(many))


@pytest.mark.parametrize("first_rows", [1, 2, 4096])
def test_the_source_is_found_whatever_the_first_rows_look_like(
    many: Path, first_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    whole = PromptTable._all_lines

    def counted(table: PromptTable) -> Any:
        nonlocal passes
        passes += 1
        return whole(table)

    monkeypatch.setattr(report_data, "_FIRST_ROWS", first_rows)
    monkeypatch.setattr(PromptTable, "_all_lines", counted)
    data = read_report(many)
    assert (data.source_field, data.num_sources) == ("src", 3)
    assert [share.rows for share in data.sources] == [500, 500, 500]
    assert passes == (2 if first_rows == 4096 else 3)  # the first rows, all prompts, and once more after a wrong guess
