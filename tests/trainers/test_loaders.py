"""accelerate's loaders and plain DDP, on two processes, and loaders' workers by every way of starting a process."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.training import DensitySampler
from tests.support.loader_runs import BATCH, EPOCHS, ROWS, SETTINGS, Batches, draws, restored, whole
from tests.support.pages import run_page

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 under torch 2.13
]

PLAN = [int(row) for epoch in range(EPOCHS) for row in draws().plan(epoch)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes of one torchrun wrote down."""
    out = tmp_path_factory.mktemp("loaders")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.support.loader_runs",
        str(out),
    ]
    environment, root = {**os.environ, "OMP_NUM_THREADS": "1"}, Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def by_steps(runs: Iterable[Batches]) -> list[int]:
    """The rows of all processes, step by step."""
    return [row for step in zip(*runs, strict=True) for share in step for row in share]


@pytest.mark.parametrize("name", SETTINGS)
def test_accelerate_hands_out_the_plan_whatever_its_settings(
    name: str, ranks: list[dict[str, Any]], evidence: Callable[..., None]
) -> None:
    runs = [rank["accelerate"][name] for rank in ranks]
    whole = [run["whole"] for run in runs]
    assert by_steps(whole) == PLAN
    dispatches, splits = SETTINGS[name]["dispatch_batches"], SETTINGS[name]["split_batches"]
    way = "skipped twice" if dispatches and not splits else "skipped"
    ways = [each for each in (way, "restored") if each in runs[0] and not (dispatches and each == "restored")]
    for run, rest in itertools.product(runs, ways):
        for stop, found in run[rest].items():
            assert found == run["whole"][int(stop) :], (rest, stop)
    exact = sum(len(runs[0][rest]) for rest in ways)
    version = importlib.metadata.version("accelerate")
    evidence(trainer="accelerate", version=version, kind="run", what="loaders of 2 processes", stops=exact, exact=exact)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("dispatch_batches even_batches", "skipped"),
        ("dispatch_batches even_batches use_stateful_dataloader", "restored"),
        ("split_batches dispatch_batches even_batches use_stateful_dataloader", "restored"),
    ],
)
def test_a_loader_that_dispatches_skips_too_little_and_saves_a_wrong_state(
    name: str, way: str, ranks: list[dict[str, Any]]
) -> None:
    """accelerate 1.15 does so with any sampler: the first process reads a batch for each of them, and counts one."""
    run = ranks[0]["accelerate"][name]
    assert [stop for stop, found in run[way].items() if found != run["whole"][int(stop) :]]


def test_an_epoch_that_is_not_announced_after_a_state_was_loaded_is_drawn_anew(tmp_path: Path) -> None:
    settings = SETTINGS["use_stateful_dataloader"]
    length, stop = ROWS // BATCH, ROWS // BATCH + 2
    rest = whole(settings)[stop:]
    assert restored(settings, stop, length, tmp_path / "a") == rest
    assert restored(settings, stop, length, tmp_path / "b", announce=False) != rest


def test_a_last_batch_that_is_not_whole_is_filled_with_the_first_draws(ranks: list[dict[str, Any]]) -> None:
    plan = draws(num_samples=ROWS - 3).plan(0).tolist()
    filled, short = ([rank["uneven"][at] for rank in ranks] for at in (0, 1))
    steps = 3
    assert by_steps([run[:steps] for run in filled]) == plan + plan[:3]
    assert by_steps([run[:steps] for run in short]) == plan


def test_a_sampler_that_knows_its_rank_is_split_twice_by_accelerate(ranks: list[dict[str, Any]]) -> None:
    drawn = Counter(row for rank in ranks for batch in rank["split twice"] for row in batch)
    assert (Counter(PLAN) - drawn).total() >= len(PLAN) // 3  # never trained on


@pytest.mark.parametrize("name", ["auto", "given"])
def test_plain_ddp_draws_the_plan_and_resumes_exactly(
    name: str, ranks: list[dict[str, Any]], evidence: Callable[..., None]
) -> None:
    runs = [rank["ddp"][name] for rank in ranks]
    alternating = zip(*([row for batch in run["whole"] for row in batch] for run in runs), strict=True)
    assert list(itertools.chain.from_iterable(alternating)) == PLAN
    for each in runs:
        for stop, found in each["restored"].items():
            assert found == each["whole"][int(stop) :], stop
    exact = len(runs[0]["restored"])
    version = importlib.metadata.version("torch")
    evidence(trainer="torch", version=version, kind="run", what="DDP of 2 processes", stops=exact, exact=exact)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_workers_hand_out_the_plan_however_they_start(
    start: str, loader: type[DataLoader[int]], evidence: Callable[..., None]
) -> None:
    batches = loader(
        range(ROWS),  # type: ignore[arg-type]
        batch_size=BATCH,
        sampler=draws(),
        num_workers=2,
        multiprocessing_context=start,
        persistent_workers=True,
    )
    assert [int(row) for _ in range(EPOCHS) for batch in batches for row in batch] == PLAN
    evidence(trainer="torch", version=importlib.metadata.version("torch"), kind="run", what=f"{loader.__name__}, 2 workers")


@pytest.mark.parametrize("page", ["accelerate", "torch"])
def test_the_page_hands_out_the_plan(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(page, tmp_path)
    names["loader"].set_epoch(0) if page == "accelerate" else names["sampler"].set_epoch(0)
    drawn = [row["id"] for batch in names["loader"] for row in batch]
    plan = DensitySampler(names["weights"], seed=0).plan(0).tolist()
    assert drawn == [names["dataset"][row]["id"] for row in plan]
