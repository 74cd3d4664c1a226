"""The embedding pass on a CUDA device: how near it is to the device's limit, and what the host and the disk take.

``python -m benchmarks.gpu --prompts FILE --model FOLDER [--models given,large] [--parts machine,floor,embed,...]``

Two models: the one given, and a seeded random Llama of 1.2 billion parameters that is made on the device and saved under
``--work``. The floor is the backbone alone in bfloat16, its token batches already on the device, under the best setting of
a sweep. Parts are recorded in ``benchmarks/results/gpu.json`` one by one, so a run that is cut off keeps what it measured;
``python -m benchmarks.pages`` shows them in docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_embed import embed, profile
from benchmarks.gpu_floor import compiled, floor, original
from benchmarks.gpu_machine import machine
from benchmarks.gpu_run import Figures, Run, Subject, subject_of

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MODELS = ("given", "large")
PARTS = ("machine", "floor", "embed", "profile", "original", "compile")


def main() -> int:
    """Run the chosen parts and write their figures; a part that fails is recorded as such, and the others go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the folder of the model given")
    parser.add_argument("--work", type=Path, default=Path("demo_output/gpu"), help="on the disk to be measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=28000, help="prompts for the model given")
    parser.add_argument("--large-rows", type=int, default=16384, help="prompts for the large model: four windows")
    parser.add_argument("--limit", type=float, default=20, help="seconds after which a sweep or a slow method is cut short")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    run, parts, failures = Run(options), options.parts.split(","), 0
    if "machine" in parts:
        failures += _part(run, ["machine"], lambda: machine(run))
    per_model: dict[str, Callable[[Run, Subject], Figures]] = {
        "floor": floor, "embed": embed, "profile": profile, "original": original, "compile": compiled,
    }  # fmt: skip
    chosen = [name for name in PARTS if name in parts and name in per_model]
    subjects: dict[str, Subject] = {}
    # what may take long to compile comes last, for every model
    for late in (False, True):
        for name in options.models.split(","):
            for part in [each for each in chosen if (each == "compile") == late]:
                if part in ("floor", "original", "compile"):
                    run.opened.clear()
                if name not in subjects:
                    subjects[name] = subject_of(run, name)
                failures += _part(run, ["models", name, part], functools.partial(per_model[part], run, subjects[name]))
    return min(failures, 1)


def _part(run: Run, path: Sequence[str], measure: Callable[[], Figures]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        figures = measure()
    except Exception as error:  # noqa: BLE001 - the next part is independent of this one
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    figures |= {
        "wall_seconds": round(time.perf_counter() - started, 2),
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
    }
    run.record(path, figures)
    print("/".join(path), json.dumps({name: each for name, each in figures.items() if name != "table"}), flush=True)
    return int("error" in figures)


if __name__ == "__main__":
    raise SystemExit(main())
