"""The embedding pass: prompts of one window to unit float16 logit rows, their coordinates and residuals.

Invariant: a row depends only on its prompt. Padding is masked and on the right; batch mates move a row by no more than
2e-6 (L2, float32) or 5e-4 (bfloat16). No [B, T, V] tensor exists at any time: an affine head sees one pooled state a
prompt, any other head sees a few hundred real tokens at a time.

Shapes: W rows of a window, B rows of a batch or block, T tokens, D model width, V vocabulary, R coordinates, L flat tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.compute.batching import PromptTokenizer, TokenBatch, TokenRow, token_batches
from embstore.compute.coordinates import ReadBlock, project
from embstore.compute.heads import AffineHead, SplitModel
from embstore.core.embedder import Check, RowBlock, WindowCounts
from embstore.core.errors import ModelError
from embstore.core.format import EmbeddingSpec
from embstore.core.prompts import Prompt
from embstore.core.records import FailedRow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# V-wide float32 work is done in blocks of about this size: large enough for the GEMM, small enough for a tight budget.
_WIDE_BLOCK_BYTES = 16 << 20
# Padding waste falls with the window: 18.6 % at 256 rows, 6.6 % at 1024, 2.0 % at 4096 (batches of 4096 tokens).
MAX_WINDOW_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledWindow:
    """Means over the pooled tokens of each row: hidden states [W, D] (affine) or logits [W, V] (streamed), float32.

    ``ok_W`` is false where a prompt gave no tokens.
    """

    mean_WX: Tensor
    ok_W: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """A loaded model ready to pool: ``head`` is None on the streaming path."""

    model: SplitModel
    head: AffineHead | None
    tokenizer: PromptTokenizer
    device: torch.device


class LogitEmbedder:
    """Rows of a loaded model under a resolved spec; implements ``core.embedder.Embedder``."""

    def __init__(
        self,
        parts: ModelParts,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        max_window_rows: int = MAX_WINDOW_ROWS,
        truncated_share: float = 0.0,
        seconds_per_row: float = 0.0,
    ) -> None:
        self._model, self._head = parts.model, parts.head
        self._tokenizer, self._device = parts.tokenizer, parts.device
        self.spec = spec
        self.basis_VR = basis_VR
        self.truncated_share = truncated_share
        self.seconds_per_row = seconds_per_row
        self.max_window_rows = max_window_rows
        self.counts = WindowCounts(tokens=0, truncated=0, splits=0)
        self._splits = 0
        # x = scale * A z / |..| with z = (h, 1) and A = [W | b], so x Q = (Q^T A) z / |..|: no V-wide product
        self._to_coordinates_DR = None
        if self._head is not None and basis_VR.shape[1]:
            self._to_coordinates_DR = _coordinate_map(self._head, basis_VR, self._device)
        self._basis_VR = torch.from_numpy(basis_VR).to(self._device) if self._head is None else None

    def memory_bytes(self, chunk_rows: int) -> int:
        """Upper estimate of host memory one window takes above the loaded model."""
        return window_bytes(self.spec, self._model.width, self._model.inner_width, chunk_rows, self.max_window_rows)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Prompt], *, first_row: int, chunk_rows: int, check: Check) -> Iterator[RowBlock]:
        """Blocks of ``chunk_rows`` rows, in order. A prompt without a usable row is NaN and named, never skipped."""
        self._splits = 0
        rows = self._tokenizer.encode(prompts)
        window = self.pool(rows, check)
        for start in range(0, len(prompts), chunk_rows):
            check()
            yield self._block(window, start, min(start + chunk_rows, len(prompts)), first_row, chunk_rows)
        self.counts = WindowCounts(
            tokens=sum(int(row.pooled_T.sum()) for row in rows),
            truncated=sum(row.was_cut for row in rows),
            splits=self._splits,
        )

    @torch.inference_mode()
    def pool(self, rows: Sequence[TokenRow], check: Check) -> PooledWindow:
        """Masked means of a window, batch by batch; float32 accumulation."""
        width = self.spec.dimension if self._head is None else self._model.width
        mean_WX = torch.zeros((len(rows), width), dtype=torch.float32, device=self._device)
        ok_W = np.array([row.pooled_T.any() for row in rows], dtype=np.bool_)
        pad_id = self._tokenizer.pad_id
        for batch in token_batches(rows, batch_tokens=self.spec.batch_tokens, pad_id=pad_id):
            check()
            self._pool_batch(batch, mean_WX)
        return PooledWindow(mean_WX=mean_WX, ok_W=ok_W)

    def _pool_batch(self, batch: TokenBatch, mean_WX: Tensor) -> None:
        try:
            self._pool_whole(batch, mean_WX)
            return
        except torch.OutOfMemoryError as error:
            if len(batch.rows_B) == 1:
                raise ModelError(
                    f"a prompt of {batch.tokens_BT.shape[1]} tokens does not fit the device's memory",
                    hint="build with a lower --max-tokens, or on another device",
                ) from error
        # outside the handler: the error's traceback holds every tensor of the batch that did not fit
        self._splits += 1
        middle = len(batch.rows_B) // 2
        for half in (slice(0, middle), slice(middle, None)):
            part = TokenBatch(
                rows_B=batch.rows_B[half],
                tokens_BT=batch.tokens_BT[half],
                real_BT=batch.real_BT[half],
                pooled_BT=batch.pooled_BT[half],
            )
            self._pool_batch(part, mean_WX)

    def _pool_whole(self, batch: TokenBatch, mean_WX: Tensor) -> None:
        tokens_BT = torch.from_numpy(batch.tokens_BT).to(self._device)
        real_BT = torch.from_numpy(batch.real_BT).to(self._device)
        pooled_BT = torch.from_numpy(batch.pooled_BT).to(self._device)
        rows_B = torch.from_numpy(batch.rows_B).to(self._device)
        hidden_BTD = self._model.hidden(tokens_BT, real_BT)
        share_BT = pooled_BT / pooled_BT.sum(dim=1, keepdim=True)
        if self._head is not None:
            # masked positions are zeroed, not multiplied: a NaN at a pad must not reach a row
            hidden_BTD = hidden_BTD.masked_fill_(~pooled_BT[..., None], 0.0)
            mean_WX[rows_B] = torch.einsum("btd,bt->bd", hidden_BTD, share_BT)
        else:
            mean_WX[rows_B] = 0.0  # a batch that ran out of memory may have begun to add
            self._add_streamed(hidden_BTD, pooled_BT, share_BT, rows_B, mean_WX)

    def _add_streamed(
        self, hidden_BTD: Tensor, pooled_BT: Tensor, share_BT: Tensor, rows_B: Tensor, mean_WX: Tensor
    ) -> None:
        """Add mean logits of pooled tokens to their rows of ``mean_WX``, a few hundred tokens at a time."""
        columns = self.spec.dimension
        hidden_LD = hidden_BTD[pooled_BT]
        row_L, share_L = pooled_BT.nonzero()[:, 0], share_BT[pooled_BT]
        step = streamed_tokens(columns)
        for start in range(0, len(hidden_LD), step):
            part = slice(start, start + step)
            logits_LV = self._model.head(hidden_LD[part])[:, :columns]
            first, last = int(row_L[part][0]), int(row_L[part][-1]) + 1
            # an indicator product sums each row in a fixed order, also on a GPU, where index_add does not
            share_BL = torch.zeros((last - first, logits_LV.shape[0]), device=self._device)
            share_BL[row_L[part] - first, torch.arange(logits_LV.shape[0], device=self._device)] = share_L[part]
            part_BV = share_BL @ logits_LV
            if not torch.isfinite(part_BV).all():
                # 0 * NaN is NaN: a token without finite logits must fail its own row only
                lost_L = ~torch.isfinite(logits_LV).all(dim=1)
                part_BV = share_BL @ logits_LV.masked_fill(lost_L[:, None], 0.0)
                part_BV[row_L[part][lost_L] - first] = torch.nan
            mean_WX[rows_B[first:last]] += part_BV  # rows of a batch are distinct: nothing is added twice

    def _block(self, window: PooledWindow, start: int, stop: int, first_row: int, chunk_rows: int) -> RowBlock:
        """Rows start <= row < stop of the window, V-wide work done in small pieces."""
        emb_BV = np.empty((stop - start, self.spec.dimension), dtype=np.float16)
        coord_BR = np.empty((stop - start, self.spec.rank), dtype=np.float32)
        residual_B = np.empty(stop - start, dtype=np.float32)
        failed: list[FailedRow] = []
        step = wide_rows(self.spec.dimension, chunk_rows)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            row_BV, coordinate_BR, norm_B = self.unit_rows(window, low, high)
            part = slice(low - start, high - start)
            half_BV = row_BV.to(torch.float16)
            if self._basis_VR is None:
                # the float32 row lies in the span of the basis, so all it loses is the rounding
                error_BV = row_BV.sub_(half_BV)
            else:
                error_BV = half_BV.float().sub_(coordinate_BR @ self._basis_VR.T)
            residual_B[part] = torch.linalg.vector_norm(error_BV, dim=1).cpu().numpy()
            emb_BV[part], coord_BR[part] = half_BV.cpu().numpy(), coordinate_BR.cpu().numpy()
            norms = norm_B.cpu().numpy()
            for local in range(low, high):
                reason = _failure(bool(window.ok_W[local]), float(norms[local - low]))
                if reason is not None:
                    emb_BV[local - start] = coord_BR[local - start] = residual_B[local - start] = np.nan
                    failed.append(FailedRow(row=first_row + local, reason=reason))
        return RowBlock(emb_BV=emb_BV, coord_BR=coord_BR, residual_B=residual_B, failed=tuple(failed))

    @torch.inference_mode()
    def unit_rows(self, window: PooledWindow, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit rows before rounding float32 [B, V], coordinates [B, R], and the norms the rows had."""
        mean_BX = window.mean_WX[start:stop]
        row_BV = mean_BX.clone() if self._head is None else self._head(mean_BX)[:, : self.spec.dimension]
        norm_B = torch.linalg.vector_norm(row_BV, dim=1)
        row_BV = row_BV.div_(norm_B[:, None])
        if self._to_coordinates_DR is None:
            coordinate_BR = row_BV @ self._basis_VR if self._basis_VR is not None else row_BV[:, :0]
        else:
            ones_B1 = torch.ones((len(mean_BX), self._to_coordinates_DR.shape[0] - mean_BX.shape[1]), device=self._device)
            coordinate_BR = torch.cat([mean_BX, ones_B1], dim=1) @ self._to_coordinates_DR / norm_B[:, None]
        return row_BV, coordinate_BR, norm_B


def wide_rows(dimension: int, chunk_rows: int) -> int:
    """Rows of V-wide float32 work done at a time; follows from pinned values, because it decides low bits."""
    return min(chunk_rows, max(8, _WIDE_BLOCK_BYTES // (4 * dimension)))


def streamed_tokens(dimension: int) -> int:
    """Tokens whose logits exist at a time on the streaming path."""
    return max(16, _WIDE_BLOCK_BYTES // 2 // (4 * dimension))


def window_bytes(spec: EmbeddingSpec, width: int, inner_width: int, chunk_rows: int, window_rows: int) -> int:
    """Upper estimate of host memory of one window: activations, pooled means, wide blocks, and the chunk being written.

    Calibrated with VmRSS - RssFile on the CPU (benchmarks/results/); on another device activations live there.
    """
    activations = max(spec.batch_tokens, spec.max_tokens) * (12 * width + 4 * inner_width) * 4 if spec.device == "cpu" else 0
    means = window_rows * (width if spec.head == "affine" else spec.dimension) * 4
    wide = 4 * wide_rows(spec.dimension, chunk_rows) * spec.dimension * 4
    if spec.head != "affine":
        # the logits, the class's own copies while it caps them, and what is added and gathered
        wide += 6 * streamed_tokens(spec.dimension) * spec.dimension * 4
    chunk = chunk_rows * spec.dimension * 2
    coordinates = 2 * window_rows * spec.rank * 4
    return activations + means + wide + 2 * chunk + coordinates + _FIXED_BYTES


_FIXED_BYTES = 48 << 20  # token lists, allocator slack, thread pools


def _coordinate_map(head: AffineHead, basis_VR: NDArray[np.float32], device: torch.device) -> Tensor:
    """(scale Q^T [W | b])^T as float32 [D or D + 1, R]: multiplies (h, 1)."""
    read_block, width = spanning_columns(head, len(basis_VR))
    map_RM = head.scale * project(basis_VR, read_block, width)
    return torch.from_numpy(np.ascontiguousarray(map_RM.T)).float().to(device)


def spanning_columns(head: AffineHead, dimension: int) -> tuple[ReadBlock, int]:
    """Reader of [W | b] by blocks of vocabulary rows, and its width."""
    weight_VD = head.weight_VD[:dimension]
    bias_V = head.bias_V[:dimension] if head.bias_V is not None else None

    def read(start: int, stop: int) -> NDArray[np.floating]:
        block = weight_VD[start:stop].cpu().numpy()
        return block if bias_V is None else np.column_stack([block, bias_V[start:stop].cpu().numpy()])

    return read, weight_VD.shape[1] + (bias_V is not None)


def _failure(has_tokens: bool, norm: float) -> str | None:
    if not has_tokens:
        return "the tokenizer gives no tokens of its own"
    if not np.isfinite(norm):
        return "the model gives a non-finite logit"
    if norm == 0:
        return "the mean logits have zero norm"
    return None
