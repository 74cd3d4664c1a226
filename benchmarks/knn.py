"""Neighbour searches side by side: ``python -m benchmarks.knn --store STORE --work FOLDER [--parts store,engines,large]``.

``store``: the real rows at three sizes, scikit-learn over the full matrix as the original does it against the whole density
stage. ``shards``: one effort over one graph and over more. ``orders``: one graph along the cells and in shuffled order.
``engines``: what a user could take instead, on seeded easy and hard points of 256 dimensions. ``copies``: plain hnswlib and
embstore where a few prompts are repeated hundreds of times. ``large``: the density stage up to a million rows under 2 GiB.
Every search runs in a process of its own; figures are written as they come, to ``benchmarks/results/knn.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import knn_sets
from benchmarks.acceptance import cpu_name
from embstore.host.threads import num_cores

RESULTS = Path(__file__).parent / "results" / "knn.json"
GRAPHS = ("hnswlib", "embstore-hnsw", "usearch", "faiss-hnsw")
PARTS = ("store", "shards", "orders", "engines", "copies", "large")
BUDGET_BYTES = 2 << 30
EF = {"easy": [16, 24, 32, 48, 64, 96, 128], "hard": [128, 512]}
# each effort is a graph of its own, so the larger ones get the one that should do
EF_OF_ONE_GRAPH = {28_000: [12, 16], 100_000: [32, 40], 300_000: [64, 96]}
RECALL_OF_GROWTH = 0.99
SHARDED_ROWS = 28_000
ORDERED_ROWS = (28_000, 100_000, 300_000)
REPEATS, REPEATED_BELOW_ROWS = 3, 50_000  # of the part engines
LARGEST_HARD_GRAPH = 100_000
GRAPHS_OF_HARD_ROWS = 28_000  # above, graphs take a quarter of an hour each and still miss one neighbour in fifty
Figures = dict[str, Any]


class Bench:
    """Options, results so far, and how one search is run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: Figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def prepare(self, folder: Path, points: knn_sets.Points) -> None:
        """Lay out points and their truth."""
        np.save(folder / "points.npy", points)
        rows, true_QK = knn_sets.truth(points)
        np.save(folder / "rows.npy", rows)
        np.save(folder / "true.npy", true_QK)

    def search(self, engine: str, folder: Path, *, kernel: str | None = None, **options: object) -> Figures:
        """One search in a process of its own; ``kernel``: what OpenBLAS is told to use."""
        # without the settings that pin an older BLAS kernel here: every engine gets what its users get
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        environment |= {"OPENBLAS_CORETYPE": kernel} if kernel else {}
        command = [sys.executable, "-m", "benchmarks.knn_engines", engine, str(folder)]
        command.append(json.dumps({"work": str(folder), **options}))
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
        print(f"  {engine}: {figures}", flush=True)
        return figures

    def repeated(self, engine: str, folder: Path, rows: int, *, kernel: str | None = None, **options: object) -> Figures:
        """A search of few rows takes a second or two: of three runs, each a process, the one with the median total."""
        count = REPEATS if rows < REPEATED_BELOW_ROWS else 1
        runs = [self.search(engine, folder, kernel=kernel, **options) for _ in range(count)]
        return sorted(runs, key=lambda run: sum(each["seconds"] for each in run["tried"]))[count // 2]

    def earlier(self, part: str) -> Figures:
        """Figures of a part so far: sizes that this run does not measure stay as they are."""
        return {title: found for title, found in self.results.get(part, {}).items() if title.split()[-1].isdigit()}

    def record(self, part: str, figures: Figures) -> None:
        """Write a part's figures, with what they were measured on."""
        rows = {"store": "store-rows", "engines": "rows", "large": "large-rows"}.get(part)
        sizes = sorted({int(title.split()[-1]) for title in figures if title.split()[-1].isdigit()})
        chosen = f" --{rows} {','.join(map(str, sizes))}" if rows else ""
        command = f"python -m benchmarks.knn --store STORE --parts {part}{chosen}"
        self.results[part] = figures | {"date": time.strftime("%Y-%m-%d"), "command": command}
        packages = ("embstore", "torch", "numpy", "scikit-learn", "faiss-cpu", "hnswlib", "usearch")
        self.results["versions"] = {name: importlib.metadata.version(name) for name in packages}
        self.results["versions"]["python"] = sys.version.split()[0]
        cores = num_cores()
        self.results["hardware"] = f"{cpu_name()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
        RESULTS.write_text(json.dumps(self.results, indent=1) + "\n")


def main() -> None:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, help="a finished store of the real prompts, for the parts store and shards")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--store-rows", default="7000,14000,28000")
    parser.add_argument("--rows", default="28000,100000", help="of the part engines")
    parser.add_argument("--large-rows", default="28000,100000,300000,1000000", help="of the part large")
    parser.add_argument("--kinds", default="easy,hard", help="of the parts engines and large")
    options = parser.parse_args()
    bench = Bench(options)
    parts: dict[str, Callable[[Bench], Iterator[Figures]]] = {
        "store": store,
        "shards": shards,
        "orders": orders,
        "engines": engines,
        "copies": copies,
        "large": large,
    }
    for part in options.parts.split(","):
        for figures in parts[part](bench):
            bench.record(part, figures)


def store(bench: Bench) -> Iterator[Figures]:
    """The real rows: the original's search of the full matrix, and the density stage in one piece and in four shards."""
    figures = bench.earlier("store")
    for rows in (int(size) for size in bench.options.store_rows.split(",")):
        with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
            folder = Path(name)
            bench.prepare(folder, knn_sets.make("store", rows, store=bench.options.store))
            row: Figures = {}
            for title, density in (
                ("auto", {"knn": "auto"}),
                ("hnsw", {"knn": "hnsw"}),
                ("hnsw, 4 shards", {"knn": "hnsw", "shards": 4}),
            ):
                row[title] = bench.search("embstore", folder, memory_bytes=1 << 30, **density)
            row["sklearn"] = bench.search("sklearn", folder, store=str(bench.options.store.resolve()), rows=rows)
            slow = row["sklearn"]["tried"][0]["seconds"]
            row["times_faster"] = {
                title: round(slow / row[title]["tried"][0]["seconds"]) for title in ("auto", "hnsw", "hnsw, 4 shards")
            }
            figures[str(rows)] = row | {"date": time.strftime("%Y-%m-%d")}
            yield figures


def shards(bench: Bench) -> Iterator[Figures]:
    """One effort over one graph and over several: what cutting the points costs, and that it costs no recall."""
    figures: Figures = {"rows": SHARDED_ROWS}
    for kind in ("store", "easy"):
        with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
            folder = Path(name)
            bench.prepare(folder, knn_sets.make(kind, SHARDED_ROWS, store=bench.options.store))
            for count in (1, 2, 4, 8, 16):
                found = bench.search("embstore-hnsw", folder, ef_construction=100, ef=[64], shards=count)
                figures[f"{kind} {count}"] = found
    yield figures


def orders(bench: Bench) -> Iterator[Figures]:
    """One graph along the cells and in shuffled order, on easy points: decision 0022."""
    figures: Figures = {}
    for rows in ORDERED_ROWS:
        with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
            folder = Path(name)
            bench.prepare(folder, knn_sets.make("easy", rows, store=None))
            graph: Figures = {"ef_construction": 100, "ef": [48], "shards": 1}
            figures[f"easy {rows}"] = {
                "shuffled": bench.search("embstore-hnsw", folder, shuffled=True, **graph),
                "along cells": bench.search("embstore-hnsw", folder, **graph),
            }
    yield figures


def engines(bench: Bench) -> Iterator[Figures]:
    """Engines that a user could take instead, on the same points and k."""
    figures = bench.earlier("engines")
    for rows in (int(size) for size in bench.options.rows.split(",")):
        for kind in bench.options.kinds.split(","):
            with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
                folder = Path(name)
                bench.prepare(folder, knn_sets.make(kind, rows, store=None))
                graph: Figures = {"ef_construction": 100 if kind == "easy" else 200, "ef": EF[kind]}
                # the kernel for AVX-512 that faiss's BLAS chooses by itself may be the slower one: the flat index gets both
                flat = [bench.repeated("faiss-flat", folder, rows, kernel=kernel) for kernel in (None, "Haswell")]
                found = {
                    "faiss-flat": min(flat, key=lambda each: each["tried"][0]["seconds"]),
                    "faiss-flat as installed": flat[0],
                    "embstore-exact": bench.repeated("embstore-exact", folder, rows, k=[10, 32]),
                }
                if kind == "easy" or rows <= GRAPHS_OF_HARD_ROWS:
                    for engine in GRAPHS:
                        found[engine] = bench.repeated(engine, folder, rows, **graph)
                figures[f"{kind} {rows}"] = found | {"summary": _summary(found), "date": time.strftime("%Y-%m-%d")}
                yield figures


def _summary(found: Figures) -> Figures:
    """Ratios in this run: to the flat index; and of graphs, each at its least setting of one recall, at most 0.999.

    Plain hnswlib gives another graph in every run, and some do not reach 0.999 at any setting tried.
    """
    exact = found["embstore-exact"]["tried"][0]["seconds"]
    summary: Figures = {
        f"{flat}_over_exact": round(found[flat]["tried"][0]["seconds"] / exact, 2)
        for flat in ("faiss-flat", "faiss-flat as installed")
    }
    graphs = {engine: found[engine]["tried"] for engine in GRAPHS if engine in found}
    if graphs:
        best = [max(each["recall"] for each in graphs[engine]) for engine in ("hnswlib", "embstore-hnsw")]
        summary["equal_recall"] = recall = min(0.999, *best)
        seconds = {
            engine: min(each["seconds"] for each in tried if each["recall"] >= recall)
            for engine, tried in graphs.items()
            if any(each["recall"] >= recall for each in tried)
        }
        summary["seconds_at_equal_recall"] = seconds
        summary["embstore_over_hnswlib"] = round(seconds["embstore-hnsw"] / seconds["hnswlib"], 3)
    return summary


def copies(bench: Bench) -> Iterator[Figures]:
    """8 groups of 500 copies among 4000 distinct points of 64 dimensions, in file order."""
    random = np.random.default_rng(0)
    distinct = random.standard_normal((4008, 64)).astype(np.float32)
    rows = np.concatenate([np.repeat(np.arange(8), 500), np.arange(8, 4008)])
    points = distinct[rows]
    points -= points.mean(axis=0)
    with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
        folder = Path(name)
        bench.prepare(folder, points)
        plain = bench.search("hnswlib", folder, ef_construction=200, ef=[64, 200])
        yield {"hnswlib": plain, "embstore": _distinct_recall(bench, folder, points)}


def _distinct_recall(bench: Bench, folder: Path, points: knn_sets.Points) -> Figures:
    """Recall of distinct neighbours: every copy is one vector, so the truth is that of the distinct points."""
    first = np.unique(points, axis=0, return_index=True)[1]
    np.save(folder / "points.npy", points)
    rows, true_QK = knn_sets.truth(points[np.sort(first)])
    np.save(folder / "rows.npy", np.sort(first)[rows])
    np.save(folder / "true.npy", true_QK)
    return bench.search("embstore", folder, knn="hnsw", memory_bytes=1 << 30)


def large(bench: Bench) -> Iterator[Figures]:
    """The density stage under 2 GiB, from 28 thousand to a million rows; one graph alone; and how time grows."""
    figures = bench.earlier("large")
    for rows in (int(size) for size in bench.options.large_rows.split(",")):
        for kind in bench.options.kinds.split(","):
            with tempfile.TemporaryDirectory(dir=bench.options.work) as name:
                folder = Path(name)
                bench.prepare(folder, knn_sets.make(kind, rows, store=None))
                found = {"auto": bench.search("embstore", folder, knn="auto", memory_bytes=BUDGET_BYTES, mapped=True)}
                if kind == "easy" and rows in EF_OF_ONE_GRAPH:
                    graph: Figures = {"ef_construction": 100, "ef": EF_OF_ONE_GRAPH[rows], "shards": 1}
                    found["one graph"] = bench.search("embstore-hnsw", folder, **graph)
                elif kind == "easy":
                    graphs: Figures = {"ef_construction": 100, "ef": [64], "shards": 2}
                    found["two graphs"] = bench.search("embstore-hnsw", folder, mapped=True, **graphs)
                elif rows <= LARGEST_HARD_GRAPH:
                    found["one graph"] = bench.search("embstore-hnsw", folder, ef_construction=200, ef=[512], shards=1)
                figures[f"{kind} {rows}"] = found | {"date": time.strftime("%Y-%m-%d")}
                figures = dict(sorted(figures.items(), key=lambda each: (int(each[0].split()[1]), each[0])))
                yield figures | {"growth": _growth(figures)}


def _growth(figures: Figures) -> Figures:
    """Fitted exponents of seconds over rows: the density stage, exact; one graph at its least setting of recall 0.99."""
    exponents: Figures = {}
    for kind in ("easy", "hard"):
        for engine, name in (("auto", "exact"), ("one graph", "one graph")):
            seen = []
            for title, found in figures.items():
                if title.startswith(f"{kind} ") and engine in found:
                    good = [each["seconds"] for each in found[engine]["tried"] if each["recall"] >= RECALL_OF_GROWTH]
                    if good:
                        seen.append((math.log(int(title.split()[1])), math.log(min(good))))
            if len(seen) > 1:
                rows, seconds = np.array(seen).T
                slope = float(np.polyfit(rows, seconds, 1)[0])
                exponents[f"{name}, {kind}"] = round(slope, 3)
    return exponents


if __name__ == "__main__":
    main()
