"""Small doubles of what embstore uses of frameworks that no package index has under their names: slime and NeMo-RL.

Each does what the named commit does with the order of prompts, the place in it, and groups, and nothing else.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

SLIME = "624b824"  # of github.com/THUDM/slime: slime/rollout/data_source.py, slime/utils/data.py
NEMO_RL = "7ea279a"  # of github.com/NVIDIA-NeMo/RL: nemo_rl/data/datasets/response_datasets, nemo_rl/algorithms/utils.py


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Put a module with this content where ``import name`` finds it, with its parents, until the test ends."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(content)


@dataclass
class Sample:
    """slime's prompt, on its way to become a rollout."""

    prompt: Any
    metadata: dict[str, Any]
    index: int | None = None
    group_index: int | None = None
    response: str = ""


@dataclass
class SlimePrompts:
    """slime's ``Dataset``: prompts as they were read, and in the order of the pass."""

    origin_samples: list[Sample]
    seed: int
    epoch_id: int = -1
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = self.origin_samples

    def __len__(self) -> int:
        return len(self.samples)

    def shuffle(self, epoch: int) -> None:
        if epoch != self.epoch_id:
            order = random.Random(self.seed + epoch).sample(range(len(self.samples)), len(self.samples))
            self.samples, self.epoch_id = [self.origin_samples[row] for row in order], epoch


class SlimeDataSource:
    """slime's ``RolloutDataSourceWithBuffer``: groups of prompts; a pass that ends within a request begins the next one.

    Templates are rendered as ``<user>TEXT`` a turn; rendered prompts of more than ``rollout_max_prompt_len`` characters are
    dropped.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.epoch_id = self.sample_offset = self.sample_index = self.sample_group_index = 0
        self.metadata: dict[str, Any] = {}
        self.buffer: list[list[Sample]] = []
        self.dataset: Any = None
        if args.prompt_data is None:
            return
        samples = []
        for line in Path(args.prompt_data).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            prompt = record[args.input_key]
            if args.apply_chat_template:
                turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                prompt = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
            if not isinstance(prompt, str) or len(prompt) <= args.rollout_max_prompt_len:
                samples.append(Sample(prompt, record.get("metadata") or {}))
        self.dataset = SlimePrompts(samples, args.rollout_seed)
        if args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def __len__(self) -> int:
        return len(self.dataset)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        found, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        wanted = num_samples - len(found)
        prompts = self.dataset.samples[self.sample_offset : self.sample_offset + wanted]
        self.sample_offset += wanted
        if self.sample_offset > len(self.dataset):
            self.sample_offset -= len(self.dataset)
            self.epoch_id += 1
            if self.args.rollout_shuffle:
                self.dataset.shuffle(self.epoch_id)
            prompts = prompts + self.dataset.samples[: self.sample_offset]
        for prompt in prompts:
            group = []
            for _ in range(self.args.n_samples_per_prompt):
                sample = copy.deepcopy(prompt)
                sample.index, sample.group_index = self.sample_index, self.sample_group_index
                self.sample_index += 1
                group.append(sample)
            self.sample_group_index += 1
            found.append(group)
        return found

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.buffer += samples

    _SAVED = ("sample_offset", "epoch_id", "sample_group_index", "sample_index", "metadata")

    def save(self, rollout_id: int) -> None:
        torch.save({name: getattr(self, name) for name in self._SAVED}, Path(self.args.save) / f"{rollout_id}.pt")

    def load(self, rollout_id: int | None = None) -> None:
        file = Path(self.args.load or "nowhere") / f"{rollout_id}.pt"
        if file.exists():
            for name, value in torch.load(file).items():  # with weights_only, torch's default
                setattr(self, name, value)
            if self.args.rollout_shuffle:
                self.dataset.shuffle(self.epoch_id)


class ResponseDataset:
    """NeMo-RL's dataset of a JSONL file: chats as they are, or made of an input and an output column."""

    def __init__(
        self,
        data_path: str,
        input_key: str = "input",
        output_key: str = "output",
        split_validation_size: float = 0,
        seed: int = 42,
        **kwargs: object,
    ) -> None:
        self.dataset: Any = datasets.load_dataset("json", data_files=data_path, split="train")
        if "messages" not in self.dataset.column_names:
            chats = [
                [{"role": "user", "content": row[input_key]}, {"role": "assistant", "content": row[output_key]}]
                for row in self.dataset
            ]
            self.dataset = datasets.Dataset.from_dict({"messages": chats})
        self.dataset = self.dataset.add_column("task_name", ["task"] * len(self.dataset))
        self.val_dataset = None
        if split_validation_size > 0:
            parts = self.dataset.train_test_split(test_size=split_validation_size, seed=seed)
            self.dataset, self.val_dataset = parts["train"], parts["test"]


def baselines(prompts: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """NeMo-RL's leave-one-out baseline [b]: of all rollouts [b, s] with equal prompts, whichever draw they belong to."""
    found = torch.empty_like(rewards)
    for prompt in torch.unique(prompts, dim=0):
        group = rewards[is_same := (prompts == prompt).all(1)]
        found[is_same] = (group.sum() - group) / (len(group) - 1)
    return found
