"""The order of system calls, asserted for every kind of writer: nothing is vouched for before it is durable."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest

from tests.support.faults import SYNCS, Call
from tests.support.order import JOURNAL, MANIFEST, WITHDRAWN, problems
from tests.support.scenarios import SCENARIOS
from tests.support.stores import WINDOWS


def _index(calls: list[Call], name: str, path: str) -> int:
    """Where a call is first made."""
    return next(index for index, call in enumerate(calls) if (call.name, call.path) == (name, path))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_writer_keeps_the_order(recorded: dict[str, list[Call]], scenario: str) -> None:
    assert problems(recorded[scenario]) == []


def test_each_window_is_durable_piece_by_piece_before_its_line(recorded: dict[str, list[Call]]) -> None:
    """The order of the design, call by call, for a window of two chunks."""
    calls = recorded["build"]
    start = next(index for index, call in enumerate(calls) if call.path.startswith("embeddings.zarr/.c.0.0."))
    stop = _index(calls, "acknowledged", "0 32")
    temps = [call.path for call in calls[start:stop] if call.name == "open" and call.path.endswith(".tmp")]
    assert [path.split(".tmp")[0].rpartition(".")[0] for path in temps] == [
        "embeddings.zarr/.c.0.0",
        "embeddings.zarr/.c.1.0",
    ]
    expected = [
        *[
            line
            for index, temp in enumerate(temps)
            for line in (
                f"open {temp}",
                f"write {temp}",
                f"ftruncate {temp}",  # of the padding of a direct write
                f"fsync {temp}",
                f"rename embeddings.zarr/c.{index}.0",
            )
        ],
        "fsync embeddings.zarr",
        *[
            line
            for name in ("coordinates.npy", "residuals.npy")
            for line in (f"open {name}", f"pwrite {name}", f"sync {name}")
        ],
        "write journal.jsonl",
        "sync journal.jsonl",
    ]
    seen = [f"{call.name.replace('fdatasync', 'sync')} {call.path}" for call in calls[start:stop]]
    seen = [line.replace("fsync", "sync") if line.endswith((".npy", ".jsonl")) else line for line in seen]
    assert seen == expected


def test_every_missing_parent_is_made_durable_one_by_one(recorded: dict[str, list[Call]]) -> None:
    calls = [call for call in recorded["build"] if call.path.startswith("..") or call.path == "."]
    made = [call.path for call in calls if call.name == "mkdir"]
    assert made == ["../..", "..", "."]
    pairs = [(calls[index].path, calls[index + 1]) for index in range(len(calls)) if calls[index].name == "mkdir"]
    assert [(path, after.name, after.path) for path, after in pairs] == [
        ("../..", "fsync", "../../.."),
        ("..", "fsync", "../.."),
        (".", "fsync", ".."),
    ]


def test_windows_are_acknowledged_after_their_line_is_synced_and_once(recorded: dict[str, list[Call]]) -> None:
    calls = recorded["build"]
    told = [index for index, call in enumerate(calls) if call.name == "acknowledged"]
    assert [calls[index].path for index in told] == [f"{start} {stop}" for start, stop in WINDOWS]
    for index in told:
        assert calls[index - 1].name in SYNCS
        assert calls[index - 1].path == JOURNAL


def test_a_torn_journal_is_cut_and_synced_before_anything_else(recorded: dict[str, list[Call]]) -> None:
    calls = recorded["resume"]
    start = _index(calls, "open", JOURNAL)
    seen = [(call.name, call.path) for call in calls[start : start + 4]]
    assert seen == [("open", JOURNAL), ("ftruncate", JOURNAL), ("fsync", JOURNAL), ("fsync", ".")]
    assert {call.path for call in calls[:start]} <= {".lock", ".", ".."}


def test_a_repair_withdraws_before_it_demotes(recorded: dict[str, list[Call]]) -> None:
    calls = recorded["repair"]
    withdrawn = _index(calls, "rename", WITHDRAWN)
    assert calls[withdrawn].source == MANIFEST
    assert (calls[withdrawn + 1].name, calls[withdrawn + 1].path) == ("fsync", ".")
    assert withdrawn < _index(calls, "write", JOURNAL)


def test_the_manifest_comes_last(recorded: dict[str, list[Call]]) -> None:
    for scenario in ("build", "resume", "weights", "other density", "build after repair"):
        calls = recorded[scenario]
        flip = _index(calls, "rename", MANIFEST)
        named = {call.path for call in calls[flip + 1 :] if call.name in ("rename", "open", "mkdir")}
        assert {path for path in named if path != "runs.jsonl" and not path.startswith("work")} <= {
            "density_weights.npy",
            "embeddings_metadata.json",
        }


def _swapped(first: Callable[[Call], bool], second: Callable[[Call], bool]) -> Callable[[list[Call]], list[Call]]:
    """The first call of one kind after the next one of another."""

    def swap(calls: list[Call]) -> list[Call]:
        start = next(index for index, call in enumerate(calls) if first(call))
        stop = next(index for index, call in enumerate(calls) if index > start and second(call))
        return [*calls[:start], *calls[start + 1 : stop + 1], calls[start], *calls[stop + 1 :]]

    return swap


def _made_truncating(calls: list[Call]) -> list[Call]:
    return [
        dataclasses.replace(call, flags=call.flags | os.O_TRUNC) if call.path == "coordinates.npy" else call
        for call in calls
    ]


def _made_in_place(calls: list[Call]) -> list[Call]:
    return [Call("open", MANIFEST, flags=os.O_CREAT | os.O_WRONLY) if call.path == MANIFEST else call for call in calls]


WRONG: dict[str, Callable[[list[Call]], list[Call]]] = {
    "a chunk is renamed before its bytes are synced": _swapped(
        lambda call: call.name == "fsync" and ".c.0.0." in call.path, lambda call: call.path == "embeddings.zarr/c.0.0"
    ),
    "a line before the coordinates": _swapped(
        lambda call: call.name in SYNCS and call.path == "coordinates.npy",
        lambda call: call.name == "write" and call.path == JOURNAL,
    ),
    "a line before its chunks are named": _swapped(
        lambda call: call.name == "rename" and call.path == "embeddings.zarr/c.1.0",
        lambda call: call.name == "write" and call.path == JOURNAL,
    ),
    "told before the line is synced": _swapped(
        lambda call: call.name == "write" and call.path == JOURNAL, lambda call: call.name == "acknowledged"
    ),
    "the manifest before the weights": _swapped(
        lambda call: call.name == "rename" and call.path.startswith("weights/"),
        lambda call: call.name == "rename" and call.path == MANIFEST,
    ),
    "the flip is not synced before the links": _swapped(
        lambda call: call.name == "rename" and call.path == MANIFEST, lambda call: call.name == "symlink"
    ),
    "a folder is filled before its parent is synced": _swapped(
        lambda call: call.name == "fsync" and call.path == "neighbors", lambda call: call.name == "open"
    ),
    "a published file is emptied": _made_truncating,
    "a file is written under its own name": _made_in_place,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_order_is_noticed(recorded: dict[str, list[Call]], wrong: str) -> None:
    assert problems(WRONG[wrong](recorded["build"]))
