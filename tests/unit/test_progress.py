"""Nothing takes long in silence: what a build tells its observer, and what a terminal or a log shows of it."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import embstore
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.events import (
    PREPARATIONS,
    Event,
    Preflight,
    RowsCommitted,
    StageAdvanced,
    StageFinished,
    StageStarted,
    stage,
)
from embstore.core.format import STAGE0_FILES
from embstore.flow.array_import import import_array
from embstore.flow.build import build
from embstore.flow.dry_run import preflight
from embstore.model import locate
from embstore.search.search_plan import exact_seconds
from embstore.views import progress
from embstore.views.progress import TerminalObserver, time_line
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import Stopped, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

NEW = ["prompts", "rows", "hash", "load", "probe", "basis", "pilot", "embed", "knn", "audit", "publish"]
RESUMED = ["check", "hash", "readback", "load", "probe", "embed", "knn", "audit", "publish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", make_model("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[dict[str, object]] = [{"prompt": f"the sum of {number} and " * (1 + number % 5)} for number in range(40)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", lines)


@pytest.fixture
def config(folder: Path) -> BuildConfig:
    embedding = EmbeddingConfig(model=str(folder), device="cpu", threads=1, dtype="float32", chunk_rows=16, window_rows=16)
    return BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))


def _started(events: list[Event]) -> list[str]:
    return list(dict.fromkeys(event.stage for event in events if isinstance(event, StageStarted)))


def _finished(events: list[Event]) -> list[str]:
    return [event.stage for event in events if isinstance(event, StageFinished)]


def _stop_after(events: list[Event], rows: int) -> object:
    def observe(event: Event) -> None:
        events.append(event)
        if isinstance(event, RowsCommitted) and event.stop >= rows:
            raise Stopped

    return observe


def test_every_part_of_a_build_and_of_a_resume_is_a_stage(prompts: Path, config: BuildConfig, tmp_path: Path) -> None:
    begun: list[Event] = []
    with pytest.raises(Stopped):
        build(prompts, out=tmp_path / "store", config=config, observer=_stop_after(begun, 16))  # type: ignore[arg-type]
    assert _started(begun) == NEW[: NEW.index("embed") + 1]
    resumed: list[Event] = []
    report = build(prompts, out=tmp_path / "store", config=config, resume=True, observer=resumed.append)
    assert _started(resumed) == RESUMED
    assert sorted(_finished(resumed)) == sorted(event.stage for event in resumed if isinstance(event, StageStarted))
    readback = [event for event in resumed if isinstance(event, StageStarted | StageAdvanced) and event.stage == "readback"]
    assert readback == [StageStarted(stage="readback", total=1, unit="windows"), StageAdvanced(stage="readback", count=1)]
    check = [event for event in resumed if isinstance(event, StageStarted | StageAdvanced) and event.stage == "check"]
    read = sum((tmp_path / "store" / name).stat().st_size for name in STAGE0_FILES)
    assert check[0] == StageStarted(stage="check", total=read, unit="bytes")
    assert sum(event.count for event in check if isinstance(event, StageAdvanced)) == read
    assert set(RESUMED[:5]) <= report.seconds.keys(), "the report says what each took"


def test_a_model_of_the_hub_is_fetched_in_a_stage(
    folder: Path, prompts: Path, config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "download", lambda model, revision, *, trusted: folder)
    events: list[Event] = []
    hub = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, model="org/name"))
    preflight(prompts, out=tmp_path / "store", config=hub, observer=events.append)
    assert _finished(events)[:3] == ["fetch", "prompts", "load"]


def test_auto_compares_dtypes_in_a_stage(
    prompts: Path, config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embstore.model.dtype_choice.has_fast_bfloat16", lambda device: True)
    events: list[Event] = []
    auto = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, dtype="auto"))
    preflight(prompts, out=tmp_path / "store", config=auto, observer=events.append)
    assert "dtype" in _finished(events)


def test_the_preflight_says_where_the_time_went_and_goes(prompts: Path, config: BuildConfig, tmp_path: Path) -> None:
    found = preflight(prompts, out=tmp_path / "store", config=config)
    assert list(found.stage_seconds) == [
        *(name for name in NEW[: NEW.index("embed")] if name not in ("rows", "hash")),
        "embed",
        "knn",
    ]
    assert all(seconds >= 0 for seconds in found.stage_seconds.values())
    assert found.stage_seconds["embed"] == found.seconds > 0


def test_an_array_is_hashed_and_its_basis_found_in_stages(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((40, 8)))
    events: list[Event] = []
    import_array(tmp_path / "rows.npy", out=tmp_path / "store", observer=events.append)
    assert _started(events)[:5] == ["prompts", "rows", "hash", "basis", "embed"]


def test_a_stage_that_fails_is_not_finished() -> None:
    events: list[Event] = []

    def fail() -> None:
        with stage(events.append, "load", 3, "bytes") as advance:
            advance(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert events == [StageStarted(stage="load", total=3, unit="bytes"), StageAdvanced(stage="load", count=2)]


# --- a log ------------------------------------------------------------------------------------------------------------


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_has_a_line_for_each_stage_and_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = _Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    with TerminalObserver(Console(file=said, width=200)) as observer:
        observer(StageStarted(stage="imports", total=None))
        observer(StageFinished(stage="imports", seconds=4.0))
        observer(StageStarted(stage="hash", total=16 << 30, unit="bytes"))
        for _ in range(5):
            clock.now += 4.0
            observer(StageAdvanced(stage="hash", count=3 << 30))
        observer(StageFinished(stage="hash", seconds=20.0))
        observer(StageStarted(stage="probe", total=None))
        observer(StageFinished(stage="probe", seconds=0.1))
    assert said.getvalue().splitlines() == [
        "loading torch and transformers",
        "loading torch and transformers: done in 4.0 s",
        "hashing the model's files: 16.0 GiB",
        "  hashing the model's files: 9.0 GiB of 16.0 GiB",
        "hashing the model's files: done in 20.0 s",
        "probing the model",
    ]


def test_every_stage_has_a_title() -> None:
    assert set(PREPARATIONS) <= progress._TITLES.keys()


def test_a_terminal_shows_bars_of_bytes_and_of_unknown_length() -> None:
    said = io.StringIO()
    with TerminalObserver(Console(file=said, width=200, force_terminal=True, color_system=None)) as observer:
        observer(StageStarted(stage="probe", total=None))
        observer(StageFinished(stage="probe", seconds=0.1))
        observer(StageStarted(stage="hash", total=2 << 30, unit="bytes"))
        observer(StageAdvanced(stage="hash", count=1 << 30))
        observer(StageFinished(stage="hash", seconds=1.0))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue()).replace("\r", "\n").splitlines()
    assert any("hashing the model's files" in line and "2.0 GiB/2.0 GiB" in line for line in last)
    assert any("probing the model" in line for line in last)


def test_the_preflight_prints_its_times() -> None:
    plan = Preflight(
        num_rows=1,
        remaining_rows=1,
        quarantined_lines=0,
        truncated_share=0,
        dimension=1,
        head="affine",
        dtype="float32",
        device="cpu",
        remaining_bytes=1,
        free_bytes=1,
        embed_memory_bytes=1,
        memory_budget_bytes=1,
        knn="exact",
        num_shards=0,
        seconds=300.0,
        stage_seconds={"hash": 12.34, "load": 0.01, "basis": 2.0, "embed": 300.0},
    )
    shown = (
        "so far hashing the model's files 12.3 s, making coordinates 2.0 s; next the pass, about 5 min, then the search, "
    )
    assert f"{shown}not estimated" in time_line(plan)
    # a million rows of 256 coordinates: 1.2 core-hours (docs/scaling.md)
    seconds = {**plan.stage_seconds, "knn": exact_seconds(1_000_000, 256, threads=2)}
    assert f"{shown}about 36 min" in time_line(dataclasses.replace(plan, stage_seconds=seconds))


def test_the_first_words_come_before_what_takes_seconds(prompts: Path, folder: Path, tmp_path: Path) -> None:
    """On a real command line: the order of what Python imports, which it reports itself, and of what is printed."""
    given = ["build", str(prompts), "--model", str(folder), "--out", str(tmp_path / "store"), "--dry-run", "--device", "cpu"]
    command = [sys.executable, "-X", "importtime", "-m", "embstore", *given]
    root = Path(embstore.__file__).parent.parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, timeout=600)
    lines = [
        line.rpartition("|")[2].strip() if line.startswith("import time:") else line for line in done.stderr.splitlines()
    ]
    order = [lines.index(line) for line in (f"embstore {embstore.__version__}", "loading torch and transformers", "torch")]
    assert order == sorted(order)
    assert lines.index("loading torch and transformers") < lines.index("transformers")
