"""Levers beside the backbone: head product, norm, memory, disk, compression, tokens, windows. See benchmarks/levers.py.

Shapes: B rows of a slab, D model width, V vocabulary, C columns of a block.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numcodecs.blosc
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import methods
from benchmarks.lever_tools import MEDIUM, Bench, Figures, Way, at_medium, batches_of, compare, unit_error
from embstore.model.finish import SLAB_ROWS, AffineFinisher, Finisher, finish
from embstore.model.packed import can_pack, packed_product, packed_weight
from embstore.model.recycled import ChunkMemory
from embstore.model.settings import MAX_WINDOW_ROWS
from embstore.model.tokens import PromptTokenizer
from embstore.storage.atomic import DurableFile
from embstore.storage.chunks import crc32c, encode_chunk
from embstore.storage.direct import DirectBuffer

_CHECKED_ROWS = 64  # compared with float64
_BLOCK = 512  # columns, as embstore's finish has them on a CPU
_FILES = 8  # in a run
_IN_WRITING = 3  # chunks that a writer holds at a time


class _HeadWays:
    """Ways to a slab's logits or rows; each thread has output memory of its own, which lies ready."""

    def __init__(self, bench: Bench) -> None:
        self._weight_VD, self._slabs = bench.head.weight_VD, bench.slabs
        self._weight_hi, self._weight_lo = _halves(self._weight_VD)
        columns = len(self._weight_VD)
        self.wide = [torch.zeros((SLAB_ROWS, columns)) for _ in bench.slabs]
        self._wide16 = [each.bfloat16() for each in self.wide]
        embedder = bench.embedder("float32")
        rank = embedder.spec.rank
        self._memory = [
            ChunkMemory(
                emb_BV=torch.zeros((SLAB_ROWS, columns), dtype=torch.float16),
                coord_BR=torch.zeros((SLAB_ROWS, rank)),
                residual_B=torch.zeros(SLAB_ROWS),
            )
            for _ in bench.slabs
        ]
        self._finisher = embedder._finisher
        self._plain = AffineFinisher(bench.head, embedder.basis_VR, columns, torch.device("cpu"))
        self.can_pack = can_pack(torch.device("cpu"))
        blocks = torch.split(self._weight_VD, _BLOCK) if self.can_pack else ()
        self._packed = [packed_weight(weight_CD, SLAB_ROWS) for weight_CD in blocks]

    def whole(self, index: int) -> Tensor:
        """One float32 product."""
        return torch.mm(self._slabs[index], self._weight_VD.T, out=self.wide[index])

    def blocks(self, index: int) -> Tensor:
        """Float32 products into one block that stays in the cache; what it held is lost."""
        buffer_BC = torch.empty((SLAB_ROWS, _BLOCK))
        for start in range(0, len(self._weight_VD), _BLOCK):
            weight_CD = self._weight_VD[start : start + _BLOCK]
            torch.mm(self._slabs[index], weight_CD.T, out=buffer_BC if len(weight_CD) == _BLOCK else None)
        return buffer_BC

    def packed(self, index: int) -> Tensor:
        """The same with weights packed for oneDNN."""
        product_BC = torch.empty(0)
        for weight_CD in self._packed:
            product_BC = packed_product(self._slabs[index], weight_CD)
        return product_BC

    def bfloat16(self, index: int) -> Tensor:
        """One bfloat16 product; the kernel rounds its float32 sums to bfloat16."""
        return torch.mm(self._slabs[index].bfloat16(), self._weight_hi.T, out=self._wide16[index])

    def three(self, index: int) -> Tensor:
        """High and low halves of both factors, three products of four, added in float32 by blocks in the cache."""
        mean_hi, mean_lo = _halves(self._slabs[index])
        wide = self.wide[index]
        for start in range(0, len(self._weight_VD), _BLOCK):
            columns = slice(start, start + _BLOCK)
            hi, lo = self._weight_hi[columns].T, self._weight_lo[columns].T
            wide[:, columns] = torch.mm(mean_hi, hi).float().add_(torch.mm(mean_hi, lo)).add_(torch.mm(mean_lo, hi))
        return wide

    def fused(self, index: int) -> Tensor:
        """Rows as embstore makes them."""
        return self._finish(self._finisher, index)

    def unpacked(self, index: int) -> Tensor:
        """The same with the head's weights as they lie."""
        return self._finish(self._plain, index)

    def _finish(self, finisher: Finisher, index: int) -> Tensor:
        memory = self._memory[index]
        finish(finisher, self._slabs[index], memory.emb_BV, memory.coord_BR, memory.residual_B)
        return memory.emb_BV

    def passes(self, index: int) -> Tensor:
        """The same values in passes over a V-wide float32 row: product, norm, scale, round, difference, its norm."""
        memory, wide = self._memory[index], self.whole(index)
        coordinate_BR, _ = self._finisher.coordinates(self._slabs[index])
        memory.coord_BR.copy_(coordinate_BR)
        wide.div_(torch.linalg.vector_norm(wide, dim=1, keepdim=True))
        memory.emb_BV.copy_(wide)
        memory.residual_B.copy_(torch.linalg.vector_norm(wide.sub_(memory.emb_BV), dim=1))
        return memory.emb_BV


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def head(bench: Bench) -> Figures:
    """The product with the head alone, then everything from pooled means to stored rows; every thread has a slab."""
    ways = _HeadWays(bench)
    exact_BV = bench.slabs[0][:_CHECKED_ROWS].double() @ bench.head.weight_VD.double().T

    def way(name: str, run: Callable[[int], Tensor], *, is_ours: bool = False, medium: bool = False) -> Way:
        turn, once = functools.partial(bench.on_all_threads, run), functools.partial(run, 0)
        found_BV = at_medium(once)() if medium else once()
        error = unit_error(found_BV[:_CHECKED_ROWS], exact_BV) if len(found_BV[0]) == len(exact_BV[0]) else None
        return Way(name=name, run=at_medium(turn) if medium else turn, is_ours=is_ours, error=error)

    count = SLAB_ROWS * bench.threads
    with torch.inference_mode():
        products = [
            way("float32, the whole width", ways.whole),
            way("float32, blocks of 512 columns", ways.blocks, is_ours=not ways.can_pack),
            way("bfloat16", ways.bfloat16),
            way("three bfloat16 products of halves, added in float32", ways.three),
            way(f"float32, the whole width, {MEDIUM}", ways.whole, medium=True),
            way(f"float32, blocks of 512 columns, {MEDIUM}", ways.blocks, medium=True),
        ]
        stored = [
            way("blocks of 512 columns, all in the cache", ways.unpacked, is_ours=not ways.can_pack),
            way("passes over a V-wide float32 row", ways.passes),
            way(f"blocks of 512 columns, all in the cache, {MEDIUM}", ways.unpacked, medium=True),
        ]
        if ways.can_pack:
            products.append(way("float32, blocks of 512 columns packed for oneDNN", ways.packed, is_ours=True))
            stored.append(way("blocks of 512 columns packed for oneDNN, all in the cache", ways.fused, is_ours=True))
    return {
        "groups": [
            compare("product with the head, alone", products, count=count, unit="ms a row", rounds=3 * bench.rounds),
            compare("from means to float16 rows", stored, count=count, unit="ms a row", rounds=3 * bench.rounds),
        ]
    }


def norm(bench: Bench) -> Figures:
    """The norm of a row: from its coordinates, or of the V-wide row that would lie in memory."""
    ways = _HeadWays(bench)
    finisher, slab = bench.embedder("float32")._finisher, bench.slabs[0][:_CHECKED_ROWS]
    exact_B = torch.linalg.vector_norm(slab.double() @ bench.head.weight_VD.double().T, dim=1)
    bench.on_all_threads(ways.whole)
    with torch.inference_mode():
        found = {
            "coordinates": finisher.coordinates(slab)[1],
            "row": torch.linalg.vector_norm(ways.wide[0][:_CHECKED_ROWS], dim=1),
        }
    errors = {name: float((norm_B.double() / exact_B - 1).abs().max()) for name, norm_B in found.items()}
    both = [
        Way(
            name="from the coordinates, their product included",
            run=lambda: bench.on_all_threads(lambda index: finisher.coordinates(bench.slabs[index])),
            is_ours=True,
            error=errors["coordinates"],
        ),
        Way(
            name="of the V-wide float32 row, its product not included",
            run=lambda: bench.on_all_threads(lambda index: torch.linalg.vector_norm(ways.wide[index], dim=1)),
            error=errors["row"],
        ),
    ]
    count = SLAB_ROWS * bench.threads
    return {"groups": [compare("norm of a row", both, count=count, unit="ms a row", rounds=5 * bench.rounds)]}


def memory(bench: Bench) -> Figures:
    """A chunk's memory taken and filled once, while the last few are held as a writer does; both sides of 32 MiB.

    In processes of their own: what malloc gives depends on what was freed before.
    """
    columns, chunk_rows = bench.embedder("float32").spec.dimension, methods.chunk_rows(bench.embedder("float32"))
    groups = []
    for rows in (chunk_rows, chunk_rows + 16):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            groups.append(process.submit(_memory, (rows, columns), 2 * bench.rounds).result())
    return {"groups": groups}


def _memory(shape: tuple[int, int], rounds: int) -> Figures:
    ready = [torch.zeros(shape, dtype=torch.float16) for _ in range(_IN_WRITING + 1)]
    held: deque[Tensor] = deque(maxlen=_IN_WRITING)
    torch.set_num_threads(1)

    def fill(take: Callable[[], Tensor]) -> None:
        held.clear()
        for _ in range(_IN_WRITING + 1):
            held.append(take().fill_(1.0))

    def recycled() -> Tensor:
        ready.append(ready.pop(0))
        return ready[-1]

    fresh = {
        "a fresh torch tensor": lambda: torch.empty(shape, dtype=torch.float16),
        "a fresh numpy array (huge pages on request)": lambda: torch.from_numpy(np.empty(shape, dtype=np.float16)),
    }
    ways = [Way(name="recycled", run=functools.partial(fill, recycled), is_ours=True)]
    ways += [Way(name=name, run=functools.partial(fill, take)) for name, take in fresh.items()]
    title = f"memory of a chunk of {2 * math.prod(shape) / 2**20:.1f} MiB, filled"
    return compare(title, ways, count=_IN_WRITING + 1, unit="ms a chunk", rounds=rounds)


def disk(bench: Bench) -> Figures:
    """Durable files of an encoded chunk's size, in runs of eight.

    Not one by one in turns: who leaves his pages in the cache would get those that the other one has just dropped, and the
    other one would pay for pages that the system has to find.
    """
    (body, trailer), _ = encode_chunk(bench.chunks[0], chunk_rows=len(bench.chunks[0]), compressor="lz4")
    folder = bench.work / "disk"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def write(direct: DirectBuffer | None) -> None:
        first = len(list(folder.iterdir()))
        for number in range(first, first + _FILES):
            with DurableFile(folder / str(number), sync_directory=False, sha256=False, direct=direct) as file:
                file.write(body)
                file.write(trailer)

    ways = [
        Way(name="past the page cache", run=functools.partial(write, DirectBuffer()), is_ours=True),
        Way(name="through the page cache", run=functools.partial(write, None)),
    ]
    size = (memoryview(body).nbytes + len(trailer)) / 2**20
    found = compare(f"durable write of {size:.1f} MiB", ways, count=_FILES, unit="ms a file", rounds=bench.rounds)
    shutil.rmtree(folder)
    return {"groups": [found]}


def blosc(bench: Bench) -> Figures:
    """Encoding of chunks, checksum included; blosc in contextual mode only, in parallel over chunks."""
    chunks = bench.chunks
    codec = numcodecs.blosc.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.blosc.BITSHUFFLE, blocksize=0, typesize=2)

    def plain(chunk: NDArray[np.float16], compressor: str) -> int:
        return encode_chunk(chunk, chunk_rows=len(chunk), compressor=compressor)[1].bytes

    def zstd(chunk: NDArray[np.float16]) -> int:
        body = memoryview(codec.encode(chunk.reshape(-1)))
        crc32c(body)
        return body.nbytes

    encoders: dict[str, Callable[[NDArray[np.float16]], int]] = {
        "lz4, bitshuffle": functools.partial(plain, compressor="lz4"),
        "zstd level 1, bitshuffle": zstd,
        "none": functools.partial(plain, compressor="none"),
    }
    ways = []
    for name, encode in encoders.items():
        share = {"stored_share": encode(chunks[0]) / chunks[0].nbytes}
        for threads in dict.fromkeys((1, bench.threads)):
            pool = ThreadPoolExecutor(threads)

            def run(pool: ThreadPoolExecutor = pool, encode: Callable[[NDArray[np.float16]], int] = encode) -> None:
                list(pool.map(encode, chunks))

            title = f"{name}, {threads} at a time"
            ways.append(Way(name=title, run=run, is_ours=title == f"lz4, bitshuffle, {bench.threads} at a time", more=share))
    return {"groups": [compare("encoding", ways, count=len(chunks), unit="ms a chunk", rounds=bench.rounds)]}


def tokens(bench: Bench) -> Figures:
    """Tokens of a window: the Rust tokenizer, or transformers' call around it."""
    prompts = bench.prompts(1024)
    direct = bench.embedder("float32")._tokenizer
    call = PromptTokenizer(direct._tokenizer, direct.max_tokens, direct._num_tokens)
    call._backend = None  # as for tokenizers that have none
    ways = [
        Way(name="the Rust tokenizer, asked directly", run=lambda: direct.encode(prompts), is_ours=True),
        Way(name="transformers' call", run=lambda: call.encode(prompts)),
    ]
    return {"groups": [compare("tokens", ways, count=len(prompts), unit="ms a row", rounds=2 * bench.rounds)]}


def windows(bench: Bench) -> Figures:
    """Padding and number of batches for windows and batches of several sizes, as embstore pads; nothing is timed."""
    embedder = bench.embedder("float32")
    rows = embedder.tokens(bench.prompts())
    table = []
    for window_rows in (256, 1024, MAX_WINDOW_ROWS):
        for batch_tokens in (512, 1024, 2048, 4096):
            batches = [
                (int(batch.real_BT.sum()), batch.real_BT.size)
                for start in range(0, len(rows), window_rows)
                for batch in batches_of(
                    rows[start : start + window_rows], batch_tokens, padded_length=embedder._padded_length
                )
            ]
            real, padded = (sum(each) for each in zip(*batches, strict=True))
            row = {"window_rows": window_rows, "batch_tokens": batch_tokens, "batches": len(batches)}
            table.append(row | {"padding_waste": 1 - real / padded})
    return {"rows": len(rows), "table": table, "batch_tokens_taken": embedder.spec.batch_tokens, "groups": []}
