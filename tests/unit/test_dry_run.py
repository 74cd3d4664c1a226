"""A dry run decides what the build decides and leaves nothing behind: no store, no basis, no file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embstore.core.config import BuildConfig, EmbeddingConfig, PromptFields
from embstore.core.errors import BudgetError, ConfigError, ExitCode, PromptError
from embstore.core.events import Event, Notice, Preflight
from embstore.flow import dry_run
from embstore.flow.build import build
from embstore.flow.dry_run import SAMPLE_ROWS, preflight
from tests.support.fake import FakeSource
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import CONFIG, write_lines

# no file can be written, wherever it lies, except for the 4 bytes by which Python finds the folder of temporary files
_WRITES_NOTHING = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
from embstore.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gemma2"):
        save_model(folder / kind, make_model(kind, logit_std=1.0), make_tokenizer())
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[object] = [{"prompt": f"Explain number {row}"} for row in range(40)]
    return write_lines(tmp_path / "prompts.jsonl", [*lines, b"broken\n", *lines[:2], {"messages": [{"role": "user"}]}])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # coordinates of a Gram matrix, and of a sampled basis
def test_nothing_is_written_anywhere(kind: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = ["build", prompts, "--model", models / kind, "--out", tmp_path / "store", "--dry-run", "--json"]
    command = [sys.executable, "-c", _WRITES_NOTHING, *map(str, words), "--scratch", str(scratch)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_rows"] == 40
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_it_plans_what_the_build_does(kind: str, models: Path, prompts: Path, tmp_path: Path) -> None:
    """All but times; a basis that would need rows is counted as large as it may become."""
    config = BuildConfig(embedding=EmbeddingConfig(model=str(models / kind), threads=1))
    planned = preflight(prompts, out=tmp_path / "store", config=config)
    events: list[Event] = []
    build(prompts, out=tmp_path / "store", config=config, observer=events.append)
    (made,) = [event for event in events if isinstance(event, Preflight)]
    unlike = {
        field.name for field in dataclasses.fields(Preflight) if getattr(planned, field.name) != getattr(made, field.name)
    }
    measured = {"seconds", "stage_seconds", "free_bytes"}
    if kind == "gemma2":
        assert planned.remaining_bytes > made.remaining_bytes
        measured |= {"remaining_bytes", "embed_memory_bytes"}
    assert unlike <= measured


def test_there_is_one_preflight_and_no_embedder_is_made_twice(prompts: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    source = FakeSource()
    planned = preflight(prompts, out=tmp_path / "store", config=CONFIG, source=source, observer=events.append)
    assert [event for event in events if isinstance(event, Preflight)] == [planned]
    assert (source.creations, source.reopenings) == (1, 0)
    assert not (tmp_path / "store").exists()


def test_quarantined_lines_are_shown(prompts: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    preflight(prompts, out=tmp_path / "store", config=CONFIG, source=FakeSource(), observer=events.append)
    (notice,) = [event.message for event in events if isinstance(event, Notice)]
    assert f"line 41 of {prompts}: not JSON" in notice
    assert f"line 44 of {prompts}: message 0" in notice
    assert "quarantine.jsonl" not in notice


def test_of_many_quarantined_lines_the_first_are_shown(tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": f"Explain number {row}"} for row in range(200)]
    prompts = write_lines(tmp_path / "prompts.jsonl", [*lines, *[b"broken\n"] * 13])
    events: list[Event] = []
    preflight(prompts, out=tmp_path / "store", config=CONFIG, source=FakeSource(), observer=events.append)
    (notice,) = [event.message for event in events if isinstance(event, Notice)]
    assert f"line 210 of {prompts}" in notice
    assert f"line 211 of {prompts}" not in notice
    assert notice.endswith("; and 3 more, which a build lists")


def test_what_the_build_refuses_is_refused(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "store"
    strict = dataclasses.replace(CONFIG, strict=True)
    with pytest.raises(PromptError, match="2 of 44 lines"):
        preflight(prompts, out=out, config=strict, source=FakeSource())
    with pytest.raises(ConfigError, match=r"the scratch folder .* does not exist"):
        preflight(prompts, out=out, config=CONFIG, source=FakeSource(), scratch=tmp_path / "nowhere")
    small = dataclasses.replace(CONFIG, memory_budget_bytes=1)
    with pytest.raises(BudgetError):
        preflight(prompts, out=out, config=small, source=FakeSource())
    monkeypatch.setattr("embstore.flow.cost.free_bytes_at", lambda _: 100)
    with pytest.raises(BudgetError, match=rf"the disk of {out} has 100 B free"):
        preflight(prompts, out=out, config=CONFIG, source=FakeSource())
    assert not out.exists()


def test_a_large_index_is_a_file_in_the_scratch_folder(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("embstore.storage.placing._BUDGET_SHARE", CONFIG.memory_budget_bytes)
    events: list[Event] = []
    found = preflight(
        prompts, out=tmp_path / "store", config=CONFIG, source=FakeSource(), scratch=scratch, observer=events.append
    )
    assert found.num_rows == 40
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert [message for message in messages if "the index of prompts" in message and f"KiB in {scratch}" in message]
    assert list(scratch.iterdir()) == []


class _Seen(FakeSource):
    """Remembers what it was probed with."""

    def create(self, prompts: Any, *given: Any, **options: Any) -> Any:
        self.length = len(prompts)
        self.texts = [prompt.text for prompt in prompts.sample(range(SAMPLE_ROWS))]
        return super().create(prompts, *given, **options)


def test_probes_get_a_seeded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SAMPLE_ROWS", 50)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Explain number {row}"} for row in range(500)])
    seen = [_Seen(), _Seen()]
    for source in seen:
        preflight(prompts, out=tmp_path / "store", config=CONFIG, source=source)
    assert seen[0].texts == seen[1].texts
    assert seen[0].length == 500
    assert len(set(seen[0].texts)) == 50


@pytest.mark.parametrize(("max_bytes", "size"), [(1000, 16), (9, 8)])  # a sample that stays, and one that has to shrink
def test_every_row_is_as_likely_in_the_sample(max_bytes: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SAMPLE_ROWS", 16)
    monkeypatch.setattr(dry_run, "_LEAST_ROWS", 2)
    drawn: Counter[int] = Counter()
    rounds = 2000
    for seed in range(rounds):
        sample = dry_run._Sample(max_bytes, seed)
        for row in range(40):
            sample.offer(row, b"x")
        assert len(sample.rows) == len({row for row, _ in sample.rows}) == size
        drawn.update(row for row, _ in sample.rows)
    share = size / 40
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(drawn[row] - rounds * share) < 5 * deviation for row in range(40))


@pytest.mark.parametrize("command", [preflight, build])
@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", '{"question": "Why?", "src": "a"}\n' * 2), ("p.csv", "question,src\nWhy?,a\nHow?,b\n")],
)
def test_a_field_that_no_line_has_is_a_wrong_option_and_what_there_is_is_listed(
    command: Callable[..., object], name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    config = dataclasses.replace(CONFIG, fields=PromptFields(text="questoin"))
    with pytest.raises(ConfigError) as caught:
        command(tmp_path / name, out=tmp_path / "store", config=config, source=FakeSource())
    expected = f"no line of {tmp_path / name} has a field 'questoin': the fields are question, src in the first one"
    assert (str(caught.value), caught.value.exit_code) == (expected, ExitCode.USAGE)
    assert not (tmp_path / "store").exists()
