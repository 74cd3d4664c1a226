"""embstore's embedder with its rows dropped, with a store, and window by window: parts of ``benchmarks.gpu``.

Shapes: V vocabulary, R coordinates.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_run import DEVICE, Figures, Opened, Run, Subject
from benchmarks.methods import MAX_TOKENS, PromptList, chunk_rows, drop_rows
from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.events import Event, Observer, RowsCommitted, StageFinished, StageStarted, ignore
from embstore.core.interfaces import PromptReader
from embstore.core.prompts import Prompt
from embstore.core.spec import EmbeddingSpec, ModelIdentity
from embstore.flow.build import build
from embstore.model.embed import LogitEmbedder
from embstore.model.locate import locate_model
from embstore.model.settings import MAX_WINDOW_ROWS
from embstore.model.source import TorchSource


class Held:
    """An embedder that is there already, as a source: two parts of a benchmark load the model once."""

    def __init__(self, source: TorchSource, embedder: LogitEmbedder) -> None:
        self._source, self._embedder = source, embedder

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        """Of the model's files."""
        return self._source.identity(observer)

    def template(self, chat_date: str | None) -> None:
        """Not asked: these prompts are texts."""

    def device(self, name: str) -> str:
        """Of the source."""
        return self._source.device(name)

    def reads_clock(self) -> bool:
        """Of the source."""
        return self._source.reads_clock()

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """Of the source."""
        return self._source.hardware(config)

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path | None, observer: Observer
    ) -> LogitEmbedder:
        """The embedder; it was made for the same prompts."""
        return self._embedder

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: object) -> LogitEmbedder:
        """A benchmark resumes nothing."""
        raise NotImplementedError

    def take_over(
        self, prompts: PromptReader, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: object
    ) -> LogitEmbedder:
        """A benchmark reuses nothing."""
        raise NotImplementedError


class _EnoughError(Exception):
    """The embedding stage is over, and the search is not measured here."""


def _open(run: Run, subject: Subject) -> Opened:
    if subject.name in run.opened:
        return run.opened[subject.name]
    run.opened.clear()
    started = time.perf_counter()
    embedding = EmbeddingConfig(model=str(subject.folder), device=DEVICE, dtype="bfloat16", max_tokens=MAX_TOKENS)
    config = BuildConfig(embedding=embedding, memory_budget_bytes=8 << 30)
    source = TorchSource(locate_model(embedding))
    embedder = source.create(
        PromptList(subject.prompts),
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
        figures |= run.utilisation(flops * rows / len(subject.texts) / seconds) if parameters else {}
        if "rows_per_second" in known:
            figures["share_of_floor"] = figures["rows_per_second"] / known["rows_per_second"]
        return figures

    _drop(embedder, subject.prompts[:MAX_WINDOW_ROWS])
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
    torch.cuda.synchronize()
    started = time.perf_counter()
    drop_rows(embedder, prompts)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def profile(run: Run, subject: Subject) -> Figures:
    """One window: what tokenising, pooling and finishing take one after the other, and what the device does meanwhile."""
    embedder = _open(run, subject).embedder
    window = subject.prompts[:MAX_WINDOW_ROWS]
    _drop(embedder, window)
    stages: dict[str, float] = {}
    started = time.perf_counter()
    rows = embedder.tokens(window)
    stages["tokenise"] = time.perf_counter() - started
    started = time.perf_counter()
    pooled = embedder.pool(rows, lambda: None)
    torch.cuda.synchronize()
    stages["pool"] = time.perf_counter() - started
    started = time.perf_counter()
    for block in embedder.blocks(pooled, first_row=0, chunk_rows=chunk_rows(embedder), check=lambda: None):
        block.release()
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
