"""An error in one batch of a lap ends it, wakes everybody, leaves nothing behind, and within a time limit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from embstore.core.errors import BuildInterruptedError, ModelError
from embstore.model.backbone import SplitModel
from embstore.model.embed import LogitEmbedder
from embstore.model.layer_weights import Weights
from embstore.model.residency import Residency
from embstore.model.units import Unit
from tests.oracle.test_layered import WINDOWS, rows_of
from tests.support.limits import TimeLimit
from tests.support.models import PROMPTS, least_model_memory, make_model, make_tokenizer, open_embedder, reopened, save_model

LAYERS = 4
# those between are alike
EACH_LAYER = [0, *(pytest.param(layer, marks=pytest.mark.slow) for layer in range(1, LAYERS - 1)), LAYERS - 1]
SECONDS = 120.0


class OfTheClass(Exception):
    """Raised by a model's own code."""


class Opened:
    """A model of four layers in the layered order, with the rows that it gives, and a count of batches under way."""

    def __init__(self, embedder: LogitEmbedder, plain_rows: bytes) -> None:
        self.embedder, self.plain_rows = embedder, plain_rows
        self.under_way = 0
        self.lock = threading.Lock()
        self.calls = 0  # of the watched layer
        self.fault: Callable[[], None] | None = None
        self.fails_at = -1
        self.hook: Any = None

    def rows(self, check: Callable[[], None] | None = None) -> bytes:
        limit = TimeLimit(SECONDS)
        return limit.run(lambda: rows_of(self.embedder, limit=limit, check=check))

    def watch(self, layer: int) -> None:
        """Count calls of this layer, with its weights there, and fail at one of them."""

        def note(module: nn.Module, arguments: object) -> None:
            with self.lock:
                self.calls += 1
                is_it = self.calls == self.fails_at
            if is_it:
                assert self.fault is not None
                self.fault()

        self.hook = self.embedder.model.backbone.layers[layer].register_forward_pre_hook(note)

    def is_at_rest(self) -> None:
        """No batch is in its forward, no worker has a job, and units are open as between two laps."""
        assert self.under_way == 0
        residency = self.embedder.model.residency
        assert residency is not None
        assert residency._place == {}
        assert sum(residency._at.values()) == 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    return save_model(folder, make_model("llama", layers=LAYERS), make_tokenizer())


@pytest.fixture(scope="module")
def plain(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LogitEmbedder:
    return open_embedder(model_folder, PROMPTS, tmp_path_factory.mktemp("work"), batch_tokens=64)


@pytest.fixture(params=[1, 2])
def opened(
    request: pytest.FixtureRequest, model_folder: Path, plain: LogitEmbedder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opened]:
    """With one thread, and with two; all windows in one lap."""
    memory = least_model_memory(plain)
    layered = functools.partial(reopened, model_folder, plain, threads=request.param)
    found = Opened(layered(model_memory=memory, memory_bytes=1 << 30), rows_of(layered()))
    assert found.embedder.num_workers == request.param
    genuine = SplitModel.hidden

    def hidden(self: SplitModel, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        with found.lock:
            found.under_way += 1
        try:
            return genuine(self, tokens_BT, real_BT)
        finally:
            with found.lock:
                found.under_way -= 1

    monkeypatch.setattr(SplitModel, "hidden", hidden)
    assert found.rows() == found.plain_rows  # and every thread has been started
    found.is_at_rest()
    yield found
    found.embedder.close()


@pytest.mark.parametrize("layer", EACH_LAYER)
def test_an_error_of_a_batch_at_any_layer_ends_the_lap(opened: Opened, layer: int) -> None:
    opened.watch(layer)
    assert opened.rows() == opened.plain_rows
    num_calls, threads = opened.calls, threading.active_count()
    assert num_calls > 5
    for is_last in (False, True):

        def fail() -> None:
            raise OfTheClass("of this batch")

        opened.calls, opened.fault, opened.fails_at = 0, fail, num_calls if is_last else 1
        with pytest.raises(OfTheClass, match="of this batch"):
            opened.rows()
        opened.is_at_rest()
        opened.fails_at = -1
        assert opened.rows() == opened.plain_rows
    assert threading.active_count() <= threads


@pytest.mark.parametrize("layer", EACH_LAYER)
def test_an_interrupt_at_any_layer_ends_the_lap(opened: Opened, layer: int) -> None:
    """Ctrl-C reaches the pass as an error of ``check``."""
    opened.watch(layer)
    assert opened.rows() == opened.plain_rows
    num_calls, is_pressed = opened.calls, threading.Event()

    def check() -> None:
        if is_pressed.is_set():
            raise BuildInterruptedError("second signal")

    for call in (1, num_calls // 2, num_calls):
        opened.calls, opened.fault, opened.fails_at = 0, is_pressed.set, call
        with pytest.raises(BuildInterruptedError):
            opened.rows(check)
        opened.is_at_rest()
        opened.fails_at = -1
        is_pressed.clear()
        assert opened.rows(check) == opened.plain_rows


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_batch_that_runs_out_of_memory_is_split_and_counted(
    opened: Opened, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its halves begin again with the first layer, while other batches are at this one."""
    monkeypatch.setattr("embstore.model.embed.makes_kernels", lambda spec: False)  # as on an accelerator
    whole, num_splits = embedded(opened)
    assert num_splits == [0, 0, 0]

    def refuse(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    opened.hook = opened.embedder.model.backbone.layers[layer].register_forward_pre_hook(refuse)
    halves, num_splits = embedded(opened)
    assert min(num_splits) >= 1
    opened.is_at_rest()
    assert np.linalg.norm(whole - halves, axis=1).max() <= 2e-4
    opened.hook.remove()
    again, num_splits = embedded(opened)
    assert num_splits == [0, 0, 0]
    assert np.array_equal(again, whole)


def embedded(opened: Opened) -> tuple[NDArray[np.float64], list[int]]:
    """Rows of windows that are cut into batches of several rows, and how often each window's batches were split."""
    limit, rows, num_splits = TimeLimit(SECONDS), [], []
    by_length = sorted(PROMPTS, key=lambda prompt: len(prompt.text or ""))
    windows = [by_length[:8], by_length[:12], by_length[4:12]]

    def embed() -> None:
        for index, window in enumerate(windows):
            following = iter(windows[index + 1 :])
            for block in opened.embedder.embed(window, first_row=0, chunk_rows=16, check=limit.check, following=following):
                rows.append(block.emb_BV.astype(np.float64))
                block.release()
            num_splits.append(opened.embedder.counts.splits)

    limit.run(embed)
    return np.concatenate(rows), num_splits


def test_a_single_prompt_that_does_not_fit_fails_by_name(opened: Opened) -> None:
    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    opened.watch(2)
    opened.fault = refuse

    class Always(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    opened.fails_at = Always()
    with pytest.raises(ModelError, match="does not fit the device's memory"):
        opened.rows()
    opened.is_at_rest()
    opened.fails_at = -1
    assert opened.rows() == opened.plain_rows


@pytest.mark.parametrize("layer", EACH_LAYER)
def test_weights_that_cannot_be_read_end_the_lap(opened: Opened, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, is_broken = Weights.make, threading.Event()

    def make(self: Weights, unit: Unit) -> Callable[[], None]:
        ready = genuine(self, unit)
        if is_broken.is_set() and unit.number == layer:
            raise OSError(5, "Input/output error")
        return ready

    monkeypatch.setattr(Weights, "make", make)
    for broken in (True, False, True, False):
        is_broken.set() if broken else is_broken.clear()
        if broken:
            with pytest.raises(OSError, match="Input/output error"):
                _until_read(opened)
        else:
            assert opened.rows() == opened.plain_rows
        opened.is_at_rest()


def _until_read(opened: Opened) -> None:
    """The unit may still be open from the lap before: then the next lap has to read it."""
    for _ in range(3):
        opened.rows()


def test_closing_in_the_middle_of_a_lap_ends_it(opened: Opened) -> None:
    """Batches of the windows that were begun ahead are thrown out, and no thread reads weights any more."""
    limit, is_inside = TimeLimit(SECONDS), threading.Event()
    opened.watch(2)
    opened.calls, opened.fault, opened.fails_at = 0, is_inside.set, 1
    late: list[str] = []
    is_closed = threading.Event()

    def check() -> None:
        limit.check()
        if is_closed.is_set():
            late.append(threading.current_thread().name)

    def begin_and_close() -> None:
        opened.embedder._begin(iter(WINDOWS), 16, check)
        while not is_inside.is_set():
            limit.check()
        opened.embedder.close()

    limit.run(begin_and_close)
    is_closed.set()
    assert opened.under_way == 0
    assert late == []
    residency = opened.embedder.model.residency
    assert residency is not None
    assert residency.opened == []
    assert residency._loading is None


def test_a_lap_that_nobody_takes_is_given_up(opened: Opened) -> None:
    limit = TimeLimit(SECONDS)
    other = [list(window) for window in WINDOWS]
    expected = limit.run(lambda: rows_of(opened.embedder, other[1:2], limit))
    for _ in range(3):

        def begin_and_turn_away() -> bytes:
            blocks = opened.embedder.embed(
                WINDOWS[0], first_row=0, chunk_rows=16, check=limit.check, following=iter(WINDOWS[1:])
            )
            next(iter(blocks))
            return rows_of(opened.embedder, other[1:2], limit)

        assert limit.run(begin_and_turn_away) == expected
        opened.is_at_rest()


def test_residency_is_closed_while_a_unit_is_read(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading thread is waited for; what it made last is dropped."""
    genuine, is_reading, may_end = Weights.make, threading.Event(), threading.Event()

    def make(self: Weights, unit: Unit) -> Callable[[], None]:
        is_reading.set()
        may_end.wait(SECONDS)
        return genuine(self, unit)

    monkeypatch.setattr(Weights, "make", make)
    limit = TimeLimit(SECONDS)

    def begin_and_close() -> None:
        residency: Residency | None = opened.embedder.model.residency
        assert residency is not None
        for unit in residency.opened:  # so that something must be read
            residency._drop(unit)
        opened.embedder._begin(iter(WINDOWS), 16, limit.check)
        assert is_reading.wait(SECONDS)
        threading.Timer(0.05, may_end.set).start()
        opened.embedder.close()

    limit.run(begin_and_close)
    for unit in opened.embedder.model.weights.parts.units:
        for place in unit.places:
            assert torch.isnan(place.module._parameters[place.name]).all()
