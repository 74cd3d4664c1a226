"""SkyRL's own data paths: SFT with its hook for samplers, RL with its dataset that numbers rows, where a file is right."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import sys
import typing
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typing_extensions

from embstore.core.errors import ConfigError, LengthMismatchError, WeightsError
from embstore.training import DensitySampler, load_weights, prompt_keys, resample_file
from tests.support.models import make_tokenizer
from tests.support.stores import small_lines, write_lines

pytestmark = [
    pytest.mark.trainers,
    # torchdata 0.11 under torch 2.13
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

BATCH, DRAWS = 4, 28
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def skyrl() -> Any:
    """SkyRL's modules by their last name; 0.3.0 says that it runs on Python 3.11, where pydantic wants this TypedDict."""
    patch = pytest.MonkeyPatch()
    if sys.version_info < (3, 12):
        patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
    found = SimpleNamespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (
            "train.sft_trainer",
            "train.config.sft_config",
            "train.dataset.dataset",
            "train.utils.trainer_utils",
            "train.fully_async_trainer",
            "train.generators.utils",
            "train.config.config",
            "backends.skyrl_train.utils.ppo_utils",
        ):
            setattr(found, name.rpartition(".")[2], importlib.import_module(f"skyrl.{name}"))
    patch.undo()
    found.version = version("skyrl")
    return found


def tokenizer() -> Any:
    made = make_tokenizer(left=True)
    made.chat_template = TEMPLATE
    return made


def lines() -> list[dict[str, Any]]:
    """Chats of the store's texts with an answer, in another order than the store's; the store has one as a chat, too."""
    return [
        {
            "messages": [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": "An answer."}],
            "n": number,
        }
        for number, line in enumerate(small_lines()[1:][::-1])
        if "prompt" in line
    ]


def texts(chats: list[dict[str, Any]]) -> list[str]:
    return [chat["messages"][0]["content"] for chat in chats]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as ``load_dataset`` reads it: chats, and the text that the store has of each."""
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [chat | {"text": chat["messages"][0]["content"]} for chat in lines()])
    return tmp_path / "data"


def trainer_of(skyrl: Any, folder: Path, options: dict[str, Any], **changed: object) -> Any:
    """SkyRL's SFT trainer from the command line, with its tokenized dataset; no model is loaded."""
    settings = {
        "strategy": "fsdp",
        "dataset_name": folder,
        "dataset_split": "train",
        "batch_size": BATCH,
        "num_workers": 0,
        "disable_cache": True,
        "enable_ray_gpu_monitor": False,
        "ckpt_path": folder.parent / "checkpoints",
        "sampler": "custom",
        "sampler_class_path": "embstore.integrations.sampler.StoreSampler",
        **{f"sampler_kwargs.{name}": value for name, value in options.items()},
    }
    line = [f"{name}={value}" for name, value in {**settings, **changed}.items()]
    config = skyrl.sft_config.SFTConfig.from_cli_overrides(line)
    skyrl.sft_config.validate_sft_cfg(config)
    trainer = skyrl.sft_trainer.SFTTrainer(config)
    trainer.tokenizer = tokenizer()
    trainer.collator = trainer._build_collator(trainer.tokenizer)
    trainer.dispatch = SimpleNamespace(
        save_checkpoint=lambda *given, **named: None, load_checkpoint=lambda *given, **named: None
    )
    tokenized = trainer.load_dataset()
    trainer.train_dataloader = trainer.build_train_dataloader(tokenized)
    return trainer


def trained_on(trainer: Any) -> typing.Iterator[list[str]]:
    """The prompts of each step, as SkyRL's loop takes batches: the next pass begins where one is exhausted."""
    while True:
        for batch in trainer.train_dataloader:
            shown = trainer.tokenizer.batch_decode(batch["sequences"])
            yield [text.partition("user: ")[2].partition("<|turn|>")[0] for text in shown]


def first_steps(trainer: Any, steps: int) -> list[list[str]]:
    return list(itertools.islice(trained_on(trainer), steps))


@pytest.mark.parametrize(("by", "steps"), [("source", 2 * DRAWS // BATCH), ("keys", 9)])
def test_skyrl_sft_draws_pass_after_pass_and_resumes_at_every_stop(
    skyrl: Any, by: str, steps: int, folder: Path, finished_store: Path, evidence: Any
) -> None:
    options: dict[str, Any] = {"store": finished_store, "num_samples": DRAWS, "seed": 3}
    kept = lines()
    if by == "source":
        options |= {"source": folder / "train.jsonl", "key_column": "text"}
    else:  # every third row has no answer, so that SkyRL drops it
        rows = [line | {"messages": line["messages"][: 1 if line["n"] % 3 == 0 else 2]} for line in kept]
        write_lines(folder / "train.jsonl", rows)
        kept = [line for line in kept if line["n"] % 3]
        np.save(folder.parent / "keys.npy", prompt_keys(texts(kept)))
        options |= {"keys": folder.parent / "keys.npy"}
    sampler = DensitySampler(load_weights(finished_store).for_dataset(texts(kept)), num_samples=DRAWS, seed=3)
    order = [texts(kept)[row] for row in np.concatenate([sampler.plan(0), sampler.plan(1)])]
    whole = first_steps(trainer_of(skyrl, folder, options), steps)
    assert list(itertools.chain(*whole)) == order[: steps * BATCH]
    exact = 0
    for stop in range(1, steps):
        trainer = trainer_of(skyrl, folder, options)
        batches = trained_on(trainer)
        seen = list(itertools.islice(batches, stop))
        trainer.global_step = stop
        trainer.save_checkpoint()
        del batches
        again = trainer_of(skyrl, folder, options, resume_from=folder.parent / "checkpoints" / f"global_step_{stop}")
        assert again.load_checkpoint() == stop
        exact += seen + first_steps(again, steps - stop) == whole
    assert exact == steps - 1
    evidence(
        trainer="skyrl",
        version=skyrl.version,
        kind="run",
        what=f"SFT: tokenizing, loader, collator and checkpoints of SFTTrainer, joined by {by}",
        stops=steps - 1,
        exact=exact,
    )


def test_skyrl_sft_does_not_go_on_with_other_weights(skyrl: Any, folder: Path, finished_store: Path) -> None:
    """SkyRL only logs what fails when it loads the loader's state; this fails when the loader begins."""
    options = {"store": finished_store, "source": folder / "train.jsonl", "key_column": "text"}
    trainer = trainer_of(skyrl, folder, options)
    batches = trained_on(trainer)
    next(batches)
    trainer.global_step = 1
    trainer.save_checkpoint()
    again = trainer_of(skyrl, folder, options | {"seed": 4}, resume_from=folder.parent / "checkpoints" / "global_step_1")
    assert again.load_checkpoint() == 1
    with pytest.raises(WeightsError, match="differs in seed: saved 0, here 4"):
        next(trained_on(again))


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_skyrl_sft_hands_over_tokens_and_drops_rows(skyrl: Any, folder: Path, finished_store: Path) -> None:
    """Without a source or keys there is nothing to join by; with a source of which rows were dropped, neither."""
    with pytest.raises(ConfigError, match="are tokens, and have no prompt to join by: input_ids") as caught:
        trainer_of(skyrl, folder, {"store": finished_store})
    assert "source=FILE" in str(caught.value.hint)
    with pytest.raises(LengthMismatchError, match="70 rows, the trainer's dataset has 64 items"):
        trainer_of(skyrl, folder, {"store": finished_store, "positional": "true"})
    rows = lines()
    rows[5]["messages"].pop()
    write_lines(folder / "train.jsonl", rows)
    with pytest.raises(LengthMismatchError, match="source has 64 rows, the trainer's dataset has 63 items") as caught:
        trainer_of(skyrl, folder, {"store": finished_store, "source": folder / "train.jsonl", "on_missing": "mean"})
    assert "keys=" in str(caught.value.hint)


def rl_config(skyrl: Any, file: Path, *, batch: int) -> Any:
    """SkyRL's settings for RL from the command line of docs/train/skyrl.md."""
    line = [f"data.train_data=['{file}']", "trainer.epochs=1", f"trainer.train_batch_size={batch}"]
    line += ["data.dataloader.num_workers=0", "data.dataloader.persistent_workers=false"]
    return skyrl.config.SkyRLTrainConfig.from_cli_overrides(line)


def rl_dataset(skyrl: Any, *files: Path | str) -> Any:
    return skyrl.dataset.PromptDataset([str(file) for file in files], tokenizer(), 512, num_workers=1)


def uids_and_advantages(skyrl: Any, prompts: list[dict[str, Any]], rewards: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """SkyRL's groups of two rollouts a prompt, and its GRPO advantages of them."""
    made, uids = skyrl.utils.prepare_generator_input(prompts, 2, {}, "env", "train", 0)
    assert len(made["prompts"]) == len(rewards)
    advantages, _ = skyrl.ppo_utils.compute_grpo_outcome_advantage(
        rewards[:, None].clone(), torch.ones(len(rewards), 1), np.array(uids)
    )
    return uids, advantages[:, 0]


def test_skyrl_rl_merges_the_groups_of_a_row_that_comes_twice(skyrl: Any, finished_store: Path, tmp_path: Path) -> None:
    """Rows are known by their number, so a sampler that repeats them is wrong; in a resampled file each draw has its own."""
    chats = [{"prompt": [{"role": "user", "content": text}], "env_class": None, "text": text} for text in texts(lines())]
    source = write_lines(tmp_path / "train.jsonl", chats)
    resample_file(finished_store, source, tmp_path / "drawn.jsonl", num_samples=60, seed=3, over=4, key_column="text")
    plan = DensitySampler(load_weights(finished_store).for_dataset(texts(lines())), num_samples=60, seed=3).plan(0).tolist()
    assert len(set(plan)) < 60
    rewards = torch.rand(2 * 60, generator=torch.Generator().manual_seed(0))
    own = torch.stack([(pair - pair.mean()) / (pair.std() + 1e-6) for pair in rewards.reshape(-1, 2)]).reshape(-1)
    # a sampler over the rows
    dataset = rl_dataset(skyrl, source)
    uids, advantages = uids_and_advantages(skyrl, dataset.collate_fn([dataset[row] for row in plan]), rewards)
    assert len(set(uids)) == len(set(plan))
    assert not torch.allclose(advantages, own)
    # fully async training remembers which rows it has trained on
    waiting = skyrl.fully_async_trainer._AsyncDataloader(skyrl.sft_trainer.StatefulDataLoader(dataset, batch_size=1), 1)
    with pytest.raises(AssertionError, match="Duplicate UID"):
        asyncio.run(waiting.mark_consumed_uids(uids[::2]))
    # a file of the draws
    dataset = rl_dataset(skyrl, tmp_path / "drawn.jsonl")
    assert len(dataset) == 60 + 4
    drawn = dataset.collate_fn([dataset[row] for row in range(60)])
    assert [prompt["env_extras"]["text"] for prompt in drawn] == [texts(lines())[row] for row in plan]
    uids, advantages = uids_and_advantages(skyrl, drawn, rewards)
    assert len(set(uids)) == 60
    assert torch.allclose(advantages, own)


def test_skyrl_rl_trains_on_each_draw_of_a_resampled_file_once_a_pass(
    skyrl: Any, finished_store: Path, tmp_path: Path, evidence: Any
) -> None:
    """Its own loader shuffles: draws come in another order than in the file, each once; in fully async training, too."""
    chats = [{"prompt": [{"role": "user", "content": text}], "env_class": None, "text": text} for text in texts(lines())]
    source = write_lines(tmp_path / "train.jsonl", chats)
    resample_file(finished_store, source, tmp_path / "drawn.jsonl", num_samples=DRAWS, seed=3, key_column="text")
    in_file = [json.loads(line)["text"] for line in (tmp_path / "drawn.jsonl").read_text().splitlines()]
    config = rl_config(skyrl, tmp_path / "drawn.jsonl", batch=BATCH)
    dataset = rl_dataset(skyrl, *config.data.train_data)

    def drawn(batches: typing.Iterable[list[dict[str, Any]]]) -> list[str]:
        return [prompt["env_extras"]["text"] for batch in batches for prompt in batch]

    loader = skyrl.trainer_utils.build_dataloader(config, dataset)
    passes = [drawn(loader) for _ in range(2)]
    assert all(sorted(each) == sorted(in_file) for each in passes)
    assert passes[0] != in_file
    assert passes[0] != passes[1]
    # stopped and resumed, as SkyRL saves the loader's state in data.pt
    first = skyrl.trainer_utils.build_dataloader(config, dataset)
    exact = 0
    for stop in range(1, DRAWS // BATCH):
        seen = drawn(itertools.islice(first, stop))
        torch.save(first.state_dict(), tmp_path / "data.pt")
        again = skyrl.trainer_utils.build_dataloader(config, dataset)
        again.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=False))
        exact += seen + drawn(again) == passes[0]
        first = skyrl.trainer_utils.build_dataloader(config, dataset)
    assert exact == DRAWS // BATCH - 1

    async def consume(only: int, seen: set[str]) -> list[str]:
        """Prompts that are not among those that were trained on before a stop."""
        loader = skyrl.trainer_utils.build_dataloader(config, dataset, is_fully_async=True)
        waiting = skyrl.fully_async_trainer._AsyncDataloader(loader, BATCH)
        waiting.load_state_from_checkpoint(set(seen))
        found = []
        while len(found) < only and (prompts := await waiting.get_next_non_consumed_data()) is not None:
            await waiting.mark_consumed_uids([prompts[0]["uid"]])
            found.append(prompts[0]["uid"])
        return found

    before = asyncio.run(consume(10, set()))
    after = asyncio.run(consume(DRAWS, set(before)))
    assert sorted(before + after, key=int) == [str(row) for row in range(DRAWS)]
    evidence(
        trainer="skyrl",
        version=skyrl.version,
        kind="run",
        what="RL: PromptDataset, build_dataloader and the loader of fully async training, on a resampled file",
        stops=exact,
        exact=exact,
    )


def test_skyrl_rl_shuffles_a_resampled_file(skyrl: Any, finished_store: Path, tmp_path: Path) -> None:
    """There is no setting against it: each draw is trained on once a pass, but repeats may meet in one step."""
    chats = [{"prompt": [{"role": "user", "content": text}], "env_class": None, "text": text} for text in texts(lines())]
    source = write_lines(tmp_path / "train.jsonl", chats)
    options: dict[str, Any] = {"num_samples": 120, "key_column": "text", "no_repeat_within": 20}
    resample_file(finished_store, source, tmp_path / "drawn.jsonl", **options)
    config = rl_config(skyrl, tmp_path / "drawn.jsonl", batch=20)
    loader = skyrl.trainer_utils.build_dataloader(config, rl_dataset(skyrl, tmp_path / "drawn.jsonl"))
    distinct = [len({prompt["env_extras"]["text"] for prompt in batch}) for batch in loader]
    assert min(distinct) < 20
