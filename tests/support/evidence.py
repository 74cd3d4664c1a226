"""What the tests have proven of trainers: written by ``pytest --trainer-report``, shown in docs/train/README.md.

A test notes it as its last step, after it has compared the trainer's order with the plan.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One run of a trainer's code.

    ``kind``: "run" if the framework's own code ran, "double" if a copy of its contract did, "parser" if only its parser of
    settings did. ``what`` says which part of it. ``stops`` is how often a run was stopped and resumed, ``exact`` how many of
    these continued exactly.
    """

    trainer: str
    version: str
    kind: Literal["run", "double", "parser"]
    what: str
    test: str
    stops: int = 0
    exact: int = 0


def write_evidence(path: Path, noted: list[Evidence]) -> None:
    """The report as JSON; what several cases of a test note of the same part is one entry, with the sum of its stops."""
    merged: dict[tuple[str, ...], Evidence] = {}
    for each in noted:
        key = (each.trainer, each.version, each.kind, each.what, each.test)
        before = merged.get(key)
        if before is not None:
            each = dataclasses.replace(each, stops=each.stops + before.stops, exact=each.exact + before.exact)  # noqa: PLW2901
        merged[key] = each
    date = datetime.now(UTC).date().isoformat()
    rows = [dataclasses.asdict(merged[key]) | {"date": date} for key in sorted(merged)]
    path.write_text(json.dumps({"evidence": rows}, indent=2) + "\n", encoding="utf-8")
