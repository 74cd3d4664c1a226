"""Ways to draw: counts against the quotas they promise, ranks against the whole, repeats apart, and more than 2^24 rows."""

from __future__ import annotations

import itertools
import math
import sys
import tracemalloc
import types
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, LengthMismatchError, WeightsError
from embstore.training import (
    DensitySampler,
    IndexedView,
    importance_weights,
    resample_dataset,
    resample_indices,
)
from embstore.training.draws import inclusion

UNEVEN = np.array([0.0, 0.5, 0.02, 0.0, 0.3, 0.08, 0.1, 0.0])
MANY = np.random.default_rng(0).gamma(0.5, size=2000).astype(np.float32)

GOLDEN_IID = [4, 1, 4, 4, 1, 1, 5, 1, 6, 4, 1, 4]  # num_samples=12, seed=3, epoch 2
GOLDEN_ONCE = [12, 16, 11, 15, 17, 13]  # num_samples=6, seed=3, epoch 2


@pytest.mark.filterwarnings("ignore:without_replacement")
def test_without_replacement_each_row_comes_at_most_once_at_its_probability() -> None:
    """Probabilities min(1, c w) with the c that makes them add up to n, solved here by bisection."""
    for draws in (2, 3, 4):
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(1, middle * UNEVEN).sum() < draws else (low, middle)
        expected = np.minimum(1, high * UNEVEN)
        sampler = DensitySampler(UNEVEN, num_samples=draws, method="without_replacement", seed=1)
        plans = [sampler.plan(epoch) for epoch in range(4000)]
        assert all(len(set(plan.tolist())) == draws for plan in plans)
        seen = np.bincount(np.concatenate(plans), minlength=len(UNEVEN)) / len(plans)
        assert seen == pytest.approx(expected, abs=0.03)
        assert (seen[expected == 1] == 1).all()
        assert (seen[UNEVEN == 0] == 0).all()


def test_without_replacement_over_many_rows_never_repeats() -> None:
    for draws in (1, 10, 500, 1500, 1998):
        certain = int((inclusion(MANY, draws)[0] <= MANY).sum())
        if certain:
            with pytest.warns(UserWarning, match=f"{certain} rows are drawn in every epoch"):
                sampler = DensitySampler(MANY, num_samples=draws, method="without_replacement")
        else:
            sampler = DensitySampler(MANY, num_samples=draws, method="without_replacement")
        for epoch in range(5):
            assert len(np.unique(sampler.plan(epoch))) == draws
    for draws in (2000, 3000):
        with pytest.raises(ConfigError, match="num_samples below 2000"):
            DensitySampler(MANY, num_samples=draws, method="without_replacement")


@pytest.mark.filterwarnings("ignore:without_replacement")
@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_no_offset_loses_a_draw_without_replacement(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, key: object) -> None:
            self.key = key

        def random_raw(self, count: int) -> NDArray[np.uint64]:
            return np.full(count, word, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extreme)
    for vector in (np.full(7, 1 / 7), np.full(49, np.float32(0.1)), np.arange(1, 40) / 7, np.ones(6)):
        for draws in range(1, len(vector)):
            plan = DensitySampler(vector, num_samples=draws, method="without_replacement").plan(0)
            assert len(np.unique(plan)) == len(plan) == draws


def test_independent_draws_vary_as_a_multinomial() -> None:
    sampler = DensitySampler(UNEVEN, num_samples=50, method="iid", seed=2)
    counts = np.array([np.bincount(sampler.plan(epoch), minlength=8) for epoch in range(3000)])
    assert counts.mean(axis=0) == pytest.approx(50 * UNEVEN, abs=0.3)
    assert counts.var(axis=0) == pytest.approx(50 * UNEVEN * (1 - UNEVEN), rel=0.15)
    assert (counts[:, UNEVEN == 0] == 0).all()


@pytest.mark.filterwarnings("ignore:without_replacement")
def test_every_method_is_a_function_of_seed_and_epoch() -> None:
    for method in ("systematic", "without_replacement", "iid"):
        plans = {}
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sampler = DensitySampler(MANY, num_samples=300, method=method, seed=seed)  # type: ignore[arg-type]
            plans[seed, epoch] = tuple(sampler.plan(epoch).tolist())
            assert plans[seed, epoch] == tuple(sampler.plan(epoch).tolist())
        assert len(set(plans.values())) == 4


def test_the_other_sequences_are_pinned_too() -> None:
    """As the systematic one: a change needs another name of the method."""
    iid = DensitySampler(UNEVEN, num_samples=12, method="iid", seed=3)
    assert iid.state_dict()["method"] == "iid-1"
    assert iid.plan(2).tolist() == GOLDEN_IID
    once = DensitySampler(np.arange(1.0, 20.0), num_samples=6, method="without_replacement", seed=3)
    assert once.state_dict()["method"] == "without-replacement-2"
    assert once.plan(2).tolist() == GOLDEN_ONCE


def test_ranks_share_one_pass() -> None:
    whole = DensitySampler(MANY, num_samples=103, seed=4).plan(1)
    parts = [DensitySampler(MANY, num_samples=103, seed=4, rank=rank, num_replicas=4) for rank in range(4)]
    assert [len(part) for part in parts] == [25] * 4  # three draws that do not divide are left out
    for rank, part in enumerate(parts):
        part.set_epoch(1)
        assert list(part) == whole[:100][rank::4].tolist() == part.plan(1).tolist()
        assert (part.epoch, part.state_dict()["position"]) == (2, 0)


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    whole = DensitySampler(MANY, num_samples=96, seed=4).plan(0)
    states = []
    for rank in range(4):
        part = DensitySampler(MANY, num_samples=96, seed=4, rank=rank, num_replicas=4)
        iterator = iter(part)
        assert [next(iterator) for _ in range(6)] == whole[rank:24:4].tolist()
        states.append(part.state_dict())
    assert len({state["position"] for state in states}) == 1
    for ranks in (1, 2, 3, 8):
        parts = [DensitySampler(MANY, num_samples=96, seed=4, rank=rank, num_replicas=ranks) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            part.load_state_dict(states[0])
            assert list(part) == whole[24:][rank::ranks].tolist()
    with pytest.raises(ConfigError, match="24 is not a multiple of num_replicas 5"):
        DensitySampler(MANY, num_samples=96, seed=4, num_replicas=5).load_state_dict(states[0])


def test_rank_auto_asks_torch_only_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DensitySampler(UNEVEN, rank="auto").num_replicas == 1  # loaded, no group initialised
    group = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(distributed=group))  # type: ignore[arg-type]
    sampler = DensitySampler(UNEVEN, rank="auto")
    assert (sampler.rank, sampler.num_replicas) == (1, 2)
    monkeypatch.delitem(sys.modules, "torch")
    assert DensitySampler(UNEVEN, rank="auto").num_replicas == 1
    assert "torch" not in sys.modules
    for rank, replicas in ((2, 2), (-1, 2), (0, 0), (0, 9)):
        with pytest.raises(ConfigError, match="rank"):
            DensitySampler(UNEVEN, rank=rank, num_replicas=replicas)


def test_seek_starts_anywhere_once() -> None:
    sampler = DensitySampler(UNEVEN, num_samples=20, seed=5)
    for position in range(20):
        sampler.seek(position)
        assert list(sampler) == sampler.plan(sampler.epoch - 1)[position:].tolist()
    sampler.set_epoch(7)
    sampler.seek(3)
    sampler.set_epoch(8)
    assert list(sampler) == sampler.plan(8).tolist()
    for position in (-1, 20):
        with pytest.raises(ConfigError, match=f"position {position} "):
            sampler.seek(position)
    with pytest.raises(ConfigError, match="epoch"):
        sampler.set_epoch(-1)


def test_another_state_is_taken_only_when_told_to() -> None:
    state = DensitySampler(UNEVEN, num_samples=20, seed=5).state_dict() | {"epoch": 2, "position": 6}
    other = DensitySampler(UNEVEN[::-1], num_samples=20, seed=5)
    with pytest.raises(WeightsError, match="strict=False"):
        raise_with_hint(other, state)
    other.load_state_dict(state, strict=False)
    assert list(other) == other.plan(2)[6:].tolist()
    with pytest.raises(WeightsError, match="not a sampler state"):
        other.load_state_dict({}, strict=False)


def raise_with_hint(sampler: DensitySampler, state: dict[str, object]) -> None:
    try:
        sampler.load_state_dict(state)
    except WeightsError as error:
        raise WeightsError(str(error.hint)) from error


@pytest.mark.parametrize("distance", [2, 8, 20])
def test_repeats_lie_apart(distance: int) -> None:
    vector = np.r_[np.full(20, 10.0), np.full(400, 0.5)]
    sampler = DensitySampler(vector, num_samples=800, seed=1, no_repeat_within=distance)
    plain = DensitySampler(vector, num_samples=800, seed=1)
    assert nearest_repeat(plain.plan(0)) < 20
    for epoch in range(4):
        plan = sampler.plan(epoch)
        assert nearest_repeat(plan) >= distance
        assert sorted(plan) == sorted(plain.plan(epoch))  # the quotas are the same


def nearest_repeat(plan: NDArray[np.int64]) -> int:
    last: dict[int, int] = {}
    nearest = len(plan)
    for position, row in enumerate(plan.tolist()):
        nearest = min(nearest, position - last.get(row, -len(plan)))
        last[row] = position
    return nearest


def test_a_distance_that_cannot_hold_is_refused_or_said() -> None:
    with pytest.raises(
        ConfigError, match="no_repeat_within 3 cannot hold: row 1 is drawn up to 10 times in an epoch of 20"
    ) as caught:
        DensitySampler(UNEVEN, num_samples=20, no_repeat_within=3)
    assert "at most 2" in str(caught.value.hint)
    crowded = DensitySampler(np.ones(4), num_samples=40, no_repeat_within=4)  # only the four rows in turn would do
    with pytest.warns(UserWarning, match="repeats are less than no_repeat_within = 4"):
        assert np.bincount(crowded.plan(0)).tolist() == [10, 10, 10, 10]
    for method in ("iid", "without_replacement"):
        with pytest.raises(ConfigError, match="systematic"):
            DensitySampler(UNEVEN, num_samples=2, method=method, no_repeat_within=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="method"):
        DensitySampler(UNEVEN, method="bootstrap")  # type: ignore[arg-type]


def test_more_rows_than_torch_can_draw_from() -> None:
    """torch's multinomial raises above 2^24 categories; here the quotas hold and a draw takes 16 bytes at its peak."""
    rows = 2**24 + 1
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.ones(rows), 1)
    weights = np.ones(rows, dtype=np.float32)
    weights[5] = 3.0
    sampler = DensitySampler(weights, seed=1)
    tracemalloc.start()
    iterator = iter(sampler)
    first = next(iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 16 * rows
    del iterator
    plan = sampler.plan(0)
    assert plan[0] == first
    counts = np.bincount(plan, minlength=rows)
    quota = rows / (rows + 2)
    assert counts[5] in (math.floor(3 * quota), math.ceil(3 * quota))
    assert counts.max() <= 3
    assert np.abs(counts - quota)[np.arange(rows) != 5].max() < 1


def test_a_resampled_dataset_is_the_plan() -> None:
    table = datasets.Dataset.from_dict({"id": [f"p{row}" for row in range(8)], "index": list(range(8))})
    drawn = resample_dataset(table, UNEVEN, 30, seed=6, epoch=2)
    plan = resample_indices(UNEVEN, 30, seed=6, epoch=2)
    assert drawn["id"] == [f"p{row}" for row in plan]
    assert drawn["embstore_draw"] == list(range(30))
    assert drawn["index"] == plan.tolist()
    renumbered = resample_dataset(table, UNEVEN, 30, seed=6, epoch=2, reindex="index")
    assert (renumbered["index"], renumbered["id"]) == (list(range(30)), drawn["id"])
    with pytest.raises(LengthMismatchError, match="8 weights, the dataset has 30 items"):
        resample_dataset(drawn, UNEVEN)
    with pytest.raises(ConfigError, match="already"):
        resample_dataset(drawn, np.ones(30))
    with pytest.raises(ConfigError, match="no column 'number'"):
        resample_dataset(table, UNEVEN, reindex="number")


def test_an_indexed_view_shows_the_draws() -> None:
    view = IndexedView("abcdefgh", resample_indices(UNEVEN, 10))
    assert len(view) == 10
    assert [view[position] for position in range(10)] == ["abcdefgh"[row] for row in resample_indices(UNEVEN, 10)]
    with pytest.raises(IndexError):
        view[10]
    with pytest.raises(LengthMismatchError, match="the dataset has 3 items"):
        IndexedView("abc", [0, 3])


def test_importance_weights_undo_the_sampling() -> None:
    """The weighted mean over many draws is the plain mean over the rows that can be drawn."""
    value = np.array([9.0, 1.0, 4.0, 9.0, 2.0, 7.0, 5.0, 9.0])
    drawn = resample_indices(UNEVEN, 200_000, seed=1)
    loss = importance_weights(UNEVEN, drawn)
    assert loss.mean() == pytest.approx(1)
    assert np.mean(loss * value[drawn]) == pytest.approx(value[UNEVEN > 0].mean(), rel=1e-3)
    assert importance_weights([0.5, 0.25, 0.25]) == pytest.approx([0.6, 1.2, 1.2])
    with pytest.raises(ConfigError, match="index 3 has weight 0"):
        importance_weights(UNEVEN, [1, 3])


def test_what_is_left_of_spare_draws_keeps_its_proportions() -> None:
    """A trainer drops some items, whichever, and trains on the first ``draws`` that are left."""
    draws, over, trained = 120, 40, 100
    share = UNEVEN / UNEVEN.sum()
    for dropped in ([], [4], [2, 5, 6]):
        is_left = ~np.isin(np.arange(len(UNEVEN)), dropped)
        seen = np.zeros(len(UNEVEN))
        for seed in range(200):
            rows = resample_indices(UNEVEN, draws, over=over, seed=seed)
            for part, count in ((rows[:draws], draws), (rows[draws:], over)):
                times = np.bincount(part, minlength=len(UNEVEN))
                assert (np.floor(count * share - 1e-9) <= times).all()
                assert (times <= np.ceil(count * share + 1e-9)).all()
            left = rows[is_left[rows]][:trained]
            seen += np.bincount(left, minlength=len(UNEVEN)) / len(left)
        expected = np.where(is_left, share, 0)
        assert seen / 200 == pytest.approx(expected / expected.sum(), abs=4e-3)


def test_spare_draws_change_no_other_and_are_of_no_other_epoch() -> None:
    for method in ("systematic", "iid"):
        plain = resample_indices(MANY, 500, seed=2, epoch=3, method=method)
        assert plain.tolist() == DensitySampler(MANY, num_samples=500, seed=2, method=method).plan(3).tolist()
        spare = {}
        for over in (1, 60, 500):
            rows = resample_indices(MANY, 500, seed=2, epoch=3, method=method, over=over)
            assert (len(rows), rows[:500].tolist()) == (500 + over, plain.tolist())
            spare[over] = rows[500:].tolist()
        assert spare[500] not in [
            resample_indices(MANY, 500, seed=2, epoch=epoch, method=method).tolist() for epoch in range(9)
        ]
    table = datasets.Dataset.from_dict({"number": list(range(len(MANY)))})
    drawn = resample_dataset(table, MANY, 500, seed=2, epoch=3, over=60, no_repeat_within=9)
    assert drawn["number"][:] == resample_indices(MANY, 500, seed=2, epoch=3, over=60, no_repeat_within=9).tolist()
    for wrong in ({"over": -1}, {"over": 5, "method": "without_replacement"}):
        with pytest.raises(ConfigError, match="over must be at least 0"):
            resample_indices(MANY, 500, **wrong)  # type: ignore[arg-type]


def seeds_of_a_step(step: int, rows: list[int]) -> list[int]:
    """nanochat's seeds of the first rollouts in a step (scripts/chat_rl.py, line 105 of commit 92d63d4)."""
    return [hash((step, row, 0)) & 0x7FFFFFFF for row in rows]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_lines_for_nanochat_draw_the_plan_and_no_row_twice_in_a_step(ranks: int, evidence: Any) -> None:
    """As docs/train/nanochat.md has them: all ranks together see one plan, in steps of ``per_step`` draws."""
    rows, per_step, num_epochs = 203, 8, 3
    num_steps = rows // per_step * num_epochs
    whole = DensitySampler(MANY[:rows], num_samples=num_steps * per_step, no_repeat_within=per_step)
    drawn = []
    for rank in range(ranks):
        rank_indices = DensitySampler(
            MANY[:rows],
            num_samples=num_steps * per_step,
            no_repeat_within=per_step,
            rank=rank,
            num_replicas=ranks,
        )
        drawn.append(list(itertools.islice(itertools.cycle(rank_indices), num_steps * per_step // ranks)))
    together = np.stack(drawn, axis=1).reshape(-1)
    assert together.tolist() == whole.plan(0).tolist()
    for step, batch in enumerate(together.reshape(num_steps, per_step).tolist()):
        assert len(set(seeds_of_a_step(step, batch))) == per_step
    evidence(
        trainer="nanochat",
        version="92d63d4",
        kind="double",
        what="the order of get_batch in scripts/chat_rl.py, on one rank and on two",
    )


def test_nanochat_gives_a_row_that_is_drawn_twice_in_a_step_the_same_rollouts() -> None:
    plan = DensitySampler(MANY[:203], num_samples=200).plan(0)
    steps = plan.reshape(-1, 8).tolist()
    assert any(len(set(seeds_of_a_step(step, batch))) < 8 for step, batch in enumerate(steps))
