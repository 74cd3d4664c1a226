"""Trainers of the installed TRL draw the plan, through the mixin and through attach, and resume exactly at every step.

Run with each version that ``tests/trainers/environments.toml`` has; ``make test`` runs a part with the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from embstore.core.errors import ConfigError
from embstore.integrations.trl import attach
from embstore.training import DensitySampler, load_weights
from tests.support.models import make_tokenizer
from tests.support.trl_kinds import IDS, KINDS, SEED, TEXTS, WAYS, make_store, run
from tests.support.trl_runs import COMMON, make_folder

STEPS = 12  # two prompts each: two epochs and a half of ten rows, four and a half of six
# transformers and TRL deprecate names that each other's versions use
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trl")
    make_folder(root / "model")
    make_store(root)
    return root


def check(kind: str, way: str, folder: Path, stops: list[int]) -> None:
    whole = run(kind, way, folder, steps=STEPS)
    sampler = DensitySampler(load_weights(folder / "STORE").align(whole.kept), seed=SEED)
    plan = [whole.kept[row] for epoch in range(5) for row in sampler.plan(epoch)]
    assert whole.drawn == plan[: 2 * STEPS]
    for stop in stops:
        resumed = run(kind, way, folder, steps=STEPS, resume=stop)
        assert resumed.drawn == whole.drawn[2 * stop :]
        assert resumed.weights_sha256 == whole.weights_sha256
    assert kind != "reward" or len(whole.kept) == 6  # rows that are too long are dropped in every version


@pytest.mark.parametrize(("kind", "way"), [("dpo", "attach"), ("reward", "mixin")])
def test_a_trainer_that_drops_rows_draws_those_that_it_has_kept(kind: str, way: str, folder: Path) -> None:
    check(kind, way, folder, stops=[4])


@pytest.mark.trainers
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_draws_the_plan_and_resumes_exactly_at_every_step(
    kind: str, way: str, folder: Path, evidence: Callable[..., None]
) -> None:
    check(kind, way, folder, stops=list(range(1, STEPS)))
    stops = STEPS - 1
    evidence(trainer="trl", version=trl.__version__, kind="run", what=f"{KINDS[kind]}, {way}", stops=stops, exact=stops)


@pytest.mark.trainers
def test_kto_is_refused_while_it_has_a_kl_term(folder: Path, tmp_path: Path) -> None:
    """Versions differ in where they insist on the dataset's order."""
    rows = {"prompt": TEXTS, "completion": [" the"] * len(TEXTS), "label": [True, False] * (len(TEXTS) // 2)}

    def make(**settings: str) -> Any:
        return trl.KTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=trl.KTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **COMMON, **settings),
            train_dataset=Dataset.from_dict(rows),
            processing_class=make_tokenizer(),
        )

    weights = load_weights(folder / "STORE")
    with pytest.raises(ConfigError, match="KTOTrainer estimates its KL term from neighbours"):
        attach(make(), weights)
    trainer = attach(make(loss_type="apo_zero_unpaired"), weights)
    assert list(trainer._get_train_sampler()) == DensitySampler(weights.align(IDS)).plan(0).tolist()
