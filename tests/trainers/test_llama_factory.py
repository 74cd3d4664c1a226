"""LLaMA-Factory trains on the resampled file of its page: its parser, data, trainer and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.absent import absent
from tests.support.recipes import DRAWS, ITEMS, Recipe, number_in

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # of LLaMA-Factory and what it imports
]

ROWS = [{"instruction": f"Explain row {number}!", "input": "", "output": f"Answer {number}."} for number in range(ITEMS)]
BATCH = 4 * 2  # of the page's configuration


def trained(config: dict[str, Any], folder: Path, **changes: Any) -> list[int]:
    """Rows in the order of training, by LLaMA-Factory's own run."""
    with absent("torchaudio"):  # only for audio
        from llamafactory.hparams import get_train_args
        from llamafactory.train.sft import workflow
    from transformers import AutoTokenizer

    seen: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")

    class Recording(workflow.CustomSeq2SeqTrainer):  # type: ignore[misc,name-defined]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(number_in(tokenizer.decode(row)) for row in inputs["input_ids"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    original, workflow.CustomSeq2SeqTrainer = workflow.CustomSeq2SeqTrainer, Recording
    try:
        arguments = get_train_args({**config, **changes})
        workflow.run_sft(*arguments)
    finally:
        workflow.CustomSeq2SeqTrainer = original
    return seen


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, dict[str, Any]]:
    import yaml

    recipe = Recipe("llama-factory", tmp_path, monkeypatch)
    recipe.draw(ROWS)
    (info,) = recipe.blocks("json")
    (tmp_path / "data" / "dataset_info.json").write_text(info)
    (config,) = recipe.blocks("yaml")
    return recipe, yaml.safe_load(config) | {"use_cpu": True, "save_steps": 1}


def test_rows_are_trained_in_the_order_of_the_draws_and_after_every_stop(
    recipe: tuple[Recipe, dict[str, Any]], tmp_path: Path, evidence: Any
) -> None:
    page, config = recipe
    assert trained(config, tmp_path) == page.order
    stops = range(1, DRAWS // BATCH)
    for stop in stops:
        rest = trained(
            config, tmp_path, resume_from_checkpoint=f"saves/density/checkpoint-{stop}", output_dir=f"again-{stop}"
        )
        assert rest == page.order[stop * BATCH :], stop
    evidence(
        trainer="llama-factory",
        version="0.9.5",
        kind="run",
        what="its SFT run on the file of the page",
        stops=len(stops),
        exact=len(stops),
    )


def test_without_disable_shuffling_the_rows_are_the_same_in_another_order(
    recipe: tuple[Recipe, dict[str, Any]], tmp_path: Path
) -> None:
    page, config = recipe
    seen = trained(config, tmp_path, disable_shuffling=False)
    assert seen != page.order
    assert sorted(seen) == sorted(page.order)


def test_a_stream_is_shuffled_in_spite_of_disable_shuffling(recipe: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    page, config = recipe
    seen = trained(config, tmp_path, streaming=True, dataloader_num_workers=1, max_steps=DRAWS // BATCH)
    assert seen != page.order
    assert sorted(seen) == sorted(page.order)


def test_a_second_epoch_repeats_the_draws(recipe: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    page, config = recipe
    assert trained(config, tmp_path, num_train_epochs=2) == 2 * page.order


@pytest.mark.parametrize("stage", ["pt", "rm", "dpo", "kto"])
def test_the_other_stages_read_in_the_order_of_the_file(stage: str, tmp_path: Path) -> None:
    """Their trainers ask the same setting."""
    import importlib
    from types import SimpleNamespace

    from torch.utils.data import SequentialSampler

    with absent("torchaudio"):
        module = importlib.import_module(f"llamafactory.train.{stage}.trainer")
    (trainer,) = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and "_get_train_sampler" in vars(each)
    ]
    asked = SimpleNamespace(finetuning_args=SimpleNamespace(disable_shuffling=True), train_dataset=[0, 1, 2])
    sampler = trainer._get_train_sampler(asked)
    assert isinstance(sampler, SequentialSampler)
    assert list(sampler) == [0, 1, 2]
