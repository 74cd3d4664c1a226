"""Worker threads: every item once, the first error ends it, thread counts shared out."""

from __future__ import annotations

import threading

import pytest
import torch

from embstore.compute.workers import Workers, workers_for


def test_every_item_is_worked_on_once_by_as_many_threads_as_there_are() -> None:
    workers, both_here = Workers(2, 2), threading.Barrier(2, timeout=10)
    done: list[int] = []

    def work(item: int) -> None:
        if item < 2:
            both_here.wait()  # passes only if two threads work at once
        assert torch.is_inference_mode_enabled()
        done.append(item)

    workers.for_each(range(100), work)
    assert sorted(done) == list(range(100))


def test_the_first_error_ends_the_work_and_is_raised() -> None:
    drawn = []

    def items() -> object:
        for item in range(10_000):
            drawn.append(item)
            yield item

    def work(item: int) -> None:
        if item == 5:
            raise KeyError(item)

    workers = Workers(2, 2)
    with pytest.raises(KeyError, match="5"):
        workers.for_each(items(), work)  # type: ignore[arg-type]
    assert len(drawn) < 10_000
    workers.for_each([1], work)  # and they can be used again


def test_an_iterable_that_fails_is_no_end_of_work() -> None:
    def items() -> object:
        yield 1
        raise ValueError("no more tokens")

    with pytest.raises(ValueError, match="no more tokens"):
        Workers(2, 2).for_each(items(), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("threads", "num_workers", "share"), [(4, 4, 1), (4, 1, 4), (5, 2, 2)])
def test_threads_are_shared_out(threads: int, num_workers: int, share: int) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    Workers(threads, num_workers).for_each(range(8), lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {share}
    assert torch.get_num_threads() == before


def test_workers_are_fewer_where_activations_are_large() -> None:
    assert workers_for(8, 1 << 20) == 8
    assert workers_for(8, 200 << 20) == 2
    assert workers_for(8, 4 << 30) == 1
    assert workers_for(1, 0) == 1
