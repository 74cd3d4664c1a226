"""Chats that the template refuses are found before the model is loaded, all at once, and change no byte of any other row."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embstore.core.config import BuildConfig
from embstore.core.errors import RowError
from embstore.core.events import Event, Notice, StageAdvanced, StageStarted
from embstore.core.records import TemplateRecord
from embstore.flow import template_check
from embstore.flow.build import build
from embstore.flow.dry_run import preflight
from embstore.flow.template_worker import TemplateWorker
from embstore.storage.journal import read_journal
from embstore.storage.reader import open_store
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.faults import SYNCS, Killed, SystemCalls
from tests.support.stores import (
    HookedSource,
    Stopped,
    build_part,
    build_small,
    journal_records,
    snapshot,
    with_embedding,
    write_lines,
    write_small_prompts,
)
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

QUARANTINE = dataclasses.replace(CONFIG, on_error="quarantine")
REFUSED = (7, 33, 34, 35, 66)


def chat(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **more}


def lines() -> list[dict[str, object]]:
    """70 rows, half of them chats; five are refused, and a text that only looks like one of them is not."""
    pool: list[dict[str, object]] = []
    for row in range(70):
        word = "REFUSE" if row in REFUSED else "Explain"
        pool.append(chat(f"{word} chat {row}", id=f"c{row}") if row % 2 or row in REFUSED else {"prompt": f"Explain {row}"})
    pool[10] = {"prompt": 'A text with "messages": [ and REFUSE in it'}
    return pool


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("pool") / "prompts.jsonl", lines())


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pool = [line for row, line in enumerate(lines()) if row not in REFUSED]
    return write_lines(tmp_path_factory.mktemp("mended") / "prompts.jsonl", pool)


@pytest.fixture(scope="module")
def quarantined(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that keeps the refused prompts as numbers; read it, never write to it."""
    store = tmp_path_factory.mktemp("quarantined") / "store"
    build_small(prompts, store, config=QUARANTINE, source=templated())
    return store


def templated() -> FakeSource:
    source = FakeSource()
    source.has_template = True
    return source


def listed(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / "refused.jsonl").read_text().splitlines()]


def record_of(store: Path) -> TemplateRecord:
    (record,) = [each for each in journal_records(store) if isinstance(each, TemplateRecord)]
    return record


def test_all_are_named_at_once_before_the_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    source, store, events = templated(), tmp_path / "store", list[Event]()
    with pytest.raises(RowError) as caught:
        build_small(prompts, store, source=source, observer=events.append)
    assert source.creations == source.reopenings == len(source.calls) == 0
    assert read_journal(store).spec is None
    message = str(caught.value)
    assert "refuses 5 of 37 chats" in message
    assert "'c7' (row 7): the text says so" in message
    assert "'c33' (row 33)" in message
    assert "and 2 more" in message
    assert "c66" not in message
    assert str(store / "refused.jsonl") in str(caught.value.hint)
    assert "--on-error quarantine" in str(caught.value.hint)
    assert [(line["row"], line["id"]) for line in listed(store)] == [(row, f"c{row}") for row in REFUSED]
    assert {line["reason"] for line in listed(store)} == {"the chat template refuses it: the text says so"}
    assert [event.stage for event in events if isinstance(event, StageStarted)][-1] == "templates"
    advanced = [event for event in events if isinstance(event, StageAdvanced) and event.stage == "templates"]
    assert sum(event.count for event in advanced) == 70
    assert verify(store).findings == verify(store).notes == []


def test_where_every_chat_is_refused_the_template_is_suspected(tmp_path: Path) -> None:
    refused = [chat(f"REFUSE chat {row}") for row in range(3)]
    for pool, suspected in ((refused, True), ([*refused, chat("Explain")], False)):
        prompts = write_lines(tmp_path / "prompts.jsonl", pool)
        with pytest.raises(RowError, match="refuses 3 of") as caught:
            preflight(prompts, out=tmp_path / "store", config=CONFIG, source=templated())
        assert ("chat template of the model" in str(caught.value.hint)) == suspected


def test_a_dry_run_names_them_too(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="refuses 5 of 37 chats") as caught:
        preflight(prompts, out=tmp_path / "store", config=CONFIG, source=templated())
    assert "refused.jsonl" not in str(caught.value.hint), "its folder is gone"
    assert not (tmp_path / "store").exists()


def test_quarantined_ones_keep_their_numbers_without_vectors(quarantined: Path) -> None:
    store = open_store(quarantined)
    assert [failed.row for failed in store.journal.failed] == list(REFUSED)
    assert {failed.reason for failed in store.journal.failed} == {"the chat template refuses it: the text says so"}
    assert [row for row in range(70) if store.weights[row] == 0] == list(REFUSED)
    assert store.num_rows == 70
    assert verify(quarantined).findings == verify(quarantined).notes == []
    assert record_of(quarantined).refused == len(REFUSED)


def test_a_resume_neither_renders_again_nor_changes_a_byte(
    prompts: Path, quarantined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with pytest.raises(RowError):
        build_small(prompts, store, source=templated())
    monkeypatch.setattr(template_check, "render_block", lambda *_: pytest.fail("a chat was rendered again"))
    with pytest.raises(RowError, match=r"refuses 5 of 37 chats: 'c7' \(row 7\): the text says so"):
        build_small(prompts, store, source=templated())

    def stop(first_row: int) -> None:
        if first_row >= 32:
            raise Stopped

    with pytest.raises(Stopped):
        build_small(prompts, store, config=QUARANTINE, source=HookedSource(stop, templated()))
    assert [failed.row for failed in read_journal(store).failed] == [7]
    with pytest.raises(RowError, match="refuses 5 of 37"):  # four are still to come
        build_small(prompts, store, source=templated())
    build_small(prompts, store, config=QUARANTINE, source=templated())
    assert snapshot(store) == snapshot(quarantined)


def test_where_all_that_are_refused_are_committed_nothing_is_said_again(prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pool = write_lines(tmp_path / "early.jsonl", [chat("REFUSE this"), *[{"prompt": f"Explain {row}"} for row in range(60)]])

    def stop(first_row: int) -> None:
        if first_row >= 32:
            raise Stopped

    with pytest.raises(Stopped):
        build_small(pool, store, config=QUARANTINE, source=HookedSource(stop, templated()))
    events: list[Event] = []
    build_small(pool, store, source=templated(), observer=events.append)  # without quarantine
    assert not [event for event in events if isinstance(event, Notice) and "template" in event.message]


def test_a_corrected_pool_goes_on_by_the_same_command(prompts: Path, mended: Path, tmp_path: Path) -> None:
    build_small(mended, tmp_path / "whole", source=templated())
    for resume in (False, True):
        store = tmp_path / str(resume)
        with pytest.raises(RowError):
            build_small(prompts, store, source=templated())
        build_small(mended, store, source=templated(), resume=resume)
        assert snapshot(store) == snapshot(tmp_path / "whole")
        assert not (store / "refused.jsonl").exists()
        assert verify(store).notes == []


def test_a_store_that_was_begun_before_this_stage_hands_its_rows_on(
    prompts: Path, mended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier release left it: a window is committed, and the chat of a later one is refused."""
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr("embstore.flow.admission.check_templates", lambda *_: None)
        with pytest.raises(RowError, match="row 33"):
            build_small(prompts, store, config=QUARANTINE, source=HookedSource(_stop_in_quarantine, templated()))
    assert len(read_journal(store).windows) == 1
    with pytest.raises(RowError, match="refuses 5 of 37") as caught:
        build_small(prompts, store, source=templated())
    assert f"--reuse {store}" in str(caught.value.hint)
    config = dataclasses.replace(CONFIG, reuse=(str(store),))
    report = build_small(mended, tmp_path / "new", config=config, source=templated())
    assert report.reused_rows == 31  # row 7 of the committed window is gone
    build_small(mended, tmp_path / "whole", source=templated())
    new, whole = open_store(tmp_path / "new"), open_store(tmp_path / "whole")
    assert new.rows(new.ids).tobytes() == whole.rows(whole.ids).tobytes()
    assert new.weights.tobytes() == whole.weights.tobytes()


def _stop_in_quarantine(first_row: int) -> None:
    if first_row >= 32:
        raise RowError("prompt 'c33' (row 33) failed")


def test_texts_and_models_without_a_template_cost_nothing(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_check, "render_block", lambda *_: pytest.fail("something was rendered"))
    texts = write_lines(tmp_path / "texts.jsonl", [{"prompt": f"Explain {row}"} for row in range(40)])
    source = templated()
    build_small(texts, tmp_path / "texts", source=source)
    assert source.templates == 0, "a tokenizer was loaded for nothing"
    build_small(prompts, tmp_path / "none", source=FakeSource())
    for store in (tmp_path / "texts", tmp_path / "none"):
        assert read_journal(store).template is None
        assert not (store / "refused.jsonl").exists()


def test_only_prompts_for_the_model_are_rendered(prompts: Path, mended: Path, tmp_path: Path) -> None:
    build_small(mended, tmp_path / "old", source=templated())
    assert record_of(tmp_path / "old").chats == 32
    config = dataclasses.replace(QUARANTINE, reuse=(str(tmp_path / "old"),))
    report = build_small(prompts, tmp_path / "new", config=config, source=templated())
    assert report.reused_rows == 65
    assert record_of(tmp_path / "new").chats == record_of(tmp_path / "new").refused == len(REFUSED)


def test_another_template_is_asked_again(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    with pytest.raises(RowError):
        build_small(prompts, store, source=templated())
    monkeypatch.setattr("tests.support.fake.FakeTemplate.digest", "e" * 64)
    monkeypatch.setattr("tests.support.fake.FakeTemplate.refusal", lambda self, prompt: None)
    build_small(None, store, source=templated())
    assert open_store(store).journal.failed == []


def test_chats_that_nothing_refuses_any_more_are_not_refused_later(prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(RowError):
        build_small(prompts, store, source=templated())
    build_part(prompts, store, rows=32)  # by a model without a template
    build_small(None, store)
    assert not (store / "refused.jsonl").exists()
    assert open_store(store).journal.failed == []


# --- in processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> list[TemplateWorker]:
    """Two processes from the second of many blocks on; the workers that were made."""
    made: list[TemplateWorker] = []
    start = TemplateWorker._start
    monkeypatch.setattr(template_check, "_BLOCK_ROWS", 8)
    monkeypatch.setattr(template_check, "_WORTH_SECONDS", -1.0)
    monkeypatch.setattr(template_check, "_num_processes", lambda run: 2)

    def started(worker: TemplateWorker) -> Any:
        made.append(worker)
        return start(worker)

    monkeypatch.setattr(TemplateWorker, "_start", started)
    return made


@pytest.mark.parametrize(("cores", "budget", "expected"), [(4, 8 << 30, 4), (128, 64 << 30, 16), (8, 2 << 30, 4), (2, 1, 1)])
def test_processes_keep_to_the_memory_budget(cores: int, budget: int, expected: int) -> None:
    config = dataclasses.replace(with_embedding(threads=cores), memory_budget_bytes=budget)
    assert template_check._num_processes(SimpleNamespace(config=config)) == expected  # type: ignore[arg-type]


def test_a_file_in_the_current_folder_is_not_run(
    prompts: Path,
    quarantined: Path,
    tmp_path: Path,
    in_processes: list[TemplateWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "queue.py").write_text("open('was_run', 'w')\nraise SystemExit")
    monkeypatch.chdir(tmp_path)
    build_small(prompts, tmp_path / "store", config=QUARANTINE, source=templated())
    assert in_processes
    assert not any(worker._is_lost and worker._process is None for worker in in_processes)
    assert not (tmp_path / "was_run").exists()


def test_processes_find_the_same(
    prompts: Path, quarantined: Path, tmp_path: Path, in_processes: list[TemplateWorker]
) -> None:
    build_small(prompts, tmp_path / "store", config=QUARANTINE, source=templated())
    assert 1 <= len(in_processes) <= 2
    assert record_of(tmp_path / "store") == record_of(quarantined)
    assert listed(tmp_path / "store") == listed(quarantined)
    assert snapshot(tmp_path / "store") == snapshot(quarantined)
    assert all(worker._process is not None and worker._process.poll() is not None for worker in in_processes)


def test_what_lost_processes_leave_is_rendered_here(
    prompts: Path, quarantined: Path, tmp_path: Path, in_processes: list[TemplateWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = TemplateWorker._start

    def killed(worker: TemplateWorker) -> Any:
        process = started(worker)
        process.kill()
        return process

    monkeypatch.setattr(TemplateWorker, "_start", killed)
    build_small(prompts, tmp_path / "store", config=QUARANTINE, source=templated())
    assert len(in_processes) == 2
    assert record_of(tmp_path / "store") == record_of(quarantined)
    assert listed(tmp_path / "store") == listed(quarantined)


def test_an_interrupted_stage_leaves_no_process(prompts: Path, tmp_path: Path, in_processes: list[TemplateWorker]) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StageAdvanced) and in_processes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_small(prompts, tmp_path / "store", config=QUARANTINE, source=templated(), observer=interrupt)
    assert all(worker._process is not None and worker._process.poll() is not None for worker in in_processes)
    assert read_journal(tmp_path / "store").template is None
    assert not (tmp_path / "store" / "refused.jsonl").exists()


def test_a_script_without_a_guard_may_build(prompts: Path, tmp_path: Path) -> None:
    """A worker runs nothing of the caller's main module."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from embstore.flow import template_check
        from tests.support.build_fake import CONFIG
        from tests.unit.test_template_check import QUARANTINE, build_small, templated
        template_check._BLOCK_ROWS, template_check._WORTH_SECONDS = 8, -1.0
        template_check._cores = lambda run: 2
        build_small(Path({str(prompts)!r}), Path({str(tmp_path / "store")!r}), config=QUARANTINE, source=templated())
        print("once")
        """)
    )
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import runpy; "
    command += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_call_until_the_first_window_ends_in_the_same_bytes(
    prompts: Path, quarantined: Path, tmp_path: Path, tally: Counter
) -> None:
    def killed(store: Path, point: int) -> list[Any]:
        with SystemCalls(root=store, fail_at=point, torn=bool(point % 2)).watching() as calls:
            try:
                build_small(prompts, store, config=QUARANTINE, source=templated())
            except Killed:
                return calls.calls
        return calls.calls

    calls = killed(tmp_path / "count", 0)
    names = [call.path for call in calls]
    first, last = names.index("refused.jsonl"), names.index("spec.json")
    assert first < last
    for point in range(first - 5, last + 3):
        if calls[point - 1].name in SYNCS:
            continue
        store = tmp_path / f"store-{point}"
        killed(store, point)
        build_small(None if read_journal(store).prompts else prompts, store, config=QUARANTINE, source=templated())
        is_lost = snapshot(store) != snapshot(quarantined)
        tally("kill while chats are rendered, in process", losses=int(is_lost))
        assert not is_lost, calls[point - 1]


def test_the_small_pool_of_other_tests_has_chats_that_a_template_takes(tmp_path: Path) -> None:
    source = templated()
    config: BuildConfig = CONFIG
    build(write_small_prompts(tmp_path / "p.jsonl"), out=tmp_path / "store", config=config, source=source)
    assert record_of(tmp_path / "store").chats == 5
