"""verl's own data path, from its settings to the state that it saves: the order is the plan, and goes on exactly.

Runs in the environments of ``make test-trainers``. Only what needs GPUs is left out: the workers, whose checkpoints are two
methods that do nothing here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import SubsetRandomSampler

from embstore.core.errors import ConfigError
from embstore.training import DensitySampler, load_weights, resample_file
from tests.support.models import make_tokenizer
from tests.support.stores import build_small, write_lines

MODULE = "embstore.integrations.verl"
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 under torch 2.13
]

BATCH, LONGEST = 4, 40
BATCHES = 7  # of an epoch: 29 rows are short enough
STEPS = 2 * BATCHES + 3
# one user turn each; every seventh is too long for verl's filter
CHATS = [
    [{"role": "user", "content": f"What is {number} times {number * 7 % 11}?{' Show each step.' * 9 * (number % 7 == 3)}"}]
    for number in range(34)
]
KEPT = [number for number in range(len(CHATS)) if number % 7 != 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """verl's files: training rows in two, and others to validate on; a store of the chats, and one of their texts."""
    folder = tmp_path_factory.mktemp("verl")
    rows = [
        {
            "data_source": "sums",
            "prompt": chat,
            "reward_model": {"style": "rule", "ground_truth": str(number)},
            "extra_info": {"index": number},
        }
        for number, chat in enumerate(CHATS)
    ]
    for name, part in {"train_1": rows[:20], "train_2": rows[20:], "all": rows, "test": rows[:7]}.items():
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet")
    lines = [{"messages": chat} for chat in CHATS]
    build_small(write_lines(folder / "chats.jsonl", lines[::-1]), folder / "STORE")  # not in the order of the files
    build_small(write_lines(folder / "texts.jsonl", [{"prompt": chat[0]["content"]} for chat in CHATS]), folder / "TEXTS")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _verl() -> None:
    """verl, which imports the module as the variable says."""
    os.environ["VERL_USE_EXTERNAL_MODULES"] = MODULE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of engines that are not installed
        import_module("verl.trainer.main_ppo")
        for name in NEWER.values():
            with contextlib.suppress(ModuleNotFoundError):
                import_module(name)
    assert MODULE in sys.modules


def settings(folder: Path, *overrides: str) -> Any:
    """verl's settings, as its command line makes them."""
    return copy.deepcopy(composed(folder, overrides))


@functools.cache
def composed(folder: Path, overrides: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_module

    given = [
        f"data.train_files=[{folder}/train_1.parquet,{folder}/train_2.parquet]",
        f"data.val_files={folder}/test.parquet",
        f"data.max_prompt_length={LONGEST}",
        "data.filter_overlong_prompts=True",
        "++data.filter_overlong_prompts_workers=null",
        f"data.train_batch_size={BATCH}",
        "data.dataloader_num_workers=0",
        f"++data.cache_dir={folder}/cache",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*given, *overrides])


def density(folder: Path, *options: str) -> list[str]:
    """The settings that a user adds."""
    return [f"+data.density.store={folder}/STORE", *(f"+data.density.{option}" for option in options)]


def plan(folder: Path, epoch: int, *, store: str = "STORE", **options: Any) -> list[int]:
    """What an epoch draws, by ``extra_info.index``: from the chats that are short enough, joined as a list."""
    weights = load_weights(folder / store).for_dataset([CHATS[number] for number in KEPT])
    return [KEPT[row] for row in DensitySampler(weights, **options).plan(epoch).tolist()]


class Workers:
    """The workers that train: their checkpoints are not what is tested."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


def bare(trainer: type, config: Any) -> Any:
    """A trainer without workers."""
    made = trainer.__new__(trainer)
    made.config, made.tokenizer, made.processor = config, make_tokenizer(template=True), None
    made.actor_rollout_wg, made.use_critic, made.global_steps = Workers(), False, 0
    return made


def usual_trainer(config: Any) -> Any:
    """``RayPPOTrainer``, which makes datasets and sampler itself."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = bare(RayPPOTrainer, config)
    trainer._create_dataloader(None, None, None, None)
    return trainer


NEWER = {"0.8": "verl.trainer.main_ppo_sync", "0.9": "verl.trainer.ppo.v1"}


def newer_trainer(config: Any) -> Any:
    """The trainer that is called v1 in 0.9, and is run by ``main_ppo_sync`` in 0.8."""
    name = NEWER.get(version("verl")[:3])
    if name is None:
        pytest.skip("0.7 has one trainer")
    module: Any = import_module(name)
    trainer = bare(module.get_trainer_cls("sync") if hasattr(module, "get_trainer_cls") else module.PPOTrainer, config)
    trainer.trainer_mode, trainer.parameter_sync_step = "sync", 1
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    trainer._init_dataloader()
    return trainer


def steps_of(trainer: Any) -> Iterator[list[int]]:
    """The rows of each step, fetched as ``fit`` does: by ``_next_train_batch``, or in its two loops."""
    if hasattr(trainer, "_next_train_batch"):
        while True:
            rows = list(map(int, trainer._next_train_batch()["index"]))
            trainer.global_steps += 1
            yield rows
    for _ in range(trainer.global_steps // len(trainer.train_dataloader), 1 << 10):
        for batch in trainer.train_dataloader:
            trainer.global_steps += 1
            yield list(map(int, batch["index"]))


def rows_of(trainer: Any, steps: int) -> list[list[int]]:
    """The rows of so many steps."""
    return list(itertools.islice(steps_of(trainer), steps))


def batched(draws: list[int]) -> list[list[int]]:
    """An epoch's whole batches: verl drops a part of one."""
    return [draws[start : start + BATCH] for start in range(0, len(draws) - BATCH + 1, BATCH)]


@pytest.fixture
def datasets_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl reads and filters its files once in the test, not again at every resume."""
    from verl.utils.dataset import rl_dataset

    made: dict[str, Any] = {}
    original = rl_dataset.get_dataset_class

    def once(config: Any) -> Callable[..., Any]:
        def make(*, data_files: Any, **others: Any) -> Any:
            if str(data_files) not in made:
                made[str(data_files)] = original(config)(data_files=data_files, **others)
            return made[str(data_files)]

        return make

    monkeypatch.setattr(rl_dataset, "get_dataset_class", once)


Make = Callable[[Any], Any]
both = pytest.mark.parametrize("make", [usual_trainer, newer_trainer])


def resumed(make: Make, folder: Path, overrides: list[str], step: int) -> Any:
    """A new trainer that has loaded the checkpoint of a step."""
    config = settings(folder, *overrides)
    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = f"{folder}/checkpoints/global_step_{step}"
    trainer = make(config)
    trainer._load_checkpoint()
    assert trainer.global_steps == step
    return trainer


def run_and_save(make: Make, folder: Path, overrides: list[str]) -> list[list[int]]:
    """The rows of an uninterrupted run that saves at each step."""
    trainer, rows = make(settings(folder, *overrides)), []
    for step in itertools.islice(steps_of(trainer), STEPS):
        rows.append(step)
        trainer._save_checkpoint()
        torch.load(folder / f"checkpoints/global_step_{len(rows)}/data.pt", weights_only=True)
    return rows


@both
@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, STEPS)), (2, (3, BATCHES, BATCHES + 1, 2 * BATCHES))])
def test_the_order_is_the_plan_and_goes_on_exactly_at_every_stop(
    make: Make, workers: int, stops: Any, folder: Path, request: pytest.FixtureRequest, evidence: Callable[..., None]
) -> None:
    if len(stops) > 4:
        request.getfixturevalue("datasets_once")
    overrides = [*density(folder, "seed=3"), f"data.dataloader_num_workers={workers}"]
    rows = run_and_save(make, folder, overrides)
    epochs = [batched(plan(folder, epoch, seed=3)) for epoch in range(3)]
    assert [len(each) for each in epochs] == [BATCHES] * 3
    assert rows == [*epochs[0], *epochs[1], *epochs[2]][:STEPS]
    assert epochs[0] != epochs[1]
    assert max(Counter(itertools.chain(*epochs[0])).values()) > 1  # weights are not equal
    differ = [stop for stop in stops if rows_of(resumed(make, folder, overrides, stop), STEPS - stop) != rows[stop:]]
    assert differ == []
    evidence(
        trainer="verl",
        version=version("verl"),
        kind="run",
        what=f"{type(make(settings(folder))).__name__}: files, length filter, loader, data.pt, {workers} loader workers",
        stops=len(stops),
        exact=len(stops) - len(differ),
    )


def test_without_the_wrapper_an_epoch_is_drawn_again_after_a_stop_at_its_end(folder: Path) -> None:
    """Why ``_load_checkpoint`` is wrapped: since 0.8 this trainer does not load the state there."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = usual_trainer(settings(folder, *density(folder)))
    rows_of(trainer, BATCHES)
    trainer._save_checkpoint()
    again = usual_trainer(settings(folder, *density(folder), "trainer.resume_mode=auto"))
    RayPPOTrainer._load_checkpoint.__wrapped__(again)
    forgets = not version("verl").startswith("0.7.")
    assert rows_of(again, BATCHES) == batched(plan(folder, 0 if forgets else 1))


@both
def test_nothing_changes_without_the_settings(make: Make, folder: Path) -> None:
    trainer = make(settings(folder, "data.shuffle=True", "data.seed=5"))
    assert type(trainer.train_dataloader.sampler).__name__ == "RandomSampler"
    assert sorted(trainer.train_dataloader.sampler) == list(range(len(KEPT)))
    trainer = make(settings(folder, "data.shuffle=False"))
    assert rows_of(trainer, BATCHES) == batched(KEPT)


@both
def test_the_validation_set_is_left_alone(make: Make, folder: Path) -> None:
    trainer = make(settings(folder, *density(folder), "data.validation_shuffle=False"))
    assert [index for batch in trainer.val_dataloader for index in batch["index"]] == [0, 1, 2, 4, 5, 6]


@both
def test_options_reach_the_sampler_and_others_are_named(make: Make, folder: Path) -> None:
    options = ["num_samples=12", "no_repeat_within=4", "on_missing=drop"]
    trainer = make(settings(folder, *density(folder, *options), "data.seed=8"))  # verl's own seed is the default
    expected = batched(plan(folder, 0, seed=8, num_samples=12, no_repeat_within=4))
    assert rows_of(trainer, 4) == [*expected, batched(plan(folder, 1, seed=8, num_samples=12, no_repeat_within=4))[0]]
    with pytest.raises(ConfigError, match="density has no option num_sample"):
        make(settings(folder, *density(folder, "num_sample=12")))


@both
def test_a_store_of_plain_texts_joins_verls_chats_and_says_so(make: Make, folder: Path) -> None:
    with pytest.warns(UserWarning, match="contains plain texts: the chats of this dataset were joined"):
        trainer = make(settings(folder, f"+data.density.store={folder}/TEXTS"))
    with pytest.warns(UserWarning, match="contains plain texts"):
        expected = plan(folder, 0, store="TEXTS")
    assert rows_of(trainer, BATCHES) == batched(expected)


def test_the_newer_trainer_counts_an_epoch_by_the_rows_of_the_dataset(folder: Path) -> None:
    """Since 0.9, so ``num_samples`` needs ``trainer.total_training_steps``; before, the loader is counted."""
    options = [*density(folder, "num_samples=12"), "trainer.total_epochs=2"]
    assert usual_trainer(settings(folder, *options)).total_training_steps == 2 * 12 // BATCH
    counted = newer_trainer(settings(folder, *options)).total_training_steps
    assert counted == 2 * (12 // BATCH if version("verl").startswith("0.8.") else len(KEPT) // BATCH)


def test_a_sampler_that_was_made_before_the_trainer_is_replaced(folder: Path) -> None:
    """``python -m verl.trainer.main_ppo`` makes it with a copy of ``create_rl_sampler`` in ``__main__`` before 0.9."""
    from torchdata.stateful_dataloader.sampler import RandomSampler
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    given = usual_trainer(settings(folder, "data.shuffle=True"))
    trainer = bare(RayPPOTrainer, settings(folder, *density(folder)))
    trainer._create_dataloader(given.train_dataset, given.val_dataset, None, RandomSampler(given.train_dataset))
    assert rows_of(trainer, BATCHES) == batched(plan(folder, 0))
    trainer = bare(RayPPOTrainer, settings(folder, *density(folder)))
    with pytest.raises(ConfigError, match=r"data\.density and another sampler are set: SubsetRandomSampler"):
        trainer._create_dataloader(given.train_dataset, given.val_dataset, None, SubsetRandomSampler([1, 2]))


def test_the_class_is_taken_from_the_settings_where_the_version_does_so(folder: Path, evidence: Callable[..., None]) -> None:
    if not version("verl").startswith("0.7."):
        # removed in 0.8: whoever still sets it is told
        config = settings(folder, *density(folder), "++data.sampler.class_path=mine.py")
        with pytest.raises(ConfigError, match=r"data\.density and another sampler are set: mine\.py"):
            usual_trainer(config)
        return
    named = [f"data.sampler.class_path=pkg://{MODULE}", "data.sampler.class_name=VerlSampler"]
    rows = run_and_save(usual_trainer, folder, [*density(folder), *named])
    assert rows == [step for epoch in range(3) for step in batched(plan(folder, epoch))][:STEPS]
    for stop in range(1, STEPS):
        assert rows_of(resumed(usual_trainer, folder, [*density(folder), *named], stop), STEPS - stop) == rows[stop:]
    evidence(
        trainer="verl",
        version=version("verl"),
        kind="run",
        what="RayPPOTrainer with data.sampler.class_path",
        stops=STEPS - 1,
        exact=STEPS - 1,
    )


# --- processes of verl's own ---------------------------------------------------------------------------------------------

READ = """
import json, sys
from pathlib import Path

from omegaconf import OmegaConf
from verl.trainer.main_ppo import run_ppo


def read(config):
    from tests.trainers import test_verl

    trainer = test_verl.usual_trainer(config)
    rows = test_verl.rows_of(trainer, test_verl.BATCHES)
    Path(config.trainer.default_local_dir).write_text(json.dumps(rows))


config = OmegaConf.load(sys.argv[1])
"""
IN_RAY = """
import ray


@ray.remote(num_cpus=1)
class Task:
    def run(self, config):
        read(config)


run_ppo(config, Task)
"""
RAY = [
    "++ray_kwargs.ray_init.num_cpus=1",
    "++ray_kwargs.ray_init.include_dashboard=False",
    "++ray_kwargs.ray_init.object_store_memory=90000000",
]


def read_elsewhere(code: str, folder: Path, here: Path, *overrides: str, **variables: str) -> tuple[Any, str]:
    """The rows of an epoch in a process with these variables, or in its Ray actor; and its output."""
    from omegaconf import OmegaConf

    here.mkdir()
    config = settings(folder, *density(folder), "data.shuffle=False", *RAY, *overrides)
    config.trainer.default_local_dir = str(here / "rows.json")
    OmegaConf.save(config, here / "settings.yaml", resolve=False)
    environment = {name: value for name, value in os.environ.items() if name != "VERL_USE_EXTERNAL_MODULES"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", READ + code, str(here / "settings.yaml")],
        cwd=here,
        env={**environment, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((here / "rows.json").read_text()), done.stdout


SAYS = "embstore: an epoch is 29 draws from 29 prompts"


def test_verl_ignores_the_settings_without_the_variable(folder: Path, tmp_path: Path) -> None:
    """No code of embstore runs then, and only a line is missing in the output."""
    rows, said = read_elsewhere("read(config)", folder, tmp_path / "without")
    assert rows == batched(KEPT)
    assert SAYS not in said
    rows, said = read_elsewhere("read(config)", folder, tmp_path / "with", VERL_USE_EXTERNAL_MODULES=MODULE)
    assert rows == batched(plan(folder, 0))
    assert SAYS in said


@pytest.mark.parametrize("where", ["environment", "runtime_env"])
def test_the_variable_reaches_the_ray_actor_that_makes_the_loader(
    where: str, folder: Path, tmp_path: Path, evidence: Callable[..., None]
) -> None:
    """verl's own ``run_ppo`` starts Ray and the actor: here one that makes a loader, with the settings that it is given."""
    if where == "environment":
        rows, said = read_elsewhere(IN_RAY, folder, tmp_path / where, VERL_USE_EXTERNAL_MODULES=MODULE)
    else:
        setting = f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES={MODULE}"
        rows, said = read_elsewhere(IN_RAY, folder, tmp_path / where, setting)
    assert rows == batched(plan(folder, 0))
    assert SAYS in said  # Ray shows what its actors print
    evidence(trainer="verl", version=version("verl"), kind="run", what=f"run_ppo and its Ray actor, variable in the {where}")


def test_python_does_not_warn_of_the_module_that_it_runs(tmp_path: Path) -> None:
    """Before 0.9 the module imports ``main_ppo``, which is what users run."""
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "--cfg", "job", "+data.density.store=STORE"],
        cwd=tmp_path,
        env=os.environ | {"VERL_USE_EXTERNAL_MODULES": MODULE},
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    assert "store: STORE" in done.stdout
    assert "found in sys.modules" not in done.stderr


# --- files of draws ------------------------------------------------------------------------------------------------------


def test_a_file_of_draws_loses_those_of_rows_that_verl_drops(folder: Path, evidence: Callable[..., None]) -> None:
    """In order with ``data.shuffle=False``, but shorter than planned; spare draws make up for it."""
    drawn = folder / "drawn.parquet"
    resample_file(folder / "STORE", folder / "all.parquet", drawn, num_samples=60, over=30, seed=2)
    draws = [row["index"] for row in pq.read_table(drawn)["extra_info"].to_pylist()]
    kept = [index for index in draws if index in KEPT]
    assert len(draws) == 90
    assert sum(index in KEPT for index in draws[:60]) < 60 <= len(kept)
    config = settings(folder, "data.shuffle=False")
    config.data.train_files = str(drawn)
    trainer = usual_trainer(config)
    assert rows_of(trainer, len(kept) // BATCH) == batched(kept)
    evidence(trainer="verl", version=version("verl"), kind="run", what="RayPPOTrainer on a file of embstore resample")


def test_the_trainer_of_sft_ignores_the_settings_and_shuffles_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sampler is fixed: every draw of a file is trained on once, in another order."""
    images = ModuleType("verl.models.transformers.qwen2_vl")  # its models of images need an older transformers
    vars(images)["get_rope_index"] = None
    monkeypatch.setitem(sys.modules, images.__name__, images)
    from verl.trainer.sft_trainer import SFTTrainer

    trainer = SFTTrainer.__new__(SFTTrainer)
    data = {"train_batch_size": 5, "pad_mode": "no_padding", "num_workers": 0, "density": {"store": "STORE"}}
    trainer.config = SimpleNamespace(data=SimpleNamespace(**data))
    trainer.engine = SimpleNamespace(get_data_parallel_rank=lambda: 0, get_data_parallel_size=lambda: 1)
    trainer.train_dataset, trainer.val_dataset = list(range(20)), None
    trainer._build_dataloader()
    order = list(trainer.train_sampler)
    assert type(trainer.train_sampler).__name__ == "DistributedSampler"
    assert order != sorted(order) == list(range(20))
