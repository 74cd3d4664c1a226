"""Row algebra: windows and chunks tile the rows, whatever the sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.core.errors import ConfigError
from embstore.core.plan import plan
from embstore.core.records import replay
from embstore.core.rows import RowGrid, RowRange, chunk_rows_near
from tests.support.records import spec, window_record


@settings(deadline=None, max_examples=60)
@given(num_rows=st.integers(1, 300), chunk_rows=st.integers(1, 40), chunks_a_window=st.integers(1, 5))
def test_windows_and_their_chunks_tile_the_rows_in_order(num_rows: int, chunk_rows: int, chunks_a_window: int) -> None:
    grid = RowGrid(num_rows=num_rows, window_rows=chunk_rows * chunks_a_window, chunk_rows=chunk_rows)
    by_window = [row for window in range(grid.num_windows) for row in range(num_rows)[grid.window(window).as_slice()]]
    assert by_window == list(range(num_rows))
    chunks = [chunk for window in range(grid.num_windows) for chunk in grid.chunks(window)]
    assert [index for index, _ in chunks] == list(range(grid.num_chunks))
    assert [row for _, rows in chunks for row in range(rows.start, rows.stop)] == list(range(num_rows))
    assert all(rows == grid.chunk(index) for index, rows in chunks)
    for window in range(grid.num_windows):
        inside = list(grid.chunks(window))
        assert (inside[0][1].start, inside[-1][1].stop) == (grid.window(window).start, grid.window(window).stop)


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 50), length=st.integers(0, 50), step=st.integers(1, 60))
def test_pieces_of_a_split_are_full_but_for_the_last(start: int, length: int, step: int) -> None:
    pieces = list(RowRange(start, start + length).split(step))
    assert sum(piece.num_rows for piece in pieces) == length
    assert all(piece.num_rows == step for piece in pieces[:-1])
    assert [piece.start for piece in pieces] == list(range(start, start + length, step))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_a_range_that_runs_backwards_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ConfigError, match=f"start {start}, stop {stop}"):
        RowRange(start, stop)


@pytest.mark.parametrize(
    ("num_rows", "window_rows", "chunk_rows"), [(0, 4, 2), (10, 4, 0), (10, 2, 4), (10, 5, 2), (10, -4, -2)]
)
def test_a_grid_that_would_split_a_chunk_is_refused(num_rows: int, window_rows: int, chunk_rows: int) -> None:
    with pytest.raises(ConfigError):
        RowGrid(num_rows=num_rows, window_rows=window_rows, chunk_rows=chunk_rows)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_window_or_chunk_outside_the_grid_is_refused(index: int) -> None:
    grid = RowGrid(num_rows=9, window_rows=3, chunk_rows=3)
    with pytest.raises(ConfigError, match=str(index)):
        grid.window(index)
    with pytest.raises(ConfigError, match=str(index)):
        grid.chunk(index)


@settings(deadline=None, max_examples=60)
@given(
    row_bytes=st.integers(2, 1 << 22),
    target=st.integers(1 << 10, 1 << 26),
    num_rows=st.integers(1, 100_000),
    max_rows=st.integers(16, 5000),
)
def test_chunk_rows_are_a_multiple_of_16_as_near_the_target_as_limits_allow(
    row_bytes: int, target: int, num_rows: int, max_rows: int
) -> None:
    rows = chunk_rows_near(row_bytes, target, num_rows=num_rows, max_rows=max_rows)
    assert rows % 16 == 0
    assert 16 <= rows <= max(16, min(max_rows, num_rows + 15))
    if rows > 16:
        assert rows * row_bytes <= target + 8 * row_bytes


def test_a_plan_holds_the_windows_without_a_commit() -> None:
    pinned = spec(rows=70, window_rows=32, chunk_rows=16)
    assert plan(pinned, replay([])).windows == (0, 1, 2)
    todo = plan(pinned, replay([window_record(1, 32, 64)]))
    assert todo.windows == (0, 2)
    assert todo.remaining_rows == 32 + 6
    done = replay([window_record(0, 0, 32), window_record(1, 32, 64), window_record(2, 64, 70)])
    assert plan(pinned, done).remaining_rows == 0
