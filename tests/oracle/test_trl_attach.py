"""What attach takes and refuses, and what a trainer's own settings do to its order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import RepeatSampler

from embstore.core.errors import ConfigError, KeyMismatchError, LengthMismatchError
from embstore.integrations.trl import attach
from embstore.training import DensitySampler, load_weights
from tests.support.models import make_tokenizer
from tests.support.stores import write_lines
from tests.support.trl_classes import reward
from tests.support.trl_kinds import IDS, TEXTS, make_dataset, make_store
from tests.support.trl_runs import COMMON, GROUP, PROMPTS, WEIGHTS, make_folder, sampler

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = sampler().plan(0).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attach")
    make_folder(root / "model")
    make_store(root)
    return root


def grpo(folder: Path, own: type = GRPOTrainer, **settings: Any) -> Any:
    chosen = {"per_device_train_batch_size": GROUP, "max_steps": 1, "save_strategy": "no", "max_completion_length": 4}
    return own(
        model=str(folder / "model"),
        reward_funcs=[reward],
        args=GRPOConfig(output_dir=str(folder / "grpo"), num_generations=GROUP, **(COMMON | chosen | settings)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
    )


def sft(folder: Path, dataset: Dataset, **settings: Any) -> Any:
    chosen = {"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no"}
    return SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(output_dir=str(folder / "sft"), **(COMMON | chosen | settings)),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    )


def plain(folder: Path, own: type = Trainer, *, seen: list[int] | None = None, **settings: Any) -> Any:
    """Rows are one number each; ``seen`` gets those of every batch that a loss was computed of."""

    class Noting(own):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if seen is not None:
                seen.extend((inputs["input_ids"][:, 0] - 10).tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    chosen = {"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no"}
    return Noting(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(**({"output_dir": str(folder / "plain")} | COMMON | chosen | settings)),
        train_dataset=Dataset.from_dict(
            {key: [[10 + row] * 4 for row in range(len(PROMPTS))] for key in ("input_ids", "labels")}
        ),
        processing_class=make_tokenizer(),
    )


def test_weights_are_joined_to_the_trainers_rows_by_content_or_by_id(folder: Path) -> None:
    """In another order than the store's; what is joined already, a vector and a sampler are taken as they are."""
    weights = load_weights(folder / "STORE")
    expected = DensitySampler(weights.align(IDS), seed=3).plan(0).tolist()
    joined = weights.for_dataset(make_dataset())
    for given, options in [
        (weights, {"seed": 3}),
        (weights, {"seed": 3, "id_column": "row_id"}),
        (weights, {"seed": 3, "key_column": "prompt"}),
        (joined, {"seed": 3}),
        (joined.array, {"seed": 3}),
        (DensitySampler(joined, seed=3), {}),
    ]:
        trainer = plain(folder)
        trainer.train_dataset = make_dataset()
        assert attach(trainer, given, **options) is trainer
        assert list(trainer._get_train_sampler()) == expected
    trainer = plain(folder)
    trainer.train_dataset = make_dataset()
    attach(trainer, weights, seed=3, positional=True)  # the order of the store's rows, as was said
    assert list(trainer._get_train_sampler()) == DensitySampler(weights, seed=3, positional=True).plan(0).tolist()


def test_what_does_not_fit_is_refused_and_leaves_the_trainer_as_it_was(folder: Path) -> None:
    trainer = plain(folder)
    weights = load_weights(folder / "STORE")
    for given, options, error, message in [
        (WEIGHTS[1:], {}, LengthMismatchError, "over 9 weights, the trainer's dataset has 10 rows"),
        (sampler(), {"seed": 1}, ConfigError, "options \\['seed'\\]"),
        (sampler(), {"id_column": "row_id"}, ConfigError, "id_column='row_id'"),
        (WEIGHTS, {"key_column": "prompt"}, ConfigError, "type ndarray are taken as they are"),
        (weights.for_dataset(make_dataset()), {"id_column": "row_id"}, ConfigError, "joined to a dataset already"),
        (WEIGHTS, {"rank": 0, "num_replicas": 2}, ConfigError, "split into 2 ranks"),
        (DensitySampler(WEIGHTS, rank=0, num_replicas=2), {}, ConfigError, "split into 2 ranks"),
    ]:
        with pytest.raises(error, match=message):
            attach(trainer, given, **options)
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)
    attach(trainer, WEIGHTS)
    with pytest.raises(ConfigError, match="has density sampling already"):
        attach(trainer, WEIGHTS)


def test_a_prompt_that_the_trainer_has_rewritten_needs_ids(folder: Path) -> None:
    trainer = plain(folder)
    templated = [f"user: {text}" for text in TEXTS]
    trainer.train_dataset = Dataset.from_dict({"prompt": templated, "row_id": IDS})
    weights = load_weights(folder / "STORE")
    with pytest.raises(KeyMismatchError) as caught:
        attach(trainer, weights)
    assert "pass id_column" in "".join(caught.value.__notes__)
    attach(trainer, weights, id_column="row_id")
    assert list(trainer._get_train_sampler()) == DensitySampler(weights.align(IDS)).plan(0).tolist()


def test_weights_that_were_joined_before_rows_were_dropped_are_refused(folder: Path) -> None:
    dataset = make_dataset().select_columns(["prompt", "completion"])
    weights = load_weights(folder / "STORE")
    trainer = sft(folder, dataset, max_length=32)
    assert len(trainer.train_dataset) == 6
    with pytest.raises(LengthMismatchError, match="over 10 weights, the trainer's dataset has 6 rows") as caught:
        attach(trainer, weights.for_dataset(dataset))
    assert "attach(trainer, load_weights(STORE))" in str(caught.value.hint)
    attach(trainer, weights)
    kept = weights.for_dataset(trainer.train_dataset)
    assert list(trainer._get_train_sampler()) == DensitySampler(kept).plan(0).tolist()


def test_packed_rows_have_no_prompt(folder: Path) -> None:
    dataset = Dataset.from_dict({"text": PROMPTS * 4})
    trainer = sft(folder, dataset, packing=True, max_length=16, packing_strategy="wrapped")
    assert len(trainer.train_dataset) < len(dataset)
    with pytest.raises(ConfigError, match="column"):
        attach(trainer, load_weights(folder / "STORE"))
    with pytest.raises(LengthMismatchError, match="the trainer's dataset has"):
        attach(trainer, np.ones(len(dataset)))


def kto(folder: Path, **settings: Any) -> Any:
    return KTOTrainer(
        model=str(folder / "model"),
        args=KTOConfig(output_dir=str(folder / "kto"), per_device_train_batch_size=2, max_steps=1, **COMMON, **settings),
        train_dataset=Dataset.from_dict(
            {"prompt": PROMPTS, "completion": [" the"] * len(PROMPTS), "label": [True, False] * (len(PROMPTS) // 2)}
        ),
        processing_class=make_tokenizer(),
    )


def test_kto_is_refused_while_it_has_a_kl_term(folder: Path) -> None:
    with pytest.raises(ConfigError, match="KTOTrainer estimates its KL term from neighbours of the dataset") as caught:
        attach(kto(folder), sampler())
    assert "apo_zero_unpaired" in str(caught.value.hint)
    trainer = attach(kto(folder, loss_type="apo_zero_unpaired"), sampler())
    assert list(trainer._get_train_sampler()) == PLAN


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_an_order_that_was_asked_for_is_not_replaced(folder: Path, strategy: str) -> None:
    trainer = attach(plain(folder, train_sampling_strategy=strategy), sampler())
    message = r"the rows of Noting come in the order of a (Sequential|LengthGrouped)Sampler, which draws would replace"
    with pytest.raises(ConfigError, match=message) as caught:
        trainer.train()
    assert "train_sampling_strategy='random'" in str(caught.value.hint)


class OldHook(GRPOTrainer):  # type: ignore[misc]
    """The hook takes no dataset, as in older trainers and in axolotl's."""

    def _get_train_sampler(self) -> Sampler[int]:
        return super()._get_train_sampler(self.train_dataset)


class Divided(GRPOTrainer):  # type: ignore[misc]
    """What unsloth does for context parallelism, and ms-swift for sequence parallelism: other numbers at the last moment."""

    parts = 1

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        own = super()._get_train_sampler(dataset)
        own.batch_size //= self.parts
        own.repeat_count *= self.parts
        return own


def test_the_pattern_is_that_of_the_trainers_own_sampler_when_the_loader_asks(folder: Path) -> None:
    settings = {"per_device_train_batch_size": 2 * GROUP, "gradient_accumulation_steps": 2}
    assert list(attach(grpo(folder, OldHook, **settings), sampler())._get_train_sampler()) == list(
        attach(grpo(folder, **settings), sampler())._get_train_sampler()
    )
    trainer = attach(grpo(folder, Divided, **settings), sampler())
    for trainer.parts in (1, 2, 4):
        own = RepeatSampler(PROMPTS, GROUP, batch_size=4 // trainer.parts, repeat_count=2 * trainer.parts, shuffle=False)
        order = trainer._get_train_sampler(trainer.train_dataset)
        order.set_epoch(0)
        assert list(order) == [PLAN[row] for row in own]


class SplitSampler(RepeatSampler):  # type: ignore[misc]
    """Like axolotl's for context parallelism: it yields the rows of one rank."""

    rank, world_size = 0, 2


class Split(GRPOTrainer):  # type: ignore[misc]
    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return SplitSampler(self.train_dataset, GROUP)


def test_a_trainer_whose_own_sampler_is_split_by_rank_is_refused(folder: Path) -> None:
    trainer = attach(grpo(folder, Split), sampler())
    with pytest.raises(ConfigError, match="SplitSampler of Split splits its order by rank"):
        trainer.train()
    trainer = attach(plain(folder, train_sampling_strategy="batch_rebalance"), sampler())
    with pytest.raises(ConfigError, match="BatchRebalanceSampler of Noting splits its order by rank"):
        trainer.train()


class OtherLoader(Trainer):  # type: ignore[misc]
    """Asks for a sampler, or not, and reads its rows in another order."""

    asks = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.asks:
            self._get_train_sampler(self.train_dataset)
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


@pytest.mark.parametrize(
    ("asks", "message"), [(True, "asked for a sampler and drew nothing"), (False, "did not ask for a sampler")]
)
def test_a_loader_that_does_not_draw_is_an_error_by_the_first_step(folder: Path, asks: bool, message: str) -> None:
    seen: list[int] = []
    trainer = attach(plain(folder, OtherLoader, seen=seen), sampler())
    trainer.asks = asks
    with pytest.raises(ConfigError, match=f"Noting {message} from it: it would train" if asks else message):
        trainer.train()
    assert seen == []


@pytest.mark.parametrize("source", ["data_producer", "_prompt_iter"])
def test_a_trainer_that_reads_its_loader_and_takes_prompts_elsewhere_is_refused(folder: Path, source: str) -> None:
    """As axolotl's asynchronous GRPO, which ignores the batches that it is given."""
    trainer = plain(folder)
    setattr(trainer, source, iter(PROMPTS))
    with pytest.raises(ConfigError, match=f"takes its prompts from {source}, not from its loader"):
        attach(trainer, sampler())


def test_a_stream_is_refused(folder: Path) -> None:
    trainer = plain(folder)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ConfigError, match="train_dataset is of type IterableDataset and has no length: a stream cannot be"):
        attach(trainer, sampler())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_that_read_ahead_do_not_change_where_a_resume_goes_on(folder: Path, evidence: Callable[..., None]) -> None:
    """The last epoch of the resumed run begins with what workers had fetched."""
    settings = {"max_steps": 8, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
    whole: list[int] = []
    attach(plain(folder, seen=whole, save_strategy="steps", save_steps=1, **settings), sampler()).train()
    assert whole == [row for epoch in range(2) for row in sampler().plan(epoch)][: 2 * 8]
    stops = (3, 5)
    for stop in stops:
        seen: list[int] = []
        trainer = attach(plain(folder, seen=seen, **settings), sampler())
        trainer.train(resume_from_checkpoint=str(folder / "plain" / f"checkpoint-{stop}"))
        assert seen == whole[2 * stop :]
    evidence(
        trainer="transformers",
        version=transformers.__version__,
        kind="run",
        what="Trainer, two loader workers",
        stops=len(stops),
        exact=len(stops),
    )


def test_a_resume_that_skips_nothing_is_refused_inside_an_epoch(folder: Path) -> None:
    """With ignore_data_skip, transformers draws an epoch from its beginning again; without density sampling, too."""
    settings = {"max_steps": 7, "output_dir": str(folder / "skip")}
    attach(plain(folder, save_strategy="steps", save_steps=1, **settings), sampler()).train()
    trainer = attach(plain(folder, ignore_data_skip=True, **settings), sampler())
    with pytest.raises(ConfigError, match="would draw epoch 0 from its beginning again, of which 2 steps are done"):
        trainer.train(resume_from_checkpoint=str(folder / "skip" / "checkpoint-2"))
    seen: list[int] = []
    trainer = attach(plain(folder, seen=seen, ignore_data_skip=True, **settings), sampler())
    trainer.train(resume_from_checkpoint=str(folder / "skip" / "checkpoint-5"))
    assert seen == sampler().plan(1)[:4].tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of settings that the pages leave to the trainer, such as pinned memory
def test_the_snippets_of_the_pages_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "MODEL").symlink_to(folder / "model")
    (tmp_path / "STORE").symlink_to(folder / "STORE")
    write_lines(tmp_path / "prompts.jsonl", [{"id": name, "prompt": text} for name, text in zip(IDS, TEXTS, strict=True)])
    weights = load_weights("STORE").align(IDS)
    plan = DensitySampler(weights).plan(0).tolist()
    ran = []
    for page in ("trl", "transformers"):
        text = (Path(__file__).parents[2] / "docs" / "train" / f"{page}.md").read_text(encoding="utf-8")
        for body in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            names: dict[str, Any] = {}
            exec(compile(body, page, "exec"), names)
            if "trainer" in names:
                assert names["trainer"].state.global_step == 3
                order = names["trainer"]._get_train_sampler()
                order.set_epoch(0)
                assert list(dict.fromkeys(order)) == list(dict.fromkeys(plan))
                ran.append(page)
            elif "train_dataset" in names:
                drawn = DensitySampler(weights, num_samples=1000).plan(0)
                assert names["train_dataset"]["prompt"] == [TEXTS[row] for row in drawn]
                ran.append("resampled")
    assert ran == ["trl", "resampled", "transformers"]
