"""DensitySampler: quotas in every pass, an order of weights, seed and epoch alone, a resume that repeats and skips none."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from embstore.core.errors import ConfigError, InvalidWeightsError, WeightsError
from embstore.training import DensitySampler, Weights, load_weights

UNEVEN = np.array([0.0, 0.5, 0.02, 0.0, 0.3, 0.08, 0.1, 0.0])
GOLDEN = [4, 1, 1, 1, 2, 1, 1, 1, 4, 4, 1, 6, 1, 4, 4, 5, 6, 1, 4, 1]  # num_samples=20, seed=3, epoch 2
VECTORS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=40).filter(any)


@settings(max_examples=80, deadline=None)
@given(vector=VECTORS, num_samples=st.integers(1, 200), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_a_row_is_drawn_floor_or_ceil_of_its_quota(vector: list[float], num_samples: int, seed: int, epoch: int) -> None:
    drawn = DensitySampler(vector, num_samples=num_samples, seed=seed).plan(epoch)
    assert (len(drawn), drawn.dtype) == (num_samples, np.int64)
    counts = np.bincount(drawn, minlength=len(vector))
    for count, weight in zip(counts, vector, strict=True):
        quota = num_samples * weight / math.fsum(vector)
        assert math.floor(quota - 1e-9) <= count <= math.ceil(quota + 1e-9)


def test_quotas_hold_over_many_rows_of_float32_weights() -> None:
    """Behind one large weight, a running total in float32 would step unevenly over the small ones."""
    vector = np.full(100_001, 1e-5, dtype=np.float32)
    vector[0] = 1
    drawn = DensitySampler(vector, num_samples=199_980).plan(0)
    assert 99_989 <= np.count_nonzero(drawn == 0) <= 99_991
    assert np.bincount(drawn)[1:].max() == 1  # 0.9999 of a draw each


@pytest.mark.parametrize("padding", [(1, 0), (0, 1), (3, 3)])
def test_a_row_without_weight_is_never_drawn(padding: tuple[int, int]) -> None:
    vector = np.pad(np.full(997, np.float32(1 / 997)), padding)
    vector[padding[0] + 500] = 0
    sampler = DensitySampler(vector, num_samples=5000)
    for epoch in range(20):
        assert (vector[sampler.plan(epoch)] > 0).all()


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_no_random_offset_draws_a_row_without_weight(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest one put a draw on the very edge of a row."""

    class Extreme:
        def __init__(self, key: object) -> None:
            self.key = key

        def random_raw(self, count: int) -> NDArray[np.uint64]:
            return np.full(count, word, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extreme)
    for vector in (UNEVEN, UNEVEN[::-1], np.array([0, 1, 1, 1]) / 3, np.array([0.1, 0])):
        for num_samples in (1, 3, 10, 49):
            assert (vector[DensitySampler(vector, num_samples=num_samples).plan(0)] > 0).all()


def test_over_many_passes_each_row_gets_its_share() -> None:
    sampler = DensitySampler(UNEVEN, num_samples=7, seed=1)
    drawn = np.concatenate([sampler.plan(epoch) for epoch in range(3000)])
    share = np.bincount(drawn, minlength=len(UNEVEN)) / len(drawn)
    assert share == pytest.approx(UNEVEN, abs=5e-3)


def test_a_pass_is_shuffled() -> None:
    """Every row is as likely early as late."""
    sampler = DensitySampler(np.ones(50))
    positions = np.mean([np.argsort(sampler.plan(epoch)) for epoch in range(2000)], axis=0)
    assert np.abs(positions - 24.5).max() < 2  # 5 deviations of a mean of 2000 uniform positions are 1.6


def test_the_order_depends_on_weights_seed_and_epoch_alone() -> None:
    plans = {
        (seed, epoch): DensitySampler(UNEVEN, num_samples=40, seed=seed).plan(epoch).tolist()
        for seed, epoch in itertools.product((0, 1, 2), (0, 1, 2))
    }
    assert len({tuple(plan) for plan in plans.values()}) == len(plans)
    large = [DensitySampler(UNEVEN, num_samples=40, seed=2**64 - seed).plan(0) for seed in (1, 2)]
    assert not np.array_equal(*large)
    used = DensitySampler(UNEVEN, num_samples=40, seed=2)
    list(used)
    assert list(used) == plans[2, 1]  # one pass after another
    used.set_epoch(0)
    assert list(used) == plans[2, 0]
    used.set_epoch(2)
    assert list(used) == plans[2, 2]
    used.set_epoch(2)
    assert list(used) == plans[2, 2]  # in the run that drew it, an epoch that is announced again is drawn again


def test_a_new_epoch_starts_at_its_beginning_and_a_loaded_one_goes_on() -> None:
    sampler = DensitySampler(UNEVEN, num_samples=10)
    first = list(itertools.islice(sampler, 4))
    state = sampler.state_dict()
    assert list(sampler) == sampler.plan(0).tolist()  # a look at the first draws costs none of them
    sampler.load_state_dict(state)
    sampler.set_epoch(0)
    assert first + list(sampler) == sampler.plan(0).tolist()
    sampler.load_state_dict(state)
    sampler.set_epoch(5)
    assert list(sampler) == sampler.plan(5).tolist()


def test_the_sequence_is_pinned() -> None:
    """Changes only with the name of the method: a resumed run must go on with the order it began."""
    sampler = DensitySampler(UNEVEN, num_samples=20, seed=3)
    assert sampler.state_dict()["method"] == "systematic-3"
    assert sampler.plan(2).tolist() == GOLDEN


def test_a_resume_at_any_draw_goes_on_as_if_never_stopped() -> None:
    """State is taken while a draw is in hand; 25 draws cross two ends of a pass of 10."""
    whole = endless(DensitySampler(UNEVEN, num_samples=10, seed=7), 45)
    for stop in range(26):
        sampler = DensitySampler(UNEVEN, num_samples=10, seed=7)
        seen = endless(sampler, stop)
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = DensitySampler(UNEVEN, num_samples=10, seed=7)
        resumed.load_state_dict(state)
        resumed.set_epoch(stop // 10)  # as trainers do at the start of a pass
        assert seen + endless(resumed, 45 - stop) == whole


DRAWS, EPOCHS = 10, 3


def usual_loop(sampler: DensitySampler, start: int) -> Iterator[tuple[int, int]]:
    """A trainer's loop over epochs: each draw, with the epoch that the trainer counts."""
    for epoch in range(start, EPOCHS):
        sampler.set_epoch(epoch)
        for row in sampler:
            yield epoch, row


def fresh(*, recount_epochs: bool = False) -> DensitySampler:
    return DensitySampler(UNEVEN, num_samples=DRAWS, seed=7, recount_epochs=recount_epochs)


@pytest.mark.parametrize("announced_first", [False, True])
def test_the_usual_loop_resumes_anywhere_and_repeats_no_epoch(announced_first: bool) -> None:
    """The trainer saves its own epoch with the state, which after the last draw of an epoch is no longer the sampler's."""
    whole = list(usual_loop(fresh(), 0))
    for stop in range(1, EPOCHS * DRAWS + 1):
        sampler = fresh()
        seen = list(itertools.islice(usual_loop(sampler, 0), stop))
        saved, state = seen[-1][0], sampler.state_dict()
        resumed = fresh()
        if announced_first:
            resumed.set_epoch(saved)
        resumed.load_state_dict(state)
        assert seen + list(usual_loop(resumed, saved)) == whole, stop


def test_a_finished_epoch_is_empty_once_and_again_only_if_announced_again() -> None:
    sampler = fresh()
    list(sampler)
    state = sampler.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)

    def resumed() -> DensitySampler:
        found = fresh()
        found.load_state_dict(state)
        return found

    nothing_announced = resumed()
    assert list(nothing_announced) == sampler.plan(1).tolist()
    once = resumed()
    once.set_epoch(0)
    once.set_epoch(0)  # by two layers of a trainer
    assert (list(once), once.epoch) == ([], 1)
    assert list(once) == sampler.plan(1).tolist()
    assert list(once) == sampler.plan(2).tolist()
    saved_again = resumed()
    saved_again.set_epoch(0)
    assert saved_again.state_dict() == state
    assert list(saved_again) == []
    assert saved_again.state_dict() == state
    on_purpose = resumed()
    on_purpose.set_epoch(0)
    on_purpose.seek(0)
    assert list(on_purpose) == sampler.plan(0).tolist()
    other = resumed()
    other.set_epoch(2)
    assert list(other) == sampler.plan(2).tolist()
    other.set_epoch(0)
    assert list(other) == sampler.plan(0).tolist()


def test_a_trainer_may_count_epochs_from_0_again() -> None:
    """As accelerate's loaders and many loops do: what is announced is how many epochs this process has begun."""
    whole = [row for _, row in usual_loop(fresh(), 0)]
    for stop in range(1, EPOCHS * DRAWS + 1):
        sampler = fresh(recount_epochs=True)
        seen = [row for _, row in itertools.islice(usual_loop(sampler, 0), stop)]
        state = sampler.state_dict()
        for announced_first in (False, True):
            resumed = fresh(recount_epochs=True)
            if announced_first:
                resumed.set_epoch(0)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            again = [row for _, row in itertools.islice(usual_loop(resumed, 0), len(whole) - stop)]
            assert seen + again == whole, (stop, announced_first)
            assert resumed.state_dict() == {**state, "epoch": EPOCHS, "position": 0} or not again
    late = fresh(recount_epochs=True)
    late.load_state_dict({**late.state_dict(), "epoch": 2**64 - 1})
    with pytest.raises(ConfigError, match="epoch"):
        late.set_epoch(1)


def test_a_pickled_sampler_goes_on_at_the_next_draw() -> None:
    for stop in range(2 * DRAWS + 1):
        sampler = fresh()
        seen = endless(sampler, stop)
        for copied in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
            assert copied.state_dict() == sampler.state_dict()
            assert seen + endless(copied, 25) == endless(fresh(), stop + 25)


def test_only_the_newest_iteration_moves_the_state() -> None:
    sampler = DensitySampler(np.ones(20_000), seed=1)  # several blocks of draws
    old = iter(sampler)
    next(old)
    new = iter(sampler)
    assert [next(new) for _ in range(5)] == sampler.plan(0)[:5].tolist()
    list(old)
    assert sampler.state_dict()["position"] == 5
    sampler.set_epoch(4)
    list(new)
    assert (sampler.epoch, sampler.state_dict()["position"]) == (4, 0)
    assert list(sampler) == sampler.plan(4).tolist()


def test_the_position_is_right_at_every_draw_of_many_blocks() -> None:
    sampler = DensitySampler(np.ones(9000), seed=1)
    positions = [sampler.state_dict()["position"] for _ in sampler]
    assert positions == [*range(1, 9000), 0]


def endless(sampler: DensitySampler, count: int) -> list[int]:
    """So many draws, pass after pass."""
    passes = itertools.chain.from_iterable(iter(sampler) for _ in itertools.count())
    return list(itertools.islice(passes, count))


def test_a_state_of_another_sampler_is_refused(finished_store: Path) -> None:
    sampler = DensitySampler(UNEVEN, num_samples=10, seed=7)
    state = sampler.state_dict()
    others = {
        "seed": DensitySampler(UNEVEN, num_samples=10, seed=8),
        "num_samples": DensitySampler(UNEVEN, num_samples=11, seed=7),
        "fingerprint": DensitySampler(UNEVEN[::-1], num_samples=10, seed=7),
    }
    for field, other in others.items():
        with pytest.raises(WeightsError, match=f"differs in {field}"):
            other.load_state_dict(state)
    for field in ("method", "version"):
        with pytest.raises(WeightsError, match=f"differs in {field}"):
            sampler.load_state_dict(state | {field: "of tomorrow"})
    from_store = DensitySampler(load_weights(finished_store), num_samples=10, seed=7, positional=True)
    with pytest.raises(WeightsError, match="differs in fingerprint"):
        from_store.load_state_dict(state)


class Rows(Dataset[tuple[int, float]]):
    """Items that read the mapped weights in the worker."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, row: int) -> tuple[int, float]:
        return row, float(self.weights.array[row])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_draws_the_plan(finished_store: Path, workers: int) -> None:
    weights = load_weights(finished_store)
    sampler = DensitySampler(weights, num_samples=45, seed=5, positional=True)
    loader = DataLoader(
        Rows(weights),
        batch_size=8,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert [int(row) for rows, _ in batches for row in rows] == sampler.plan(0).tolist()
    assert [float(value) for _, values in batches for value in values] == weights.array[sampler.plan(0)].tolist()
    if not workers:
        assert [int(row) for rows, _ in loader for row in rows] == sampler.plan(1).tolist()


def test_a_dataloader_resumes_between_batches(finished_store: Path) -> None:
    """Without workers nothing is fetched ahead, so the state after a batch names the next one."""
    weights = load_weights(finished_store)
    whole = DensitySampler(weights, num_samples=40, seed=5, positional=True).plan(0).tolist()
    sampler = DensitySampler(weights, num_samples=40, seed=5, positional=True)
    batches = iter(DataLoader(Rows(weights), batch_size=8, sampler=sampler))
    seen = [int(row) for _ in range(3) for row in next(batches)[0]]
    resumed = DensitySampler(weights, num_samples=40, seed=5, positional=True)
    resumed.load_state_dict(sampler.state_dict())
    seen += [int(row) for rows, _ in DataLoader(Rows(weights), batch_size=8, sampler=resumed) for row in rows]
    assert seen == whole


@pytest.mark.parametrize("vector", [[], [[0.5, 0.5]], [0.5, math.nan], [1.0, -0.1], [0.0, 0.0], [math.inf, 1.0]])
def test_what_cannot_be_drawn_from_is_refused(vector: list[object]) -> None:
    with pytest.raises(InvalidWeightsError):
        DensitySampler(vector)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"num_samples": 0}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DensitySampler(UNEVEN, **wrong)


def test_a_pass_has_one_draw_a_row_by_default() -> None:
    sampler = DensitySampler(np.ones(12, dtype=np.float32) / 12)
    assert len(sampler) == 12
    assert sorted(sampler) == list(range(12))
