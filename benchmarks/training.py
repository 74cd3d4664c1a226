"""Training start measured: weights, imports, draws, and the first batch, precomputed against online.

``python -m benchmarks.training --prompts FILE --model FOLDER [--parts weights,imports,draws,quotas,joint,joins,start]``

Whatever starts a process is measured in one: rounds interleave what is compared, and medians are kept. Results go to
``benchmarks/results/training.json``; each part replaces its own figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.acceptance import RESULTS, machine
from benchmarks.sampling import draws, joint, quotas
from embstore.core.config import CURRENT_RULE
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    CHUNKS,
    COORDINATES,
    FORMAT_VERSION,
    KEYS,
    MANIFEST,
    RESIDUALS,
    SPEC,
    STAGE0_FILES,
    WEIGHTS,
    FileDigest,
    Manifest,
    document,
    neighbors_paths,
    weights_paths,
)
from embstore.training import load_weights, prompt_keys

ROUNDS = 15
WEIGHT_ROWS = (28_000, 1_000_000, 100_000_000)
JOINED_TEXTS, JOINED_CHATS = 1_000_000, 200_000
_DIGEST = "0" * 16


def main() -> int:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--parts", default="weights,imports,draws,quotas,joint,joins,start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="embstore-benchmark-") as scratch:
        work = Path(scratch)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "weights": lambda: weights_start(work),
            "imports": import_cost,
            "draws": draws,
            "quotas": quotas,
            "joint": lambda: joint(work),
            "joins": lambda: joins(options.prompts, work),
            "start": lambda: training_start(options.prompts, options.model, work),
        }
        for part in options.parts.split(","):
            figures = parts[part]()
            record(part, figures, options.prompts, options.model)
            print(part, json.dumps(figures, indent=2), flush=True)
    return 0


# --- mapping and verifying --------------------------------------------------------------------------------------------


def weights_start(work: Path) -> dict[str, Any]:
    """Milliseconds of ``load_weights`` with full verification, and with shape checks alone, files in the page cache."""
    found = {}
    for rows in WEIGHT_ROWS:
        values = np.random.default_rng(rows).gamma(2.0, size=rows).astype(np.float32)
        values = (values / values.sum(dtype=np.float64)).astype(np.float32)
        store = forged_store(work / f"rows-{rows}", values)
        rounds = ROUNDS if rows < 10_000_000 else 3
        found[str(rows)] = {
            f"{verify}_ms": round(1e3 * median_seconds(lambda: load_weights(store, verify=verify), rounds), 3)  # noqa: B023 - called here
            for verify in ("full", "shape")
        }
    return found


def forged_store(root: Path, weights_N: NDArray[np.float32], keys_N: NDArray[np.uint64] | None = None) -> Path:
    """A folder with what ``load_weights`` reads of a finished store: manifest, weights, their metadata, keys for a join."""
    (root / WEIGHTS).mkdir(parents=True)
    array, sidecar = weights_paths(_DIGEST)
    np.save(root / array, weights_N)
    np.save(root / KEYS, np.arange(len(weights_N), dtype=np.uint64) if keys_N is None else keys_N)
    (root / sidecar).write_bytes(document({"n_items": len(weights_N)}))
    listed = {*STAGE0_FILES, SPEC, BASIS, ARRAY_METADATA, COORDINATES, RESIDUALS, CHUNKS}
    paths = neighbors_paths(_DIGEST)
    listed |= {paths.ids, paths.distances, paths.groups, paths.spec}
    files = {name: FileDigest(bytes=0, sha256="0" * 64) for name in listed}
    for name in (array, sidecar, KEYS):
        with (root / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = FileDigest(bytes=(root / name).stat().st_size, sha256=digest)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        rows=len(weights_N),
        dimension=1,
        neighbors=_DIGEST,
        names={"default": _DIGEST},
        files=files,
        rule=CURRENT_RULE,
    )
    (root / MANIFEST).write_bytes(manifest.encode())
    return root


def median_seconds(action: Callable[[], object], rounds: int) -> float:
    """Median of some timed calls, the first one left out."""
    action()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# --- imports ----------------------------------------------------------------------------------------------------------


def import_cost() -> dict[str, Any]:
    """Milliseconds of whole processes, by the clock and of the processor; numpy alone and embstore.training take turns."""
    statements = {"numpy": "import numpy", "embstore.training": "import embstore.training", "torch": "import torch"}
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    processor: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(ROUNDS + 1):
        for name, statement in statements.items():
            if name == "torch" and turn > 3:
                continue
            started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if turn:
                seconds[name].append(time.perf_counter() - started)
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                processor[name].append(used)
    medians = {f"{name}_ms": round(1e3 * statistics.median(values), 1) for name, values in seconds.items()}
    over = [1e3 * (ours - alone) for ours, alone in zip(seconds["embstore.training"], seconds["numpy"], strict=True)]
    of_processor = [
        1e3 * (ours - alone) for ours, alone in zip(processor["embstore.training"], processor["numpy"], strict=True)
    ]
    return {
        **medians,
        "over_numpy_ms": round(statistics.median(over), 1),
        "over_numpy_cpu_ms": round(statistics.median(of_processor), 1),
        "rounds": ROUNDS,
    }


# --- joins -------------------------------------------------------------------------------------------------------------

_JOIN = """
import json, sys, time
import datasets
from embstore.core.prompts import prompt_of
from embstore.training import load_weights
kind, store, saved = sys.argv[1:]
dataset = datasets.load_from_disk(saved)
if kind == "shuffled":
    dataset = dataset.shuffle(seed=0)
if kind in ("list", "one by one"):
    dataset = dataset["prompt"][:]
elif kind == "records":
    dataset = [{"prompt": text, "number": number} for number, text in enumerate(dataset["prompt"][:])]
started, processor = time.perf_counter(), time.process_time()
if kind == "one by one":
    for text in dataset:
        prompt_of({"prompt": text}).digest
else:
    load_weights(store).for_dataset(dataset)
print(json.dumps({"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}))
"""


def joins(prompts: Path, work: Path) -> dict[str, Any]:
    """Microseconds an item of ``load_weights(STORE).for_dataset(dataset)``, each in a fresh process, once.

    The texts are those of the prompts file, each made different by a number at its end. ``again`` is a second start, whose
    rows come from the cache. ``one by one`` makes the same keys by the function of a build, without looking them up.
    """
    import datasets  # noqa: PLC0415

    with prompts.open(encoding="utf-8") as lines:
        known = [json.loads(line)["prompt"] for line in lines]
    texts = [f"{known[number % len(known)]} {number}" for number in range(JOINED_TEXTS)]
    chats = [[{"role": "user", "content": text}] for text in texts[:JOINED_CHATS]]
    found: dict[str, Any] = {
        "texts": JOINED_TEXTS,
        "chats": JOINED_CHATS,
        "characters": round(statistics.mean(map(len, texts))),
    }
    pools: dict[str, tuple[list[Any], tuple[str, ...]]] = {
        "texts": (texts, ("column", "shuffled", "list", "records", "one by one")),
        "chats": (chats, ("column",)),
    }
    for pool, (items, kinds) in pools.items():
        uniform = np.full(len(items), 1 / len(items), dtype=np.float32)
        store = forged_store(work / f"join-{pool}", uniform, prompt_keys(items))
        saved = work / f"join-{pool}-data"
        datasets.Dataset.from_dict({"prompt": items}).save_to_disk(str(saved))
        for kind in kinds:
            for label in ("first", "again") if kind in ("column", "shuffled") else ("first",):
                spent = child(_JOIN, kind, str(store), str(saved), EMBSTORE_CACHE=str(work / f"cache-{pool}-{kind}"))
                us = {clock: round(1e6 * seconds / len(items), 3) for clock, seconds in spent.items()}
                found[f"{pool}, {kind}, {label}"] = {"us": us["seconds"], "cpu_us": us["processor_seconds"]}
    return found | {"load_average": [round(each, 1) for each in os.getloadavg()]}


# --- from python to the first batch -----------------------------------------------------------------------------------

_ONLINE = """
import time; started = time.perf_counter()
import json, sys
import numpy as np, torch, transformers, embstore
from embstore.training import DensitySampler
imported = time.perf_counter()
prompts = [json.loads(line)["prompt"] for line in open(sys.argv[1], encoding="utf-8")]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
loaded = time.perf_counter()
online = embstore.DensityAwareSampler(prompts, model, tokenizer, "cpu", 10)
iterator = iter(DensitySampler(online.density_weights))
batch = [prompts[next(iterator)] for _ in range(8)]
done = time.perf_counter()
np.save(sys.argv[3], np.asarray(online.density_weights, dtype=np.float64))
print(json.dumps({"imports_seconds": imported - started, "prompts_and_model_seconds": loaded - imported,
                  "density_seconds": done - loaded}))
"""

_PRECOMPUTED = """
import time; started = time.perf_counter()
import json, sys
import numpy
base = time.perf_counter()
from embstore.training import DensitySampler, load_weights
imported = time.perf_counter()
prompts = [json.loads(line)["prompt"] for line in open(sys.argv[1], encoding="utf-8")]
read = time.perf_counter()
weights = load_weights(sys.argv[2], expect_len=len(prompts))
if sys.argv[3] == "joined":
    weights = weights.for_dataset(prompts)
iterator = iter(DensitySampler(weights, positional=True))
batch = [prompts[next(iterator)] for _ in range(8)]
done = time.perf_counter()
print(json.dumps({"numpy_seconds": base - started, "embstore_import_seconds": imported - base,
                  "prompts_seconds": read - imported, "density_seconds": done - read}))
"""


def training_start(prompts: Path, model: Path, work: Path) -> dict[str, Any]:
    """One online run, and the same weights from a store, to the first eight prompts, in processes of their own.

    ``joined`` matches every prompt with its row by content, as a training run should; ``bare`` takes the rows in the
    store's order and compares their number only. The two take turns.
    """
    started = time.perf_counter()
    online = child(_ONLINE, str(prompts), str(model), str(work / "online.npy"))
    online["process_seconds"] = time.perf_counter() - started
    weights = np.load(work / "online.npy")
    with prompts.open(encoding="utf-8") as lines:
        keys_N = prompt_keys([json.loads(line)["prompt"] for line in lines])
    store = forged_store(work / "store", (weights / weights.sum()).astype(np.float32), keys_N)
    runs: dict[str, list[dict[str, float]]] = {"joined": [], "bare": []}
    for _ in range(ROUNDS):
        for kind, found in runs.items():
            started = time.perf_counter()
            found.append(child(_PRECOMPUTED, str(prompts), str(store), kind))
            found[-1]["process_seconds"] = time.perf_counter() - started
    medians = {
        kind: {field: statistics.median(run[field] for run in found) for field in found[0]} for kind, found in runs.items()
    }
    return {
        "prompts": len(weights),
        "rounds": ROUNDS,
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "online": {field: round(value, 3) for field, value in online.items()},
        **{kind: {field: round(value, 5) for field, value in each.items()} for kind, each in medians.items()},
        "times_faster": {kind: round(online["density_seconds"] / each["density_seconds"]) for kind, each in medians.items()},
    }


def child(code: str, *arguments: str, **environment: str) -> dict[str, float]:
    """What a fresh process prints last, as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def record(part: str, figures: dict[str, Any], prompts: Path, model: Path) -> None:
    """Merge one part's figures into the results file."""
    path = RESULTS / "training.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["command"] = f"python -m benchmarks.training --prompts {prompts.name} --model {model.name}"
    results["machine"] = machine(("numpy", "torch", "transformers"))
    results["machine"]["note"] = "shared with other work: times are upper bounds"
    results[part] = {"date": time.strftime("%Y-%m-%d"), **figures}
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
