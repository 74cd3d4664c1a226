"""The blocks of ``docs/weights.md``."""

from __future__ import annotations

import shlex

from benchmarks.tables import Report, fill, machine_of, paragraphs, table


def example(report: Report) -> str:
    """A command on real prompts, and what it prints of its factors."""
    found = report["example"]
    command = f"`embstore weights STORE {shlex.join(found['arguments'])}`, on {found['rows']:,} real prompts, prints"
    return paragraphs(command, "\n".join(["```", *found["printed"], "```"]))


def costs(report: Report) -> str:
    """Seconds at a million rows."""
    rows = [row | {"target": "yes" if row["target"] else "no"} for row in report["weights"]]
    columns = {"weights of": "{parts}", "`--target-ess`": "{target}", "seconds of a processor>": "{seconds:.1f}"}
    said = f"`python -m benchmarks.signals`, {report['rows']:,} rows, limited and mixed, on {machine_of(report)}:"
    return paragraphs(
        said, table(rows, columns), fill("Reading a field takes {field_microseconds_a_row:.1f} us a row.", report["example"])
    )
