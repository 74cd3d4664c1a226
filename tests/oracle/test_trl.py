"""Density sampling in real trainers: TRL's own order of groups, the same order on every process, and exact resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, GRPOConfig, RLOOConfig
from trl.trainer.utils import RepeatSampler

from embstore.core.errors import ConfigError, LengthMismatchError
from embstore.training import DensitySampler
from tests.support import trl_runs
from tests.support.models import make_tokenizer
from tests.support.trl_runs import (
    COMMON,
    GROUP,
    PROMPTS,
    RESUMED,
    WEIGHTS,
    DensityDPO,
    DensityGRPO,
    DensityRLOO,
    DensityTrainer,
    make_folder,
    run_all,
    run_grpo,
    sampler,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trl")
    make_folder(root / "model")
    return root


def plan(epochs: int) -> list[str]:
    """The prompts of so many epochs, in order."""
    return [PROMPTS[index] for epoch in range(epochs) for index in sampler().plan(epoch)]


def make_grouped(folder: Path, trainer: type, config: type, *, density_sampler: DensitySampler, **settings: Any) -> Any:
    return trainer(
        model=str(folder / "model"),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=config(
            output_dir=str(folder / "none"),
            max_steps=1,
            num_generations=GROUP,
            **(COMMON | {"save_strategy": "no"} | settings),
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        density_sampler=density_sampler,
    )


@pytest.mark.parametrize(("trainer", "config"), [(DensityGRPO, GRPOConfig), (DensityRLOO, RLOOConfig)])
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 3},
    ],
)
def test_groups_are_repeated_as_trl_itself_repeats_them(
    folder: Path, trainer: type, config: type, settings: dict[str, int]
) -> None:
    made = make_grouped(folder, trainer, config, density_sampler=sampler(), **settings)
    own = trainer._get_train_sampler(made)  # type: ignore[attr-defined]  # the class's: what TRL itself would use
    assert isinstance(own, RepeatSampler)
    over_places = RepeatSampler(
        PROMPTS, own.mini_repeat_count, batch_size=own.batch_size, repeat_count=own.repeat_count, shuffle=False
    )
    order = sampler().plan(0)
    ours = made._get_train_sampler()
    assert list(ours) == [order[place] for place in over_places]
    assert len(ours) == len(over_places) > 0


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_run_on_one_process_draws_the_plan_and_resumes_exactly(folder: Path, kind: str) -> None:
    make_folder(folder / "one" / "model")
    records = run_all(folder / "one", kind, world_size=1)
    check(kind, {name: [record] for name, record in records.items()})


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Path:
    """What each of two processes of one torchrun wrote down."""
    out = folder / "two"
    make_folder(out / "model")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.support.trl_runs", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_two_processes_see_one_order_and_resume_exactly(
    two_processes: Path, kind: str, evidence: Callable[..., None]
) -> None:
    def read(name: str) -> list[trl_runs.Record]:
        files = [two_processes / f"{kind}-{name}-{rank}.json" for rank in range(2)]
        return [trl_runs.Record(**json.loads(file.read_text())) for file in files]

    check(kind, {name: read(name) for name in ("whole", *RESUMED[kind])})
    stops = len(RESUMED[kind])
    what = f"{kind.upper()} on two processes"
    evidence(trainer="trl", version=trl.__version__, kind="run", what=what, stops=stops, exact=stops)


def test_a_loader_that_only_the_first_process_reads_draws_the_plan(two_processes: Path) -> None:
    records = [json.loads((two_processes / f"sft-dispatched-{rank}.json").read_text()) for rank in range(2)]
    calls = zip(*(record["prompts"] for record in records), strict=True)
    assert [prompt for shares in calls for share in shares for prompt in share] == plan(1)[:8]


def check(kind: str, runs: dict[str, list[trl_runs.Record]]) -> None:
    """Every run's prompts are the plan, whole groups; a resumed one repeats the rest of the uninterrupted one bit by bit."""
    whole = runs["whole"]
    calls = list(zip(*(record.prompts for record in whole), strict=True))  # of each process, batch by batch
    if kind == "grpo":
        drawn = []
        for shares in calls:
            together = [prompt for share in shares for prompt in share]
            assert len({len(share) for share in shares}) == 1
            assert Counter(together) == {together[0]: GROUP}
            drawn.append(together[0])
    else:
        drawn = [prompt for shares in calls for share in shares for prompt in share]
    assert drawn == plan(3)[: len(drawn)]
    assert len(drawn) == {"grpo": 25, "sft": 24}[kind]
    for name, step in RESUMED[kind].items():
        for before, after in zip(whole, runs[name], strict=True):
            assert after.prompts == before.prompts[step:]
            assert after.completions == before.completions[step:]
            assert after.losses == {at: loss for at, loss in before.losses.items() if int(at) > step}
            assert after.weights_sha256 == before.weights_sha256


def test_training_again_with_the_same_trainer_starts_at_the_beginning_of_an_epoch(folder: Path) -> None:
    """A loader that was looked into, or a training that stopped inside an epoch, has moved the sampler."""
    moved = sampler()
    trainer = make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=moved, per_device_train_batch_size=4)
    next(iter(trainer.get_train_dataloader()))
    seen: list[str] = []

    def reward(prompts: list[str], **_: object) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(prompts)

    trainer.reward_funcs = [reward]
    trainer.train()
    assert seen == plan(1)[:1] * GROUP
    seen.clear()
    trainer.train()
    assert seen == plan(1)[:1] * GROUP


def test_pairs_are_drawn_one_by_one_and_the_last_partial_batch_is_left_out(folder: Path) -> None:
    rows = [{"prompt": prompt, "chosen": " the", "rejected": " of"} for prompt in PROMPTS]
    trainer = DensityDPO(
        model=str(folder / "model"),
        args=DPOConfig(
            output_dir=str(folder / "dpo"), per_device_train_batch_size=3, max_steps=4, save_strategy="no", **COMMON
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        density_sampler=sampler(),
    )
    assert list(trainer._get_train_sampler()) == sampler().plan(0)[:9].tolist()
    assert trainer.train().global_step == 4


def test_the_plain_trainer_sees_the_plan_epoch_by_epoch(folder: Path, evidence: Callable[..., None]) -> None:
    seen: list[int] = []

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        seen.extend(row["token"] for row in rows)
        tokens = torch.tensor([[row["token"]] * 4 for row in rows])
        return {"input_ids": tokens, "labels": tokens}

    trainer = DensityTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(
            output_dir=str(folder / "plain"),
            per_device_train_batch_size=5,
            num_train_epochs=3,
            save_strategy="no",
            remove_unused_columns=False,
            **COMMON,
        ),
        train_dataset=[{"token": 10 + row} for row in range(len(PROMPTS))],
        data_collator=collate,
        density_sampler=sampler(),
    )
    trainer.train()
    assert seen == [10 + row for epoch in range(3) for row in sampler().plan(epoch)]
    evidence(trainer="transformers", version=transformers.__version__, kind="run", what="Trainer, three epochs")


def test_a_dataset_of_another_length_is_refused(folder: Path) -> None:
    longer = DensitySampler(np.ones(len(PROMPTS) + 1))
    with pytest.raises(LengthMismatchError, match="over 11 weights, the trainer's dataset has 10 rows") as caught:
        make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=longer, per_device_train_batch_size=4)
    assert "attach(trainer, load_weights(STORE))" in str(caught.value.hint)
    trainer = make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=sampler(), per_device_train_batch_size=4)
    trainer.train_dataset = Dataset.from_dict({"prompt": PROMPTS[1:]})
    with pytest.raises(LengthMismatchError, match="over 10 weights, the trainer's dataset has 9 rows"):
        trainer.train()


def test_a_sampler_that_is_split_by_rank_is_refused(folder: Path) -> None:
    split = DensitySampler(WEIGHTS, rank=0, num_replicas=2)
    with pytest.raises(ConfigError, match="split into 2 ranks"):
        make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=split, per_device_train_batch_size=4)


def test_a_stream_is_refused(folder: Path) -> None:
    stream = Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()
    with pytest.raises(ConfigError, match="a stream cannot be sampled"):
        DensityGRPO(
            model=str(folder / "model"),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=GRPOConfig(
                output_dir=str(folder / "none"),
                max_steps=1,
                num_generations=GROUP,
                per_device_train_batch_size=4,
                **COMMON,
            ),
            train_dataset=stream,
            processing_class=make_tokenizer(),
            density_sampler=sampler(),
        )


def test_an_epoch_shorter_than_a_batch_is_refused(folder: Path) -> None:
    short = DensitySampler(WEIGHTS, num_samples=2)
    trainer = make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=short, per_device_train_batch_size=12)
    with pytest.raises(ConfigError, match="an epoch of 2 draws is shorter than a batch of prompts_per_batch 3"):
        trainer.train()


def test_checkpoints_inside_a_generated_batch_are_warned_of(folder: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "num_iterations": 2, "save_strategy": "steps"}
    trainer = make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=sampler(), save_steps=3, **settings)
    with pytest.warns(UserWarning, match="save_steps=3 falls inside a generated batch"):
        trainer._get_train_sampler()
    aligned = make_grouped(folder, DensityGRPO, GRPOConfig, density_sampler=sampler(), save_steps=4, **settings)
    aligned._get_train_sampler()  # warnings are errors here


def test_prompts_of_a_long_run_follow_their_weights(folder: Path) -> None:
    """Two epochs of ten draws each hold every prompt as often as its weight says, within one an epoch."""
    record = run_grpo(folder / "model", folder / "long", max_steps=20, per_device_train_batch_size=GROUP, save_strategy="no")
    counts = Counter(batch[0] for batch in record.prompts)
    expected = 10 * WEIGHTS / WEIGHTS.sum()
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        assert abs(counts[prompt] - 2 * wanted) < 2
