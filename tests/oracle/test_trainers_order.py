"""Samplers under the loaders that use them: TRL's own order of groups, torchdata's own saving and restoring of state."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from trl.trainer.utils import RepeatSampler

from embstore.core.errors import ConfigError, WeightsError
from embstore.training import DensitySampler, GroupRepeat
from embstore.training.resumable import Resumable

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
@pytest.mark.parametrize(("workers", "stops"), [(0, range(20)), (2, (0, 3, 8, 11))])
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


def test_a_torch_sampler_is_one_and_draws_the_same() -> None:
    from embstore.training import torch as as_torch

    sampler = as_torch.DensitySampler(WEIGHTS, seed=3)
    assert isinstance(sampler, Sampler)
    assert list(sampler) == DensitySampler(WEIGHTS, seed=3).plan(0).tolist()
    grouped = as_torch.GroupRepeat(as_torch.DensitySampler(WEIGHTS, seed=3), 2, 5)
    assert isinstance(grouped, Sampler)
    loaded = DataLoader(list(range(len(WEIGHTS))), batch_size=10, sampler=grouped, collate_fn=list)
    assert list(itertools.chain.from_iterable(loaded)) == GroupRepeat(DensitySampler(WEIGHTS, seed=3), 2, 5).plan(0).tolist()
