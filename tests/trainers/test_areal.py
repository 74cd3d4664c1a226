"""AReaL reads the resampled file of its page: its parser, loader, cycle of passes, and the state that it saves.

Servers, rollouts and kernels are stood in for; nothing is generated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embstore.training import DensitySampler
from tests.support.absent import absent
from tests.support.recipes import DRAWS, ITEMS, Recipe, number_in

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # of AReaL and what it imports
]

ROWS = [
    {"prompt": [{"role": "user", "content": f"Explain row {number}!"}], "answer": str(number)} for number in range(ITEMS)
]
BATCH = 8  # of the page's configuration
NAMES = {"experiment_name": "density", "trial_name": "first"}
# what a configuration has besides the page's part
REST = {
    **NAMES,
    "tokenizer_path": "MODEL",
    "cluster": {"fileroot": "experiments"},
    "actor": {**NAMES, "path": "MODEL", "backend": "fsdp:d1"},
    "rollout": {**NAMES, "backend": "sglang:d1"},
    **{part: {**NAMES, "fileroot": "experiments"} for part in ("saver", "recover", "evaluator", "stats_logger")},
}
NOT_HERE = ("aiofiles", "flask", "math_verify", "msgspec", "numba", "openai", "orjson", "pybase64", "redis", "swanboard")
NOT_HERE += ("swanlab", "tensorboardX", "trackio", "uvicorn", "wandb", "werkzeug", "zmq", "fastapi", "litellm", "anthropic")


@pytest.fixture(scope="module")
def areal() -> SimpleNamespace:
    """The parts of AReaL that are used."""
    with absent(*NOT_HERE):
        import areal
        import areal.utils.stats_logger
        from areal.utils.data import cycle_dataloader
        from areal.utils.dataloader import create_dataloader
        from areal.utils.recover import RecoverInfo, StepInfo
    return SimpleNamespace(
        module=areal, cycle=cycle_dataloader, create=create_dataloader, RecoverInfo=RecoverInfo, StepInfo=StepInfo
    )


Loader = Callable[..., Any]


@pytest.fixture
def page(
    areal: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], Callable[..., Any], Any]:
    """The draws, and what makes the loader that a trainer makes of what the page's script hands to it."""
    import yaml

    recipe = Recipe("areal", tmp_path, monkeypatch)
    recipe.draw(ROWS)
    (config,), (script,) = recipe.blocks("yaml"), recipe.blocks("python")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(REST | yaml.safe_load(config)))
    given: list[Any] = []

    class Trainer:
        def __init__(self, config: Any, *, train_dataset: Any) -> None:
            given[:] = [config, train_dataset]

        def __enter__(self) -> Any:
            return SimpleNamespace(train=lambda workflow: None)

        def __exit__(self, *raised: object) -> None:
            """Nothing was started."""

    monkeypatch.setitem(vars(areal.module), "PPOTrainer", Trainer)  # asking for AReaL's own would import its servers
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.yaml"])
    exec(compile(script, "the page's script", "exec"), {})
    parsed, dataset = given
    assert parsed.total_train_epochs == 1

    def loader(**changes: Any) -> Any:
        for name, value in changes.items():
            setattr(parsed.train_dataset, name, value)
        return areal.create(dataset, rank=0, world_size=1, dataset_config=parsed.train_dataset)

    return recipe.order, loader, dataset


def rows_of(batches: Iterator[Any], count: int) -> list[int]:
    return [number_in(str(item["prompt"])) for batch in islice(batches, count) for item in batch]


def saved_and_loaded(areal: SimpleNamespace, loader: Any, folder: Path) -> Any:
    """The loader's state by way of AReaL's own files."""
    step = areal.StepInfo(epoch=0, epoch_step=0, global_step=0, steps_per_epoch=1)
    areal.RecoverInfo(
        last_step_info=step,
        saver_info={},
        evaluator_info={},
        stats_logger_info={},
        dataloader_info=loader.state_dict(),
        checkpoint_info={},
    ).dump(str(folder))
    return areal.RecoverInfo.load(str(folder)).dataloader_info


def after_a_stop(areal: SimpleNamespace, make: Callable[[], Any], stop: int, batches: int, folder: Path) -> list[int]:
    """What is read when the run is stopped after this many batches, and continued by another process."""
    first = make()
    passes = areal.cycle(first)
    seen = rows_of(passes, stop)
    state = saved_and_loaded(areal, first, folder)
    again = make()
    again.load_state_dict(state)
    return seen + rows_of(areal.cycle(again), batches - stop)


def test_one_pass_follows_the_draws_and_goes_on_after_every_stop(
    areal: SimpleNamespace, page: Any, tmp_path: Path, evidence: Any
) -> None:
    order, loader, _ = page
    batches = DRAWS // BATCH
    assert len(loader()) == batches
    assert rows_of(areal.cycle(loader()), batches) == order
    stops = range(1, batches)
    for stop in stops:
        assert after_a_stop(areal, loader, stop, batches, tmp_path / "recover") == order, stop
    assert rows_of(areal.cycle(loader()), 2 * batches) == 2 * order  # a second pass has the same draws again
    evidence(
        trainer="areal",
        version="1.0.4",
        kind="run",
        what="its loader and saved state on the file of the page (rollouts stood in for)",
        stops=len(stops),
        exact=len(stops),
    )


def test_with_shuffle_a_resumed_second_pass_is_another_one(areal: SimpleNamespace, page: Any, tmp_path: Path) -> None:
    """After a resume it counts passes from 0 again: the rest is that of the first pass, so rows come twice or not at all."""
    order, loader, _ = page
    batches = DRAWS // BATCH
    loader(shuffle=True)
    whole = rows_of(areal.cycle(loader()), 2 * batches)
    assert whole[:DRAWS] != order
    assert sorted(whole[:DRAWS]) == sorted(order)
    stop = batches + 2
    resumed = after_a_stop(areal, loader, stop, 2 * batches, tmp_path / "recover")
    assert resumed[: stop * BATCH] == whole[: stop * BATCH]
    assert resumed[stop * BATCH :] == whole[2 * BATCH : DRAWS] != whole[stop * BATCH :]


@pytest.mark.parametrize("recount", [False, True])
def test_a_sampler_needs_recount_epochs(
    areal: SimpleNamespace, page: Any, tmp_path: Path, recount: bool, evidence: Any
) -> None:
    """In a loader like AReaL's own, under its cycle of passes: each pass has its own draws."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    _, _, dataset = page
    weights = np.random.default_rng(3).gamma(0.7, size=len(dataset))

    def make() -> Any:
        sampler = DensitySampler(weights, num_samples=24, seed=5, recount_epochs=recount)
        return StatefulDataLoader(dataset, batch_size=BATCH, sampler=sampler, drop_last=True, collate_fn=lambda rows: rows)

    batches = 3  # of a pass
    plan = [DensitySampler(weights, num_samples=24, seed=5).plan(epoch) for epoch in range(4)]
    whole = [number_in(str(dataset[int(row)]["prompt"])) for row in np.concatenate(plan)]
    assert rows_of(areal.cycle(make()), 4 * batches) == whole
    stops = range(1, 3 * batches)
    exact = [stop for stop in stops if after_a_stop(areal, make, stop, 4 * batches, tmp_path / "recover") == whole]
    if recount:
        assert exact == list(stops)
        evidence(
            trainer="areal",
            version="1.0.4",
            kind="run",
            what="DensitySampler(recount_epochs=True) under its cycle of passes",
            stops=len(stops),
            exact=len(exact),
        )
    else:
        assert exact == list(range(1, batches + 1))  # only stops in the first pass
