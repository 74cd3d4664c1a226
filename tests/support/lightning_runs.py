"""Lightning's Trainer, with the rows of every batch noted; on two processes under torchrun.

``python -m torch.distributed.run --nproc_per_node=2 -m tests.support.lightning_runs FOLDER`` leaves ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.training import DensitySampler

ROWS, BATCH, EPOCHS = 24, 3, 3
WEIGHTS = np.random.default_rng(2).gamma(0.7, size=ROWS)


def draws(**options: Any) -> DensitySampler:
    return DensitySampler(WEIGHTS, seed=5, **options)


class Noting(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen.append(batch.tolist())
        loss: torch.Tensor = self.layer(batch.float()[:, None]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(
    sampler: DensitySampler,
    folder: Path,
    *,
    loader: type[DataLoader[Any]] = StatefulDataLoader,
    stop: int = 0,
    devices: int = 1,
    split: bool = False,
) -> list[list[int]]:
    """The batches of a run that saves each step, or goes on from step ``stop``; ``split``: as Lightning does by default."""
    model = Noting()
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=split,
        max_epochs=EPOCHS,
        callbacks=[] if stop else [saving],
        enable_checkpointing=not stop,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    rows = torch.arange(ROWS)
    checkpoint = folder / f"step={stop}.ckpt" if stop else None
    trainer.fit(model, loader(rows, batch_size=BATCH, sampler=sampler), ckpt_path=checkpoint, weights_only=False)
    return model.seen


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    rank = int(os.environ["RANK"])
    aware = {"rank": rank, "num_replicas": 2}
    whole = fit(draws(**aware), folder / "aware", devices=2)
    found = {
        "aware": whole,
        "resumed": {stop: fit(draws(**aware), folder / "aware", devices=2, stop=stop) for stop in (1, 4, 6)},
        "split": fit(draws(), folder / "split", devices=2, split=True),
        "split twice": fit(draws(**aware), folder / "twice", devices=2, split=True),
        "not split": fit(draws(), folder / "whole", devices=2),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
