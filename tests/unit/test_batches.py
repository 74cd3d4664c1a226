"""Batches: every usable row once, at most so many padded tokens, longest first, little padding."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.model.batches import TokenBatch, batches_by_length, few_lengths, padded_batch
from embstore.model.tokens import TokenRow

PAD = 999


def token_row(length: int, pooled: int, *, row: int) -> TokenRow:
    """A row whose tokens tell where they came from; the last ``pooled`` are its own."""
    own_T = np.arange(length) >= length - pooled
    return TokenRow(ids_T=1000 * (row + 1) + np.arange(length), pooled_T=own_T, was_cut=False)


@st.composite
def windows(draw: st.DrawFn) -> list[TokenRow]:
    lengths = draw(st.lists(st.integers(0, 40), max_size=60))
    return [token_row(length, draw(st.integers(0, length)), row=row) for row, length in enumerate(lengths)]


def batches_of(rows: list[TokenRow], batch_tokens: int) -> list[TokenBatch]:
    return [padded_batch(rows, *batch, pad_id=PAD) for batch in batches_by_length(rows, batch_tokens=batch_tokens)]


@settings(max_examples=60, deadline=None)
@given(rows=windows(), batch_tokens=st.integers(1, 200))
def test_every_usable_row_is_in_exactly_one_batch_with_its_own_tokens(rows: list[TokenRow], batch_tokens: int) -> None:
    seen: list[int] = []
    for batch in batches_of(rows, batch_tokens):
        for position, row in enumerate(batch.rows_B):
            seen.append(int(row))
            real_T = batch.real_BT[position]
            length = len(rows[row].ids_T)
            assert real_T[:length].all()  # padding is on the right
            assert not real_T[length:].any()
            assert np.array_equal(batch.tokens_BT[position, :length], rows[row].ids_T)
            assert (batch.tokens_BT[position, length:] == PAD).all()
            assert np.array_equal(batch.pooled_BT[position, :length], rows[row].pooled_T)
            assert not batch.pooled_BT[position, length:].any()
    assert sorted(seen) == [row for row, tokens in enumerate(rows) if tokens.pooled_T.any()]


@settings(max_examples=60, deadline=None)
@given(rows=windows(), batch_tokens=st.integers(1, 200))
def test_batches_are_bounded_and_filled_longest_first(rows: list[TokenRow], batch_tokens: int) -> None:
    batches = batches_of(rows, batch_tokens)
    order = [int(row) for batch in batches for row in batch.rows_B]
    assert order == sorted(order, key=lambda row: (-len(rows[row].ids_T), row))
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        count, longest = batch.tokens_BT.shape
        assert longest == max(len(rows[row].ids_T) for row in batch.rows_B)
        assert count * longest <= batch_tokens or count == 1
        assert following is None or (count + 1) * longest > batch_tokens  # no batch is smaller than it must be


@settings(max_examples=20, deadline=None)
@given(rows=windows(), batch_tokens=st.integers(1, 200))
def test_batches_are_a_pure_function_of_rows_and_size(rows: list[TokenRow], batch_tokens: int) -> None:
    for first, second in zip(batches_of(rows, batch_tokens), batches_of(rows, batch_tokens), strict=True):
        for name in ("rows_B", "tokens_BT", "real_BT", "pooled_BT"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


def test_padding_is_a_small_share_of_a_full_window() -> None:
    """Lengths as of a measured pool of 28,000 prompts: log-normal, median 58, the longest cut at 512; 2 % at 4096 rows."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(58), 0.75, size=4096), 1, 512).astype(int)
    rows = [token_row(int(length), int(length), row=row) for row, length in enumerate(lengths)]

    def padding(window_rows: int) -> float:
        padded = sum(
            batch.tokens_BT.size
            for start in range(0, len(rows), window_rows)
            for batch in batches_of(rows[start : start + window_rows], 4096)
        )
        return 1 - lengths.sum() / padded

    assert padding(4096) <= 0.025
    assert padding(256) >= 3 * padding(4096)  # what long windows are for


@settings(max_examples=60, deadline=None)
@given(rows=windows(), batch_tokens=st.integers(1, 200))
def test_batches_of_few_lengths_hold_the_same_rows_in_the_same_order(rows: list[TokenRow], batch_tokens: int) -> None:
    batches = list(batches_by_length(rows, batch_tokens=batch_tokens, padded_length=few_lengths))
    order = [int(row) for rows_B, _ in batches for row in rows_B]
    assert order == [int(row) for rows_B, _ in batches_by_length(rows, batch_tokens=batch_tokens) for row in rows_B]
    for rows_B, length in batches:
        assert length % 4 == 0
        assert max(len(rows[row].ids_T) for row in rows_B) <= length
        assert len(rows_B) * length <= batch_tokens or len(rows_B) == 1


@given(st.integers(1, 1 << 20))
def test_few_lengths_waste_little(length: int) -> None:
    assert length <= few_lengths(length) < length + max(4, length / 16)
    assert few_lengths(few_lengths(length)) == few_lengths(length)
    assert few_lengths(length) <= few_lengths(length + 1)


def test_there_are_few_lengths() -> None:
    assert len({few_lengths(length) for length in range(1, 513)}) <= 96


@settings(max_examples=60, deadline=None)
@given(rows=windows(), batch_tokens=st.integers(1, 200), boundary=st.integers(1, 40))
def test_no_batch_straddles_the_boundary(rows: list[TokenRow], batch_tokens: int, boundary: int) -> None:
    seen: list[int] = []
    for rows_B, length in batches_by_length(
        rows, batch_tokens=batch_tokens, padded_length=lambda length: -(-length // 8) * 8, boundary=boundary
    ):
        is_long = {len(rows[row].ids_T) > boundary for row in rows_B}
        assert len(is_long) == 1
        assert is_long == {length > boundary}
        assert all(len(rows[row].ids_T) <= length for row in rows_B)
        seen += rows_B.tolist()
    assert sorted(seen) == [row for row, tokens in enumerate(rows) if tokens.pooled_T.any()]
