"""ms-swift trains on the resampled file of its page: its command line, data, trainers and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.recipes import DRAWS, ITEMS, Recipe, number_in

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # of ms-swift and what it imports
]

BATCH = 2 * 4  # of the page's command
# of the small model, and of a machine without a GPU
HERE = ["--model_type", "llama", "--template", "chatml", "--torch_dtype", "float32", "--use_cpu", "true"]
HERE += ["--report_to", "none", "--save_steps", "1"]


def rows(*, long: int | None = None) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Explain row {number}!"},
                {"role": "assistant", "content": f"Answer {number}." * (40 if number == long else 1)},
            ]
        }
        for number in range(ITEMS)
    ]


def trained(words: list[str], *more: str) -> list[int]:
    """Rows in the order of training, by the command itself; options that come again count."""
    from swift.pipelines import sft_main
    from swift.trainers import Seq2SeqTrainer
    from transformers import AutoTokenizer

    seen: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained("MODEL")
    original = Seq2SeqTrainer.compute_loss

    def recording(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        seen.extend(number_in(tokenizer.decode(row)) for row in inputs["input_ids"])
        return original(self, model, inputs, *args, **options)

    Seq2SeqTrainer.compute_loss = recording
    try:
        sft_main([*words, *HERE, *more])
    finally:
        Seq2SeqTrainer.compute_loss = original
    return seen


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    return Recipe("ms-swift", tmp_path, monkeypatch)


def test_rows_are_trained_in_the_order_of_the_draws_and_after_every_stop(recipe: Recipe, evidence: Any) -> None:
    recipe.draw(rows())
    words = recipe.words("swift sft ")
    assert trained(words) == recipe.order
    stops = range(1, DRAWS // BATCH)
    for stop in stops:
        checkpoint = ["--resume_from_checkpoint", f"output/density/checkpoint-{stop}", "--output_dir", f"again-{stop}"]
        assert trained(words, *checkpoint) == recipe.order[stop * BATCH :], stop
    assert trained(words, "--num_train_epochs", "2", "--output_dir", "twice") == 2 * recipe.order  # the same draws again
    evidence(
        trainer="ms-swift",
        version="4.6.0",
        kind="run",
        what="its SFT run on the file of the page",
        stops=len(stops),
        exact=len(stops),
    )


@pytest.mark.parametrize("setting", ["--dataset_shuffle", "--train_dataloader_shuffle"])
def test_either_setting_alone_leaves_the_rows_shuffled(recipe: Recipe, setting: str) -> None:
    recipe.draw(rows())
    seen = trained(recipe.words("swift sft "), setting, "true")
    assert seen != recipe.order
    assert sorted(seen) == sorted(recipe.order)


def test_rows_that_are_too_long_are_left_out_and_the_run_is_shorter(recipe: Recipe) -> None:
    recipe.draw(rows(long=7))
    assert 7 in recipe.order
    seen = trained(recipe.words("swift sft "), "--max_length", "120", "--gradient_accumulation_steps", "1")
    left = [row for row in recipe.order if row != 7]
    assert seen == left


def test_kto_shuffles_whatever_the_settings_are(recipe: Recipe) -> None:
    from datasets import Dataset
    from swift.pipelines.train.kto import _get_kl_dataset

    chats = [each["messages"] for each in rows()]
    shuffled = _get_kl_dataset(Dataset.from_dict({"messages": chats}), total_batch_size=4, num_proc=1, seed=42)
    assert shuffled["messages"] != chats
    assert sorted(map(str, shuffled["messages"])) == sorted(map(str, chats))


def test_grpo_generates_for_the_draws_in_order_and_after_every_stop(recipe: Recipe, evidence: Any) -> None:
    from swift.pipelines import rlhf_main
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    recipe.draw(rows(), draws=45)
    recipe.order = recipe.order[:24]  # what the run is told to train on: 6 batches of 4 prompts
    words = [
        *recipe.words("swift rlhf "),
        *HERE,
        "--max_completion_length",
        "2",
        "--max_steps",
        "6",
        "--add_version",
        "false",
    ]
    seen: list[int] = []
    original = GRPOTrainer._generate_and_score_completions

    def recording(self: Any, inputs: Any) -> Any:
        seen.extend(number_in(str(each["messages"])) for each in inputs)
        return original(self, inputs)

    GRPOTrainer._generate_and_score_completions = recording
    try:
        rlhf_main(words)
        assert seen == [row for row in recipe.order for _ in range(4)]
        stops = (1, 3, 5)
        for stop in stops:
            seen.clear()
            rlhf_main(
                [*words, "--resume_from_checkpoint", f"output/grpo/checkpoint-{stop}", "--output_dir", f"again-{stop}"]
            )
            assert seen == [row for row in recipe.order[4 * stop :] for _ in range(4)], stop
    finally:
        GRPOTrainer._generate_and_score_completions = original
    evidence(
        trainer="ms-swift",
        version="4.6.0",
        kind="run",
        what="its GRPO run on the file of the page",
        stops=len(stops),
        exact=len(stops),
    )
