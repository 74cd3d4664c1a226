"""The module for verl, on a double of the places that it wraps, as 0.7.1, 0.8.0 and 0.9.1 have them.

``tests/trainers/test_verl.py`` runs verl itself.
"""

from __future__ import annotations

import importlib
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.core.errors import ConfigError, StoreNotFoundError
from embstore.training import DensitySampler, load_weights
from tests.support.stores import small_lines

MODULE = "embstore.integrations.verl"
UTILS, MAIN, TRAINER = "verl.trainer.ppo.utils", "verl.trainer.main_ppo", "verl.trainer.ppo.ray_trainer"
HOMES = {"0.7.1": MAIN, "0.8.0": MAIN, "0.9.1": UTILS}
ROWS = small_lines()[40:60][::-1]  # not in the store's order
BATCH, BATCHES = 3, 6  # the last two of an epoch's 20 draws are dropped

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 under torch 2.13


class Rows:
    """verl's dataset: its rows are in ``dataframe`` after the length filter, its items are something else."""

    def __init__(self) -> None:
        self.dataframe = ROWS

    def __len__(self) -> int:
        return len(self.dataframe)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


class AbstractSampler(Sampler[int]):
    """verl 0.7's base class of samplers that the settings name."""


class Trainer:
    """``RayPPOTrainer``: makes its loaders, and since 0.8 loads no state where an epoch has just ended."""

    home: ModuleType

    def __init__(self, **data: Any) -> None:
        self.config, self.global_steps = SimpleNamespace(data=data), 0

    def _create_dataloader(self, train_dataset: Any, val_dataset: Any, collate_fn: Any, train_sampler: Any) -> None:
        if train_sampler is None:
            train_sampler = self.home.create_rl_sampler(self.config.data, train_dataset)
        self.train_dataloader: Any = StatefulDataLoader(
            train_dataset, batch_size=BATCH, sampler=train_sampler, drop_last=True, collate_fn=list
        )
        self.val_dataloader: Any = StatefulDataLoader(val_dataset, batch_size=1, collate_fn=list)

    def _load_checkpoint(self) -> int:
        if self.global_steps % len(self.train_dataloader):
            self.train_dataloader.load_state_dict(torch.load(self.saved, weights_only=True))  # type: ignore[attr-defined]
        return self.global_steps

    def steps(self) -> Iterator[list[int]]:
        """As ``fit`` fetches them."""
        for _ in range(self.global_steps // len(self.train_dataloader), 99):
            for batch in self.train_dataloader:
                self.global_steps += 1
                yield [item["index"] for item in batch]


def create_rl_sampler(data_config: Any, dataset: Any) -> Any:
    """verl's own, with ``data.shuffle``."""
    return RandomSampler(dataset)


Install = Callable[..., Any]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a double of verl in the place of verl, and imports the module."""

    def fake(name: str, **content: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def imported(version: str, *, without: str = "") -> Any:
        for package in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.experimental", "verl.experimental.dataset"):
            fake(package, __path__=[], __version__=version)
        fake(UTILS)
        if HOMES.get(version) == MAIN:
            fake(MAIN)
        home = sys.modules[HOMES.get(version, UTILS)]
        if without != "create_rl_sampler":
            vars(home)["create_rl_sampler"] = create_rl_sampler
            fake("verl.trainer.ppo.v1.trainer_base", create_rl_sampler=create_rl_sampler)
        trainer: Any = type("RayPPOTrainer", (), {name: each for name, each in vars(Trainer).items() if name != without})
        trainer.home = home
        if without != TRAINER:
            fake(TRAINER, RayPPOTrainer=trainer)
        if version == "0.7.1":
            fake("verl.experimental.dataset.sampler", AbstractSampler=AbstractSampler)
        fake(MODULE)  # so that it is removed at the end
        del sys.modules[MODULE]
        module: Any = importlib.import_module(MODULE)
        module.home, module.trainer = home, trainer
        return module

    return imported


def plan(store: Path, epoch: int = 0, **options: Any) -> list[int]:
    """What an epoch draws."""
    return DensitySampler(load_weights(store).for_dataset(ROWS), **options).plan(epoch).tolist()


@pytest.mark.parametrize("version", HOMES)
def test_verl_gets_the_sampler_of_the_store_wherever_it_makes_one(
    install: Install, version: str, finished_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = install(version)
    assert hasattr(module, "VerlSampler") == (version == "0.7.1")
    options = {"store": str(finished_store), "num_samples": 30, "no_repeat_within": 2}
    config = {"density": options, "seed": 7, "prompt_key": "prompt", "sampler": {"class_path": None}}
    for make in (module.home.create_rl_sampler, sys.modules["verl.trainer.ppo.v1.trainer_base"].create_rl_sampler):
        sampler = make(config, Rows())
        assert list(sampler) == plan(finished_store, seed=7, num_samples=30, no_repeat_within=2)
        assert capsys.readouterr().out == "embstore: an epoch is 30 draws from 20 prompts\n"
    assert type(module.home.create_rl_sampler({"seed": 7}, Rows())) is RandomSampler
    trainer = module.trainer(**config)
    for given in (None, RandomSampler(range(20)), sampler):  # made by the trainer, by __main__, or by the wrapper
        trainer._create_dataloader(Rows(), Rows(), None, given)
        assert isinstance(trainer.train_dataloader.sampler, DensitySampler)
    assert trainer.train_dataloader.sampler is sampler
    assert [item["index"] for batch in trainer.val_dataloader for item in batch] == list(range(20))
    trainer = module.trainer()
    trainer._create_dataloader(Rows(), Rows(), None, None)
    assert type(trainer.train_dataloader.sampler) is RandomSampler
    assert trainer._load_checkpoint() == 0


@pytest.mark.parametrize("version", ["0.8.0", "0.9.1"])
def test_a_run_goes_on_at_any_stop(install: Install, version: str, finished_store: Path) -> None:
    """At the end of an epoch, too, where the trainer leaves out the state."""
    module = install(version)

    def make() -> Any:
        trainer = module.trainer(density={"store": finished_store})
        trainer._create_dataloader(Rows(), Rows(), None, None)
        return trainer

    expected = [plan(finished_store, step // BATCHES)[step % BATCHES * BATCH :][:BATCH] for step in range(2 * BATCHES + 3)]
    trainer, saved = make(), []
    for step, rows in zip(range(len(expected)), trainer.steps(), strict=False):
        assert rows == expected[step]
        torch.save(trainer.train_dataloader.state_dict(), saved_now := io.BytesIO())
        saved.append(saved_now)
    for stop, state in enumerate(saved, start=1):
        again = make()
        again.global_steps, again.saved = stop, io.BytesIO(state.getvalue())
        again._load_checkpoint()
        assert list(itertools.islice(again.steps(), len(expected) - stop)) == expected[stop:], stop


def test_what_the_settings_get_wrong_is_named(install: Install, finished_store: Path, tmp_path: Path) -> None:
    make = install("0.9.1").home.create_rl_sampler
    with pytest.raises(ConfigError, match="density has no option num_sample") as caught:
        make({"density": {"store": finished_store, "num_sample": 3}}, Rows())
    assert "num_samples" in str(caught.value.hint)
    with pytest.raises(StoreNotFoundError, match="none does not exist"):
        make({"density": {"store": tmp_path / "none"}}, Rows())
    with pytest.raises(ConfigError, match=r"another sampler are set: mine\.py"):
        make({"density": {"store": finished_store}, "sampler": {"class_path": "mine.py"}}, Rows())
    trainer = sys.modules[TRAINER].RayPPOTrainer(density={"store": finished_store})
    with pytest.raises(ConfigError, match="another sampler are set: SubsetRandomSampler"):
        trainer._create_dataloader(Rows(), Rows(), None, SubsetRandomSampler([1]))


def test_the_class_for_the_settings_of_0_7(install: Install, finished_store: Path) -> None:
    module = install("0.7.1")
    config = {
        "density": {"store": finished_store},
        "sampler": {"class_path": f"pkg://{MODULE}", "class_name": "VerlSampler"},
    }
    sampler = module.VerlSampler(data_source=Rows(), data_config=config)
    assert isinstance(sampler, AbstractSampler)
    assert module.sampler_for(config, Rows(), sampler) is sampler
    assert list(sampler) == plan(finished_store)


@pytest.mark.parametrize("place", ["create_rl_sampler", "_create_dataloader", "_load_checkpoint", TRAINER])
def test_a_version_without_a_place_is_refused(install: Install, place: str) -> None:
    with pytest.raises(ConfigError, match=r"verl 0\.12\.0 has no .*is for verl 0\.7\.1 to 0\.9\.1") as caught:
        install("0.12.0", without=place)
    assert ("RayPPOTrainer._load_checkpoint" if place == TRAINER else place) in str(caught.value)
    assert "embstore resample" in str(caught.value.hint)


def test_a_version_that_was_not_tested_says_so(install: Install) -> None:
    with pytest.warns(UserWarning, match=r"verl 0\.10\.0 was not tested with embstore, only 0\.7\.1 to 0\.9\.1"):
        install("0.10.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install("0.9.1")


def test_a_package_that_verl_needs_is_not_taken_for_a_part_of_verl(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.import_module

    def without_tensordict(name: str, package: str | None = None) -> ModuleType:
        if name == TRAINER:
            raise ModuleNotFoundError("No module named 'tensordict'", name="tensordict")
        return original(name, package)

    module = install("0.9.1")
    monkeypatch.setattr(importlib, "import_module", without_tensordict)
    with pytest.raises(ModuleNotFoundError, match="tensordict"):
        module._install()
