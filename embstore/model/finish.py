"""From pooled means to what is stored: unit float16 rows, float32 coordinates and residuals, in one sweep over the columns.

The norm comes from the coordinates, which hold all of a row: |x| = |R h|. So product, scaling, rounding and the rounding's
error are done on one block of columns after the other while it lies in the cache, and no V-wide float32 row ever exists
(measured in docs/performance.md).

Shapes: B rows of a slab, X what was pooled (D or V), D model width, M = D or, with a bias, D + 1, V vocabulary, R
coordinates, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.core.errors import ModelError
from embstore.core.rows import slices
from embstore.core.spec import EmbeddingSpec
from embstore.model.basis import ReadBlock, project
from embstore.model.heads import AffineHead, CappedHead, stays_float32
from embstore.model.packed import packed_product, packed_weight

# A slab and a block of columns: large enough for the product to run at full speed, small enough for a core's cache. Both
# decide low bits. Other slabs and batches keep the other cores busy, so a chunk need not be shared out.
SLAB_ROWS = 320
_BLOCK_COLUMNS = {"cpu": 512, "cuda": 16384}
_UPCAST_BYTES = 64 << 20  # of a block of columns in float32, where the weights are stored in another dtype
_PACKED_ROWS = 64  # slabs are filled up to multiples of it for a packed product: each height makes kernels, which are kept


class Finisher(Protocol):
    """What turns pooled means into rows: one for affine heads, one for states that are rows, one for means of logits."""

    def coordinates(self, mean_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of unit rows float32 [B, R], and the norms float32 [B] the rows had."""

    def unit_blocks(self, mean_BX: Tensor, norm_B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Unit rows float32 [B, C] by blocks of columns; a block is overwritten by the next one."""

    def lost(self, unit_BC: Tensor, half_BC: Tensor, coordinate_BR: Tensor, columns: slice) -> Tensor:
        """What the coordinates do not give of the stored block, float32 [B, C]; may overwrite ``unit_BC``."""


class AffineFinisher:
    """Means of hidden states under an affine head: x = scale * A z with z = (h, 1) and A = [W | b].

    ``map_MR`` float32 makes coordinates of z, as ``basis.coordinate_map`` does. A head of at most 64 MiB is held in float32;
    a larger one stays as it is stored, and each block of columns is upcast when it is used.
    """

    def __init__(self, head: AffineHead, map_MR: NDArray[np.float32], dimension: int, device: torch.device) -> None:
        self._dimension = dimension
        weight_VD = head.weight_VD[:dimension]
        self._weight_VD = weight_VD.float() if stays_float32(head, dimension) else weight_VD
        self._packed: list[Tensor] = []  # the weight by blocks of columns, once it is packed
        self._bias_V = None if head.bias_V is None else head.bias_V[:dimension]
        self._scale = head.scale
        # a copy: it may be a read-only map, which torch refuses to wrap
        self._map_MR = torch.from_numpy(np.array(map_MR)).to(device)
        self._step = _BLOCK_COLUMNS[device.type]
        if self._weight_VD.dtype != torch.float32:
            self._step = max(256, min(self._step, _UPCAST_BYTES // (4 * weight_VD.shape[1])))

    def pack(self) -> None:
        """Have the output layer's weights in oneDNN's layout (``packed.can_pack``), and let the plain ones go."""
        self._packed = [packed_weight(self._weight_VD[columns].float(), SLAB_ROWS) for columns in self._columns()]
        self._weight_VD = torch.empty(0)

    def coordinates(self, mean_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and norms, as ``Finisher.coordinates``."""
        raw_BR = mean_BD @ self._map_MR[: mean_BD.shape[1]]
        if self._bias_V is not None:
            raw_BR += self._map_MR[-1]
        norm_B = torch.linalg.vector_norm(raw_BR, dim=1)
        return raw_BR.div_(norm_B[:, None]), norm_B

    def unit_blocks(self, mean_BD: Tensor, norm_B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Unit rows by blocks of columns, as ``Finisher.unit_blocks``."""
        factor_B = (self._scale / norm_B)[:, None]
        products = self._packed_products if self._packed else self._plain_products
        for columns, unit_BC in products(mean_BD * factor_B):
            yield columns, unit_BC if self._bias_V is None else unit_BC.add_(self._bias_V[columns] * factor_B)

    def lost(self, unit_BC: Tensor, half_BC: Tensor, coordinate_BR: Tensor, columns: slice) -> Tensor:
        """All that a row loses is the rounding, because it lies in the span of the basis."""
        return unit_BC.sub_(half_BC)

    def _plain_products(self, scaled_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        width, device = min(self._step, self._dimension), scaled_BD.device
        buffer_BC = torch.empty((len(scaled_BD), width), device=device)
        is_upcast = self._weight_VD.dtype != torch.float32
        upcast_CD = torch.empty((width, scaled_BD.shape[1]), device=device) if is_upcast else None
        for columns in self._columns():
            weight_CD = self._weight_VD[columns]
            if upcast_CD is not None:
                weight_CD = upcast_CD[: len(weight_CD)].copy_(weight_CD)
            yield columns, torch.mm(scaled_BD, weight_CD.T, out=_part(buffer_BC, columns))

    def _packed_products(self, scaled_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        num_rows = len(scaled_BD)
        filled_BD = nn.functional.pad(scaled_BD, (0, 0, 0, -num_rows % _PACKED_ROWS))
        for columns, weight_CD in zip(self._columns(), self._packed, strict=True):
            yield columns, packed_product(filled_BD, weight_CD)[:num_rows]

    def _columns(self) -> Iterator[slice]:
        return slices(0, self._dimension, self._step)


class StateFinisher:
    """Means of hidden states that are the rows themselves; ``basis_DR`` spans all of them.

    It is the unit matrix, which is not multiplied with. Stores from before December 2026 have a permutation of it.
    """

    def __init__(self, basis_DR: NDArray[np.float32], device: torch.device) -> None:
        is_unit = np.array_equal(basis_DR, np.eye(*basis_DR.shape, dtype=np.float32))
        # a copy: it may be a read-only map
        self._basis_DR = None if is_unit else torch.from_numpy(np.array(basis_DR)).to(device)
        self._step = _BLOCK_COLUMNS[device.type]

    def coordinates(self, mean_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and norms, as ``Finisher.coordinates``."""
        raw_BR = mean_BD.clone() if self._basis_DR is None else mean_BD @ self._basis_DR
        norm_B = torch.linalg.vector_norm(raw_BR, dim=1)
        return raw_BR.div_(norm_B[:, None]), norm_B

    def unit_blocks(self, mean_BD: Tensor, norm_B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Unit rows by blocks of columns, as ``Finisher.unit_blocks``."""
        unit_BD = mean_BD * (1.0 / norm_B)[:, None]
        for columns in slices(0, mean_BD.shape[1], self._step):
            yield columns, unit_BD[:, columns].contiguous()

    def lost(self, unit_BC: Tensor, half_BC: Tensor, coordinate_BR: Tensor, columns: slice) -> Tensor:
        """All that a row loses is the rounding, because it lies in the span of the basis."""
        return unit_BC.sub_(half_BC)


class MeanFinisher:
    """Means of logits; ``basis_VR`` misses some of them, and the residual says how much."""

    def __init__(self, basis_VR: NDArray[np.float32], device: torch.device) -> None:
        self._basis_VR = torch.from_numpy(basis_VR).to(device)
        self._step = _BLOCK_COLUMNS[device.type]

    def coordinates(self, mean_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and norms, as ``Finisher.coordinates``."""
        norm_B = torch.linalg.vector_norm(mean_BV, dim=1)
        return (mean_BV @ self._basis_VR).div_(norm_B[:, None]), norm_B

    def unit_blocks(self, mean_BV: Tensor, norm_B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Unit rows by blocks of columns, as ``Finisher.unit_blocks``."""
        for columns in slices(0, mean_BV.shape[1], self._step):
            yield columns, mean_BV[:, columns] / norm_B[:, None]

    def lost(self, unit_BC: Tensor, half_BC: Tensor, coordinate_BR: Tensor, columns: slice) -> Tensor:
        """What coordinates do not give, as ``Finisher.lost``."""
        return torch.sub(half_BC, coordinate_BR @ self._basis_VR[columns].T, out=unit_BC)


def make_finisher(
    spec: EmbeddingSpec, head: AffineHead | CappedHead | None, basis: NDArray[np.float32], device: torch.device
) -> Finisher:
    """The finisher of a kind of head; ``basis`` is the array that the store has, a map [M, R] or a basis [V, R].

    Raises
    ------
    ModelError
        The map is not one of this output layer.
    """
    if not isinstance(head, AffineHead):
        return MeanFinisher(basis, device) if spec.head.pools_logits else StateFinisher(basis, device)
    read_block, width = spanning_columns(head, spec.dimension)
    if spec.basis == "head":  # stores from before December 2026
        # Q^T x = scale (Q^T A) z; price: one product of the basis with the output layer
        basis = (head.scale * project(basis, read_block, width)).T.float().contiguous().cpu().numpy()
    if len(basis) != width:
        raise ModelError(
            f"the coordinate map is for {len(basis)} inputs, the output layer has {width}",
            hint="continue with the model and the versions of embstore and transformers that began the store",
        )
    return AffineFinisher(head, basis, spec.dimension, device)


def finish(finisher: Finisher, mean_BX: Tensor, out_BV: Tensor, coord_BR: Tensor, residual_B: Tensor) -> NDArray[np.float32]:
    """Fill one slab: ``out_BV`` float16, ``coord_BR`` and ``residual_B`` float32, all in host memory.

    Returns the norms float32 [B] before scaling; where one is not finite or 0, the row is undefined and the caller marks it.
    """
    coordinate_BR, norm_B = finisher.coordinates(mean_BX)
    square_B = torch.zeros_like(norm_B)
    is_here = mean_BX.device.type == "cpu"
    half_BV = out_BV if is_here else torch.empty(out_BV.shape, dtype=torch.float16, device=mean_BX.device)
    for columns, unit_BC in finisher.unit_blocks(mean_BX, norm_B):
        half_BC = half_BV[:, columns].copy_(unit_BC)
        lost_BC = finisher.lost(unit_BC, half_BC, coordinate_BR, columns)
        square_B += torch.linalg.vecdot(lost_BC, lost_BC)
    if not is_here:
        out_BV.copy_(half_BV, non_blocking=True)  # the host's side is pinned where that is possible
    coord_BR.copy_(coordinate_BR)
    residual_B.copy_(square_B.sqrt_())
    # a map of other weights would not notice that these give no number
    norms: NDArray[np.float32] = norm_B.where(square_B.isfinite() | (norm_B == 0), torch.nan).cpu().numpy()
    if mean_BX.device.type == "cuda":
        torch.cuda.current_stream(mean_BX.device).synchronize()  # copies that did not block are over now
    return norms


def slab_bytes(dimension: int, rank: int) -> int:
    """Host memory of one slab in the making, above its inputs and outputs."""
    columns = min(_BLOCK_COLUMNS["cpu"], dimension)
    return 4 * (SLAB_ROWS * (3 * columns + 4 * rank) + columns * rank)  # the last: columns that are upcast


def spanning_columns(head: AffineHead, dimension: int) -> tuple[ReadBlock, int]:
    """Reader of [W | b] by blocks of vocabulary rows, in the dtype that holds both, and its width."""
    weight_VD = head.weight_VD[:dimension]
    bias_V = head.bias_V[:dimension] if head.bias_V is not None else None

    def read(start: int, stop: int) -> Tensor:
        block = weight_VD[start:stop]
        return block if bias_V is None else torch.column_stack([block.float(), bias_V[start:stop]])

    return read, weight_VD.shape[1] + (bias_V is not None)


def _part(buffer_BC: Tensor, columns: slice) -> Tensor:
    """The buffer, or for the last and narrower block a fresh one: ``out=`` wants contiguous memory to be fast."""
    width = columns.stop - columns.start
    return buffer_BC if width == buffer_BC.shape[1] else torch.empty((len(buffer_BC), width), device=buffer_BC.device)
