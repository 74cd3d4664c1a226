"""Fixtures that many tests share; what they are made of is in tests/support."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.stores import build_part, build_small, write_small_prompts


@pytest.fixture(scope="session")
def small_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small prompts file: 73 lines, 70 rows."""
    return write_small_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def finished_store(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small store, the oracle of byte identity; read it, never write to it."""
    store = tmp_path_factory.mktemp("finished") / "store"
    build_small(small_prompts, store)
    return store


@pytest.fixture(scope="session")
def partial_store(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store with one of three windows committed; read it, never write to it."""
    return build_part(small_prompts, tmp_path_factory.mktemp("partial") / "store", rows=32)


@pytest.fixture
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes milliseconds and changes no byte that a test could read; what syncs are for is tested in tests/crash."""
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, lambda handle: None)


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> Path:
    """A finished small store of the test's own."""
    return Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))


@pytest.fixture
def unfinished(partial_store: Path, tmp_path: Path) -> Path:
    """A part-built small store of the test's own."""
    return Path(shutil.copytree(partial_store, tmp_path / "unfinished", symlinks=True))
