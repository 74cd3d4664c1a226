"""Weights by scores and shares: what they cost at a million rows, and an example on real prompts.

``python -m benchmarks.signals --prompts FILE --model FOLDER`` builds a store of every ninth prompt, whose lines have a field
``src``, and writes ``benchmarks/results/signals.json``. Times are those of the processor, the least of three rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.acceptance import RESULTS, machine
from embstore.core.config import WeightingConfig
from embstore.core.density import sampling_weights
from embstore.core.factors import NO_FACTORS, Factors, ScoreRule, ShareRule
from embstore.flow.scores import groups_of_field
from embstore.storage.reader import open_store

ROWS, ROUNDS, EVERY = 1_000_000, 3, 9
ARGUMENTS = ["--by", "src", "--shares", "gsm8k=1,*=1", "--target-ess", "0.6"]


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    report = {"machine": machine(), "rows": ROWS, "weights": weights(), "example": example(options.prompts, options.model)}
    (RESULTS / "signals.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def weights() -> list[dict[str, Any]]:
    """Seconds of ``sampling_weights``: density alone, with a score, and with shares of few and of many groups."""
    random = np.random.default_rng(0)
    distance_N, vector_N = 0.05 * random.lognormal(size=ROWS), np.arange(ROWS)
    score_N = ScoreRule.parse("p*(1-p)").factor(random.random(ROWS))
    cases = {"density": NO_FACTORS, "density and a score": Factors(score_N=score_N)}
    for groups in (5, 1000):
        cases[f"density, a score, {groups:,} groups"] = Factors(
            score_N=score_N,
            group_N=random.integers(0, groups, ROWS),
            names=tuple(map(str, range(groups))),
            rule=ShareRule(kind="equal"),
        )
    found = []
    for parts, factors in cases.items():
        for target in (None, 0.3):
            config = WeightingConfig(target_ess=target, uniform_mix=0.1)
            weigh = functools.partial(sampling_weights, distance_N, vector_N, config, factors=factors)
            found.append({"parts": parts, "target": target, "seconds": _least(weigh)})
    return found


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def example(prompts: Path, model: Path) -> dict[str, Any]:
    """What ``embstore weights`` prints of its factors for a store of real prompts, and what reading a field costs."""
    command = [sys.executable, "-m", "embstore"]
    with tempfile.TemporaryDirectory() as folder:
        pool, store = Path(folder) / "prompts.jsonl", Path(folder) / "STORE"
        lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
        pool.write_text("".join(lines[EVERY - 1 :: EVERY]), encoding="utf-8")
        subprocess.run([*command, "build", pool, "--model", model, "--out", store], check=True, capture_output=True)
        shown = subprocess.run([*command, "weights", store, *ARGUMENTS], check=True, capture_output=True, text=True)
        printed = shown.stdout.splitlines()
        first = next(number for number, line in enumerate(printed) if line.startswith("  weights "))
        last = max(number for number, line in enumerate(printed) if line.startswith("    after "))
        opened = open_store(store)
        return {
            "arguments": ARGUMENTS,
            "rows": opened.num_rows,
            "printed": printed[first : last + 1],
            "field_microseconds_a_row": 1e6 * _least(lambda: groups_of_field(opened, "src", None)) / opened.num_rows,
        }


if __name__ == "__main__":
    sys.exit(main())
