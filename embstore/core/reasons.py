"""Why lines and rows have no vector, counted by kind: bounded, whatever the reasons name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_KINDS = 16
OTHER_KIND = "other reasons"
_KIND_CHARACTERS = 80
# a value as repr gives it, also one that was cut; not the apostrophe in "the assistant's turn"
_QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*(?:\1|$)""", re.DOTALL)
_DETAIL = re.compile(r"\s*[(;:].*$", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w-])\d+")


def reason_kind(reason: str) -> str:
    """The kind of a reason: without the values that it names.

    Examples
    --------
    >>> reason_kind("not JSON (Expecting value: line 1 column 1 (char 0))"), reason_kind("message 3 is not an object")
    ('not JSON', 'message N is not an object')
    >>> reason_kind("no prompt: none of the fields prompt, messages; the fields are question")
    'no prompt'
    """
    kind = _NUMBER.sub("N", _DETAIL.sub("", _QUOTED.sub("...", reason)))
    return " ".join(kind.split())[:_KIND_CHARACTERS] or OTHER_KIND


def count_reason(counts: dict[str, int], reason: str) -> None:
    """Add one to the kind of a reason; kinds beyond the first few are counted together."""
    kind = reason_kind(reason)
    if kind not in counts and len(counts) >= MAX_KINDS:
        kind = OTHER_KIND
    counts[kind] = counts.get(kind, 0) + 1


def counted(reasons: Iterable[str]) -> dict[str, int]:
    """How many reasons are of each kind."""
    counts: dict[str, int] = {}
    for reason in reasons:
        count_reason(counts, reason)
    return counts


def by_kind(counts: Mapping[str, int]) -> str:
    """Kinds with their counts for people, the most frequent first.

    Examples
    --------
    >>> by_kind({"empty line": 2, "not JSON": 1_200})
    'not JSON: 1,200, empty line: 2'
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind}: {count:,}" for kind, count in ordered)
