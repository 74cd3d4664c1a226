"""Which row each line of a source is: a new one, a repeat of one, or none. One pass, which keeps no text in memory.

Invariant: every line is a row (its first occurrence), a repeat of a row, or quarantined with a reason. Rows are numbered in
the order of their first lines, after quarantine, so a bad line never shifts a number. Lines are looked up by batches: one at
a time would cost more than reading them. Memory is that of a batch and of two ``KeyIndex``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embstore.core.config import PromptRule
from embstore.core.errors import PromptError
from embstore.core.events import Observer
from embstore.core.format import FileDigest
from embstore.core.prompts import Prompt, Rejected, encode_row
from embstore.core.reasons import count_reason
from embstore.core.records import PromptsRecord
from embstore.storage.hub_dataset import HubDataset
from embstore.storage.key_index import BATCH_BYTES, BATCH_KEYS, KeyIndex, keys_of, text_keys
from embstore.storage.prompt_source import Prompts, PromptSource

_BUDGET_SHARE = 8  # of --memory-budget, for each index
_KEPT_REASONS = 10


class Line(NamedTuple):
    """One line: its ``row`` (-1: none, for this ``reason``), whether that is new, and whether its id is.

    ``encoded`` is the prompt as a canonical line, with the id that was given. ``names``: no line before has this id.
    """

    row: int
    is_new: bool = False
    id: str | None = None
    names: bool = False
    digest: bytes = b""
    encoded: bytes = b""
    reason: str | None = None


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the lines so far.

    ``answered`` chats end in an assistant turn. ``undecoded`` rows are JSON text of a prompt. ``reasons`` counts quarantined
    lines by kind of reason; of the first few there are the place and the reason.
    """

    rows: int = 0
    lines: int = 0
    quarantined: int = 0
    answered: int = 0
    undecoded: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_quarantined: list[tuple[str, str]] = field(default_factory=list)

    def record(
        self, rule: PromptRule, *, fingerprint: str = "", files: dict[str, FileDigest] | None = None
    ) -> PromptsRecord:
        """What the journal says of them, and of the files that were written."""
        return PromptsRecord(
            rows=self.rows,
            lines=self.lines,
            quarantined=self.quarantined,
            repeats=self.lines - self.quarantined - self.rows,
            fingerprint=fingerprint,
            files=files or {},
            rule=rule,
            answered=self.answered,
            reasons=self.reasons,
        )


class _Read(NamedTuple):
    prompt: Prompt | Rejected
    digest: bytes
    encoded: bytes


class Placing:
    """Places the lines of an open source; iterate over it once.

    Parameters
    ----------
    source, prompts
        What is read, and its prompts.
    limit
        Stop after this many rows; None reads everything.
    folder, memory_bytes
        Where an index goes that outgrows its share of the memory budget.
    advance
        Called with the number of lines of each batch.

    Attributes
    ----------
    counts
        Up to date after the last line.
    ids
        For each given id its row and its first line, from 1.
    """

    def __init__(
        self,
        source: PromptSource,
        prompts: Prompts,
        *,
        limit: int | None,
        folder: Path,
        memory_bytes: int,
        observer: Observer,
        advance: Callable[[int], None],
    ) -> None:
        self.counts = Counts()
        self._advance = advance
        self._prompts, self._limit = prompts, limit
        # rows of an array are told apart by their ids
        self._array = None if isinstance(source, str | Path | HubDataset) else source.name
        share = memory_bytes // _BUDGET_SHARE
        self._rows = KeyIndex(folder, memory_bytes=share, name="the index of prompts", observer=observer)
        self.ids = KeyIndex(folder, memory_bytes=share, width=2, name="the index of ids", observer=observer)

    def __iter__(self) -> Iterator[Line]:
        """Every line in order, as far as the one that completes the limit.

        Raises
        ------
        PromptError
            One id was given to two prompts, or to two rows of an array.
        """
        unread = iter(self._prompts)
        while batch := self._batch(unread):
            yield from self._placed(batch)
            self._advance(len(batch))

    def _batch(self, unread: Iterator[Prompt | Rejected]) -> list[_Read]:
        """The next lines: no more than rows are left to the limit, so that nothing behind its last row is read."""
        most = BATCH_KEYS if self._limit is None else min(BATCH_KEYS, self._limit - self.counts.rows)
        batch: list[_Read] = []
        num_bytes = 0
        while len(batch) < most and num_bytes < BATCH_BYTES:
            prompt = next(unread, None)
            if prompt is None:
                break
            if isinstance(prompt, Rejected):
                batch.append(_Read(prompt, b"", b""))
                continue
            encoded = encode_row(prompt)
            num_bytes += len(encoded)
            batch.append(_Read(prompt, prompt.digest if self._array is None else prompt.id_digest, encoded))
        return batch

    def _placed(self, batch: list[_Read]) -> list[Line]:
        known_rows = iter(self._rows.find(keys_of([read.digest for read in batch if read.digest]))[:, 0].tolist())
        given = [read.prompt.id for read in batch if isinstance(read.prompt, Prompt) and read.prompt.id is not None]
        known_ids = dict(zip(given, self.ids.find(text_keys(given)).tolist(), strict=True))
        new_rows: dict[bytes, int] = {}
        new_ids: dict[str, tuple[int, int]] = {}
        placed: list[Line] = []
        counts = self.counts
        for prompt, digest, encoded in batch:
            counts.lines += 1
            if isinstance(prompt, Rejected):
                self._count_rejected(prompt.reason)
                placed.append(Line(-1, reason=prompt.reason))
                continue
            row = next(known_rows)
            if row < 0:
                row = new_rows.setdefault(digest, counts.rows)
            is_new = row == counts.rows
            names = False
            if prompt.id is not None:
                before = new_ids.get(prompt.id) or known_ids[prompt.id]
                names = before[0] < 0
                if names:
                    new_ids[prompt.id] = row, counts.lines
                else:
                    self._refuse_second(prompt.id, row, *before)
            counts.rows += is_new
            counts.undecoded += is_new and prompt.undecoded() is not None
            counts.answered += prompt.is_answered
            placed.append(Line(row, is_new, prompt.id, names, digest, encoded))
        if new_rows:
            self._rows.add(keys_of(list(new_rows)), np.array([*new_rows.values()], dtype=np.int64)[:, None])
        if new_ids:
            self.ids.add(text_keys(list(new_ids)), np.array([*new_ids.values()], dtype=np.int64))
        return placed

    def _count_rejected(self, reason: str) -> None:
        counts = self.counts
        counts.quarantined += 1
        count_reason(counts.reasons, reason)
        if len(counts.first_quarantined) < _KEPT_REASONS:
            counts.first_quarantined.append((self._prompts.where(counts.lines), reason))

    def _refuse_second(self, prompt_id: str, row: int, known_row: int, known_line: int) -> None:
        """Refuse the last line read if its id is another row's."""
        line = self.counts.lines
        if self._array is not None:
            raise PromptError(
                f"{self._array}: id {prompt_id!r} names two rows, {known_line - 1} and {line - 1}",
                hint="give each row of the array a different id",
            )
        if known_row != row:
            where = self._prompts.where
            raise PromptError(
                f"id {prompt_id!r} names two different prompts: {where(known_line)} and {where(line)}",
                hint="give one of them another id; where ids are numbered per source, name a field that is unique with "
                "--id-field FIELD (a FIELD that no line has: ids are derived from the texts)",
            )
