"""Refuse constructions that read as translated: ``python -m scripts.check_english [FILE ...]``, part of ``make lint``.

The rules are in ``english.toml``. In Python files only strings, docstrings and comments are read, in Markdown files all but
fenced code blocks. A phrase is found across line breaks and across the pieces of a string.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RULES = Path(__file__).with_name("english.toml")
# Records of what was decided, and of what was measured, stay as they were written.
CHECKED = ("embstore/**/*.py", "scripts/*.py", "*.md", "docs/*.md", "docs/train/*.md", "benchmarks/*.md")
NOT_CHECKED = ("CHANGELOG.md",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A pattern that is refused, what to write instead, and phrases that contain it and are right."""

    pattern: re.Pattern[str]
    instead: str
    catches: tuple[str, ...]
    allows: tuple[str, ...]
    exceptions: tuple[str, ...]

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        """Matches in text with single spaces, exceptions left out."""
        allowed = [found.span() for phrase in self.exceptions for found in re.finditer(re.escape(phrase), text)]
        for match in self.pattern.finditer(text):
            if not any(start <= match.start() and match.end() <= stop for start, stop in allowed):
                yield match


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A refused phrase with its place and surroundings."""

    line: int
    phrase: str
    excerpt: str
    instead: str


def read_rules(document: dict[str, Any]) -> list[Rule]:
    """Rules of the parsed ``english.toml``."""
    exceptions = [entry["phrase"] for entry in document.get("exception", [])]
    return [
        Rule(
            pattern=re.compile(entry["pattern"], re.IGNORECASE),
            instead=entry["instead"],
            catches=tuple(entry["catches"]),
            allows=tuple(entry["allows"]),
            exceptions=tuple(exceptions),
        )
        for entry in document["rule"]
    ]


def find(source: str, rules: Sequence[Rule], *, is_python: bool) -> list[Finding]:
    """Refused phrases of one file, in the order of its lines."""
    found = []
    for first_line, text in python_texts(source) if is_python else [(1, _without_code_blocks(source))]:
        collapsed, starts = _collapse(text)
        for rule in rules:
            for match in rule.matches(collapsed):
                line = first_line + bisect_right(starts, match.start()) - 1
                excerpt = collapsed[max(0, match.start() - 30) : match.end() + 30].strip()
                found.append(Finding(line=line, phrase=match.group(), excerpt=excerpt, instead=rule.instead))
    return sorted(found, key=lambda finding: finding.line)


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of every string (``{}`` for what an f-string inserts) and of every run of comments."""
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):  # breadth first: an f-string comes before its pieces
        if isinstance(node, ast.JoinedStr):
            pieces = [piece for piece in node.values if isinstance(piece, ast.Constant)]
            inside.update(pieces)
            yield (
                node.lineno,
                "".join(str(piece.value) if isinstance(piece, ast.Constant) else "{}" for piece in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value
    first_line, column, lines = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start != (first_line + len(lines), column):  # another run of comments
                if lines:
                    yield first_line, "\n".join(lines)
                first_line, column, lines = *token.start, []
            lines.append(token.string.lstrip("#"))
    if lines:
        yield first_line, "\n".join(lines)


def _without_code_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```$", lambda block: "\n" * block.group().count("\n"), page, flags=re.MULTILINE | re.DOTALL)


def _collapse(text: str) -> tuple[str, list[int]]:
    """Text with single spaces, and where each of its lines starts in it."""
    collapsed, starts = "", list[int]()
    for line in text.split("\n"):
        words = " ".join(line.split())
        collapsed += " " if collapsed and words and not collapsed.endswith(" ") else ""
        starts.append(len(collapsed))
        collapsed += words
    return collapsed, starts


def main(arguments: Sequence[str]) -> int:
    """Check files (all by default), print what is refused; 1 if anything is."""
    rules = read_rules(tomllib.loads(RULES.read_text(encoding="utf-8")))
    every = [path for glob in CHECKED for path in sorted(ROOT.glob(glob)) if path.name not in NOT_CHECKED]
    files = [Path(name).resolve() for name in arguments] or every
    failures = 0
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found = find(path.read_text(encoding="utf-8"), rules, is_python=path.suffix == ".py")
        failures += len(found)
        for finding in found:
            print(f"{name}:{finding.line}: {finding.phrase!r} in '...{finding.excerpt}...': {finding.instead}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
