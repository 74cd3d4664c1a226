"""Every lever that was tried for the embedding pass, side by side: what it brings, and what did not help.

``python -m benchmarks.levers --prompts FILE --model FOLDER [--parts head,norm,memory,...] [--rounds 4]``

The ways of one lever take turns in one process, on the same real rows; figures are medians, ratios are those of medians to
the way that embstore takes, and every single figure is kept. Results go to ``benchmarks/results/levers.json``;
``python -m scripts.performance_page`` renders them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import lever_backbone, lever_rows
from benchmarks.acceptance import cpu_name
from benchmarks.lever_tools import Bench, Figures

RESULTS = Path(__file__).parent / "results" / "levers.json"
PARTS: dict[str, Callable[[Bench], Figures]] = {
    "head": lever_rows.head,
    "norm": lever_rows.norm,
    "memory": lever_rows.memory,
    "disk": lever_rows.disk,
    "blosc": lever_rows.blosc,
    "tokens": lever_rows.tokens,
    "windows": lever_rows.windows,
    "batches": lever_backbone.batch_tokens,
    "backbone": lever_backbone.backbone,
    "attention": lever_backbone.attention,
    "ahead": lever_backbone.ahead,
    "compiled": lever_backbone.compiled,  # last: it leaves a compiler in the process
}


def main() -> None:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("demo_output/levers"), help="on the disk to be measured")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=4, help="turns of the slow levers; fast ones take more")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    bench = Bench(options.prompts, options.model, options.work, threads=threads, rounds=options.rounds)
    results: Figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = f"python -m benchmarks.levers --prompts {options.prompts.name} --model {options.model.name}"
    for part in options.parts.split(","):
        started = time.perf_counter()
        figures = PARTS[part](bench)
        seconds = time.perf_counter() - started
        results[part] = figures | {
            "date": time.strftime("%Y-%m-%d"),
            "command": f"{command} --parts {part}",
            "seconds": seconds,
        }
        packages = ("embstore", "torch", "transformers", "numpy", "numcodecs")
        results["versions"] = {name: importlib.metadata.version(name) for name in packages}
        results["versions"]["python"] = sys.version.split()[0]
        results["hardware"] = f"{cpu_name()}, {threads} cores, {torch.backends.cpu.get_cpu_capability()}"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
