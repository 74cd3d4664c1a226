"""A store of a million rows: opening its journal costs so much a record, and looking at it reads no row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from embstore.core.errors import IncompleteStoreError
from embstore.core.format import ARRAY_METADATA, BASIS, IDS, SPEC, FileDigest, document
from embstore.core.records import (
    ChunkRecord,
    PromptsRecord,
    SpecRecord,
    encode_journal_header,
    encode_journal_record,
)
from embstore.core.spec import StoreSpec, array_metadata
from embstore.storage.journal import Journal, read_journal
from embstore.storage.reader import open_store
from embstore.storage.writer import StoreWriter
from embstore.views.info import inspect
from tests.support.records import EMBEDDING, spec, window_record

NUM_ROWS = 1_000_000
WINDOW_ROWS = 256
NUM_WINDOWS = 3907
CHUNK_ROWS = 256
MOST_CALLS = 400  # of functions, for one record
COMMITTED = NUM_WINDOWS - 1  # the last window is missing, so the store is unfinished


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished store of a million rows as far as its records go: no chunk, no prompt is there."""
    root = tmp_path_factory.mktemp("million") / "store"
    (root / "embeddings.zarr").mkdir(parents=True)
    pinned = spec(rows=NUM_ROWS, window_rows=WINDOW_ROWS, chunk_rows=CHUNK_ROWS, embedding=EMBEDDING)
    files = {SPEC: document(dataclasses.asdict(pinned)), ARRAY_METADATA: array_metadata(pinned), BASIS: b"no basis"}
    ids = json.dumps([f"row-{row}" for row in range(100)]).encode()
    digests = {name: _written(root / name, content) for name, content in files.items()}
    prompts = PromptsRecord(
        rows=NUM_ROWS,
        lines=NUM_ROWS,
        quarantined=0,
        repeats=0,
        fingerprint="f" * 64,
        files={IDS: _written(root / IDS, ids)},
    )
    (root / "journal.jsonl").write_bytes(_journal(pinned, prompts, SpecRecord(files=digests)))
    return root


def _written(path: Path, content: bytes) -> FileDigest:
    path.write_bytes(content)
    return FileDigest(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _journal(pinned: StoreSpec, prompts: PromptsRecord, spec_record: SpecRecord) -> bytes:
    lines = [encode_journal_header(), encode_journal_record(1, prompts), encode_journal_record(2, spec_record)]
    per_window = WINDOW_ROWS // CHUNK_ROWS
    for window in range(COMMITTED):
        chunks = [
            ChunkRecord(index=window * per_window + part, bytes=30_000 + part, crc32c=f"{window:08x}")
            for part in range(per_window)
        ]
        record = window_record(window, window * WINDOW_ROWS, (window + 1) * WINDOW_ROWS, chunks=chunks)
        lines.append(encode_journal_record(window + 3, record))
    return b"".join(lines)


def _calls(action: Callable[[], object]) -> int:
    """Calls of functions, of Python and C, that ``action`` makes: what it costs, however busy the machine is."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def test_opening_the_journal_of_a_million_rows_costs_so_much_a_record(million: Path) -> None:
    state = read_journal(million)
    assert len(state.windows) == COMMITTED
    assert state.committed_rows == COMMITTED * WINDOW_ROWS

    def open_for_writing() -> None:
        journal = Journal(million)
        assert len(journal.state.windows) == COMMITTED
        journal.close()

    assert _calls(lambda: read_journal(million)) < MOST_CALLS * COMMITTED
    assert _calls(open_for_writing) < MOST_CALLS * COMMITTED


def test_looking_at_an_unfinished_store_of_a_million_rows_reads_no_row(million: Path) -> None:
    opened = open_store(million, partial=True)
    assert sum(rows.num_rows for rows in opened.committed_rows) == COMMITTED * WINDOW_ROWS
    info = inspect(million)
    assert (info.committed_rows, info.total_rows, info.stage) == (COMMITTED * WINDOW_ROWS, NUM_ROWS, "embedding")
    assert (info.committed_windows, info.total_windows) == (COMMITTED, NUM_WINDOWS)
    assert not list((million / "embeddings.zarr").glob("c.*"))
    with pytest.raises(IncompleteStoreError, match=r"999936 of 1000000 rows|999,936") as caught:
        open_store(million)
    assert caught.value.hint
    assert _calls(lambda: open_store(million, partial=True)) < MOST_CALLS * COMMITTED
    assert _calls(lambda: inspect(million)) < 2 * MOST_CALLS * COMMITTED  # it reads the journal for itself and for the store


def test_the_journal_of_a_million_rows_takes_a_few_megabytes(million: Path) -> None:
    tracemalloc.start()
    try:
        state = read_journal(million)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(state.windows) == COMMITTED
    assert peak_bytes < 8 << 20  # the file of 1 MB, and less than 2 KB a record


def test_a_commit_costs_the_same_however_long_the_journal_is(million: Path, tmp_path: Path) -> None:
    """Progress is counted, not scanned: the last commits of a long build cost what the first ones do."""

    def calls_of_ten(root: Path) -> int:
        with StoreWriter(root, resume=True) as writer:
            return _calls(lambda: [writer.commit(window_record(NUM_WINDOWS - 1, 999_936, NUM_ROWS)) for _ in range(10)])

    copy = tmp_path / "store"
    copy.mkdir()
    (copy / "journal.jsonl").write_bytes((million / "journal.jsonl").read_bytes())
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "journal.jsonl").write_bytes(encode_journal_header())
    assert calls_of_ten(copy) < 2 * calls_of_ten(tmp_path / "fresh")
