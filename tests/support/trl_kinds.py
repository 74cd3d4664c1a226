"""Runs of five trainers of any TRL from 0.24 on, on a dataset of which some drop rows; what each trained on, in order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PrinterCallback

from embstore.integrations.trl import DensitySampling, attach
from embstore.training import DensitySampler, load_weights
from tests.support.models import make_tokenizer
from tests.support.stores import build_small, write_lines
from tests.support.trl_runs import COMMON, PROMPTS, digest

SEED = 0  # of a sampler that the mixin makes of weights
KINDS = {"grpo": "GRPO", "rloo": "RLOO", "sft": "SFT", "dpo": "DPO", "reward": "Reward"}
_PROMPT, _PAIR = ["prompt", "row_id"], ["prompt", "chosen", "rejected", "row_id"]
_COLUMNS = {"grpo": _PROMPT, "rloo": _PROMPT, "sft": ["prompt", "completion", "row_id"], "dpo": _PAIR, "reward": _PAIR}
WAYS = ("mixin", "attach")
GROUP = 2
TEXTS = [text if row % 3 else " ".join([text] * 40) for row, text in enumerate(PROMPTS)]  # every third is too long
IDS = [f"row-{row}" for row in range(len(TEXTS))]


def make_store(folder: Path) -> Path:
    """A store of the prompts, in another order than the dataset's."""
    lines = [{"id": name, "prompt": text} for name, text in zip(IDS, TEXTS, strict=True)][::-1]
    build_small(write_lines(folder / "prompts.jsonl", lines), folder / "STORE")
    return folder / "STORE"


def make_dataset() -> Dataset:
    same = {
        column: [text] * len(TEXTS) for column, text in (("completion", " the"), ("chosen", " the"), ("rejected", " of"))
    }
    return Dataset.from_dict({"prompt": TEXTS, **same, "row_id": IDS})


@dataclass(frozen=True, kw_only=True)
class Run:
    """``kept``: ids of the rows that the trainer has kept; ``drawn``: ids of those it trained on, prompts of groups once."""

    kept: list[str]
    drawn: list[str]
    weights_sha256: str


class _Noting:
    """A collator that notes which rows of a dataset it was given."""

    def __init__(self, collator: Any, dataset: Dataset, drawn: list[str]) -> None:
        self.collator, self.drawn = collator, drawn
        self.ids = {_tokens(row): row["row_id"] for row in dataset}

    def __call__(self, rows: list[Mapping[str, Any]]) -> Any:
        self.drawn.extend(self.ids[_tokens(row)] for row in rows)
        return self.collator(rows)


def _tokens(row: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Unused columns are removed before a collator is called, but never the tokens."""
    return tuple(tuple(row[column]) for column in sorted(row) if column.endswith("_ids") and row[column] is not None)


def run(kind: str, way: str, folder: Path, *, steps: int, resume: int | None = None, **settings: Any) -> Run:
    """Train for so many steps of two prompts each, from the beginning or from a checkpoint of such a run."""
    drawn: list[str] = []

    def reward(completions: list[str], row_id: list[str], **_: Any) -> list[float]:
        groups = [row_id[first : first + GROUP] for first in range(0, len(row_id), GROUP)]
        assert all(len(set(group)) == 1 for group in groups)
        drawn.extend(group[0] for group in groups)
        return [float(len(set(text))) for text in completions]

    tokenizer = make_tokenizer()
    tokenizer.model_input_names = [
        "input_ids",
        "attention_mask",
    ]  # before transformers 5, others are made unless this is said
    generates = kind in ("grpo", "rloo")
    own = getattr(trl, f"{KINDS[kind]}Trainer")
    chosen: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": GROUP if generates else 1,
        "save_strategy": "no" if resume else "steps",
        "save_steps": 1,
        **({"num_generations": GROUP, "max_completion_length": 4, "beta": 0.0} if generates else {"max_length": 32}),
    }
    arguments = {
        "model": str(folder / "model"),
        "args": getattr(trl, f"{KINDS[kind]}Config")(
            output_dir=str(folder / f"{kind}-{way}"), max_steps=steps, **(COMMON | chosen | settings)
        ),
        "train_dataset": make_dataset().select_columns(_COLUMNS[kind]),
        "processing_class": tokenizer,
        **({"reward_funcs": [reward]} if generates else {}),
    }
    weights = load_weights(folder / "STORE")
    if way == "attach":
        trainer = attach(own(**arguments), weights, id_column="row_id", seed=SEED)
    else:
        # weights that are not joined are joined to the rows that the trainer keeps
        sampler = DensitySampler(weights.for_dataset(make_dataset()), seed=SEED) if generates else weights
        trainer = type("Density", (DensitySampling, own), {})(**arguments, density_sampler=sampler)
    trainer.remove_callback(PrinterCallback)
    if not generates:
        trainer.data_collator = _Noting(trainer.data_collator, trainer.train_dataset, drawn)
    checkpoint = folder / f"{kind}-{way}" / f"checkpoint-{resume}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    trained = 2 * (steps - (resume or 0))  # the loader reads ahead
    return Run(kept=list(trainer.train_dataset["row_id"]), drawn=drawn[:trained], weights_sha256=digest(trainer.model))
