"""Scores of all pairs, tile by tile, and the best C nodes of every row: where an exact search spends its time.

A score is minus half a squared distance, from one matrix product of quantised rows: their half norms ride along in a few
more columns, so a tile contains -|q_i - q_j|^2 / 2 - bias. It serves its rows and, mirrored, its columns.

Scores are negative floats, whose bit patterns compare as integers in reverse: as an integer of the same width the *smallest*
is the nearest node. Minima of integers run at memory speed, where a top-k would cost more than the product. So a tile is cut
into groups, and only a group whose minimum lies below its row's *bar* is looked into. The bar of a row is the score of its
worst candidate, or less: nodes come in random order, so after a third of them the best third of the candidates tells where
the worst one will be in the end. A bar that was set too low leaves its row in doubt, never wrong.

bfloat16 halves the work where the hardware has it. What it loses is bounded: ``Operand.reach`` says how large a score a node
at a given distance can get, by which ``scan`` proves that nothing outside the candidates is nearer.

Shapes. Of a search: G nodes, P columns of the product, Q queries (rows that candidates are kept for), C candidates.
Of a tile: A rows, B columns, M members of a group. H groups of one row: group h, with block, lane = divmod(h, 64), is its
columns (block * M + member) * 64 + lane. V groups of one column: group v is its rows v * M + member.
Of what a tile adds: S groups below the bar (suspects), T scores below the bar (hits), W old candidates and hits of one row.
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

from embstore.core.rows import slices
from embstore.host.scratch import block_rows, map_scratch

# Columns that hold a half norm in parts: three bfloat16 or two float32 carry it to below the product's own rounding.
_NORM_PARTS = {torch.bfloat16: 3, torch.float32: 2}
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
# Relative rounding of one stored score: half a unit in the last of 8 or 24 significant bits.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_GROUPS_A_TILE = 256  # more than any number of candidates, so that group minima give a first threshold
# Columns of a row's group lie this far apart: minima then run over whole vectors, an order of magnitude faster than within
# them. A column that is `lane` beyond a multiple of this is in a group with others of its lane only.
_LANES = 64
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 1024, 4096  # of one matrix product: its result is read back while it is in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """Quantised rows of all nodes, ready for the product, with what quantisation lost.

    ``rows_GP``: [G, P] bfloat16 or float32, on ``device``, which computes, or on the host, from where parts are copied when
    they are used. ``norm_G`` float64, the true norms; ``error_G`` float64, |y - q(y)|.
    ``relative_error``: the largest error over norm. ``rounding``: bound of the product's rounding, per half squared norm.
    """

    rows_GP: Tensor
    device: torch.device
    rank: int
    norm_G: NDArray[np.float64]
    error_G: NDArray[np.float64]
    relative_error: float
    rounding: float
    bias: float

    def left(self, nodes: slice | NDArray[np.int64]) -> Tensor:
        """The other side of the product: [n, P] with signs turned and norms exchanged."""
        rows_GP = self.right(nodes)
        parts, rank = _NORM_PARTS[rows_GP.dtype], self.rank
        left_QP = rows_GP.clone()
        left_QP[:, rank : rank + parts] = -1
        left_QP[:, rank + parts : rank + 2 * parts] = -rows_GP[:, rank : rank + parts]
        left_QP[:, rank + 2 * parts] = -self.bias
        return left_QP

    def right(self, nodes: slice | NDArray[np.int64]) -> Tensor:
        """Rows [n, P] of these nodes on the device that computes."""
        return self.rows_GP[nodes if isinstance(nodes, slice) else torch.from_numpy(nodes)].to(self.device)

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

    ``scratch``: bytes on the host for its rows, when they should not be anonymous memory, or do not fit the device.
    """
    num_nodes, rank = coord_GR.shape
    width, parts = _columns(rank, dtype), _NORM_PARTS[dtype]
    if scratch is None:
        rows_GP = torch.zeros((num_nodes, width), dtype=dtype, device=device)
    else:
        rows_GP = torch.from_numpy(scratch).view(dtype).view(num_nodes, width)
    norm_G, error_G = np.empty(num_nodes), np.empty(num_nodes)
    largest = 0.0
    for block in slices(0, num_nodes, block_rows(rank)):
        block_BR = torch.from_numpy(coord_GR[order_G[block]])
        rounded_BR = block_BR.to(dtype)
        norm_G[block] = torch.linalg.vector_norm(block_BR, dim=1, dtype=torch.float64)
        # the difference is a float32: what rounding takes off
        error_G[block] = torch.linalg.vector_norm(block_BR - rounded_BR.float(), dim=1, dtype=torch.float64)
        rest_B = torch.linalg.vector_norm(rounded_BR, dim=1, dtype=torch.float64).square_() / 2
        largest = max(largest, float(rest_B.max()))
        packed_BP = torch.zeros((len(block_BR), width), dtype=dtype)
        packed_BP[:, :rank] = rounded_BR
        for part in range(parts):
            packed_BP[:, rank + part] = rest_B.to(dtype)
            rest_B -= packed_BP[:, rank + part].double()
        packed_BP[:, rank + parts : rank + 2 * parts + 1] = 1
        rows_GP[block] = packed_BP.to(rows_GP.device)
    # |fl(sum) - sum| <= terms * 2^-24 * sum of magnitudes, and those are at most twice the two half norms
    rounding = 2 * (width + parts) * 2.0**-24
    return Operand(
        rows_GP=rows_GP,
        device=device,
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
        self._members = tile_rows // _GROUPS_A_TILE
        self._bits = _BITS[rows.dtype]
        self._farthest = torch.iinfo(self._bits).max
        shape, device = (len(queries_Q), num_candidates), operand.device
        self._score_QC = torch.full(shape, self._farthest, dtype=self._bits, device=device)
        self._id_QC = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._bar_Q = torch.full(shape[:1], self._farthest, dtype=self._bits, device=device)  # scores below it are kept
        self._locks = [threading.Lock() for _ in range(-(-len(queries_Q) // tile_rows))]
        self._seen = [0 for _ in self._locks]  # how many nodes the rows of a tile have been scored against
        self._own = threading.local()  # each thread's tile: fresh pages cost as much as the product

    def visit(self, rows: slice, nodes: slice, *, mirrored: slice | None = None) -> None:
        """Score ``queries_Q[rows]`` against ``nodes`` (at most a tile each); ``mirrored``: the rows those nodes are, too.

        Of a tile that mirrors itself only the upper triangle is scored, in steps of a product's rows.
        """
        is_diagonal = mirrored == rows
        queries = self.queries_Q[rows]
        num_rows, num_nodes = len(queries), nodes.stop - nodes.start
        tile_AB = self._tile(num_rows, num_nodes)
        minima_AH = torch.empty((num_rows, tile_AB.shape[1] // self._members), dtype=self._bits, device=tile_AB.device)
        minima_VB = torch.empty((tile_AB.shape[0] // self._members, num_nodes), dtype=self._bits, device=tile_AB.device)
        self._score(tile_AB, queries, nodes, minima_AH, minima_VB if mirrored else None, is_diagonal=is_diagonal)
        block = rows.start // self.tile_rows
        with self._locks[block]:
            self._seen[block] += num_nodes
            self._take_from_rows(tile_AB[:num_rows], minima_AH, rows, nodes.start)
        if mirrored:
            block = mirrored.start // self.tile_rows
            with self._locks[block]:
                self._seen[block] += 0 if is_diagonal else num_rows
                self._take_from_columns(tile_AB[:, :num_nodes], minima_VB, mirrored, queries)

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
        """The calling thread's tile, as integers, padded to whole groups in both directions by scores that nothing beats."""
        height, width = _whole(num_rows, self._members), _whole(num_nodes, self._members * _LANES)
        if not hasattr(self._own, "tile") or len(self._own.tile) < height * width:
            self._own.tile = _new_tile(height * width, self._bits, self.operand.device)
        tile_AB: Tensor = self._own.tile[: height * width].view(height, width)
        tile_AB[num_rows:] = self._farthest
        tile_AB[:, num_nodes:] = self._farthest
        return tile_AB

    def _row_groups(self, tile_AB: Tensor) -> Tensor:
        """A view [A, block, M, lane] of whole groups of rows."""
        return tile_AB.view(len(tile_AB), -1, self._members, _LANES)

    def _column_groups(self, tile_AB: Tensor) -> Tensor:
        """A view [V, M, B] of whole groups of columns."""
        return tile_AB.view(-1, self._members, tile_AB.shape[1])

    def _score(
        self,
        tile_AB: Tensor,
        queries: NDArray[np.int64],
        nodes: slice,
        minima_AH: Tensor,
        minima_VB: Tensor | None,
        *,
        is_diagonal: bool,
    ) -> None:
        """Fill a tile, part by part, and take the minima of each part's groups while it is still in the cache.

        ``minima_VB``: None where no row is mirrored. Of a diagonal tile the parts below the diagonal stay as they were.
        """
        score_AB = tile_AB.view(self.operand.rows_GP.dtype)  # the same memory, as floats
        num_rows, num_nodes = len(queries), nodes.stop - nodes.start
        own_row = np.flatnonzero((queries >= nodes.start) & (queries < nodes.stop))
        own_column = queries[own_row] - nodes.start
        for top in range(0, num_rows, _PRODUCT_ROWS):
            bottom = min(top + _PRODUCT_ROWS, num_rows)
            left_AP = self.operand.left(queries[top:bottom])
            # on the diagonal the columns before `top` are rows above, which have met these rows as their columns
            begin = top if is_diagonal else 0
            minima_AH[top:bottom, : begin // self._members] = self._farthest
            for first in range(begin, num_nodes, _PRODUCT_COLUMNS):
                last = min(first + _PRODUCT_COLUMNS, num_nodes)
                right_BP = self.operand.right(slice(nodes.start + first, nodes.start + last))
                torch.mm(left_AP, right_BP.T, out=score_AB[top:bottom, first:last])
                # a row is not its own neighbour: excluded by its number, never as the first that is found
                is_here = (own_row >= top) & (own_row < bottom) & (own_column >= first) & (own_column < last)
                if is_here.any():
                    tile_AB[torch.from_numpy(own_row[is_here]), torch.from_numpy(own_column[is_here])] = self._farthest
                right = tile_AB.shape[1] if last == num_nodes else last  # the last part includes the padding
                minima_AH[top:bottom, first // self._members : right // self._members] = (
                    self._row_groups(tile_AB[top:bottom, first:right]).amin(2).flatten(1)
                )
                if minima_VB is not None:
                    below = tile_AB.shape[0] if bottom == num_rows else bottom
                    minima_VB[top // self._members : below // self._members, first:last] = self._column_groups(
                        tile_AB[top:below, first:last]
                    ).amin(1)
            if minima_VB is not None and is_diagonal:  # pairs of two rows of this part were looked at from both sides
                minima_VB[top // self._members : -(-bottom // self._members), :bottom] = self._farthest

    def _take_from_rows(self, tile_AB: Tensor, minima_AH: Tensor, rows: slice, first_node: int) -> None:
        """Candidates for the rows of a tile from its columns, which are nodes from ``first_node`` on."""
        bar_A = self._bars(rows, minima_AH)
        row_S, group_S = _places(minima_AH < bar_A[:, None])
        block_S, lane_S = group_S // _LANES, group_S % _LANES
        score_SM = self._row_groups(tile_AB)[row_S, block_S, :, lane_S]
        suspect_T, member_T = _places(score_SM < bar_A[row_S][:, None])
        column_T = (block_S[suspect_T] * self._members + member_T) * _LANES + lane_S[suspect_T]
        # suspects ascend by row, so hits do
        self._merge(rows.start, row_S[suspect_T], (column_T + first_node).int(), score_SM[suspect_T, member_T])

    def _take_from_columns(self, tile_AB: Tensor, minima_VB: Tensor, rows: slice, queries: NDArray[np.int64]) -> None:
        """Candidates for the columns of a tile, which are ``rows`` too, from its rows, which are ``queries``."""
        bar_B = self._bars(rows, minima_VB.T)
        group_S, column_S = _places(minima_VB < bar_B)
        score_SM = self._column_groups(tile_AB).permute(0, 2, 1)[group_S, column_S]
        suspect_T, member_T = _places(score_SM < bar_B[column_S][:, None])
        # suspects ascend by group of rows: sorted by column, as ``_merge`` wants them
        column_T, order = column_S[suspect_T].sort(stable=True)
        suspect_T, member_T = suspect_T[order], member_T[order]
        row_T = group_S[suspect_T] * self._members + member_T
        node_A = torch.from_numpy(queries.astype(np.int32)).to(tile_AB.device)
        self._merge(rows.start, column_T, node_A[row_T], score_SM[suspect_T, member_T])

    def _rank(self, first_row: int) -> int:
        """How many of the C nearest should be among the nodes seen so far: their share, and two standard deviations more."""
        num_candidates = self._score_QC.shape[1]
        expected = num_candidates * self._seen[first_row // self.tile_rows] / len(self.operand.rows_GP)
        return min(num_candidates, math.ceil(expected + 2 * math.sqrt(expected)) + 1)

    def _bars(self, rows: slice, minima_AH: Tensor) -> Tensor:
        """The bar of each row; where none is set yet, the minima of its groups in this tile set a first one."""
        bar_A, rank = self._bar_Q[rows], self._rank(rows.start)
        if minima_AH.shape[1] < rank or int(bar_A.max()) < self._farthest:
            return bar_A
        if 16 * rank <= minima_AH.shape[1]:  # few of the smallest share a group even of four times the size
            minima_AH = minima_AH.view(len(minima_AH), 4, -1).amin(1)
        smallest_A = _smallest(minima_AH, rank)
        # at least ``rank`` scores are at most this, so a score above it need not be kept; one that equals it is
        bar_A = torch.minimum(bar_A, torch.where(smallest_A < self._farthest, smallest_A + 1, smallest_A))
        self._bar_Q[rows] = bar_A
        return bar_A

    def _merge(self, first_row: int, row_T: Tensor, node_T: Tensor, score_T: Tensor) -> None:
        """Put hits, ascending by row, among the candidates of their rows, keep the best C, and lower the bars."""
        if not len(row_T):
            return
        # only rows with hits are touched; hits of row i go behind its old candidates in row i of a table
        row_A, place_T, count_A = torch.unique_consecutive(row_T, return_inverse=True, return_counts=True)
        num_candidates = self._score_QC.shape[1]
        width = num_candidates + int(count_A.max())
        first_A = count_A.cumsum(0) - count_A
        flat_T = place_T * width + num_candidates + torch.arange(len(row_T), device=row_T.device) - first_A[place_T]
        row_A += first_row
        score_AW = torch.full((len(row_A), width), self._farthest, dtype=self._bits, device=row_T.device)
        id_AW = torch.full((len(row_A), width), -1, dtype=torch.int32, device=row_T.device)
        score_AW[:, :num_candidates], id_AW[:, :num_candidates] = self._score_QC[row_A], self._id_QC[row_A]
        score_AW.view(-1)[flat_T], id_AW.view(-1)[flat_T] = score_T, node_T
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


def _places(is_set_XY: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true values of a matrix, row by row."""
    if is_set_XY.device.type == "cpu":  # numpy finds them in half of the time
        place_T = torch.from_numpy(np.flatnonzero(is_set_XY.numpy()))
        return place_T // is_set_XY.shape[1], place_T % is_set_XY.shape[1]
    row_T, column_T = is_set_XY.nonzero(as_tuple=True)
    return row_T, column_T


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
