"""Draws measured, for ``benchmarks.training``: speed and memory of an epoch, quotas, and which rows are drawn together."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from embstore.training import DensitySampler

TORCH_LIMIT = 1 << 24
# the last commit that cumulated rows in their stored order
BEFORE = "5c26fb9"
JOINT_ROUNDS = 7

_DRAW = """
import json, sys, time
import numpy as np
kind, rows, method = sys.argv[1], int(sys.argv[2]), sys.argv[3]
weights = np.random.default_rng(0).gamma(2.0, size=rows).astype(np.float32)
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
if kind == "torch":
    import torch
    from torch.utils.data import WeightedRandomSampler
    vector = torch.from_numpy(weights)
    torch.multinomial(vector[:1000], 1000, True)
    make = lambda: WeightedRandomSampler(vector, rows, generator=torch.Generator().manual_seed(0))
else:
    from embstore.training import DensitySampler
    list(DensitySampler(weights[:1000]))
    make = lambda: DensitySampler(weights, method=method)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
started, processor = time.perf_counter(), time.process_time()
sampler = make()
iterator = iter(sampler)
next(iterator)
first, processor = time.perf_counter() - started, time.process_time() - processor
for _ in iterator:
    pass
whole = time.perf_counter() - started
print(json.dumps({"first_ms": round(1e3 * first, 1), "first_cpu_ms": round(1e3 * processor, 1),
                  "draws_per_second": round(rows / whole),
                  "bytes_a_row": round((status("VmHWM") - before) / rows, 1)}))
"""


def draws() -> dict[str, Any]:
    """First index, rate and peak memory of one pass with one draw a row, each in a fresh process, three rounds each."""
    found: dict[str, Any] = {"load_average": [round(each, 1) for each in os.getloadavg()]}
    for rows in (1_000_000, 4_000_000, TORCH_LIMIT + 1):
        kinds = {"torch_WeightedRandomSampler": ("torch", "-"), "systematic": ("embstore", "systematic")}
        if rows == 1_000_000:
            kinds |= {"iid": ("embstore", "iid"), "without_replacement": ("embstore", "without_replacement")}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        errors: dict[str, str] = {}
        for _ in range(3):
            for name, (kind, method) in kinds.items():
                command = [sys.executable, "-c", _DRAW, kind, str(rows), method]
                if method == "without_replacement":
                    command[2] = _DRAW.replace("method=method", "num_samples=rows // 2, method=method")
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    errors[name] = done.stderr.strip().splitlines()[-1]
                else:
                    runs[name].append(json.loads(done.stdout))
        found[str(rows)] = {name: of_rounds(values) for name, values in runs.items() if values} | errors
    small, large = found["1000000"]["systematic"], found[str(TORCH_LIMIT + 1)]["systematic"]
    for field in ("first_ms", "first_cpu_ms"):
        further = (large[field] - small[field]) / (TORCH_LIMIT / 1e6 - 1)
        found[f"systematic_{field}_each_further_million"] = round(further, 1)
    theirs = found["1000000"]["torch_WeightedRandomSampler"]
    found["over_torch_at_1M"] = {
        "draws_per_second": round(small["draws_per_second"] / theirs["draws_per_second"], 2),
        "bytes_a_row": round(small["bytes_a_row"] / theirs["bytes_a_row"], 2),
    }
    return found


def of_rounds(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the least of the times: whatever else runs on the machine can only add to them."""
    chosen = {field: min if field.endswith("_ms") else statistics.median for field in runs[0]}
    return {field: choose(run[field] for run in runs) for field, choose in chosen.items()}


def quotas() -> dict[str, Any]:
    """Largest distance between the count of a row and its quota n p_i, over five passes."""
    found = {}
    for rows in (28_000, 1_000_000):
        weights = np.random.default_rng(rows).gamma(0.5, size=rows)
        exact = weights / math.fsum(weights)
        sampler = DensitySampler(weights, num_samples=rows)
        distance = max(
            float(np.abs(np.bincount(sampler.plan(epoch), minlength=rows) - rows * exact).max()) for epoch in range(5)
        )
        found[str(rows)] = {"largest_distance": distance}
    return found


# --- which rows are drawn together, and what it costs, before and after -------------------------------------------------

_JOINT = """
import json, math, sys
import numpy as np
from embstore.training import DensitySampler
N, RUNS = 4096, 1000
n = N // 2
weights, row = np.full(N, 1 / N, dtype=np.float32), np.arange(N)
taken = np.zeros((RUNS, N), dtype=np.int64)
for seed in range(RUNS):
    taken[seed, DensitySampler(weights, num_samples=n, seed=seed).plan(0)] = 1
classes = {str(p): [row % p == start for start in range(p)] for p in (2, 3, 4, 8, 64)}
classes["halves"] = [row < n, row >= n]
found = {}
for name, members in classes.items():
    share = [each.mean() for each in members]
    simple = [math.sqrt(n * s * (1 - s) * (N - n) / (N - 1)) for s in share]
    found[name] = round(max(taken[:, each].sum(axis=1).std() / sd for each, sd in zip(members, simple)), 3)
found["odd_share_sd"] = round(float(taken[:, 1::2].sum(axis=1).std() / n), 5)
both = n * (n - 1) / (N * (N - 1))
pairs = {"adjacent": row.reshape(-1, 2), "half_apart": row.reshape(2, -1).T,
         "random": np.random.default_rng(1).permutation(row).reshape(-1, 2)}
for name, pair in pairs.items():
    share = (taken[:, pair[:, 0]] & taken[:, pair[:, 1]]).mean(axis=0)
    found[f"pairs_{name}"] = round(float(np.abs(share - both).max() / math.sqrt(both * (1 - both) / RUNS)), 1)
print(json.dumps(found))
"""


def joint(work: Path) -> dict[str, Any]:
    """How rows are drawn together by ``BEFORE`` and by this checkout, and what an epoch of 1M draws costs; they take turns.

    Equal weights, 4,096 rows, half as many draws, 1,000 seeds. For each period: the largest sd of a class's number of draws,
    in sds of a simple random sample. For pairs: the largest deviation from n (n - 1) / (N (N - 1)), in standard errors.
    """
    old = work / BEFORE
    old.mkdir()
    packed = subprocess.Popen(["git", "archive", BEFORE, "embstore"], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=packed.stdout, mode="r|") as archive:
        archive.extractall(old, filter="data")
    roots = {"before": old, "after": Path.cwd()}
    load = [round(each, 1) for each in os.getloadavg()]
    found: dict[str, Any] = {"before_commit": BEFORE, "rounds": JOINT_ROUNDS, "load_average": load}
    for name, root in roots.items():
        found[name] = of_package(root, _JOINT)
    for method in ("systematic", "without_replacement"):
        code = _DRAW.replace("method=method", "num_samples=rows // 2, method=method") if method != "systematic" else _DRAW
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
        for _ in range(JOINT_ROUNDS):
            for name, root in roots.items():
                runs[name].append(of_package(root, code, "embstore", "1000000", method))
        for name, values in runs.items():
            found[name][method] = of_rounds(values)
        pairs = zip(runs["before"], runs["after"], strict=True)
        ratio = statistics.median(after["draws_per_second"] / before["draws_per_second"] for before, after in pairs)
        found["after"][method]["draws_per_second_over_before"] = round(ratio, 2)
    return found


def of_package(root: Path, code: str, *arguments: str) -> dict[str, Any]:
    """What a fresh process that imports embstore from this folder prints, as JSON."""
    checked = f"import embstore; assert embstore.__file__.startswith({str(root)!r}), embstore.__file__\n{code}"
    command, environment = [sys.executable, "-c", checked, *arguments], {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
