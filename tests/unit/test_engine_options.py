"""What an engine makes of its options before any worker starts: shares of cores, devices, and progress as it is shown."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from embstore.core.config import EmbeddingConfig, EngineConfig
from embstore.core.errors import ConfigError, EngineError, IdentityMismatchError
from embstore.core.events import RowsCommitted, StageStarted, WorkersChanged
from embstore.engines import ray as ray_module
from embstore.flow.build import build
from embstore.storage.writer import StoreWriter
from embstore.views.progress import TerminalObserver
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource


class EightCores(FakeSource):
    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        return {**super().hardware(config), "threads": config.threads or 8}


@pytest.mark.parametrize(
    ("engine", "threads", "expected"),
    [
        (EngineConfig(engine="ray", num_workers=2), None, 4),
        (EngineConfig(devices=("cpu", "cpu", "cpu")), None, 2),
        (EngineConfig(engine="ray", num_workers=16), None, 1),
        (EngineConfig(engine="ray", num_workers=2), 3, 3),
        (EngineConfig(engine="ray", num_workers=2, ray_address="auto"), None, 1),  # other machines have cores of their own
    ],
)
def test_workers_of_one_machine_share_its_cores(
    engine: EngineConfig,
    threads: int | None,
    expected: int,
    small_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: ray_module.RayEngine) -> None:
        raise EngineError("no Ray here")

    monkeypatch.setattr(ray_module.RayEngine, "_connect", refuse)
    embedding = dataclasses.replace(CONFIG.embedding, threads=threads)
    config = dataclasses.replace(CONFIG, engine=engine, embedding=embedding)
    with pytest.raises(EngineError, match="no Ray here"):
        build(small_prompts, out=tmp_path / "store", config=config, source=EightCores())
    with StoreWriter(tmp_path / "store", resume=True) as writer:
        assert writer.read_spec().embedding.threads == expected


def test_devices_of_another_kind_do_not_resume_a_store(small_prompts: Path, unfinished: Path) -> None:
    config = dataclasses.replace(CONFIG, engine=EngineConfig(devices=("cuda:0",)))
    with pytest.raises(IdentityMismatchError, match="device: the store has cpu, given cuda"):
        build(None, out=unfinished, config=config, resume=True, source=FakeSource())


@pytest.mark.parametrize(
    ("visible", "name", "expected"), [("", "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cpu", None)]
)
def test_a_device_is_counted_among_those_that_are_visible(
    visible: str, name: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ray_module._visible_device(name) == expected


def test_a_device_that_is_not_visible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(ConfigError, match="cuda:2 does not exist: CUDA_VISIBLE_DEVICES shows 2 devices"):
        ray_module._visible_device("cuda:2")


def test_without_ray_the_error_says_how_to_get_it(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    config = dataclasses.replace(CONFIG, engine=EngineConfig(engine="ray"))
    with pytest.raises(ConfigError, match="need Ray, which is not installed") as caught:
        build(small_prompts, out=tmp_path / "store", config=config, source=FakeSource())
    assert "embstore[ray]" in str(caught.value.hint)
    assert not (tmp_path / "store").exists()


def test_progress_of_workers_is_one_line_with_rate_and_time_left() -> None:
    """Windows of several workers are committed in bursts: the rate is that of the run, not of the last window."""
    said = io.StringIO()
    with TerminalObserver(Console(file=said, width=200)) as observer:
        observer(StageStarted(stage="embed", total=1000))
        observer(WorkersChanged(alive=2, wanted=2, retries=0, lost=0))
        observer(RowsCommitted(start=0, stop=100, num_tokens=1, stored_bytes=1, seconds=10.0))
        observer(WorkersChanged(alive=1, wanted=2, retries=1, lost=1))
        observer(RowsCommitted(start=100, stop=200, num_tokens=1, stored_bytes=1, seconds=0.001))
    assert "  committed 100/1,000 rows, 10 rows/s, 2/2 workers, 90 s left" in said.getvalue()
    assert "  1/2 workers, 1 retries, 1 lost" in said.getvalue()
    assert "  committed 200/1,000 rows, 20 rows/s, 1/2 workers, 1 retries, 1 lost, 40 s left" in said.getvalue()
