"""Real TRL trainers on a tiny model that write down which prompts every step used; also run under torchrun.

``python -m torch.distributed.run --nproc_per_node=2 -m tests.support.trl_runs FOLDER`` does the runs of ``run_all`` in
every process and leaves ``FOLDER/<run>-<rank>.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RLOOTrainer, SFTConfig, SFTTrainer

from embstore.integrations.trl import DensitySampling
from embstore.training import DensitySampler
from tests.support.models import make_model, make_tokenizer, save_model

GROUP = 4
SEED = 7
PROMPTS = [f"{word} {word}" for word in ("the", "of", "sum", "proof", "why", "does", "matrix", "light", "seven", "write")]
WEIGHTS = np.array([4, 1, 1, 2, 1, 1, 3, 1, 1, 1], dtype=np.float64)


class DensityGRPO(DensitySampling, GRPOTrainer):  # type: ignore[misc]
    pass


class DensityRLOO(DensitySampling, RLOOTrainer):  # type: ignore[misc]
    pass


class DensityDPO(DensitySampling, DPOTrainer):  # type: ignore[misc]
    pass


class DensityTrainer(DensitySampling, Trainer):  # type: ignore[misc]
    pass


class DensitySFT(DensitySampling, SFTTrainer):  # type: ignore[misc]
    """Notes the texts of every batch that a loss is computed of."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return super().compute_loss(model, inputs, *args, **kwargs)


@dataclasses.dataclass(kw_only=True)
class Record:
    """Per generated batch (GRPO) or loss (SFT): this process's prompts, in order; and what came out."""

    prompts: list[list[str]]
    completions: list[list[str]]
    losses: dict[str, float]  # by step
    weights_sha256: str


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[str(state.global_step)] = logs["loss"]


def make_folder(folder: Path) -> Path:
    """The tiny model's folder."""
    return save_model(folder, make_model("llama"), make_tokenizer())


def sampler() -> DensitySampler:
    return DensitySampler(WEIGHTS, seed=SEED)


COMMON: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "learning_rate": 1e-3,
}


def run_grpo(model: Path, out: Path, *, resume: int | None = None, **settings: Any) -> Record:
    """Train; ``resume`` goes on from that checkpoint of ``out``."""
    prompts, completions = [], []

    def reward(**columns: Any) -> list[float]:
        prompts.append(list(columns["prompts"]))
        completions.append(list(columns["completions"]))
        return [float(len(set(text))) for text in columns["completions"]]

    config = GRPOConfig(
        output_dir=str(out),
        num_generations=GROUP,
        max_completion_length=4,
        beta=0.0,
        **(COMMON | settings),
    )
    losses = _Losses()
    trainer = DensityGRPO(
        model=str(model),
        reward_funcs=[reward],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        density_sampler=sampler(),
        callbacks=[losses],
    )
    _train(trainer, out, resume)
    return Record(prompts=prompts, completions=completions, losses=losses.losses, weights_sha256=digest(trainer.model))


def run_sft(model: Path, out: Path, *, resume: int | None = None, **settings: Any) -> Record:
    """The same for supervised training."""
    config = SFTConfig(output_dir=str(out), **(COMMON | settings))
    losses = _Losses()
    trainer = DensitySFT(
        model=str(model),
        args=config,
        train_dataset=Dataset.from_dict({"text": PROMPTS}),
        processing_class=make_tokenizer(),
        density_sampler=sampler(),
        callbacks=[losses],
    )
    trainer.seen = []
    _train(trainer, out, resume)
    return Record(prompts=trainer.seen, completions=[], losses=losses.losses, weights_sha256=digest(trainer.model))


def _train(trainer: Any, out: Path, resume: int | None) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{resume}") if resume else None)


def digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


RUNS = {"grpo": run_grpo, "sft": run_sft}
EPOCH_STEPS = {"grpo": 10, "sft": 5}  # one or two prompts a step
# where training goes on: inside the second epoch, and at its end
RESUMED = {kind: {"inside": steps + steps // 3, "end": 2 * steps} for kind, steps in EPOCH_STEPS.items()}


def run_all(folder: Path, kind: str, *, world_size: int) -> dict[str, Record]:
    """An uninterrupted run of two and a half epochs, and one from each of two of its checkpoints."""
    run, model, out = RUNS[kind], folder / "model", folder / kind
    # on two processes each has half of every group of completions
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2 // world_size,
        "gradient_accumulation_steps": 2 if kind == "grpo" else 1,
        "max_steps": 2 * EPOCH_STEPS[kind] + EPOCH_STEPS[kind] // 2,
    }
    records = {"whole": run(model, out, save_strategy="steps", save_steps=1, **settings)}
    for name, step in RESUMED[kind].items():
        records[name] = run(model, out, resume=step, save_strategy="no", **settings)
    return records


# the first process reads every batch and sends the others their parts
DISPATCHED: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "accelerator_config": {"dispatch_batches": True, "split_batches": True},
}


def main(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for kind in RUNS:
        for name, record in run_all(folder, kind, world_size=world_size).items():
            (folder / f"{kind}-{name}-{rank}.json").write_text(json.dumps(dataclasses.asdict(record)))
    dispatched = run_sft(folder / "model", folder / "dispatched", **DISPATCHED)
    (folder / f"sft-dispatched-{rank}.json").write_text(json.dumps(dataclasses.asdict(dispatched)))
    if world_size > 1:  # a process that ends while another one still speaks to it is aborted
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
