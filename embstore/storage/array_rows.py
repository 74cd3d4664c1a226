"""What the arrays to import share, whatever file they are in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ArrayError
from embstore.core.format import MAX_COLUMNS, MAX_ROWS, canonical_json
from embstore.core.rows import slices

_BLOCK_BYTES = 16 << 20
_FLOATS = {2: "float16", 4: "float32", 8: "float64"}


class ArrayRows:
    """What all kinds of array share: shape, and the digest of all values."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if len(shape) != 2 or not (0 < shape[0] <= MAX_ROWS and 0 < shape[1] <= MAX_COLUMNS):
            raise ArrayError(
                f"{path} has shape {shape}, expected [N, D] with N up to {MAX_ROWS} and D up to {MAX_COLUMNS}",
                hint="save it with two dimensions and one row per prompt",
            )
        if dtype.kind != "f" or dtype.itemsize not in _FLOATS:
            raise ArrayError(
                f"{path} contains {dtype}, expected float16, bfloat16, float32 or float64", hint="save it as one of these"
            )
        self._path = path
        self._row_step = 1
        self.num_rows, self.dimension = shape
        self.dtype = _FLOATS[dtype.itemsize]
        self.held_bytes = 0

    @property
    def name(self) -> str:
        """The name of the file or folder, without its path."""
        return self._path.absolute().name

    def read(self, start: int, stop: int) -> NDArray[np.floating]:
        """Rows ``start <= row < stop``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """As ``GivenRows``; equal for a ``.npy`` file and a Zarr array of equal values, in any byte order."""
        total = hashlib.sha256(canonical_json([self.num_rows, self.dimension, self.dtype]).encode())
        step = max(1, _BLOCK_BYTES // (self.dimension * np.dtype(self.dtype).itemsize))
        step = -(-step // self._row_step) * self._row_step  # whole chunks of a Zarr array
        little = np.dtype(self.dtype).newbyteorder("<")
        for part in slices(0, self.num_rows, step):
            block = self.read(part.start, part.stop)
            total.update(np.ascontiguousarray(block, dtype=little).data.cast("B"))
        return total.hexdigest()
