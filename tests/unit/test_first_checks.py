"""What a command gives is checked before its store's folder is made: a refusal leaves nothing, the right command works."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.errors import BudgetError, ConfigError, EmbstoreError, ModelError, PromptError, StoreNotFoundError
from embstore.flow import build as build_flow
from embstore.flow import first_checks
from embstore.flow.array_import import import_array
from embstore.flow.dry_run import preflight
from embstore.storage.prompt_source import check_source
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.stores import build_part, build_small, snapshot, with_embedding

LITTLE = dataclasses.replace(CONFIG, memory_budget_bytes=1)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Broken(FakeSource):
    """A model that cannot be loaded."""

    def create(self, *_: Any, **__: Any) -> Any:
        raise ModelError("the weights are cut off")


class NoDevice(FakeSource):
    """A machine without the device that was asked for."""

    def device(self, name: str) -> str:
        raise ConfigError(f"device {name!r} is not available")


def _refused(error: type[EmbstoreError], prompts: Path, out: Path, **options: Any) -> None:
    before = sorted(out.parent.parent.rglob("*"))
    with pytest.raises(error):
        build_small(prompts, out, **options)
    assert sorted(out.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("error", "options"),
    [
        (BudgetError, {"config": LITTLE}),
        (ModelError, {"source": Broken()}),
        (ConfigError, {"source": NoDevice()}),
        (StoreNotFoundError, {"config": dataclasses.replace(CONFIG, reuse=("no/such/store",))}),
        (PromptError, {"config": dataclasses.replace(CONFIG, strict=True)}),  # one line of the small prompts is no JSON
    ],
)
def test_a_refused_first_command_leaves_nothing_and_the_right_one_works(
    error: type[EmbstoreError],
    options: dict[str, Any],
    resume: bool,
    small_prompts: Path,
    tmp_path: Path,
    finished_store: Path,
) -> None:
    out = tmp_path / "made" / "on the way" / "store"
    _refused(error, small_prompts, out, resume=resume, **options)
    build_small(small_prompts, out, resume=False)
    assert snapshot(out) == snapshot(finished_store)


def test_a_folder_that_was_there_before_stays(small_prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine" / "store"
    out.mkdir(parents=True)
    _refused(BudgetError, small_prompts, out, config=LITTLE)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]\n", b'["a", "b"]\n', b"prompt\nhello\n"])
def test_prompts_that_cannot_be_used_leave_nothing(content: bytes | None, small_prompts: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "given.jsonl"
    if content is not None:
        prompts.write_bytes(content)
    out = tmp_path / "out" / "store"
    _refused(PromptError, prompts, out)
    build_small(small_prompts, out, resume=False)


@pytest.mark.parametrize("model", [None, "no/such/folder/model", "./typo"])
def test_the_model_is_located_before_the_prompts_are_read(
    model: str | None, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the prompts were read")

    monkeypatch.setattr("embstore.flow.stage0.ingest", never)
    out = tmp_path / "store"
    config = BuildConfig(embedding=EmbeddingConfig(model=model))
    for run in (
        lambda: build_flow.build(small_prompts, out=out, config=config),
        lambda: build_flow.build(small_prompts, out=out, config=config, resume=True),
        lambda: preflight(small_prompts, out=out, config=config),
    ):
        with pytest.raises((ModelError, ConfigError)):
            run()
        assert not out.exists()


def test_a_disk_that_cannot_take_the_store_is_refused_with_nothing_left(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "store"
    size = small_prompts.stat().st_size
    for free, says in ((size - 1, "the prompts alone take"), (size + 1, "the store may need")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(1 << 40, 0, free))
        with pytest.raises(BudgetError, match=says):
            build_small(small_prompts, out)
        assert not out.parent.exists()


def test_a_resume_needs_no_room_for_the_prompts_again(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build_part(small_prompts, tmp_path / "store", rows=64)
    monkeypatch.setattr(first_checks, "free_bytes_at", lambda root: 0)
    build_small(small_prompts, store)


def test_a_pipe_is_not_touched_by_the_check(tmp_path: Path) -> None:
    """Its bytes come once, and opening it would wait for its writer."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_source(pipe)
    check_source("-")
    with pytest.raises(PromptError, match="cannot read prompts"):
        check_source(tmp_path / "none")
    if os.geteuid():
        (tmp_path / "closed").write_text("")
        (tmp_path / "closed").chmod(0)
        with pytest.raises(PromptError, match="Permission"):
            check_source(tmp_path / "closed")


def test_a_forgotten_prompts_file_is_named_as_such(small_prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    with pytest.raises(ConfigError, match="no prompts file was given"):
        build_small(None, out)
    assert not out.exists()
    build_part(small_prompts, out, rows=0)
    before = snapshot(out)
    with pytest.raises(ConfigError, match="a store that was begun") as caught:
        build_small(None, out, resume=False)
    assert "--resume" in str(caught.value.hint)
    assert snapshot(out) == before


# --- embstore import --------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays(tmp_path: Path) -> Callable[[int, int], Path]:
    def make(num_rows: int, seed: int) -> Path:
        path = tmp_path / f"{num_rows}-{seed}.npy"
        np.save(path, np.random.default_rng(seed).standard_normal((num_rows, 12)).astype(np.float32))
        return path

    return make


def test_an_import_is_refused_before_a_folder_is_made(tmp_path: Path, arrays: Callable[[int, int], Path]) -> None:
    array, out = arrays(40, 0), tmp_path / "store"
    few = tmp_path / "few.txt"
    few.write_text("a\nb\n")
    config = BuildConfig(embedding=EmbeddingConfig(threads=1))
    for ids in (tmp_path / "none.txt", few):
        with pytest.raises(PromptError):
            import_array(array, ids=ids, out=out, config=config)
        assert not out.exists()
    with pytest.raises(BudgetError):
        import_array(array, out=out, config=dataclasses.replace(config, memory_budget_bytes=1))
    assert not out.exists()
    import_array(array, out=out, config=config)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("rows", [40, 56])
def test_an_import_that_was_begun_may_be_begun_again_with_another_array(
    rows: int, resume: bool, tmp_path: Path, arrays: Callable[[int, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(embedding=EmbeddingConfig(threads=1))
    out, whole = tmp_path / "store", tmp_path / "whole"
    import_array(arrays(rows, 1), out=whole, config=config)
    with monkeypatch.context() as patch:
        patch.setattr("embstore.flow.build._embed_windows", _stop)
        with pytest.raises(KeyboardInterrupt):
            import_array(arrays(40, 0), out=out, config=config)
    import_array(arrays(rows, 1), out=out, config=config, resume=resume)
    assert snapshot(out) == snapshot(whole)
    assert len(json.loads((out / "ids.json").read_bytes())) == rows


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_command_with_a_wrong_option_and_a_store_in_its_place_names_the_store_first(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is downloaded for nothing."""
    out = build_part(small_prompts, tmp_path / "store", rows=32)
    monkeypatch.setattr("embstore.flow.first_checks.find_source", lambda *_: pytest.fail("a model was looked for"))
    with pytest.raises(EmbstoreError, match="already contains a store"):
        build_flow.build(small_prompts, out=out, config=with_embedding(model="no/such/model"))
