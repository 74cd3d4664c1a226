"""Shared by the kat scripts: the places of their files, the meaning of a line, and how an expected error ends a script.

A file of *pairs* has lines ``{"id", "prefix" or "prompt", "chosen", "rejected", "src", "prefix_id"}``; ``id`` names the
pair, so its prompt's id is ``prefix_id``, or derived from the text. A file of *prompts* has lines ``{"id", "prefix" or
"prompt"}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embstore.core.decode import printable
from embstore.core.errors import EmbstoreError, PromptError
from embstore.core.prompts import Message, Prompt, Rejected, collapse_whitespace
from embstore.storage.prompt_source import Record, open_records, read_record

PAIRS = "pairs_all.jsonl"
PREFIXES, PREFIX_MAP = "prefixes_all.jsonl", "prefix_id_map.tsv"
PROMPTS, PROMPT_MAP = "prompts_all.jsonl", "prompt_id_map.tsv"
STATS = "stats.txt"
STORE = "embeddings_offline"

_SHOWN_SKIPS = 5


def base_folder() -> Path:
    """``$NANOCHAT_BASE_DIR``, or ``~/.cache/nanochat``."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def data_folder() -> Path:
    """The default folder of the scripts' data files."""
    return base_folder() / "data"


def require(path: Path, *, command: str) -> Path:
    """``path`` if it exists; otherwise raises a PromptError that names the command which makes it."""
    if not path.exists():
        raise PromptError(f"{path} does not exist", hint=f"run {command}")
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLine:
    """A line with a prompt. ``number`` counts from 1; ``prompt.fields`` are the line's other fields."""

    number: int
    prompt: Prompt

    @property
    def is_pair(self) -> bool:
        """Whether the line is a preference pair; its ``id`` is then not the id of its prompt."""
        return "chosen" in self.prompt.fields and "rejected" in self.prompt.fields

    @property
    def given_id(self) -> str | None:
        """The prompt's id as the line gives it, None if it does not."""
        given = self.prompt.fields.get("prefix_id") if self.is_pair else self.prompt.id
        return given if isinstance(given, str) and given else None

    @property
    def prompt_id(self) -> str:
        """The prompt's given id, or one derived from its first user message, which other prompts may share."""
        return self.given_id or self.prompt.derived_id

    @property
    def joined_id(self) -> str | None:
        """The id by which a prompt of another text may be joined: the given one, or a pair's derived one.

        The prompts of pairs are made by that id: the first conversation of each first user message is kept.
        """
        return self.prompt_id if self.is_pair else self.given_id

    @property
    def content_id(self) -> str:
        """What tells the prompt's content from others."""
        return self.prompt.digest.hex()

    @property
    def record(self) -> dict[str, object]:
        """The prompt as an item of a dataset."""
        prompt = self.prompt
        if prompt.messages is None:
            return {"prompt": prompt.text}
        return {"messages": prompt.messages, "tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}

    @property
    def messages(self) -> list[Message]:
        """The prompt as a chat; text becomes one user message."""
        if self.prompt.messages is not None:
            return list(self.prompt.messages)
        return [{"role": "user", "content": self.prompt.text or ""}]

    @property
    def first_user_text(self) -> str:
        """Whitespace-collapsed content of the first user message; empty if there is none."""
        first = next((str(message["content"]) for message in self.messages if message["role"] == "user"), "")
        return collapse_whitespace(first)

    @property
    def source(self) -> str:
        """The line's ``src``."""
        return str(self.prompt.fields.get("src") or "unknown")


def read_lines(path: Path, *, report: Callable[[str], None]) -> Iterator[PromptLine]:
    """Every line of a JSONL file (gzip allowed) with a prompt; the first five others and their count are reported."""
    skipped = 0
    with open_records(path) as records:
        for number, record in enumerate(records, start=1):
            prompt = read_record(_with_one_prompt(record))
            if isinstance(prompt, Prompt):
                yield PromptLine(number=number, prompt=prompt)
                continue
            skipped += 1
            if skipped <= _SHOWN_SKIPS:
                report(f"warning: skipped line {number} of {path.name}: {_reason(prompt)}")
    if skipped > _SHOWN_SKIPS:
        report(f"warning: skipped {skipped} lines of {path.name} in total")


def _with_one_prompt(record: Record) -> Record:
    """The record without its ``prompt`` if it also has a ``prefix``: the older field counts only if it is alone."""
    if isinstance(record, bytes):
        if b'"prefix"' not in record or b'"prompt"' not in record:
            return record
        try:
            found = json.loads(record)
        except (ValueError, RecursionError):
            return record  # read_record reports what is wrong with it
    else:
        found = record
    if not isinstance(found, dict) or found.get("prefix") is None:
        return record
    return {name: value for name, value in found.items() if name != "prompt"}


def _reason(rejected: Rejected) -> str:
    return printable(rejected.reason)


def run(main: Callable[[], object]) -> None:
    """Run a script: an expected error prints two lines on stderr and sets its exit code; a bug keeps its traceback."""
    try:
        main()
    except EmbstoreError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
        sys.exit(int(error.exit_code))
