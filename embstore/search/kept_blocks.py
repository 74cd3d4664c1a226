"""Whether a block that an earlier run kept can be one of this search.

Its checksum says that it is what was saved. It does not say that it was saved by a search of these nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def has_layout(block: Mapping[str, NDArray[Any]] | None, layout: Layout, num_nodes: int) -> bool:
    """Whether a block has exactly these arrays, by name: dtype and shape; and ``ids`` below ``num_nodes``.

    Examples
    --------
    >>> import numpy as np
    >>> block = {"ids": np.array([[3, 1]], dtype=np.int32)}
    >>> [has_layout(block, {"ids": ("<i4", (1, 2))}, num_nodes) for num_nodes in (4, 3)]
    [True, False]
    """
    if block is None or {name: (array.dtype.str, array.shape) for name, array in block.items()} != dict(layout):
        return False
    return bool(block["ids"].max(initial=-1) < num_nodes)
