"""Heads: what makes logits of hidden states, and the mean logits of a prompt where a head is not affine.

For an affine head the mean of the logits is one product with the mean of the states, which ``finish`` does. A capped linear
head needs no class code: product, cap and mean are computed on one block of columns while it lies in the cache. Any other
head runs in its class's own code, a few hundred real tokens at a time.

Shapes: B rows of a batch, T tokens, D model width, V vocabulary, L flat tokens, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embstore.core.rows import slices

_BLOCK_BYTES = 4 << 20
_CAPPED_TOKENS, _CAPPED_COLUMNS = 256, 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineHead:
    """``scale * (W h + b)``: ``weight_VD`` and ``bias_V`` float32 on the model's device."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """Logits float32 [B, V]."""
        logits_BV = nn.functional.linear(hidden_BD, self.weight_VD, self.bias_V)
        return logits_BV if self.scale == 1.0 else logits_BV.mul_(self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedHead:
    """``cap * tanh(linear(h) / cap)``, as in Gemma 2 and NanoChat."""

    linear: AffineHead
    cap: float

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """Logits float32 [B, V], all columns at once: for probes."""
        return torch.tanh_(self.linear(hidden_BD).div_(self.cap)).mul_(self.cap)


def streamed_tokens(dimension: int) -> int:
    """Tokens whose logits exist at a time on the streaming path."""
    return max(16, _BLOCK_BYTES // (4 * dimension))


def add_streamed(
    logits_of: Callable[[Tensor], Tensor],
    hidden_BTD: Tensor,
    pooled_BT: Tensor,
    rows_B: Tensor,
    mean_WV: Tensor,
    *,
    columns: int,
) -> None:
    """Add mean logits over pooled tokens to rows ``rows_B`` of ``mean_WV``.

    ``logits_of`` gives logits float32 [L, V] of hidden states [L, D]; it is called with a few hundred tokens at a time.
    """
    share_BT = pooled_BT / pooled_BT.sum(dim=1, keepdim=True)
    hidden_LD = hidden_BTD[pooled_BT]
    row_L, share_L = pooled_BT.nonzero()[:, 0], share_BT[pooled_BT]
    step = streamed_tokens(columns)
    for part in slices(0, len(hidden_LD), step):
        logits_LV = logits_of(hidden_LD[part])[:, :columns]
        first, last = int(row_L[part][0]), int(row_L[part][-1]) + 1
        # an indicator product sums each row in a fixed order, also on a GPU, where index_add does not
        share_BL = torch.zeros((last - first, logits_LV.shape[0]), device=hidden_BTD.device)
        share_BL[row_L[part] - first, torch.arange(logits_LV.shape[0], device=hidden_BTD.device)] = share_L[part]
        part_BV = share_BL @ logits_LV
        if not torch.isfinite(part_BV).all():
            # 0 * NaN is NaN: a token without finite logits must fail its own row only
            lost_L = ~torch.isfinite(logits_LV).all(dim=1)
            part_BV = share_BL @ logits_LV.masked_fill(lost_L[:, None], 0.0)
            part_BV[row_L[part][lost_L] - first] = torch.nan
        mean_WV[rows_B[first:last]] += part_BV  # rows of a batch are distinct: nothing is added twice


def add_capped(
    head: CappedHead, hidden_BTD: Tensor, pooled_BT: Tensor, rows_B: Tensor, mean_WV: Tensor, *, columns: int
) -> bool:
    """Write mean capped logits over pooled tokens to rows ``rows_B`` of ``mean_WV``, one block of columns at a time.

    Returns False, with those rows undefined, if any mean is not finite: ``add_streamed`` then finds the token's row.
    """
    linear, cap, device = head.linear, head.cap, hidden_BTD.device
    hidden_LD = hidden_BTD[pooled_BT]
    row_L = pooled_BT.nonzero()[:, 0]
    # mean_t cap * tanh(z_t / cap), as a product with cap / tokens where the token is the row's
    share_BL = torch.zeros((len(pooled_BT), len(row_L)), device=device)
    share_BL[row_L, torch.arange(len(row_L), device=device)] = (cap / pooled_BT.sum(dim=1))[row_L]
    buffer_LC = torch.empty((_CAPPED_TOKENS, _CAPPED_COLUMNS), device=device)
    is_finite = True
    for block in slices(0, columns, _CAPPED_COLUMNS):
        weight_DC = (linear.weight_VD[block] * (linear.scale / cap)).T
        mean_BC = torch.zeros((len(pooled_BT), block.stop - block.start), device=device)
        for part in slices(0, len(row_L), _CAPPED_TOKENS):
            first, last = int(row_L[part][0]), int(row_L[part][-1]) + 1
            z_LC = buffer_LC[: len(row_L[part]), : block.stop - block.start]
            torch.mm(hidden_LD[part], weight_DC, out=z_LC)
            if linear.bias_V is not None:
                z_LC += linear.bias_V[block] * (linear.scale / cap)
            mean_BC[first:last].addmm_(share_BL[first:last, part], z_LC.tanh_())
        mean_WV[rows_B, block] = mean_BC
        is_finite = is_finite and bool(torch.isfinite(mean_BC).all())
    return is_finite
