"""A sampler that configuration names: every way to join it, and states that torch loads with ``weights_only``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.core.errors import ConfigError, KeyMismatchError, LengthMismatchError
from embstore.integrations.sampler import StoreSampler
from embstore.training import DensitySampler, GroupRepeat, load_weights, prompt_keys
from tests.support.stores import small_lines, write_lines

SEED = 5


def items() -> list[dict[str, Any]]:
    """The store's prompts in another order, some of them twice."""
    return [*small_lines()[::-2], *small_lines()[4:9], *small_lines()[::-1]]


TOKENS = [{"input_ids": [1, 2], "attention_mask": [1, 1], "num_actions": 1} for _ in items()]


@pytest.fixture
def expected(finished_store: Path) -> DensitySampler:
    return DensitySampler(load_weights(finished_store).for_dataset(items()), seed=SEED, num_samples=200)


class TorchItems(Dataset[dict[str, Any]]):
    """A map-style dataset that is not iterable."""

    def __len__(self) -> int:
        return len(items())

    def __getitem__(self, index: int) -> dict[str, Any]:
        return items()[index]


def as_file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    return str(write_lines(folder / name, [{"text": json.dumps(row), **row} for row in rows]))


def joins(store: Path, folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Ways to hand over the same items: the dataset, and what else is said."""
    ids = dict(zip(map(json.dumps, small_lines()), json.loads((store / "ids.json").read_text()), strict=True))
    names = [ids[json.dumps(row)] for row in items()]
    np.save(folder / "keys.npy", prompt_keys(items()))
    np.save(folder / "ids.npy", np.array(names))
    (folder / "table").mkdir()
    pq.write_table(pa.Table.from_pylist([{"uid": name} for name in names]), folder / "table" / "train-0.parquet")
    halves = [as_file(folder, items()[:40], "a.jsonl"), as_file(folder, items()[40:], "b.jsonl")]
    return {
        "items": (items(), {}),
        "torch": (TorchItems(), {}),
        "datasets": (datasets.Dataset.from_list([{"uid": name, "input_ids": [1]} for name in names]), {"id_column": "uid"}),
        "a column of ids": ([{"uid": name, "input_ids": [1]} for name in names], {"id_column": "uid"}),
        "keys": (TOKENS, {"keys": prompt_keys(items())}),
        "file of keys": (TOKENS, {"keys": folder / "keys.npy"}),
        "ids": (TOKENS, {"keys": names}),
        "file of ids": (TOKENS, {"keys": str(folder / "ids.npy")}),
        "source": (TOKENS, {"source": as_file(folder, items())}),
        "two sources": (TOKENS, {"source": halves, "lengths": [40, len(items()) - 40]}),
        "source in a table": (TOKENS, {"source": folder / "table" / "train-0.parquet", "id_column": "uid"}),
        "source as a name": (TOKENS, {"source": f"{folder / 'table'}:train", "id_column": "uid"}),
    }


def test_every_way_to_join_draws_the_same(finished_store: Path, expected: DensitySampler, tmp_path: Path) -> None:
    for way, (dataset, options) in joins(finished_store, tmp_path).items():
        sampler = StoreSampler(dataset, store=finished_store, seed=SEED, num_samples=200, **options)
        assert isinstance(sampler, Sampler)
        assert list(sampler) == expected.plan(0).tolist(), way
        assert sampler.state_dict() == {**expected.state_dict(), "epoch": 1}, way
    rows = [{"input_ids": [1]}] * 70
    sampler = StoreSampler(rows, store=finished_store, positional=True)
    assert list(sampler) == DensitySampler(load_weights(finished_store), positional=True).plan(0).tolist()


class HeldAsDataframe:
    """A dataset of verl: chats in ``dataframe``, and items that are something else."""

    def __init__(self, texts: list[str]) -> None:
        chats = [[{"role": "user", "content": text}] for text in texts]
        self.dataframe = datasets.Dataset.from_dict({"question": chats})

    def __len__(self) -> int:
        return len(self.dataframe)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"input_ids": [1]}


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_settings_of_a_trainer_are_options(finished_store: Path, tmp_path: Path) -> None:
    """The prompt's column and the seed are the trainer's, unless the density part says otherwise."""
    texts = [line["prompt"] for line in small_lines()[1:] if "prompt" in line]
    np.save(tmp_path / "keys.npy", prompt_keys(texts))
    weights = load_weights(finished_store).for_dataset(texts)
    cases: list[tuple[int | None, dict[str, Any], int]] = [
        (9, {}, 9),
        (None, {}, 0),
        (9, {"seed": 3}, 3),
        (9, {"keys": str(tmp_path / "keys.npy"), "num_samples": len(texts)}, 9),
    ]
    for seed, density, expected in cases:
        settings = {"prompt_key": "question", "seed": seed, "density": {"store": str(finished_store), **density}}
        sampler = StoreSampler(data_source=HeldAsDataframe(texts), data_config=settings)
        assert list(sampler) == DensitySampler(weights, seed=expected).plan(0).tolist()
    settings["density"]["key_column"] = "answer"  # type: ignore[index]
    del settings["density"]["keys"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no column answer"):
        StoreSampler(HeldAsDataframe(texts), settings)


def test_what_cannot_be_joined_is_refused(finished_store: Path, tmp_path: Path) -> None:
    short = as_file(tmp_path, items()[:-1])
    store = {"store": finished_store}
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (items(), {}, ConfigError, "was given no store"),
        (TOKENS, store, ConfigError, "are tokens, and have no prompt to join by: input_ids, attention_mask, num_actions"),
        (datasets.Dataset.from_list(TOKENS), store, ConfigError, "are tokens"),
        (
            TOKENS,
            store | {"positional": True},
            LengthMismatchError,
            f"70 rows, the trainer's dataset has {len(TOKENS)} items",
        ),
        (TOKENS, store | {"source": short}, LengthMismatchError, "source has .* rows, the trainer's dataset"),
        (TOKENS, store | {"source": short, "lengths": [1, 2]}, LengthMismatchError, r"the trainer's datasets have \[1, 2\]"),
        (TOKENS, store | {"keys": [1, 2], "on_missing": "mean"}, KeyMismatchError, "2 of 2 items have no row"),
        (TOKENS, store | {"keys": prompt_keys(items())[1:]}, LengthMismatchError, "keys has .* rows"),
        (TOKENS, store | {"keys": [1], "positional": True}, ConfigError, "three ways to join"),
        ([], store, KeyMismatchError, "the dataset has no items"),
    ]
    for dataset, options, kind, complaint in refused:
        with pytest.raises(kind, match=complaint) as caught:
            StoreSampler(dataset, **options)
        assert getattr(caught.value, "hint", None)
    for settings, complaint in [
        ({"seed": 1}, "no density part"),
        ({"density": "STORE"}, "density is 'STORE', not a group of options"),
        ({"density": {"store": str(finished_store), "nmae": "x"}}, "density has no option nmae"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            StoreSampler(items(), settings)
    with pytest.raises(ConfigError, match="the store is given twice"):
        StoreSampler(items(), {"density": {"store": "OTHER"}}, store=finished_store)
    own = StoreSampler(items(), {"seed": 9}, store=finished_store, seed=SEED)  # as its signature says
    assert own.plan(0).tolist() == StoreSampler(items(), store=finished_store, seed=SEED).plan(0).tolist()


@pytest.fixture(params=["DensitySampler", "GroupRepeat", "StoreSampler"])
def make(request: pytest.FixtureRequest, finished_store: Path, expected: DensitySampler) -> Callable[[], Any]:
    """Makes the same sampler again and again."""
    weights = load_weights(finished_store).for_dataset(items())
    return {
        "DensitySampler": lambda: DensitySampler(weights, num_samples=30, seed=SEED),
        "GroupRepeat": lambda: GroupRepeat(DensitySampler(weights, num_samples=14, seed=SEED), 2, 3, 2),
        "StoreSampler": lambda: StoreSampler(items(), store=finished_store, num_samples=30, seed=SEED),
    }[str(request.param)]


def endless(iterable: Any) -> itertools.chain[Any]:
    return itertools.chain.from_iterable(iter(iterable) for _ in itertools.count())


def test_states_are_what_torch_loads_with_weights_only(make: Callable[[], Any], tmp_path: Path) -> None:
    """NeMo-RL loads them so; every third stop in two epochs goes on exactly, their ends among them."""
    length = len(make())
    whole = list(itertools.islice(endless(make()), 3 * length))
    for stop in range(0, 2 * length + 1, 3):
        sampler = make()
        seen = list(itertools.islice(endless(sampler), stop))
        torch.save(sampler.state_dict(), tmp_path / "state.pt")
        again = make()
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert seen + list(itertools.islice(endless(again), 3 * length - stop)) == whole, stop


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 under torch 2.13
@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 12)), (2, (3,))])
def test_so_is_the_state_of_a_loader_that_has_one(make: Callable[[], Any], workers: int, stops: Any, tmp_path: Path) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(items(), batch_size=4, sampler=make(), num_workers=workers, collate_fn=list)

    whole = [items()[row] for row in make().plan(0)]
    for stop in stops:
        if stop * 4 >= len(whole):
            continue
        first = loader()
        seen = list(itertools.chain.from_iterable(itertools.islice(first, stop)))
        torch.save(first.state_dict(), tmp_path / "data.pt")
        del first
        again = loader()
        again.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=True))
        assert seen + list(itertools.chain.from_iterable(again)) == whole, (stop, workers)
