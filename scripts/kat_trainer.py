"""TRL's GRPO trainer as ``kat_train_grpo`` runs it: policy, data, sampler, and the log."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from embstore.core.config import EmbeddingConfig
from embstore.core.decode import printable
from embstore.core.errors import ConfigError, ModelError
from embstore.core.prompts import collapse_whitespace, render_messages
from embstore.integrations.nanochat.checkpoint import NanochatFiles
from embstore.integrations.trl import DensitySampling
from embstore.model.load import whole_in_float32
from embstore.model.locate import ModelFiles, locate_model
from embstore.training import DensitySampler
from scripts.kat_files import PromptLine
from scripts.kat_rewards import Reward

_MOST_GENERATIONS = 8
_SHOWN_PROMPTS, _SHOWN_CHARACTERS = 2, 60
_NOT_FOR_REWARDS = frozenset(
    {"prompt", "prompt_id", "content_id", "completion", "completion_ids", "image", "images", "environment"}
)
# nanochat's answer begins with the first of these tokens and ends with the second
_ANSWER_STARTS, _ANSWER_ENDS = "<|assistant_start|>", "<|assistant_end|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One logged step; ``drawn`` has the ids of the prompts of this process's completions since the previous one."""

    number: int
    loss: float
    reward: float
    drawn: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A training run: ids of its prompts, origin of their weights, start-up times, and logged steps."""

    prompt_ids: Sequence[str]
    weights_N: NDArray[np.float64]
    origin: str  # precomputed, online or uniform
    start_seconds: Mapping[str, float]
    steps: list[Step] = field(default_factory=list)


class DensityGRPOTrainer(DensitySampling, GRPOTrainer):  # type: ignore[misc]  # trl is untyped
    """TRL's trainer with prompts drawn by density."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The model to train in this process, in float32, with its tokenizer."""

    model: Any
    tokenizer: Any
    processes: PartialState

    @property
    def is_first_process(self) -> bool:
        """Whether this process prints."""
        return bool(self.processes.is_main_process)

    def prompt_of(self, line: PromptLine) -> str | list[Mapping[str, object]]:
        """The line's prompt in TRL's form: a chat if the tokenizer has a chat template, else text to continue."""
        if self.tokenizer.chat_template is not None:
            return list(line.messages)
        if line.prompt.text is not None:
            return line.prompt.text
        return f"{render_messages(line.messages)}\nassistant:"

    def fitting(self, lines: list[PromptLine], max_tokens: int) -> list[PromptLine]:
        """The lines whose prompts have at most ``max_tokens`` tokens; prints the number of other lines.

        Raises
        ------
        ConfigError
            There are none.
        """
        fitting = [line for line in lines if self._num_tokens(line, max_tokens) <= max_tokens]
        if not fitting:
            raise ConfigError(f"every prompt is longer than {max_tokens} tokens", hint="raise --max_prompt_tokens")
        if len(fitting) < len(lines) and self.is_first_process:
            print(f"{len(lines) - len(fitting):,} of {len(lines):,} lines are left out: longer than {max_tokens} tokens")
        return fitting

    def _num_tokens(self, line: PromptLine, enough: int) -> int:
        prompt = self.prompt_of(line)
        text = prompt if isinstance(prompt, str) else render_messages(prompt)
        if 2 * len(text.encode()) <= enough:
            return 0  # tokens never outnumber bytes, and templates do not double them
        if isinstance(prompt, str):
            return len(self.tokenizer(prompt)["input_ids"])
        return len(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def load_policy(options: argparse.Namespace) -> Policy:
    """The model that ``--model`` or ``--sft_source`` names, ready for training.

    TRL loads its reference model from the policy's path, so a model without a Hugging Face folder is saved to one first.

    Raises
    ------
    ModelError
        The model cannot be loaded, or cannot generate.
    """
    # TRL 1.16 uses names that transformers 5.24 deprecates; progress bars are not useful for files that load quickly
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.cuda.is_available())
    files = locate_model(
        EmbeddingConfig(
            model=options.model or f"nanochat:{options.sft_source}",
            trust_tokenizer_pickle=options.trust_tokenizer_pickle or None,
        )
    )
    loaded = files.load("logits")
    model, tokenizer = whole_in_float32(loaded), loaded.tokenizer
    if not hasattr(model, "generate"):
        raise ModelError(
            f"{files.name} has no generate method", hint="convert it to a Hugging Face folder and give that as --model"
        )
    if isinstance(files, NanochatFiles):
        tokenizer.chat_template += "{% if add_generation_prompt %}{{ '" + _ANSWER_STARTS + "' }}{% endif %}"
        tokenizer.eos_token = tokenizer.pad_token = _ANSWER_ENDS
    if not isinstance(files, ModelFiles) or files.adapter is not None:
        folder = options.out_dir / "start"
        if processes.is_main_process:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        processes.wait_for_everyone()
        model.config.name_or_path = str(folder)
    model.float().requires_grad_(True).train()  # it was loaded as it is stored
    return Policy(model=model, tokenizer=tokenizer, processes=processes)


def make_trainer(
    options: argparse.Namespace,
    policy: Policy,
    lines: Sequence[PromptLine],
    reward: Reward | str,
    training: Training,
) -> DensityGRPOTrainer:
    """A trainer that draws ``lines`` by the weights of ``training`` and adds its logged steps to it."""
    world_size = policy.processes.num_processes
    is_on_gpu = policy.processes.device.type == "cuda"
    config = GRPOConfig(
        output_dir=str(options.out_dir),
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        beta=options.beta,
        per_device_train_batch_size=options.device_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_generations=options.num_generations or num_generations(options.device_batch_size * world_size),
        max_completion_length=options.max_completion_tokens,
        reward_weights=[1.0, 0.0],
        logging_first_step=True,  # so that a short run shows where it began
        logging_steps=min(options.log_interval, options.max_steps),
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or options.max_steps,
        seed=options.seed,
        bf16=is_on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not is_on_gpu,
        dataloader_pin_memory=is_on_gpu,
        report_to="none",
        disable_tqdm=True,
    )
    drawn: list[str] = []
    trainer = DensityGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=[reward, _recording(drawn)],
        args=config,
        train_dataset=as_dataset(lines, policy),
        density_sampler=DensitySampler(training.weights_N, seed=options.seed),
        callbacks=[_Log(training, drawn, lines, prints=policy.is_first_process)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def as_dataset(lines: Sequence[PromptLine], policy: Policy) -> datasets.Dataset:
    """One row per line: prompt, prompt_id, content_id, and all text fields, which rewards can read."""
    names = {name for line in lines for name, value in line.prompt.fields.items() if isinstance(value, str)}
    fields = sorted(names - _NOT_FOR_REWARDS)
    rows = (
        {
            "prompt": policy.prompt_of(line),
            "prompt_id": line.prompt_id,
            "content_id": line.content_id,
            **{name: value if isinstance(value := line.prompt.fields.get(name), str) else None for name in fields},
        }
        for line in lines
    )
    return datasets.Dataset.from_list(list(rows))


def num_generations(batch: int) -> int:
    """Completions per prompt: the largest divisor of the batch of all processes, at most 8.

    Examples
    --------
    >>> num_generations(16), num_generations(12), num_generations(5)
    (8, 6, 5)
    """
    divisors = [count for count in range(2, _MOST_GENERATIONS + 1) if batch % count == 0]
    if not divisors:
        raise ConfigError(
            f"a batch of {batch} cannot be divided into groups of 2 to {_MOST_GENERATIONS} completions",
            hint="choose another --device_batch_size, or give --num_generations",
        )
    return divisors[-1]


def checkpoint_of(options: argparse.Namespace) -> str | None:
    """The checkpoint to continue from; None to start from the beginning."""
    is_there = options.resume and Path(options.out_dir).is_dir()
    found: str | None = get_last_checkpoint(str(options.out_dir)) if is_there else None
    return found


def _recording(drawn: list[str]) -> Callable[..., list[float]]:
    """A reward of weight 0 that records the prompts of the completions, by what tells them from others."""

    def prompts_drawn(completions: Sequence[object], content_id: Sequence[str], **_: object) -> list[float]:
        drawn.extend(dict.fromkeys(content_id))
        return [0.0] * len(completions)

    return prompts_drawn


class _Log(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Records every logged step; if it ``prints``, shows its loss, reward and prompts."""

    def __init__(self, training: Training, drawn: list[str], lines: Sequence[PromptLine], *, prints: bool) -> None:
        self._training = training
        self._drawn = drawn
        self._prints = prints
        self._lines = {line.content_id: line for line in lines}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: object) -> None:  # noqa: ANN401
        if "loss" not in logs:
            return  # the summary at the end
        drawn = [self._lines[content_id] for content_id in self._drawn]
        self._drawn.clear()
        step = Step(
            number=state.global_step,
            loss=float(logs["loss"]),
            reward=float(logs["reward"]),
            drawn=[line.prompt_id for line in drawn],
        )
        self._training.steps.append(step)
        if not self._prints:
            return
        texts = [printable(collapse_whitespace(line.prompt.rendered)) for line in drawn[:_SHOWN_PROMPTS]]
        shown = ", ".join(repr(text[:_SHOWN_CHARACTERS]) for text in texts)
        more = f" and {len(drawn) - len(texts)} more" if len(drawn) > len(texts) else ""
        print(
            f"step {step.number}/{state.max_steps}  loss {step.loss:.4f}  reward {step.reward:.3f}  drew {shown}{more}",
            flush=True,
        )
