"""Prompts with the same tokens: in one window they are embedded once, and their mean is copied.

Prompts that are equal up to ``max_tokens`` have the same tokens. In two batches they might get two rows that differ in low
bits; as copies they have the same mean to the bit. A mean that is not finite is copied as well: such prompts fail alike.
Between windows nothing is copied, because windows are computed in any order: the search finds such rows by a digest.

Shapes: W rows of a window, B rows of a batch, T tokens, X what is pooled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.rows import slices
from embstore.model.heads import copied_to
from embstore.model.tokens import TokenRow

Copies = dict[int, list[int]]  # of a row: the later rows with the same tokens, of which the same are pooled

_COPIED_ROWS = 64
_NOTHING = TokenRow(ids_T=np.empty(0, dtype=np.int64), pooled_T=np.empty(0, dtype=np.bool_), was_cut=False)


def without_repeats(rows: Sequence[TokenRow]) -> tuple[list[TokenRow], Copies, NDArray[np.uint64]]:
    """The rows with every repeat of an earlier one replaced by a row that pools nothing; where the repeats were; digests.

    Returns
    -------
    rows, copies, sequence_W
        ``sequence_W``: the first 8 bytes, little endian, of BLAKE2b with 16 bytes over a row's token ids (int64, little
        endian) and one byte for each that is 1 where the token is pooled.
    """
    first_of: dict[bytes, int] = {}
    copies: Copies = {}
    distinct: list[TokenRow] = []
    sequence_W = np.empty(len(rows), dtype=np.uint64)
    for index, row in enumerate(rows):
        content = hashlib.blake2b(row.ids_T.tobytes() + row.pooled_T.tobytes(), digest_size=16).digest()
        sequence_W[index] = int.from_bytes(content[:8], "little")
        first = first_of.setdefault(content, index)
        if first != index:
            copies.setdefault(first, []).append(index)
        distinct.append(row if first == index else _NOTHING)
    return distinct, copies, sequence_W


@torch.inference_mode()
def copy_means(mean_WX: Tensor, rows_B: NDArray[np.int64], copies: Copies) -> None:
    """Give the repeats of these rows the means that the rows have."""
    pairs = np.array([(row, other) for row in rows_B.tolist() for other in copies.get(row, ())], dtype=np.int64)
    for part in slices(0, len(pairs), _COPIED_ROWS):
        row_C, other_C = copied_to(pairs[part].T.copy(), mean_WX.device)
        mean_WX[other_C] = mean_WX[row_C]
