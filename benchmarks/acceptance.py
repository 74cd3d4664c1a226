"""The main job at full size, measured: speed, memory, kills with byte comparison, shards, and an exact oracle.

``python -m benchmarks.acceptance --prompts FILE --model FOLDER --work FOLDER [--parts speed,kills,shards,oracle]``

Every build is the real command in a process of its own. Results go to ``benchmarks/results/acceptance.json`` with command
lines, versions and hardware. Parts may be run one at a time: each replaces its own figures.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from embstore import open_store
from embstore.core.diagnostics import total_variation
from embstore.host.threads import num_cores

RESULTS = Path(__file__).parent / "results"
ORACLE_ROWS = 5000
KILLS = 3
PARTS = ("speed", "kills", "shards", "oracle")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured: input, scratch folder, and the budget that forces at least four shards."""

    prompts: Path
    model: Path
    work: Path
    small_budget: str

    def build(self, store: Path, *options: str) -> list[str]:
        """The command line of a build."""
        command = [sys.executable, "-m", "embstore", "build", str(self.prompts), "--model", str(self.model)]
        return [*command, "--out", str(store), "--json", *options]


def main() -> int:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("demo_output/acceptance"), help="scratch folder, about 3 x the store"
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--small-budget", default="112MiB", help="a memory budget that forces at least four shards")
    options = parser.parse_args()
    job = Job(prompts=options.prompts, model=options.model, work=options.work, small_budget=options.small_budget)
    job.work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[Job], dict[str, Any]]] = {"speed": speed, "kills": kills, "shards": shards, "oracle": oracle}
    for part in options.parts.split(","):
        print(f"{part} ...", flush=True)
        started = time.monotonic()
        figures = runs[part](job)
        figures["wall_seconds"] = round(time.monotonic() - started, 1)
        record(job, part, figures)
        print(json.dumps(figures, indent=2), flush=True)
    return 0


def speed(job: Job) -> dict[str, Any]:
    """One uninterrupted build with default settings."""
    store = fresh(job.work / "default")
    report, seconds = run(job.build(store))
    return {"command": shown(job, job.build(store)), "build_seconds": round(seconds, 1), **figures_of(report)}


def kills(job: Job) -> dict[str, Any]:
    """The same build killed three times at random moments and resumed; compared file by file with the uninterrupted one."""
    return killed(job, job.work / "default", [])


def shards(job: Job) -> dict[str, Any]:
    """A budget that forces at least four shards: uninterrupted, then killed three times."""
    store = fresh(job.work / "small")
    options = ["--memory-budget", job.small_budget]
    report, seconds = run(job.build(store, *options))
    figures = {"command": shown(job, job.build(store, *options)), "build_seconds": round(seconds, 1), **figures_of(report)}
    return figures | {"killed": killed(job, store, options)}


def oracle(job: Job) -> dict[str, Any]:
    """Against scikit-learn's exact search over the distinct stored float16 rows in float64, for 1 and for 4 shards."""
    store_path = fresh(job.work / "oracle")
    results: dict[str, Any] = {"rows": ORACLE_ROWS}
    exact_NK = None
    for num_shards in (1, 4):
        limits = ["--limit", str(ORACLE_ROWS), "--shards", str(num_shards), "--resume"]
        report, _ = run(job.build(store_path, *limits))
        store = open_store(store_path)
        if exact_NK is None:
            rows_NV = np.concatenate([block for _, block in store.iter_rows()])
            distinct, inverse = distinct_rows(rows_NV)
            rows_GV = rows_NV[distinct].astype(np.float64)
            results["distinct_rows"] = len(distinct)
            search = NearestNeighbors(n_neighbors=11, algorithm="brute").fit(rows_GV)
            exact_NK = search.kneighbors(rows_GV)[0][:, 1:][inverse]  # rows are distinct: column 0 is self
            sizes_N = np.bincount(inverse)[inverse]
        # distances of the neighbours that were found, in the stored rows themselves
        found_NK = np.stack([stored_distances(rows_NV, row, store.neighbor_ids[row, :10]) for row in range(len(rows_NV))])
        hits = found_NK <= exact_NK[:, -1:] * (1 + 1e-4)
        expected = np.maximum(exact_NK.mean(axis=1), 1e-3) / sizes_N
        results[f"shards_{num_shards}"] = {
            "command": shown(job, job.build(store_path, *limits)),
            "shards": report["metadata"]["neighbors"]["shards"],
            "recall_at_10": float(hits.mean()),
            "weights_tv": total_variation(np.asarray(store.weights, dtype=np.float64), expected),
            "own_audit": report["metadata"]["neighbors"]["audit"],
        }
    return results


def distinct_rows(rows_NV: np.ndarray[Any, np.dtype[np.float16]]) -> tuple[Any, Any]:
    """First row of each bit-distinct stored row, and each row's index among them."""
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows_NV]
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    order = {digest: index for index, digest in enumerate(first)}
    return np.array(list(first.values())), np.array([order[digest] for digest in digests])


def stored_distances(rows_NV: np.ndarray[Any, Any], row: int, others: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float64 distances between stored rows, by direct differences."""
    difference = rows_NV[others].astype(np.float64) - rows_NV[row].astype(np.float64)
    distances: np.ndarray[Any, Any] = np.sort(np.linalg.norm(difference, axis=1))
    return distances


def killed(job: Job, reference: Path, options: list[str]) -> dict[str, Any]:
    """Build beside ``reference`` with three SIGKILLs at random moments, resume, and compare every listed file."""
    store = fresh(reference.with_name(reference.name + "-killed"))
    command = job.build(store, *options, "--resume")
    moments = random.Random(17)
    points = []
    for _ in range(KILLS):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(timeout=moments.uniform(12, 75))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            points.append(committed_windows(store))
    report, _ = run(command)
    manifest = json.loads((reference / "manifest.json").read_bytes())
    chunks = [path.relative_to(reference).as_posix() for path in (reference / "embeddings.zarr").iterdir()]
    names = sorted({"manifest.json", *manifest["files"], *chunks})
    different = [name for name in names if sha256(reference / name) != sha256(store / name)]
    shutil.rmtree(store)
    return {
        "command": shown(job, command),
        "windows_committed_at_each_kill": points,
        "rows_of_the_last_run": report["embedded_rows"],
        "files_compared": len(names),
        "files_different": different,
    }


def committed_windows(store: Path) -> int:
    """Window commits in a journal, however far it is."""
    journal = store / "journal.jsonl"
    return journal.read_bytes().count(b'"record":"window"') if journal.exists() else 0


def run(command: list[str]) -> tuple[Any, float]:
    """Run a build that must succeed; its JSON report and wall seconds."""
    started = time.monotonic()
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout), seconds


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """The figures people compare, from a build's report."""
    seconds = report["seconds"]
    metadata = report["metadata"]
    return {
        "rows": report["num_rows"],
        "dimension": metadata["embedding_dim"],
        "rows_per_second": round(report["embedded_rows"] / seconds["embed"], 1),
        "tokens_per_second": round(report["embedded_tokens"] / seconds["embed"]),
        "stored_bytes": report["stored_bytes"],
        "stored_bytes_per_second": round(report["stored_bytes"] / seconds["embed"]),
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_anonymous_MiB_above_baseline": round(report["peak_anonymous_bytes"] / 2**20, 1),
        "peak_file_MiB": round(report["peak_file_bytes"] / 2**20, 1),
        "shards": metadata["neighbors"]["shards"],
        "audit": metadata["neighbors"]["audit"],
        "ess_share": round(metadata["ess_share"], 4),
        "vector_groups": metadata["vector_groups"],
    }


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def sha256(path: Path) -> str | None:
    """Digest of a file, None when it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def shown(job: Job, command: list[str]) -> str:
    """A command line without the paths of this machine."""
    text = " ".join(["embstore", *command[3:]])
    for path, name in ((job.prompts, job.prompts.name), (job.model, job.model.name), (job.work, "WORK")):
        text = text.replace(str(path), name)
    return text


def record(job: Job, part: str, figures: dict[str, Any]) -> None:
    """Merge one part's figures into the results files."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "acceptance.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["input"] = {"prompts": job.prompts.name, "model": job.model.name}
    results["machine"] = machine()
    results[part] = {"date": time.strftime("%Y-%m-%d"), **figures}
    path.write_text(json.dumps(results, indent=2) + "\n")


def machine(packages: Sequence[str] = ("torch", "transformers", "zarr", "hnswlib")) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("embstore", *packages)},
    }


def cpu_name() -> str:
    """The processor's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
