"""What is recorded of each causal class of one version of transformers: ``classes.toml``."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path

FILE = Path(__file__).with_name("classes.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What a model type is recorded to do, and what the test must find.

    ``how`` is "right" (its rows are its class's own; ``head`` is their kind), "wrong" (they are not), "refused" (embstore
    stops before any row) or "impossible" (the class does not answer to tokens alone, with embstore or without). The last two
    stop with an error of the class ``raises`` that says ``message``.
    """

    how: str
    head: str = ""
    raises: str = ""
    message: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The version of transformers that the record is of, its model types, and what is peculiar to some of them."""

    transformers: str
    expected: dict[str, Expected]
    keeps_state: dict[str, str]  # what, by model type
    plain_only: dict[str, str]  # reasons, by model type
    float32_only: dict[str, str]  # as above


@functools.cache
def read_record() -> Record:
    """The record as it is committed."""
    found = tomllib.loads(FILE.read_text())
    expected = {
        model_type: Expected(how="right", head=head)
        for head, names in found["right"].items()
        for model_type in names.split()
    }
    for how in ("wrong", "refused", "impossible"):
        expected |= {model_type: Expected(how=how, **told) for model_type, told in found.get(how, {}).items()}
    return Record(
        transformers=found["transformers"],
        expected=expected,
        keeps_state=found.get("keeps_state", {}),
        plain_only=found.get("plain_only", {}),
        float32_only=found.get("float32_only", {}),
    )
