"""The table of trainers names what exists: tests of traps, pages, environments, and tests that the report names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embstore.training.trainer_entry import Trainer
from embstore.training.trainers import TRAINERS, trainer_of
from scripts.test_trainers import environments
from tests.support.evidence import Evidence, write_evidence

ROOT = Path(__file__).parents[2]


def exists(test: str) -> bool:
    """Whether the file defines the function."""
    path, _, name = test.partition("::")
    file = ROOT / path
    return file.is_file() and re.search(rf"^def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda each: each.name)
def test_an_entry_has_a_page_and_every_trap_a_test(trainer: Trainer) -> None:
    assert (ROOT / "docs" / "train" / f"{trainer.name}.md").is_file()
    assert [trap.test for trap in trainer.traps if not exists(trap.test)] == []
    assert trainer_of(trainer.name) is trainer


def test_entries_are_in_the_order_of_their_names_and_every_page_has_one() -> None:
    names = [each.name for each in TRAINERS]
    assert names == sorted(set(names))
    assert sorted(path.stem for path in (ROOT / "docs" / "train").glob("*.md") if path.stem != "README") == names


def test_every_environment_has_tests_and_every_test_file_an_environment() -> None:
    listed = {test.partition("::")[0] for each in environments() for test in each.tests}
    assert [test for test in listed if not (ROOT / test).is_file()] == []
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "trainers").glob("test_*.py")}
    assert files - listed == set()


def test_cases_of_one_test_are_one_entry_of_the_report(tmp_path: Path) -> None:
    def noted(version: str, stops: int, exact: int) -> Evidence:
        return Evidence(trainer="t", version=version, kind="run", what="loader", test="f::t", stops=stops, exact=exact)

    report = tmp_path / "report.json"
    write_evidence(report, [noted("2", 3, 3), noted("1", 1, 0), noted("2", 2, 1)])
    found = re.findall(r'"version": "(.)"[^}]*"stops": (\d)[^}]*"exact": (\d)', report.read_text(), re.DOTALL)
    assert found == [("1", "1", "0"), ("2", "5", "4")]
