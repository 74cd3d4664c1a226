"""What became of the lines of a pool: judged before the model runs, and said again at the end, where it is still read."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import PromptError, RowError
from embstore.core.events import Notice
from embstore.core.prompts import collapse_whitespace
from embstore.core.reasons import by_kind, counted
from embstore.core.records import REFUSED_BY_TEMPLATE, JournalState, PromptsRecord
from embstore.core.spec import StoreSpec
from embstore.flow.run import RunContext
from embstore.storage.prompt_table import PromptTable

_WORRYING_SHARE = 0.01  # of lines without a usable prompt
_MOST_GROUPS = 1000  # that are looked at
_TEMPLATE_CHARACTERS = 16  # of markers before a chat's first words


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSummary:
    """Counts of lines, and of rows without a vector, each with its reasons by kind.

    ``truncated`` of ``computed`` rows were longer than max_tokens. ``cut_alike`` rows, in ``cut_groups`` groups, share their
    vector with a different prompt because both were cut; ``cut_ids`` are the ids of two of them. Where not
    ``is_whole``, only the first thousand groups of equal vectors were looked at.
    """

    lines: int
    repeats: int
    quarantined: int
    quarantined_by: dict[str, int]
    failed: int
    failed_by: dict[str, int]
    truncated: int
    computed: int
    max_tokens: int
    cut_alike: int
    cut_groups: int
    cut_ids: tuple[str, ...]
    is_whole: bool = True

    def lines_of_text(self) -> list[str]:
        """The same for people, one sentence a line."""
        quarantined = f" ({by_kind(self.quarantined_by)})" if self.quarantined_by else ""
        lines = f"from {_number(self.lines, 'line')}: {_number(self.repeats, 'repeat')}, {self.quarantined:,} quarantined"
        failed = f"; {_number(self.failed, 'row')} without a vector ({by_kind(self.failed_by)})" if self.failed else ""
        text = [f"{lines}{quarantined}{failed}"]
        if self.truncated:
            share, of = self.truncated / max(1, self.computed), _number(self.computed, "prompt")
            text.append(f"{self.truncated:,} of {of} ({share:.1%}) were cut at {self.max_tokens:,} tokens")
        if self.cut_alike:
            groups, such_as = _number(self.cut_groups, "group"), " and ".join(map(repr, self.cut_ids))
            count = f"{'' if self.is_whole else 'at least '}{self.cut_alike:,}"
            alike = f"{count} different prompts share a vector with others, in {groups}"
            text.append(f"{alike}, because they were cut (such as {such_as}): a larger --max-tokens tells them apart")
        return text


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summarize(table: PromptTable, spec: StoreSpec, state: JournalState, groups_N: NDArray[np.int32]) -> PoolSummary:
    """What the journal of a finished store says of its pool; a few prompts are read where some were cut."""
    prompts = state.prompts
    if prompts is None:
        raise AssertionError("a finished store has prompts")
    truncated = sum(window.truncated for window in state.windows.values())
    cut = _cut_alike(table, spec, groups_N) if truncated else (0, 0, (), True)
    return PoolSummary(
        lines=prompts.lines,
        repeats=prompts.repeats,
        quarantined=prompts.quarantined,
        quarantined_by=prompts.reasons,
        failed=len(state.failed),
        failed_by=counted(failed.reason for failed in state.failed),
        truncated=truncated,
        computed=spec.rows - sum(rows.num_rows for rows in state.reused),
        max_tokens=spec.embedding.max_tokens,
        cut_alike=cut[0],
        cut_groups=cut[1],
        cut_ids=cut[2],
        is_whole=cut[3],
    )


def _cut_alike(table: PromptTable, spec: StoreSpec, groups_N: NDArray[np.int32]) -> tuple[int, int, tuple[str, ...], bool]:
    """Rows and groups whose vector is a different prompt's because of the cut, two ids, and whether all groups were read."""
    sizes_N = np.bincount(groups_N[groups_N >= 0], minlength=spec.rows)
    firsts = np.flatnonzero(sizes_N > 1)
    is_whole, firsts = len(firsts) <= _MOST_GROUPS, firsts[:_MOST_GROUPS]
    if not len(firsts):
        return 0, 0, (), True
    others = _second_members(groups_N, firsts)
    num_rows = num_groups = 0
    ids: tuple[str, ...] = ()
    for first, other in zip(firsts.tolist(), others, strict=True):
        left, right = table.sample([first, other])
        if _is_cut_alike(left.rendered, right.rendered, spec.embedding.max_tokens):
            num_rows, num_groups = num_rows + int(sizes_N[first]), num_groups + 1
            ids = ids or (str(left.id), str(right.id))
    return num_rows, num_groups, ids, is_whole


def _second_members(groups_N: NDArray[np.int32], firsts: NDArray[np.int64]) -> list[int]:
    """Of each group, named by its first row, the second row."""
    members = np.flatnonzero((groups_N >= 0) & (groups_N != np.arange(len(groups_N))))
    found, at = np.unique(groups_N[members], return_index=True)
    seconds: list[int] = members[at[np.searchsorted(found, firsts)]].tolist()
    return seconds


def _is_cut_alike(left: str, right: str, max_tokens: int) -> bool:
    """Whether two prompts of one vector differ behind the cut, and not only in what a tokenizer takes for the same.

    They have ``max_tokens`` tokens in common then, and a character makes at most four.
    """
    left, right = (collapse_whitespace(unicodedata.normalize("NFKC", text)).casefold() for text in (left, right))
    shared = len(os.path.commonprefix([left, right]))  # noqa: RUF071 - of any two strings
    return left != right and 4 * (shared + _TEMPLATE_CHARACTERS) >= max_tokens


def judge_quarantined(
    context: RunContext, record: PromptsRecord, *, lists: str, refused: int = 0, has_rows: bool = False
) -> None:
    """Say how many lines are left out, and how many chats ``refused``; too many are an error before the model runs.

    ``lists`` says where they are listed, or which they are. A store that ``has_rows`` is not refused.

    Raises
    ------
    PromptError, RowError
        They are a larger share than ``--max-quarantined``. RowError: with refused chats.
    """
    without = record.quarantined + refused
    if not without:
        return
    most, share = context.config.max_quarantined, without / record.lines
    reasons = {**record.reasons, **({REFUSED_BY_TEMPLATE: refused} if refused else {})}
    kinds = f" ({by_kind(reasons)})" if reasons else ""
    found = f"{without:,} of {record.lines:,} lines ({share:.1%}) contain no usable prompt{kinds}"
    if share > most and not has_rows:
        raise (RowError if refused else PromptError)(
            f"{found}, more than --max-quarantined {most:g}",
            hint=f"correct them, or name the fields (--text-field, --messages-field); {lists}; --max-quarantined takes more",
        )
    left = "get no vector" if refused else "were left out"
    context.observer(Notice(message=f"{found} and {left}; {lists}", is_warning=share > _WORRYING_SHARE))
