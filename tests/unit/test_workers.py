"""Worker threads: every job once, the most urgent first, the first error ends it, thread counts shared out."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch

from embstore.host.threads import Workers, abandon, finish_all, workers_for


def test_as_many_jobs_run_at_once_as_there_are_workers_under_inference_mode() -> None:
    workers, both_here = Workers(2, 2), threading.Barrier(2, timeout=300)
    done: list[int] = []

    def work(item: int) -> None:
        if item < 2:
            both_here.wait()  # passes only if two threads work at once
        assert torch.is_inference_mode_enabled()
        done.append(item)

    finish_all([workers.submit(functools.partial(work, item)) for item in range(100)])
    assert sorted(done) == list(range(100))


def test_the_most_urgent_job_is_next_and_equals_keep_their_order() -> None:
    workers, may_begin = Workers(1, 1), threading.Event()
    done: list[str] = []
    jobs = [workers.submit(lambda: may_begin.wait(300) and None)]
    for name, urgency in (("batch 2", (2, 1)), ("batch 1a", (2, 0)), ("row", (0,)), ("batch 1b", (2, 0)), ("token", (1, 1))):
        jobs.append(workers.submit(functools.partial(done.append, name), urgency))
    may_begin.set()
    finish_all(jobs)
    assert done == ["row", "token", "batch 1a", "batch 1b", "batch 2"]


def test_the_first_error_is_raised_and_what_has_not_begun_never_begins() -> None:
    workers, done = Workers(2, 2), list[int]()

    def work(item: int) -> None:
        if item == 5:
            raise KeyError(item)
        time.sleep(0.001)
        done.append(item)

    jobs = [workers.submit(functools.partial(work, item)) for item in range(10_000)]
    with pytest.raises(KeyError, match="5"):
        finish_all(jobs)
    assert {0, 1, 2, 3, 4} <= set(done)
    seen = len(done)
    assert seen < 10_000
    finish_all([workers.submit(lambda: None)])  # they can be used again
    assert len(done) == seen


def test_abandoned_jobs_are_over_when_that_returns() -> None:
    workers, has_begun, ended = Workers(1, 1), threading.Event(), list[int]()

    def slow() -> None:
        has_begun.set()
        time.sleep(0.05)
        ended.append(0)

    jobs = [workers.submit(slow), *(workers.submit(functools.partial(ended.append, item)) for item in range(1, 50))]
    has_begun.wait(300)
    abandon(jobs)
    assert ended == [0]
    finish_all([workers.submit(lambda: None)])
    assert ended == [0]


@pytest.mark.parametrize(("threads", "num_workers", "share"), [(4, 4, 1), (4, 1, 4), (5, 2, 2)])
def test_threads_are_shared_out(threads: int, num_workers: int, share: int) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    workers = Workers(threads, num_workers)
    finish_all([workers.submit(lambda: seen.append(torch.get_num_threads())) for _ in range(8)])
    assert set(seen) == {share}
    assert torch.get_num_threads() == before


def test_workers_are_fewer_where_activations_are_large() -> None:
    assert workers_for(8, 1 << 20) == 8
    assert workers_for(8, 200 << 20) == 2
    assert workers_for(8, 4 << 30) == 1
    assert workers_for(1, 0) == 1
