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
    text = f"{given['prompts']}, {given['model']}; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
    text += "a machine that others used meanwhile: "
    text += "`python -m benchmarks.reuse`, every figure in `benchmarks/results/reuse.json`.\n\n"
    heads = ("`--dtype`", "rows", "whole command", "embedding stage", "other stages")
    text += f"| {' | '.join(heads)} |\n|---|---|---:|---:|---:|\n"
    for dtype in ("auto", "float32"):
        for part in ("full", "reuse"):
            figures = results[dtype][part]
            stages = figures["stage_seconds"]
            cells = (
                dtype,
                f"{figures['rows']['reused']:,} copied, {figures['rows']['embedded']:,} computed",
                f"{figures['build_seconds']:.0f} s",
                f"{stages['embed']:.1f} s",
                f"{sum(seconds for name, seconds in stages.items() if name != 'embed'):.1f} s",
            )
            text += f"| {' | '.join(cells)} |\n"
    for dtype in ("auto", "float32"):
        share = {name: f"1/{1 / ratio:.1f}" for name, ratio in results[dtype]["ratios"].items()}
        copied = results[dtype]["copied_rows"]
        text += (
            f"\n{dtype}: with 27 of 28 rows copied the embedding stage takes {share['embedding_stage']} of a full one, the "
            f"whole command {share['whole_command']}. Copied rows differ from the full build's by at most "
            f"{copied['coordinates_l2_largest']:.1e} (L2), the weights by TV {copied['weights_tv']:.1e}.\n"
        )
    return text


def page(text: str) -> str:
    """The guide with the figures of the committed run."""
    return _PART.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
