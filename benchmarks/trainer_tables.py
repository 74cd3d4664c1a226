"""Tables of ``docs/train/``: what ``embstore.training.trainers`` says of a framework, and what its tests have proven."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.tables import Report, paragraphs, table
from embstore.training.trainer_entry import Trainer
from embstore.training.trainers import TRAINERS

_KINDS = {"run": "run", "double": "a double of its contract", "parser": "its parser of settings"}


def index(report: Report) -> str:
    """Every framework with the hook, and what its tests have proven."""
    rows = []
    for each in TRAINERS:
        found = _of(each, report)
        rows.append(
            {
                "title": f"[{each.title}]({each.name}.md)",
                "versions": each.versions,
                "hook": each.hook,
                "tested": ", ".join(_versions(found)) or "nothing",
                "kind": ", ".join(dict.fromkeys(_KINDS[row["kind"]] for row in found)),
                "resumed": _stops(found),
            }
        )
    columns = {
        "framework": "{title}",
        "versions": "{versions}",
        "how the order gets in": "{hook}",
        "tested": "{tested}",
        "its own code?": "{kind}",
        "resumed exactly": "{resumed}",
    }
    return table(rows, columns)


def page(trainer: Trainer, report: Report) -> str:
    """One framework: the facts of the table, its traps, and each thing that was run."""
    facts = [
        {"fact": "versions", "is": trainer.versions},
        {"fact": "how the order gets in", "is": trainer.hook},
        {"fact": "rows are joined by", "is": trainer.joined_by},
        {"fact": "order", "is": trainer.order},
        {"fact": "after a resume", "is": trainer.resume},
    ]
    proven = [
        {"what": row["what"], "version": row["version"], "kind": _KINDS[row["kind"]], "resumed": _stops([row]), **row}
        for row in _of(trainer, report)
    ]
    parts = [table(facts, {trainer.title: "{fact}", "": "{is}"})]
    if proven:
        columns = {
            "tested": "{what}",
            "version": "{version}",
            "its own code?": "{kind}",
            "resumed exactly": "{resumed}",
            "date": "{date}",
            "test": "`{test}`",
        }
        parts.append(table(proven, columns))
    if trainer.traps:
        parts.append("Traps, each with the test that shows it:")
        parts.append("\n".join(f"- {trap.text} (`{trap.test}`)" for trap in trainer.traps))
    return paragraphs(*parts)


def _of(trainer: Trainer, report: Report) -> list[Report]:
    return [row for row in report["evidence"] if row["trainer"] == trainer.name]


def _versions(rows: Iterable[Report]) -> list[str]:
    return list(dict.fromkeys(row["version"] for row in rows))


def _stops(rows: Sequence[Report]) -> str:
    stops = sum(row["stops"] for row in rows)
    return f"{sum(row['exact'] for row in rows)} of {stops} stops" if stops else ""
