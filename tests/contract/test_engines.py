"""What every engine promises: each task once, whatever happens to workers, and the same store whoever computed it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.errors import BuildInterruptedError, EmbstoreError, ModelError, RowError
from embstore.core.events import Event, RowsCommitted, StageAdvanced, StageStarted, ignore
from embstore.core.interfaces import Engine
from embstore.engines.local import LocalEngine
from embstore.flow.build import BuildReport
from embstore.search import graph, remote
from embstore.search.hnsw import shards
from embstore.storage.journal import read_journal
from embstore.views.info import verify
from tests.support.build_fake import CONFIG, CONFIG_HNSW
from tests.support.ray_session import ray_engine, ray_session, through_ray
from tests.support.stores import WINDOWS, build_small, journal_records, snapshot, with_embedding, write_lines
from tests.support.workers import Script, ScriptedSource, Squares

__all__ = ["ray_session"]

Build = Callable[..., BuildReport]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script")


@pytest.fixture(params=["local", "ray"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return str(request.param)


@pytest.fixture
def engine(kind: str, tmp_path: Path) -> Engine:
    return ray_engine(tmp_path / "shared") if kind == "ray" else LocalEngine()


@pytest.fixture
def build_with(kind: str, script: Script) -> Build:
    """Builds a small store through this engine; what its models compute is told in the script."""

    def run(prompts: Path | None, out: Path, *, config: BuildConfig = CONFIG, **options: Any) -> BuildReport:
        config = through_ray(config) if kind == "ray" else config
        return build_small(prompts, out, config=config, source=ScriptedSource(script.folder), **options)

    return run


def mapped_squares(engine: Engine, script: Script, count: int, **given: Any) -> list[tuple[int, tuple[int, int, bool]]]:
    options = {"check": lambda: None, "is_stopping": lambda: False, "observer": ignore, **given}
    return list(engine.map(Squares(script.folder), range(count), **options))


# --- tasks ---------------------------------------------------------------------------------------------------------------


def test_every_task_is_run_once_and_gives_its_result(engine: Engine, script: Script) -> None:
    found = mapped_squares(engine, script, 20)
    assert sorted((task, result[0]) for task, result in found) == [(task, task**2) for task in range(20)]
    assert sorted(call.start for call in script.calls) == list(range(20))


def test_no_task_is_no_worker(engine: Engine, script: Script) -> None:
    assert mapped_squares(engine, script, 0) == []
    assert list(script.folder.iterdir()) == []


def test_a_worker_is_promised_what_it_gets(engine: Engine, script: Script) -> None:
    found = mapped_squares(engine, script, 20)
    promised = [task for task, (_, _, was_promised) in found if was_promised]
    # all but each worker's first, and those at the end that nobody keeps from another
    assert len(promised) >= 20 - 1 - 2 * engine.num_workers("core")


def test_a_task_that_is_refused_ends_all_with_the_error_it_was(engine: Engine, script: Script) -> None:
    script.at(3, "refuse")
    with pytest.raises(ModelError, match="the model cannot do this") as caught:
        mapped_squares(engine, script, 20)
    assert caught.value.hint == "take another one"
    assert [call.start for call in script.calls].count(3) == 1  # what is refused is refused again: no second try


def test_once_stopping_no_task_is_begun_and_those_under_way_are_given(engine: Engine, script: Script) -> None:
    given: list[int] = []
    results = engine.map(
        Squares(script.folder), range(20), check=lambda: None, is_stopping=lambda: len(given) >= 2, observer=ignore
    )
    for task, _ in results:
        given.append(task)
    assert sorted(given) == sorted(call.start for call in script.calls)
    assert len(given) < 10


def test_a_check_that_raises_abandons_everything(engine: Engine, script: Script) -> None:
    given: list[int] = []

    def check() -> None:
        if os.getpid() == mine and len(script.calls) >= 3:
            raise BuildInterruptedError("enough")

    mine = os.getpid()
    results = engine.map(Squares(script.folder), range(20), check=check, is_stopping=lambda: False, observer=ignore)
    with pytest.raises(BuildInterruptedError):
        given.extend(task for task, _ in results)
    assert len(script.calls) < 10


def test_closing_the_results_ends_the_workers(engine: Engine, script: Script) -> None:
    results = engine.map(Squares(script.folder), range(20), check=lambda: None, is_stopping=lambda: False, observer=ignore)
    next(results)
    results.close()
    ended = [path.name for path in script.folder.glob("lost-*" if engine.is_remote else "closed-*")]
    assert ended
    assert len(script.calls) < 10


# --- builds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG_HNSW, pytest.param(with_embedding(compressor="none", chunk_rows=8), marks=pytest.mark.slow)],
)
def test_the_store_is_that_of_a_local_build(
    config: BuildConfig, build_with: Build, small_prompts: Path, tmp_path: Path, script: Script
) -> None:
    build_small(small_prompts, tmp_path / "local", config=config)
    report = build_with(small_prompts, tmp_path / "store", config=config)
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "local")
    assert report.embedded_rows == 70
    assert sorted((call.start, call.stop) for call in script.calls) == WINDOWS
    assert not (tmp_path / "store" / "work").exists()
    assert verify(tmp_path / "store").findings == []


@pytest.mark.parametrize("first", [0, pytest.param(32, marks=pytest.mark.slow)])
def test_windows_that_finish_in_another_order_make_the_same_store(
    first: int, build_with: Build, small_prompts: Path, finished_store: Path, tmp_path: Path, script: Script
) -> None:
    script.at(first, "sleep 1")
    committed: list[int] = []

    def see(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            committed.append(event.start)

    build_with(small_prompts, tmp_path / "store", observer=see)
    assert sorted(committed) == [0, 32, 64]
    records = [record.window for record in journal_records(tmp_path / "store") if hasattr(record, "window")]
    assert [32 * window for window in records] == committed  # commits are told in the order they were made
    assert snapshot(tmp_path / "store") == snapshot(finished_store)


def test_a_resume_computes_what_is_left_and_nothing_else(
    build_with: Build, unfinished: Path, finished_store: Path, script: Script
) -> None:
    assert list(read_journal(unfinished).windows) == [0]
    build_with(None, unfinished)
    assert sorted((call.start, call.stop) for call in script.calls) == WINDOWS[1:]
    assert snapshot(unfinished) == snapshot(finished_store)


def test_another_engine_resumes(
    kind: str, build_with: Build, small_prompts: Path, finished_store: Path, tmp_path: Path, script: Script
) -> None:
    class EnoughError(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            raise EnoughError

    store = tmp_path / "store"
    with pytest.raises(EnoughError):
        build_with(small_prompts, store, observer=stop)
    (done,) = read_journal(store).windows.values()
    other = Script(tmp_path / "other")
    config = CONFIG if kind == "ray" else through_ray()
    if kind == "local":
        pytest.importorskip("ray")
    build_small(None, store, config=config, source=ScriptedSource(other.folder))
    assert sorted((call.start, call.stop) for call in other.calls) == [
        window for window in WINDOWS if window != (done.start, done.stop)
    ]
    assert snapshot(store) == snapshot(finished_store)


def test_a_failed_row_stops_the_build_or_is_kept_without_a_vector(build_with: Build, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": f"p{n}", "prompt": f"{'FAIL ' * (n == 40)}{n}"} for n in range(70)])
    store = tmp_path / "store"
    with pytest.raises(RowError, match=r"prompt 'p40' \(row 40\) failed: the text says so") as caught:
        build_with(prompts, store)
    assert "--on-error quarantine" in str(caught.value.hint)
    assert 1 not in read_journal(store).windows
    keeps = dataclasses.replace(CONFIG, on_error="quarantine")
    build_with(prompts, store, config=keeps)
    build_small(prompts, tmp_path / "local", config=keeps)
    assert snapshot(store) == snapshot(tmp_path / "local")
    assert [failed.row for failed in read_journal(store).failed] == [40]


def test_rows_of_old_stores_are_copied_where_windows_are_made(
    build_with: Build, small_prompts: Path, finished_store: Path, tmp_path: Path, script: Script
) -> None:
    lines = [*small_prompts.read_bytes().splitlines()[:60], *(b'{"prompt": "New %d."}' % n for n in range(20))]
    prompts = write_lines(tmp_path / "p.jsonl", [line + b"\n" for line in lines])
    config = dataclasses.replace(CONFIG, reuse=(str(finished_store),))
    build_small(prompts, tmp_path / "local", config=config)
    report = build_with(prompts, tmp_path / "store", config=config)
    assert report.reused_rows > 40
    assert report.embedded_rows == 20
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "local")
    left, right = (read_journal(tmp_path / name) for name in ("store", "local"))
    assert left.windows == right.windows
    assert left.reused == right.reused


@pytest.mark.slow
def test_a_worker_s_memory_does_not_grow_with_its_windows(build_with: Build, kind: str, tmp_path: Path) -> None:
    """Sixteen windows of 4 MiB rows for each process that makes rows: a few chunks are held at a time, never the windows."""
    processes = 2 if kind == "ray" else 1
    rows, dimension, chunk_rows = processes * 16 * 256, 8192, 64
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": f"Explain {n}."} for n in range(rows)])
    embedding = EmbeddingConfig(model="fake", chunk_rows=chunk_rows, window_rows=256, threads=1)
    config = dataclasses.replace(CONFIG, embedding=embedding)
    source = ScriptedSource(tmp_path / "script", dimension=dimension, rank=16, window_rows=256)
    report = build_small(prompts, tmp_path / "store", source=source, config=through_ray(config) if kind == "ray" else config)
    peak = report.worker_peak_bytes if kind == "ray" else report.peak_anonymous_bytes
    assert peak is not None
    # a chunk's float32 image and its float16 rows, as often as chunks are encoded ahead, and what allocators keep
    bound = 10 * chunk_rows * dimension * 6 + (24 << 20)
    assert bound < rows // processes * dimension * 2  # a process that keeps its float16 rows is over it
    assert peak < bound


# --- the neighbour search ------------------------------------------------------------------------------------------------


def _points(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 12)).astype(np.float32)


def _graph(method: str, points: np.ndarray, work: Path, engine: Engine | None, events: list[Event]) -> graph.KnnGraph:
    work.mkdir()
    on_workers = None
    if engine is not None:
        on_workers = remote.RemoteSearch(engine, work, threads=1, memory_bytes=1 << 28, device="cpu", observer=events.append)
    return graph.build_graph(
        points,
        np.zeros(len(points), dtype=np.bool_),
        DensityConfig(knn="exact" if method == "exact" else "hnsw", shards=3 if method == "hnsw" else None),
        threads=1,
        memory_bytes=1 << 28,
        work=work,
        observer=events.append,
        remote=on_workers,
    )


@pytest.mark.parametrize("method", ["hnsw", "exact"])
def test_neighbours_by_workers_are_those_of_one_process(
    method: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = _points(2000)
    monkeypatch.setattr(remote, "LEAST_RANGE_ROWS", 400)
    here, there = list[Event](), list[Event]()
    expected = _graph(method, points, tmp_path / "here", None, here)
    found = _graph(method, points, tmp_path / "there", engine, there)
    np.testing.assert_array_equal(found.ids_NK, expected.ids_NK)
    np.testing.assert_array_equal(found.distances_NK, expected.distances_NK)
    assert found.audit == expected.audit

    def visits(events: list[Event]) -> int:
        return sum(event.count for event in events if isinstance(event, StageAdvanced) and event.stage == "knn")

    total = next(event.total for event in there if isinstance(event, StageStarted) and event.stage == "knn")
    assert visits(there) == visits(here) == total


def test_answers_of_graphs_that_finish_early_wait_for_their_turn(
    kind: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates at equal distances keep the order of shards, so answers are merged in that order only."""
    points = np.round(_points(900), 0)  # many ties
    points = np.unique(points, axis=0)
    if kind == "local":
        real_map = engine.map

        def reversed_map(job: Any, tasks: Any, **options: Any) -> Any:
            return real_map(job, tasks[::-1], **options)

        monkeypatch.setattr(engine, "map", reversed_map)
    expected = _graph("hnsw", points, tmp_path / "here", None, [])
    found = _graph("hnsw", points, tmp_path / "there", engine, [])
    np.testing.assert_array_equal(found.ids_NK, expected.ids_NK)


def test_a_search_that_was_killed_keeps_its_finished_blocks_in_the_store(
    build_with: Build, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks outlive the writer: the next run of the build asks only what was not asked."""
    monkeypatch.setattr(shards, "BLOCK_ROWS", 16)
    monkeypatch.setattr(graph, "BLOCK_ROWS", 16)
    store = tmp_path / "store"

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "audit":
            raise BuildInterruptedError("here")

    with pytest.raises(EmbstoreError, match="here"):
        build_with(small_prompts, store, config=CONFIG_HNSW, observer=stop)
    assert list((store / "work").glob("search-*/candidates-*"))
    shutil.copytree(store, tmp_path / "copy", symlinks=True)
    monkeypatch.setattr(shards, "build_index", lambda *_, **__: pytest.fail("a graph was built again"))
    monkeypatch.setattr(remote, "build_index", lambda *_, **__: pytest.fail("a graph was built again"))
    build_small(None, store, config=CONFIG_HNSW)
    monkeypatch.undo()
    build_small(small_prompts, tmp_path / "local", config=CONFIG_HNSW)
    assert snapshot(store) == snapshot(tmp_path / "local")
