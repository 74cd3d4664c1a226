"""Put measured figures into ``docs/reliability.md``: ``python -m scripts.reliability_table``.

``make test-faults`` writes ``benchmarks/results/faults.json``, ``python -m benchmarks.peer_power_cuts`` writes
``peer_power_cuts.json`` beside it; the page shows both, and a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "faults.json"
PEERS = ROOT / "benchmarks" / "results" / "peer_power_cuts.json"
PAGE = ROOT / "docs" / "reliability.md"

_BEGIN, _END = "<!-- {}: made by python -m scripts.reliability_table -->\n", "<!-- end of {} -->\n"

_ERRNOS = ("EDQUOT", "EIO", "EMFILE", "ENOLCK", "ENOSPC", "EROFS")
_ROT = ("damaged", "deleted", "emptied", "file replaced", "flipped", "grown", "journal", "swapped", "truncated", "zero")
# what rows are together, by the first that fits
SUMS: dict[str, Callable[[str], bool]] = {
    "kills at random moments": lambda fault: fault.startswith("SIGKILL at a random moment"),
    "kills at system calls, one at every call": lambda fault: fault.startswith("SIGKILL at the n-th"),
    "errors injected into system calls": lambda fault: fault.startswith(_ERRNOS),
    "modelled power cuts": lambda fault: fault.startswith("power cut") and fault.endswith("modelled"),
    "power cuts of real file systems": lambda fault: fault.startswith("power cut"),
    "really full disks": lambda fault: fault.startswith("full disk"),
    "mutations: one kind of sync left out": lambda fault: fault.startswith("left-out sync"),
    "bit rot, one damage in one file": lambda fault: fault.startswith(_ROT),
    "hostile files": lambda fault: fault.startswith("hostile"),
}


def figures(report: dict[str, Any]) -> str:
    """The sums and the table of one run, as Markdown."""
    faults = report["faults"]
    user = "root" if report["root"] else "an unprivileged user"
    lines = [
        f"One run of `make test-faults`: {report['seconds'] / 60:.0f} minutes on {report['cores']} cores as {user}, "
        f"Linux {report['kernel']}, Python {report['python']}. {report.get('remark', '')}".rstrip(),
        "",
        "| together | times | lost, wrong or missed |",
        "|---|---:|---:|",
    ]
    left = list(faults)
    for title, is_one in SUMS.items():
        rows = [row for row in left if is_one(row["fault"])]
        left = [row for row in left if row not in rows]
        lines.append(f"| {title} | {_sum(rows, 'cycles'):,} | {_sum(rows, 'losses')} |")
    lines += [
        f"| everything else below | {_sum(left, 'cycles'):,} | {_sum(left, 'losses')} |",
        "",
        "| fault | times | lost, wrong or missed | tests |",
        "|---|---:|---:|---|",
    ]
    kinds = dict.fromkeys((_kind(row["fault"]), row["test"].partition("::")[0]) for row in faults)
    for kind, path in kinds:
        rows = [row for row in faults if (_kind(row["fault"]), row["test"].partition("::")[0]) == (kind, path)]
        lines.append(f"| {kind} | {_sum(rows, 'cycles'):,} | {_sum(rows, 'losses')} | `{path}` |")
    return "\n".join([*lines, ""])


def _kind(fault: str) -> str:
    """What several rows have in common: kinds of sync, of hostile file and of what stands in a file's place are many."""
    if fault.startswith("left-out sync"):
        return f"left-out sync noticed, {fault.rpartition(', ')[2]}"
    if fault.startswith(_ERRNOS) and "system call" in fault:
        return f"{fault.partition(' ')[0]} at the n-th system call"
    if fault.endswith("in the place of a file or folder"):
        return "link, FIFO, socket or folder in the place of a file"
    if fault.startswith("hostile"):
        return "hostile document, decoded alone" if fault.endswith(", decoded") else "hostile file in a store, or of prompts"
    return fault


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
