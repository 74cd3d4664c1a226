"""A worker that was given up, or that outlives its driver, publishes nothing: whatever it was doing at that moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.core.errors import StorageError
from embstore.core.spec import decode_spec
from embstore.flow.reuse import nothing_reused
from embstore.flow.window_tasks import RemoteWindowJob
from embstore.storage.atomic import remove_busy_folder
from embstore.storage.chunk_writer import WORKER_FOLDERS
from embstore.storage.prompt_table import PromptTable
from embstore.storage.writer import StoreWriter
from tests.support.fake import FakeEmbedder, FakeSource
from tests.support.stores import snapshot


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> Path:
    """All windows committed, not published."""
    store = Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))
    (store / "manifest.json").unlink()
    return store


@pytest.fixture
def job(store: Path) -> RemoteWindowJob:
    """Windows for workers of other processes, with a driver's folder in the store."""
    folder = store / "work" / f"{WORKER_FOLDERS}1"
    folder.mkdir(parents=True)
    spec = decode_spec((store / "spec.json").read_bytes())
    reuse = nothing_reused(spec.rows)
    return RemoteWindowJob.prepare(
        store,
        spec,
        FakeSource(),
        reuse,
        prompts=PromptTable(store / "prompts.jsonl", spec.rows),
        stops_at_failure=True,
        folder=folder,
        memory_bytes=0,
    )


def next_writer(job: RemoteWindowJob) -> None:
    """The driver of a resume tidies up."""
    with StoreWriter(job.root, resume=True):
        pass


def given_up(job: RemoteWindowJob) -> None:
    job.lost(1)


def run_over(job: RemoteWindowJob) -> None:
    """The driver's own end."""
    remove_busy_folder(job.folder)


def published(store: Path) -> dict[str, str]:
    """Every file but scratch."""
    return {name: digest for name, digest in snapshot(store).items() if not name.startswith("work/")}


ENDS = pytest.mark.parametrize("end", [given_up, run_over, next_writer])


@ENDS
def test_before_it_begins(end: Callable[[RemoteWindowJob], None], job: RemoteWindowJob) -> None:
    end(job)
    with pytest.raises(StorageError):
        job.start(1)
    assert not (job.folder / "1").is_dir()


@ENDS
@pytest.mark.parametrize("chunk", [0, 1])
def test_while_it_makes_a_window(
    chunk: int, end: Callable[[RemoteWindowJob], None], job: RemoteWindowJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(job.root)
    embed = FakeEmbedder.embed

    def other_rows(self: FakeEmbedder, *given: Any, **more: Any) -> Iterator[Any]:
        for number, block in enumerate(embed(self, *given, **more)):
            if number == chunk:
                end(job)
            if number >= chunk:
                block.emb_BV[:] = 0  # whatever it is, it must not get into the store
            yield block

    monkeypatch.setattr(FakeEmbedder, "embed", other_rows)
    worker = job.start(1)
    with pytest.raises(StorageError):
        worker.run(0, following=None, check=lambda: None)
    assert published(job.root) == before


def test_giving_up_twice_is_as_once_and_concerns_nobody_else(job: RemoteWindowJob) -> None:
    other = job.start(2)
    job.lost(1)
    job.lost(1)
    made = other.run(0, following=None, check=lambda: None)
    assert made.written.record.window == 0
    other.close()
