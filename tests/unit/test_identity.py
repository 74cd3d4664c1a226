"""A resume is about the same store or it is refused: one field changed at a time, both values named, nothing written."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from embstore.artifact import recompute_weights
from embstore.core.config import BuildConfig, WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError, ExitCode, IdentityMismatchError, RowError
from embstore.core.events import Notice
from embstore.core.records import DriftRecord
from embstore.info import inspect, verify
from embstore.pipeline import build
from embstore.storage.store import open_store
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource, renamed
from tests.support.stores import (
    NUM_ROWS,
    WINDOWS,
    build_part,
    build_small,
    journal_records,
    small_lines,
    snapshot,
    whole_tree,
    with_density,
    with_embedding,
    with_weighting,
    write_lines,
    write_small_prompts,
)

pytestmark = pytest.mark.usefixtures("without_syncs")

FIELDS = [
    ({"max_tokens": 256}, "max_tokens", "512", "256"),
    ({"dtype": "bfloat16"}, "dtype", "float32", "bfloat16"),
    ({"vocab": "tokenizer"}, "vocab", "model", "tokenizer"),
    ({"batch_tokens": 8192}, "batch_tokens", "4096", "8192"),
    ({"compressor": "none"}, "compressor", "lz4", "none"),
    ({"window_rows": 48}, "window_rows", "32", "48"),
    ({"chunk_rows": 32}, "chunk_rows", "16", "32"),
    ({"trust_remote_code": True}, "trust_remote_code", "False", "True"),
]
MODEL_FIELDS = ["weights_sha256", "tokenizer_sha256", "config_sha256", "architecture", "revision"]


def _refusal(
    store: Path, *, prompts: Path | None = None, config: BuildConfig = CONFIG, source: FakeSource | None = None
) -> IdentityMismatchError:
    """The refusal of a resume; the store, journal included, is the same bytes as before."""
    before = whole_tree(store)
    with pytest.raises(IdentityMismatchError) as caught:
        build_small(prompts, store, config=config, source=source)
    assert whole_tree(store) == before
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert caught.value.hint
    return caught.value


def _named(error: IdentityMismatchError, field: str, stored: str, given: str) -> None:
    assert [str(item) for item in error.mismatches] == [f"{field}: the store has {stored}, given {given}"]
    assert str(error.mismatches[0]) in str(error)


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize(("options", "field", "stored", "given"), FIELDS, ids=[entry[1] for entry in FIELDS])
def test_another_option_is_refused(
    options: dict[str, object], field: str, stored: str, given: str, state: str, request: pytest.FixtureRequest
) -> None:
    store: Path = request.getfixturevalue(state)
    _named(_refusal(store, config=with_embedding(**options)), field, stored, given)


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize("field", MODEL_FIELDS)
def test_another_model_is_refused(field: str, state: str, request: pytest.FixtureRequest) -> None:
    store: Path = request.getfixturevalue(state)
    stored = str(getattr(FakeSource().model, field))
    error = _refusal(store, source=renamed(FakeSource(), **{field: "other"}))
    _named(error, f"model.{field}", stored, "other")


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize(("field", "stored", "given"), [("threads", "1", "2"), ("device", "cpu", "cuda")])
def test_other_hardware_is_refused_and_drift_is_named_as_the_way(
    field: str, stored: str, given: str, state: str, request: pytest.FixtureRequest
) -> None:
    store: Path = request.getfixturevalue(state)
    error = _refusal(store, config=with_embedding(**{field: int(given) if given.isdigit() else given}))
    _named(error, field, stored, given)
    assert "--allow-drift" in str(error.hint)


def test_every_field_that_differs_is_named_at_once(unfinished: Path) -> None:
    source = renamed(FakeSource(), weights_sha256="other")
    error = _refusal(unfinished, config=with_embedding(dtype="float16", max_tokens=7), source=source)
    assert {item.field for item in error.mismatches} == {"dtype", "max_tokens", "model.weights_sha256"}


def _changed_prompts(path: Path, change: str) -> Path:
    lines = small_lines()
    if change == "text":
        lines[7]["prompt"] = "Explain another number."
    elif change == "order":
        lines[7], lines[8] = lines[8], lines[7]
    elif change == "fewer":
        lines.pop()
    elif change == "more":
        lines.append({"prompt": "one more"})
    elif change == "id":
        lines[7]["id"] = "renamed"
    return write_lines(path, lines)


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize("change", ["text", "order", "id"])
def test_other_prompts_are_refused_with_the_first_row_that_differs(
    change: str, state: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Path = request.getfixturevalue(state)
    error = _refusal(store, prompts=_changed_prompts(tmp_path / "other.jsonl", change))
    assert [item.field for item in error.mismatches] == ["prompts", "row 7"]
    row = error.mismatches[1]
    assert "Explain number 7." in str(row.stored)
    assert str(row.given) != str(row.stored)


@pytest.mark.parametrize(("change", "rows"), [("fewer", 69), ("more", 71)])
def test_fewer_or_more_prompts_are_refused_with_both_counts(
    change: str, rows: int, unfinished: Path, tmp_path: Path
) -> None:
    error = _refusal(unfinished, prompts=_changed_prompts(tmp_path / "other.jsonl", change))
    assert [item.field for item in error.mismatches] == ["prompts", "rows"]
    assert (error.mismatches[1].stored, error.mismatches[1].given) == (NUM_ROWS, rows)


def test_another_limit_is_another_input(unfinished: Path, small_prompts: Path) -> None:
    error = _refusal(unfinished, prompts=small_prompts, config=dataclasses.replace(CONFIG, limit=50))
    assert (error.mismatches[1].stored, error.mismatches[1].given) == (NUM_ROWS, 50)


def test_repeats_bad_lines_and_other_fields_are_no_other_input(
    unfinished: Path, tmp_path: Path, finished_store: Path
) -> None:
    """Only surviving rows count: the file may be cleaned up between runs."""
    prompts = write_lines(tmp_path / "clean.jsonl", [{**line, "src": "x"} for line in small_lines()])
    build_small(prompts, unfinished)
    assert snapshot(unfinished) == snapshot(finished_store)


def test_the_same_options_said_again_are_no_other_input(unfinished: Path, small_prompts: Path, finished_store: Path) -> None:
    said = with_embedding(
        max_tokens=512, dtype="float32", vocab="model", batch_tokens=4096, compressor="lz4", threads=1, device="cpu"
    )
    build_small(small_prompts, unfinished, config=said)
    assert snapshot(unfinished) == snapshot(finished_store)


def test_options_left_open_are_those_of_the_store(tmp_path: Path, small_prompts: Path) -> None:
    pinned = with_embedding(max_tokens=99, compressor="none", chunk_rows=32, threads=3)
    build_small(small_prompts, tmp_path / "whole", config=pinned)
    build_part(small_prompts, tmp_path / "store", rows=0, config=pinned)
    open_options = dataclasses.replace(
        CONFIG, embedding=dataclasses.replace(CONFIG.embedding, chunk_rows=None, window_rows=None)
    )
    source = FakeSource()
    build_small(None, tmp_path / "store", config=open_options, source=source)
    assert (source.creations, source.reopenings) == (0, 1), "a resume never probes again"
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "whole")


def test_a_renamed_or_moved_model_folder_is_the_same_model(
    unfinished: Path, small_prompts: Path, finished_store: Path
) -> None:
    build_small(small_prompts, unfinished, source=renamed(FakeSource(), name="another folder"))
    assert snapshot(unfinished) == snapshot(finished_store)


def test_a_resume_needs_no_prompts_file_and_the_store_may_have_moved(
    unfinished: Path, tmp_path: Path, finished_store: Path
) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    unfinished.rename(moved)
    source = FakeSource()
    build_small(None, moved, source=source)
    assert source.calls == WINDOWS[1:]
    assert snapshot(moved) == snapshot(finished_store)


def test_a_new_store_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompts yet"):
        build_small(None, tmp_path / "store")


def test_a_resume_of_a_finished_store_changes_no_file(store: Path, small_prompts: Path) -> None:
    before = whole_tree(store)
    source = FakeSource()
    report = build_small(small_prompts, store, source=source)
    assert whole_tree(store) == before
    assert (source.calls, source.reopenings, report.embedded_rows) == ([], 0, 0)


def test_drift_is_recorded_and_shown(unfinished: Path, small_prompts: Path) -> None:
    notices: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Notice):
            notices.append(event.message)

    config = dataclasses.replace(with_embedding(threads=2), allow_drift=True)
    report = build_small(small_prompts, unfinished, config=config, observer=listen)
    assert DriftRecord(fields=["threads"]) in journal_records(unfinished)
    assert any("drift allowed in threads" in message for message in notices)
    assert report.metadata["byte_identity_voided"] is True
    assert open_store(unfinished).metadata["byte_identity_voided"] is True
    assert open_store(unfinished).spec.embedding.threads == 1, "the spec stays what the first rows were made with"
    assert verify(unfinished).findings == []


def test_a_build_without_drift_says_so(finished_store: Path) -> None:
    assert open_store(finished_store).metadata["byte_identity_voided"] is False


def test_drift_excuses_hardware_only(unfinished: Path) -> None:
    config = dataclasses.replace(with_embedding(threads=2, dtype="float16"), allow_drift=True)
    error = _refusal(unfinished, config=config)
    assert [item.field for item in error.mismatches] == ["dtype"]


@pytest.mark.parametrize(
    "config",
    [with_density(seed=7), with_density(knn="hnsw"), with_weighting(k=3), with_weighting(gamma=2.0)],
    ids=["seed", "search", "k", "gamma"],
)
def test_other_density_settings_redo_density_and_never_rows(
    config: BuildConfig, store: Path, small_prompts: Path, tmp_path: Path
) -> None:
    before = snapshot(store)
    source = FakeSource()
    build_small(small_prompts, store, config=config, source=source)
    assert source.calls == []
    after = snapshot(store)
    density = re.compile(r"neighbors/|weights/|manifest\.json|density_weights\.npy|embeddings_metadata\.json")
    assert all(density.match(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert before != after
    build_small(small_prompts, tmp_path / "fresh", config=config)
    assert after == snapshot(tmp_path / "fresh"), "the same files as if it had been built so, and no other"


def test_named_weights_survive_a_change_of_the_default(store: Path, small_prompts: Path) -> None:
    recompute_weights(store, WeightingConfig(weighting="uniform"), name="flat")
    build_small(small_prompts, store, config=with_weighting(gamma=2.0))
    assert set(inspect(store).names) == {"default", "flat"}
    assert verify(store).findings == []


def test_runtime_settings_change_no_byte(tmp_path: Path, small_prompts: Path, finished_store: Path) -> None:
    config = dataclasses.replace(CONFIG, memory_budget_bytes=1 << 30, on_error="quarantine", trust_journal=True)
    build_small(small_prompts, tmp_path / "store", config=config)
    assert snapshot(tmp_path / "store") == snapshot(finished_store)


def test_a_row_that_fails_stops_the_build_and_a_resume_may_quarantine_it(tmp_path: Path) -> None:
    lines = [{"prompt": f"prompt {row}" if row != 40 else "FAIL"} for row in range(NUM_ROWS)]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    with pytest.raises(RowError, match=r"\(row 40\) failed: the text says so") as caught:
        build_small(prompts, tmp_path / "store")
    assert "--on-error quarantine" in str(caught.value.hint)
    assert not (tmp_path / "store" / "embeddings.zarr" / "c.2.0").exists(), "nothing of its chunk is written"
    source = FakeSource()
    quarantine = dataclasses.replace(CONFIG, on_error="quarantine")
    build_small(prompts, tmp_path / "store", config=quarantine, source=source)
    assert source.calls == WINDOWS[1:]
    build_small(prompts, tmp_path / "whole", config=quarantine)
    assert snapshot(tmp_path / "store") == snapshot(tmp_path / "whole")


def test_no_listed_file_holds_a_time_host_path_or_pid(
    tmp_path: Path, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built at another time and path, on another host, by another process, from another file: the same bytes."""
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    monkeypatch.setattr("platform.platform", lambda: "Another-OS")
    monkeypatch.setattr("os.getpid", lambda: 424242)
    monkeypatch.setattr("time.time", lambda: 4e9)
    prompts = write_small_prompts(tmp_path / "other name.jsonl")
    store = tmp_path / "deep" / "er" / "store"
    build(prompts, out=store, config=CONFIG, source=FakeSource())
    assert snapshot(store) == snapshot(finished_store)
    assert b"424242" in (store / ".lock").read_bytes(), "the lock is where such things go"
    assert b"another-host" in (store / "runs.jsonl").read_bytes()


@pytest.mark.parametrize(
    "name", ["prompts.jsonl", "ids.json", "line_rows.npy", "basis.npy", "embeddings.zarr/zarr.json", "spec.json"]
)
def test_a_resume_never_builds_on_a_damaged_foundation(name: str, unfinished: Path, small_prompts: Path) -> None:
    content = bytearray((unfinished / name).read_bytes())
    content[len(content) // 2] ^= 1
    (unfinished / name).write_bytes(content)
    before = whole_tree(unfinished)
    source = FakeSource()
    with pytest.raises(CorruptStoreError, match=re.escape(name)):
        build_small(small_prompts, unfinished, source=source)
    assert source.calls == []
    assert whole_tree(unfinished) == before


def test_chunks_of_other_settings_are_computed_again_and_never_adopted(
    partial_store: Path, small_prompts: Path, tmp_path: Path, finished_store: Path
) -> None:
    """A chunk file that no journal line vouches for may come from anywhere."""
    store = build_part(small_prompts, tmp_path / "store", rows=32)
    for index in (2, 3, 4):
        shutil.copyfile(store / "embeddings.zarr" / "c.0.0", store / "embeddings.zarr" / f"c.{index}.0")
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)
