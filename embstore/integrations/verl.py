"""Density sampling in verl by configuration: verl imports this module, which replaces its sampler by a store's.

    export VERL_USE_EXTERNAL_MODULES=embstore.integrations.verl
    python -m verl.trainer.main_ppo ... +data.density.store=STORE

``data.density`` takes the options of ``StoreSampler``; without it nothing changes. verl makes the sampler of its training
set in ``create_rl_sampler``, or hands it to ``RayPPOTrainer``. Both are wrapped, and join the dataset after verl has
dropped rows. The sampler's state is in verl's ``data.pt``. Since 0.8 ``RayPPOTrainer`` does not load it where an epoch has
just ended, so ``_load_checkpoint`` is wrapped as well: it sets the epoch.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

import verl

from embstore.core.errors import ConfigError
from embstore.integrations.sampler import StoreSampler
from embstore.training.sampler import DensitySampler

_TESTED = "0.7.1 to 0.9.1"
_SERIES = ("0.7.", "0.8.", "0.9.")
_HOMES = ("verl.trainer.ppo.utils", "verl.trainer.main_ppo")  # since 0.9, and before


def sampler_for(data_config: Any, dataset: Any, own: Any) -> Any:  # noqa: ANN401 - verl's settings, dataset and sampler
    """The sampler of the training set: the one of ``data.density``, or verl's ``own`` if that is not set.

    Raises
    ------
    ConfigError
        ``own`` is another sampler that the user chose.
    EmbstoreError
        See ``StoreSampler``.
    """
    if data_config.get("density") is None or isinstance(own, DensitySampler):
        return own
    chosen = (data_config.get("sampler") or {}).get("class_path") or type(own).__name__
    if chosen not in ("RandomSampler", "SequentialSampler"):
        raise ConfigError(f"data.density and another sampler are set: {chosen}", hint="remove one of them")
    sampler = StoreSampler(dataset, data_config)
    print(f"embstore: an epoch is {len(sampler)} draws from {sampler.num_rows} prompts", flush=True)  # noqa: T201 - as verl does
    return sampler


def _wrap_sampler(home: ModuleType) -> None:
    """Wrap ``create_rl_sampler`` where it is defined, and where it was imported from there."""
    original = home.create_rl_sampler

    @functools.wraps(original)
    def create_rl_sampler(data_config: Any, dataset: Any) -> Any:  # noqa: ANN401
        return sampler_for(data_config, dataset, original(data_config, dataset))

    for module in [each for name, each in sys.modules.items() if name.startswith("verl.")]:
        if vars(module).get("create_rl_sampler") is original:
            vars(module)["create_rl_sampler"] = create_rl_sampler


def _wrap_trainer(trainer: Any) -> None:  # noqa: ANN401 - the class RayPPOTrainer
    """Wrap how it makes its loaders, and how it loads a checkpoint."""
    make, load = trainer._create_dataloader, trainer._load_checkpoint

    @functools.wraps(make)
    def create(self: Any, train_dataset: Any, val_dataset: Any, collate_fn: Any, train_sampler: Any) -> None:  # noqa: ANN401
        if train_sampler is not None:  # before 0.9 from the create_rl_sampler of __main__, which cannot be wrapped
            train_sampler = sampler_for(self.config.data, train_dataset, train_sampler)
        make(self, train_dataset, val_dataset, collate_fn, train_sampler)

    @functools.wraps(load)
    def load_and_set_epoch(self: Any) -> Any:  # noqa: ANN401
        result = load(self)
        loader: Any = getattr(self, "train_dataloader", None)  # a trainer of a subclass may have none
        if isinstance(sampler := getattr(loader, "sampler", None), DensitySampler):
            # if verl loaded a state, the loader hands it on when its iteration begins, and it counts
            sampler.set_epoch(self.global_steps // len(loader))
        return result

    trainer._create_dataloader, trainer._load_checkpoint = create, load_and_set_epoch


def _imported(name: str) -> ModuleType | None:
    """A module of verl; None if this version does not have it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("verl"):
            raise
        return None


def _install() -> None:
    """Wrap what this version of verl has.

    Raises
    ------
    ConfigError
        Something is not where it was in the versions that were tested.
    """
    # before 0.9 main_ppo is imported here and run as __main__, of which Python would warn
    warnings.filterwarnings("ignore", message="'verl.trainer.main_ppo' found in sys.modules", category=RuntimeWarning)
    home = next((module for module in map(_imported, _HOMES) if hasattr(module, "create_rl_sampler")), None)
    trainer = getattr(_imported("verl.trainer.ppo.ray_trainer"), "RayPPOTrainer", None)
    missing = [f"RayPPOTrainer.{name}" for name in ("_create_dataloader", "_load_checkpoint") if not hasattr(trainer, name)]
    if home is None or missing:
        missing = ["create_rl_sampler"] * (home is None) + missing
        raise ConfigError(
            f"verl {verl.__version__} has no {', '.join(missing)}: embstore.integrations.verl is for verl {_TESTED}",
            hint="unset VERL_USE_EXTERNAL_MODULES and train on a file of draws: embstore resample, docs/train/verl.md",
        )
    if not verl.__version__.startswith(_SERIES):
        warnings.warn(
            f"verl {verl.__version__} was not tested with embstore, only {_TESTED}: its order is the store's if its output "
            "says 'embstore: an epoch is'",
            stacklevel=2,
        )
    _wrap_sampler(home)
    _wrap_trainer(trainer)


_install()

if (_module := _imported("verl.experimental.dataset.sampler")) is not None:  # 0.7 takes the class from data.sampler, too

    class VerlSampler(StoreSampler, _module.AbstractSampler):  # type: ignore[misc, name-defined]  # verl is untyped
        """For ``data.sampler.class_path=pkg://embstore.integrations.verl data.sampler.class_name=VerlSampler``."""
