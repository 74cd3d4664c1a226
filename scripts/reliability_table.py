"""Put the figures of a fault run into ``docs/reliability.md``: ``python -m scripts.reliability_table``.

``make test-faults`` writes ``benchmarks/results/faults.json``; the page shows it, and a test compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"

_BEGIN, _END = "<!-- figures: made by python -m scripts.reliability_table -->\n", "<!-- end of figures -->\n"

# what a row's fault begins with -> what the rows that begin so are together
SUMS = {
    "SIGKILL at a random moment": "kills at random moments",
    "SIGKILL at the n-th": "kills at system calls, one at every call",
    ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE"): "errors injected into system calls",
    "power cut, ": "power cuts of real file systems",
    "power cut": "modelled power cuts",
    "full disk": "really full disks",
    "left-out sync": "mutations: one kind of sync left out",
    (
        "flipped",
        "truncated",
        "emptied",
        "deleted",
        "zeroed",
        "swapped",
        "journal",
        "damaged",
    ): "kinds of bit rot, each in place",
    "hostile": "hostile files",
}


def figures(report: dict[str, Any]) -> str:
    """The sums and the table of one run, as Markdown."""
    faults = report["faults"]
    user = "root" if report["root"] else "an unprivileged user"
    lines = [
        f"One run of `make test-faults`: {report['seconds'] / 60:.0f} minutes on {report['cores']} cores as {user}, "
        f"Linux {report['kernel']}, Python {report['python']}.",
        "",
        "| together | times | lost, wrong or missed |",
        "|---|---:|---:|",
    ]
    left = list(faults)
    for starts, title in SUMS.items():
        rows = [row for row in left if row["fault"].startswith(starts)]
        left = [row for row in left if row not in rows]
        lines.append(f"| {title} | {_sum(rows, 'cycles'):,} | {_sum(rows, 'losses')} |")
    lines += [
        f"| everything else below | {_sum(left, 'cycles'):,} | {_sum(left, 'losses')} |",
        "",
        "| fault | times | lost, wrong or missed | test |",
        "|---|---:|---:|---|",
        *(f"| {row['fault']} | {row['cycles']:,} | {row['losses']} | `{row['test']}` |" for row in faults),
        "",
    ]
    return "\n".join(lines)


def page(text: str, report: dict[str, Any]) -> str:
    """The page with its figures replaced by those of ``report``."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{figures(report)}\n{_END}{after}"


def _sum(rows: list[dict[str, Any]], field: str) -> int:
    return sum(row[field] for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), json.loads(REPORT.read_text())), encoding="utf-8")
