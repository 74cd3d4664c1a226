"""``--center``: rows seen from their mean. Another geometry on purpose, not a matter of numerics.

Rows of logits share one direction that carries nearly all of their norm. So distances between them are short, and depend as
much on how far a row leans towards that direction as on what sets it apart. Here every row is replaced by its direction from
the mean row, y = (x - m) / |x - m|, and distances are those between directions (docs/decisions/0033). The search centres
again, as it always does, which changes no distance (docs/decisions/0006).

Shapes: N rows, G distinct vectors, R coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import NOISE_FLOOR
from embstore.core.rows import slices
from embstore.host.scratch import block_rows, map_scratch
from embstore.search.nodes import group_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class CenteredRows:
    """``coord_NR`` float32 [N, R], unit rows in a mapped scratch file; NaN where there is no vector.

    ``stretch``: by how much typical distances, and with them the noise of stored rows, grew: 1 / rms of |x - m|.
    """

    coord_NR: NDArray[np.float32]
    stretch: float


def directions_from_mean(
    coord_NR: NDArray[np.float32],
    failed_N: NDArray[np.bool_],
    work: Path,
    *,
    sequence_N: NDArray[np.uint64] | None = None,
) -> CenteredRows:
    """Directions from the mean of the distinct vectors.

    Parameters
    ----------
    coord_NR
        float32 [N, R] coordinates as stored; may be a memory map. Failed rows are ignored.
    failed_N
        Rows without a vector.
    work
        Scratch folder for the result.
    sequence_N
        As for ``group_rows``.

    Returns
    -------
    CenteredRows
        Rows of one group (``group_rows``) become bit-equal. The mean is that of distinct vectors, so copies move no row. A
        row within the noise floor of the mean has no direction: it becomes the zero vector, at distance 1 from every other.
        An error e of a row is at most 2 e / |x - m| of its direction.

    Notes
    -----
    Price: a hash and two reads of every row, and N * R * 4 bytes of scratch.
    """
    rows_G, node_N = group_rows(coord_NR, failed_N, sequence_N)
    step = block_rows(coord_NR.shape[1])
    blocks = list(slices(0, len(rows_G), step))
    total_R = np.zeros(coord_NR.shape[1])
    for block in blocks:
        total_R += coord_NR[rows_G[block]].sum(axis=0, dtype=np.float64)
    mean_R = total_R / max(1, len(rows_G))
    centered_NR = map_scratch(work / "directions.npy", coord_NR.shape, np.float32)
    square = 0.0
    for block in blocks:
        difference_BR = coord_NR[rows_G[block]].astype(np.float64) - mean_R
        norm_B = np.sqrt(np.square(difference_BR).sum(axis=1))
        square += float(np.square(norm_B).sum())
        scale_B = np.where(norm_B > NOISE_FLOOR, 1.0 / np.maximum(norm_B, NOISE_FLOOR), 0.0)
        centered_NR[rows_G[block]] = difference_BR * scale_B[:, None]
    for block in slices(0, len(coord_NR), step):
        node_B = node_N[block]
        first_B = rows_G[node_B] if len(rows_G) else node_B
        rows_B = np.arange(block.start, block.stop)
        copies = (node_B >= 0) & (first_B != rows_B)
        centered_NR[rows_B[copies]] = centered_NR[first_B[copies]]
        centered_NR[rows_B[node_B < 0]] = np.nan
    rms = np.sqrt(square / max(1, len(rows_G)))
    return CenteredRows(coord_NR=centered_NR, stretch=float(1.0 / max(rms, NOISE_FLOOR)))
