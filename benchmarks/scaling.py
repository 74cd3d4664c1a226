"""One worker against two: ``python -m benchmarks.scaling --prompts FILE --model FOLDER --work FOLDER``.

The file is built by one process, by one worker through Ray and by two, a thread each and each in a process of its own, and
the three stores are compared: every listed file must have the same bytes. *Stage* is the embedding stage with Ray's start
and the loading of models, *steady* is from the moment when all workers are ready. Efficiency is the time of one worker over
twice that of two. Figures go to ``benchmarks/results/scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.acceptance import RESULTS, machine

_MOST_BYTES_A_ROW = 8192


def main() -> int:
    """Build three times, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; holds one store at a time")
    parser.add_argument("--limit", type=int, help="first N distinct prompts only")
    parser.add_argument("--window-rows", type=int, help="default as a build decides")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", default="0,1,2", help="0: one process without Ray")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(build_once(options)))
        return 0
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "input": {"prompts": options.prompts.name, "model": options.model.name, "limit": options.limit},
        "dtype": options.dtype,
        "machine": machine(),
        "builds": {},
    }
    manifests = set()
    for workers in map(int, options.workers.split(",")):
        shutil.rmtree(options.work, ignore_errors=True)
        options.work.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--child", str(workers)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        manifests.add((options.work / "store" / "manifest.json").read_bytes())
        results["builds"][str(workers)] = json.loads(done.stdout)
        print(workers, json.dumps(results["builds"][str(workers)]), flush=True)
    results["same_listed_files"] = len(manifests) == 1
    one, two = (results["builds"].get(name) for name in ("1", "2"))
    if one and two:
        results["efficiency"] = {
            name: round(one[f"{name}_seconds"] / (2 * two[f"{name}_seconds"]), 3) for name in ("stage", "steady")
        }
    shutil.rmtree(options.work)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: results.get(name) for name in ("efficiency", "same_listed_files")}))
    is_small = all(build["driver_bytes_a_row"] <= _MOST_BYTES_A_ROW for build in results["builds"].values())
    return 0 if results["same_listed_files"] and is_small else 1


def build_once(options: argparse.Namespace) -> dict[str, Any]:
    """One build in this process, and when its workers were ready."""
    from embstore import build  # noqa: PLC0415 - the parent process measures nothing of it
    from embstore.core.config import BuildConfig, EmbeddingConfig, EngineConfig  # noqa: PLC0415
    from embstore.core.events import Event, RowsCommitted, StageStarted, WorkersChanged  # noqa: PLC0415

    workers = options.child
    at: dict[str, float] = {}

    def note(event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, StageStarted) and event.stage == "embed":
            at["started"] = at["ready"] = now
        elif isinstance(event, WorkersChanged) and event.alive == event.wanted and "embedded" not in at:
            at["ready"] = now
        elif isinstance(event, RowsCommitted):
            at["embedded"] = now

    report = build(
        options.prompts,
        out=options.work / "store",
        config=BuildConfig(
            embedding=EmbeddingConfig(
                model=str(options.model), dtype=options.dtype, threads=1, device="cpu", window_rows=options.window_rows
            ),
            limit=options.limit,
            engine=EngineConfig(engine="ray", num_workers=workers) if workers else EngineConfig(),
        ),
        observer=note,
    )
    stage, steady = at["embedded"] - at["started"], at["embedded"] - at["ready"]
    return {
        "rows": report.num_rows,
        "stage_seconds": round(stage, 2),
        "steady_seconds": round(steady, 2),
        "steady_rows_per_second": round(report.num_rows / steady, 1),
        "all_stage_seconds": {name: round(seconds, 2) for name, seconds in report.seconds.items()},
        "driver_peak_MiB_above_baseline": round((report.peak_anonymous_bytes or 0) / 2**20, 1),
        "worker_peak_MiB_above_model": round((report.worker_peak_bytes or 0) / 2**20, 1),
        "driver_bytes_a_row": round(report.worker_traffic_bytes / report.num_rows),
    }


if __name__ == "__main__":
    sys.exit(main())
