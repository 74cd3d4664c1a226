"""What the lever benchmarks share: ways of doing one thing, timed in turns, and the real rows they are tried on."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import methods
from embstore.core.config import EmbeddingConfig
from embstore.core.prompts import Prompt
from embstore.host.threads import Workers, finish_all
from embstore.model.backbone import SplitModel
from embstore.model.batches import TokenBatch, batches_by_length, padded_batch
from embstore.model.embed import DTYPES, LogitEmbedder
from embstore.model.finish import SLAB_ROWS
from embstore.model.heads import AffineHead
from embstore.model.load import load_model, locate_model
from embstore.model.probe import split_model
from embstore.model.tokens import TokenRow

Figures = dict[str, Any]
Result = TypeVar("Result")
MEDIUM = 'precision "medium"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of doing something: ``error`` against float64 where values differ, ``more`` is kept beside its times."""

    name: str
    run: Callable[[], object]
    is_ours: bool = False
    error: float | None = None
    more: Figures | None = None


def compare(title: str, ways: Sequence[Way], *, count: int, unit: str, rounds: int) -> Figures:
    """Milliseconds a unit of each way, in turns A B C A B C after one turn that is not counted.

    ``times_ours`` is the ratio of medians to the way that embstore takes; every single figure is kept.
    """
    singles: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            started = time.perf_counter()
            way.run()
            seconds = time.perf_counter() - started
            if turn:
                singles[way.name].append(1e3 * seconds / count)
    medians = {name: statistics.median(each) for name, each in singles.items()}
    (ours,) = (way.name for way in ways if way.is_ours)
    table = []
    for way in ways:
        row: Figures = {"name": way.name, "is_ours": way.is_ours, "median": medians[way.name]}
        row |= {"times_ours": medians[way.name] / medians[ours], "singles": singles[way.name]}
        if way.error is not None:
            row["error"] = way.error
        table.append(row | (way.more or {}))
    return {"title": title, "unit": unit, "ways": table}


class Bench:
    """Prompts, models and their real rows, each made when first asked for."""

    def __init__(self, prompts: Path, model: Path, work: Path, *, threads: int, rounds: int) -> None:
        self._job = {"prompts": str(prompts), "model": str(model), "threads": threads}
        self.model_folder, self.work, self.threads, self.rounds = model, work, threads, rounds
        self.workers = Workers(threads, threads)
        self._embedders: dict[str, LogitEmbedder] = {}

    def prompts(self, rows: int = 0) -> list[Prompt]:
        """Every n-th prompt of the file, ``rows`` of them; 0 is all."""
        return [Prompt(id=None, text=text) for text in methods.texts_of(self._job | {"rows": rows})]

    def embedder(self, dtype: str) -> LogitEmbedder:
        """Embstore's own embedder under the settings it resolves."""
        if dtype not in self._embedders:
            self._embedders[dtype] = methods._embedder(self._job | {"dtype": dtype}, self.prompts(4096), self.work)
        return self._embedders[dtype]

    def model(self, dtype: str) -> SplitModel:
        """A fresh copy of the model, its backbone in ``dtype``."""
        return fresh_model(self.model_folder, dtype)

    def batches(self, rows: int) -> list[TokenBatch]:
        """Token batches as the embedder makes them of one window of ``rows`` prompts."""
        embedder = self.embedder("float32")
        token_rows = embedder.tokens(self.prompts(rows))
        return list(batches_of(token_rows, embedder.spec.batch_tokens))

    @functools.cached_property
    def head(self) -> AffineHead:
        """The affine head; the levers are about models that have one."""
        found = self.embedder("float32").spec.head
        head = self.model("float32").output_layer(found.scale) if found.kind == "affine" else None
        if head is None:
            raise SystemExit("the levers need a model with an affine head")
        return head

    @functools.cached_property
    def slabs(self) -> list[Tensor]:
        """Pooled means float32 [B, D], one slab for each thread."""
        embedder = self.embedder("float32")
        rows = embedder.tokens(self.prompts(SLAB_ROWS * self.threads))
        mean_WD = embedder.pool(rows, lambda: None).mean_WX
        return [mean_WD[start : start + SLAB_ROWS] for start in range(0, len(mean_WD), SLAB_ROWS)]

    @functools.cached_property
    def chunks(self) -> list[NDArray[np.float16]]:
        """Finished rows of chunks, twice as many as threads."""
        embedder, chunk_rows = self.embedder("float32"), methods.chunk_rows(self.embedder("float32"))
        prompts = self.prompts(chunk_rows * 2 * self.threads)
        blocks = embedder.embed(prompts, first_row=0, chunk_rows=chunk_rows, check=lambda: None)
        return [block.emb_BV for block in blocks]  # never released, so never used again

    def on_all_threads(self, job: Callable[[int], object]) -> None:
        """``job(0)``, ``job(1)``, ... at once, each on a worker with one torch thread, as slabs and batches are computed."""

        def run(index: int) -> None:
            job(index)

        finish_all([self.workers.submit(functools.partial(run, index)) for index in range(self.threads)])


def at_medium(run: Callable[[], Result]) -> Callable[[], Result]:
    """``run`` at torch's precision "medium", which takes oneDNN's kernels, and bfloat16 where the CPU has units for it.

    A setting of the process, so it is not for threads that run something else.
    """

    def wrapped() -> Result:
        torch.set_float32_matmul_precision("medium")
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision("highest")

    return wrapped


def fresh_model(folder: Path, dtype: str) -> SplitModel:
    """The model as embstore loads it, its backbone in ``dtype``."""
    model = split_model(load_model(locate_model(EmbeddingConfig(model=str(folder))), "cpu").model)
    model.to_dtype(DTYPES[dtype])
    return model


def batches_of(
    rows: Sequence[TokenRow], batch_tokens: int, *, padded_length: Callable[[int], int] = int
) -> Iterator[TokenBatch]:
    """Padded batches of one window."""
    found = batches_by_length(rows, batch_tokens=batch_tokens, padded_length=padded_length)
    return (padded_batch(rows, *batch, pad_id=0) for batch in found)


def unit_error(found_BV: Tensor, exact_BV: Tensor) -> float:
    """Largest L2 distance between unit rows made of ``found_BV`` and those of ``exact_BV`` float64."""
    found = torch.nn.functional.normalize(found_BV.double(), dim=1)
    return float(torch.linalg.vector_norm(found - torch.nn.functional.normalize(exact_BV, dim=1), dim=1).max())
