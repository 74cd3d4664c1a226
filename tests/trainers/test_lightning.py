"""Lightning: its default splits a sampler, shuffles it and fills it up; a sampler that knows its rank needs it off."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.support.pages import run_page

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]  # Lightning's tips about workers and loggers


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def plan() -> list[int]:
    from tests.support.lightning_runs import EPOCHS, draws

    return [int(row) for epoch in range(EPOCHS) for row in draws().plan(epoch)]


def test_one_process_draws_the_plan_and_resumes_exactly(tmp_path: Path, evidence: Callable[..., None]) -> None:
    from tests.support.lightning_runs import draws, fit

    whole = fit(draws(), tmp_path)
    assert flat(whole) == plan()
    stops = range(1, len(whole))
    for stop in stops:
        assert fit(draws(), tmp_path, stop=stop) == whole[stop:], stop
    exact, version = len(stops), importlib.metadata.version("lightning")
    evidence(trainer="lightning", version=version, kind="run", what="Trainer.fit", stops=exact, exact=exact)


def test_a_loader_without_states_begins_the_epoch_again(tmp_path: Path) -> None:
    """Lightning counts the batches that were done, and draws others for the rest."""
    from tests.support.lightning_runs import EPOCHS, draws, fit

    whole = fit(draws(), tmp_path, loader=DataLoader)
    length = len(whole) // EPOCHS
    assert fit(draws(), tmp_path, loader=DataLoader, stop=length) == whole[length:]
    assert fit(draws(), tmp_path, loader=DataLoader, stop=length + 2) != whole[length + 2 :]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes of one torchrun wrote down."""
    out = tmp_path_factory.mktemp("lightning")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.support.lightning_runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command, str(out)], check=False, capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_draw_the_plan_and_resume_exactly(ranks: list[dict[str, Any]], evidence: Callable[..., None]) -> None:
    alternating = zip(*(flat(rank["aware"]) for rank in ranks), strict=True)
    assert list(itertools.chain.from_iterable(alternating)) == plan()
    stops = [int(stop) for stop in ranks[0]["resumed"]]
    for rank, stop in itertools.product(ranks, stops):
        assert rank["resumed"][str(stop)] == rank["aware"][stop:], stop
    exact = len(stops)
    version = importlib.metadata.version("lightning")
    evidence(trainer="lightning", version=version, kind="run", what="DDP of 2 processes", stops=exact, exact=exact)


def test_its_default_keeps_the_draws_and_shuffles_them(ranks: list[dict[str, Any]]) -> None:
    alternating = list(itertools.chain.from_iterable(zip(*(flat(rank["split"]) for rank in ranks), strict=True)))
    assert alternating != plan()
    assert Counter(alternating) == Counter(plan())


def test_its_default_splits_a_sampler_that_knows_its_rank_again(ranks: list[dict[str, Any]]) -> None:
    drawn = Counter(row for rank in ranks for row in flat(rank["split twice"]))
    assert drawn.total() == len(plan()) // 2
    assert drawn < Counter(plan())


def test_without_the_default_a_sampler_without_a_rank_gives_every_process_all_draws(ranks: list[dict[str, Any]]) -> None:
    assert [flat(rank["not split"]) for rank in ranks] == [plan()] * 2


def test_the_page_hands_out_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("lightning", tmp_path)
    drawn = [row["id"] for batch in names["loader"] for row in batch]
    assert drawn == [names["dataset"][row]["id"] for row in names["sampler"].plan(0).tolist()]
