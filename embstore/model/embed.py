"""The embedding pass: prompts of one window to unit float16 rows, their coordinates and residuals.

Invariant: a row depends only on its prompt. Padding is masked and on the right; batch mates move a row by no more than
2e-6 (L2, float32) or 5e-4 (bfloat16). No [B, T, V] tensor exists at any time: an affine head sees one pooled state a
prompt, any other head sees a few hundred real tokens at a time.

Everything goes to worker threads: a window's tokens, its batches, slabs of its rows. While the caller writes a chunk the
next one is under way, and while it writes a window's last chunks the batches of the following window are, so the disk is
waited for only when it is slower than the model. In the layered order several windows make a lap (``laps``): they are begun
together and finish together.

Shapes: W rows of a window, B rows of a batch or block, T tokens, D model width, V vocabulary, R coordinates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.errors import ModelError
from embstore.core.interfaces import Check, RowBlock, WindowCounts
from embstore.core.prompts import Prompt
from embstore.core.spec import EmbeddingSpec
from embstore.host.threads import Workers, abandon, finish_all
from embstore.model.backbone import SplitModel, sdpa_without_plans
from embstore.model.batches import TokenBatch, batches_by_length, few_lengths, padded_batch
from embstore.model.finish import SLAB_ROWS, Finisher, finish
from embstore.model.heads import AffineHead, CappedHead, add_capped, add_streamed
from embstore.model.laps import Lap
from embstore.model.recycled import RecycledMemory
from embstore.model.repeats import Copies, copy_means, without_repeats
from embstore.model.settings import (
    MAX_WINDOW_ROWS,
    boundary_of,
    lap_tokens,
    makes_kernels,
    num_workers,
    window_bytes,
)
from embstore.model.slabs import Chunk, SlabWorkers
from embstore.model.tokens import PromptTokenizer, TokenRow, last_token_only

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What a free worker takes first: rows that the disk waits for, then tokens of the next window, then batches, oldest first.
_ROWS, _TOKENS, _BATCHES = 0, 1, 2
_ROW_STREAMS = 2  # double buffering: one slab is computed while another one is copied
_REAL, _POOLED = 1 << 40, 1 << 41  # flags above every token id, in an int64


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledWindow:
    """Means over the pooled tokens of each row: hidden states [W, D] (affine) or logits [W, V] (streamed), float32.

    ``ok_W`` is false where a prompt gave no tokens, ``refusals`` says of which rows that is the chat template's doing.
    ``sequence_W`` are digests of the tokens (``repeats``). On CUDA the means are there once ``ready`` has happened.
    """

    mean_WX: Tensor
    ok_W: NDArray[np.bool_]
    sequence_W: NDArray[np.uint64]
    refusals: Mapping[int, str] = dataclasses.field(default_factory=dict)
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """A loaded model ready to pool: ``head`` is None where rows are made without its tensors ("streamed", "none")."""

    model: SplitModel
    head: AffineHead | CappedHead | None
    tokenizer: PromptTokenizer
    device: torch.device


class _Window:
    """A window under way: the workers make its tokens, then its means, one job per batch."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.rows: Sequence[TokenRow] = ()
        self.means = PooledWindow(
            mean_WX=torch.empty(0), ok_W=np.empty(0, dtype=np.bool_), sequence_W=np.empty(0, dtype=np.uint64)
        )
        self.batches: list[Future[None]] = []
        self.tokens: Future[None] = Future()  # done when ``batches`` is complete
        self.tokens.set_result(None)
        self.splits = 0
        self.stop: Callable[[], None] = _nothing  # ends the lap that this window is in
        self.ready: torch.cuda.Event | None = None  # on the device, behind the last batch
        self.lock = threading.Lock()

    def finish(self) -> PooledWindow:
        """Wait for the means; the first error of a job is raised, and none goes on."""
        try:
            self.tokens.result()
            finish_all(self.batches)
        except BaseException:
            self.abandon()
            raise
        return dataclasses.replace(self.means, ready=self.ready)

    def abandon(self) -> None:
        """Nothing of this window goes on in the background when this returns."""
        self.stop()
        abandon([self.tokens])
        abandon(self.batches)


class LogitEmbedder:
    """Rows of a loaded model under a resolved spec; implements ``core.interfaces.Embedder``."""

    def __init__(
        self,
        parts: ModelParts,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        finisher: Finisher,
        *,
        memory_bytes: int = 0,
    ) -> None:
        """``memory_bytes`` is what a lap of several windows may take; 0: a lap is one window."""
        self._model, self._tokenizer, self._device = parts.model, parts.tokenizer, parts.device
        self._capped = parts.head if isinstance(parts.head, CappedHead) else None
        self.spec = spec
        self.basis_VR = basis_VR
        self.mean_tokens = float(spec.max_tokens)
        self.truncated_share = 0.0  # ``pilot.note_plan`` sets these four, for the plan of a new store
        self.seconds_per_row = 0.0
        self.max_window_rows = MAX_WINDOW_ROWS
        self.counts = WindowCounts(tokens=0, truncated=0, splits=0)
        self._finisher = finisher
        self._memory_bytes = memory_bytes
        self.num_workers = num_workers(spec, self._model)
        self._workers = Workers(spec.threads, self.num_workers, self._device)
        # a lap keeps its threads until it ends
        self._lap_workers = Workers(spec.threads, self.num_workers, self._device)
        self._token_workers = row_workers = self._workers
        if self._device.type != "cpu":
            # batches are computed while the next window is tokenised and finished rows are copied, two slabs at a time
            self._token_workers, row_workers = Workers(1, 1, self._device), Workers(_ROW_STREAMS, _ROW_STREAMS, self._device)
        self._streams = threading.local()
        memory = RecycledMemory(spec.dimension, spec.rank, pinned=self._device.type == "cuda")
        self._slabs = SlabWorkers(row_workers, memory, SLAB_ROWS, (_ROWS,))
        self._numbers = itertools.count()
        self._under_way: deque[_Window] = deque()  # begun and not asked for yet, in order
        self._declined: _Window | None = None  # tokenised for a lap in which it found no room

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of host memory one window takes above the loaded model."""
        needed = window_bytes(self.spec, self._model, chunk_rows=chunk_rows, window_rows=self.max_window_rows)
        if self._model.residency is None or self._device.type != "cpu":
            return needed
        # between layers, a whole window waits
        return needed + int(self.max_window_rows * self.mean_tokens * self._model.waiting_bytes_per_token)

    @property
    def model(self) -> SplitModel:
        """The loaded model."""
        return self._model

    def close(self) -> None:
        """Abandon the windows that were begun ahead, and drop the weights of layers that take turns."""
        self._abandon()
        if self._model.residency is not None:
            self._model.residency.drop_all()

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        first_row: int,
        chunk_rows: int,
        check: Check,
        following: Iterable[Sequence[Prompt]] = (),
    ) -> Iterator[RowBlock]:
        """Rows of one window by chunks; a prompt without a usable row is NaN and named, never skipped."""
        if not self._under_way or self._under_way[0].prompts is not prompts:
            self._abandon()
            following = self._begin(itertools.chain([prompts], following), chunk_rows, check)
        window = self._under_way.popleft()
        window.tokens.result()
        if not self._under_way:
            self._begin(following, chunk_rows, check)
        yield from self.blocks(window.finish(), first_row=first_row, chunk_rows=chunk_rows, check=check)
        self.counts = WindowCounts(
            tokens=sum(int(row.pooled_T.sum()) for row in window.rows),
            truncated=sum(row.was_cut for row in window.rows),
            splits=window.splits,
        )

    def tokens(self, prompts: Sequence[Prompt]) -> list[TokenRow]:
        """Token rows in prompt order."""
        return self._tokenizer.encode(prompts)

    def pool(self, rows: Sequence[TokenRow], check: Check) -> PooledWindow:
        """Masked means of token rows, without finishing them: for probes."""
        window = _Window(())
        batches = self._batches(window, rows, check)
        if self._model.residency is None:
            self._submit(window, batches, next(self._numbers))
        else:
            self._begin_lap([window], batches, check)
        return window.finish()

    def blocks(self, window: PooledWindow, *, first_row: int, chunk_rows: int, check: Check) -> Iterator[RowBlock]:
        """Finished rows of a pooled window by chunks; each chunk is begun when the one before it is given away."""
        num_rows = len(window.ok_W)
        ahead = self._begin_chunk(window, 0, chunk_rows)
        try:
            for start in range(0, num_rows, chunk_rows):
                check()
                chunk = ahead
                if start + chunk_rows < num_rows:
                    ahead = self._begin_chunk(window, start + chunk_rows, chunk_rows)
                block = self._slabs.finished(chunk, first_row + start, functools.partial(_failure, window, start))
                yield dataclasses.replace(block, sequence_B=window.sequence_W[start : start + chunk_rows])
        finally:
            ahead.wait()  # an abandoned window must not go on in the background

    @torch.inference_mode()
    def unit_rows(self, window: PooledWindow, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit rows before rounding float32 [B, V], coordinates [B, R], and the norms the rows had: for probes."""
        mean_BX = window.mean_WX[start:stop]
        coordinate_BR, norm_B = self._finisher.coordinates(mean_BX)
        blocks = [unit_BC.clone() for _, unit_BC in self._finisher.unit_blocks(mean_BX, norm_B)]
        return torch.cat(blocks, dim=1), coordinate_BR, norm_B

    # --- a window's means -------------------------------------------------------------------------------------------

    def _begin(self, windows: Iterable[Sequence[Prompt]], chunk_rows: int, check: Check) -> Iterator[Sequence[Prompt]]:
        """Begin the next of these windows, or as many as make a lap; those that are left, in their order."""
        windows = iter(windows)
        if self._model.residency is not None:
            begun, batches, declined = self._lap_of(windows, chunk_rows, check)
            self._under_way.extend(begun)
            self._begin_lap(begun, batches, check)
            return itertools.chain(declined, windows)
        for prompts in itertools.islice(windows, 1):
            window, number = _Window(prompts), next(self._numbers)

            def tokenise(window: _Window = window, number: int = number) -> None:
                check()
                self._submit(window, self._batches(window, self.tokens(window.prompts), check), number)

            window.tokens = self._token_workers.submit(tokenise, (_TOKENS, number))
            self._under_way.append(window)
        return windows

    def _abandon(self) -> None:
        while self._under_way:
            self._under_way.popleft().abandon()

    def _batches(self, window: _Window, rows: Sequence[TokenRow], check: Check) -> list[tuple[Callable[[], None], int]]:
        """Jobs that fill a window's means, one for each batch, with their padded tokens."""
        width = self.spec.dimension if self.spec.head.pools_logits else self._model.width
        window.rows = rows
        if self.spec.pooling == "last":
            rows = [last_token_only(row) for row in rows]
        rows, copies, sequence_W = without_repeats(rows)
        window.means = PooledWindow(
            mean_WX=torch.zeros((len(rows), width), dtype=torch.float32, device=self._device),
            ok_W=np.array([row.pooled_T.any() for row in window.rows], dtype=np.bool_),
            sequence_W=sequence_W,
            refusals={index: row.refusal for index, row in enumerate(window.rows) if row.refusal is not None},
        )
        return [
            (functools.partial(self._pool_rows, window, rows, rows_B, length, check, copies), len(rows_B) * length)
            for rows_B, length in batches_by_length(
                rows,
                batch_tokens=self.spec.batch_tokens,
                padded_length=self._padded_length,
                boundary=boundary_of(self.spec, self._model),
            )
        ]

    def _submit(self, window: _Window, batches: Sequence[tuple[Callable[[], None], int]], number: int) -> None:
        window.batches.extend(self._workers.submit(self._on_kernels(pool), (_BATCHES, number)) for pool, _ in batches)

    def _lap_of(
        self, windows: Iterable[Sequence[Prompt]], chunk_rows: int, check: Check
    ) -> tuple[list[_Window], list[tuple[Callable[[], None], int]], list[Sequence[Prompt]]]:
        """The windows of the next lap: one, and more while what waits at the gates fits the memory and ten minutes.

        Last comes the window that was looked at and is left for another lap, if there is one.
        """
        begun: list[_Window] = []
        batches: list[tuple[Callable[[], None], int]] = []
        most_tokens = lap_tokens(self.spec, self._model, spare_bytes=self._memory_bytes - self.memory_bytes(chunk_rows))
        for prompts in windows:
            window = _Window(prompts)
            known, self._declined = self._declined, None
            rows = known.rows if known is not None and known.prompts is prompts else self.tokens(prompts)
            further = self._batches(window, rows, check)
            if begun and sum(tokens for _, tokens in (*batches, *further)) > most_tokens:
                self._declined = window
                return begun, batches, [prompts]
            begun.append(window)
            batches += further
        return begun, batches, []

    def _begin_lap(
        self, windows: Sequence[_Window], batches: Sequence[tuple[Callable[[], None], int]], check: Check
    ) -> None:
        if self._model.residency is None or not batches:
            return
        lap = Lap(self._model.residency, check)
        # around the whole share: a context of the process must not be entered by batches that take turns
        jobs = [self._lap_workers.submit(self._on_kernels(share)) for share in lap.share(batches, self.num_workers)]
        for window in windows:
            window.batches, window.stop = jobs, lap.cancel

    def _on_kernels(self, job: Callable[[], None]) -> Callable[[], None]:
        """The job, with the attention kernels of the pass."""

        def run() -> None:
            with sdpa_without_plans(self._device):
                job()

        return run

    def _padded_length(self, length: int) -> int:
        """As long as it is, or of a few lengths. Never 1: some classes take a single token for a step of generation."""
        return max(2, min(few_lengths(length), self.spec.max_tokens) if makes_kernels(self.spec) else length)

    def _pool_rows(
        self, window: _Window, rows: Sequence[TokenRow], rows_B: NDArray[np.int64], length: int, check: Check, copies: Copies
    ) -> None:
        check()
        self._pool_batch(padded_batch(rows, rows_B, length, pad_id=self._tokenizer.pad_id), window)
        copy_means(window.means.mean_WX, rows_B, copies)
        if self._device.type == "cuda":
            window.ready = torch.cuda.current_stream(self._device).record_event()

    def _pool_batch(self, batch: TokenBatch, window: _Window) -> None:
        try:
            self._pool_whole(batch, window.means.mean_WX)
            return
        except torch.OutOfMemoryError as error:
            if len(batch.rows_B) == 1:
                raise ModelError(
                    f"a prompt of {batch.tokens_BT.shape[1]} tokens does not fit the device's memory",
                    hint="build with a lower --max-tokens, or on another device",
                ) from error
        # outside the handler: the error's traceback holds every tensor of the batch that did not fit
        with window.lock:
            window.splits += 1
        middle = len(batch.rows_B) // 2
        for half in (slice(0, middle), slice(middle, None)):
            part = TokenBatch(
                rows_B=batch.rows_B[half],
                tokens_BT=batch.tokens_BT[half],
                real_BT=batch.real_BT[half],
                pooled_BT=batch.pooled_BT[half],
            )
            self._pool_batch(part, window)

    def _pool_whole(self, batch: TokenBatch, mean_WX: Tensor) -> None:
        tokens_BT, real_BT, pooled_BT, rows_B = self._on_device(batch)
        if makes_kernels(self.spec):
            num_rows = self._few_rows(*tokens_BT.shape)
            tokens_BT, real_BT = _with_rows(tokens_BT, num_rows), _with_rows(real_BT, num_rows)
        hidden_BTD = self._model.hidden(tokens_BT, real_BT)[: len(rows_B)]
        if not self.spec.head.pools_logits:
            if not batch.pooled_BT.all():
                # zeroed, not multiplied: a NaN at a masked position must not reach a row
                hidden_BTD = hidden_BTD.masked_fill_(~pooled_BT[..., None], 0.0)
            mean_WX[rows_B] = hidden_BTD.sum(dim=1) / pooled_BT.sum(dim=1, keepdim=True)
        else:
            if self._capped is not None and add_capped(
                self._capped, hidden_BTD, batch.pooled_BT, rows_B, mean_WX, columns=self.spec.dimension
            ):
                return
            add_streamed(self._model.head, hidden_BTD, batch.pooled_BT, rows_B, mean_WX, columns=self.spec.dimension)

    def _few_rows(self, num_rows: int, length: int) -> int:
        """Rows that a window's last batch is filled up to: those of a full one, or a power of two where that is less."""
        return min(max(num_rows, self.spec.batch_tokens // length), 1 << (num_rows - 1).bit_length())

    def _on_device(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, real, pooled [B, T] and row numbers [B]; to an accelerator in one copy that waits for nothing."""
        whole = (batch.tokens_BT, batch.real_BT, batch.pooled_BT, batch.rows_B)
        if self._device.type != "cuda":
            tokens_BT, real_BT, pooled_BT, rows_B = (torch.from_numpy(values).to(self._device) for values in whole)
            return tokens_BT, real_BT, pooled_BT, rows_B
        flags_BT = batch.real_BT * _REAL | batch.pooled_BT * _POOLED
        packed = torch.from_numpy(np.column_stack([batch.tokens_BT | flags_BT, batch.rows_B])).pin_memory()
        packed = packed.to(self._device, non_blocking=True)
        marked_BT, rows_B = packed[:, :-1], packed[:, -1]
        return marked_BT & (_REAL - 1), (marked_BT & _REAL) != 0, (marked_BT & _POOLED) != 0, rows_B

    # --- a chunk's rows ---------------------------------------------------------------------------------------------

    def _begin_chunk(self, window: PooledWindow, start: int, chunk_rows: int) -> Chunk:
        def fill(slab: slice, emb_BV: Tensor, coord_BR: Tensor, residual_B: Tensor) -> NDArray[np.float32]:
            mean_BX = window.mean_WX[start + slab.start : start + slab.stop]
            with self._own_stream(window.ready):
                return finish(self._finisher, mean_BX, emb_BV, coord_BR, residual_B)

        return self._slabs.begin(min(chunk_rows, len(window.ok_W) - start), fill)

    @contextlib.contextmanager
    def _own_stream(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA a stream of this thread's own, after the window's last batch; anywhere else nothing."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            if ready is not None:
                self._streams.own.wait_event(ready)
            yield


def _nothing() -> None:
    """No lap to end."""


def _with_rows(values_BT: Tensor, num_rows: int) -> Tensor:
    """The batch with its first row repeated until there are ``num_rows``."""
    return torch.cat([values_BT, values_BT[:1].expand(num_rows - len(values_BT), -1)])


def _failure(window: PooledWindow, start: int, local: int, norm: float) -> str | None:
    if start + local in window.refusals:
        return window.refusals[start + local]
    if not window.ok_W[start + local]:
        return "the prompt has no tokens: the tokenizer returned none, or only special ones"
    if not np.isfinite(norm):
        return "the model gives a non-finite logit"
    if norm == 0:
        return "the mean logits have zero norm"
    return None
