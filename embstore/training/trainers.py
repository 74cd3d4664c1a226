"""The trainers that embstore was tried with: where the order of prompts comes from, how rows are joined, what to beware of.

One table: ``embstore doctor`` prints it, and the pages in ``docs/train/`` show it together with what was tested. It is only
data, so that neither needs an installed trainer.
"""

from __future__ import annotations

from embstore.core.errors import ConfigError
from embstore.training.trainer_entry import Trainer
from embstore.training.trainers_with_file import WITH_FILE
from embstore.training.trainers_with_hook import WITH_HOOK

TRAINERS: tuple[Trainer, ...] = tuple(sorted((*WITH_HOOK, *WITH_FILE), key=lambda each: each.name))


def trainer_of(name: str) -> Trainer:
    """The entry of this name.

    Raises
    ------
    ConfigError
        No entry has it.
    """
    for each in TRAINERS:
        if each.name == name:
            return each
    raise ConfigError(
        f"{name!r} is not the name of a trainer: {', '.join(each.name for each in TRAINERS)}",
        hint="any other trainer can read a file of draws: embstore resample",
    )
