"""Weights are hashed once a run and host: a worker is told what the driver read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from embstore.core.config import EmbeddingConfig
from embstore.core.events import Event, StageAdvanced, StageFinished, StageStarted
from embstore.model import digests
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from tests.support.models import make_model, make_tokenizer, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "llama", make_model("llama"), make_tokenizer())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has read nothing."""
    monkeypatch.setattr(digests, "_known", {})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of weight files whose content is read."""
    found: list[str] = []
    really = Path.open

    class Watched:
        def __init__(self, path: Path, file: Any) -> None:
            self.path, self.file = path, file

        def read(self, *size: int) -> bytes:
            found.append(self.path.name)
            content: bytes = self.file.read(*size)
            return content

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        file = really(path, *arguments, **options)
        return Watched(path, file) if path.suffix == ".safetensors" else file

    monkeypatch.setattr(Path, "open", watched)
    return found


def _source(folder: Path) -> TorchSource:
    return TorchSource(locate_model(EmbeddingConfig(model=str(folder))))


def test_a_worker_on_this_host_does_not_read_the_weights_again(folder: Path, fresh: None, reads: list[str]) -> None:
    source = _source(folder)
    expected = source.identity()
    assert set(reads) == {"model.safetensors"}
    sent = pickle.dumps(source)
    digests._known.clear()  # another process
    reads.clear()
    assert pickle.loads(sent).identity() == expected
    assert reads == []


def test_a_worker_on_another_host_reads_them(
    folder: Path, fresh: None, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(folder)
    expected = source.identity()
    sent = pickle.dumps(source)
    digests._known.clear()
    reads.clear()
    monkeypatch.setattr(digests, "_host", lambda: "another")
    assert pickle.loads(sent).identity() == expected
    assert set(reads) == {"model.safetensors"}


def test_a_file_that_was_changed_is_read_again(folder: Path, fresh: None) -> None:
    """Of the same size, and with its old time: what a copy of another checkpoint over this one may look like."""
    source, weights = _source(folder), folder / "model.safetensors"
    before, status = source.identity(), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = source.identity()
    assert after.weights_sha256 != before.weights_sha256
    assert after.tokenizer_sha256 == before.tokenizer_sha256


@pytest.mark.parametrize("is_known", [False, True])
def test_hashing_is_a_stage_that_counts_the_weights_bytes(is_known: bool, folder: Path, fresh: None) -> None:
    source, events = _source(folder), list[Event]()
    if is_known:
        source.identity()
    source.identity(events.append)
    total = (folder / "model.safetensors").stat().st_size
    assert events[0] == StageStarted(stage="hash", total=total, unit="bytes")
    assert isinstance(events[-1], StageFinished)
    assert sum(event.count for event in events if isinstance(event, StageAdvanced)) == total
