"""Every trainer class of the installed TRL, found by looking through its packages, and how to make each on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import Trainer

from tests.support.models import make_tokenizer
from tests.support.trl_runs import COMMON, PROMPTS

ROWS = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_PROMPTS = [f"{PROMPTS[row % len(PROMPTS)]} {PROMPTS[row // len(PROMPTS)]}" for row in range(ROWS)]
_PROMPT = {"prompt": _PROMPTS}
_PAIR = {**_PROMPT, "chosen": [" the"] * ROWS, "rejected": [" of"] * ROWS}
_COMPLETION = {**_PROMPT, "completion": [" the"] * ROWS}
_LABELLED = {**_COMPLETION, "label": [True, False] * (ROWS // 2)}
_MESSAGES = {
    "messages": [[{"role": "user", "content": text}, {"role": "assistant", "content": "the of"}] for text in _PROMPTS]
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [1.0 + len(str(completion)) % 3 for completion in completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a trainer class needs beyond a model, a tokenizer and a folder; ``teacher``: the model as a teacher, too."""

    rows: dict[str, list[Any]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    rewards: bool = False
    teacher: bool = False


_GROUPS = Case(rows=_PROMPT, settings={"num_generations": 4, "max_completion_length": 4}, rewards=True)
_PRIVILEGED = dataclasses.replace(_GROUPS, rows={**_PROMPT, "privileged_context": ["hint"] * ROWS})
_PAIRS = Case(rows=_PAIR, settings={"max_length": 32})
_NO_KL = Case(rows=_LABELLED, settings={"max_length": 32, "loss_type": "apo_zero_unpaired"})
_TEACHER = Case(rows=_PROMPT, settings={"max_completion_length": 4}, teacher=True)
_TEACHER_GROUPS = Case(
    rows=_MESSAGES, settings={"max_completion_length": 4, "max_length": 64, "num_generations": 2, "lmbda": 1.0}, teacher=True
)
# those that take prompts through a loader; a class that is missing here or below fails a test
CASES = {
    "trl.experimental.a2po.a2po_trainer.A2POTrainer": Case(
        rows=_PROMPT, settings={"max_completion_length": 4}, rewards=True
    ),
    "trl.experimental.bema_for_ref_model.dpo_trainer.DPOTrainer": _PAIRS,
    "trl.experimental.cpo.cpo_trainer.CPOTrainer": _PAIRS,
    "trl.experimental.distillation.DistillationTrainer": _TEACHER,
    "trl.experimental.gkd.gkd_trainer.GKDTrainer": Case(
        rows=_MESSAGES, settings={"max_length": 64, "max_new_tokens": 4}, teacher=True
    ),
    "trl.experimental.gmpo.gmpo_trainer.GMPOTrainer": _GROUPS,
    "trl.experimental.gold.gold_trainer.GOLDTrainer": _TEACHER_GROUPS,
    "trl.experimental.iw_opd.iw_opd_trainer.IWOPDTrainer": _TEACHER_GROUPS,
    "trl.experimental.kto.KTOTrainer": _NO_KL,
    "trl.experimental.online_dpo.online_dpo_trainer.OnlineDPOTrainer": Case(
        rows=_PROMPT, settings={"max_new_tokens": 4, "max_length": 64}, rewards=True
    ),
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer": _PAIRS,
    "trl.experimental.sdft.sdft_trainer.SDFTTrainer": dataclasses.replace(_PRIVILEGED, rewards=False),
    "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer": _PRIVILEGED,
    "trl.experimental.server_distillation.server_distillation_trainer.ServerDistillationTrainer": Case(
        rows=_PROMPT, settings={"max_completion_length": 4, "teacher_model_server_url": "http://127.0.0.1:9"}
    ),
    "trl.experimental.tpo.tpo_trainer.TPOTrainer": Case(
        rows={**_PAIR, "reference": [" sum"] * ROWS}, settings={"max_length": 32}
    ),
    "trl.trainer.distillation_trainer.DistillationTrainer": _TEACHER,
    "trl.trainer.dpo_trainer.DPOTrainer": _PAIRS,
    "trl.trainer.grpo_trainer.GRPOTrainer": _GROUPS,
    "trl.trainer.kto_trainer.KTOTrainer": _NO_KL,
    "trl.trainer.reward_trainer.RewardTrainer": _PAIRS,
    "trl.trainer.rloo_trainer.RLOOTrainer": _GROUPS,
    "trl.trainer.sft_trainer.SFTTrainer": Case(rows=_COMPLETION, settings={"max_length": 32}),
}
# their loaders read completions that another process has generated
WITHOUT_SAMPLER = {
    "trl.experimental.async_distillation.async_distillation_trainer.AsyncDistillationTrainer",
    "trl.experimental.async_grpo.async_grpo_trainer.AsyncGRPOTrainer",
}


def trainer_classes() -> dict[str, type[Trainer]]:
    """By module and name, without aliases and private base classes."""
    return {
        f"{name}.{each.__name__}": each
        for package in ("trl.trainer", "trl.experimental")
        for name in _modules(package)
        for each in vars(importlib.import_module(name)).values()
        if inspect.isclass(each) and issubclass(each, Trainer) and each.__module__ == name and each.__name__[0] != "_"
    }


def _modules(package: str) -> Iterator[str]:
    """Modules whose source has a trainer class; others may need packages that are not here."""
    for each in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        spec = importlib.util.find_spec(each.name)
        source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
        if re.search(r"^class \w+Trainer\(", source, re.MULTILINE):
            yield each.name


def make(name: str, model: Path, out: Path, **settings: Any) -> Any:
    """The trainer of ``CASES``; settings that its configuration does not have are left out."""
    case, trainer = CASES[name], trainer_classes()[name]
    config_name = trainer.__name__.replace("Trainer", "Config")
    package = importlib.import_module(".".join(name.split(".")[: 3 if "experimental" in name else 2]))
    config = getattr(package, config_name, None) or getattr(trl, config_name)
    known = {field.name for field in dataclasses.fields(config)}
    chosen = COMMON | {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"} | settings
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    arguments: dict[str, Any] = {"reward_funcs": reward} if case.rewards else {}
    if case.teacher:
        arguments["teacher_model"] = str(model)
    return trainer(
        model=str(model),
        args=config(output_dir=str(out), **case.settings, **{key: chosen[key] for key in chosen if key in known}),
        train_dataset=Dataset.from_dict(case.rows),
        processing_class=tokenizer,
        **arguments,
    )
