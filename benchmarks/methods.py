"""The embedding methods that are compared, each run in a process of its own: ``python -m benchmarks.methods JOB.json``.

original  batches of 8 in file order, padded to the longest, full float32 logits of every position, plain mean, L2 norm
careful   transformers as a careful user would: length-sorted batches of 32, attention mask, masked mean of float32 logits
backbone  the model without head and without store over embstore's own token batches: the floor
packed    the same as embstore runs it, its linear layers packed where they can be: a floor raised
rows      embstore's embedder, its rows dropped
store     embstore's embedder into a real store: chunks, fsync, journal

``original`` and ``careful`` are written from their descriptions; ``backbone`` takes batch tokens, mask and workers as given.
Prints one JSON object: rows, tokens, the span that was measured (benchmarks/interleaving.py makes seconds of it), and the
peak of anonymous memory above the loaded model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.events import RowsCommitted, StageFinished, StageStarted
from embstore.core.prompts import Prompt
from embstore.core.rows import chunk_rows_near
from embstore.flow.build import build
from embstore.flow.cost import CHUNK_BYTES
from embstore.host.memory import MemoryMeter
from embstore.host.threads import Workers, finish_all
from embstore.model.backbone import SplitModel
from embstore.model.batches import TokenBatch, batches_by_length, few_lengths, padded_batch
from embstore.model.embed import DTYPES, LogitEmbedder
from embstore.model.locate import locate_model
from embstore.model.probe import examine, packable_layers
from embstore.model.settings import MAX_WINDOW_ROWS
from embstore.model.source import TorchSource
from embstore.model.tokens import PromptTokenizer, TokenRow

MAX_TOKENS = 512
Job = dict[str, Any]


def main() -> None:
    """Run the job described in the file named first on the command line, several times where it says so."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(METHODS[job["method"]](job)))


def texts_of(job: Job) -> list[str]:
    """Prompts of the job: ``rows`` of them, every n-th of the file, so lengths are spread as in the whole."""
    with Path(job["prompts"]).open() as file:
        texts = [json.loads(line)["prompt"] for line in file]
    rows = min(job["rows"] or len(texts), len(texts))
    return [texts[index * len(texts) // rows] for index in range(rows)]


@contextlib.contextmanager
def measured(result: dict[str, Any]) -> Iterator[None]:
    """Fill in the span, and the peak of anonymous memory above what is taken now."""
    with MemoryMeter() as meter:
        meter.set_baseline()
        started = time.perf_counter()
        yield
        result.setdefault("spans", {})["seconds"] = (started, time.perf_counter())
    result["peak_anonymous_bytes"] = meter.peak_anonymous_bytes


def plain(job: Job) -> tuple[Any, Any]:
    """Model and tokenizer as a user loads them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]]).eval(), tokenizer


def sampled_batches(lengths: NDArray[np.int64], order: NDArray[np.int64], size: int, rows: int) -> list[NDArray[np.int64]]:
    """About ``rows`` rows in whole batches: every n-th of all batches in this order, ranked by padded tokens.

    A sample of prompts would be cut into other batches than the whole file, which pad more, or less.
    """
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    ranked = np.argsort([lengths[batch].max() * len(batch) for batch in batches], kind="stable")
    count = min(max(1, rows // size), len(batches))
    return [
        batches[place] for place in sorted(ranked[(2 * number + 1) * len(batches) // (2 * count)] for number in range(count))
    ]


@torch.inference_mode()
def original(job: Job) -> dict[str, Any]:
    """Padding is in the mean, as it was."""
    model, tokenizer = plain(job)
    texts = texts_of(job | {"rows": 0})
    lengths = np.array([len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]])
    batches = sampled_batches(lengths, np.arange(len(texts)), 8, job["rows"])
    result: dict[str, Any] = {"rows": sum(map(len, batches)), "tokens": 0, "padded_tokens": 0}
    with measured(result):
        for rows_B in batches:
            batch = tokenizer(
                [texts[row] for row in rows_B], return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
            )
            logits_BTV = model(input_ids=batch.input_ids, use_cache=False).logits.float()
            torch.nn.functional.normalize(logits_BTV.mean(dim=1), dim=1).numpy()
            result["tokens"] += int(batch.attention_mask.sum())
            result["padded_tokens"] += batch.input_ids.numel()
    return result


@torch.inference_mode()
def careful(job: Job) -> dict[str, Any]:
    """All prompts sorted by length, masked; tokens are there before it begins."""
    model, tokenizer = plain(job)
    ids = tokenizer(texts_of(job | {"rows": 0}), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths = np.array([len(each) for each in ids])
    batches = sampled_batches(lengths, np.argsort(-lengths, kind="stable"), 32, job["rows"])
    result: dict[str, Any] = {"rows": sum(map(len, batches)), "tokens": 0, "padded_tokens": 0}
    with measured(result):
        for rows_B in batches:
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows_B]}, return_tensors="pt")
            logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            mask_BT1 = batch.attention_mask[..., None].float()
            mean_BV = (logits_BTV.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
            torch.nn.functional.normalize(mean_BV, dim=1).half().numpy()
            result["tokens"] += int(batch.attention_mask.sum())
            result["padded_tokens"] += batch.input_ids.numel()
    return result


def packed(job: Job) -> dict[str, Any]:
    """As ``backbone``, layers packed; lengths as embstore pads them, or every batch would cost kernels of its own."""
    return backbone(job, is_ours=True)


def backbone(job: Job, *, is_ours: bool = False) -> dict[str, Any]:
    """Every setting in ``job["settings"]``: batch_tokens, mask, workers. Tokenisation is timed by itself."""
    source = locate_model(EmbeddingConfig(model=job["model"]))
    loaded = source.load("logits")
    model, dtype = SplitModel(loaded.model, torch.device("cpu"), loaded.merges), DTYPES[job["dtype"]]
    model.settle(torch.float32, None)  # every layer in memory, as in the plain order
    examine(model)
    model.settle(dtype, None)
    packs = is_ours and packable_layers(model, lambda layers: model.settle(dtype, None, layers))
    keeps_kernels = is_ours and (packs or job["dtype"] != "float32")
    padded_length = few_lengths if keeps_kernels else int
    prompts = [Prompt(id=None, text=text) for text in texts_of(job)]
    started = time.perf_counter()
    rows = PromptTokenizer(loaded.tokenizer, MAX_TOKENS, model.num_tokens, chat_date=None).encode(prompts)
    tokenising = (started, time.perf_counter())
    rounds: list[dict[str, Any]] = []
    for settings in job["settings"] * job.get("rounds", 1):
        windows = [rows[start : start + MAX_WINDOW_ROWS] for start in range(0, len(rows), MAX_WINDOW_ROWS)]
        batches = [batch for window in windows for batch in _batches(window, settings["batch_tokens"], padded_length)]
        workers = Workers(job["threads"], settings["workers"])
        run = _forward(model, mask=settings["mask"])
        # threads and kernels are ready
        finish_all([workers.submit(functools.partial(run, batch)) for batch in batches[:: max(1, len(batches) // 8)]])
        result: dict[str, Any] = {"rows": len(rows), "settings": settings, "spans": {"tokenise_seconds": tokenising}}
        with measured(result):
            finish_all([workers.submit(functools.partial(run, batch)) for batch in batches])
        result["tokens"] = int(sum(batch.real_BT.sum() for batch in batches))
        result["padded_tokens"] = int(sum(batch.real_BT.size for batch in batches))
        lengths = np.array([len(row.ids_T) for row in rows], dtype=np.float64)
        result["flops"] = 2 * model.backbone_parameters * lengths.sum() + attention_flops(loaded.model.config, lengths)
        rounds.append(result)
    return {"rounds": rounds}


def _batches(rows: list[TokenRow], batch_tokens: int, padded_length: Callable[[int], int] = int) -> list[TokenBatch]:
    found = batches_by_length(rows, batch_tokens=batch_tokens, padded_length=padded_length)
    return [padded_batch(rows, *batch, pad_id=0) for batch in found]


def _forward(model: SplitModel, *, mask: bool) -> Callable[[TokenBatch], None]:
    def run(batch: TokenBatch) -> None:
        attention_mask = torch.from_numpy(batch.real_BT).long() if mask else None
        model.backbone(input_ids=torch.from_numpy(batch.tokens_BT), attention_mask=attention_mask, use_cache=False)

    return run


def attention_flops(config: Any, lengths: NDArray[np.float64]) -> float:  # noqa: ANN401
    """Scores and values over the causal half: 2 * 2 * T^2 / 2 * width of all heads, in each layer."""
    config = config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(2 * (lengths**2).sum() * width * config.num_hidden_layers)


def rows(job: Job) -> dict[str, Any]:
    """Windows of the embedder as ``build`` asks for them, blocks dropped."""
    prompts = [Prompt(id=None, text=text) for text in texts_of(job)]
    with tempfile.TemporaryDirectory() as scratch:
        embedder = _embedder(job, prompts, Path(scratch))  # as cold as a build's, too: kernels are made on the way
        result: dict[str, Any] = {"rows": len(prompts), "workers": embedder.num_workers}
        with measured(result):
            result["tokens"] = drop_rows(embedder, prompts)
    return result


class PromptList:
    """Prompts in memory, as an embedder's source samples them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of single rows, in the order given."""
        return [self._prompts[row] for row in rows]


def _embedder(job: Job, prompts: list[Prompt], work: Path) -> LogitEmbedder:
    config = _config(job)
    source = TorchSource(locate_model(config))
    return source.create(PromptList(prompts), config, memory_bytes=2 << 30, work=work, observer=lambda _: None)


def drop_rows(embedder: LogitEmbedder, prompts: Sequence[Prompt]) -> int:
    """Pooled tokens of these prompts, window by window as ``build`` asks for them, every block let go at once."""
    rows = chunk_rows(embedder)
    step = MAX_WINDOW_ROWS // rows * rows  # whole chunks
    windows = [prompts[start : start + step] for start in range(0, len(prompts), step)]
    tokens = 0
    for window, following in zip(windows, [*windows[1:], []], strict=True):
        blocks = embedder.embed(
            window, first_row=0, chunk_rows=rows, check=lambda: None, following=[following] if following else ()
        )
        for block in blocks:
            block.release()
        tokens += embedder.counts.tokens
    return tokens


def chunk_rows(embedder: LogitEmbedder) -> int:
    """Rows of a chunk of the size that ``build`` aims at."""
    return chunk_rows_near(2 * embedder.spec.dimension, CHUNK_BYTES, num_rows=MAX_WINDOW_ROWS)


def _config(job: Job) -> EmbeddingConfig:
    return EmbeddingConfig(model=job["model"], dtype=job["dtype"], device="cpu", threads=job["threads"])


def store(job: Job) -> dict[str, Any]:
    """A whole build; the seconds are those of its embedding stage, window by window as they were committed."""
    times: list[float] = []
    meter = MemoryMeter()
    embedding = contextlib.ExitStack()  # memory of this stage alone: the search is another subject

    def watch(event: object) -> None:
        if isinstance(event, StageStarted) and event.stage == "embed":
            embedding.enter_context(meter)
            meter.set_baseline()
            times.append(time.perf_counter())
        elif isinstance(event, RowsCommitted):
            times.append(time.perf_counter())
        elif isinstance(event, StageFinished) and event.stage == "embed":
            embedding.close()

    with tempfile.TemporaryDirectory(dir=job["work"]) as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts_of(job)))
        out = Path(job["keep"]) if job.get("keep") else Path(scratch) / "store"
        report = build(prompts, out=out, config=BuildConfig(embedding=_config(job)), observer=watch)
    return {
        "rows": report.num_rows,
        "tokens": report.embedded_tokens,
        "stored_bytes": report.stored_bytes,
        "spans": {"seconds": (times[0], times[-1])},
        "peak_anonymous_bytes": meter.peak_anonymous_bytes,
    }


def profile(job: Job) -> dict[str, Any]:
    """One window: seconds of its stages, and shares of CPU time by operation while batches are pooled."""
    prompts = [Prompt(id=None, text=text) for text in texts_of(job)]
    with tempfile.TemporaryDirectory() as scratch:
        embedder = _embedder(job | {"threads": 1}, prompts, Path(scratch))
        drop_rows(embedder, prompts[:256])
        started = time.perf_counter()
        rows = embedder.tokens(prompts)
        tokenised = time.perf_counter()
        window = embedder.pool(rows, lambda: None)
        pooled = time.perf_counter()
        for block in embedder.blocks(window, first_row=0, chunk_rows=chunk_rows(embedder), check=lambda: None):
            block.release()
        finished = time.perf_counter()
        # the profiler sees the thread it was started in
        batches = _batches(rows, embedder.spec.batch_tokens)
        torch.set_num_threads(1)
        with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            for batch in batches:
                embedder._pool_whole(batch, torch.zeros_like(window.mean_WX))
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(times.values())
    operations = {name: each / total for name, each in sorted(times.items(), key=lambda item: -item[1])[:12]}
    stages = {"tokenise": tokenised - started, "pool": pooled - tokenised, "rows": finished - pooled}
    return {
        "milliseconds_a_row_on_one_thread": {name: 1e3 * each / len(prompts) for name, each in stages.items()},
        "share_by_operation": operations,
    }


METHODS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "original": original,
    "careful": careful,
    "backbone": backbone,
    "packed": packed,
    "rows": rows,
    "store": store,
    "profile": profile,
}

if __name__ == "__main__":
    main()
