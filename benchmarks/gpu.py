"""The embedding pass on a CUDA device: how near it is to the device's limit, and what the host and the disk take.

``python -m benchmarks.gpu --prompts FILE --model FOLDER [--models given,large] [--parts machine,floor,embed,...]``

Two models: the one given, and a seeded random Llama of 1.2 billion parameters that is made on the device and saved under
``--work``. The floor is the backbone alone in bfloat16, its token batches already on the device, under the best setting of
a sweep. Parts are recorded in ``benchmarks/results/gpu.json`` one by one, so a run that is cut off keeps what it measured;
``python -m scripts.performance_page`` renders them into docs/performance.md.

Shapes: B rows of a batch, T tokens, D model width, V vocabulary, R coordinates.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.acceptance import cpu_name
from benchmarks.methods import MAX_TOKENS, texts_of
from embstore.admission import CHUNK_BYTES
from embstore.compute.embed import LogitEmbedder
from embstore.compute.models import locate_model
from embstore.compute.source import TorchSource
from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.embedder import PromptReader
from embstore.core.events import Event, Observer, RowsCommitted, StageFinished, StageStarted
from embstore.core.format import EmbeddingSpec, ModelIdentity
from embstore.core.prompts import Prompt
from embstore.core.rows import chunk_rows_near
from embstore.pipeline import build
from embstore.storage.chunks import encode_chunk
from embstore.storage.place import file_system

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MODELS = ("given", "large")
PARTS = ("machine", "floor", "embed", "profile", "original", "compile")
SWEPT_TOKENS = (8192, 16384, 32768, 65536)
PEAK_BF16_FLOPS = 989e12  # NVIDIA's datasheet for the H100 SXM and H200, dense
WINDOW_ROWS = 4096
DEVICE = "cuda"
Figures = dict[str, Any]
_Event: Any = torch.cuda.Event  # torch leaves it untyped


class Run:
    """Options, the results so far, and what parts share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: Figures = json.loads(options.results.read_text()) if options.results.exists() else {}
        self.opened: dict[str, Opened] = {}  # embedders that another part uses too, one model at a time

    def record(self, path: Sequence[str], figures: Figures) -> None:
        """Keep a part's figures, with what they were measured on."""
        at = self.results
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = figures | {"date": time.strftime("%Y-%m-%d")}
        packages = ("torch", "transformers", "numpy", "numcodecs")
        self.results["versions"] = {name: importlib.metadata.version(name) for name in packages}
        self.results["versions"] |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
        self.results["command"] = "python -m benchmarks.gpu --prompts FILE --model FOLDER"
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        self.options.results.write_text(json.dumps(self.results, indent=1) + "\n")

    @functools.cached_property
    def peak_flops(self) -> float:
        """Measured rate of a large bfloat16 product; the datasheet's where the part machine was left out."""
        return float(self.results.get("machine", {}).get("bfloat16_flops", PEAK_BF16_FLOPS))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder, its prompts, and how many rows the parts take."""

    name: str
    folder: Path
    texts: list[str]
    swept_rows: int
    original_rows: int
    config: Any
    lengths_N: NDArray[np.int64] = field(repr=False)  # tokens of each prompt
    tokens_NT: torch.Tensor = field(repr=False)  # padded, on the device

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """As the embedder takes them."""
        return [Prompt(id=None, text=text) for text in self.texts]

    def flops(self, backbone_parameters: int, rows: Sequence[int] | None = None, *, head: bool) -> float:
        """Of real tokens: 2 a parameter, the causal half of attention, and with ``head`` one V-wide product a row."""
        config = self.config
        lengths_N = (self.lengths_N if rows is None else self.lengths_N[list(rows)]).astype(np.float64)
        width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        attention = 2 * float((lengths_N**2).sum()) * width * config.num_hidden_layers
        wide = 2.0 * len(lengths_N) * config.hidden_size * config.vocab_size if head else 0.0
        return float(2 * backbone_parameters * float(lengths_N.sum()) + attention + wide)


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
    parser.add_argument("--large-rows", type=int, default=8192, help="prompts for the large model")
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
                    subjects[name] = _subject(run, name)
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


def _subject(run: Run, name: str) -> Subject:
    options = run.options
    folder = options.model if name == "given" else _large_model(options)
    rows = options.rows if name == "given" else options.large_rows
    texts = texts_of({"prompts": str(options.prompts), "rows": rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths_N = np.array([len(ids) for ids in tokens])
    tokens_NT = np.zeros((len(tokens), lengths_N.max()), dtype=np.int64)
    tokens_NT[np.arange(lengths_N.max()) < lengths_N[:, None]] = np.concatenate(tokens)
    subject = Subject(
        name=name,
        folder=folder,
        texts=texts,
        swept_rows=len(texts) if name == "given" else min(len(texts), 2048),
        original_rows=1024 if name == "given" else 256,
        config=transformers.AutoConfig.from_pretrained(folder),
        lengths_N=lengths_N,
        tokens_NT=torch.from_numpy(tokens_NT).to(DEVICE),
    )
    config = subject.config
    described = {
        "name": folder.name if name == "given" else "random Llama",
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "rows": len(texts),
        "tokens": int(subject.lengths_N.sum()),
    }
    run.record(["models", name, "model"], described)
    return subject


def _large_model(options: argparse.Namespace) -> Path:
    """A Llama with the shape of a current 1B model, random weights, and the given model's tokenizer."""
    folder: Path = options.work / "large-model"
    if (folder / "config.json").exists():
        return folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(run: Run) -> Figures:
    """What products, copies, the disk and the compressor reach here."""
    properties = torch.cuda.get_device_properties(0)
    work: Path = run.options.work
    found: Figures = {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "file_system": file_system(work),
        "bfloat16_flops": _product_flops(8192, 8192, 8192, torch.bfloat16),
        "float32_flops": _product_flops(8192, 8192, 8192, torch.float32),
        # one slab of rows under the large model's head
        "float32_head_flops": _product_flops(160, 128256, 2048, torch.float32),
    }
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32_head_flops"] = _product_flops(160, 128256, 2048, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    on_device = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    for name, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=pinned)
        found[f"{name}_to_host_bytes_per_second"] = _rate(len(host), functools.partial(host.copy_, on_device))
        found[f"{name}_to_device_bytes_per_second"] = _rate(len(host), functools.partial(on_device.copy_, host))
    started = time.perf_counter()
    torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    found["seconds_to_pin_a_chunk"] = time.perf_counter() - started
    rows_BV = (np.random.default_rng(0).standard_normal((112, 128256)) / 358).astype(np.float16)
    for threads in (1, 2, 4, 8):
        found[f"encode_{threads}_bytes_per_second"] = _encode_rate(rows_BV, threads)
    for writers in (1, 4):
        found[f"durable_write_{writers}_bytes_per_second"] = _write_rate(work / "raw", writers)
    return found


def _product_flops(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    left = torch.randn(rows, inner, dtype=dtype, device=DEVICE)
    right = torch.randn(columns, inner, dtype=dtype, device=DEVICE)
    seconds = _device_seconds(lambda: torch.nn.functional.linear(left, right))
    return 2 * rows * columns * inner / seconds


def _rate(size: int, work: Callable[[], object]) -> float:
    return size / _device_seconds(work)


def _device_seconds(work: Callable[[], object], *, repeats: int = 12) -> float:
    """Median over single runs, by the device's clock, after three that are not counted."""
    times = []
    for _ in range(3 + repeats):
        begin, end = (_Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[3:]))


def _encode_rate(rows_BV: NDArray[np.float16], threads: int) -> float:
    count = 6 * threads
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for encoded in pool.map(lambda _: encode_chunk(rows_BV, chunk_rows=len(rows_BV), compressor="lz4"), range(count)):
            del encoded
        return count * rows_BV.nbytes / (time.perf_counter() - started)


def _write_rate(folder: Path, writers: int) -> float:
    """Files of a chunk's size, each synced, by so many threads."""
    folder.mkdir(parents=True)
    data, count = os.urandom(CHUNK_BYTES), 24

    def write(index: int) -> None:
        with (folder / str(index)).open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(writers) as pool:
        started = time.perf_counter()
        list(pool.map(write, range(count)))
        seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return count * len(data) / seconds


# --- the floor --------------------------------------------------------------------------------------------------------


def _load(subject: Subject) -> Any:  # noqa: ANN401 - transformers is untyped
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False).to(DEVICE)


def _backbone_parameters(model: Any) -> int:  # noqa: ANN401
    table = model.get_input_embeddings().weight.numel()
    return int(sum(parameter.numel() for parameter in model.base_model.parameters()) - table)


def _batches(
    subject: Subject, num_rows: int, batch_tokens: int, *, mask: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Padded tokens and mask [B, T] on the device, sorted by length inside windows as embstore's are."""
    batches = []
    lengths_N = torch.from_numpy(subject.lengths_N).to(DEVICE)
    step = len(subject.texts) // num_rows
    rows = range(0, num_rows * step, step)
    for begin in range(0, num_rows, WINDOW_ROWS):
        order = sorted(rows[begin : begin + WINDOW_ROWS], key=lambda row: -int(subject.lengths_N[row]))
        start = 0
        while start < len(order):
            longest = int(subject.lengths_N[order[start]])
            part = order[start : start + max(1, batch_tokens // longest)]
            mask_BT = (torch.arange(longest, device=DEVICE) < lengths_N[part, None]).long() if mask else None
            batches.append((subject.tokens_NT[part, :longest], mask_BT))
            start += len(part)
    return batches


@torch.inference_mode()
def _pass_seconds(backbone: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> float:  # noqa: ANN401
    torch.cuda.synchronize()
    started = time.perf_counter()
    for tokens_BT, mask_BT in batches:
        backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def floor(run: Run, subject: Subject) -> Figures:
    """The backbone alone under every setting, and under the best of them without cuDNN's attention.

    The first pass meets shapes that no kernel has seen, as an embedding pass does all the time; the second one counts.
    """
    model = _load(subject)
    parameters = _backbone_parameters(model)
    num_rows = subject.swept_rows
    step = len(subject.texts) // num_rows
    flops = subject.flops(parameters, range(0, num_rows * step, step), head=False)
    num_tokens = int(subject.lengths_N[: num_rows * step : step].sum())
    deadline = time.perf_counter() + run.options.limit
    _pass_seconds(model.base_model, [(subject.tokens_NT[:8], None)])  # libraries are loaded

    def timed(batch_tokens: int, *, mask: bool, cudnn: bool) -> Figures:
        batches = _batches(subject, num_rows, batch_tokens, mask=mask)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            first, second = (_pass_seconds(model.base_model, batches) for _ in range(2))
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
        return {
            "batch_tokens": batch_tokens,
            "mask": mask,
            "cudnn_attention": cudnn,
            "rows_per_second": num_rows / min(first, second),
            "rows_per_second_of_new_shapes": num_rows / first,
            "flops": flops / min(first, second),
            "padding": 1 - num_tokens / _padded(batches),
        }

    def best() -> Figures:
        return max(table, key=lambda each: float(each["rows_per_second"]))

    table: list[Figures] = []
    for batch_tokens, mask in itertools.product(SWEPT_TOKENS, (True, False)):
        if not table or time.perf_counter() < deadline:
            table.append(timed(batch_tokens, mask=mask, cudnn=True))
    table.append(timed(best()["batch_tokens"], mask=best()["mask"], cudnn=False))
    return best() | {
        "table": table,
        "rows": num_rows,
        "tokens_per_second": best()["rows_per_second"] * float(subject.lengths_N.mean()),
        "backbone_parameters": parameters,
        **_utilisation(run, best()["flops"]),
    }


def _padded(batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> int:
    return int(sum(tokens_BT.numel() for tokens_BT, _ in batches))


def _utilisation(run: Run, flops: float) -> Figures:
    return {"mfu_of_measured": flops / run.peak_flops, "mfu_of_datasheet": flops / PEAK_BF16_FLOPS}


def compiled(run: Run, subject: Subject) -> Figures:
    """The best setting of the floor with every layer compiled for any shape, and how long that takes."""
    model = _load(subject)
    best = run.results["models"][subject.name]["floor"]
    batches = _batches(subject, subject.swept_rows, best["batch_tokens"], mask=best["mask"])
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)  # one layer is compiled, the others are the same code
    started = time.perf_counter()
    _pass_seconds(model.base_model, [batches[0], batches[-1], batches[len(batches) // 2]])
    compile_seconds = time.perf_counter() - started
    seconds = min(_pass_seconds(model.base_model, batches) for _ in range(2))
    rate = subject.swept_rows / seconds
    torch.compiler.reset()
    return {
        "compile_seconds": compile_seconds,
        "rows_per_second": rate,
        "times_uncompiled": rate / best["rows_per_second"],
        "mask": best["mask"],
    }


# --- embstore ---------------------------------------------------------------------------------------------------------


class Held:
    """An embedder that is there already, as a source: two parts of a benchmark load the model once."""

    def __init__(self, source: TorchSource, embedder: LogitEmbedder) -> None:
        self._source, self._embedder = source, embedder

    def identity(self) -> ModelIdentity:
        """Of the model's files."""
        return self._source.identity()

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """Of the source."""
        return self._source.hardware(config)

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> LogitEmbedder:
        """The embedder; it was made for the same prompts."""
        return self._embedder

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32]) -> LogitEmbedder:
        """A benchmark resumes nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Reader:
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        return [self.prompts[row] for row in rows]


class _EnoughError(Exception):
    """The embedding stage is over, and the search is not measured here."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded and probed embedder, and how long that took."""

    source: TorchSource
    embedder: LogitEmbedder
    config: BuildConfig
    create_seconds: float


def _open(run: Run, subject: Subject) -> Opened:
    if subject.name in run.opened:
        return run.opened[subject.name]
    run.opened.clear()
    started = time.perf_counter()
    embedding = EmbeddingConfig(model=str(subject.folder), device=DEVICE, dtype="bfloat16", max_tokens=MAX_TOKENS)
    config = BuildConfig(embedding=embedding, memory_budget_bytes=8 << 30)
    source = TorchSource(locate_model(embedding))
    embedder = source.create(
        _Reader(prompts=subject.prompts),
        embedding,
        memory_bytes=config.memory_budget_bytes,
        work=run.options.work,
        observer=lambda _: None,
    )
    run.opened[subject.name] = Opened(
        source=source, embedder=embedder, config=config, create_seconds=time.perf_counter() - started
    )
    return run.opened[subject.name]


def embed(run: Run, subject: Subject) -> Figures:
    """Rows dropped, and rows in a store: chunks, fsync, journal; once each after a window that is not counted."""
    opened = _open(run, subject)
    embedder = opened.embedder
    found: Figures = {
        "create_seconds": opened.create_seconds,
        "batch_tokens": embedder.spec.batch_tokens,
        "dimension": embedder.spec.dimension,
        "rank": embedder.spec.rank,
    }
    known = run.results["models"][subject.name].get("floor", {})
    parameters = known.get("backbone_parameters", 0)
    flops, tokens = subject.flops(parameters, head=True), int(subject.lengths_N.sum())

    def rates(rows: int, seconds: float) -> Figures:
        figures: Figures = {"rows": rows, "seconds": seconds, "rows_per_second": rows / seconds}
        figures["tokens_per_second"] = tokens * rows / len(subject.texts) / seconds
        figures |= _utilisation(run, flops * rows / len(subject.texts) / seconds) if parameters else {}
        if "rows_per_second" in known:
            figures["share_of_floor"] = figures["rows_per_second"] / known["rows_per_second"]
        return figures

    _drop(embedder, subject.prompts[:WINDOW_ROWS])
    torch.cuda.reset_peak_memory_stats()
    found["rows"] = rates(len(subject.texts), _drop(embedder, subject.prompts))
    found["rows"]["peak_device_bytes"] = torch.cuda.max_memory_allocated()

    work: Path = run.options.work
    prompts, store = work / "prompts.jsonl", work / "store"
    shutil.rmtree(store, ignore_errors=True)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in subject.texts))
    commits: list[RowsCommitted] = []
    times: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            commits.append(event)
            times.append(time.perf_counter())
        elif isinstance(event, StageStarted) and event.stage == "embed":
            times.append(time.perf_counter())
        elif isinstance(event, StageFinished) and event.stage == "embed":
            raise _EnoughError

    try:
        build(prompts, out=store, config=opened.config, source=Held(opened.source, embedder), observer=watch)
    except _EnoughError:
        pass
    finally:
        shutil.rmtree(store, ignore_errors=True)
    num_rows, seconds = commits[-1].stop, times[-1] - times[0]
    stored = sum(event.stored_bytes for event in commits)
    found["store"] = rates(num_rows, seconds) | {
        "raw_bytes_per_second": 2 * num_rows * embedder.spec.dimension / seconds,
        "stored_bytes_per_second": stored / seconds,
        "stored_share_of_raw": stored / (2 * num_rows * embedder.spec.dimension),
        "seconds_of_windows": np.diff(times).round(3).tolist(),
    }
    return found


def _drop(embedder: LogitEmbedder, prompts: Sequence[Prompt]) -> float:
    """Seconds for these prompts, window by window as ``build`` asks for them, every block let go at once."""
    windows = [prompts[start : start + WINDOW_ROWS] for start in range(0, len(prompts), WINDOW_ROWS)]
    knows_ahead = "following" in inspect.signature(embedder.embed).parameters
    torch.cuda.synchronize()
    started = time.perf_counter()
    for index, window in enumerate(windows):
        following: Figures = {"following": windows[index + 1] if index + 1 < len(windows) else []} if knows_ahead else {}
        for block in embedder.embed(
            window, first_row=index * WINDOW_ROWS, chunk_rows=_chunk_rows(embedder), check=lambda: None, **following
        ):
            getattr(block, "release", _nothing)()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _nothing() -> None:
    """For blocks whose memory is never used again."""


def _chunk_rows(embedder: LogitEmbedder) -> int:
    return chunk_rows_near(2 * embedder.spec.dimension, CHUNK_BYTES, num_rows=WINDOW_ROWS)


def profile(run: Run, subject: Subject) -> Figures:
    """One window: what tokenising, pooling and finishing take one after the other, and what the device does meanwhile."""
    embedder = _open(run, subject).embedder
    window = subject.prompts[:WINDOW_ROWS]
    _drop(embedder, window)
    stages: dict[str, float] = {}
    started = time.perf_counter()
    rows = embedder.tokens(window)
    stages["tokenise"] = time.perf_counter() - started
    started = time.perf_counter()
    pooled = embedder.pool(rows, _nothing)
    torch.cuda.synchronize()
    stages["pool"] = time.perf_counter() - started
    started = time.perf_counter()
    for block in embedder.blocks(pooled, first_row=0, chunk_rows=_chunk_rows(embedder), check=_nothing):
        getattr(block, "release", _nothing)()
    stages["finish"] = time.perf_counter() - started
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        seconds = _drop(embedder, window)
    kernels = {event.key: event.self_device_time_total / 1e6 for event in seen.key_averages()}
    spans = sorted(_spans(seen))
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:14]
    return {
        "rows": len(window),
        "seconds_one_after_the_other": stages,
        "seconds_overlapped": seconds,
        "device_busy_seconds": _union(spans),
        "device_seconds_by_kernel": {name[:90]: each for name, each in largest},
    }


def _spans(profiler: Any) -> Iterator[tuple[float, float]]:  # noqa: ANN401 - torch leaves it untyped
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            yield event.time_range.start, event.time_range.end


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that are covered by at least one span, given in microseconds and sorted."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


# --- the original method ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def original(run: Run, subject: Subject) -> Figures:
    """Batches of 8 in file order, padded to the longest, full float32 logits, plain mean; bfloat16 model, as the others."""
    model = _load(subject)
    tokenizer = transformers.AutoTokenizer.from_pretrained(subject.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    step = max(1, len(subject.texts) // subject.original_rows)
    texts = subject.texts[::step][: subject.original_rows]
    rows = 0
    deadline = float("inf")
    for start in range(-8, len(texts), 8):  # the first batch is not counted
        if time.perf_counter() > deadline:
            break
        batch = tokenizer(
            texts[max(start, 0) :][:8], return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
        ).to(DEVICE)
        logits_BTV = model(input_ids=batch.input_ids, use_cache=False).logits.float()
        torch.nn.functional.normalize(logits_BTV.mean(dim=1), dim=1).cpu().numpy()
        if start < 0:
            started = time.perf_counter()
            deadline = started + run.options.limit
        else:
            rows += len(batch.input_ids)
    rate = rows / (time.perf_counter() - started)
    known = run.results["models"][subject.name].get("floor", {})
    return {"rows": rows, "rows_per_second": rate, "tokens_per_second": rate * float(subject.lengths_N.mean())} | (
        {"share_of_floor": rate / known["rows_per_second"]} if "rows_per_second" in known else {}
    )


if __name__ == "__main__":
    raise SystemExit(main())
