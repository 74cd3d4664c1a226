"""The journal: an append-only file whose durable lines are the only commits of a build.

A line counts once ``fdatasync`` has returned. After a crash the last line may be torn: it was never acknowledged, so opening
for writing removes it. Damage anywhere else is refused. Rationale: docs/decisions/0002-journal-is-the-commit-log.md, and
0055 for what a failed sync leaves behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from embstore.core.decode import parse_json
from embstore.core.errors import CorruptStoreError, StorageError, StoreNotFoundError
from embstore.core.files import fsync_directory, open_regular, pread_all, read_all, storage_errors
from embstore.core.format import JOURNAL, JOURNAL_BYTES, JOURNAL_LINE_BYTES, MANIFEST, RUNS, JsonObject
from embstore.core.records import (
    JournalRecord,
    JournalState,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
    replay,
)
from embstore.storage.atomic import DurableFile, sync_data, write_all

SYNCS_FOLDERS = "syncs_folders"  # a field of runs.jsonl: false if the file system refused to
NO_FOLDER_SYNC = "cannot sync folders: a power cut there may take back rows that were reported as committed"
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
    """The journal opened by the one writer, who holds the store's lock.

    Opening writes what was read to a new file, without a torn tail, and puts it in the place of the old one before any line
    is believed. The page cache may show lines that are on no disk: a killed process left them unsynced, or their fdatasync
    failed, and then the kernel takes their pages for clean and a second sync would report success without writing them.

    ``syncs_folder``: whether the file system could make the name of the new file durable.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / JOURNAL
        self._handle, self._size, self._broken = -1, 0, False
        self._records: list[JournalRecord] = []
        self.syncs_folder = True
        content = journal_bytes(root)
        records, valid_bytes = decode_journal(content, name=JOURNAL)
        self._replace(content[:valid_bytes] or encode_journal_header(), records)

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
        self._replace(b"".join([encode_journal_header(), *lines]), records)

    def close(self) -> None:
        """Close the file. Every line in it was synced, so an error on closing does not matter."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
        self._handle = -1

    def _replace(self, content: bytes, records: Sequence[JournalRecord]) -> None:
        """Make a new file of ``content`` the journal, durably, and append to it from now on; the old file is closed."""
        self._broken = True
        with DurableFile(self._path, sync_directory=False, sha256=False) as file:
            file.write(content)
        self.syncs_folder = fsync_directory(self._path.parent)
        self.close()
        with storage_errors("opening", self._path):
            self._handle = open_regular(self._path.parent, JOURNAL, os.O_WRONLY | os.O_APPEND)
        self._size, self._records, self._broken = len(content), list(records), False
