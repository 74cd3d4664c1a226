"""The trainers that embstore was tried with: where the order of prompts comes from, how rows are joined, what to beware of.

One table: ``embstore doctor`` prints it, and the pages in ``docs/train/`` show it together with what was tested. It is only
data, so that neither needs an installed trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

from embstore.core.errors import ConfigError


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


TRAINERS: tuple[Trainer, ...] = ()


def trainer_of(name: str) -> Trainer:
    """The entry of this name.

    Raises
    ------
    ConfigError
        There is none.
    """
    for each in TRAINERS:
        if each.name == name:
            return each
    raise ConfigError(
        f"there is no trainer named {name!r}: {', '.join(each.name for each in TRAINERS)}",
        hint="a trainer without a name here reads a file: embstore resample",
    )
