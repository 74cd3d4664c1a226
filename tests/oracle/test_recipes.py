"""Doubles of the loaders that cannot be installed here, on files that embstore resample has written.

Each is a few lines of the contract of one commit, named at its head: open-instruct, ROLL and prime-rl are not on the package
index.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embstore.training import DensitySampler, load_weights, resample_file, resample_indices
from tests.support.stores import small_lines, write_lines

DRAWS = 96
ROWS = [{**line, "task": f"task-{number}", "domain": "ab"[number % 2]} for number, line in enumerate(small_lines())]


def drawn(store: Path, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The records of a resampled file."""
    source, out = write_lines(folder / "train.jsonl", ROWS), folder / f"{len(list(folder.iterdir()))}.jsonl"
    resample_file(store, source, out, num_samples=DRAWS, **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def tasks(records: Any) -> list[str]:
    return [record["task"] for record in records]


def planned(store: Path, **options: Any) -> list[str]:
    """Tasks in the order of the sampler's plan."""
    weights = load_weights(store).for_dataset(ROWS)
    return tasks(ROWS[row] for row in resample_indices(weights, DRAWS, **options))


class OpenInstruct:
    """open-instruct e6c3044aa: ``get_cached_dataset_tulu`` of one file, and ``HFDataLoader`` of batches of one prompt."""

    def __init__(self, file: str, read: Callable[[str], list[dict[str, Any]]], cache: dict[str, Any], seed: int = 1) -> None:
        if file not in cache:  # its key is made of settings and names, not of what is in the file
            cache[file] = [{**record, "index": number} for number, record in enumerate(read(file))]
        self.records, self.seed = cache[file], seed
        self.epoch, self.done = 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.records), generator=generator).tolist()
            for at in range(self.done, len(order)):
                self.done = at + 1
                record = self.records[order[at]]
                yield record | {"prompt_id": f"{self.epoch}_{record['index']}"}
            self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> tuple[int, int]:
        return self.epoch, self.done

    def load_state_dict(self, state: tuple[int, int]) -> None:
        self.epoch, self.done = state


def test_open_instruct_asks_for_every_draw_under_a_name_of_its_own(
    finished_store: Path, tmp_path: Path, evidence: Any
) -> None:
    records = drawn(finished_store, tmp_path)

    def loader() -> OpenInstruct:
        return OpenInstruct("drawn.jsonl", lambda file: records, {})

    whole = list(itertools.islice(loader(), 2 * DRAWS))
    assert len({record["prompt_id"] for record in whole}) == 2 * DRAWS
    for epoch in (whole[:DRAWS], whole[DRAWS:]):
        assert Counter(tasks(epoch)) == Counter(planned(finished_store))
        assert tasks(epoch) != planned(finished_store)  # it shuffles, whatever the settings are
    stops = range(0, 2 * DRAWS, 7)
    for stop in stops:
        first, again = loader(), loader()
        seen = list(itertools.islice(first, stop))
        again.load_state_dict(first.state_dict())
        assert seen + list(itertools.islice(again, 2 * DRAWS - stop)) == whole
    evidence(
        trainer="open-instruct",
        version="e6c3044aa",
        kind="double",
        what="its index, shuffled loader and saved state",
        stops=len(stops),
        exact=len(stops),
    )


def test_open_instruct_would_mix_up_what_a_repeating_sampler_draws_twice(finished_store: Path) -> None:
    """Why a file, and no sampler: a request is named by epoch and index, and answers are found by that name."""
    sampler = DensitySampler(load_weights(finished_store).for_dataset(ROWS), num_samples=DRAWS)
    names = [f"0_{row}" for row in sampler]
    assert len(set(names)) < DRAWS


def test_open_instruct_takes_an_older_file_of_the_same_name_from_its_cache(finished_store: Path, tmp_path: Path) -> None:
    cache: dict[str, Any] = {}
    first, second = drawn(finished_store, tmp_path, seed=0), drawn(finished_store, tmp_path, seed=1)
    assert Counter(tasks(first)) != Counter(tasks(second))
    OpenInstruct("drawn.jsonl", lambda file: first, cache)
    assert tasks(OpenInstruct("drawn.jsonl", lambda file: second, cache).records) == tasks(first)
    assert tasks(OpenInstruct("another.jsonl", lambda file: second, cache).records) == tasks(second)


class Roll:
    """ROLL 8eb27cc2: ``DynamicSamplingScheduler.get_next_dataset_item`` of one domain."""

    def __init__(self, records: list[dict[str, Any]], *, seed: int = 42, state: int = 0) -> None:
        self.records, self.seed = records, seed
        self.indices = list(range(len(records)))
        self.epoch, self.count = 0, 0
        self.order: Iterator[int] | None = None
        for _ in range(state):
            self.next()

    def next(self) -> dict[str, Any]:
        if self.order is None:
            self._shuffle()
        number = next(self.order, None)  # type: ignore[arg-type]
        if number is None:
            self.epoch += 1
            self._shuffle()
            number = next(self.order)  # type: ignore[arg-type]
        self.count += 1
        return self.records[number]

    def _shuffle(self) -> None:
        random.Random(self.seed + self.epoch).shuffle(self.indices)  # in place: each pass shuffles the last one's order
        self.order = iter(self.indices)


def test_roll_trains_on_every_draw_once_a_pass(finished_store: Path, tmp_path: Path, evidence: Any) -> None:
    records = drawn(finished_store, tmp_path)
    scheduler = Roll(records)
    whole = [scheduler.next() for _ in range(2 * DRAWS)]
    for each in (whole[:DRAWS], whole[DRAWS:]):
        assert Counter(tasks(each)) == Counter(planned(finished_store))
        assert tasks(each) != planned(finished_store)
    stops = range(0, 2 * DRAWS, 7)
    for stop in stops:
        again = Roll(records, state=stop)
        assert whole[:stop] + [again.next() for _ in range(2 * DRAWS - stop)] == whole
    evidence(
        trainer="roll",
        version="8eb27cc2",
        kind="double",
        what="its shuffled indices, and how it replays them",
        stops=len(stops),
        exact=len(stops),
    )


def test_roll_takes_the_share_of_a_domain_from_its_settings(finished_store: Path, tmp_path: Path) -> None:
    """Half of a batch is domain a, whatever the file has: the domain that is asked for more often begins again."""
    records = drawn(finished_store, tmp_path)
    share = Counter(record["domain"] for record in records)
    assert share["a"] != share["b"]
    schedulers = {domain: Roll([record for record in records if record["domain"] == domain]) for domain in "ab"}
    seen = [schedulers[domain].next() for _ in range(DRAWS // 2) for domain in "ab"]
    assert Counter(record["domain"] for record in seen) == {"a": DRAWS // 2, "b": DRAWS // 2}
    assert Counter(tasks(seen)) != Counter(planned(finished_store))


class PrimeRl:
    """prime-rl 559b44772: ``StandardSampler``. Tasks have the key that the environment gives them."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        keys = Counter(record["task"] for record in records)
        if twice := sorted(key for key, count in keys.items() if count > 1):
            raise ValueError(f"Task keys must be unique within a taskset: {twice}")
        self.records, self.cursor = records, 0

    def __next__(self) -> dict[str, Any]:
        record = self.records[self.cursor % len(self.records)]
        self.cursor += 1
        return record


def test_prime_rl_follows_the_draws_if_each_has_a_key_of_its_own(
    finished_store: Path, tmp_path: Path, evidence: Any
) -> None:
    records = drawn(finished_store, tmp_path, reindex="task")
    texts = [record.get("prompt", record.get("messages")) for record in records]
    weights = load_weights(finished_store).for_dataset(ROWS)
    plan = [ROWS[row] for row in resample_indices(weights, DRAWS)]
    assert texts == [row.get("prompt", row.get("messages")) for row in plan]
    sampler = PrimeRl(records)
    whole = [next(sampler) for _ in range(2 * DRAWS)]
    assert whole == 2 * records
    stops = range(0, 2 * DRAWS, 7)
    for stop in stops:
        again = PrimeRl(records)
        again.cursor = stop
        assert [next(again) for _ in range(2 * DRAWS - stop)] == whole[stop:]
    evidence(
        trainer="prime-rl",
        version="559b44772",
        kind="double",
        what="its standard task sampler",
        stops=len(stops),
        exact=len(stops),
    )


def test_prime_rl_refuses_two_draws_with_one_key(finished_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Task keys must be unique"):
        PrimeRl(drawn(finished_store, tmp_path))
