"""Put the figures of ``benchmarks/results/reuse.json`` into ``docs/guide.md``: ``python -m scripts.reuse_figures``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reuse.json"
PAGE = ROOT / "docs" / "guide.md"

_PART = re.compile(r"(<!-- reuse: [^\n]*-->\n).*?(<!-- end of reuse -->)", re.DOTALL)


def table() -> str:
    """The measured builds as a table."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    machine, given = results["machine"], results["input"]
    text = f"{given['prompts']}, {given['model']}; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}: "
    text += "`python -m benchmarks.reuse`, every figure in `benchmarks/results/reuse.json`.\n\n"
    text += (
        "| `--dtype` | rows | whole command | CPU time | embedding stage | other stages |\n|---|---|---:|---:|---:|---:|\n"
    )
    for dtype in ("auto", "float32"):
        for part in ("full", "reuse"):
            figures = results[dtype][part]
            rows = figures["rows"]
            counted = (
                f"{rows['reused']:,} copied, {rows['embedded']:,} computed"
                if rows["reused"]
                else f"{rows['num']:,} computed"
            )
            seconds = figures["stage_seconds"]
            others = sum(value for name, value in seconds.items() if name != "embed")
            text += f"| {dtype} | {counted} | {figures['build_seconds']} s | {figures['cpu_seconds']} s | {seconds['embed']:.1f} s | {others:.1f} s |\n"
    for dtype in ("auto", "float32"):
        ratios, copied = results[dtype]["ratios"], results[dtype]["copied_rows"]
        text += (
            f"\n{dtype}: the embedding stage takes 1/{1 / ratios['embedding_stage']:.1f} of a full one, the whole command "
        )
        text += f"1/{1 / ratios['whole_command']:.1f}. Copied rows differ from the full build's by at most "
        text += f"{copied['coordinates_l2_largest']:.1e} (L2), the weights by TV {copied['weights_tv']:.1e}.\n"
    return text


def page(text: str) -> str:
    """The guide with the figures of the committed run."""
    return _PART.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
