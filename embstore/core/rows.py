"""Row algebra: half-open row ranges, and the grid that cuts rows into windows and chunks.

Pure values, no I/O. A *chunk* is one file of the embedding array; a *window* is a run of chunks that one journal line
commits. A window has a whole number of chunks, so a commit never covers part of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from embstore.core.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class RowRange:
    """Rows ``start <= row < stop``.

    Examples
    --------
    >>> RowRange(4, 10).num_rows
    6
    >>> list(RowRange(0, 5).split(2))
    [RowRange(start=0, stop=2), RowRange(start=2, stop=4), RowRange(start=4, stop=5)]
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ConfigError(f"a row range needs 0 <= start <= stop, got start {self.start}, stop {self.stop}")

    @property
    def num_rows(self) -> int:
        """Number of rows in the range."""
        return self.stop - self.start

    def split(self, rows: int) -> Iterator[RowRange]:
        """Cut the range into consecutive pieces of at most ``rows`` rows."""
        for piece in slices(self.start, self.stop, rows):
            yield RowRange(piece.start, piece.stop)

    def as_slice(self) -> slice:
        """The range as a slice over global rows."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGrid:
    """How ``num_rows`` rows are cut into windows, and windows into chunks.

    Examples
    --------
    >>> grid = RowGrid(num_rows=10, window_rows=4, chunk_rows=2)
    >>> grid.num_windows, grid.num_chunks
    (3, 5)
    >>> grid.window(2)
    RowRange(start=8, stop=10)
    >>> [(chunk, rows.start, rows.stop) for chunk, rows in grid.chunks(1)]
    [(2, 4, 6), (3, 6, 8)]
    """

    num_rows: int
    window_rows: int
    chunk_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.chunk_rows < 1:
            raise ConfigError(f"rows and chunk rows must be positive, got {self.num_rows} and {self.chunk_rows}")
        if self.window_rows < self.chunk_rows or self.window_rows % self.chunk_rows:
            raise ConfigError(f"window rows must be a multiple of chunk rows, got {self.window_rows} and {self.chunk_rows}")

    @property
    def num_windows(self) -> int:
        """Number of windows; the last may be short."""
        return -(-self.num_rows // self.window_rows)

    @property
    def num_chunks(self) -> int:
        """Number of chunk files; the last may have fewer than ``chunk_rows`` rows."""
        return -(-self.num_rows // self.chunk_rows)

    def window(self, index: int) -> RowRange:
        """Rows of window ``index``."""
        if not 0 <= index < self.num_windows:
            raise ConfigError(f"window {index} is outside 0..{self.num_windows - 1}")
        start = index * self.window_rows
        return RowRange(start, min(start + self.window_rows, self.num_rows))

    def chunk(self, index: int) -> RowRange:
        """Rows of chunk ``index``."""
        if not 0 <= index < self.num_chunks:
            raise ConfigError(f"chunk {index} is outside 0..{self.num_chunks - 1}")
        start = index * self.chunk_rows
        return RowRange(start, min(start + self.chunk_rows, self.num_rows))

    def chunks(self, window: int) -> Iterator[tuple[int, RowRange]]:
        """Chunk indices and rows of one window, in row order."""
        rows = self.window(window)
        first = rows.start // self.chunk_rows
        for index in range(first, -(-rows.stop // self.chunk_rows)):
            yield index, self.chunk(index)


_MARGIN_BYTES = 4096  # headers of a compressed frame and of the allocator


def chunk_rows_near(row_bytes: int, target_bytes: int, *, num_rows: int, max_rows: int = 4096) -> int:
    """The largest multiple of 16 rows whose chunk stays below ``target_bytes``, and not more than the array needs.

    16 rows of 50,304 float16 columns are exactly 393 pages, so an uncompressed chunk maps page-aligned. A chunk stays below
    32 MiB because glibc returns larger blocks to the kernel when they are freed, and fresh pages cost more than compression.

    Examples
    --------
    >>> chunk_rows_near(50304 * 2, 32 << 20, num_rows=28000)
    320
    >>> chunk_rows_near(1024, 32 << 20, num_rows=100)
    112
    """
    wanted = (target_bytes - _MARGIN_BYTES) // row_bytes // 16 * 16
    needed = -(-num_rows // 16) * 16
    return max(16, min(wanted, max_rows // 16 * 16, needed))


_WHOLE_ROWS = 256  # a window up to this may be one chunk


def part_of_window(window_rows: int, near: int) -> int:
    """Rows of a chunk, ``near`` or a little less, that divide a window: a multiple of 16 where that is not much smaller.

    Examples
    --------
    >>> part_of_window(4096, 320), part_of_window(1000, 320), part_of_window(127, 16)
    (256, 250, 127)
    """
    parts = [rows for rows in range(1, min(near, window_rows) + 1) if window_rows % rows == 0]
    largest, aligned = parts[-1], max((rows for rows in parts if rows % 16 == 0), default=0)
    if window_rows <= _WHOLE_ROWS and largest < near // 8:
        return window_rows
    return aligned if 2 * aligned >= largest else largest


def divides_well(window_rows: int) -> bool:
    """Whether a window can be divided into chunks of a useful size, however wide its rows turn out to be.

    Examples
    --------
    >>> divides_well(4096), divides_well(1000), divides_well(4099)
    (True, True, False)
    """
    return all(part_of_window(window_rows, near) >= near // 8 for near in range(16, min(window_rows, 4096) + 1, 16))


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` from ``start`` to ``stop``.

    Examples
    --------
    >>> list(slices(0, 5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
