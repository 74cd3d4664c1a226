"""What ``--reuse`` saves: a full build against one that copies all but 1,000 rows of an old store.

``python -m benchmarks.reuse --prompts FILE --model FOLDER --work FOLDER [--dtype auto] [--new-rows 1000]``

The old pool is the file without ``--new-rows`` random lines; its store is built first and not measured. Then the whole file
is built twice, each time in a process of its own: in full, and with ``--reuse``. Copied rows are compared with the full
build's. Figures of each dtype go to ``benchmarks/results/reuse.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.acceptance import RESULTS, Job, fresh, machine, run, shown
from embstore import open_store, verify
from embstore.core.diagnostics import total_variation


def main() -> int:
    """Build, reuse, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("demo_output/reuse"), help="scratch folder, 3 x the store")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--new-rows", type=int, default=1000)
    parser.add_argument("--parts", default="old,full,reuse", help="stores in the scratch folder that are built anew")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pools = {"old": options.work / "old.jsonl", "full": options.prompts, "reuse": options.prompts}
    lines = options.prompts.read_text().splitlines(keepends=True)
    left_out = set(random.Random(7).sample(range(len(lines)), options.new_rows))
    pools["old"].write_text("".join(line for index, line in enumerate(lines) if index not in left_out))
    path = RESULTS / "reuse.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"input": {"prompts": options.prompts.name, "model": options.model.name}, "machine": machine()}
    figures: dict[str, Any] = results.setdefault(options.dtype, {})
    for part in options.parts.split(","):
        job = Job(prompts=pools[part], model=options.model, work=options.work, small_budget="")
        extra = ["--reuse", str(options.work / f"{options.dtype}-old")] if part == "reuse" else []
        command = job.build(fresh(options.work / f"{options.dtype}-{part}"), "--dtype", options.dtype, *extra)
        busy = os.getloadavg()[0]
        report, seconds = run(command)
        if part != "old":
            figures[part] = {
                "date": time.strftime("%Y-%m-%d"),
                "command": shown(job, command),
                "build_seconds": round(seconds, 1),
                "load_before": round(busy, 1),
                "stage_seconds": {name: round(value, 2) for name, value in report["seconds"].items()},
                "rows": {name: report[f"{name}_rows"] for name in ("num", "embedded", "reused", "dropped")},
                "peak_anonymous_MiB_above_baseline": round(report["peak_anonymous_bytes"] / 2**20, 1),
            }
        print(part, json.dumps(figures.get(part)), flush=True)
    if {"full", "reuse"} <= figures.keys():
        figures["ratios"] = ratios(figures)
        figures["copied_rows"] = compared(options.work / f"{options.dtype}-full", options.work / f"{options.dtype}-reuse")
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: figures.get(name) for name in ("ratios", "copied_rows")}, indent=2))
    return 0


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Of the whole command, and of the embedding stage alone, which is what reuse shortens."""
    full, reuse = figures["full"], figures["reuse"]
    return {
        "whole_command": round(reuse["build_seconds"] / full["build_seconds"], 4),
        "embedding_stage": round(reuse["stage_seconds"]["embed"] / full["stage_seconds"]["embed"], 4),
    }


def compared(full: Path, reuse: Path) -> dict[str, Any]:
    """How copied rows differ from those of the full build: coordinates in L2, and the weights in total variation."""
    left, right = open_store(full), open_store(reuse)
    copied = np.concatenate([np.arange(*rows) for rows in verify(reuse).reused])
    moved = np.linalg.norm(left.coordinates[copied] - right.coordinates[copied], axis=1)
    return {
        "rows": len(copied),
        "coordinates_l2_median": float(np.median(moved)),
        "coordinates_l2_largest": float(moved.max()),
        "weights_tv": total_variation(left.weights.astype(np.float64), right.weights.astype(np.float64)),
    }


if __name__ == "__main__":
    sys.exit(main())
