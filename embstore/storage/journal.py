"""The journal: an append-only file whose durable lines are the only commits of a build.

A line counts once ``fdatasync`` returned. The last line may be torn after a crash: it was never acknowledged, so opening
for writing cuts it off. Damage anywhere else is refused. Rationale: docs/decisions/0002-journal-is-the-commit-log.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from embstore.core.errors import StorageError
from embstore.core.format import JOURNAL
from embstore.core.records import (
    JournalRecord,
    JournalState,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
    replay,
)
from embstore.storage.atomic import fsync_directory, storage_errors, sync_data, write_all


def read_journal(root: Path) -> JournalState:
    """What is committed in the store at ``root``, without touching anything; an absent journal is an empty state."""
    path = root / JOURNAL
    if not path.exists():
        return JournalState()
    records, _ = decode_journal(path.read_bytes(), name=JOURNAL)
    return replay(records)


class Journal:
    """The journal opened by the one writer.

    Opening cuts a torn tail and syncs file and folder before anything read is trusted: a killed process may have left lines
    that only the page cache holds.
    """

    def __init__(self, root: Path) -> None:
        path = root / JOURNAL
        with storage_errors("opening", path, opening=True):
            self._handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._path = path
        self._broken = False
        try:
            self._open(root)
        except BaseException:
            os.close(self._handle)
            raise

    def _open(self, root: Path) -> None:
        content = self._path.read_bytes()
        self._records, valid_bytes = decode_journal(content, name=JOURNAL)
        with storage_errors("opening", self._path, opening=True):
            if valid_bytes < len(content):
                os.ftruncate(self._handle, valid_bytes)
            if valid_bytes == 0:
                write_all(self._handle, encode_journal_header())
            os.fsync(self._handle)
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
            The line may or may not be on disk. The journal accepts nothing more in this process; the next one looks.
        """
        if self._broken:
            raise StorageError(f"{self._path} failed before; nothing more is written", hint="run the command with --resume")
        line = encode_journal_record(len(self._records) + 1, record)
        self._broken = True
        with storage_errors("committing to", self._path):
            write_all(self._handle, line)
            sync_data(self._handle)
        self._broken = False
        self._records.append(record)

    def close(self) -> None:
        """Close the file; nothing is flushed because nothing is buffered."""
        os.close(self._handle)
