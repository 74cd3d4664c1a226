"""Where a build computes: the options of its engine."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from embstore.core.config import EngineConfig

EngineName = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="This process, or workers through Ray; the store is the same.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="Ray cluster to join: auto, or host:port; default one of this machine.")
]
NumWorkers = Annotated[
    int | None, typer.Option("--num-workers", help="Workers, each with the model; default what the cluster has room for.")
]
GpusPerWorker = Annotated[
    float | None, typer.Option("--gpus-per-worker", help="GPUs that Ray gives each worker; default 1, on CPUs none.")
]
Devices = Annotated[
    str | None, typer.Option("--devices", help="Devices of this machine, a worker each: cuda:0,cuda:1. Needs no cluster.")
]


def engine_config(
    engine: Literal["local", "ray"],
    ray_address: str | None,
    num_workers: int | None,
    gpus_per_worker: float | None,
    devices: str | None,
) -> EngineConfig:
    """Options as a value."""
    return EngineConfig(
        engine=engine,
        ray_address=ray_address,
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        devices=tuple(name.strip() for name in devices.split(",")) if devices is not None else (),
    )
