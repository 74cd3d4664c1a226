"""Put measured figures into ``docs/reliability.md``: ``python -m scripts.reliability_table``.

``make test-faults`` writes ``benchmarks/results/faults.json``, ``python -m benchmarks.peer_power_cuts`` writes
``peer_power_cuts.json`` beside it; the page shows both, and a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "faults.json"
PEERS = ROOT / "benchmarks" / "results" / "peer_power_cuts.json"
PAGE = ROOT / "docs" / "reliability.md"

_BEGIN, _END = "<!-- {}: made by python -m scripts.reliability_table -->\n", "<!-- end of {} -->\n"

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


def peers(report: dict[str, Any]) -> str:
    """What each writer lost of what it had reported, as Markdown."""
    rows = report["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    places = list(dict.fromkeys((row["file_system"], row["log"]) for row in rows))
    lines = [
        f"`{report['command']}`, {rows[0]['cuts']} cuts a cell, {versions}: lost or wrong, of those reported as written.",
        "",
        "| | " + " | ".join(f"{kind}, {log}" for kind, log in places) + " |",
        "|---" + "|---:" * len(places) + "|",
    ]
    for writer in dict.fromkeys(row["writer"] for row in rows):
        cells = {(row["file_system"], row["log"]): row for row in rows if row["writer"] == writer}
        shown = [f"{cells[place]['lost_or_wrong']} of {cells[place]['reported']}" for place in places]
        lines.append(f"| {writer} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """The page with its figures replaced by those of the results files."""
    for name, content in (
        ("figures", figures(json.loads(REPORT.read_text()))),
        ("peers", peers(json.loads(PEERS.read_text()))),
    ):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def _sum(rows: list[dict[str, Any]], field: str) -> int:
    return sum(row[field] for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
