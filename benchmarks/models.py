"""Models of real shapes: memory, time around the pass, and the layered order beside the plain one and beside a plain loop.

``python -m benchmarks.models --prompts FILE --tokenizer FOLDER --work FOLDER [--parts 0.5B,1.7B,8B,small]``

Checkpoints of these shapes are made in the work folder (up to 16 GB; delete it afterwards). Every figure is of processes of
their own; sides of a ratio alternate. ``small`` compares ``--tokenizer``'s own model with another version of embstore:
``--base PYTHON`` names that version's interpreter. Results go to ``benchmarks/results/models.json``, part by part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.acceptance import machine
from benchmarks.shapes import make

RESULTS = Path(__file__).parent / "results" / "models.json"
PARTS = ("0.5B", "1.7B", "8B", "small")
_POLL_SECONDS = 0.02
_ROW_FILES = ("chunks.json", "coordinates.npy", "residuals.npy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured, with what and where."""

    prompts: Path
    tokenizer: Path
    work: Path
    base: Path | None
    counts: tuple[int, ...]
    rounds: int

    def first(self, count: int) -> Path:
        """A file of the first ``count`` prompts."""
        file = self.work / f"prompts-{count}.jsonl"
        with self.prompts.open("rb") as lines:
            file.write_bytes(b"".join(line for line, _ in zip(lines, range(count), strict=False)))
        return file


def main() -> int:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder: its tokenizer is every shape's")
    parser.add_argument("--work", type=Path, default=Path("demo_output/models"), help="scratch folder, up to 20 GB")
    parser.add_argument("--parts", default="0.5B,1.7B,8B")
    parser.add_argument("--base", type=Path, help="python of another version of embstore, for the part small")
    parser.add_argument("--counts", default="64,256", help="numbers of prompts of the part 8B")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each side of a ratio")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    job = Job(
        prompts=options.prompts,
        tokenizer=options.tokenizer,
        work=options.work,
        base=options.base,
        counts=tuple(int(count) for count in options.counts.split(",")),
        rounds=options.rounds,
    )
    runs: dict[str, Callable[[Job], dict[str, Any]]] = {"0.5B": half, "1.7B": medium, "8B": large, "small": small}
    for part in options.parts.split(","):
        figures = runs[part](job) | {"machine": machine()}
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(results | {part: figures}, indent=2) + "\n")
        print(json.dumps(figures, indent=2), flush=True)
    return 0


def half(job: Job) -> dict[str, Any]:
    """Memory and time around the pass at 48 and 256 prompts; both orders at 512."""
    model = make("0.5B", job.tokenizer, job.work)
    builds = {str(count): build(job, model, count) for count in (48, 256)}
    return {"builds": builds, "orders": orders(job, model, 512, plain="3GiB")}


def medium(job: Job) -> dict[str, Any]:
    """Both orders at 512 prompts."""
    return {"orders": orders(job, make("1.7B", job.tokenizer, job.work), 512, plain="6GiB")}


def large(job: Job) -> dict[str, Any]:
    """A model of 16 GB in 2 GiB for its layers and 2 GiB for the rest, beside a loop over the same batches."""
    model = make("8B", job.tokenizer, job.work)
    options = ("--dtype", "bfloat16", "--memory-budget", "2GiB", "--model-memory", "2GiB")
    builds = {}
    for count in job.counts:
        warm(model)
        figures = build(job, model, count, *options)
        warm(model)
        figures["loop"] = loop(job, model, count, figures["window_rows"])
        figures["speed"] = round(figures["loop"]["seconds"] / figures["pass_seconds"], 3)
        builds[str(count)] = figures
    return {"builds": builds, "page_cache": "warm"}


def small(job: Job) -> dict[str, Any]:
    """The embed stage of the tokenizer's own model, here and in the base version, in turn."""
    if job.base is None:
        raise SystemExit("the part small needs --base, the python of another version of embstore")
    count = 28000
    pairs = []
    for _ in range(job.rounds):
        base, here = (
            build(job, job.tokenizer, count, python=python)["pass_seconds"] for python in (job.base, Path(sys.executable))
        )
        pairs.append({"base_seconds": base, "here_seconds": here, "speed": round(base / here, 3)})
    return {"prompts": count, "pairs": pairs, "speed": statistics.median(pair["speed"] for pair in pairs)}


# --- one measurement --------------------------------------------------------------------------------------------------


def build(job: Job, model: Path, count: int, *options: str, python: Path = Path(sys.executable)) -> dict[str, Any]:
    """A whole build in a process of its own: seconds of the pass and around it, until the first word, and peak memory."""
    store = Path(tempfile.mkdtemp(dir=job.work)) / "store"
    command = [str(python), "-m", "embstore", "build", str(job.first(count)), "--model", str(model)]
    command += ["--out", str(store), "--device", "cpu", "--json", *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words: list[float] = []
    errors: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            words.append(time.perf_counter() - started)
            errors.append(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    peak_bytes = watched(process)
    assert process.stdout is not None
    printed = process.stdout.read()
    listener.join()
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {''.join(errors[-5:])}")
    report = json.loads(printed)
    passed = report["seconds"]["embed"]
    spec = json.loads((store / "spec.json").read_text())
    digest = hashlib.sha256(b"".join((store / file).read_bytes() for file in _ROW_FILES)).hexdigest()
    shutil.rmtree(store.parent)
    return {
        "command": [word if "/" not in word else Path(word).name for word in command],
        "prompts": count,
        "window_rows": spec["window_rows"],
        "dtype": spec["embedding"]["dtype"],
        "seconds": round(seconds, 2),
        "pass_seconds": round(passed, 2),
        "outside_seconds": round(seconds - passed, 2),
        "first_word_seconds": round(words[0], 2) if words else None,
        "peak_anonymous_bytes": peak_bytes,
        "stages": {name: round(value, 2) for name, value in report["seconds"].items()},
        "rows_sha256": digest,
    }


def orders(job: Job, model: Path, count: int, *, plain: str) -> dict[str, Any]:
    """Rows by both orders in turn: seconds of the pass, and whether the bytes are equal."""
    rounds = []
    for _ in range(job.rounds):
        layered, resident = build(job, model, count), build(job, model, count, "--model-memory", plain)
        rounds.append(
            {
                "layered_seconds": layered["pass_seconds"],
                "plain_seconds": resident["pass_seconds"],
                "speed": round(resident["pass_seconds"] / layered["pass_seconds"], 3),
                "same_bytes": layered["rows_sha256"] == resident["rows_sha256"],
                "layered_peak_bytes": layered["peak_anonymous_bytes"],
                "plain_peak_bytes": resident["peak_anonymous_bytes"],
            }
        )
    speed = statistics.median(each["speed"] for each in rounds)
    return {"prompts": count, "rounds": rounds, "speed": speed, "same_bytes": all(each["same_bytes"] for each in rounds)}


def loop(job: Job, model: Path, count: int, window_rows: int) -> dict[str, Any]:
    """Transformers' own model over the batches of such a build, one after the other."""
    command = [sys.executable, "-m", "benchmarks.plain_loop", str(job.first(count)), str(model), str(window_rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_bytes = watched(process)
    assert process.stdout is not None
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    figures: dict[str, Any] = json.loads(process.stdout.read())
    return figures | {"peak_anonymous_bytes": peak_bytes}


def watched(process: subprocess.Popen[str]) -> int | None:
    """Peak of a process's anonymous memory from its start to its end; None where the system does not tell."""
    peak = None
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
        }
        if "VmRSS" in sizes:
            peak = max(peak or 0, sizes["VmRSS"] - sizes["RssFile"])
        time.sleep(_POLL_SECONDS)
    process.wait()
    return peak


def warm(model: Path) -> None:
    """Have the weights in the page cache."""
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as content:
            while content.read(64 << 20):
                pass


if __name__ == "__main__":
    sys.exit(main())
