"""How near the embedding pass is to the machine's limit, beside what a user would do otherwise.

``python -m benchmarks.embedding --prompts FILE --model FOLDER [--parts machine,sweep,methods,writer,profile,dtype,scale]``

Every method runs in a process of its own (benchmarks/methods.py). Those that are compared run in turns of a second
(benchmarks/interleaving.py); figures are medians over rounds, and ratios medians of the ratios in each round. Results go to
``benchmarks/results/embedding.json``; ``python -m benchmarks.pages`` shows them in docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import mmap
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.acceptance import cpu_name
from benchmarks.interleaving import run_interleaved
from embstore import open_store
from embstore.core.diagnostics import total_variation
from embstore.core.format import chunk_name
from embstore.core.interfaces import RowBlock, WindowCounts
from embstore.core.plan import grid_of
from embstore.host.threads import num_cores
from embstore.storage.chunk_writer import WindowWriter
from embstore.storage.chunks import decode_chunk, read_chunk
from embstore.storage.direct import open_direct
from embstore.storage.journal import read_journal
from embstore.storage.row_files import map_basis
from embstore.storage.writer import StoreWriter

RESULTS = Path(__file__).parent / "results" / "embedding.json"
DTYPES = ("float32", "bfloat16")
PARTS = ("machine", "sweep", "methods", "streamed", "writer", "profile", "dtype", "scale")
WRITTEN_WINDOWS = 4  # one after the other: what a writer sustains, not how it starts
METHODS = ("original", "careful", "backbone", "packed", "rows", "store")
FLOORS = ("backbone", "packed")
SLOW_ROWS = {"original": 576, "careful": 768}  # about as long as the others take
STREAMED_ROWS = {"original": 64, "rows": 1024}
Figures = dict[str, Any]


class Run:
    """Options, the results so far, and how one method is run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._path: Path = options.results
        self.results: Figures = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.threads = num_cores()

    def method(self, name: str, dtype: str, rows: int, **more: object) -> Figures:
        """One run of a method in a process of its own."""
        (figures,) = self.in_turns([{"method": name, "dtype": dtype, "rows": rows} | more])
        return figures

    def in_turns(self, jobs: list[Figures]) -> list[Figures]:
        """Runs of methods, each in a process of its own, in turns."""
        given = self.options
        common = {"threads": self.threads, "work": str(given.work), "prompts": str(given.prompts), "model": str(given.model)}
        with tempfile.TemporaryDirectory() as folder:
            commands = []
            for number, job in enumerate(jobs):
                file = Path(folder) / f"{number}.json"
                file.write_text(json.dumps(common | job))
                commands.append([sys.executable, "-m", "benchmarks.methods", str(file)])
            return run_interleaved(commands)

    def record(self, part: str, figures: Figures) -> None:
        """Keep a part's figures, with what they were measured on."""
        given = self.options
        command = f"python -m benchmarks.embedding --prompts {given.prompts.name} --model {given.model.name}"
        command += f" --rows {given.rows} --rounds {given.rounds} --swept-tokens {given.swept_tokens}"
        self.results[part] = figures | {"date": time.strftime("%Y-%m-%d"), "command": f"{command} --parts {part}"}
        packages = ("embstore", "torch", "transformers", "numpy", "numcodecs")
        self.results["versions"] = {name: importlib.metadata.version(name) for name in packages}
        self.results["versions"]["python"] = sys.version.split()[0]
        self.results["hardware"] = f"{cpu_name()}, {self.threads} cores, {torch.backends.cpu.get_cpu_capability()}"
        self._path.write_text(json.dumps(self.results, indent=1) + "\n")


def main() -> None:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("demo_output/embedding"), help="on the disk to be measured")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=12288, help="prompts of the fast methods: three windows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1024,4096,8192,28000", help="of the part scale")
    parser.add_argument("--swept-tokens", default="512,1024,2048,4096,8192", help="of a batch, for the floor")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file for another machine")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt: no stopped process is left behind
    run = Run(options)
    parts: dict[str, Callable[[Run], Figures]] = {
        "machine": machine, "sweep": sweep, "methods": methods, "streamed": streamed, "writer": writer,
        "scale": scale, "dtype": dtype, "profile": profile,
    }  # fmt: skip
    for part in options.parts.split(","):
        started = time.perf_counter()
        run.record(part, parts[part](run))
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)


def machine(run: Run) -> Figures:
    """GEMM rates in GFLOP/s: a large square product, and one of 2048 tokens as the model's feed-forward layer has it."""
    config = json.loads((run.options.model / "config.json").read_text())
    shapes = {"square": (2048, 2048, 2048), "layer": (2048, config["intermediate_size"], config["hidden_size"])}
    torch.set_num_threads(run.threads)
    return {dtype: {name: _gemm_gflops(*shape, getattr(torch, dtype)) for name, shape in shapes.items()} for dtype in DTYPES}


def _gemm_gflops(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    times = []
    for _ in range(25):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - started)
    return 2 * rows * columns * inner / statistics.median(times[5:]) / 1e9


def sweep(run: Run) -> Figures:
    """The backbone under every setting, on an eighth of the rows, best of two passes."""
    settings = [
        {"batch_tokens": tokens, "mask": mask, "workers": workers}
        for tokens in map(int, run.options.swept_tokens.split(","))
        for mask in (True, False)
        for workers in sorted({1, run.threads})
    ]
    found: Figures = {}
    for dtype in DTYPES:
        rounds = run.method("backbone", dtype, run.options.rows // 8, settings=settings, rounds=2)["rounds"]
        table = []
        for setting in settings:
            same = [each for each in rounds if each["settings"] == setting]
            best = min(same, key=lambda each: each["seconds"])
            waste = 1 - best["tokens"] / best["padded_tokens"]
            table.append(setting | {"rows_per_second": best["rows"] / best["seconds"], "padding_waste": waste})
        best_setting = max(table, key=lambda each: each["rows_per_second"])
        found[dtype] = {"best": {name: best_setting[name] for name in settings[0]}, "table": table}
    return found


def methods(run: Run) -> Figures:
    """All methods in either dtype, in turns; the careful user's alone, for it takes gigabytes, and is nobody's measure."""
    seen: dict[str, dict[str, list[Figures]]] = {dtype: {name: [] for name in METHODS} for dtype in DTYPES}
    for _ in range(run.options.rounds):
        in_turns = [(dtype, name) for dtype in DTYPES for name in METHODS if name != "careful"]
        for together in ([("float32", "careful")], [("bfloat16", "careful")], in_turns):
            jobs = [
                {"method": name, "dtype": dtype, "rows": SLOW_ROWS.get(name, run.options.rows)}
                | {"settings": [run.results["sweep"][dtype]["best"]]}
                for dtype, name in together
            ]
            for (dtype, name), figures in zip(together, run.in_turns(jobs), strict=True):
                seen[dtype][name].append(figures["rounds"][0] if name in FLOORS else figures)
        # minutes a round: those that were run are not lost with the others
        run.record("methods", found := _methods(seen, run.results["machine"]))
    return found


def _methods(seen: dict[str, dict[str, list[Figures]]], machine: Figures) -> Figures:
    found = {dtype: {name: _summary(each) for name, each in rounds.items()} for dtype, rounds in seen.items()}
    for dtype, table in found.items():
        for name in FLOORS:
            floor = table[name]
            floor["gflops"] = seen[dtype][name][0]["flops"] / floor["seconds"] / 1e9
            floor["share_of_gemm_rate"] = floor["gflops"] / machine[dtype]["square"]
        for figures in table.values():
            figures["share_of_floor"] = _ratio(figures, table["backbone"])
            figures["share_of_raised_floor"] = _ratio(figures, table["packed"])
            figures["times_original"] = _ratio(figures, table["original"])
            figures["times_float32_original"] = _ratio(figures, found["float32"]["original"])
        rows, store = table["rows"], table["store"]
        for name, least in (("backbone", table["backbone"]), ("packed_backbone", table["packed"])):
            store[f"milliseconds_a_row_beyond_{name}"] = 1e3 * statistics.median(
                1 / ours - 1 / other
                for ours, other in zip(store["rows_per_second_of_rounds"], least["rows_per_second_of_rounds"], strict=True)
            )
        tokenising = statistics.median(each["tokenise_seconds"] / each["rows"] for each in seen[dtype]["backbone"])
        store["milliseconds_a_row_tokenising"] = 1e3 * tokenising
        store["seconds_over_without_store"] = _ratio(rows, store)
    return found


def _ratio(one: Figures, other: Figures) -> float:
    """Median over rounds of the ratio of rates: what slows the machine down for minutes slows both."""
    rounds = zip(one["rows_per_second_of_rounds"], other["rows_per_second_of_rounds"], strict=True)
    return float(statistics.median(left / right for left, right in rounds))


def _summary(rounds: list[Figures]) -> Figures:
    rates = [each["rows"] / each["seconds"] for each in rounds]
    middle = rounds[0]
    figures: Figures = {
        "rows": middle["rows"],
        "seconds": statistics.median(each["seconds"] for each in rounds),
        "rows_per_second": statistics.median(rates),
        "rows_per_second_of_rounds": rates,
        "tokens_per_second": statistics.median(each["tokens"] / each["seconds"] for each in rounds),
        "peak_anonymous_bytes": max(each["peak_anonymous_bytes"] for each in rounds),
    }
    if "padded_tokens" in middle:
        figures["padding_waste"] = 1 - middle["tokens"] / middle["padded_tokens"]
    if "stored_bytes" in middle:
        figures["stored_bytes_per_second"] = middle["stored_bytes"] / figures["seconds"]
    return figures


def streamed(run: Run) -> Figures:
    """A head that cannot be pooled before, of the given model's size: a soft cap; float32."""
    given = json.loads((run.options.model / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: given[name] for name in (*names, "bos_token_id", "eos_token_id", "pad_token_id")}
    configs = {"capped": transformers.NanoChatConfig(**sizes, max_position_embeddings=512, final_logit_softcapping=15.0)}
    found: Figures = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        folder = run.options.work / f"model-{name}"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(run.options.model).save_pretrained(folder)
        jobs = [
            {"method": method, "dtype": "float32", "rows": rows, "model": str(folder)}
            for method, rows in STREAMED_ROWS.items()
        ]
        rounds = [run.in_turns(jobs) for _ in range(run.options.rounds)]
        shutil.rmtree(folder)
        summaries = (_summary(list(each)) for each in zip(*rounds, strict=True))
        table = dict(zip(STREAMED_ROWS, summaries, strict=True))
        times = {"times_original": _ratio(table["rows"], table["original"])}
        found[name] = table | times | {"class": type(config).__name__}
    return found


def writer(run: Run) -> Figures:
    """A writer alone, fed with rows of a real store, against raw durable writes of the same sizes on the same disk."""
    folder = run.options.work / "writer"
    shutil.rmtree(folder, ignore_errors=True)
    run.method("store", "float32", 4096, keep=str(folder / "store"))
    finished = open_store(folder / "store")
    spec, record = finished.spec, read_journal(finished.root).windows[0]
    blocks = [decode_chunk(read_chunk(finished.root, spec, chunk), spec, chunk.index) for chunk in record.chunks]
    rates: dict[str, list[float]] = {"raw": [], "raw, past the page cache": [], "writer": []}
    sizes = [chunk.bytes for chunk in record.chunks] * WRITTEN_WINDOWS
    total = sum(sizes)
    longer = dataclasses.replace(spec, rows=WRITTEN_WINDOWS * spec.window_rows)
    for _ in range(7):
        rates["raw"].append(total / _raw_seconds(folder / "raw", sizes))
        rates["raw, past the page cache"].append(total / _raw_seconds(folder / "raw", sizes, direct=True))
        target = folder / "copy"
        with StoreWriter(target, resume=False) as copy:
            same = copy.create(longer, map_basis(finished.root, spec.embedding))
            grid = grid_of(same)
            given = [
                RowBlock(
                    emb_BV=block[: rows.num_rows],
                    coord_BR=np.zeros((rows.num_rows, spec.embedding.rank), dtype=np.float32),
                    residual_B=np.zeros(rows.num_rows, dtype=np.float32),
                )
                for (_, rows), block in zip(grid.chunks(0), blocks, strict=True)
            ]
            started = time.perf_counter()
            with contextlib.closing(WindowWriter(target, same)) as chunks:
                for window in range(WRITTEN_WINDOWS):
                    written = chunks.write(window, iter(given), lambda: WindowCounts(tokens=0, truncated=0, splits=0))
                    copy.commit_window(same, written)
            rates["writer"].append(total / (time.perf_counter() - started))
        shutil.rmtree(target)
    shutil.rmtree(folder)
    # the disk is shared, and some rounds find it at half its rate: the median is held against the best raw round
    raw, direct, ours = max(rates["raw"]), max(rates["raw, past the page cache"]), statistics.median(rates["writer"])
    return {
        "chunks": len(sizes),
        "bytes": total,
        "chunk": chunk_name(0),
        "raw_bytes_per_second": raw,
        "writer_bytes_per_second": ours,
        "share_of_raw": ours / raw,
        "direct_bytes_per_second": direct,
        "share_of_direct": ours / direct,
        "bytes_per_second_of_rounds": rates,
    }


def _raw_seconds(folder: Path, sizes: list[int], *, direct: bool = False) -> float:
    folder.mkdir(parents=True)
    data = mmap.mmap(-1, max(sizes) + mmap.PAGESIZE)  # a map is aligned, as direct writes want it
    data.write(os.urandom(max(sizes)))
    started = time.perf_counter()
    for index, size in enumerate(sizes):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        handle, is_direct = (
            open_direct(folder / "temp", flags, 0o644) if direct else (os.open(folder / "temp", flags), False)
        )
        # rounded up to whole pages past the page cache, and cut
        view = memoryview(data)[: -(-size // mmap.PAGESIZE) * mmap.PAGESIZE if is_direct else size]
        while view:
            view = view[os.write(handle, view) :]
        os.ftruncate(handle, size)
        os.fsync(handle)
        os.close(handle)
        (folder / "temp").rename(folder / str(index))
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def scale(run: Run) -> Figures:
    """Rows a second and memory of the embedding stage over the number of prompts, in the dtype that auto takes.

    A round goes up to the largest number and down again, and each is held against the largest one of its round.
    """
    sizes = sorted(int(size) for size in run.options.sizes.split(","))
    seen: dict[int, list[Figures]] = {size: [] for size in sizes}
    shares: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(run.options.rounds):
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for size in (*sizes, *reversed(sizes[:-1])):
            figures = run.method("store", run.results["dtype_of_scale"], size)
            seen[size].append(figures)
            rates[size].append(figures["rows"] / figures["seconds"])
        for size in sizes:
            shares[size].append(statistics.mean(rates[size]) / rates[sizes[-1]][0])
    found = [_summary(seen[size]) | {"share_of_largest": statistics.median(shares[size])} for size in sizes]
    of_largest = [each["share_of_largest"] for each in found]
    return {"sizes": found, "slowest_over_fastest": min(of_largest) / max(of_largest)}


def dtype(run: Run) -> Figures:
    """bfloat16 rows against float32 rows over all prompts: neighbours and weights; and what auto decides here."""
    stores = {}
    found: Figures = {}
    for name in (*DTYPES, "auto"):
        keep = run.options.work / f"dtype-{name}"
        shutil.rmtree(keep, ignore_errors=True)
        figures = run.method("store", name, 0 if name != "auto" else 512, keep=str(keep))
        stores[name] = open_store(keep)
        found[name] = {"rows": figures["rows"], "rows_per_second": figures["rows"] / figures["seconds"]}
    found["auto_takes"] = stores["auto"].spec.embedding.dtype
    run.results["dtype_of_scale"] = found["auto_takes"]
    exact, other = (np.asarray(stores[name].neighbor_ids)[:, :10] for name in DTYPES)
    hits = [len(np.intersect1d(left, right)) for left, right in zip(exact, other, strict=True)]
    found["recall_at_10"] = float(np.mean(hits)) / 10
    found["total_variation"] = total_variation(*(np.asarray(stores[name].weights, dtype=np.float64) for name in DTYPES))
    for name in stores:
        shutil.rmtree(run.options.work / f"dtype-{name}")
    return found


def profile(run: Run) -> Figures:
    """Shares of the CPU time of one window, by operation, and the stages of the embedding pass."""
    return {name: run.method("profile", name, 2048) for name in DTYPES}


if __name__ == "__main__":
    main()
