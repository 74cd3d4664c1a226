"""Coordinates in which rows are tens of times narrower and keep their distances.

Pooled logits of an affine head are in the column span of A = scale * [W | b] (Finlayson et al. 2024, arXiv:2403.09539): a
row is A z with z = (h, 1). Its coordinates are z' F with F F' = A' A, so they have the distances of the rows, and neither a
row nor a V-wide basis is needed to make them. For other heads an orthonormal basis spans a sample of rows (a range finder,
Halko et al. 2011, arXiv:0909.4061), which is better at equal rank than the head's own span. What the coordinates miss and
float16 rounds away is stored as each row's residual r = |x16 - Q c| and bounds every distance: |d - dc| <= ra + rb.
(Rounding is not orthogonal to the basis, so squares do not simply add.)

Map or basis is computed once and stored before row 0, because a factorisation differs in bits between thread counts.

Shapes: V vocabulary, R coordinates, M spanning vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.core.rows import slices

# Directions weaker than this, relative to the strongest, are float32 noise of the weights.
_SINGULAR_TOLERANCE = 1e-6
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of a block in float64
_LEAST_BLOCK_ROWS = 512  # fewer, and a product would spend its time on reading the Gram matrix
_STRIP_COLUMNS = 512  # the Gram matrix is symmetric: only strips on and above its diagonal are computed
# M x M in float64: the Gram matrix, its vectors, and LAPACK's work space (measured: 3.06 above the matrix).
_GRAM_COPIES = 4.1
_PACKED_BLOCKS = 8  # blocks of the least height that MKL packs or keeps, above three of the usual size (measured)

# Rows start <= v < stop of the spanning matrix [V, M], any float dtype, on the device that shall compute.
ReadBlock = Callable[[int, int], Tensor]


def factor_bytes(width: int) -> int:
    """Memory that a factorisation with M = ``width`` takes on a CPU, above its result."""
    packed = _PACKED_BLOCKS * 8 * _LEAST_BLOCK_ROWS * width
    return int(_GRAM_COPIES * 8 * width**2) + packed + 3 * _BLOCK_BYTES["cpu"]


def largest_width(memory_bytes: int) -> int:
    """The largest M, to within a sixteenth, whose ``factor_bytes`` are at most this many; at least 16."""
    width = math.isqrt(memory_bytes // 32)
    while width > 16 and factor_bytes(width) > memory_bytes:
        width = width * 15 // 16
    return max(16, width)


def coordinate_map(read_block: ReadBlock, num_columns: int, width: int, *, scale: float = 1.0) -> NDArray[np.float32]:
    """F float32 [M, R] with F F' = scale^2 A' A: coordinates of the row scale * A z are z' F, strongest directions first.

    Distances of coordinates are those of rows to 1e-16 of the largest, because the Gram matrix and its eigenvectors are
    float64 (in float32 the weak directions of real heads, of 1e-9 of the energy of the strongest, would be noise:
    docs/decisions/0044). Price: V M^2 multiply-adds and ``factor_bytes``.

    Parameters
    ----------
    read_block
        Gives rows of A; called once over.
    num_columns, width
        V and M.
    scale
        Factor of all rows.

    Returns
    -------
    float32 [M, R] with R <= min(V, M).
    """
    values_M, vectors_MM = torch.linalg.eigh(_gram(read_block, num_columns, width), UPLO="U")
    rank = min(num_columns, _num_strong(values_M))
    map_MR = np.empty((width, rank), dtype=np.float32)
    for columns in slices(0, rank, _STRIP_COLUMNS):
        strip = slice(width - columns.stop, width - columns.start)
        factor_MC = (vectors_MM[:, strip] * (scale * values_M[strip].sqrt())).flip(1)
        map_MR[:, columns] = factor_MC.float().cpu().numpy()
    return map_MR


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
    orthogonality of the first step. Memory: ``factor_bytes`` and the result.

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
    values_M, vectors_MM = torch.linalg.eigh(_gram(read_block, num_columns, width), UPLO="U")
    rank = min(max_rank, _num_strong(values_M))
    if tail:
        left = values_M.clamp(min=0).cumsum(0).flip(0)  # energy of each direction and all after it
        rank = min(rank, max(1, int((left > tail**2 * width).sum())))
    mixing_MR = vectors_MM[:, width - rank :].flip(1).div_(values_M[width - rank :].flip(0).sqrt())
    del vectors_MM
    nearly_RR = torch.zeros((rank, rank), dtype=torch.float64, device=mixing_MR.device)
    for _, block in _blocks(read_block, num_columns, width):
        projected = block @ mixing_MR
        nearly_RR.addmm_(projected.T, projected)
    factor_RR = torch.linalg.cholesky(nearly_RR)
    del nearly_RR
    mixing_MR = torch.linalg.solve_triangular(factor_RR.T, mixing_MR, upper=True, left=False)
    flat = np.empty(num_columns * rank, dtype=np.float32) if scratch is None else scratch[: num_columns * rank]
    basis_VR = flat.reshape(num_columns, rank)
    for start, block in _blocks(read_block, num_columns, width):
        basis_VR[start : start + len(block)] = (block @ mixing_MR).cpu().numpy()
    return basis_VR


def project(basis_VR: NDArray[np.float32], read_block: ReadBlock, width: int) -> Tensor:
    """Q^T A, float64 [R, M]: the spanning matrix in coordinates, on the device of its blocks.

    For stores of affine heads from before December 2026, which have a basis and no map.
    """
    num_columns, rank = basis_VR.shape
    device = read_block(0, 0).device
    total_RM = torch.zeros((rank, width), dtype=torch.float64, device=device)
    step = max(256, (16 << 20) // (8 * width))  # as when the store was made: it decides low bits
    for columns in slices(0, num_columns, step):
        block = read_block(columns.start, columns.stop).double()
        # a copy: the basis may be a read-only map, which torch refuses to wrap
        basis_CR = torch.from_numpy(np.array(basis_VR[columns])).to(device)
        total_RM += basis_CR.double().T @ block
    return total_RM


def _gram(read_block: ReadBlock, num_columns: int, width: int) -> Tensor:
    """A' A, float64 [M, M], on and above the diagonal; what is below it is not all filled."""
    gram_MM = torch.zeros((width, width), dtype=torch.float64, device=read_block(0, 0).device)
    for _, block in _blocks(read_block, num_columns, width):
        for strip in slices(0, width, _STRIP_COLUMNS):
            gram_MM[strip, strip.start :].addmm_(block[:, strip].T, block[:, strip.start :])
    return gram_MM


def _num_strong(values_M: Tensor) -> int:
    """How many of these eigenvalues, ascending, are above the noise of float32 weights."""
    return int((values_M > values_M[-1] * _SINGULAR_TOLERANCE**2).sum())


def _blocks(read_block: ReadBlock, num_columns: int, width: int) -> Iterator[tuple[int, Tensor]]:
    device = read_block(0, 0).device
    step = max(_LEAST_BLOCK_ROWS, _BLOCK_BYTES[device.type] // (8 * width))
    for block in slices(0, num_columns, step):
        yield block.start, read_block(block.start, block.stop).double()
