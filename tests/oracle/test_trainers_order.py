"""Samplers under the loaders that use them: TRL's own order of groups, torchdata's own saving and restoring of state."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from torch import distributed
from torch.utils.data import DataLoader, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from trl.trainer.utils import RepeatSampler

from embstore.core.errors import ConfigError, WeightsError
from embstore.training import DensitySampler, GroupRepeat
from embstore.training.resumable import Resumable
from tests.support import loader_runs

WEIGHTS = np.random.default_rng(2).gamma(0.7, size=31)


@pytest.mark.parametrize(
    ("draws", "group", "prompts", "repeats"), [(31, 4, 5, 3), (30, 1, 1, 1), (16, 2, 8, 1), (29, 3, 4, 6), (7, 5, 7, 2)]
)
def test_groups_come_in_the_order_of_trls_own_sampler(draws: int, group: int, prompts: int, repeats: int) -> None:
    sampler = DensitySampler(WEIGHTS, num_samples=draws, seed=4)
    ours = GroupRepeat(sampler, group, prompts, repeats)
    theirs = RepeatSampler(range(draws), mini_repeat_count=group, batch_size=prompts, repeat_count=repeats, shuffle=False)
    for epoch in (0, 1):
        order = sampler.plan(epoch)
        assert list(ours) == [int(order[draw]) for draw in theirs]
    assert len(ours) == len(theirs) == len(list(theirs))


def groups() -> GroupRepeat:
    return GroupRepeat(DensitySampler(WEIGHTS, num_samples=14, seed=9), 2, 3, 2)


def test_groups_resume_at_any_draw() -> None:
    length = len(groups())
    whole = list(itertools.islice(endless(groups()), 3 * length))
    for stop in range(2 * length + 1):
        sampler = groups()
        seen = list(itertools.islice(endless(sampler), stop))
        resumed = groups()
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        resumed.set_epoch(stop // length)
        assert seen + list(itertools.islice(endless(resumed), 3 * length - stop)) == whole


def endless(sampler: Resumable) -> itertools.chain[int]:
    return itertools.chain.from_iterable(iter(sampler) for _ in itertools.count())


def test_groups_hand_on_the_epoch_and_refuse_another_state() -> None:
    inner = DensitySampler(WEIGHTS, num_samples=14, seed=9)
    outer = GroupRepeat(inner, 2, 3, 2)
    outer.set_epoch(3)
    assert inner.epoch == outer.epoch == 3
    state = outer.state_dict()
    for other in (GroupRepeat(inner, 3, 3, 2), GroupRepeat(DensitySampler(WEIGHTS, num_samples=14, seed=8), 2, 3, 2)):
        with pytest.raises(WeightsError, match="differs in"):
            other.load_state_dict(state)
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 15, 1)):
        with pytest.raises(ConfigError):
            GroupRepeat(inner, *wrong)


MAKERS = {"draws": lambda: DensitySampler(WEIGHTS, num_samples=30, seed=6), "groups": groups}
BATCH = 4


def loader(sampler: Resumable, workers: int) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(
        list(range(len(WEIGHTS))), batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=list
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 under torch 2.13
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("workers", "stops"), [(0, range(20)), (2, (3, 11))])
@pytest.mark.parametrize("calls_set_epoch", [False, True])
def test_a_stateful_loader_resumes_bit_for_bit(kind: str, workers: int, stops: Any, calls_set_epoch: bool) -> None:
    """Stopped anywhere in two epochs, at their ends too; workers fetch ahead, and the saved state must not be theirs."""
    make = MAKERS[kind]
    batches = -(-len(make()) // BATCH)
    whole = [make().plan(epoch).tolist() for epoch in range(3)]
    for stop in stops:
        epoch, within = divmod(stop, batches)
        if epoch > 1:
            continue
        sampler = make()
        first = loader(sampler, workers)
        for done in range(epoch):
            if calls_set_epoch:
                sampler.set_epoch(done)
            assert list(itertools.chain.from_iterable(first)) == whole[done]
        if calls_set_epoch:
            sampler.set_epoch(epoch)
        seen = list(itertools.chain.from_iterable(itertools.islice(iter(first), within))) if within else []
        state = first.state_dict()
        del first
        fresh = make()
        again = loader(fresh, workers)
        again.load_state_dict(state)
        if calls_set_epoch:
            fresh.set_epoch(epoch)
        assert seen + list(itertools.chain.from_iterable(again)) == whole[epoch], (stop, workers)
        if calls_set_epoch:
            fresh.set_epoch(epoch + 1)
        assert list(itertools.chain.from_iterable(again)) == whole[epoch + 1]


EPOCHS = 3


def usual_loop(sampler: Resumable, batches: StatefulDataLoader[Any], start: int) -> Iterator[tuple[int, list[int]]]:
    """A trainer's loop over epochs: each batch, with the epoch that the trainer counts."""
    for epoch in range(start, EPOCHS):
        sampler.set_epoch(epoch)
        for batch in batches:
            yield epoch, batch


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 4)])
def test_the_usual_loop_repeats_no_epoch(kind: str, workers: int, every: int) -> None:
    """``every``: which batches the run is stopped after, the last one of each epoch among them."""
    make = MAKERS[kind]
    length = -(-len(make()) // BATCH)
    assert length % every == 0
    first = make()
    whole = list(usual_loop(first, loader(first, 0), 0))
    for stop in range(every, EPOCHS * length + 1, every):
        sampler = make()
        batches = loader(sampler, workers)
        run = usual_loop(sampler, batches, 0)
        seen = list(itertools.islice(run, stop))
        state, saved = batches.state_dict(), seen[-1][0]
        del run
        fresh = make()
        again = loader(fresh, workers)
        again.load_state_dict(state)
        assert seen + list(usual_loop(fresh, again, saved)) == whole, stop


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counted", [0, 1])
def test_a_loop_that_saves_behind_an_epoch_repeats_none(workers: int, counted: int) -> None:
    """The loader is finished, and torchdata drops an iteration; the trainer saves the epoch it has done, or the next one."""
    make = MAKERS["draws"]
    sampler = make()
    batches = loader(sampler, workers)
    sampler.set_epoch(0)
    seen = [(0, batch) for batch in batches]
    state = batches.state_dict()
    fresh = make()
    again = loader(fresh, workers)
    again.load_state_dict(state)
    other = make()
    assert seen + list(usual_loop(fresh, again, counted)) == list(usual_loop(other, loader(other, 0), 0))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_loop_that_counts_from_0_again_goes_on(workers: int, grouped: bool) -> None:
    def make() -> Resumable:
        draws = DensitySampler(WEIGHTS, num_samples=30, seed=6, recount_epochs=True)
        return GroupRepeat(draws, 2, 3, 1) if grouped else draws

    other = make()
    whole = [batch for _, batch in usual_loop(other, loader(other, 0), 0)]
    length = len(whole) // EPOCHS
    for stop in (length - 2, length, length + 3, 2 * length):
        sampler = make()
        batches = loader(sampler, workers)
        run = usual_loop(sampler, batches, 0)
        seen = [batch for _, batch in itertools.islice(run, stop)]
        state = batches.state_dict()
        del run
        fresh = make()
        again = loader(fresh, workers)
        again.load_state_dict(state)
        rest = itertools.islice(usual_loop(fresh, again, 0), len(whole) - stop)
        assert seen + [batch for _, batch in rest] == whole, stop


def test_a_torch_sampler_is_one_and_draws_the_same() -> None:
    from embstore.training import torch as as_torch

    sampler = as_torch.DensitySampler(WEIGHTS, seed=3)
    assert isinstance(sampler, Sampler)
    assert list(sampler) == DensitySampler(WEIGHTS, seed=3).plan(0).tolist()
    grouped = as_torch.GroupRepeat(as_torch.DensitySampler(WEIGHTS, seed=3), 2, 5)
    assert isinstance(grouped, Sampler)
    loaded = DataLoader(list(range(len(WEIGHTS))), batch_size=10, sampler=grouped, collate_fn=list)
    assert list(itertools.chain.from_iterable(loaded)) == GroupRepeat(DensitySampler(WEIGHTS, seed=3), 2, 5).plan(0).tolist()


@pytest.fixture
def accelerate_is_reset() -> Iterator[None]:
    """It keeps its state in classes, which would decide of the trainers of other tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("name", loader_runs.SETTINGS)
@pytest.mark.usefixtures("accelerate_is_reset")
def test_accelerate_hands_out_the_plan_on_one_process(name: str, tmp_path: Path, evidence: Callable[..., None]) -> None:
    """On two: tests/trainers/test_loaders.py."""
    settings = loader_runs.SETTINGS[name]
    whole = loader_runs.whole(settings)
    plan = [loader_runs.draws().plan(epoch).tolist() for epoch in range(loader_runs.EPOCHS)]
    assert list(itertools.chain.from_iterable(whole)) == list(itertools.chain.from_iterable(plan))
    length = len(whole) // loader_runs.EPOCHS
    stops = (1, length, length + 2)
    for stop in stops:
        assert loader_runs.skipped(settings, stop, length) == whole[stop:]
        if settings["use_stateful_dataloader"]:
            assert loader_runs.restored(settings, stop, length, tmp_path / str(stop)) == whole[stop:]
    exact, version = len(stops), importlib.metadata.version("accelerate")
    evidence(trainer="accelerate", version=version, kind="run", what="loaders of 1 process", stops=exact, exact=exact)


def test_a_rank_is_not_found_before_the_process_group_is_made(process_group_of_two: Callable[[], None]) -> None:
    before = DensitySampler(WEIGHTS, rank="auto")
    process_group_of_two()
    after = DensitySampler(WEIGHTS, rank="auto")
    assert (before.rank, before.num_replicas) == (0, 1)
    assert (after.rank, after.num_replicas) == (1, 2)


@pytest.fixture
def process_group_of_two() -> Iterator[Callable[[], None]]:
    """Makes one in which this process is the second; the first never speaks."""
    yield lambda: distributed.init_process_group("fake", store=distributed.HashStore(), rank=1, world_size=2)
    distributed.destroy_process_group()


def test_with_workers_the_state_of_the_sampler_is_ahead_of_the_batches() -> None:
    sampler = MAKERS["draws"]()
    first = next(
        iter(DataLoader(list(range(len(WEIGHTS))), batch_size=BATCH, sampler=sampler, num_workers=1, collate_fn=list))
    )
    resumed = MAKERS["draws"]()
    resumed.load_state_dict(sampler.state_dict())
    plan = resumed.plan(0).tolist()
    assert first == plan[:BATCH]
    assert list(resumed) != plan[BATCH:]
