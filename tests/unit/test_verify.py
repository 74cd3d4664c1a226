"""Damage of any kind to any file is found and named; repair and a resume restore the bytes where they can be made again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.core.config import WeightingConfig
from embstore.core.errors import CorruptStoreError, ExitCode, IdentityMismatchError, StoreLockedError
from embstore.core.events import Event, StageAdvanced, StageFinished, StageStarted
from embstore.core.format import STAGE0_FILES, FileDigest, chunk_name, decode_manifest
from embstore.core.records import (
    DemotedRecord,
    SpecRecord,
    WindowRecord,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
)
from embstore.flow.artifact import recompute_weights
from embstore.storage.chunks import encode_chunk
from embstore.storage.reader import open_store
from embstore.storage.row_files import ROW_FILES
from embstore.storage.writer import StoreWriter
from embstore.views.info import inspect, verify
from tests.support.build_fake import CONFIG
from tests.support.fake import DIMENSION, FakeSource
from tests.support.rot import tree_state
from tests.support.stores import NUM_CHUNKS, NUM_ROWS, WINDOWS, build_small, snapshot, whole_tree, with_density

pytestmark = pytest.mark.usefixtures("without_syncs")

ONLY_A_NEW_BUILD = {*STAGE0_FILES, "spec.json", "basis.npy"}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content or b"x")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _delete(path: Path) -> None:
    path.unlink()


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:1] = bytes([content[0] ^ 0x40]) if content else b"x"
    path.write_bytes(content)


def test_a_sound_store_has_no_findings(finished_store: Path, partial_store: Path) -> None:
    whole = verify(finished_store)
    assert (whole.findings, whole.notes, whole.is_complete) == ([], [], True)
    assert (whole.committed_rows, whole.total_rows, whole.files) == (NUM_ROWS, NUM_ROWS, 21 + NUM_CHUNKS)
    listed = json.loads((finished_store / "manifest.json").read_bytes())["files"]
    chunk_bytes = sum((finished_store / name).stat().st_size for name in map(chunk_name, range(NUM_CHUNKS)))
    assert whole.bytes == sum(digest["bytes"] for digest in listed.values()) + chunk_bytes
    part = verify(partial_store)
    assert (part.findings, part.notes, part.is_complete) == ([], [], False)
    assert (part.committed_rows, part.total_rows) == (32, NUM_ROWS)


@pytest.mark.parametrize("name", ["coordinates.npy", "residuals.npy", "sequences.npy"])
def test_a_damaged_row_is_the_damage_of_its_window(name: str, store: Path, finished_store: Path) -> None:
    content = bytearray((store / name).read_bytes())
    content[128 + (len(content) - 128) * 40 // NUM_ROWS] ^= 1  # row 40
    (store / name).write_bytes(content)
    findings = verify(store, repair=True).findings
    assert {finding.window for finding in findings} - {None} == {1}
    assert any("rows 32 to 63" in finding.message for finding in findings)
    source = FakeSource()
    build_small(None, store, source=source)
    assert source.calls == [WINDOWS[1]]
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("name", ["coordinates.npy", "residuals.npy", "sequences.npy"])
@pytest.mark.parametrize("damage", [_first_byte, _truncate, _extend, _delete], ids=lambda damage: damage.__name__[1:])
def test_a_row_file_of_an_unfinished_store_is_mended_and_its_damage_never_sealed(
    name: str, damage: Callable[[Path], None], unfinished: Path, finished_store: Path
) -> None:
    damage(unfinished / name)
    assert name in {finding.path for finding in verify(unfinished).findings}
    build_small(None, unfinished)
    assert snapshot(unfinished) == snapshot(finished_store)


def test_a_header_that_still_reads_as_one_is_never_sealed(unfinished: Path, finished_store: Path) -> None:
    """A shape of 71 rows instead of 70 is a valid header: only the spec says that it is wrong."""
    path = unfinished / "residuals.npy"
    path.write_bytes(path.read_bytes().replace(b"(70,)", b"(71,)"))
    findings = verify(unfinished).findings
    assert [(finding.path, finding.window) for finding in findings] == [("residuals.npy", None)]
    build_small(None, unfinished)
    assert snapshot(unfinished) == snapshot(finished_store)


def test_a_damaged_row_is_never_sealed_even_when_the_journal_is_trusted(unfinished: Path, small_prompts: Path) -> None:
    content = bytearray((unfinished / "coordinates.npy").read_bytes())
    content[200] ^= 1
    (unfinished / "coordinates.npy").write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"coordinates\.npy, rows 0 to 31"):
        build_small(small_prompts, unfinished, config=dataclasses.replace(CONFIG, trust_journal=True))
    assert not (unfinished / "manifest.json").exists()


def _counting_reads(monkeypatch: pytest.MonkeyPatch, root: Path, *, maps: bool = False) -> Counter[str]:
    """Bytes read of each file of a store from here on. Unless it ``maps``, nothing may be mapped: that is not counted."""
    real, read = os.pread, Counter[str]()

    def counted(handle: int, size: int, offset: int) -> bytes:
        data = real(handle, size, offset)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_relative_to(root):
            read[path.relative_to(root).as_posix()] += len(data)
        return data

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a file is mapped")

    monkeypatch.setattr(os, "pread", counted)
    if not maps:
        monkeypatch.setattr(np, "memmap", refused)
    return read


@pytest.mark.parametrize("fixture", ["store", "unfinished"])
def test_every_file_is_read_once_and_its_bytes_are_the_progress(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Path = request.getfixturevalue(fixture)
    if fixture == "store":
        recompute_weights(store, WeightingConfig(gamma=2))
        recompute_weights(store, WeightingConfig(gamma=4), name="sharp")
    events: list[Event] = []
    with monkeypatch.context() as patch:
        read = _counting_reads(patch, store)
        report = verify(store, observer=events.append)
    assert report.findings == []
    sizes = {
        path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file() and not path.is_symlink()
    }
    sizes = {name: path for name, path in sizes.items() if name not in ("runs.jsonl", ".lock")}
    assert read.keys() == sizes.keys()
    for name, path in sizes.items():
        size, times = path.stat().st_size, 2 if name == "manifest.json" else 1  # is it still the same manifest?
        if fixture == "unfinished" and name in ROW_FILES:
            assert read[name] <= size + 1024
        else:
            assert times * size <= read[name] <= times * size + 1024, f"{name}: every byte, and a look at the header"
    (started,) = [event for event in events if isinstance(event, StageStarted)]
    assert (started.stage, started.unit) == ("verify", "bytes")
    assert started.total == report.bytes == sum(event.count for event in events if isinstance(event, StageAdvanced))
    assert isinstance(events[-1], StageFinished)


def test_a_resume_reads_the_files_of_its_prompts_once(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "embed":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        read = _counting_reads(patch, unfinished, maps=True)
        with pytest.raises(KeyboardInterrupt):
            build_small(None, unfinished, observer=stop)
    times = {"prompts.jsonl": 2}  # its rows are also looked through for chats, which the template may refuse
    sizes = {name: (unfinished / name).stat().st_size for name in STAGE0_FILES}
    assert {name: read[name] for name in STAGE0_FILES} == {name: times.get(name, 1) * sizes[name] for name in STAGE0_FILES}


def test_the_line_map_is_read_without_the_prompts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_store(store)
    read = _counting_reads(monkeypatch, store, maps=True)
    assert len(opened.line_rows) == 73
    assert read["prompts.jsonl"] == 0


def test_a_folder_of_any_length_is_looked_through_in_little_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may have a million chunk files: their names are looked at one by one."""

    class Entry:
        def __init__(self, name: str) -> None:
            self.name = name

        def is_dir(self, *, follow_symlinks: bool) -> bool:
            return False

    real, count = os.scandir, 50_000

    @contextlib.contextmanager
    def many(folder: Path) -> Iterator[Iterator[Any]]:
        if Path(folder).name == "embeddings.zarr":
            yield (Entry(f"c.{number % NUM_CHUNKS}.0") for number in range(count))
        else:
            with real(folder) as found:
                yield found

    assert verify(store).notes == []  # what is loaded on first use is loaded
    monkeypatch.setattr(os, "scandir", many)
    monkeypatch.setattr("embstore.core.files._READ_BYTES", 1 << 16)
    tracemalloc.start()
    try:
        assert verify(store).notes == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * count, "a list would take 150 bytes a name"


@pytest.mark.parametrize("name", ["coordinates.npy", "residuals.npy", "sequences.npy"])
def test_nothing_new_is_published_from_damaged_rows_of_a_finished_store(name: str, store: Path) -> None:
    content = bytearray((store / name).read_bytes())
    content[200] ^= 1
    (store / name).write_bytes(content)
    manifest = (store / "manifest.json").read_bytes()
    with pytest.raises(CorruptStoreError, match=name):
        build_small(None, store, config=with_density(seed=7))
    assert (store / "manifest.json").read_bytes() == manifest


def test_a_row_file_that_was_cut_off_reads_as_nan_until_it_is_made_again(unfinished: Path) -> None:
    path = unfinished / "residuals.npy"
    path.write_bytes(path.read_bytes()[: 128 + 4 * 10 + 2])  # rows 0 to 9, and half of row 10
    with StoreWriter(unfinished, resume=True):
        opened = open_store(unfinished, partial=True)
        with pytest.raises(CorruptStoreError, match=r"residuals\.npy, rows 0 to 31"):
            _ = opened.residuals  # a window of it was committed
    residuals = np.load(path, allow_pickle=False)
    assert residuals.shape == (NUM_ROWS,)
    assert np.isfinite(residuals[:10]).all()
    assert np.isnan(residuals[10:]).all()


def test_a_repair_commits_what_it_found_before_anything_is_made_again(store: Path) -> None:
    _flip(store / chunk_name(3))
    verify(store, repair=True)
    record = decode_journal((store / "journal.jsonl").read_bytes(), name="journal.jsonl")[0][-1]
    assert isinstance(record, DemotedRecord)
    assert record.window == 1
    assert chunk_name(3) in record.reason
    assert not (store / "manifest.json").exists(), "nobody trains on a store that is being mended"
    assert not inspect(store).is_complete
    assert inspect(store).committed_rows == NUM_ROWS - 32


def test_a_resume_finds_damaged_windows_without_verify(unfinished: Path, finished_store: Path) -> None:
    _flip(unfinished / chunk_name(0))
    source = FakeSource()
    build_small(None, unfinished, source=source)
    assert source.calls == WINDOWS, "the damaged window and those that were left"
    assert snapshot(unfinished) == snapshot(finished_store)


def test_repair_of_a_sound_store_changes_nothing(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=2), name="sharp")
    before = whole_tree(store)
    assert verify(store, repair=True).findings == []
    assert whole_tree(store) == before


def test_repair_waits_for_nobody(store: Path) -> None:
    with StoreWriter(store, resume=True), pytest.raises(StoreLockedError):
        verify(store, repair=True)
    with StoreWriter(store, resume=True):
        assert verify(store).findings == [], "looking needs no lock"


def test_strays_are_noted_and_are_no_damage(store: Path, unfinished: Path) -> None:
    for root in (store, unfinished):
        (root / "thesis.tex").write_text("mine")
        (root / "embeddings.zarr" / "c.5.0").write_bytes(b"beyond the last chunk")
        (root / "embeddings.zarr" / ".c.0.0.77.tmp").write_bytes(b"of a writer that died")
        (root / "work").mkdir(exist_ok=True)
        (root / "work" / "scratch").write_bytes(b"discardable")
        report = verify(root)
        assert report.findings == []
        assert [note.split()[0] for note in report.notes] == [
            "embeddings.zarr/.c.0.0.77.tmp",
            "embeddings.zarr/c.5.0",
            "thesis.tex",
        ]


def test_a_torn_journal_is_a_note_while_unfinished_and_damage_when_finished(store: Path, unfinished: Path) -> None:
    for root in (store, unfinished):
        with (root / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"record":"window"')
    assert "a resume removes it" in verify(unfinished).notes[0]
    assert verify(unfinished).findings == []
    assert [finding.path for finding in verify(store).findings] == ["journal.jsonl"]


def test_a_finished_store_whose_journal_lost_lines_is_damaged_and_mends(store: Path, finished_store: Path) -> None:
    lines = (store / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (store / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    assert "manifest.json" in {finding.path for finding in verify(store).findings}
    verify(store, repair=True)
    source = FakeSource()
    build_small(None, store, source=source)
    assert source.calls == [WINDOWS[2]]
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("damage", [_delete, _empty, _zero], ids=lambda damage: damage.__name__[1:])
def test_a_finished_store_without_its_journal_is_damaged(damage: Callable[[Path], None], store: Path) -> None:
    damage(store / "journal.jsonl")
    assert verify(store).findings != []


def test_damage_in_the_middle_of_the_journal_stops_every_writer(store: Path) -> None:
    content = bytearray((store / "journal.jsonl").read_bytes())
    content[300] ^= 1
    (store / "journal.jsonl").write_bytes(content)
    before = whole_tree(store)
    for action in (
        lambda: verify(store),
        lambda: verify(store, repair=True),
        lambda: build_small(None, store),
        lambda: open_store(store),
    ):
        with pytest.raises(CorruptStoreError, match=r"journal\.jsonl: line"):
            action()
    assert whole_tree(store) == before


def _forged(store: Path, rows: np.ndarray) -> None:  # type: ignore[type-arg]
    """Chunk 0 holds ``rows``, with every checksum as if it had been written so."""
    pieces, record = encode_chunk(rows.astype(np.float16), chunk_rows=16, compressor="lz4")
    (store / chunk_name(0)).write_bytes(b"".join(pieces))
    records = decode_journal((store / "journal.jsonl").read_bytes(), name="journal.jsonl")[0]
    for position, entry in enumerate(records):
        if isinstance(entry, WindowRecord) and entry.window == 0:
            chunks = [dataclasses.replace(record, index=0), *entry.chunks[1:]]
            records[position] = dataclasses.replace(entry, chunks=chunks)
    lines = [encode_journal_record(seq, entry) for seq, entry in enumerate(records, start=1)]
    (store / "journal.jsonl").write_bytes(b"".join([encode_journal_header(), *lines]))


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 5 has norm nan"), (np.inf, "row 5 has norm inf"), (0.0, "row 5 has norm 0"), (2.0, "row 5 has norm")],
)
def test_a_row_that_is_no_unit_vector_is_damage_whatever_its_checksum(value: float, message: str, unfinished: Path) -> None:
    rows = np.array(open_store(unfinished, partial=True).read_chunk(0))
    _forged(unfinished, rows)
    assert verify(unfinished).findings == [], "the forgery itself is sound"
    rows[5] = value / np.sqrt(DIMENSION) if value == 2.0 else value
    _forged(unfinished, rows)
    (finding,) = verify(unfinished).findings
    assert (finding.path, finding.window) == (chunk_name(0), 0)
    assert message in finding.message


def test_another_format_version_is_refused(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    (store / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    for action in (lambda: verify(store), lambda: open_store(store), lambda: build_small(None, store)):
        with pytest.raises(IdentityMismatchError, match=r"format_version in manifest\.json: the store has 2, given 1"):
            action()


def test_a_manifest_that_disagrees_with_the_journal_is_the_one_to_blame(store: Path, finished_store: Path) -> None:
    manifest = decode_manifest((store / "manifest.json").read_bytes())
    files = {**manifest.files, "ids.json": FileDigest(bytes=manifest.files["ids.json"].bytes, sha256="0" * 64)}
    (store / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).encode())
    assert [finding.path for finding in verify(store).findings] == ["manifest.json"]
    verify(store, repair=True)
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("changes", [{"rows": 69}, {"dimension": 63}])
def test_a_manifest_of_another_shape_is_found(changes: dict[str, int], store: Path) -> None:
    manifest = decode_manifest((store / "manifest.json").read_bytes())
    (store / "manifest.json").write_bytes(dataclasses.replace(manifest, **changes).encode())  # type: ignore[arg-type]
    assert [finding.path for finding in verify(store).findings] == ["manifest.json"]


def test_weights_that_are_no_distribution_are_found_whatever_their_digest(store: Path) -> None:
    manifest = decode_manifest((store / "manifest.json").read_bytes())
    name = f"weights/{manifest.names['default']}.npy"
    weights = np.load(store / name)
    weights[0] *= 2
    np.save(store / name, weights)
    content = (store / name).read_bytes()
    digest = FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (store / "manifest.json").write_bytes(dataclasses.replace(manifest, files={**manifest.files, name: digest}).encode())
    (finding,) = verify(store).findings
    assert finding.path == name
    assert "sum 1" in finding.message


def test_a_journal_that_commits_the_wrong_window_is_found(unfinished: Path) -> None:
    records = decode_journal((unfinished / "journal.jsonl").read_bytes(), name="journal.jsonl")[0]
    assert isinstance(records[1], SpecRecord)
    assert isinstance(records[2], WindowRecord)
    records[2] = dataclasses.replace(records[2], start=16)
    lines = [encode_journal_record(seq, entry) for seq, entry in enumerate(records, start=1)]
    (unfinished / "journal.jsonl").write_bytes(b"".join([encode_journal_header(), *lines]))
    (finding,) = verify(unfinished).findings
    assert (finding.path, finding.window) == ("journal.jsonl", 0)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ids.json", "coordinates.npy", chunk_name(2), "chunks.json", "manifest.json", "journal.jsonl"]
)
def test_the_command_line_names_the_file_and_exits_with_3(name: str, store: Path) -> None:
    (_truncate if name == "manifest.json" else _flip)(store / name)
    result = CliRunner().invoke(app, ["verify", str(store)])
    assert result.exit_code == ExitCode.CORRUPT == 3
    assert name in result.output
    assert "Traceback" not in result.output


def test_the_command_line_repairs_and_then_says_what_is_left_to_do(store: Path, finished_store: Path) -> None:
    _flip(store / chunk_name(2))
    repaired = CliRunner().invoke(app, ["verify", str(store), "--repair"])
    assert repaired.exit_code == ExitCode.CORRUPT
    assert "1 windows demoted: run embstore build --resume" in repaired.output
    assert CliRunner().invoke(app, ["verify", str(store)]).exit_code == ExitCode.INCOMPLETE == 6
    build_small(None, store)
    assert CliRunner().invoke(app, ["verify", str(store)]).exit_code == 0
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.parametrize("name", sorted(ONLY_A_NEW_BUILD))
def test_what_only_a_new_build_can_make_is_said_to_be_so(name: str, store: Path) -> None:
    _flip(store / name)
    before = tree_state(store, apart_from=(".lock",), is_opened=True)
    result = CliRunner().invoke(app, ["verify", str(store), "--repair"])
    assert result.exit_code == ExitCode.CORRUPT
    assert f"damaged {name}" in result.output
    assert "build into another --out" in result.output
    assert "--resume" not in result.output, "a resume cannot mend it"
    assert tree_state(store, apart_from=(".lock",), is_opened=True) == before
