"""Row keys: which row of a store a prompt is, by 64 bits of its identity.

Shapes: N rows of the store, B prompts that are looked up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import KeyMismatchError
from embstore.core.prompts import Prompt


def key_of(prompt: Prompt) -> int:
    """The row key of a prompt: the first 64 bits of its identity."""
    return int.from_bytes(prompt.digest[:8], "little")


class StoredKeys:
    """The row keys of a store, uint64 [N], sorted to look others up. Price: one sort."""

    def __init__(self, stored_N: NDArray[np.uint64]) -> None:
        self._order_N = np.argsort(stored_N, kind="stable")
        self._sorted_N = stored_N[self._order_N]

    def rows(self, wanted_B: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Row of each key, int64 [B], -1 where the store has none.

        Raises
        ------
        KeyMismatchError
            A wanted key belongs to two rows: the first 64 bits of their sha256 are equal.
        """
        slot_B = np.searchsorted(self._sorted_N, wanted_B)
        last = len(self._sorted_N) - 1
        is_row_B = self._sorted_N[np.minimum(slot_B, last)] == wanted_B
        is_twice_B = is_row_B & (slot_B < last) & (self._sorted_N[np.minimum(slot_B + 1, last)] == wanted_B)
        if is_twice_B.any():
            key = int(wanted_B[int(np.argmax(is_twice_B))])
            raise KeyMismatchError(
                f"two rows of the store have the key {key:016x}", hint="join by ids: for_dataset(id_column=...)"
            )
        return np.where(is_row_B, self._order_N[np.minimum(slot_B, last)], -1)
