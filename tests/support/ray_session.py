"""One Ray for the tests of a module, and builds through it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.core.config import BuildConfig, EngineConfig
from embstore.engines.ray import RayEngine
from tests.support.build_fake import CONFIG

RAY = EngineConfig(engine="ray", num_workers=2)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    """Ray on this machine, with room for four workers; engines of this process use it and leave it running."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )
    yield ray
    ray.shutdown()


def through_ray(config: BuildConfig = CONFIG, **engine: Any) -> BuildConfig:
    """The configuration with workers through Ray, one core each."""
    return dataclasses.replace(
        config,
        embedding=dataclasses.replace(config.embedding, threads=config.embedding.threads or 1),
        engine=dataclasses.replace(RAY, **engine),
    )


def ray_engine(folder: Path, **engine: Any) -> RayEngine:
    """An engine of its own, for jobs that are no builds."""
    folder.mkdir(exist_ok=True)
    return RayEngine(dataclasses.replace(RAY, **engine), threads=1, device="cpu", shared=folder)
