"""Datasets of the hub on a double of ``datasets`` 5.2: what goes wrong. tests/oracle/test_hub_datasets.py has the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from embstore.core.config import USUAL_FIELDS, WHOLE
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt
from embstore.core.records import OriginRecord
from embstore.storage.hub_dataset import HubDataset, find_hub_dataset
from embstore.storage.prompt_source import open_source

DATASET = HubDataset(origin=OriginRecord(dataset="me/prompts", revision="c" * 40, config=None, split=None))


class _Split:
    """An IterableDataset without features, whose network fails after some rows."""

    def __init__(self, rows: list[dict[str, Any]], fails: Exception | None = None) -> None:
        self._rows, self._fails = rows, fails

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._rows
        if self._fails is not None:
            raise self._fails


def library(monkeypatch: pytest.MonkeyPatch, splits: dict[str, _Split], version: str = "5.2.0") -> list[Any]:
    calls: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> dict[str, _Split]:
        calls.append((path, name, options))
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__=version, load_dataset=load_dataset))
    return calls


def test_rows_are_streamed_at_the_recorded_commit_and_by_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi", "name": None}]
    calls = library(monkeypatch, {"train": _Split([{"prompt": "a", "id": 1.0}, {"messages": chat, "prompt": None}])})
    with open_source(DATASET, USUAL_FIELDS) as prompts:
        text, turn = list(prompts)
        assert prompts.where(2) == f"line 2 of me/prompts@{'c' * 12} train"
    assert isinstance(text, Prompt)
    assert (text.id, text.text) == ("1", "a")
    assert isinstance(turn, Prompt)
    assert turn.messages == ({"role": "user", "content": "hi"},)
    assert calls == [("me/prompts", None, {"revision": "c" * 40, "streaming": True})]


def test_a_network_that_fails_is_not_the_end_of_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, hint in (
        (ConnectionError("reset by peer"), "run the command again"),
        (OverflowError("date value out of range"), f"hf download --repo-type dataset me/prompts --revision {'c' * 40}"),
    ):
        library(monkeypatch, {"train": _Split([{"prompt": "a"}], fails=error)})
        with (
            open_source(DATASET, USUAL_FIELDS) as prompts,
            pytest.raises(PromptError, match=f"from the hub failed: {error}") as caught,
        ):
            list(prompts)
        assert hint in str(caught.value.hint)


def test_an_old_library_that_could_run_scripts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = library(monkeypatch, {}, version="3.6.0")
    with open_source(DATASET, USUAL_FIELDS) as prompts, pytest.raises(PromptError, match=r"datasets 4 or newer.*3\.6\.0"):
        list(prompts)
    assert calls == []


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with (
        open_source(DATASET, USUAL_FIELDS) as prompts,
        pytest.raises(PromptError, match="needs the datasets library") as caught,
    ):
        list(prompts)
    assert caught.value.hint == "pip install 'embstore[datasets]'"


@pytest.mark.parametrize(
    "name",
    ["prompts.jsonl", "me/prompts.jsonl.gz", "me/a.parquet", "/me/prompts", "./me/prompts", "a/b/c", "-", "../me", "org"],
)
def test_names_that_are_no_ids_never_ask_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert find_hub_dataset(name, WHOLE) is None


def test_a_name_that_is_here_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "prompts").mkdir(parents=True)
    assert find_hub_dataset("me/prompts", WHOLE) is None
