"""A resume is about the same store or it is refused: one field changed at a time, both values named, nothing written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import re
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from embstore.core.config import BuildConfig, EmbeddingConfig, Turns, WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError, ExitCode, IdentityMismatchError
from embstore.core.events import Notice, Preflight
from embstore.core.format import document
from embstore.core.plan import model_mismatches
from embstore.core.records import DriftRecord, PromptsRecord, encode_journal_header
from embstore.core.spec import StoreSpec
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import build
from embstore.flow.stored_weights import drop_weights
from embstore.storage.reader import open_store
from embstore.storage.writer import StoreWriter
from embstore.views.info import inspect, verify
from embstore.views.progress import preflight_line
from embstore.views.terminal import print_info
from tests.support.build_fake import CONFIG
from tests.support.fake import VERSIONS, FakeSource, renamed
from tests.support.records import MODEL
from tests.support.rot import tree_state
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
    ({"space": "hidden"}, "space", "logits", "hidden"),
    ({"pooling": "last"}, "pooling", "mean", "last"),
    ({"chat_date": "2031-03-05"}, "chat_date", "2024-07-26", "2031-03-05"),
    ({"batch_tokens": 8192}, "batch_tokens", "4096", "8192"),
    ({"compressor": "none"}, "compressor", "lz4", "none"),
    ({"window_rows": 48}, "window_rows", "32", "48"),
    ({"chunk_rows": 32}, "chunk_rows", "16", "32"),
    ({"trust_remote_code": True}, "trust_remote_code", "False", "True"),
]
MODEL_FIELDS = ["weights_sha256", "tokenizer_sha256", "config_sha256", "architecture"]
# how a run can be given another value of a field of spec.json: a field that is missing here has no test
GIVEN_BY: dict[str, set[str]] = {
    "an option": {f"embedding.{name}" for name in ("max_tokens", "dtype", "columns", "space", "pooling", "batch_tokens")}
    | {"embedding.chat_date", "compressor", "window_rows", "chunk_rows", "model.trust_remote_code"},
    "the hardware": {f"embedding.{name}" for name in ("threads", "device", "capability", "packed_layers", "packed_head")},
    "the libraries": {"embedding.versions"},
    "the model": {f"model.{field}" for field in MODEL_FIELDS} | {"embedding.token_limit"},
    "the prompts": {"rows", "prompts_fingerprint"},
    "trusted code in the model's folder": {"model.code_sha256"},
    "another release": {"format_version"},
    "nobody, the digests decide": {"model.name", "model.revision"},
    # these follow from the others, and from code
    "a changed spec.json only": {f"embedding.{name}" for name in ("dimension", "rank", "head.kind", "head.scale")}
    | {f"embedding.{name}" for name in ("normalization", "token_rule", "basis")}
    | {"basis_sha256", "sequences"},
}


def _leaf_fields(record_type: type, prefix: str = "") -> Iterator[str]:
    """Every field of a record, nested records included, by dotted name."""
    hints = typing.get_type_hints(record_type)
    for entry in dataclasses.fields(record_type):
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from _leaf_fields(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}"


SPEC_FIELDS = list(_leaf_fields(StoreSpec))


def _refusal(
    store: Path, *, prompts: Path | None = None, config: BuildConfig = CONFIG, source: FakeSource | None = None
) -> IdentityMismatchError:
    """The refusal of a resume; no file, journal included, was so much as written again."""
    with _nothing_written(store), pytest.raises(IdentityMismatchError) as caught:
        build_small(prompts, store, config=config, source=source)
    assert caught.value.exit_code == ExitCode.IDENTITY == 4
    assert caught.value.hint
    return caught.value


@contextlib.contextmanager
def _nothing_written(store: Path) -> Iterator[None]:
    """Every file and folder keeps its inode, its times and its bytes; the lock alone says who looked."""
    with StoreWriter(store, resume=True):
        pass  # scratch of a dead writer is swept by whoever opens its store
    before = tree_state(store, apart_from=(".lock",), is_opened=True)
    yield
    assert tree_state(store, apart_from=(".lock",), is_opened=True) == before


def _named(error: IdentityMismatchError, field: str, stored: str, given: str) -> None:
    assert [str(item) for item in error.mismatches] == [f"{field}: the store has {stored}, given {given}"]
    assert str(error.mismatches[0]) in str(error)


def test_every_field_of_the_spec_has_a_test_of_another_value() -> None:
    named = [field for fields in GIVEN_BY.values() for field in fields]
    assert sorted(named) == sorted(SPEC_FIELDS)
    stored_as = {"vocab": "columns"}
    options = {stored_as.get(field, field) for _, field, _, _ in FIELDS}
    assert {field.rpartition(".")[2] for field in GIVEN_BY["an option"]} == options
    # what a user may set is a field of the spec, or names the model
    asked = {stored_as.get(entry.name, entry.name) for entry in dataclasses.fields(EmbeddingConfig)}
    assert asked - {"model", "trust_tokenizer_pickle"} <= {field.rpartition(".")[2] for field in SPEC_FIELDS}


def test_code_is_compared_where_the_store_has_its_digest() -> None:
    """Stores from before the field do not have it."""
    given = dataclasses.replace(MODEL, code_sha256="a" * 64)
    assert model_mismatches(MODEL, given) == []
    changed = dataclasses.replace(MODEL, code_sha256="b" * 64)
    assert [str(each) for each in model_mismatches(given, changed)] == [
        f"model.code_sha256: the store has {'a' * 64}, given {'b' * 64}"
    ]
    assert [each.field for each in model_mismatches(given, MODEL)] == ["model.code_sha256"]


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize("field", SPEC_FIELDS)
def test_a_spec_with_any_field_changed_is_refused_as_damaged(
    field: str, state: str, small_prompts: Path, request: pytest.FixtureRequest
) -> None:
    """The journal holds its digest: nobody changes the identity of a store by hand."""
    store: Path = request.getfixturevalue(state)
    spec = json.loads((store / "spec.json").read_bytes())
    *above, name = field.split(".")
    record = functools.reduce(dict.__getitem__, above, spec)
    record[name] = _another(record[name])
    (store / "spec.json").write_bytes(document(spec))
    source = FakeSource()
    with _nothing_written(store), pytest.raises(CorruptStoreError, match=r"spec\.json") as caught:
        build_small(small_prompts, store, source=source)
    assert caught.value.exit_code == ExitCode.CORRUPT
    assert source.calls == []
    assert "spec.json" in {finding.path for finding in verify(store).findings}


def _another(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return "other" if value is None else not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


@pytest.mark.parametrize("name", ["journal.jsonl", "manifest.json"])
def test_another_format_version_is_refused_by_name(name: str, store: Path, small_prompts: Path) -> None:
    content = (store / name).read_bytes()
    if name == "journal.jsonl":
        body = encode_journal_header().partition(b"\t")[0].replace(b'"format_version":1', b'"format_version":2')
        content = body + b"\t%08x\n" % zlib.crc32(body) + content.partition(b"\n")[2]
    else:
        content = content.replace(b'"format_version": 1', b'"format_version": 2')
    (store / name).write_bytes(content)
    before = tree_state(store, apart_from=(".lock",), is_opened=True)
    with pytest.raises(IdentityMismatchError) as caught:
        build_small(small_prompts, store)
    _named(caught.value, f"format_version in {name}", "2", "1")
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert tree_state(store, apart_from=(".lock",), is_opened=True) == before


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize(("options", "field", "stored", "given"), FIELDS, ids=[entry[1] for entry in FIELDS])
def test_another_option_is_refused(
    options: dict[str, object], field: str, stored: str, given: str, state: str, request: pytest.FixtureRequest
) -> None:
    store: Path = request.getfixturevalue(state)
    # as a source is that was located with the option
    source = renamed(FakeSource(), trust_remote_code=bool(options.get("trust_remote_code")))
    _named(_refusal(store, config=with_embedding(**options), source=source), field, stored, given)


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


@pytest.mark.parametrize("library", ["embstore", "torch", "transformers", "tokenizers"])
def test_another_version_is_refused_and_both_ways_on_are_named(library: str, unfinished: Path) -> None:
    source = FakeSource()
    source.versions = dataclasses.replace(VERSIONS, **{library: "9"})
    error = _refusal(unfinished, source=source)
    stored = getattr(VERSIONS, library)
    _named(error, f"versions.{library}", stored, "9")
    assert (
        error.hint == f"install {library} {stored} and resume, or add --allow-drift (recorded; rows then differ in low bits)"
    )


def test_other_versions_and_threads_are_named_together(unfinished: Path) -> None:
    source = FakeSource()
    source.versions = dataclasses.replace(VERSIONS, torch="9", tokenizers="9")
    error = _refusal(unfinished, source=source, config=with_embedding(threads=2))
    assert [each.field for each in error.mismatches] == ["threads", "versions.torch", "versions.tokenizers"]
    assert "install torch 2+fake, tokenizers 4 and resume on the same hardware and threads" in str(error.hint)


def test_drift_in_versions_is_allowed_by_name_and_recorded(unfinished: Path, small_prompts: Path) -> None:
    source = FakeSource()
    source.versions = dataclasses.replace(VERSIONS, torch="9")
    spec = (unfinished / "spec.json").read_bytes()
    build_small(small_prompts, unfinished, source=source, config=dataclasses.replace(CONFIG, allow_drift=True))
    drifts = [record for record in journal_records(unfinished) if isinstance(record, DriftRecord)]
    assert [record.fields for record in drifts] == [["versions.torch"]]
    assert (unfinished / "spec.json").read_bytes() == spec, "the versions that made the first rows"
    assert inspect(unfinished).metadata is not None


def test_a_finished_store_needs_no_row_and_compares_no_version(store: Path, small_prompts: Path) -> None:
    source = FakeSource()
    source.versions = dataclasses.replace(VERSIONS, torch="9")
    for config in (CONFIG, with_embedding(threads=1, device="cpu")):
        build_small(small_prompts, store, source=source, config=config)
    assert source.calls == []


def _began_before_versions(tmp_path: Path, prompts: Path) -> Path:
    """An unfinished store as embstore left it before it recorded versions and the model's limit."""
    source = FakeSource()
    source.versions = source.token_limit = None
    return build_part(prompts, tmp_path / "old", rows=32, source=source)


def test_a_store_without_versions_is_continued_by_any(tmp_path: Path, small_prompts: Path) -> None:
    store = _began_before_versions(tmp_path, small_prompts)
    source = FakeSource()
    build_small(small_prompts, store, source=source)
    assert source.calls == WINDOWS[1:]
    assert open_store(store).spec.embedding.versions is None
    assert "versions not recorded" in _shown(store)


def test_inspect_shows_versions(store: Path) -> None:
    assert "made with embstore 1, torch 2+fake, transformers 3, tokenizers 4" in _shown(store)


def _shown(store: Path) -> str:
    shown = io.StringIO()
    print_info(Console(file=shown, width=200), inspect(store))
    return shown.getvalue()


def test_another_processor_is_refused_and_drift_is_named_as_the_way(unfinished: Path) -> None:
    source = FakeSource()
    source.hardware = lambda config: {**FakeSource.hardware(source, config), "capability": "OTHER"}  # type: ignore[method-assign]
    error = _refusal(unfinished, source=source)
    _named(error, "capability", "FAKE", "OTHER")
    assert "--allow-drift" in str(error.hint)


def test_every_field_that_differs_is_named_at_once(unfinished: Path) -> None:
    source = renamed(FakeSource(), weights_sha256="other")
    error = _refusal(unfinished, config=with_embedding(dtype="bfloat16", max_tokens=7), source=source)
    assert {item.field for item in error.mismatches} == {"dtype", "max_tokens", "model.weights_sha256"}


def test_tokens_above_the_models_limit_continue_with_the_same_line_and_no_other(tmp_path: Path, small_prompts: Path) -> None:
    """What is compared is what was asked for, cut as a new store cuts it."""
    asked = with_embedding(max_tokens=100_000)
    store = build_part(small_prompts, tmp_path / "store", rows=32, config=asked)
    assert open_store(store, partial=True).spec.embedding.max_tokens == 2048
    for same in (2048, 2049):
        refused = with_embedding(max_tokens=same, dtype="bfloat16")
        assert [each.field for each in _refusal(store, config=refused).mismatches] == ["dtype"]
    _named(_refusal(store, config=with_embedding(max_tokens=2047)), "max_tokens", "2048", "2047")
    source = FakeSource()
    build_small(small_prompts, store, config=asked, source=source)
    assert source.calls == WINDOWS[1:]


def test_tokens_below_the_limit_are_no_tokens_above_it(unfinished: Path) -> None:
    _named(_refusal(unfinished, config=with_embedding(max_tokens=100_000)), "max_tokens", "512", "100000")


def test_another_name_of_the_revision_is_the_same_model(unfinished: Path, small_prompts: Path, finished_store: Path) -> None:
    build_small(small_prompts, unfinished, source=renamed(FakeSource(), revision="main"))
    assert snapshot(unfinished) == snapshot(finished_store)


def test_rows_made_by_the_models_own_code_are_not_continued_without_it(tmp_path: Path, small_prompts: Path) -> None:
    own = renamed(FakeSource(), trust_remote_code=True)
    store = build_part(small_prompts, tmp_path / "store", rows=32, source=own)
    _named(_refusal(store), "trust_remote_code", "True", "False")


def test_a_format_that_has_no_code_of_its_own_ignores_the_trust_in_it(
    unfinished: Path, small_prompts: Path, finished_store: Path
) -> None:
    build_small(small_prompts, unfinished, config=with_embedding(trust_remote_code=True))
    assert snapshot(unfinished) == snapshot(finished_store)


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
    assert error.mismatches[0].stored == open_store(store, partial=True).spec.prompts_fingerprint[:16]
    assert error.mismatches[0].given not in (None, error.mismatches[0].stored)
    row = error.mismatches[1]
    assert "Explain number 7." in str(row.stored)
    assert str(row.given) != str(row.stored)


@pytest.mark.parametrize("state", ["unfinished", "store"])
@pytest.mark.parametrize(("change", "rows"), [("fewer", 69), ("more", 71)])
def test_fewer_or_more_prompts_are_refused_with_both_counts(
    change: str, rows: int, state: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Path = request.getfixturevalue(state)
    error = _refusal(store, prompts=_changed_prompts(tmp_path / "other.jsonl", change))
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
    with pytest.raises(ConfigError, match="no prompts file was given"):
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
    config = dataclasses.replace(with_embedding(threads=2, dtype="bfloat16"), allow_drift=True)
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
    drop_weights(store, [name for name in inspect(store).names if name != "default"])
    build_small(small_prompts, tmp_path / "fresh", config=config)
    assert snapshot(store) == snapshot(tmp_path / "fresh"), "the same files as if it had been built so, and the old weights"


def test_named_weights_survive_a_change_of_the_default(store: Path, small_prompts: Path) -> None:
    recompute_weights(store, WeightingConfig(weighting="uniform"), name="flat")
    replaced = inspect(store).names["default"]
    build_small(small_prompts, store, config=with_weighting(gamma=2.0))
    assert set(inspect(store).names) == {"default", "flat", f"default@{replaced}"}
    assert verify(store).findings == []


def test_runtime_settings_change_no_byte(tmp_path: Path, small_prompts: Path, finished_store: Path) -> None:
    config = dataclasses.replace(CONFIG, memory_budget_bytes=1 << 30, on_error="quarantine", trust_journal=True)
    build_small(small_prompts, tmp_path / "store", config=config)
    assert snapshot(tmp_path / "store") == snapshot(finished_store)


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


# --- the date in chats ---------------------------------------------------------------------------------------------------


def _began_without_a_date(tmp_path: Path, prompts: Path, *, rows: int) -> Path:
    """An unfinished store as embstore left it before it recorded the date that chat templates print."""
    source = FakeSource()
    source.records_date = False
    return build_part(prompts, tmp_path / "old", rows=rows, source=source)


def _with_clock() -> FakeSource:
    source = FakeSource()
    source.prints_date = True
    return source


def test_a_store_without_a_date_is_continued_by_a_template_that_prints_none(tmp_path: Path, small_prompts: Path) -> None:
    store = _began_without_a_date(tmp_path, small_prompts, rows=32)
    source = FakeSource()
    build_small(small_prompts, store, source=source)
    assert source.calls == WINDOWS[1:]
    assert open_store(store).spec.embedding.chat_date is None
    assert "date not recorded" in _shown(store)


def test_a_store_without_a_date_and_without_rows_is_begun_again_with_one(tmp_path: Path, small_prompts: Path) -> None:
    for given in (None, small_prompts):
        store = _began_without_a_date(tmp_path / str(given is None), small_prompts, rows=0)
        build_small(given, store, source=_with_clock())
        assert open_store(store).spec.embedding.chat_date == "2024-07-26"


@pytest.mark.parametrize("rows", [32, 64])
def test_a_store_without_a_date_is_not_continued_by_a_template_that_prints_one(
    rows: int, tmp_path: Path, small_prompts: Path
) -> None:
    store = _began_without_a_date(tmp_path, small_prompts, rows=rows)
    for prompts in (None, small_prompts):
        error = _refusal(store, prompts=prompts, source=_with_clock())
        _named(error, "chat_date", "none recorded", "a chat template that prints the current date")
        assert "--out" in str(error.hint)
    # a date that is given now is not the one of the first rows
    _named(_refusal(store, config=with_embedding(chat_date="2024-07-26")), "chat_date", "none recorded", "2024-07-26")


def test_texts_need_no_date(tmp_path: Path) -> None:
    """What is left are texts: no template is applied to them."""
    prompts = write_lines(tmp_path / "p.jsonl", [*small_lines()[60:64], *small_lines()[:60]])
    store = _began_without_a_date(tmp_path, prompts, rows=32)
    source = _with_clock()
    build_small(prompts, store, source=source)
    assert source.calls == [(32, 64)]


def test_a_finished_store_without_a_date_stays_readable_and_damage_is_not_mended_with_another_date(
    tmp_path: Path, small_prompts: Path
) -> None:
    source = FakeSource()
    source.records_date = False
    store = tmp_path / "old"
    build_small(small_prompts, store, source=source)
    assert verify(store).findings == []
    build_small(small_prompts, store, source=_with_clock())  # nothing to compute
    assert inspect(store).is_complete
    chunk = store / "embeddings.zarr" / "c.4.0"  # of the window with the last chat
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    verify(store, repair=True)
    with pytest.raises(IdentityMismatchError, match="chat_date"):
        build_small(None, store, source=_with_clock())


def test_inspect_shows_the_date(store: Path) -> None:
    assert "chats dated 2024-07-26" in _shown(store)


# --- which part of a chat --------------------------------------------------------------------------------------------------


def _chats(path: Path) -> Path:
    lines = small_lines()
    for line in lines:
        if "messages" in line:
            line["messages"] = [*line["messages"], {"role": "assistant", "content": "Because."}]
    return write_lines(path, lines)


@pytest.mark.parametrize(("first", "then"), [("all", "prompt"), ("prompt", "all")])
def test_other_turns_are_refused(first: Turns, then: Turns, tmp_path: Path) -> None:
    prompts = _chats(tmp_path / "chats.jsonl")
    config = dataclasses.replace(CONFIG, turns=first)
    for store in (
        build_part(prompts, tmp_path / "part", rows=32, config=config),
        build_small(prompts, tmp_path / "whole", config=config).store,
    ):
        for given in (None, prompts):
            error = _refusal(store, prompts=given, config=dataclasses.replace(CONFIG, turns=then))
            _named(error, "turns", first, then)
    # left open, they are those of the store
    build_small(prompts, tmp_path / "part")
    assert snapshot(tmp_path / "part") == snapshot(tmp_path / "whole")
    manifest = json.loads((tmp_path / "part" / "manifest.json").read_bytes())
    assert manifest["rule"] == {"version": 2, "turns": first}


def test_turns_of_prompts_only_are_the_store_of_the_prompts(tmp_path: Path) -> None:
    whole = build_small(
        _chats(tmp_path / "chats.jsonl"), tmp_path / "cut", config=dataclasses.replace(CONFIG, turns="prompt")
    )
    build_small(write_lines(tmp_path / "bare.jsonl", small_lines()), tmp_path / "bare")
    cut, bare = (journal_records(tmp_path / name)[0] for name in ("cut", "bare"))
    assert isinstance(cut, PromptsRecord)
    assert isinstance(bare, PromptsRecord)
    assert (cut.fingerprint, cut.files) == (bare.fingerprint, bare.files)
    assert (cut.answered, bare.answered) == (5, 0)
    assert whole.num_rows == NUM_ROWS


@pytest.mark.parametrize(("turns", "said"), [(None, "--turns prompt leaves it out"), ("prompt", "which is left out")])
def test_the_preflight_counts_chats_that_end_in_an_answer(turns: Turns | None, said: str, tmp_path: Path) -> None:
    events: list[Preflight] = []
    config = dataclasses.replace(CONFIG, turns=turns)
    build_small(
        _chats(tmp_path / "chats.jsonl"),
        tmp_path / "store",
        config=config,
        observer=lambda event: events.append(event) if isinstance(event, Preflight) else None,
    )
    (planned,) = events
    assert planned.answered_lines == 5
    assert "5 chats end in an assistant turn, " in preflight_line(planned)
    assert said in preflight_line(planned)
    assert "assistant turn" not in preflight_line(dataclasses.replace(planned, answered_lines=0))
