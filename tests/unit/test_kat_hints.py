"""Hints of the library, as the kat scripts print them: only flags that the script has, and its command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.kat_hints import spelled

PACKAGE = Path(__file__).parents[2] / "embstore"
# what no kat script calls
NOT_CALLED = (
    "cli",
    "core/factors.py",
    "core/weight_parts.py",
    "flow/scores.py",
    "flow/weight_factors.py",
    "integrations/axolotl.py",
    "integrations/nemo_rl.py",
    "integrations/sampler.py",
    "integrations/slime.py",
    "integrations/verl.py",
    "views",
    "engines/ray.py",
    "training/file_resampling.py",
    "training/dataset_file.py",
    "training/drawn_lines.py",
    "training/trainer",
)
NOT_SAID = {"--resume was not given", "give another --name"}  # of a build that is not resumed, and of embstore weights
MODULE = "scripts.kat_compute_embeddings_offline"
COMPUTE = f"python -m {MODULE}"
OTHER_COMMANDS = re.compile(rf"(?:embstore \w+|hf download) [^,;]*|{re.escape(COMPUTE)}(?: --\w+ \S+)*")


def texts_of(path: Path) -> Iterator[str]:
    """Strings of a module with X for what is filled in; no docstrings."""
    tree = ast.parse(path.read_text())
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # a docstring, or a call whose arguments come later
            parts |= {id(node.value)}
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in ast.walk(node)} - {id(node)}
            if id(node) not in parts:
                yield "".join(str(value.value) if isinstance(value, ast.Constant) else "X" for value in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def advice() -> list[str]:
    """Everything in the library that names an option or the command to build: hints, and what they are made of."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if not path.relative_to(PACKAGE).as_posix().startswith(NOT_CALLED):
            found.update(
                text for text in texts_of(path) if " " in text and re.search(r"--[a-z]|embstore build|PROMPTS", text)
            )
    return sorted(found - NOT_SAID)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """What the offline pass takes: its own options, and those of ``embstore build`` with underscores."""
    words = []
    for module in (MODULE, "embstore"):
        arguments = ["--help"] if module == MODULE else ["build", "--help-all"]
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
        words += re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout)
    taken = {f"--{word[2:].replace('-', '_')}" for word in words}
    return taken - {"--out", "--resume", "--dry_run", "--json", "--help_all"}


def test_every_hint_names_flags_of_the_offline_pass_or_of_a_whole_other_command(flags: set[str]) -> None:
    hints = advice()
    assert len(hints) > 80
    assert any("embstore build --resume" in hint for hint in hints)
    for hint in hints:
        shown = spelled(hint, flags)
        assert "embstore build" not in shown, hint
        assert "PROMPTS" not in shown.replace("--prompts_path PROMPTS", ""), hint
        named = re.findall(r"(?<![\w-])--[a-z][\w-]*", OTHER_COMMANDS.sub("", shown))
        assert set(named) <= flags, (hint, shown)


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("run embstore build --resume --out /a/b", f"run {COMPUTE} --output_dir /a/b again"),
        (
            "run embstore verify S --repair, then embstore build --resume",
            f"run embstore verify S --repair, then {COMPUTE} again",
        ),
        (
            "to embed only the prompts that are new: embstore build 'my prompts.jsonl' --model nanochat:base --out s-new "
            "--resume --reuse s",
            "to embed only the prompts that are new: "
            f"{COMPUTE} --prompts_path 'my prompts.jsonl' --model nanochat:base --output_dir s-new --reuse s",
        ),
        (
            "fix the file system, then run the command again (a build: with --resume)",
            "fix the file system, then run the command again",
        ),
        ("run the same command with --resume to continue", "run the same command again to continue"),
        ("resume with --on-error quarantine, or remove it", "resume with --on_error quarantine, or remove it"),
        ("build into another --out", "build into another --output_dir"),
        ("gzip -dc F | embstore build - ...", f"gzip -dc F | {COMPUTE} --prompts_path - ..."),
    ],
)
def test_a_hint_in_the_words_of_the_offline_pass(hint: str, shown: str, flags: set[str]) -> None:
    assert spelled(hint, flags) == shown


def test_options_that_a_script_does_not_have_are_named_as_those_of_embstore() -> None:
    assert spelled("free some space, choose another --out, or try --limit", {"--out_dir"}) == (
        "free some space, choose another --out, or try --limit (--out, --limit: of embstore build, not of this script)"
    )
    assert spelled("add --trust-tokenizer-pickle", {"--trust_tokenizer_pickle"}) == "add --trust_tokenizer_pickle"
    assert spelled("choose another --out", {"--out"}) == "choose another --out"
