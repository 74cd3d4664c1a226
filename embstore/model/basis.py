"""An orthonormal basis in which rows are tens of times narrower and keep their distances.

Pooled logits of an affine head are in the column span of [W | b] (Finlayson et al. 2024, arXiv:2403.09539), so R <= d_model
+ 1 coordinates represent them exactly. For other heads the basis spans a sample of rows (a range finder, Halko et al. 2011,
arXiv:0909.4061), which is better at equal rank than the head's own basis. What the basis misses and float16 rounds away is
stored as each row's residual r = |x16 - Q c| and bounds every distance: |d - dc| <= ra + rb. (Rounding is not orthogonal to
the basis, so squares do not simply add.)

The basis is computed once and stored before row 0, because a factorisation differs in bits between thread counts.

Shapes: V vocabulary, R coordinates, M spanning vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.rows import slices

# Directions weaker than this, relative to the strongest, are float32 noise of the weights.
_SINGULAR_TOLERANCE = 1e-6
_BLOCK_BYTES = 16 << 20

# Rows start <= v < stop of the spanning matrix [V, M], any float dtype, on the device that shall compute.
ReadBlock = Callable[[int, int], Tensor]


def orthonormal_basis(
    read_block: ReadBlock,
    num_columns: int,
    width: int,
    *,
    max_rank: int,
    tail: float = 0.0,
    scratch: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Orthonormal basis of the columns of a tall matrix [V, M], strongest directions first.

    Eigenvectors of the Gram matrix in float64, then one Cholesky correction, which squares away the loss of
    orthogonality of the first step. Memory: M^2 float64, one block, and the result.

    Parameters
    ----------
    read_block
        Gives rows of the matrix; called three times over.
    num_columns, width
        V and M.
    max_rank
        Keep at most this many directions.
    tail
        Keep no more than it takes for what the others hold to have this root mean square over the M columns.
    scratch
        Flat memory for the result, at least V * min(M, max_rank) long, when it should not be anonymous.

    Returns
    -------
    float32 [V, R] with R <= min(M, max_rank); |Q^T Q - 1| is at float32 rounding.
    """
    device = read_block(0, 0).device
    gram_MM = torch.zeros((width, width), dtype=torch.float64, device=device)
    for _, block in _blocks(read_block, num_columns, width):
        gram_MM += block.T @ block
    values_M, vectors_MM = torch.linalg.eigh(gram_MM)
    strongest = values_M.flip(0)
    rank = min(max_rank, int((strongest > strongest[0] * _SINGULAR_TOLERANCE**2).sum()))
    if tail:
        left = strongest.clamp(min=0).flip(0).cumsum(0).flip(0)  # energy of each direction and all after it
        rank = min(rank, max(1, int((left > tail**2 * width).sum())))
    mixing_MR = vectors_MM.flip(1)[:, :rank] / strongest[:rank].sqrt()
    nearly_RR = torch.zeros((rank, rank), dtype=torch.float64, device=device)
    for _, block in _blocks(read_block, num_columns, width):
        projected = block @ mixing_MR
        nearly_RR += projected.T @ projected
    mixing_MR = mixing_MR @ torch.linalg.inv(torch.linalg.cholesky(nearly_RR)).T
    flat = np.empty(num_columns * rank, dtype=np.float32) if scratch is None else scratch[: num_columns * rank]
    basis_VR = flat.reshape(num_columns, rank)
    for start, block in _blocks(read_block, num_columns, width):
        basis_VR[start : start + len(block)] = (block @ mixing_MR).cpu().numpy()
    return basis_VR


def project(basis_VR: NDArray[np.float32], read_block: ReadBlock, width: int) -> Tensor:
    """Q^T A, float64 [R, M]: the spanning matrix in coordinates, on the device of its blocks."""
    num_columns, rank = basis_VR.shape
    device = read_block(0, 0).device
    total_RM = torch.zeros((rank, width), dtype=torch.float64, device=device)
    for start, block in _blocks(read_block, num_columns, width):
        # a copy: the basis may be a read-only map, which torch refuses to wrap
        basis_CR = torch.from_numpy(np.array(basis_VR[start : start + len(block)])).to(device)
        total_RM += basis_CR.double().T @ block
    return total_RM


def _blocks(read_block: ReadBlock, num_columns: int, width: int) -> Iterator[tuple[int, Tensor]]:
    step = max(256, _BLOCK_BYTES // (8 * width))
    for block in slices(0, num_columns, step):
        yield block.start, read_block(block.start, block.stop).double()
