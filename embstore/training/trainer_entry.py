"""One entry of the table of trainers; ``trainers`` has the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trap:
    """What goes wrong in silence with a trainer's own settings, and what to do. ``test``: the pytest node that shows it."""

    text: str
    test: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """One framework.

    ``name`` is what ``embstore doctor --trainer`` takes, and the name of its page; ``versions`` are those with this hook.
    """

    name: str
    title: str
    versions: str
    hook: str
    joined_by: str
    order: str
    resume: str
    traps: tuple[Trap, ...] = ()
