"""Documents that are made from the code, or make claims about it; ``benchmarks.pages --check`` compares figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pages
from embstore.core import format as contract
from embstore.core.errors import EmbstoreError
from scripts import cli_docs

ROOT = Path(__file__).parents[2]


def test_cli_page_is_what_the_commands_say() -> None:
    assert cli_docs.PAGE.read_text(encoding="utf-8") == cli_docs.page(), "run: python -m scripts.cli_docs"


def test_a_changed_figure_block_picture_or_claim_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a copy of the documents: as they are, nothing is found; each change is found, and writing mends it."""
    for name in {*(block.page for block in pages.BLOCKS), *pages.PICTURES}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    pages.write()
    assert [found for found in pages.problems() if not found.startswith("no longer true")] == []
    page, picture = tmp_path / "docs" / "reliability.md", tmp_path / "docs" / "density.svg"
    right = page.read_text(encoding="utf-8")
    page.write_text(right.replace("| together |", "| altogether |"), encoding="utf-8")
    picture.write_text(re.sub("sha256 .", "sha256 x", picture.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    monkeypatch.setitem(pages.result("faults"), "passed", False)
    found = "\n".join(pages.problems())
    assert "docs/reliability.md: block faults differs" in found
    assert "docs/density.svg differs" in found
    assert "the run passed and lost nothing" in found
    pages.write()
    assert page.read_text(encoding="utf-8") == right
    page.write_text(right.replace("end of faults", "end of nothing"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/reliability\.md lacks the marks of the block faults"):
        list(pages.problems())


def test_format_page_names_every_file_of_a_store() -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    names = [
        value for name, value in vars(contract).items() if name.isupper() and isinstance(value, str) and "/" not in value
    ]
    assert names
    assert [name for name in names if name not in page] == []


def _is_there(page: Path, target: str) -> bool:
    """Whether a link's file exists and has the heading that an anchor names, spelled as GitHub does."""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not path.exists() or not anchor:
        return path.exists()
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_leads_somewhere() -> None:
    found = [
        (page, target)
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target
    ]
    assert any("#" in target for _, target in found)
    assert [(page.name, target) for page, target in found if not _is_there(page, target)] == []


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


def test_every_test_that_the_scaling_page_names_exists() -> None:
    named = re.findall(r"`(tests/[a-z_/]+\.py)`", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_error_kinds_are_unique_and_drawn_in_the_tree() -> None:
    def leaves(error: type[EmbstoreError]) -> list[type[EmbstoreError]]:
        return [error, *(leaf for child in error.__subclasses__() for leaf in leaves(child))]

    errors = leaves(EmbstoreError)
    kinds = [error.kind for error in errors]
    assert len(kinds) == len(set(kinds))
    module = __import__("embstore.core.errors", fromlist=["errors"])
    assert [error.__name__ for error in errors if error.__name__ not in str(module.__doc__)] == []
