"""What loaders hand out under accelerate and under plain DDP, on one process or on several.

``python -m torch.distributed.run --nproc_per_node=2 -m tests.support.loader_runs FOLDER`` leaves ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch import distributed
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.training import DensitySampler

ROWS, BATCH, EPOCHS = 24, 4, 3
WEIGHTS = np.random.default_rng(2).gamma(0.7, size=ROWS)
NAMES = ("split_batches", "dispatch_batches", "even_batches", "use_stateful_dataloader")
SETTINGS = {
    " ".join(name for name, on in zip(NAMES, flags, strict=True) if on) or "none": dict(zip(NAMES, flags, strict=True))
    for flags in itertools.product((False, True), repeat=len(NAMES))
}
Batches = list[list[int]]


def draws(**options: Any) -> DensitySampler:
    return DensitySampler(WEIGHTS, seed=6, **options)


def prepared(settings: dict[str, bool], **options: Any) -> tuple[Accelerator, Any]:
    """A new accelerator, as after a start of the program, and its loader; accelerate keeps its state in classes."""
    AcceleratorState._reset_state(reset_partial_state=not distributed.is_initialized())
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    return accelerator, accelerator.prepare(DataLoader(torch.arange(ROWS), batch_size=BATCH, sampler=draws(**options)))


def batches(loader: Iterable[Any]) -> Batches:
    return [batch.tolist() for batch in loader]


def whole(settings: dict[str, bool], **options: Any) -> Batches:
    """The epochs of one run; nothing tells the sampler of them."""
    _, loader = prepared(settings, **options)
    return [batch for _ in range(EPOCHS) for batch in batches(loader)]


def skipped(settings: dict[str, bool], stop: int, length: int, *, times: int = 1) -> Batches:
    """What is left behind ``stop`` steps, by accelerate's way without states; each step counts as ``times`` batches."""
    _, loader = prepared(settings)
    begun, done = divmod(stop, length)
    done *= times
    found = []
    for epoch in range(begun, EPOCHS):
        loader.set_epoch(epoch)
        found += batches(skip_first_batches(loader, done) if epoch == begun and done else loader)
    return found


def restored(settings: dict[str, bool], stop: int, length: int, folder: Path, *, announce: bool = True) -> Batches:
    """What is left behind ``stop`` steps, by ``save_state`` and ``load_state``; with or without ``set_epoch`` then."""
    accelerator, loader = prepared(settings)
    begun, done = divmod(stop, length)
    for _ in range(begun):
        batches(loader)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()  # one process writes, all of them read
    accelerator, loader = prepared(settings)
    accelerator.load_state(str(folder))
    found = []
    for epoch in range(begun, EPOCHS):
        if announce:
            loader.set_epoch(epoch)
        found += batches(loader)
    return found


def plain(ranks: dict[str, Any], stop: int = 0) -> Batches:
    """DDP without accelerate: what is left behind ``stop`` steps of a stateful loader over a sampler that knows its rank."""

    def made() -> tuple[DensitySampler, StatefulDataLoader[Any]]:
        sampler = draws(**ranks)
        return sampler, StatefulDataLoader(torch.arange(ROWS), batch_size=BATCH, sampler=sampler)

    sampler, loader = made()
    begun, done = divmod(stop, len(loader))
    for epoch in range(begun):
        sampler.set_epoch(epoch)
        batches(loader)
    sampler.set_epoch(begun)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    sampler, loader = made()
    loader.load_state_dict(state)
    found = []
    for epoch in range(begun, EPOCHS):
        sampler.set_epoch(epoch)
        found += batches(loader)
    return found


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {"accelerate": {}, "ddp": {}}
    for name, settings in SETTINGS.items():
        run: dict[str, Any] = {"whole": whole(settings)}
        length = len(run["whole"]) // EPOCHS
        stops = range(1, EPOCHS * length)
        run["skipped"] = {stop: skipped(settings, stop, length) for stop in stops}
        if settings["dispatch_batches"] and not settings["split_batches"]:
            run["skipped twice"] = {stop: skipped(settings, stop, length, times=2) for stop in stops}
        if settings["use_stateful_dataloader"]:
            run["restored"] = {stop: restored(settings, stop, length, folder / "state") for stop in stops}
        found["accelerate"][name] = run
    uneven = {"even_batches": True}, {"even_batches": False}
    found["uneven"] = [whole(settings, num_samples=ROWS - 3) for settings in uneven]
    given = {"rank": distributed.get_rank(), "num_replicas": distributed.get_world_size()}
    found["split twice"] = whole({}, **given)
    for name, ranks in {"auto": {"rank": "auto"}, "given": given}.items():
        run = {"whole": plain(ranks)}
        run["restored"] = {stop: plain(ranks, stop) for stop in range(1, len(run["whole"]))}
        found["ddp"][name] = run
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
