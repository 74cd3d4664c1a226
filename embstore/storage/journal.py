"""The journal: an append-only file whose durable lines are the only commits of a build.

A line counts once ``fdatasync`` has returned. After a crash the last line may be torn: it was never acknowledged, so opening
for writing removes it. Damage anywhere else is refused. Rationale: docs/decisions/0002-journal-is-the-commit-log.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from embstore.core.decode import parse_json
from embstore.core.errors import CorruptStoreError, StorageError, StoreNotFoundError
from embstore.core.files import open_regular, pread_all, read_all, storage_errors
from embstore.core.format import JOURNAL, JOURNAL_BYTES, JOURNAL_LINE_BYTES, MANIFEST, RUNS, JsonObject
from embstore.core.records import (
    JournalRecord,
    JournalState,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
    replay,
)
from embstore.storage.atomic import fsync_directory, sync_data, write_all, write_durable

_RUNS_BYTES = 1 << 20


def read_journal(root: Path) -> JournalState:
    """What is committed in the store at ``root``; reads only. Without a journal the state is empty."""
    records, _ = decode_journal(journal_bytes(root), name=JOURNAL)
    return replay(records)


def require_store(root: Path) -> None:
    """Refuse a folder that has neither a journal nor a manifest.

    Raises
    ------
    StoreNotFoundError
    """
    if not os.path.lexists(root / JOURNAL) and not os.path.lexists(root / MANIFEST):
        raise StoreNotFoundError(f"{root} is not a store", hint="run embstore build PROMPTS --model MODEL --out STORE")


def journal_bytes(root: Path) -> bytes:
    """All bytes of the journal, a torn tail included; empty if there is no journal."""
    if not root.is_dir():
        return b""
    with storage_errors("reading", root / JOURNAL):
        try:
            handle = open_regular(root, JOURNAL)
        except FileNotFoundError:
            return b""
        try:
            return read_all(handle, JOURNAL, JOURNAL_BYTES)
        finally:
            os.close(handle)


def run_entries(root: Path) -> list[JsonObject]:
    """Entries in the last MiB of ``runs.jsonl``, oldest first; lines that are not entries are left out.

    The file is not synced, so a crash may have torn it; its entries are only hints.
    """
    try:
        handle = open_regular(root, RUNS)
    except (FileNotFoundError, CorruptStoreError):
        return []
    try:
        lines = pread_all(handle, _RUNS_BYTES, max(0, os.fstat(handle).st_size - _RUNS_BYTES)).splitlines()
    finally:
        os.close(handle)
    entries = []
    for line in lines:
        with contextlib.suppress(CorruptStoreError):
            entries.append(parse_json(line, name=RUNS))
    return [entry for entry in entries if isinstance(entry, dict)]


class Journal:
    """The journal opened by the one writer.

    Opening removes a torn tail and syncs file and folder before anything that was read is trusted: lines that a killed
    process left may be in the page cache only.
    """

    def __init__(self, root: Path) -> None:
        path = root / JOURNAL
        with storage_errors("opening", path, opening=True):
            self._handle = open_regular(root, JOURNAL, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        self._path = path
        self._broken = False
        try:
            self._open(root)
        except BaseException:
            os.close(self._handle)
            raise

    def _open(self, root: Path) -> None:
        with storage_errors("reading", self._path):
            content = read_all(self._handle, JOURNAL, JOURNAL_BYTES)
        self._records, valid_bytes = decode_journal(content, name=JOURNAL)
        with storage_errors("opening", self._path, opening=True):
            if valid_bytes < len(content):
                os.ftruncate(self._handle, valid_bytes)
            if valid_bytes == 0:
                write_all(self._handle, encode_journal_header())
            os.fsync(self._handle)
        self._size = max(valid_bytes, len(encode_journal_header()))
        fsync_directory(root)

    @property
    def state(self) -> JournalState:
        """The fold of every committed record."""
        return replay(self._records)

    def append(self, record: JournalRecord) -> None:
        """Commit ``record``: when this returns it survives a power cut.

        Raises
        ------
        StorageError
            The line may or may not be on disk. This process writes nothing more; the next one reads what is there.
        """
        if self._broken:
            raise StorageError(
                f"{self._path}: an earlier write failed, nothing more is written", hint="run the command with --resume"
            )
        line = encode_journal_record(len(self._records) + 1, record)
        if len(line) > JOURNAL_LINE_BYTES or self._size + len(line) > JOURNAL_BYTES:
            raise StorageError(
                f"{self._path} has {self._size} bytes and cannot take a line of {len(line)}: the limits are "
                f"{JOURNAL_LINE_BYTES} bytes a line and {JOURNAL_BYTES} in all",
                hint="build into another --out, with --window-rows nearer the default",
            )
        self._broken = True
        with storage_errors("committing to", self._path):
            write_all(self._handle, line)
            sync_data(self._handle)
        self._broken = False
        self._size += len(line)
        self._records.append(record)

    def replace(self, records: Sequence[JournalRecord]) -> None:
        """Commit a journal of ``records`` in place of this one, at once: a kill leaves the old journal or the new one."""
        lines = [encode_journal_record(seq, record) for seq, record in enumerate(records, start=1)]
        content = b"".join([encode_journal_header(), *lines])
        self._broken = True
        write_durable(self._path, content)
        with storage_errors("opening", self._path):
            handle = open_regular(self._path.parent, JOURNAL, os.O_RDWR | os.O_APPEND)
        self.close()
        self._handle, self._size, self._records, self._broken = handle, len(content), list(records), False

    def close(self) -> None:
        """Close the file. Every line in it was synced, so an error on closing does not matter."""
        with contextlib.suppress(OSError):
            os.close(self._handle)
