"""How many faults the tests injected and what was lost: written by ``pytest --fault-report``, shown in docs/reliability.md.

A test counts each fault *after* it judged it, a loss included, and then asserts that nothing was lost: a report with losses
is a report of a failed run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True, slots=True)
class Row:
    """One row of the table: a kind of fault, how often it was injected, what was lost or wrong afterwards."""

    fault: str
    test: str
    cycles: int = 0
    losses: int = 0


@dataclass(kw_only=True, slots=True)
class Tally:
    """All rows of one pytest session, by fault."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count the faults of ``row`` in."""
        known = self.rows.setdefault((row.test, row.fault), Row(fault=row.fault, test=row.test))
        known.cycles, known.losses = known.cycles + row.cycles, known.losses + row.losses

    def write(self, path: Path, *, seconds: float, passed: bool) -> None:
        """The report as JSON; machine facts without names, paths or times of day."""
        report = {
            "passed": passed,
            "seconds": round(seconds, 1),
            "python": platform.python_version(),
            "kernel": platform.release().split("-")[0],
            "cores": os.cpu_count(),
            "root": os.geteuid() == 0,
            "faults": [dataclasses.asdict(row) for row in sorted(self.rows.values(), key=lambda row: (row.test, row.fault))],
        }
        path.write_text(json.dumps(report, indent=2) + "\n")


@dataclass(kw_only=True, slots=True)
class Counter:
    """The rows of one test."""

    tally: Tally
    test: str

    def __call__(self, fault: str, *, cycles: int = 1, losses: int = 0) -> None:
        """Add ``cycles`` faults of this kind, ``losses`` of them with something lost, wrong or not found."""
        self.tally.add(Row(fault=fault, test=self.test, cycles=cycles, losses=losses))
