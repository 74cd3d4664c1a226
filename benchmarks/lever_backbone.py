"""Levers of the backbone: threads, mask, compilation, attention, and windows begun ahead. See benchmarks/levers.py.

Shapes: B rows of a batch, H heads, T tokens, E width of a head.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import methods
from benchmarks.lever_tools import MEDIUM, Bench, Figures, Way, at_medium, batches_of, compare, fresh_model
from embstore.core.prompts import Prompt
from embstore.host.threads import Workers, finish_all
from embstore.model.backbone import SplitModel
from embstore.model.batches import TokenBatch
from embstore.model.embed import DTYPES, LogitEmbedder
from embstore.model.packed import pack_layers
from embstore.model.settings import MAX_WINDOW_ROWS
from embstore.storage.atomic import DurableFile, fsync_directory
from embstore.storage.chunks import encode_chunk
from embstore.storage.direct import DirectBuffer

_DTYPES = ("float32", "bfloat16")
_ROWS = 384
_LENGTHS = (32, 88, 256, 512)
_ATTENTION_TOKENS = 2048
_WINDOWS, _WINDOW_ROWS, _CHUNK_ROWS = 3, 512, 128  # smaller than a build's, for the sake of time
_SWEPT_TOKENS = (512, 1024, 2048, 4096)
_RUN_ROWS, _ONE_RUN_IN = 64, 4  # of rows sorted by length: a quarter of a window
_Forward = Callable[[TokenBatch], None]


def backbone(bench: Bench) -> Figures:
    """The backbone over the same batches: who computes them, with or without a mask, and whose float32 kernels."""
    batches = bench.batches(_ROWS)
    exact_LD = _exact(bench, batches[-1])
    groups = []
    for dtype in _DTYPES:
        model, packed = bench.model(dtype), bench.model(dtype)
        packs = pack_layers(packed)
        no_mask, mask = (methods._forward(model, mask=masked) for masked in (False, True))
        one_each = functools.partial(_over, bench.workers, batches, no_mask)
        all_on_one = functools.partial(_over, Workers(bench.threads, 1), batches, no_mask)
        error = _error(model, batches[-1], exact_LD)
        with _Processes(bench.model_folder, dtype, batches, bench.threads) as processes:
            ways = [
                Way(name="one batch a thread", run=one_each, is_ours=not packs, error=error),
                Way(name="one batch a thread, mask", run=functools.partial(_over, bench.workers, batches, mask)),
                Way(name="all threads on one batch", run=all_on_one),
                Way(name="a process of one thread for each core", run=processes.run),
            ]
            if packs:
                run = functools.partial(_over, bench.workers, batches, methods._forward(packed, mask=False))
                error = _error(packed, batches[-1], exact_LD)
                name = "one batch a thread, weights packed for oneDNN"
                ways.append(Way(name=name, run=run, is_ours=True, error=error))
            if dtype == "float32":
                error = at_medium(functools.partial(_error, model, batches[-1], exact_LD))()
                ways.append(Way(name=f"one batch a thread, {MEDIUM}", run=at_medium(one_each), error=error))
            groups.append(compare(f"backbone, {dtype}", ways, count=_ROWS, unit="ms a row", rounds=bench.rounds))
    return {"groups": groups}


def batch_tokens(bench: Bench) -> Figures:
    """The backbone over the same rows in smaller and larger batches, padded as in a whole window."""
    rows = bench.embedder("float32").tokens(bench.prompts(MAX_WINDOW_ROWS))
    by_length = sorted(rows, key=lambda row: len(row.ids_T))
    # runs of neighbours, or rows would be padded as in a small window
    starts = range(0, len(by_length), _ONE_RUN_IN * _RUN_ROWS)
    some = [row for start in starts for row in by_length[start : start + _RUN_ROWS]]
    groups = []
    for dtype in _DTYPES:
        embedder = bench.embedder(dtype)
        forward = methods._forward(embedder.model, mask=False)
        ways = []
        for tokens in _SWEPT_TOKENS:
            batches = list(batches_of(some, tokens, padded_length=embedder._padded_length))
            run = functools.partial(_over, bench.workers, batches, forward)
            is_ours = tokens == embedder.spec.batch_tokens
            ways.append(Way(name=f"{tokens:,} tokens a batch", run=run, is_ours=is_ours))
        groups.append(compare(f"batches, {dtype}", ways, count=len(some), unit="ms a row", rounds=bench.rounds))
    return {"groups": groups}


def _hidden(model: SplitModel, batch: TokenBatch) -> Tensor:
    """Hidden states float64 [L, D] of real tokens."""
    with torch.inference_mode():
        output = model.backbone(input_ids=torch.from_numpy(batch.tokens_BT), use_cache=False)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD[torch.from_numpy(batch.real_BT)].double()


def _exact(bench: Bench, batch: TokenBatch) -> Tensor:
    model = bench.model("float32")
    model.backbone.double()
    return _hidden(model, batch)


def _error(model: SplitModel, batch: TokenBatch, exact_LD: Tensor) -> float:
    """Relative, over all hidden states of the batch."""
    return float(torch.linalg.vector_norm(_hidden(model, batch) - exact_LD) / torch.linalg.vector_norm(exact_LD))


def _over(workers: Workers, batches: Sequence[TokenBatch], forward: _Forward) -> None:
    finish_all([workers.submit(functools.partial(forward, batch)) for batch in batches])


class _Processes:
    """Processes that are loaded and warm; each takes the next batch until there is none."""

    def __init__(self, folder: Path, dtype: str, batches: Sequence[TokenBatch], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._next: Synchronized[int] = context.Value("i", 0)
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            arguments = (folder, dtype, batches, self._next, theirs)
            self._processes.append(context.Process(target=_take_batches, args=arguments))
            self._pipes.append(ours)

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()

    def run(self) -> None:
        """All batches once."""
        self._next.value = 0
        for pipe in self._pipes:
            pipe.send(True)
        self._wait()

    def _wait(self) -> None:
        for pipe in self._pipes:
            pipe.recv()


def _take_batches(
    folder: Path, dtype: str, batches: Sequence[TokenBatch], following: Synchronized[int], pipe: Connection
) -> None:
    torch.set_num_threads(1)
    forward = methods._forward(fresh_model(folder, dtype), mask=False)
    with torch.inference_mode():
        forward(batches[-1])
        pipe.send("ready")
        while pipe.recv():
            while True:
                with following.get_lock():
                    index = following.value
                    following.value += 1
                if index >= len(batches):
                    break
                forward(batches[index])
            pipe.send("done")


def compiled(bench: Bench) -> Figures:
    """``torch.compile`` of the backbone's layers for any shape, against the layers as embstore has them."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return {"groups": [], "skipped": "no C++ compiler"}
    batches = bench.batches(_ROWS)
    exact_LD = _exact(bench, batches[-1])
    groups: list[Figures] = []
    with tempfile.TemporaryDirectory() as cache:
        # seconds of a first build, not of one that finds its kernels in a cache
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for dtype in _DTYPES:
            ours, model = bench.embedder(dtype).model, bench.model(dtype)
            for layer in model.backbone.layers:
                layer.compile(dynamic=True)
            forward = methods._forward(model, mask=False)
            started = time.perf_counter()
            try:
                # on workers: the compiler makes code for the number of threads it finds
                for batch in (batches[0], batches[-1]):
                    finish_all([bench.workers.submit(functools.partial(forward, batch))])
            except RuntimeError as error:
                return {"groups": groups, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            lost = _error(model, batches[-1], exact_LD)
            more = {"compile_seconds": time.perf_counter() - started}
            run = functools.partial(_over, bench.workers, batches)
            ways = [
                Way(
                    name="as embstore has them",
                    run=functools.partial(run, methods._forward(ours, mask=False)),
                    is_ours=True,
                    error=_error(ours, batches[-1], exact_LD),
                ),
                Way(name="compiled, any shape", run=functools.partial(run, forward), error=lost, more=more),
            ]
            groups.append(compare(f"layers, {dtype}", ways, count=_ROWS, unit="ms a row", rounds=bench.rounds))
            torch.compiler.reset()
    return {"groups": groups}


@torch.inference_mode()
def attention(bench: Bench) -> Figures:
    """Causal attention of one layer over one batch, at the model's shapes; every thread has a batch."""
    config = bench.model("float32").backbone.config
    heads, width = config.num_attention_heads, config.head_dim
    groups = []
    for dtype in _DTYPES:
        for length in _LENGTHS:
            shape = (_ATTENTION_TOKENS // length, heads, length, width)
            generator = torch.Generator().manual_seed(length)
            query, key, value = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
            figures = _attention(bench, f"attention, {dtype}, {length} tokens", query, key, value)
            groups.append(figures | {"dtype": dtype, "length": length})
    return {"groups": groups}


def _attention(bench: Bench, title: str, query: Tensor, key: Tensor, value: Tensor) -> Figures:
    rows, _, length, width = query.shape
    causal_TT = torch.ones((length, length), dtype=torch.bool).tril()
    mask_BTT = causal_TT.expand(rows, 1, length, length).contiguous()
    bias_TT = torch.zeros((length, length), dtype=query.dtype).masked_fill_(~causal_TT, -torch.inf)

    def flash() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    def masked() -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask_BTT)

    def products() -> Tensor:
        flat_query, flat_key, flat_value = (each.flatten(0, 1) for each in (query, key, value))
        scores = torch.baddbmm(bias_TT, flat_query, flat_key.transpose(1, 2), alpha=1 / math.sqrt(width))
        return torch.bmm(torch.softmax(scores, dim=-1), flat_value).view_as(query)

    def widened() -> Tensor:
        wide = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
        return wide.to(query.dtype)

    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    named = {"flash, causal": flash, "with a mask": masked, f"products and softmax in {_name(query)}": products}
    if query.dtype != torch.float32:
        named["flash in float32 on converted inputs"] = widened
    ways = []
    for name, run in named.items():
        lost = torch.linalg.vector_norm(run().double() - exact) / torch.linalg.vector_norm(exact)

        def job(_: int, run: Callable[[], Tensor] = run) -> Tensor:
            return run()

        ways.append(
            Way(name=name, run=functools.partial(bench.on_all_threads, job), is_ours=run is flash, error=float(lost))
        )
    return compare(title, ways, count=bench.threads, unit="ms a batch", rounds=4 * bench.rounds)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def ahead(bench: Bench) -> Figures:
    """The following window begun while one is finished, or not; with and without a writer that encodes and syncs."""
    embedder = bench.embedder("bfloat16")
    prompts = bench.prompts(_WINDOWS * _WINDOW_ROWS)
    windows = [prompts[start : start + _WINDOW_ROWS] for start in range(0, len(prompts), _WINDOW_ROWS)]
    folder = bench.work / "ahead"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    groups = []
    for title, target in (("windows of 512 rows, dropped", None), ("windows of 512 rows, encoded and synced", folder)):
        ways = [
            Way(
                name="the following window begun ahead" if begun else "one window after the other",
                run=functools.partial(_embed, embedder, windows, begun, target),
                is_ours=begun,
            )
            for begun in (True, False)
        ]
        groups.append(compare(title, ways, count=len(prompts), unit="ms a row", rounds=max(1, bench.rounds - 1)))
    shutil.rmtree(folder)
    return {"groups": groups}


def _embed(embedder: LogitEmbedder, windows: list[list[Prompt]], begun: bool, folder: Path | None) -> None:
    direct = DirectBuffer()
    for window, following in zip(windows, [*windows[1:], []], strict=True):
        blocks = embedder.embed(
            window,
            first_row=0,
            chunk_rows=_CHUNK_ROWS,
            check=lambda: None,
            following=following if begun else (),
        )
        for index, block in enumerate(blocks):
            if folder is not None:
                pieces, _ = encode_chunk(block.emb_BV, chunk_rows=_CHUNK_ROWS, compressor="lz4")
                with DurableFile(folder / str(index), sync_directory=False, sha256=False, direct=direct) as file:
                    for piece in pieces:
                        file.write(piece)
            block.release()
        if folder is not None:
            fsync_directory(folder)
