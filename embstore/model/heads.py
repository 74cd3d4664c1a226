"""Heads: what makes logits of hidden states, and the mean logits of a prompt where a head is not affine.

For an affine head the mean of the logits is one product with the mean of the states, which ``finish`` does. A capped linear
head needs no class code: product, cap and mean are computed on one block of columns while it lies in the cache. Any other
head runs in its class's own code, a few hundred real tokens at a time.

The weights stay as they are stored, in any float dtype and perhaps mapped from the checkpoint's file. Products are float32,
so a block of columns is upcast when it is used. Which tokens are pooled is known on the host: on a GPU nothing is read back
until a batch is through.

Shapes: B rows of a batch, T tokens, D model width, V vocabulary, L flat tokens, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.core.rows import slices

# Sizes by device: on a CPU a block stays in a core's cache, a GPU wants as much work at once as its memory allows.
_STREAMED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of the logits that exist at a time
_CAPPED_TOKENS = {"cpu": 256, "cuda": 4096}
_CAPPED_COLUMNS = {"cpu": 2048, "cuda": 16384}
_RESIDENT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineHead:
    """``scale * (W h + b)``: ``weight_VD`` of any float dtype, ``bias_V`` float32, both on the model's device."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """Logits float32 [B, V] of float32 states."""
        if self.weight_VD.dtype == torch.float32:
            logits_BV = nn.functional.linear(hidden_BD, self.weight_VD, self.bias_V)
        else:
            logits_BV = torch.empty((len(hidden_BD), len(self.weight_VD)), device=hidden_BD.device)
            for block in slices(0, len(self.weight_VD), _CAPPED_COLUMNS[hidden_BD.device.type]):
                bias_C = None if self.bias_V is None else self.bias_V[block]
                logits_BV[:, block] = nn.functional.linear(hidden_BD, self.weight_VD[block].float(), bias_C)
        return logits_BV if self.scale == 1.0 else logits_BV.mul_(self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedHead:
    """``cap * tanh(linear(h) / cap)``, as in Gemma 2 and NanoChat."""

    linear: AffineHead
    cap: float

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """Logits float32 [B, V], all columns at once: for probes."""
        return torch.tanh_(self.linear(hidden_BD).div_(self.cap)).mul_(self.cap)


def stays_float32(head: AffineHead, dimension: int) -> bool:
    """Whether a float32 copy of the first ``dimension`` columns may stay in memory, and be packed: up to 64 MiB.

    The rule is a constant, because it decides ``packed_head`` in the spec, and with it low bits.
    """
    return 4 * dimension * head.weight_VD.shape[1] <= _RESIDENT_BYTES


def streamed_tokens(dimension: int, device_type: str = "cpu") -> int:
    """Tokens whose logits exist at a time on the streaming path."""
    return max(16, _STREAMED_BYTES[device_type] // (4 * dimension))


def add_streamed(
    logits_of: Callable[[Tensor], Tensor],
    hidden_BTD: Tensor,
    pooled_BT: NDArray[np.bool_],
    rows_B: Tensor,
    mean_WV: Tensor,
    *,
    columns: int,
) -> None:
    """Write mean logits over pooled tokens to rows ``rows_B`` of ``mean_WV``.

    A token without finite logits makes its own row NaN.
    ``logits_of`` gives logits float32 [L, V] of hidden states [L, D]; it is called with a few hundred tokens at a time.
    """
    hidden_LD = _pooled_states(hidden_BTD, pooled_BT)
    step = streamed_tokens(columns, hidden_BTD.device.type)
    parts = list(_token_parts(pooled_BT, 1.0, step, hidden_BTD.device))

    def add(*, has_lost: bool) -> Tensor:
        is_finite = torch.ones((), dtype=torch.bool, device=hidden_BTD.device)
        mean_WV[rows_B] = 0.0
        for part in parts:
            logits_LV = logits_of(hidden_LD[part.tokens])[:, :columns]
            # an indicator product sums each row in a fixed order, also on a GPU, where index_add does not
            part_BV = part.share_BL @ logits_LV
            if has_lost:
                # 0 * NaN is NaN: a token without finite logits must fail its own row only
                lost_L = ~torch.isfinite(logits_LV).all(dim=1)
                part_BV = part.share_BL @ logits_LV.masked_fill(lost_L[:, None], 0.0)
                part_BV.masked_fill_(((part.share_BL != 0) & lost_L).any(dim=1)[:, None], torch.nan)
            is_finite &= torch.isfinite(part_BV).all()
            mean_WV[rows_B[part.rows]] += part_BV  # rows of a batch are distinct: nothing is added twice
        return is_finite

    if not add(has_lost=False):
        add(has_lost=True)


def add_capped(
    head: CappedHead,
    hidden_BTD: Tensor,
    pooled_BT: NDArray[np.bool_],
    rows_B: Tensor,
    mean_WV: Tensor,
    *,
    columns: int,
) -> bool:
    """Write mean capped logits over pooled tokens to rows ``rows_B`` of ``mean_WV``, one block of columns at a time.

    Returns False, with those rows undefined, if any mean is not finite: ``add_streamed`` then finds the token's row.
    """
    linear, cap, device = head.linear, head.cap, hidden_BTD.device
    tokens = _CAPPED_TOKENS[device.type]
    hidden_LD = _pooled_states(hidden_BTD, pooled_BT)
    # mean_t cap * tanh(z_t / cap), as a product with cap / tokens where the token is the row's
    parts = list(_token_parts(pooled_BT, cap, tokens, device))
    buffer_LC = torch.empty((min(tokens, len(hidden_LD)), _CAPPED_COLUMNS[device.type]), device=device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    for block in slices(0, columns, buffer_LC.shape[1]):
        weight_DC = (linear.weight_VD[block].float() * (linear.scale / cap)).T
        bias_C = None if linear.bias_V is None else linear.bias_V[block] * (linear.scale / cap)
        mean_BC = torch.zeros((len(pooled_BT), block.stop - block.start), device=device)
        for part in parts:
            z_LC = buffer_LC[: part.tokens.stop - part.tokens.start, : block.stop - block.start]
            torch.mm(hidden_LD[part.tokens], weight_DC, out=z_LC)
            if bias_C is not None:
                z_LC += bias_C
            mean_BC[part.rows].addmm_(part.share_BL, z_LC.tanh_())
        mean_WV[rows_B, block] = mean_BC
        is_finite &= torch.isfinite(mean_BC).all()
    return bool(is_finite)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TokenPart:
    """Some of a batch's pooled tokens, the rows they belong to, and each token's share in its row's mean, float32 [B, L]."""

    tokens: slice
    rows: slice
    share_BL: Tensor


def _pooled_states(hidden_BTD: Tensor, pooled_BT: NDArray[np.bool_]) -> Tensor:
    """States of the pooled tokens [L, D], row by row."""
    flat_L = copied_to(np.flatnonzero(pooled_BT), hidden_BTD.device)
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, flat_L)


def _token_parts(pooled_BT: NDArray[np.bool_], total: float, step: int, device: torch.device) -> Iterator[_TokenPart]:
    """Parts of at most ``step`` tokens; the shares of a row's tokens have the sum ``total``."""
    row_L = np.nonzero(pooled_BT)[0]
    row_of_L = copied_to(row_L, device)
    share_L = (total / copied_to(pooled_BT.sum(axis=1), device))[row_of_L]
    place_L = torch.arange(step, device=device)
    for tokens in slices(0, len(row_L), step):
        rows = slice(int(row_L[tokens.start]), int(row_L[tokens.stop - 1]) + 1)
        count = tokens.stop - tokens.start
        share_BL = torch.zeros((rows.stop - rows.start, count), device=device)
        share_BL[row_of_L[tokens] - rows.start, place_L[:count]] = share_L[tokens]
        yield _TokenPart(tokens=tokens, rows=rows, share_BL=share_BL)


def copied_to(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy on the device; to a GPU it waits for nothing that the GPU has still to do."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
