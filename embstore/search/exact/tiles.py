"""Scores of all pairs, tile by tile, and the best C nodes of every row: where an exact search spends its time.

A score is minus half a squared distance, made by one matrix product of quantised rows: their half norms ride along as a few
more columns, so a tile holds -|q_i - q_j|^2 / 2 - bias and serves its rows and, mirrored, its columns. All scores are
negative; read as integers of the same width the *smallest* is then the nearest, and minima of integers run at memory speed
where a top-k would cost more than the product. Only groups of scores whose minimum beats a row's bar are looked into. The
bar is the score of its worst candidate, or less: after a third of the nodes, in random order, the best third of the
candidates tells where it will be in the end, and nothing above need be kept. A bar that was set too low leaves its row in
doubt, never wrong.

bfloat16 halves the work where the hardware has it. What it loses is bounded, not hoped for: ``Operand.reach`` says how large
a score a node at a given distance can get, so ``allpairs`` proves that nothing outside the candidates was nearer.

Shapes: G nodes, Q rows that candidates are kept for, C candidates, R coordinates, P columns of the product.
"""

from __future__ import annotations

import math
import mmap
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.host.scratch import block_rows, map_scratch

# Columns that hold a half norm in parts: three bfloat16 or two float32 carry it to below the product's own rounding.
_NORM_PARTS = {torch.bfloat16: 3, torch.float32: 2}
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
# Relative rounding of one stored score: half a unit in the last of 8 or 24 significant bits.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_GROUPS_A_TILE = 256  # more than any number of candidates, so that group minima give a first threshold
# Columns of a group lie this far apart: minima then run over whole vectors, an order of magnitude faster than within them.
_STRIDE = 64
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 1024, 4096  # of one matrix product: its result is read back while it is in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """Quantised rows of all nodes, ready for the product, with what quantisation lost.

    ``rows_GP``: [G, P] bfloat16 or float32. ``norm_G`` float64, the true norms; ``error_G`` float64, |y - q(y)|.
    ``relative_error``: the largest error over norm. ``rounding``: bound of the product's rounding, per half squared norm.
    """

    rows_GP: Tensor
    rank: int
    norm_G: NDArray[np.float64]
    error_G: NDArray[np.float64]
    relative_error: float
    rounding: float
    bias: float

    def left(self, nodes: slice | NDArray[np.int64]) -> Tensor:
        """The other side of the product: [n, P] with signs turned and norms exchanged."""
        rows_GP = self.rows_GP[nodes if isinstance(nodes, slice) else torch.from_numpy(nodes)]
        parts, rank = _NORM_PARTS[rows_GP.dtype], self.rank
        left_QP = rows_GP.clone()
        left_QP[:, rank : rank + parts] = -1
        left_QP[:, rank + parts : rank + 2 * parts] = -rows_GP[:, rank : rank + parts]
        left_QP[:, rank + 2 * parts] = -self.bias
        return left_QP

    def reach(self, nodes: NDArray[np.integer], distance_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest magnitude a score of row ``nodes[i]`` can have with a node at most ``distance_Q[i]`` away.

        A node kept out scored at least as much as the worst one kept; where that is above this, it lies farther away. From
        the triangle inequality over both quantisation errors and the standard bound of a sum's rounding (Higham 2002, 3.1).
        """
        own, error = self.norm_G[nodes], self.error_G[nodes]
        other = own + distance_Q
        squared = np.square(distance_Q + error + self.relative_error * other)
        half_norms = np.square((1 + self.relative_error) * own) / 2 + np.square((1 + self.relative_error) * other) / 2
        exact = squared / 2 + self.bias + self.rounding * (half_norms + self.bias)
        return np.asarray(exact * (1 + _ROUNDING[self.rows_GP.dtype]))


def operand_bytes(num_nodes: int, rank: int, dtype: torch.dtype) -> int:
    """Size of an operand on disk or in memory."""
    return num_nodes * _columns(rank, dtype) * dtype.itemsize


def quantise(
    coord_GR: NDArray[np.float32],
    order_G: NDArray[np.int64],
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: NDArray[np.uint8] | None = None,
) -> Operand:
    """Operand of centred coordinates float32 [G, R], row i of it being node ``order_G[i]``.

    ``scratch``: bytes for its rows, when they should not be anonymous memory.
    """
    num_nodes, rank = coord_GR.shape
    width, parts = _columns(rank, dtype), _NORM_PARTS[dtype]
    if scratch is None:
        rows_GP = torch.zeros((num_nodes, width), dtype=dtype, device=device)
    else:
        rows_GP = torch.from_numpy(scratch).view(dtype).view(num_nodes, width)
    norm_G, error_G = np.empty(num_nodes), np.empty(num_nodes)
    largest = 0.0
    step = block_rows(rank)
    for start in range(0, num_nodes, step):
        block_BR = torch.from_numpy(coord_GR[order_G[start : start + step]])
        stop = start + len(block_BR)
        rounded_BR = block_BR.to(dtype)
        norm_G[start:stop] = torch.linalg.vector_norm(block_BR, dim=1, dtype=torch.float64)
        # the difference is a float32: what rounding takes off
        error_G[start:stop] = torch.linalg.vector_norm(block_BR - rounded_BR.float(), dim=1, dtype=torch.float64)
        rest_B = torch.linalg.vector_norm(rounded_BR, dim=1, dtype=torch.float64).square_() / 2
        largest = max(largest, float(rest_B.max()))
        packed_BP = torch.zeros((len(block_BR), width), dtype=dtype)
        packed_BP[:, :rank] = rounded_BR
        for part in range(parts):
            packed_BP[:, rank + part] = rest_B.to(dtype)
            rest_B -= packed_BP[:, rank + part].double()
        packed_BP[:, rank + parts : rank + 2 * parts + 1] = 1
        rows_GP[start:stop] = packed_BP.to(rows_GP.device)
    # |fl(sum) - sum| <= terms * 2^-24 * sum of magnitudes, and those are at most twice the two half norms
    rounding = 2 * (width + parts) * 2.0**-24
    return Operand(
        rows_GP=rows_GP,
        rank=rank,
        norm_G=norm_G,
        error_G=error_G,
        # never 0, which times +inf would be no number
        relative_error=float(np.max(error_G / np.maximum(norm_G, np.finfo(np.float32).tiny), initial=2.0**-30)),
        rounding=rounding,
        # a power of two, exact in every dtype, above twice what rounding can add to a score of 0
        bias=float(2.0 ** np.ceil(np.log2(max(4 * rounding * largest, 2.0**-100)))),
    )


class TileScan:
    """The best ``num_candidates`` nodes of some rows, improved tile by tile; tiles may come in any order, from any thread.

    Parameters
    ----------
    operand
        All nodes.
    queries_Q
        Nodes to keep candidates for, int64.
    num_candidates
        C, at most 256.
    tile_rows
        Rows and columns of a tile; a multiple of 256.
    """

    def __init__(self, operand: Operand, queries_Q: NDArray[np.int64], num_candidates: int, tile_rows: int) -> None:
        rows = operand.rows_GP
        self.operand = operand
        self.queries_Q = queries_Q
        self.tile_rows = tile_rows
        self._group = tile_rows // _GROUPS_A_TILE
        self._bits = _BITS[rows.dtype]
        self._farthest = torch.iinfo(self._bits).max
        shape, device = (len(queries_Q), num_candidates), rows.device
        self._score_QC = torch.full(shape, self._farthest, dtype=self._bits, device=device)
        self._id_QC = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._bar_Q = torch.full(shape[:1], self._farthest, dtype=self._bits, device=device)  # scores below it are kept
        self._locks = [threading.Lock() for _ in range(-(-len(queries_Q) // tile_rows))]
        self._seen = [0 for _ in self._locks]  # nodes that the rows of a tile have met
        self._own = threading.local()  # each thread's tile: fresh pages cost as much as the product

    def visit(self, rows: slice, nodes: slice, *, mirrored: slice | None = None) -> None:
        """Score ``queries_Q[rows]`` against ``nodes`` (at most a tile each); ``mirrored``: the rows those nodes are, too.

        Of a tile that mirrors itself only the upper triangle is scored, in steps of a product's rows.
        """
        is_diagonal = mirrored == rows
        queries = self.queries_Q[rows]
        num_rows, num_nodes = len(queries), nodes.stop - nodes.start
        tile_AB = self._tile(num_rows, num_nodes)
        # minima of groups along a row; and, for the mirror, down a column
        minima_AH = torch.empty((num_rows, tile_AB.shape[1] // self._group), dtype=self._bits, device=tile_AB.device)
        minima_HB = torch.empty((tile_AB.shape[0] // self._group, num_nodes), dtype=self._bits, device=tile_AB.device)
        self._product(tile_AB, queries, nodes, minima_AH, minima_HB if mirrored else None, is_diagonal=is_diagonal)
        block = rows.start // self.tile_rows
        with self._locks[block]:
            self._seen[block] += num_nodes
            self._absorb_rows(tile_AB[:num_rows], minima_AH, rows, nodes.start)
        if mirrored:
            block = mirrored.start // self.tile_rows
            with self._locks[block]:
                self._seen[block] += 0 if is_diagonal else num_rows
                self._absorb_columns(tile_AB[:, :num_nodes], minima_HB, mirrored, queries)

    def best(self, rows: slice) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
        """Candidates of ``queries_Q[rows]``, best first: int32 [n, C] nodes, -1 none; float64 [n, C] magnitudes of scores.

        The third, float64 [n]: what is not among a row's candidates has a score of at least this; +inf: there is nothing.
        """
        score_QC, order = self._score_QC[rows].sort(dim=1)
        id_QC = self._id_QC[rows].gather(1, order).cpu().numpy()
        magnitude_QC = score_QC.view(self.operand.rows_GP.dtype).double().abs_().cpu().numpy()
        bar_Q = self._bar_Q[rows]
        left_out_Q = bar_Q.view(self.operand.rows_GP.dtype).double().abs_().cpu().numpy()
        left_out_Q[(bar_Q == self._farthest).cpu().numpy()] = np.inf
        return id_QC, np.where(id_QC >= 0, magnitude_QC, np.inf), left_out_Q

    def _tile(self, num_rows: int, num_nodes: int) -> Tensor:
        """A tile of the calling thread, as bits, whole groups in both directions; what pads it scores farthest."""
        height, width = _whole(num_rows, self._group), _whole(num_nodes, self._group * _STRIDE)
        if not hasattr(self._own, "tile") or len(self._own.tile) < height * width:
            self._own.tile = _new_tile(height * width, self._bits, self.operand.rows_GP.device)
        tile_AB: Tensor = self._own.tile[: height * width].view(height, width)
        tile_AB[num_rows:] = self._farthest
        tile_AB[:, num_nodes:] = self._farthest
        return tile_AB

    def _product(
        self,
        tile_AB: Tensor,
        queries: NDArray[np.int64],
        nodes: slice,
        minima_AH: Tensor,
        minima_HB: Tensor | None,
        *,
        is_diagonal: bool,
    ) -> None:
        score_AB = tile_AB.view(self.operand.rows_GP.dtype)
        num_rows, num_nodes = len(queries), nodes.stop - nodes.start
        own = np.flatnonzero((queries >= nodes.start) & (queries < nodes.stop))
        for top in range(0, num_rows, _PRODUCT_ROWS):
            bottom = min(top + _PRODUCT_ROWS, num_rows)
            left_AP = self.operand.left(queries[top:bottom])
            inside = own[(own >= top) & (own < bottom)]
            begin = top if is_diagonal else 0
            minima_AH[top:bottom, : begin // self._group] = self._farthest
            for first in range(begin, num_nodes, _PRODUCT_COLUMNS):
                last = min(first + _PRODUCT_COLUMNS, num_nodes)
                right_BP = self.operand.rows_GP[nodes.start + first : nodes.start + last]
                torch.mm(left_AP, right_BP.T, out=score_AB[top:bottom, first:last])
                if len(inside):  # self is excluded by index, never by position
                    columns = queries[inside] - nodes.start
                    here = (columns >= first) & (columns < last)
                    tile_AB[torch.from_numpy(inside[here]), torch.from_numpy(columns[here])] = self._farthest
                edge = tile_AB.shape[1] if last == num_nodes else last
                groups = tile_AB[top:bottom, first:edge].view(bottom - top, -1, self._group, _STRIDE)
                minima_AH[top:bottom, first // self._group : edge // self._group] = groups.amin(2).flatten(1)
                if minima_HB is not None:
                    edge = tile_AB.shape[0] if bottom == num_rows else bottom
                    groups = tile_AB[top:edge, first:last].view(-1, self._group, last - first)
                    minima_HB[top // self._group : edge // self._group, first:last] = groups.amin(1)
            if minima_HB is not None and is_diagonal:  # these pairs were met as rows
                minima_HB[top // self._group : -(-bottom // self._group), :bottom] = self._farthest

    def _absorb_rows(self, tile_AB: Tensor, minima_AH: Tensor, rows: slice, first_node: int) -> None:
        bar_A = self._lowered(rows, minima_AH)
        row_P, group_P = _places(minima_AH < bar_A[:, None])
        block_P, column_P = group_P // _STRIDE, group_P % _STRIDE
        score_PG = tile_AB.view(len(tile_AB), -1, self._group, _STRIDE)[row_P, block_P, :, column_P]
        pair_H, place_H = _places(score_PG < bar_A[row_P][:, None])
        node_H = (block_P[pair_H] * self._group + place_H) * _STRIDE + column_P[pair_H] + first_node
        self._merge(rows.start, row_P[pair_H], node_H.int(), score_PG[pair_H, place_H])

    def _absorb_columns(self, tile_AB: Tensor, minima_HB: Tensor, rows: slice, queries: NDArray[np.int64]) -> None:
        bar_B = self._lowered(rows, minima_HB.T)
        group_P, column_P = _places(minima_HB < bar_B)
        score_PG = tile_AB.view(-1, self._group, tile_AB.shape[1]).permute(0, 2, 1)[group_P, column_P]
        pair_H, place_H = _places(score_PG < bar_B[column_P][:, None])
        column_H, order = column_P[pair_H].sort(stable=True)
        pair_H, place_H = pair_H[order], place_H[order]
        node_Q = torch.from_numpy(queries.astype(np.int32)).to(tile_AB.device)
        self._merge(rows.start, column_H, node_Q[group_P[pair_H] * self._group + place_H], score_PG[pair_H, place_H])

    def _rank(self, first_row: int) -> int:
        """How many of the C nearest should be among the nodes met so far: their share, and twice its deviation more."""
        num_candidates = self._score_QC.shape[1]
        expected = num_candidates * self._seen[first_row // self.tile_rows] / len(self.operand.rows_GP)
        return min(num_candidates, math.ceil(expected + 2 * math.sqrt(expected)) + 1)

    def _lowered(self, rows: slice, minima_AH: Tensor) -> Tensor:
        """The bar of each row; where none is set yet, groups' minima set a first one."""
        bar_A, rank = self._bar_Q[rows], self._rank(rows.start)
        if minima_AH.shape[1] < rank or int(bar_A.max()) < self._farthest:
            return bar_A
        if 16 * rank <= minima_AH.shape[1]:  # few of the smallest share a group even of four times the size
            minima_AH = minima_AH.view(len(minima_AH), 4, -1).amin(1)
        smallest = _smallest(minima_AH, rank)
        bar_A = torch.minimum(bar_A, torch.where(smallest < self._farthest, smallest + 1, smallest))
        self._bar_Q[rows] = bar_A
        return bar_A

    def _merge(self, first_row: int, row_H: Tensor, node_H: Tensor, score_H: Tensor) -> None:
        """Take hits, ascending by row, into the candidates of their rows."""
        if not len(row_H):
            return
        row_A, place_H, count_A = torch.unique_consecutive(row_H, return_inverse=True, return_counts=True)
        num_candidates = self._score_QC.shape[1]
        width = num_candidates + int(count_A.max())
        first_A = count_A.cumsum(0) - count_A
        flat_H = place_H * width + num_candidates + torch.arange(len(row_H), device=row_H.device) - first_A[place_H]
        row_A += first_row
        score_AW = torch.full((len(row_A), width), self._farthest, dtype=self._bits, device=row_H.device)
        id_AW = torch.full((len(row_A), width), -1, dtype=torch.int32, device=row_H.device)
        score_AW[:, :num_candidates], id_AW[:, :num_candidates] = self._score_QC[row_A], self._id_QC[row_A]
        score_AW.view(-1)[flat_H], id_AW.view(-1)[flat_H] = score_H, node_H
        kept = score_AW.topk(num_candidates, dim=1, largest=False, sorted=False)
        self._score_QC[row_A], self._id_QC[row_A] = kept.values, id_AW.gather(1, kept.indices)
        bar_A = _smallest(kept.values, self._rank(first_row))
        self._bar_Q[row_A] = torch.minimum(self._bar_Q[row_A], bar_A)


def _new_tile(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``size`` values; on a CPU in large pages where the kernel has them: it hands them out faster than 8,192 small ones."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # not Linux; a kernel without them
        return torch.empty(size, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype)


def _places(is_hit_AB: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is set, ascending."""
    if is_hit_AB.device.type == "cpu":  # numpy finds them in half of the time
        place_H = torch.from_numpy(np.flatnonzero(is_hit_AB.numpy()))
        return place_H // is_hit_AB.shape[1], place_H % is_hit_AB.shape[1]
    rows_H, columns_H = is_hit_AB.nonzero(as_tuple=True)
    return rows_H, columns_H


def _smallest(values_AC: Tensor, rank: int) -> Tensor:
    """The ``rank``-th smallest value of each row."""
    return values_AC.topk(rank, dim=1, largest=False, sorted=False).values.amax(dim=1)


def state_bytes(num_rows: int, num_candidates: int, dtype: torch.dtype) -> int:
    """Memory of the candidates of ``num_rows`` rows."""
    return num_rows * (num_candidates * (dtype.itemsize + 4) + dtype.itemsize)


def tile_bytes(tile_rows: int, dtype: torch.dtype) -> int:
    """Memory of one thread's tile and of what is done with it (16 KiB a row, measured)."""
    return tile_rows * tile_rows * dtype.itemsize + tile_rows * (16 << 10)


def _columns(rank: int, dtype: torch.dtype) -> int:
    """Columns of the product: coordinates, both half norms in parts, the bias, and zeros up to a multiple of 8."""
    return -(-(rank + 2 * _NORM_PARTS[dtype] + 1) // 8) * 8


def _whole(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def map_operand(path: Path, num_nodes: int, rank: int, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Bytes for the rows of an operand in a new file: pages that the kernel may drop."""
    return map_scratch(path, (operand_bytes(num_nodes, rank, dtype),), np.uint8)
