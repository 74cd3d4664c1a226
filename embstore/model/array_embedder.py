"""Rows that exist already: an array in place of a model. Unit rows, a basis found in the rows themselves, coordinates.

A row of the store is a row of the array, scaled to length 1 and rounded to float16; nothing else happens to it. The basis is
that of a range finder (Halko et al. 2011, arXiv:0909.4061) on a seeded sample, with as many directions as it takes until
what the sample loses is what float16 loses anyway; each row's residual says what it really is.

Shapes: N rows, B rows of a block, D columns (V elsewhere), R coordinates, M sampled rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.config import EmbeddingConfig, over_memory_budget
from embstore.core.errors import ArrayError, ModelError, RowError
from embstore.core.events import Observer, ignore, stage
from embstore.core.interfaces import Check, GivenRows, PromptReader, RowBlock, WindowCounts
from embstore.core.prompts import Prompt
from embstore.core.rows import slices
from embstore.core.sampling import seeded_sample
from embstore.core.spec import EmbeddingSpec, Head, ModelIdentity
from embstore.host.device import library_versions
from embstore.host.scratch import map_scratch
from embstore.host.threads import Workers, num_cores
from embstore.model.basis import largest_width
from embstore.model.range_finder import sampled_basis
from embstore.model.recycled import RecycledMemory
from embstore.model.slabs import SlabWorkers

_HEAD = "imported"
_WINDOW_ROWS = 4096
_LEAST_SAMPLE, _LARGEST_SAMPLE = 256, 4096
# Root mean square of what the sample may lose: float16 loses 2.1e-4 of a unit row (docs/decisions/0005).
_TAIL = 2.5e-4
_SLAB_ROWS, _SLAB_VALUES, _BLOCK_COLUMNS = 320, 1 << 20, 1024
_TIMED_ROWS = 32
_FIXED_BYTES = 48 << 20


class ArraySource:
    """An array in place of a model; implements ``core.interfaces.EmbedderSource``."""

    def __init__(self, rows: GivenRows) -> None:
        self._rows = rows

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self._rows.fingerprint()

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        """The digest of the array's values; an array has neither configuration nor tokenizer."""
        with stage(observer, "hash"):
            fingerprint = self._fingerprint
        return ModelIdentity(
            name=self._rows.name,
            architecture="imported array",
            revision=None,
            weights_sha256=fingerprint,
            config_sha256="none",
            tokenizer_sha256="none",
            trust_remote_code=False,
        )

    def reads_clock(self) -> bool:
        """An array has no chats."""
        return False

    def template(self, chat_date: str | None) -> None:
        """An array renders nothing."""

    def device(self, name: str) -> str:
        """An array is read and scaled by the CPU."""
        return "cpu"

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """The CPU's instructions, threads and torch's version decide low bits of the coordinates."""
        capability = str(torch.backends.cpu.get_cpu_capability())
        threads = config.threads or num_cores()
        return {"device": "cpu", "capability": capability, "threads": threads, "versions": library_versions()}

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path | None, observer: Observer
    ) -> ArrayEmbedder:
        """Find the basis.

        Raises
        ------
        ArrayError, BudgetError, RowError
            The array has fewer rows than there are names or needs more memory than the budget, or no sampled row is usable.
        """
        if work is None:
            raise AssertionError("an import has no dry run")
        rows = self._rows
        if len(prompts) > rows.num_rows:
            raise ArrayError(
                f"{rows.name} has {rows.num_rows} rows, the store has {len(prompts)}", hint="import the array it began with"
            )
        if (needed := 4 * rows.held_bytes) > memory_bytes:
            raise over_memory_budget(
                f"reading {rows.name} by its chunks needs",
                needed,
                memory_bytes,
                hint=", or save the array with fewer rows per chunk",
            )
        hardware = self.hardware(config)
        torch.set_num_threads(int(str(hardware["threads"])))
        with stage(observer, "basis"):
            basis_VR = _basis(rows, len(prompts), memory_bytes, work)
        spec = EmbeddingSpec(
            dimension=rows.dimension,
            rank=basis_VR.shape[1],
            columns=_HEAD,
            head=Head(kind=_HEAD),
            space="none",
            pooling="none",
            normalization="l2",
            token_rule="none",
            max_tokens=0,
            batch_tokens=0,
            dtype=rows.dtype,
            device="cpu",
            capability=str(hardware["capability"]),
            threads=int(str(hardware["threads"])),
            basis="range-finder",
            versions=library_versions(),
        )
        embedder = ArrayEmbedder(rows, spec, basis_VR)
        count = min(_TIMED_ROWS, len(prompts))
        for _ in range(2):  # the first one warms up
            timed = time.perf_counter()
            for block in embedder.blocks(0, count, chunk_rows=count, check=lambda: None):
                block.release()
            embedder.seconds_per_row = (time.perf_counter() - timed) / count
        return embedder

    def take_over(
        self,
        prompts: PromptReader,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> ArrayEmbedder:
        """Open the array under another store's spec, as ``reopen`` does: an array has no settings to probe."""
        return self.reopen(spec, basis_VR)

    def reopen(
        self,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int = 0,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> ArrayEmbedder:
        """Open the array under a stored spec."""
        if spec.head.kind != _HEAD:
            raise ModelError(
                f"the store has head {spec.head.kind!r}: a model made its rows, not an array",
                hint="continue it with embstore build PROMPTS --model MODEL --resume",
            )
        torch.set_num_threads(spec.threads)
        return ArrayEmbedder(self._rows, spec, basis_VR)


class ArrayEmbedder:
    """Rows of an array under a resolved spec; implements ``core.interfaces.Embedder``. Row i of the array is row i."""

    truncated_share = 0.0
    max_window_rows = _WINDOW_ROWS

    def __init__(self, rows: GivenRows, spec: EmbeddingSpec, basis_VR: NDArray[np.float32]) -> None:
        self._rows = rows
        self.spec = spec
        self.basis_VR = basis_VR
        self.seconds_per_row = 0.0
        self.counts = WindowCounts(tokens=0, truncated=0, splits=0)
        self._basis_VR = torch.from_numpy(basis_VR)
        self._slab_rows = max(1, min(_SLAB_ROWS, _SLAB_VALUES // spec.dimension))  # of the array alone: it decides low bits
        memory = RecycledMemory(spec.dimension, spec.rank, pinned=False)
        self._slabs = SlabWorkers(Workers(spec.threads, spec.threads), memory, self._slab_rows)

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of memory that one window takes."""
        spec = self.spec
        # one is being written and two wait with their encoded copies, the next one is ready
        chunks = 6 * chunk_rows * (2 * spec.dimension + 4 * spec.rank)
        columns = min(_BLOCK_COLUMNS, spec.dimension)
        slab = 8 * (4 * self._slab_rows * spec.dimension + columns * spec.rank + 4 * self._slab_rows * (columns + spec.rank))
        given = self._rows.held_bytes + (chunk_rows * spec.dimension * 8 if self._rows.held_bytes else 0)
        return chunks + spec.threads * slab + given + 2 * 4 * _WINDOW_ROWS * spec.rank + _FIXED_BYTES

    def close(self) -> None:
        """Nothing is begun ahead."""

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        first_row: int,
        chunk_rows: int,
        check: Check,
        following: Iterable[Sequence[Prompt]] = (),
    ) -> Iterator[RowBlock]:
        """Rows of one window by chunks; a row that cannot be scaled is NaN and named, never skipped."""
        yield from self.blocks(first_row, first_row + len(prompts), chunk_rows=chunk_rows, check=check)

    def blocks(self, start: int, stop: int, *, chunk_rows: int, check: Check) -> Iterator[RowBlock]:
        """Finished rows by chunks."""
        for rows in slices(start, stop, chunk_rows):
            check()
            given_BV = self._rows.read(rows.start, rows.stop)
            chunk = self._slabs.begin(len(given_BV), functools.partial(self._fill, given_BV))
            try:
                block = self._slabs.finished(chunk, rows.start, _failure)
            finally:
                chunk.wait()  # the array may be a view of a file that is closed next
            yield block

    def _fill(
        self, given_BV: NDArray[np.floating], slab: slice, emb_BV: Tensor, coord_BR: Tensor, residual_B: Tensor
    ) -> NDArray[np.float64]:
        """Fill one slab; returns norms of the scaled rows, NaN or 0 where there is no direction.

        Coordinates are summed in float64 and then rounded: in float32 their last bits would depend on a row's place in the
        slab, and rows that are copies must give copies.
        """
        scaled_BV = scaled(given_BV[slab])
        norm_B: NDArray[np.float64] = np.sqrt(np.square(scaled_BV).sum(axis=1))
        unit_BV = torch.from_numpy(scaled_BV).div_(torch.from_numpy(norm_B)[:, None])
        emb_BV.copy_(unit_BV.float())
        double_BR = torch.zeros(coord_BR.shape, dtype=torch.float64)
        blocks = list(slices(0, self.spec.dimension, _BLOCK_COLUMNS))
        for columns in blocks:
            double_BR += unit_BV[:, columns] @ self._basis_VR[columns].double()
        coord_BR.copy_(double_BR)
        square_B = torch.zeros(len(coord_BR))
        for columns in blocks:
            lost_BC = emb_BV[:, columns].float() - coord_BR @ self._basis_VR[columns].T
            square_B += torch.linalg.vecdot(lost_BC, lost_BC)
        residual_B.copy_(square_B.sqrt_())
        return norm_B


def _failure(_: int, norm: float) -> str | None:
    if norm > 0:
        return None
    return "every value is 0" if norm == 0 else "a value is not finite"


def scaled(rows_BV: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows as float64 [B, D] with a largest magnitude in [0.5, 1): no square over- or underflows, and no bit is lost.

    Each row is multiplied by a power of 2; a row with a value that is not finite becomes NaN, a row of zeros stays.
    """
    native_BV = np.array(rows_BV, dtype=rows_BV.dtype.newbyteorder("="))
    scaled_BV: NDArray[np.float64] = torch.from_numpy(native_BV).double().numpy()  # numpy's own float16 is ten times slower
    largest_B = np.abs(scaled_BV).max(axis=1)
    exponent_B = np.frexp(np.where(np.isfinite(largest_B), largest_B, 0.0))[1]
    half_B = exponent_B // 2  # in two steps: 2 ** 1074 is not a float64
    scaled_BV *= np.ldexp(1.0, -half_B)[:, None]
    scaled_BV *= np.ldexp(1.0, half_B - exponent_B)[:, None]
    scaled_BV[~np.isfinite(largest_B)] = np.nan
    return scaled_BV


def _basis(rows: GivenRows, num_rows: int, memory_bytes: int, work: Path) -> NDArray[np.float32]:
    """Orthonormal float32 [D, R], from as large a sample as it takes."""
    most = max(_LEAST_SAMPLE, 2 * rows.dimension)
    limit = min(num_rows, most, _LARGEST_SAMPLE, largest_width(memory_bytes // 2))
    return sampled_basis(
        lambda width: [_sampled(rows, num_rows, width, work)],
        rows.dimension,
        limit=limit,
        max_rank=rows.dimension,
        tail=_TAIL,
        work=work,
        device=torch.device("cpu"),
    )


def _sampled(rows: GivenRows, num_rows: int, count: int, work: Path) -> NDArray[np.float32]:
    """Usable unit rows float32 [M, D] of a seeded sample, in a mapped scratch file."""
    sample_MV = map_scratch(work / "pilot.npy", (count, rows.dimension), np.float32)
    found = 0
    for row in seeded_sample(num_rows, count, 0):
        unit_V = scaled(rows.read(int(row), int(row) + 1))[0]
        norm = float(np.sqrt(np.square(unit_V, dtype=np.float64).sum()))
        if np.isfinite(norm) and norm > 0:
            sample_MV[found] = unit_V / norm
            found += 1
    if not found:
        raise RowError(
            f"none of {count} sampled rows of {rows.name} has finite values and a length above 0",
            hint="look at the array: are its rows embeddings?",
        )
    return sample_MV[:found]
