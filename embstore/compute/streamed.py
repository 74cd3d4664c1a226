"""Mean logits of heads that are not affine: logits of a few hundred real tokens at a time.

Shapes: B rows of a batch, T tokens, D model width, V vocabulary, L flat tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embstore.compute.heads import SplitModel

_BLOCK_BYTES = 4 << 20


def streamed_tokens(dimension: int) -> int:
    """Tokens whose logits exist at a time on the streaming path."""
    return max(16, _BLOCK_BYTES // (4 * dimension))


def add_streamed(
    model: SplitModel, hidden_BTD: Tensor, pooled_BT: Tensor, rows_B: Tensor, mean_WV: Tensor, *, columns: int
) -> None:
    """Add mean logits over pooled tokens to rows ``rows_B`` of ``mean_WV``, a few hundred tokens at a time."""
    share_BT = pooled_BT / pooled_BT.sum(dim=1, keepdim=True)
    hidden_LD = hidden_BTD[pooled_BT]
    row_L, share_L = pooled_BT.nonzero()[:, 0], share_BT[pooled_BT]
    step = streamed_tokens(columns)
    for start in range(0, len(hidden_LD), step):
        part = slice(start, start + step)
        logits_LV = model.head(hidden_LD[part])[:, :columns]
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
