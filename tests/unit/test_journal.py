"""The order of system calls that a commit is made of, and a journal whose sync failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from embstore.core.errors import StorageError
from embstore.core.records import DriftRecord, encode_journal_header
from embstore.storage.journal import Journal, read_journal
from tests.support.faults import SYNC_DATA, Call, SystemCalls
from tests.support.power import EXTREMES, Disk
from tests.support.records import PROMPTS, SPEC
from tests.support.stores import build_small

JOURNAL = "journal.jsonl"
# rewritten, then opened for appending
OPENED = [
    *(Call(name, "temp") for name in ("open", "write", "fsync")),
    *(Call("rename", JOURNAL), Call("fsync", "."), Call("open", JOURNAL)),
]


def test_opening_rewrites_the_journal_before_a_line_is_believed(tmp_path: Path) -> None:
    """Lines that only the page cache holds would otherwise be built upon and then lost."""
    with SystemCalls(root=tmp_path).watching() as calls:
        Journal(tmp_path).close()
        Journal(tmp_path).close()
    assert _plain_calls(calls) == [*OPENED, *OPENED]


@pytest.mark.parametrize("lines", [1, 3])
def test_a_line_whose_sync_failed_is_durable_once_the_next_writer_has_opened(lines: int, tmp_path: Path) -> None:
    """The kernel takes the pages of a failed sync for clean, so syncing the same file again would write nothing."""
    root = tmp_path / "store"
    root.mkdir()
    disk = Disk(root)
    with SystemCalls(root=root, disk=disk).watching() as calls:
        journal = Journal(root)
        for _ in range(lines - 1):
            journal.append(PROMPTS)
        calls.fail_at, calls.error = len(calls.calls) + 2, errno.EIO
        with pytest.raises(StorageError):
            journal.append(SPEC)
        journal.close()
        assert read_journal(root).spec == SPEC, "the page cache shows it"
        after = Journal(root)
        after.append(DriftRecord(fields=["threads"]))
        after.close()
    disk.cut(EXTREMES["synced"])
    state = read_journal(root)
    assert (state.spec, len(state.drifts)) == (SPEC, 1)


def test_a_failed_sync_loses_only_what_was_not_written_yet(tmp_path: Path) -> None:
    """The model that the tests of faults rest on, against its sentence: later syncs write later bytes."""
    root = tmp_path / "disk"
    root.mkdir()
    with SystemCalls(root=root, disk=Disk(root)).watching() as calls:
        assert calls.disk is not None
        handle = os.open(root / "file", os.O_CREAT | os.O_RDWR)
        folder = os.open(root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        os.pwrite(handle, b"one", 0)
        os.fsync(handle)
        os.pwrite(handle, b"two", 3)
        calls.fail_at, calls.error = len(calls.calls) + 1, errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(handle)
        os.fsync(handle)
        for data, offset, expected in ((b"four", 9, b"one\0\0\0\0\0\0four"), (b"two", 3, b"onetwo\0\0\0four")):
            os.pwrite(handle, data, offset)
            os.fsync(handle)
            assert calls.disk.image(EXTREMES["synced"]) == {"file": expected}
        os.close(handle)


def test_a_torn_tail_is_cut_before_anything_is_added(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(PROMPTS)
    journal.close()
    whole = (tmp_path / JOURNAL).read_bytes()
    for torn in (whole + b'{"record"', whole + bytes(50), whole[:-1]):
        (tmp_path / JOURNAL).write_bytes(torn)
        assert (read_journal(tmp_path).prompts is None) == (torn == whole[:-1])
        assert (tmp_path / JOURNAL).read_bytes() == torn, "reading never writes"
        with SystemCalls(root=tmp_path).watching() as calls:
            journal = Journal(tmp_path)
            journal.append(SPEC)
            journal.close()
        assert _plain_calls(calls) == [*OPENED, Call("write", JOURNAL), Call(SYNC_DATA, JOURNAL)]
        assert read_journal(tmp_path).spec == SPEC


def test_a_header_cut_short_is_written_again(tmp_path: Path) -> None:
    for length in range(len(encode_journal_header())):
        (tmp_path / JOURNAL).write_bytes(encode_journal_header()[:length])
        Journal(tmp_path).close()
        assert (tmp_path / JOURNAL).read_bytes() == encode_journal_header()


@pytest.mark.parametrize("point", [7, 8], ids=["write", "sync"])
def test_a_journal_that_failed_once_accepts_nothing_more(point: int, tmp_path: Path) -> None:
    """Whether the failed line is on disk is unknown, so the next one must not follow it in this process."""
    Journal(tmp_path).close()
    with SystemCalls(root=tmp_path, fail_at=point, error=errno.EIO).watching() as calls:
        journal = Journal(tmp_path)
        for _ in range(2):
            with pytest.raises(StorageError):
                journal.append(PROMPTS)
        journal.close()
    assert len(calls.calls) == point
    after = Journal(tmp_path)
    after.append(DriftRecord(fields=["threads"]))
    assert after.state.drifts
    after.close()
    assert read_journal(tmp_path).drifts == (DriftRecord(fields=["threads"]),)


def test_a_window_is_durable_chunk_by_chunk_then_row_files_then_its_one_line(small_prompts: Path, tmp_path: Path) -> None:
    with SystemCalls(root=tmp_path / "store").watching() as calls:
        build_small(small_prompts, tmp_path / "store")
    names = [(call.name, _plain(call.path)) for call in calls.calls]
    chunk = [("open", "temp"), ("write", "temp"), ("ftruncate", "temp"), ("fsync", "temp")]
    expected = [*chunk, ("rename", "embeddings.zarr/c.2.0"), *chunk, ("rename", "embeddings.zarr/c.3.0")]
    expected.append(("fsync", "embeddings.zarr"))
    expected += [("pwrite", "coordinates.npy"), (SYNC_DATA, "coordinates.npy")]
    expected += [("pwrite", "residuals.npy"), (SYNC_DATA, "residuals.npy")]
    expected += [("pwrite", "sequences.npy"), (SYNC_DATA, "sequences.npy")]
    expected += [("write", JOURNAL), (SYNC_DATA, JOURNAL)]
    start = names.index(("rename", "embeddings.zarr/c.2.0")) - len(chunk)
    assert names[start : start + len(expected)] == expected
    # the artefact's one flip comes after every listed file, and the links after it
    published = [path for name, path in names if name == "rename"]
    assert published[-3:] == ["manifest.json", "density_weights.npy", "embeddings_metadata.json"]


def _plain(path: str) -> str:
    return "temp" if path.endswith(".tmp") else path


def _plain_calls(calls: SystemCalls) -> list[Call]:
    return [Call(call.name, _plain(call.path)) for call in calls.calls]
