"""unsloth on CPUs, where it has SFTTrainer only: its models and its patched trainer, with ``attach`` and the mixin."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from embstore.core.errors import KeyMismatchError
from embstore.integrations.trl import DensitySampling, attach
from embstore.training import DensitySampler, load_weights
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.pages import run_page

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]  # unsloth's own, and of what it patches

PROMPTS = [f"Explain number {row}." for row in range(12)]
WEIGHTS = np.random.default_rng(1).gamma(1, size=len(PROMPTS))
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unsloth")
    save_model(root / "model", make_model("llama"), make_tokenizer(template=True))
    return root


@pytest.fixture(autouse=True)
def unsloth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imported before trl is, as its documentation demands; it writes its compiled code into the working directory."""
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import unsloth

    yield unsloth
    torch.set_num_threads(before)


def made(unsloth: Any, folder: Path, how: str) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=64, load_in_4bit=False, dtype=torch.float32
    )
    model = unsloth.FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "up_proj"], random_state=1)
    settings: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"text": PROMPTS}),
        "args": SFTConfig(
            output_dir=str(folder / how),
            per_device_train_batch_size=4,
            max_steps=5,
            save_steps=1,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
        ),
    }
    if how == "attach":
        return attach(SFTTrainer(**settings), WEIGHTS, seed=SEED)

    class DensitySFT(DensitySampling, SFTTrainer):  # type: ignore[misc]
        pass

    return DensitySFT(**settings, density_sampler=DensitySampler(WEIGHTS, seed=SEED))


def trained(trainer: Any, checkpoint: Path | None = None) -> list[str]:
    """The texts that a loss was computed of, in order."""
    seen: list[str] = []
    loss = trainer.compute_loss

    def noted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.extend(trainer.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return seen


@pytest.mark.parametrize("how", ["attach", "mixin"])
def test_supervised_training_draws_the_plan_and_resumes_exactly(
    how: str, unsloth: Any, folder: Path, evidence: Callable[..., None]
) -> None:
    trainer = made(unsloth, folder, how)
    assert any("_make_cpu_sft_trainer" in each.__qualname__ for each in type(trainer).__mro__)
    whole = trained(trainer)
    plan = [PROMPTS[row] for epoch in range(2) for row in DensitySampler(WEIGHTS, seed=SEED).plan(epoch)]
    assert whole == plan[:20]
    for stop in (1, 2, 3, 4):
        assert trained(made(unsloth, folder, how), folder / how / f"checkpoint-{stop}") == whole[4 * stop :]
    version = importlib.metadata.version("unsloth")
    evidence(trainer="unsloth", version=version, kind="run", what="SFTTrainer on CPUs, LoRA", stops=4, exact=4)


def test_the_hook_of_grpo_is_trls_own(unsloth: Any) -> None:
    """unsloth trains GRPO on GPUs only; what it replaces of the trainer leaves the hook as it is."""
    import trl
    from trl.trainer import grpo_trainer

    assert trl.GRPOTrainer._get_train_sampler.__code__.co_filename == grpo_trainer.__file__


def test_the_page_trains_and_its_texts_have_another_end(folder: Path) -> None:
    trainer = run_page("unsloth", folder)["trainer"]
    assert trainer.state.global_step == 3
    with pytest.raises(KeyMismatchError):
        load_weights("STORE").for_dataset(trainer.train_dataset, key_column="text")
