"""Names of the rows of an array to import."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from embstore.core.config import CURRENT_RULE, PromptRule
from embstore.core.decode import shown
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt, Rejected, content_fields, named_record, named_row, parse_named_row
from embstore.storage.prompt_source import open_records


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIds:
    """Names of ``num_rows`` rows: from a file (text with one id per line, or whatever ``build`` reads), or the row numbers.

    A line may have a prompt in addition to its id, as for ``build``; one without an id gets its row number. A table needs a
    column ``id`` or one with prompts.
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
            if count < self.num_rows:
                yield prompt if prompt.id is not None else dataclasses.replace(prompt, id=str(count))
            count += 1
        if count != self.num_rows:
            raise PromptError(
                f"{self.path} names {count} rows, the array has {self.num_rows}", hint="give one id for each row, in order"
            )

    def _read(self, rule: PromptRule) -> Iterator[Prompt]:
        if self.path is None:
            raise AssertionError("row numbers need no file")
        with open_records(self.path, rule=rule) as records:
            is_text: bool | None = None
            for count, record in enumerate(records, start=1):
                if is_text is None:  # lines of text, or of JSON
                    is_text = records.is_lines and isinstance(record, bytes) and record.lstrip()[:1] not in (b"{", b'"')
                if isinstance(record, bytes):
                    named = _text_id(record) if is_text else parse_named_row(record, rule=rule)
                elif isinstance(record, Rejected):
                    named = record
                else:
                    self._check_columns(record)
                    named = named_record(record, rule)
                if isinstance(named, Rejected):
                    raise PromptError(
                        f"{records.where(count)} does not name a row: {named.reason}",
                        hint="every row of the array needs an id; correct the line",
                    )
                yield named

    def _check_columns(self, row: Mapping[str, object]) -> None:
        """A table has every column on every row; the first line of a CSV file is always its header."""
        if not row.keys() & {"id", *content_fields()}:
            raise PromptError(
                f"{self.path} has neither a column id nor a prompt; its columns are {', '.join(map(shown, row))[:200]}",
                hint='name the column "id"; a file of bare ids, one per line, has another ending, such as .txt',
            )


def _text_id(line: bytes) -> Prompt | Rejected:
    try:
        return named_row(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Rejected(reason=f"not UTF-8 (byte {error.start})")
