"""Rows taken over from old stores: the new store is as if the model had made them, and the old ones are never touched."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import BuildConfig, Turns, WeightingConfig
from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    EmbstoreError,
    IdentityMismatchError,
    IncompleteStoreError,
    RowError,
    StoreNotFoundError,
)
from embstore.core.events import Event, Notice, Preflight, RowsCommitted, ignore
from embstore.core.records import DriftRecord, ReuseRecord, ReusingWindowRecord
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import build
from embstore.flow.dry_run import preflight
from embstore.flow.reuse import match_rows, open_reused, rows_digest
from embstore.storage.journal import read_journal
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.writer import StoreWriter
from embstore.views.info import inspect, verify
from tests.support.build_fake import CONFIG
from tests.support.fake import VERSIONS, FakeSource, renamed
from tests.support.rot import tree_state
from tests.support.stores import (
    HookedSource,
    Stopped,
    build_part,
    build_small,
    journal_records,
    small_lines,
    snapshot,
    with_embedding,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("without_syncs")

QUARANTINE = dataclasses.replace(CONFIG, on_error="quarantine")


def reusing(*stores: Path, config: BuildConfig = CONFIG) -> BuildConfig:
    return dataclasses.replace(config, reuse=tuple(str(store) for store in stores))


@pytest.fixture(scope="module")
def old_lines() -> list[dict[str, Any]]:
    """52 of the small lines, and 5 that the new pool has no more."""
    kept = [line for index, line in enumerate(small_lines()) if index % 4]
    gone = [{"prompt": f"No longer asked: {index}"} for index in range(5)]
    return [*kept[:20], *gone, *kept[20:]]


@pytest.fixture(scope="module")
def old(old_lines: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("old")
    store = folder / "old"
    build_small(write_lines(folder / "old.jsonl", old_lines), store)
    before = tree_state(store)
    yield store
    assert tree_state(store) == before, "an old store was touched"


def _copied(store: Path) -> set[int]:
    return {row for start, stop in verify(store).reused for row in range(start, stop)}


def _same_rows(left: EmbeddingStore, right: EmbeddingStore) -> None:
    assert left.ids == right.ids
    np.testing.assert_array_equal(left.rows(left.ids), right.rows(right.ids))
    np.testing.assert_array_equal(left.coordinates, right.coordinates)
    np.testing.assert_allclose(left.residuals, right.residuals, rtol=1e-3)  # their sums depend on the rows beside them
    np.testing.assert_array_equal(np.asarray(left.sequences), np.asarray(right.sequences))
    np.testing.assert_array_equal(left.weights, right.weights)
    np.testing.assert_array_equal(left.neighbor_ids, right.neighbor_ids)


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_the_new_store_is_the_one_a_full_build_makes(
    small_prompts: Path, finished_store: Path, old: Path, old_lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    events: list[Event] = []
    source = FakeSource()
    report = build_small(small_prompts, tmp_path / "new", config=reusing(old), source=source, observer=events.append)
    new = open_store(tmp_path / "new")
    _same_rows(new, open_store(finished_store))
    known = [json.dumps(line.get("prompt") or line.get("messages")) for line in old_lines]
    prompts = [prompt.text or list(prompt.messages or ()) for prompt in new.prompts]
    expected = {row for row, prompt in enumerate(prompts) if json.dumps(prompt) in known}
    assert _copied(tmp_path / "new") == expected
    assert (report.reused_rows, report.embedded_rows, report.dropped_rows) == (len(expected), 70 - len(expected), 5)
    assert sum(stop - start for start, stop in source.calls) == 70 - len(expected)
    assert (source.creations, source.reopenings) == (0, 1)
    (planned,) = [event for event in events if isinstance(event, Preflight)]
    assert (planned.reused_rows, planned.remaining_rows, planned.dropped_rows) == (len(expected), 70, 5)
    assert sum(event.num_reused for event in events if isinstance(event, RowsCommitted)) == len(expected)
    taken = new.metadata["reuse"]
    assert (taken["rows"], taken["dropped"]) == (len(expected), 5)
    assert taken["stores"][0] | {"digest": ""} == {"digest": "", "rows": 57, "found": 52, "reused": 52}
    assert inspect(tmp_path / "new").reused_rows == len(expected)
    assert verify(tmp_path / "new").findings == []


def test_without_reuse_nothing_speaks_of_it(finished_store: Path) -> None:
    assert "reuse" not in open_store(finished_store).metadata
    assert verify(finished_store).reused == []
    assert not any(isinstance(record, ReuseRecord | ReusingWindowRecord) for record in journal_records(finished_store))


def test_a_pool_in_another_order_reads_each_old_chunk_once_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": f"Explain number {index}."} for index in range(400)]
    build_small(write_lines(tmp_path / "old.jsonl", lines), tmp_path / "old")
    random.Random(3).shuffle(lines)
    lines[17:17] = [{"prompt": f"New: {index}"} for index in range(112)]
    prompts = write_lines(tmp_path / "new.jsonl", lines)
    config = with_embedding(window_rows=128)
    build_small(prompts, tmp_path / "full", config=config)
    reads: list[int] = []
    real = EmbeddingStore.read_chunk
    monkeypatch.setattr(
        EmbeddingStore, "read_chunk", lambda store, index, **o: (reads.append(index), real(store, index, **o))[1]
    )
    events: list[Event] = []
    settings = reusing(tmp_path / "old", config=config)
    report = build_small(prompts, tmp_path / "new", config=settings, observer=events.append)
    assert report.reused_rows == 400
    assert any(isinstance(event, Notice) and "read 3 times each" in event.message for event in events)
    windows, old_chunks = 4, 25
    assert max(reads.count(index) for index in range(old_chunks)) <= windows
    _same_rows(open_store(tmp_path / "new"), open_store(tmp_path / "full"))
    # in its own order each old chunk is read by the chunks that it overlaps, and kept between them
    reads.clear()
    events.clear()
    build_small(tmp_path / "old.jsonl", tmp_path / "again", config=reusing(tmp_path / "old"), observer=events.append)
    assert not any(isinstance(event, Notice) and " times each" in event.message for event in events)
    assert sorted(reads) == list(range(old_chunks))


def test_other_layouts_and_compressors_take_rows_from_each_other(
    small_prompts: Path, finished_store: Path, old: Path, tmp_path: Path
) -> None:
    other = with_embedding(chunk_rows=32, window_rows=64, compressor="none")
    build_small(small_prompts, tmp_path / "plain", config=reusing(old, config=other))
    build_small(small_prompts, tmp_path / "back", config=reusing(tmp_path / "plain"))
    assert verify(tmp_path / "plain").findings == verify(tmp_path / "back").findings == []
    _same_rows(open_store(tmp_path / "plain"), open_store(finished_store))
    _same_rows(open_store(tmp_path / "back"), open_store(finished_store))


def test_a_text_with_other_whitespace_is_the_same_row_but_not_the_same_input_of_the_model(old: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "Explain  number 1."}, {"prompt": "Explain number 2."}])
    report = build_small(prompts, tmp_path / "new", config=reusing(old))
    assert (report.reused_rows, report.embedded_rows) == (1, 1)
    assert _copied(tmp_path / "new") == {1}


def test_rows_that_failed_are_computed_again_and_may_fail_again(tmp_path: Path) -> None:
    lines = [{"prompt": "FAIL here"}, {"prompt": "sound"}, {"prompt": "other"}]
    build_small(write_lines(tmp_path / "old.jsonl", lines), tmp_path / "old", config=QUARANTINE)
    prompts = write_lines(tmp_path / "new.jsonl", [{"prompt": "new"}, *reversed(lines), {"prompt": "FAIL new"}])
    with pytest.raises(RowError, match=r"row 3\) failed: the text says so"):
        build_small(prompts, tmp_path / "stopped", config=reusing(tmp_path / "old"))
    report = build_small(prompts, tmp_path / "new", config=reusing(tmp_path / "old", config=QUARANTINE))
    assert (report.reused_rows, report.embedded_rows, report.dropped_rows) == (2, 3, 0)
    store = open_store(tmp_path / "new")
    assert [failed.row for failed in store.journal.failed] == [3, 4]
    assert verify(tmp_path / "new").findings == []


def test_several_old_stores_the_first_that_has_a_prompt_gives_it(tmp_path: Path) -> None:
    pools = {"a": range(30), "b": range(20, 60)}
    for name, numbers in pools.items():
        lines = [{"prompt": f"Explain number {index}."} for index in numbers]
        build_small(write_lines(tmp_path / f"{name}.jsonl", lines), tmp_path / name)
    lines = [{"prompt": f"Explain number {index}."} for index in range(10, 70)]
    prompts = write_lines(tmp_path / "new.jsonl", lines)
    report = build_small(prompts, tmp_path / "new", config=reusing(tmp_path / "a", tmp_path / "b"))
    assert (report.reused_rows, report.embedded_rows, report.dropped_rows) == (50, 10, 10)
    stores = open_store(tmp_path / "new").metadata["reuse"]["stores"]
    assert [(each["rows"], each["found"], each["reused"]) for each in stores] == [(30, 20, 20), (40, 40, 30)]
    build_small(prompts, tmp_path / "full")
    _same_rows(open_store(tmp_path / "new"), open_store(tmp_path / "full"))


def test_a_pool_that_only_lost_prompts_needs_no_model(old: Path, old_lines: list[dict[str, Any]], tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", old_lines[:40])
    config = reusing(old, config=with_embedding(model=None))
    report = build(prompts, out=tmp_path / "new", config=config)
    assert (report.reused_rows, report.embedded_rows, report.dropped_rows) == (40, 0, 17)
    assert open_store(tmp_path / "new").spec.model == open_store(old).spec.model
    write_lines(prompts, [*old_lines[:40], {"prompt": "not there"}])
    with pytest.raises(ConfigError, match="1 prompts are not in the stores to reuse, and no model was given"):
        build(prompts, out=tmp_path / "other", config=config)


def test_a_dry_run_says_what_would_be_reused(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    planned = preflight(small_prompts, out=tmp_path / "new", config=reusing(old), source=FakeSource())
    assert (planned.num_rows, planned.reused_rows, planned.dropped_rows) == (70, 52, 5)
    assert not (tmp_path / "new").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "stored", "given"),
    [
        ({"max_tokens": 256}, "max_tokens", "512", "256"),
        ({"dtype": "bfloat16"}, "dtype", "float32", "bfloat16"),
        ({"vocab": "tokenizer"}, "vocab", "model", "tokenizer"),
        ({"space": "hidden"}, "space", "logits", "hidden"),
        ({"pooling": "last"}, "pooling", "mean", "last"),
        ({"batch_tokens": 64}, "batch_tokens", "4096", "64"),
        ({"threads": 3}, "threads", "1", "3"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], field: str, stored: str, given: str, small_prompts: Path, old: Path, tmp_path: Path
) -> None:
    with pytest.raises(IdentityMismatchError, match=f"rows of {old} cannot be reused") as caught:
        build_small(small_prompts, tmp_path / "new", config=reusing(old, config=with_embedding(**changes)))
    assert [str(item) for item in caught.value.mismatches] == [f"{field}: the store has {stored}, given {given}"]
    assert not (tmp_path / "new" / "spec.json").exists()


@pytest.mark.parametrize("field", ["weights_sha256", "config_sha256", "tokenizer_sha256", "architecture"])
def test_another_model_is_refused(field: str, small_prompts: Path, old: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityMismatchError, match=rf"model\.{field}"):
        build_small(small_prompts, tmp_path / "new", config=reusing(old), source=renamed(FakeSource(), **{field: "x" * 64}))


def test_stores_made_unlike_are_refused_together(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "other", config=with_embedding(max_tokens=100))
    with pytest.raises(IdentityMismatchError, match=r"together.*embedding\.max_tokens: the store has 512, given 100"):
        build_small(small_prompts, tmp_path / "new", config=reusing(old, tmp_path / "other"))


@pytest.mark.parametrize(("stored", "given"), [("all", "prompt"), ("prompt", "all")])
def test_rows_of_other_turns_are_refused(
    stored: Turns, given: Turns, old_lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "pool.jsonl", old_lines)
    build_small(prompts, tmp_path / "other", config=dataclasses.replace(CONFIG, turns=stored))
    with pytest.raises(IdentityMismatchError, match=f"turns: the store has {stored}, given {given}") as caught:
        build_small(prompts, tmp_path / "new", config=dataclasses.replace(reusing(tmp_path / "other"), turns=given))
    assert f"--turns {stored}" in str(caught.value.hint)
    assert not (tmp_path / "new").exists()


def test_rows_without_a_date_are_not_joined_by_chats_with_one(small_prompts: Path, tmp_path: Path) -> None:
    """Rows of an older store contain the day on which they were made; copies alone are as good as the originals."""
    source = FakeSource()
    source.records_date = False
    build_small(small_prompts, tmp_path / "undated", source=source)
    more = tmp_path / "more.jsonl"
    more.write_bytes(small_prompts.read_bytes() + b'{"messages": [{"role": "user", "content": "one more"}]}\n')
    dated = FakeSource()
    dated.prints_date = True
    with pytest.raises(IdentityMismatchError, match=r"undated cannot be reused.*chat_date: the store has none recorded"):
        build_small(more, tmp_path / "new", config=reusing(tmp_path / "undated"), source=dated)
    build_small(small_prompts, tmp_path / "copied", config=reusing(tmp_path / "undated"), source=dated)
    assert dated.calls == []
    assert open_store(tmp_path / "copied").spec.embedding.chat_date is None


def test_rows_of_other_versions_are_drift(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_bytes(small_prompts.read_bytes() + b'{"prompt": "one more"}\n')
    source = FakeSource()
    source.versions = dataclasses.replace(VERSIONS, torch="9")
    with pytest.raises(IdentityMismatchError, match=r"versions\.torch: the store has 2\+fake, given 9") as caught:
        build_small(more, tmp_path / "new", config=reusing(old), source=source)
    assert "--allow-drift" in str(caught.value.hint)
    config = dataclasses.replace(reusing(old), allow_drift=True)
    build_small(more, tmp_path / "new", config=config, source=source)
    assert [each.fields for each in journal_records(tmp_path / "new") if isinstance(each, DriftRecord)] == [
        ["versions.torch"]
    ]
    assert open_store(tmp_path / "new").spec.embedding.versions == VERSIONS, "those of the copied rows"


def test_stores_of_two_versions_are_refused_together_and_unknown_ones_are_not_compared(
    small_prompts: Path, old: Path, tmp_path: Path
) -> None:
    for name, versions in (("other", dataclasses.replace(VERSIONS, torch="9")), ("before", None)):
        source = FakeSource()
        source.versions = versions
        build_small(small_prompts, tmp_path / name, source=source)
    with pytest.raises(IdentityMismatchError, match=r"together.*embedding\.versions\.torch: the store has 2\+fake, given 9"):
        build_small(small_prompts, tmp_path / "new", config=reusing(old, tmp_path / "other"))
    report = build_small(small_prompts, tmp_path / "newer", config=reusing(old, tmp_path / "before"))
    assert report.embedded_rows == 0


def test_what_is_no_store_with_rows_is_refused(small_prompts: Path, tmp_path: Path) -> None:
    empty = build_part(small_prompts, tmp_path / "empty", rows=0)
    for path, error in ((tmp_path / "nowhere", StoreNotFoundError), (empty, IncompleteStoreError)):
        with pytest.raises(error):
            build_small(small_prompts, tmp_path / "new", config=reusing(path))
        assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="it is the store being built"):
        build_small(small_prompts, tmp_path / "new", config=reusing(tmp_path / "new"))


# --- unfinished stores ------------------------------------------------------------------------------------------------


@pytest.fixture
def part(small_prompts: Path, tmp_path: Path) -> Path:
    """A store of the small pool with rows 0 to 31 committed, and chunks of the next window that nothing vouches for."""
    store = build_part(small_prompts, tmp_path / "part", rows=48)
    assert [(window.start, window.stop) for window in read_journal(store).windows.values()] == [(0, 32)]
    (store / "embeddings.zarr" / "c.2.0").write_bytes(b"of no commit")
    return store


def _turned(small_prompts: Path, tmp_path: Path) -> Path:
    lines = small_prompts.read_bytes().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_bytes(b"".join(reversed(lines)))
    return tmp_path / "turned.jsonl"


def test_committed_rows_of_an_unfinished_store_are_handed_on(small_prompts: Path, part: Path, tmp_path: Path) -> None:
    turned = _turned(small_prompts, tmp_path)
    before = tree_state(part)
    source = FakeSource()
    report = build_small(turned, tmp_path / "new", config=reusing(part), source=source)
    # of one row another spelling comes first now
    assert (report.reused_rows, report.embedded_rows, report.dropped_rows) == (31, 39, 1)
    build_small(turned, tmp_path / "whole")
    _same_rows(open_store(tmp_path / "new"), open_store(tmp_path / "whole"))
    taken = open_store(tmp_path / "new").metadata["reuse"]["stores"][0]
    assert (taken["rows"], taken["found"], taken["reused"]) == (32, 31, 31)
    assert verify(tmp_path / "new").findings == []
    assert tree_state(part) == before, "the unfinished store was touched"


def test_failed_rows_of_an_unfinished_store_are_computed_again(tmp_path: Path) -> None:
    lines = [{"prompt": "FAIL here"}, *[{"prompt": f"Explain {row}"} for row in range(60)]]
    old = tmp_path / "old"
    build_part(write_lines(tmp_path / "old.jsonl", lines), old, rows=32, config=QUARANTINE)
    prompts = write_lines(tmp_path / "new.jsonl", lines[:40])
    report = build_small(prompts, tmp_path / "new", config=reusing(old, config=QUARANTINE))
    assert (report.reused_rows, report.embedded_rows) == (31, 9)
    assert [failed.row for failed in open_store(tmp_path / "new").journal.failed] == [0]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_resume_finds_the_same_rows_in_a_store_that_has_grown(
    is_finished: bool, small_prompts: Path, part: Path, tmp_path: Path
) -> None:
    turned = _turned(small_prompts, tmp_path)
    build_small(turned, tmp_path / "whole", config=reusing(part))
    new = _part(turned, tmp_path / "new", part, rows=32)
    assert 0 < len(read_journal(new).windows) < 3
    if is_finished:
        build_small(small_prompts, part)
    else:
        build_part(small_prompts, part, rows=64)
        assert len(read_journal(part).windows) == 2
    for config in (reusing(part), CONFIG):
        store = Path(shutil.copytree(new, tmp_path / f"resumed-{len(config.reuse)}"))
        build_small(None, store, config=config)
        assert snapshot(store) == snapshot(tmp_path / "whole")


def test_rows_that_a_store_gains_after_it_was_opened_are_not_named(small_prompts: Path, part: Path, tmp_path: Path) -> None:
    """Another build may still be writing it."""
    (opened,) = open_reused([part], tmp_path / "new")
    digest = rows_digest(opened)
    build_small(None, part)
    table = PromptTable(part / "prompts.jsonl", 70)
    (record,) = match_rows(table, [opened], folder=tmp_path, memory_bytes=1 << 20, observer=ignore).record.stores
    assert (record.digest, record.rows) == (digest, 32)


def test_dates_of_all_stores_are_compared(small_prompts: Path, tmp_path: Path) -> None:
    stores = [tmp_path / "undated", tmp_path / "first", tmp_path / "second"]
    undated = FakeSource()
    undated.records_date = False
    build_small(small_prompts, stores[0], source=undated)
    for store, day in zip(stores[1:], ("2024-01-01", "2025-01-01"), strict=True):
        build_small(small_prompts, store, config=with_embedding(chat_date=day))
    with pytest.raises(IdentityMismatchError, match=r"first and .*second together.*chat_date"):
        build_small(small_prompts, tmp_path / "mixed", config=reusing(*stores))
    build_small(small_prompts, tmp_path / "new", config=reusing(stores[1], stores[0]))
    assert open_store(tmp_path / "new").spec.embedding.chat_date is None, "rows of the second store may have any date"


def test_an_unfinished_store_that_is_another_is_refused_with_both_digests(
    small_prompts: Path, part: Path, tmp_path: Path
) -> None:
    turned = _turned(small_prompts, tmp_path)
    new = _part(turned, tmp_path / "new", part)
    (record,) = [record for record in journal_records(new) if isinstance(record, ReuseRecord)]
    shutil.rmtree(part)
    build_part(turned, part, rows=48)
    with pytest.raises(IdentityMismatchError, match=f"the store has {record.stores[0].digest[:16]}, given [0-9a-f]{{16}}"):
        build_small(None, new)


@pytest.mark.parametrize("name", ["embeddings.zarr/c.1.0", "coordinates.npy", "residuals.npy", "prompts.jsonl", "basis.npy"])
def test_damage_in_an_unfinished_store_is_never_copied(name: str, small_prompts: Path, part: Path, tmp_path: Path) -> None:
    content = bytearray((part / name).read_bytes())
    content[200 if name != "prompts.jsonl" else 20] ^= 1  # of the first rows
    (part / name).write_bytes(content)
    with pytest.raises(CorruptStoreError, match=Path(name).name):
        build_small(small_prompts, tmp_path / "new", config=reusing(part))


@pytest.mark.parametrize(
    "name", ["embeddings.zarr/c.2.0", "coordinates.npy", "residuals.npy", "sequences.npy", "prompts.jsonl", "basis.npy"]
)
def test_damage_in_an_old_store_is_never_copied(name: str, small_prompts: Path, old: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(old, tmp_path / "damaged", symlinks=True))
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(CorruptStoreError, match=Path(name).name):
        build_small(small_prompts, tmp_path / "new", config=reusing(damaged))
    with pytest.raises(EmbstoreError):
        open_store(tmp_path / "new")


# --- resumes ----------------------------------------------------------------------------------------------------------


def _part(prompts: Path, out: Path, old: Path, *, rows: int = 32) -> Path:
    def stop(first_row: int) -> None:
        if first_row >= rows:
            raise Stopped

    with pytest.raises(Stopped):
        build_small(prompts, out, config=reusing(old), source=HookedSource(stop))
    return out


def test_a_resume_copies_what_is_left_also_without_being_told_again(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "whole", config=reusing(old))
    for number, config in enumerate((reusing(old), CONFIG)):
        store = _part(small_prompts, tmp_path / f"part-{number}", old)
        report = build_small(None, store, config=config)
        assert 0 < report.reused_rows < 52
        assert snapshot(store) == snapshot(tmp_path / "whole")
        assert _copied(store) == _copied(tmp_path / "whole")


def test_a_missing_or_changed_old_store_is_refused_with_both_digests(
    small_prompts: Path, old: Path, old_lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(old, tmp_path / "moved", symlinks=True))
    store = _part(small_prompts, tmp_path / "part", moved)
    (record,) = [record for record in journal_records(store) if isinstance(record, ReuseRecord)]
    with StoreWriter(store, resume=True):
        pass  # scratch of a dead writer is swept by whoever opens its store
    before = tree_state(store, apart_from=(".lock",), is_opened=True)
    shutil.rmtree(moved)
    with pytest.raises(IdentityMismatchError, match=f"{record.stores[0].digest[:16]}, given no store at {moved}"):
        build_small(None, store)
    build_small(write_lines(tmp_path / "less.jsonl", old_lines[:-1]), moved)
    with pytest.raises(IdentityMismatchError, match=f"the store has {record.stores[0].digest[:16]}, given [0-9a-f]{{16}}"):
        build_small(None, store, config=reusing(moved))
    with pytest.raises(IdentityMismatchError, match="stores to reuse: the store has 1, given 2"):
        build_small(None, store, config=reusing(old, moved))
    assert tree_state(store, apart_from=(".lock",), is_opened=True) == before
    # the same rows from another place are the same
    build_small(None, store, config=reusing(old))
    assert verify(store).findings == []


def test_drift_allowed_computes_what_was_to_be_copied(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(old, tmp_path / "moved", symlinks=True))
    store = _part(small_prompts, tmp_path / "part", moved)
    before = _copied(store)
    shutil.rmtree(moved)
    events: list[Event] = []
    report = build_small(None, store, config=dataclasses.replace(CONFIG, allow_drift=True), observer=events.append)
    assert (report.reused_rows, report.embedded_rows) == (0, 38)
    assert _copied(store) == before
    assert DriftRecord(fields=["reuse"]) in journal_records(store)
    assert open_store(store).metadata["byte_identity_voided"]
    assert any(isinstance(event, Notice) and "drift allowed" in event.message for event in events)


def test_other_hardware_is_drift_also_for_reuse(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(with_embedding(threads=3), allow_drift=True)
    build_small(small_prompts, tmp_path / "new", config=reusing(old, config=config))
    store = open_store(tmp_path / "new")
    assert store.spec.embedding.threads == 1, "what the copied rows were made with"
    assert DriftRecord(fields=["threads"]) in journal_records(tmp_path / "new")
    assert store.metadata["byte_identity_voided"]


def test_places_that_are_no_paths_lead_nowhere(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    store = _part(small_prompts, tmp_path / "part", old)
    for places in (["\0"], [7], "x", [str(tmp_path / "nowhere")], []):
        (store / "runs.jsonl").write_text(json.dumps({"event": "started", "model": "fake", "reuse": places}) + "\n")
        with pytest.raises(IdentityMismatchError):
            build_small(None, store)


def test_a_finished_store_stands_alone(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(old, tmp_path / "moved", symlinks=True))
    build_small(small_prompts, tmp_path / "new", config=reusing(moved))
    shutil.rmtree(moved)
    before = snapshot(tmp_path / "new")
    report = build_small(small_prompts, tmp_path / "new", config=reusing(moved))  # the same line again
    assert (report.reused_rows, report.embedded_rows) == (0, 0)
    assert snapshot(tmp_path / "new") == before
    assert verify(tmp_path / "new").findings == []


def test_a_damaged_window_is_copied_again_or_computed(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "new", config=reusing(old))
    before = snapshot(tmp_path / "new")
    (tmp_path / "new" / "embeddings.zarr" / "c.1.0").write_bytes(b"rot")
    assert [finding.window for finding in verify(tmp_path / "new", repair=True).findings] == [0]
    build_small(None, tmp_path / "new")
    assert snapshot(tmp_path / "new") == before
    assert verify(tmp_path / "new").findings == []


def test_a_store_that_reuses_nothing_is_not_resumed_as_one_that_does(unfinished: Path, old: Path) -> None:
    with pytest.raises(IdentityMismatchError, match="stores to reuse: the store has none, given"):
        build_small(None, unfinished, config=reusing(old))


def test_new_weights_come_from_a_store_with_copied_rows(small_prompts: Path, old: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "new", config=reusing(old))
    metadata = recompute_weights(tmp_path / "new", WeightingConfig(gamma=2))
    assert metadata["reuse"]["rows"] == 52
