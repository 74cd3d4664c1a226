"""Every command and snippet of README and documents is run, in their order, in one folder with a small model.

What cannot be run here is checked as far as it goes: ``make`` targets and ``python -m`` modules must exist, command lines
must parse, commands in the middle of a sentence must be spelled as the program takes them. Which commands and options there
are is read from what ``embstore --help`` prints in a separate process.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.errors import EmbstoreError
from embstore.storage.reader import open_store
from embstore.training import load_weights
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import small_lines, write_lines

ROOT = Path(__file__).parents[2]
# what another test compares with the program or a results file
GENERATED = {"cli.md", "performance.md"}
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "docs/guide.md", "docs/limits.md")]
PAGES += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in GENERATED and path not in PAGES]
PAGES += sorted((ROOT / "docs" / "train").glob("*.md"))
RUN = ["README.md", "docs/guide.md", "docs/prompts.md", "docs/weights.md"]
OURS = ("benchmarks", "embstore", "scripts")
# needs a checkout of somebody else's code, or the network
NOT_HERE = ("PYTHONPATH=", "pip ", "HNSWLIB_NO_NATIVE=")


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Code blocks of a page: their language ("sh" for indented ones) and text."""
    text = page.read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield language, body
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for body in re.findall(r"\n\n((?:    [^\n]+\n)+)", rest):
        yield "sh", body


def _commands(page: Path) -> list[str]:
    lines = [
        line.partition("#")[0].strip() for language, body in _blocks(page) if language == "sh" for line in body.splitlines()
    ]
    return [line for line in lines if line.startswith(("embstore ", "make ", "python -m ", *NOT_HERE))]


def _spellings(command: str) -> list[str]:
    """A command without its [optional] parts and once with each, and every a|b alternative."""
    optional = re.findall(r"\[([^\]]+)\]", command)
    plain = re.sub(r" ?\[[^\]]+\]", "", command)
    found = []
    for spelled in [plain, *(f"{plain} {part}" for part in optional)]:
        choices = [word.split("|") for word in spelled.split()]
        found += [" ".join(words) for words in itertools.product(*choices)]
    return found


@functools.cache
def _printed(*words: str) -> str:
    """What the program prints in a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    command = [sys.executable, "-m", "embstore", *words]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def _options_in(shown: str) -> list[str]:
    """Options of a help text: each begins a line, the second spelling of a flag follows a slash."""
    lines = re.findall(r"^  (--[a-z-]+(?: / --[a-z-]+)?)", shown, re.MULTILINE)
    return [option for line in lines for option in line.split(" / ")]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """All that each command's help can show, by its name."""
    commands = re.findall(r"^  ([a-z]+) ", _printed("--help").partition("Commands:\n")[2], re.MULTILINE)
    plain = {name: _printed(name, "--help") for name in commands}
    return {name: _printed(name, "--help-all") if "--help-all" in text else text for name, text in plain.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents name: prompts, a changed pool, a table, and a model."""
    folder = tmp_path_factory.mktemp("documents")
    save_model(folder / "MODEL", make_model("llama"), make_tokenizer())
    lines = [*small_lines()[:40], {"id": "ID", "prompt": "A prompt that documents call ID.", "src": "docs"}]
    for number, line in enumerate(lines[:36]):
        line["src"] = "maths" if number % 3 else "code"
    for line in lines[36:]:
        line.pop("src", None)
    lines[-1]["src"] = "code"
    write_lines(folder / "prompts.jsonl", lines)
    rated = [{"prompt": line["prompt"], "pass_rate": number / 40} for number, line in enumerate(lines[:38])]
    write_lines(folder / "scores.jsonl", [*rated, {"id": "ID", "pass_rate": 0.5}])
    write_lines(folder / "new_prompts.jsonl", [*lines[5:], {"prompt": "Entirely new.", "src": "new"}])
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": [f"What is {index}?" for index in range(20)], "uid": list(range(20))})
    parquet.write_table(table, folder / "table.parquet")
    verl = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {number}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(number)},
            "extra_info": {"index": number},
        }
        for number in range(24)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(verl), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("page", RUN)
def test_every_command_of_the_page_runs(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.chdir(here)
    commands = [command for command in _commands(ROOT / page) if command.startswith("embstore ")]
    assert len(commands) >= 2
    for number, command in enumerate(itertools.chain.from_iterable(map(_spellings, commands))):
        words = shlex.split(command)[1:]
        if "--out" in words and words[0] == "export":  # one folder each: nothing is overwritten
            words[words.index("--out") + 1] += str(number)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}{result.stderr}"
        if "--json" in words:
            json.loads(result.stdout)


def test_every_python_snippet_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.chdir(here)
    assert CliRunner().invoke(app, ["build", "prompts.jsonl", "--model", "MODEL", "--out", "STORE"]).exit_code == 0
    # not in the store's order: the snippets must join
    dataset = [json.loads(line) for line in reversed((here / "prompts.jsonl").read_text().splitlines())]
    stored = [json.loads(line)["prompt"] for line in (here / "STORE" / "prompts.jsonl").read_text().splitlines()]
    weight_of = dict(zip(stored, open_store("STORE").weights.tolist(), strict=True))
    expected = [weight_of[item["prompt"]] for item in dataset]
    assert load_weights("STORE").array != pytest.approx(expected)  # by position: what a snippet must not do
    snippets = [body for page in RUN[:2] for language, body in _blocks(ROOT / page) if language == "python"]
    assert snippets
    for body in snippets:
        names: dict[str, Any] = {"dataset": dataset}
        exec(compile(body, "snippet", "exec"), names)
        assert names["weights"].array == pytest.approx(expected)


def test_every_example_of_the_page_on_prompts_joins_its_dataset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with pandas, with TRL, with pairs, and with verl's file: each item gets the weight of its own prompt."""
    here = Path(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.chdir(here)
    commands = [shlex.split(command)[1:] for command in _commands(ROOT / "docs" / "prompts.md")]
    assert [words[0] for words in commands] == ["build", "resample"]
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{words}\n{result.output}{result.stderr}"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    stored = (here / "STORE" / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"][0]["content"] for line in stored]
    weight_of = dict(zip(rows, open_store("STORE").weights.tolist(), strict=True))
    dataset = pyarrow_parquet().read_table("train.parquet").to_pylist()[::-1]  # not in the store's order
    snippets = [body for language, body in _blocks(ROOT / "docs" / "prompts.md") if language == "python"]
    assert {name for body in snippets for name in ("pandas", "trl", "pairs") if name in body} == {"pandas", "trl", "pairs"}
    for body in snippets:
        names: dict[str, Any] = {"dataset": dataset}
        exec(compile(body, "snippet", "exec"), names)
        joined = names.get("pairs", names.get("frame", names["dataset"]))
        items = joined.to_dict("records") if hasattr(joined, "iloc") else joined
        expected = [weight_of[(item["question"] if "question" in item else item["prompt"])[0]["content"]] for item in items]
        assert names["weights"].array == pytest.approx([weight / sum(expected) for weight in expected])
    drawn = pyarrow_parquet().read_table("train.density.parquet")
    assert drawn.num_rows == 64
    assert drawn.column_names == ["data_source", "prompt", "reward_model", "extra_info", "embstore_draw"]


def pyarrow_parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path, helps: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`|^ +make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        if page.parent.name == "train" and module.partition(".")[0] not in OURS:
            continue  # the trainer's own, which is not installed here
        assert importlib.util.find_spec(module) is not None, module
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for span in re.findall(r"`embstore ([^`\n]+)`", text):
        name, *words = span.split()
        if name.startswith("--"):
            continue
        assert name in helps, span
        given = [word.strip("[]") for word in words if word.strip("[]").startswith("--")]
        assert [word for word in given if word not in _options_in(helps[name])] == [], span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_a_page_parses(page: Path) -> None:
    """Pages beside those that are run show commands that need a GPU, a cluster or an hour."""
    group = typer.main.get_command(app)
    for command in itertools.chain.from_iterable(map(_spellings, _commands(page))):
        if command.startswith("embstore "):
            _, name, *words = shlex.split(command)
            group.commands[name].make_context(name, words)  # type: ignore[attr-defined]  # typer's own click is private


def test_the_page_of_the_command_line_names_what_the_program_takes(helps: dict[str, str]) -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## embstore (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(helps)
    for name, shown in helps.items():
        rows = re.findall(r"^\| `([^`]+)", sections[name], re.MULTILINE)
        on_the_page = [option for row in rows for option in re.findall(r"--[a-z-]+", row)]
        assert sorted([*on_the_page, "--help"]) == sorted(_options_in(shown)), name


def test_help_of_a_build_is_short_and_all_of_it_is_one_option_away(helps: dict[str, str]) -> None:
    for name in ("build", "import"):
        short, whole = _printed(name, "--help"), helps[name]
        assert len(_options_in(short)) <= 24
        assert f"embstore {name} --help-all" in " ".join(short.split())
        advanced = _options_in(whole.partition("\nAdvanced:\n")[2])
        assert sorted([*_options_in(short), *advanced]) == sorted(_options_in(whole))
        assert len(advanced) >= 10
        if name == "build":
            panels = re.findall(r"^(\w+):$", short, re.MULTILINE)
            assert panels == ["Input", "Model", "Search", "Weights", "Resources", "Workers", "General"]


def test_help_is_whole_in_eighty_columns(helps: dict[str, str]) -> None:
    summaries = _printed("--help")
    for shown in (summaries, *helps.values()):
        assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in summaries.partition("Commands:\n")[2]


def test_the_guide_says_what_to_do_about_every_kind_of_error() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")

    def kinds(error: type[EmbstoreError]) -> set[str]:
        return {error.kind, *(kind for child in error.__subclasses__() for kind in kinds(child))}

    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \| ([^|]+) \|$", guide, re.MULTILINE)
    explained = {kind for kind, what, action in rows if len(what) > 10 and len(action) > 10}
    assert kinds(EmbstoreError) - explained == set()


def test_python_of_the_documents_is_whole() -> None:
    for page in PAGES:
        for language, body in _blocks(page):
            if language == "python":
                ast.parse(body)
