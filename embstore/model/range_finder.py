"""A basis from a sample of rows, where nothing else is known to span them: capped and streamed heads, imported arrays.

A sample of M rows shows M directions at most. It is doubled until it loses less than float16 does (2.1e-4 of a unit row,
docs/decisions/0005) with half of the directions that it could show; or until there are no more rows, or no more memory.

Shapes: V columns, R coordinates, M sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.host.scratch import map_scratch
from embstore.model.basis import orthonormal_basis

_FIRST_SAMPLE = 1024

# Usable unit rows float32 of a sample of this size, in one or more parts [m, V]; each sample contains the smaller ones.
ReadSample = Callable[[int], list[NDArray[np.float32]]]


def sampled_basis(
    read_sample: ReadSample,
    num_columns: int,
    *,
    limit: int,
    max_rank: int,
    tail: float,
    work: Path,
    device: torch.device,
) -> NDArray[np.float32]:
    """Orthonormal float32 [V, R], R <= ``max_rank``, of a sample of at most ``limit`` rows; a map of a file in ``work``.

    ``tail``: root mean square of what the basis may lose of the sampled rows, where ``max_rank`` directions suffice for it.
    """
    width = min(limit, _FIRST_SAMPLE)
    while True:
        parts = read_sample(width)
        count = sum(len(part_MV) for part_MV in parts)

        def read_block(start: int, stop: int, parts: list[NDArray[np.float32]] = parts) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([part_MV[:, start:stop] for part_MV in parts])).T.to(device)

        # a mapped scratch file: the basis does not count as anonymous memory
        flat = map_scratch(work / "basis.npy", (num_columns * min(max_rank, count),), np.float32)
        basis_VR = orthonormal_basis(read_block, num_columns, count, max_rank=max_rank, tail=tail, scratch=flat)
        rank = basis_VR.shape[1]
        spans_enough = rank < max_rank or rank == num_columns
        if width == limit or (spans_enough and rank <= width // 2):
            return basis_VR
        width = min(limit, 2 * width)
