"""axolotl's own path from a YAML file to a trained model, with the plugin: configuration, data, trainer, steps, resume."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from embstore.core.errors import ConfigError
from embstore.integrations.trl import attach
from embstore.training import DensitySampler, load_weights
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import build_small, write_lines

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]  # axolotl's own, and of what it brings

ROWS = [{"id": f"q{row}", "prompt": f"Explain number {row}."} for row in range(12)]
SEED = 3
PLUGIN = "embstore.integrations.axolotl.DensityPlugin"
SEEN: list[str] = []


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """axolotl imports it by its name."""
    SEEN.extend(prompts)
    return [float(len(set(text))) for text in completions]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("axolotl")
    save_model(root / "model", make_model("llama"), make_tokenizer(template=True))
    build_small(write_lines(root / "rows.jsonl", ROWS), root / "store")
    write_lines(root / "text.jsonl", [{"text": row["prompt"]} for row in ROWS])
    tokens = [{"id": row["id"], "input_ids": [10 + at] * 4, "labels": [10 + at] * 4} for at, row in enumerate(ROWS)]
    Dataset.from_list([row | {"attention_mask": [1] * 4} for row in tokens]).to_parquet(root / "tokens.parquet")
    return root


def settings(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base_model": str(folder / "model"),
        "plugins": [PLUGIN],
        "embstore_store": str(folder / "store"),
        "embstore_seed": SEED,
        "output_dir": str(out),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": 99,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "tf32": False,
        "use_cpu": True,
    } | changes


def grpo(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0, "reward_funcs": [f"{__name__}.reward"]}
    rows = {"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}
    return {"rl": "grpo", "datasets": [rows], "trl": own | changes.pop("trl", {})} | changes


def tokenized(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = {"path": str(folder / "tokens.parquet"), "ds_type": "parquet", "type": None}
    return {"datasets": [rows], "embstore_id_column": "id"} | changes


def configured(file: Path, keys: dict[str, Any]) -> Any:
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()  # those of an earlier run in this process
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(keys))
    return load_cfg(str(file))


def made(cfg: Any) -> Any:
    """The trainer, as ``axolotl train`` makes it."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    load = load_preference_datasets if cfg.rl else load_datasets
    return setup_model_and_trainer(cfg, load(cfg=cfg, cli_args=TrainerCliArgs()))[0]


def trained(folder: Path, out: Path, keys: dict[str, Any], *, stop: int = 0) -> tuple[Any, list[Any]]:
    """The trainer, and what it drew, from the checkpoint of step ``stop`` if one is given."""
    from axolotl.train import execute_training

    cfg = configured(out / "run.yml", settings(folder, out, **keys))
    trainer = made(cfg)
    SEEN.clear()
    tokens: list[int] = []
    loss = trainer.compute_loss

    def noted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens.extend(inputs["input_ids"][:, 0].tolist() if "input_ids" in inputs else [])
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    execute_training(cfg, trainer, str(out / f"checkpoint-{stop}") if stop else None)
    return trainer, tokens or SEEN[::2]


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_run_draws_the_plan_and_resumes_exactly(
    kind: str, folder: Path, tmp_path: Path, evidence: Callable[..., None]
) -> None:
    """GRPO draws 2 prompts a step, 6 steps an epoch; SFT 4 rows a step, 3 steps an epoch."""
    keys = grpo(folder, max_steps=8) if kind == "grpo" else tokenized(folder)
    trainer, whole = trained(folder, tmp_path, keys)
    dataset = trainer.train_dataset
    sampler = DensitySampler(load_weights(folder / "store").for_dataset(dataset, id_column="id"), seed=SEED)
    of_rows = dataset["prompt"] if kind == "grpo" else [row[0] for row in dataset["input_ids"]]
    plan = [of_rows[row] for epoch in range(2) for row in sampler.plan(epoch)]
    assert whole == plan[: len(whole)]
    assert len(whole) == {"grpo": 16, "sft": 20}[kind]
    stops = {"grpo": (1, 5, 6, 7), "sft": (1, 2, 3, 4)}[kind]
    for stop in stops:
        assert trained(folder, tmp_path, keys, stop=stop)[1] == whole[stop * len(whole) // trainer.state.max_steps :]
    version = importlib.metadata.version("axolotl")
    what = f"a YAML run of {type(trainer).__name__}"
    evidence(trainer="axolotl", version=version, kind="run", what=what, stops=len(stops), exact=len(stops))


def test_prompts_survive_for_rl_and_only_tokens_for_sft(folder: Path, tmp_path: Path) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets, load_preference_datasets

    cfg = configured(tmp_path / "grpo.yml", settings(folder, tmp_path, **grpo(folder)))
    assert set(load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset.column_names) == {"id", "prompt"}
    text = {"path": str(folder / "text.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}
    cfg = configured(tmp_path / "sft.yml", settings(folder, tmp_path, datasets=[text]))
    rows = load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(ConfigError, match="the dataset has no column prompt"):
        made(cfg)


def test_sample_packing_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its batch sampler comes out of the same hook: rows would be drawn one by one, and not packed."""
    with pytest.raises(ConfigError, match="MultipackBatchSampler"):
        trained(folder, tmp_path, tokenized(folder, sample_packing=True))


def test_an_order_that_was_asked_for_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SequentialSampler"):
        trained(folder, tmp_path, tokenized(folder, curriculum_sampling=True))


def test_a_producer_of_prompts_beside_the_loader_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_producer"):
        trained(folder, tmp_path, grpo(folder, trl={"use_data_producer": True}))


def test_context_parallelism_is_refused(folder: Path) -> None:
    """Its own sampler is split by rank; the trainer is made without its constructor, which needs a process group."""
    from axolotl.core.trainers.grpo.trainer import AxolotlGRPOSequenceParallelTrainer
    from transformers.trainer_callback import CallbackHandler

    trainer = object.__new__(AxolotlGRPOSequenceParallelTrainer)
    args = SimpleNamespace(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        context_parallel_size=2,
        curriculum_sampling=False,
        seed=0,
    )
    vars(trainer).update(
        train_dataset=ROWS, args=args, world_size=2, rank=0, num_generations=2, num_iterations=1,
        callback_handler=CallbackHandler([], None, None, None, None),
    )  # fmt: skip
    attach(trainer, np.ones(len(ROWS)))
    with pytest.raises(ConfigError, match="SequenceParallelRepeatRandomSampler"):
        trainer._get_train_sampler()  # as its get_train_dataloader asks


def test_a_plugin_that_cannot_be_imported_is_only_logged_and_its_keys_are_dropped(folder: Path, tmp_path: Path) -> None:
    """As where embstore is not installed beside axolotl: the run is uniform."""
    from axolotl.integrations.base import PluginManager

    keys = settings(folder, tmp_path, **grpo(folder, plugins=["embstore.integrations.nowhere.DensityPlugin"]))
    cfg = configured(tmp_path / "run.yml", keys)
    assert not PluginManager.get_instance().plugins
    assert cfg.embstore_store is None


@pytest.mark.parametrize(
    ("key", "message"), [("embstore_sead", "there is no key embstore_sead"), ("embstore_seed", "valid integer")]
)
def test_a_wrong_key_is_an_error_of_the_configuration(folder: Path, tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(tmp_path / "run.yml", settings(folder, tmp_path, **grpo(folder, **{key: "x"})))


def test_the_page_shows_a_valid_configuration(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "train" / "axolotl.md").read_text(encoding="utf-8")
    keys = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    needed = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 1e-3}
    changes = {"base_model": str(folder / "model"), "embstore_store": str(folder / "store")}
    cfg = configured(tmp_path / "run.yml", keys | needed | changes | {"bf16": False})
    assert (cfg.embstore_store, cfg.embstore_seed) == (str(folder / "store"), 0)


def test_a_file_of_draws_keeps_its_order(folder: Path, tmp_path: Path, evidence: Callable[..., None]) -> None:
    """SFT from text, by the settings that the page names."""
    drawn = DensitySampler(load_weights(folder / "store"), seed=SEED, positional=True).plan(0).tolist()
    texts = [json.loads(line)["prompt"] for line in (folder / "store" / "prompts.jsonl").read_text().splitlines()]
    file = write_lines(tmp_path / "drawn.jsonl", [{"text": texts[row]} for row in drawn])
    rows = {"path": str(file), "ds_type": "json", "type": "completion", "field": "text"}
    order = {"shuffle_merged_datasets": False, "curriculum_sampling": True}
    plain = {"plugins": [], "embstore_store": None, "embstore_seed": None}
    trainer, first = trained(folder, tmp_path, {"datasets": [rows], "max_steps": 3, **order, **plain})
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    tokens = [trainer.train_dataset[row]["input_ids"] for row in sampler]
    assert trainer.processing_class.batch_decode(tokens, skip_special_tokens=True) == [texts[row] for row in drawn]
    assert first == [row[0] for row in tokens]
    version = importlib.metadata.version("axolotl")
    evidence(trainer="axolotl", version=version, kind="run", what="a YAML run of SFT on a file of draws")
