"""Documents that are made from the code, or make claims about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from embstore.core import format as contract
from embstore.core.errors import EmbstoreError
from scripts import cli_docs, density_page, performance_page, reliability_table, reuse_figures

ROOT = Path(__file__).parents[2]


def test_cli_page_is_what_the_commands_say() -> None:
    assert cli_docs.PAGE.read_text(encoding="utf-8") == cli_docs.page(), "run: python -m scripts.cli_docs"


def test_reliability_page_shows_the_committed_run_and_that_run_lost_nothing() -> None:
    report = json.loads(reliability_table.REPORT.read_text())
    text = reliability_table.PAGE.read_text(encoding="utf-8")
    assert reliability_table.page(text) == text, "run: python -m scripts.reliability_table"
    assert report["passed"]
    assert sum(row["losses"] for row in report["faults"]) == 0

    def cycles(start: str) -> int:
        return sum(row["cycles"] for row in report["faults"] if row["fault"].startswith(start))

    assert cycles("SIGKILL at a random moment") >= 500
    assert cycles("SIGKILL at a random moment, command line with a real model") >= 20
    assert cycles("power cut, ext4") >= 300
    assert cycles("power cut, xfs") >= 300


def test_density_page_and_plot_show_the_committed_run() -> None:
    text = density_page.PAGE.read_text(encoding="utf-8")
    assert density_page.page(text) == text, "run: python -m scripts.density_page"
    assert density_page.PLOT.read_text(encoding="utf-8") == density_page.plot()


def test_performance_page_and_plot_show_the_committed_run() -> None:
    text = performance_page.PAGE.read_text(encoding="utf-8")
    assert performance_page.page(text) == text, "run: python -m scripts.performance_page"
    assert performance_page.PLOT.read_text(encoding="utf-8") == performance_page.plot()


def test_guide_shows_the_committed_figures_of_reuse() -> None:
    text = reuse_figures.PAGE.read_text(encoding="utf-8")
    assert reuse_figures.page(text) == text, "run: python -m scripts.reuse_figures"
    results = json.loads(reuse_figures.RESULTS.read_text())
    for dtype, tolerance in (("auto", 5e-4), ("float32", 2e-6)):
        assert results[dtype]["reuse"]["rows"]["reused"] == results[dtype]["copied_rows"]["rows"] == 27_000
        assert results[dtype]["copied_rows"]["coordinates_l2_largest"] <= tolerance
        assert results[dtype]["ratios"]["embedding_stage"] <= 1 / 8


def test_the_scaling_run_made_the_same_bytes_and_sent_few_through_the_driver() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    assert results["same_listed_files"]
    assert results["builds"]["2"]["driver_bytes_a_row"] <= 8192
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[a-z_/]+\.py)`", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_that_the_reliability_page_names_exists() -> None:
    report = json.loads(reliability_table.REPORT.read_text())
    for row in report["faults"]:
        path, _, name = row["test"].partition("::")
        assert f"def {name.partition('::')[2] or name}(" in (ROOT / path).read_text(), row["test"]


def test_format_page_names_every_file_of_a_store() -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    names = [
        value for name, value in vars(contract).items() if name.isupper() and isinstance(value, str) and "/" not in value
    ]
    assert names
    assert [name for name in names if name not in page] == []


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def result(name: str) -> Any:
        return json.loads((ROOT / "benchmarks" / "results" / name).read_text())

    store = result("embedding.json")["methods"]["float32"]["store"]
    assert f"**{store['share_of_floor']:.0%}**".replace("%", " %") in text
    assert f"{store['times_original']:.0f} times the original method" in text
    faults = result("faults.json")["faults"]
    assert f"lost in {sum(row['cycles'] for row in faults):,} kills" in text
    assert f"| **{sum(row['losses'] for row in faults)}** |" in text
    assert f"**{result('acceptance.json')['speed']['audit']['recall']:.2%}**".replace("%", " %") in text


def test_decisions_have_unique_numbers_and_are_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    names = sorted(path.name for path in folder.glob("*.md") if path.name != "README.md")
    assert names
    assert all(name[:4].isdigit() for name in names)
    assert len({name[:4] for name in names}) == len(names)
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d{4}\]\(([^)]+)\)", index, re.MULTILINE) == names


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_error_kinds_are_unique_and_drawn_in_the_tree() -> None:
    def leaves(error: type[EmbstoreError]) -> list[type[EmbstoreError]]:
        return [error, *(leaf for child in error.__subclasses__() for leaf in leaves(child))]

    errors = leaves(EmbstoreError)
    kinds = [error.kind for error in errors]
    assert len(kinds) == len(set(kinds))
    module = __import__("embstore.core.errors", fromlist=["errors"])
    assert [error.__name__ for error in errors if error.__name__ not in str(module.__doc__)] == []
