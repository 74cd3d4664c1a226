"""Names of the rows of an array to import."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from embstore.core.config import CURRENT_RULE, PromptRule
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt, Rejected, named_record, named_row, parse_named_row
from embstore.storage.prompt_source import open_records


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIds:
    """Names of ``num_rows`` rows: from a file (text with one id per line, a JSON list, or JSONL), or the row numbers.

    A JSONL line may have a prompt in addition to its id, as for ``build``; a line without an id gets its row number.
    """

    path: Path | None
    num_rows: int

    @property
    def name(self) -> str:
        """The path of the file, for messages."""
        return str(self.path) if self.path is not None else "row numbers"

    def prompts(self, rule: PromptRule = CURRENT_RULE) -> Generator[Prompt, None, None]:
        """As ``RowNames``.

        Raises
        ------
        PromptError
            The file cannot be read, a line does not name a row, or the number of names differs from that of the rows.
        """
        if self.path is None:
            yield from (Prompt(id=str(row), text="") for row in range(self.num_rows))
            return
        count = 0
        for prompt in self._read(rule):
            if isinstance(prompt, Rejected):
                raise PromptError(
                    f"{self.path} line {count + 1} does not name a row: {prompt.reason}",
                    hint="every row of the array needs an id; correct the line",
                )
            if count < self.num_rows:
                yield prompt if prompt.id is not None else dataclasses.replace(prompt, id=str(count))
            count += 1
        if count != self.num_rows:
            raise PromptError(
                f"{self.path} names {count} rows, the array has {self.num_rows}", hint="give one id for each row, in order"
            )

    def _read(self, rule: PromptRule) -> Iterator[Prompt | Rejected]:
        if self.path is None:
            raise AssertionError("row numbers need no file")
        with open_records(self.path, rule=rule) as records:
            is_text: bool | None = None
            for record in records:
                if is_text is None:  # lines of text, or of JSON
                    is_text = records.is_lines and isinstance(record, bytes) and record.lstrip()[:1] not in (b"{", b'"')
                if isinstance(record, bytes):
                    yield _text_id(record) if is_text else parse_named_row(record, rule=rule)
                else:
                    yield record if isinstance(record, Rejected) else named_record(record, rule)


def _text_id(line: bytes) -> Prompt | Rejected:
    try:
        return named_row(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Rejected(reason=f"not UTF-8 (byte {error.start})")
