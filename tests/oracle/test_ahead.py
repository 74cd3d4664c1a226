"""A window that was begun while another one's rows were taken: the same bytes, its errors its own, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.core.errors import BuildInterruptedError
from embstore.core.interfaces import Check
from embstore.core.prompts import Prompt
from embstore.model.embed import LogitEmbedder
from tests.support.models import PROMPTS, Case, open_embedder

CaseOf = Callable[[str], Case]
WINDOWS = [PROMPTS[:9], PROMPTS[9:18], PROMPTS[18:]]


def rows_of(
    embedder: LogitEmbedder, prompts: Sequence[Prompt], following: Sequence[Prompt] = (), check: Check = lambda: None
) -> NDArray[np.float16]:
    blocks = embedder.embed(prompts, first_row=0, chunk_rows=4, check=check, following=[following] if following else ())
    rows = []
    for block in blocks:
        rows.append(block.emb_BV.copy())
        block.release()
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "modernbert-decoder"])
@pytest.mark.parametrize("threads", [1, 2])
def test_windows_begun_ahead_have_the_same_bytes_and_counts(
    case_of: CaseOf, name: str, threads: int, tmp_path: Path
) -> None:
    embedder = open_embedder(case_of(name).folder, PROMPTS, tmp_path, threads=threads, batch_tokens=64)
    apart = [(rows_of(embedder, window), embedder.counts) for window in WINDOWS]
    for _ in range(3):
        for index, window in enumerate(WINDOWS):
            rows = rows_of(embedder, window, WINDOWS[(index + 1) % 3])
            assert np.array_equal(rows, apart[index][0])
            assert embedder.counts == apart[index][1]
    embedder.close()


def test_an_error_of_the_next_window_is_raised_when_it_is_asked_for(case_of: CaseOf, tmp_path: Path) -> None:
    embedder = open_embedder(case_of("llama").folder, PROMPTS, tmp_path)
    expected = rows_of(embedder, WINDOWS[0])
    genuine = embedder._tokenizer.encode

    def encode(prompts: Sequence[Prompt]) -> object:
        if prompts is WINDOWS[1]:
            raise KeyError("no tokens")
        return genuine(prompts)

    embedder._tokenizer.encode = encode  # type: ignore[method-assign, assignment]
    assert np.array_equal(rows_of(embedder, WINDOWS[0], WINDOWS[1]), expected)
    with pytest.raises(KeyError, match="no tokens"):
        rows_of(embedder, WINDOWS[1])
    assert np.array_equal(rows_of(embedder, WINDOWS[0]), expected)  # and it can be used again


@pytest.mark.parametrize("ending", ["close", "another window", "interrupt"])
def test_a_window_that_nobody_takes_is_given_up(case_of: CaseOf, ending: str, tmp_path: Path) -> None:
    embedder = open_embedder(case_of("llama").folder, PROMPTS, tmp_path, batch_tokens=16)
    many, is_over, late = PROMPTS * 20, threading.Event(), []

    def check() -> None:
        if is_over.is_set():
            late.append(threading.current_thread().name)
            raise BuildInterruptedError("second signal")

    rows_of(embedder, WINDOWS[0], many, check)
    if ending == "close":
        embedder.close()
    elif ending == "another window":
        rows_of(embedder, WINDOWS[1])
    else:
        is_over.set()
        with pytest.raises(BuildInterruptedError):
            rows_of(embedder, many)
    is_over.set()
    late.clear()
    again = rows_of(embedder, WINDOWS[2])
    assert late == []  # no batch of the abandoned window ran any more
    assert len(again) == len(WINDOWS[2])
