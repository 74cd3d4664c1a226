"""The one writer of a store: creation, window commits, publication. Order on disk is the promise, so it is all here.

Per chunk: temp -> write -> fsync -> rename. Per window: fsync(folder), coordinates and residuals pwritten and fdatasynced,
then ONE journal line. Everything before that line may be lost and is then computed again; nothing after it ever is.
``manifest.json`` is renamed into place last and is the artefact's only flip. Leaving this writer by an exception publishes
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, CorruptStoreError, StoreExistsError, StoreNotFoundError
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    EMBEDDINGS,
    JOURNAL,
    LOCK,
    MANIFEST,
    METADATA_LINK,
    NEIGHBORS,
    RUNS,
    SPEC,
    WEIGHTS,
    WEIGHTS_LINK,
    WITHDRAWN,
    WORK,
    FileDigest,
    Manifest,
    canonical_json,
    decode_manifest,
    document,
    weights_paths,
)
from embstore.core.plan import grid_of, misfit, refuse_misfits
from embstore.core.records import JournalRecord, JournalState, SpecRecord, WindowRecord
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec, array_metadata, decode_spec, spec_problem
from embstore.storage.arrays import map_array, save_array
from embstore.storage.atomic import (
    WriterLock,
    fsync_directory,
    irregular,
    make_directory,
    open_regular,
    pwrite_all,
    read_committed,
    remove_folder,
    remove_temp_files,
    replace_link,
    storage_errors,
    sync_data,
    take_away,
    write_all,
    write_durable,
)
from embstore.storage.chunk_writer import WORKER_FOLDERS, WrittenWindow
from embstore.storage.journal import Journal
from embstore.storage.rowfiles import ROW_FILES, check_rows, header, mend, preallocate, row_bytes
from embstore.storage.search_blocks import KEPT_BLOCKS

_OWN_DIGEST = re.compile(r"[0-9a-f]{16}")
_OWN_WEIGHTS = re.compile(r"[0-9a-f]{16}\.(npy|json)")


class StoreWriter:
    """Exclusive write access to the store at ``root``; use as a context manager.

    Parameters
    ----------
    root
        The store's folder; created with missing parents when absent.
    resume
        Whether an existing store may be continued. Without it any store with committed prompts is refused.
    lock
        The store's lock, for who looked at the store under it before a writer tidies up; the writer releases it.

    Raises
    ------
    StoreExistsError
        ``root`` holds a store and ``resume`` is off, or holds files that are no store.
    StoreLockedError
        Another process is writing.
    CorruptStoreError
        The journal is damaged before its last line.
    """

    def __init__(self, root: Path, *, resume: bool, lock: WriterLock | None = None) -> None:
        self.root = root
        self._handles: dict[str, int] = {}
        if lock is None:
            lock = lock_store(root)
        self._lock = lock
        try:
            self._journal = Journal(root)
        except BaseException:
            self._lock.release()
            raise
        try:
            if self.state.prompts is not None and not resume:
                raise StoreExistsError(
                    f"{root} already holds a store", hint="add --resume to continue it, or choose another --out"
                )
            self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; whatever is not committed is abandoned."""
        for handle in self._handles.values():
            with contextlib.suppress(OSError):  # every row in it was synced
                os.close(handle)
        self._handles.clear()
        self._journal.close()
        self._lock.release()

    @property
    def state(self) -> JournalState:
        """What is committed so far."""
        return self._journal.state

    @property
    def work(self) -> Path:
        """Scratch folder inside the store, deleted at publication; nothing in it is ever trusted."""
        folder = self.root / WORK
        with storage_errors("creating folder", folder):
            folder.mkdir(exist_ok=True)
        return folder

    def commit(self, record: JournalRecord) -> None:
        """Append one record to the journal; durable when this returns."""
        self._journal.append(record)

    def log_run(self, entry: dict[str, object]) -> None:
        """Append to ``runs.jsonl``: times, hosts, versions. For people; nothing depends on it, so it is not synced."""
        with storage_errors("writing", self.root / RUNS):
            handle = open_regular(self.root, RUNS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                write_all(handle, canonical_json(entry).encode() + b"\n")
            finally:
                os.close(handle)

    def create(self, spec: StoreSpec, basis_VR: NDArray[np.float32]) -> StoreSpec:
        """Write basis, array metadata, empty coordinate files and spec, then commit them as one record.

        Returns the spec with the basis digest filled in, as it now stands in ``spec.json``. One beyond the limits of the
        format is a ConfigError: no reader would take it.
        """
        if (problem := spec_problem(spec)) is not None:
            raise ConfigError(f"this store cannot be: {problem}", hint="choose other --chunk-rows or --window-rows")
        make_directory(self.root / EMBEDDINGS)
        basis = save_array(self.root / BASIS, basis_VR, sync_directory=False)  # spec.json comes last and syncs for all
        spec = dataclasses.replace(spec, basis_sha256=basis.sha256)
        files = {BASIS: basis}
        files[ARRAY_METADATA] = write_durable(self.root / ARRAY_METADATA, array_metadata(spec))
        for name in ROW_FILES:
            preallocate(self.root, spec, name, sync_directory=False)
        files[SPEC] = write_durable(self.root / SPEC, document(dataclasses.asdict(spec)))
        self.commit(SpecRecord(files=files))
        return spec

    def read_spec(self) -> StoreSpec:
        """The committed spec, checked against its digest in the journal; basis and windows are those it describes."""
        record = self.state.spec
        if record is None:
            raise StoreNotFoundError(f"{self.root} has no spec yet", hint="run embstore build")
        content = read_committed(self.root, SPEC)
        check_digest(SPEC, content, record.files[SPEC])
        spec = decode_spec(content)
        refuse_misfits(spec, self.state)
        map_array(self.root, BASIS, "<f4", (spec.embedding.dimension, spec.embedding.rank))
        return spec

    def restore_array_metadata(self) -> None:
        """Write ``zarr.json`` again: it follows from the spec."""
        write_durable(self.root / ARRAY_METADATA, array_metadata(self.read_spec()))

    def commit_window(self, spec: StoreSpec, written: WrittenWindow) -> WindowRecord:
        """Enter a window's coordinates and residuals and commit it, in any order of windows; durable when this returns.

        Its chunks are durable already (storage.windows), whoever wrote them.

        Raises
        ------
        CorruptStoreError
            Coordinates or residuals are not those that were sent.
        """
        record = written.record
        if misfit(grid_of(spec), record):
            raise AssertionError(f"window {record.window} does not fit the grid of the store")
        rows = RowRange(record.start, record.stop)
        for name, values in zip(ROW_FILES, (written.coord_WR, written.residual_W), strict=True):
            check_rows(name, values.data.cast("B"), record)
            self._write_rows(spec, name, rows, values)
        self.commit(record)
        return record

    def seal_rows(self, spec: StoreSpec) -> dict[str, FileDigest]:
        """Digests of coordinates and residuals, made in one read that checks every window against its commit.

        Raises
        ------
        CorruptStoreError
            A window's bytes are not those that were committed.
        """
        digests = {}
        for name in ROW_FILES:
            start = header(spec, name)
            total, size = hashlib.sha256(start), len(start)
            with storage_errors("reading", self.root / name), (self.root / name).open("rb") as file:
                file.seek(size)
                for record in self.state.windows.values():
                    data = file.read((record.stop - record.start) * row_bytes(spec, name))
                    check_rows(name, data, record)
                    total.update(data)
                    size += len(data)
            digests[name] = FileDigest(bytes=size, sha256=total.hexdigest())
        return digests

    def publish(self, manifest: Manifest) -> None:
        """Flip the artefact to ``manifest``; afterwards refresh the links and drop what nothing lists."""
        write_durable(self.root / MANIFEST, manifest.encode())
        self._settle(manifest)

    def withdraw(self) -> None:
        """Take the manifest back, durably: the store is unfinished again, and a resume publishes it anew.

        It is kept under another name: weightings that a new build would not make are found by it.
        """
        if os.path.lexists(self.root / MANIFEST):
            with storage_errors("withdrawing", self.root / MANIFEST):
                os.close(open_regular(self.root, MANIFEST))  # a folder of that name is not ours to move
                os.rename(self.root / MANIFEST, self.root / WITHDRAWN)
            fsync_directory(self.root)

    def withdrawn(self) -> Manifest | None:
        """The manifest that ``withdraw`` took back, if it can be read."""
        if not (self.root / WITHDRAWN).exists():
            return None
        with contextlib.suppress(CorruptStoreError):
            return decode_manifest(read_committed(self.root, WITHDRAWN))
        return None

    def _write_rows(self, spec: StoreSpec, name: str, rows: RowRange, values: NDArray[np.float32]) -> None:
        path = self.root / name
        if name not in self._handles:
            with storage_errors("opening", path):
                self._handles[name] = open_regular(self.root, name, os.O_RDWR)
        with storage_errors("writing", path):
            pwrite_all(self._handles[name], values.data, len(header(spec, name)) + rows.start * row_bytes(spec, name))
            sync_data(self._handles[name])

    def _recover(self) -> None:
        """Take up after a writer that died; a sound store is not touched.

        A published store is settled as its writer would have done after the flip. An unfinished one gets row files that can
        be written to. Damage that only a new build mends is left for verify to name.
        """
        self._remove_leftovers()
        with contextlib.suppress(CorruptStoreError):
            if (self.root / MANIFEST).exists():
                self._settle(decode_manifest(read_committed(self.root, MANIFEST)))
            elif self.state.spec is not None:
                spec = self.read_spec()
                fsync_directory(self.root / EMBEDDINGS)  # a repair may have died before it synced zarr.json's name
                for name in ROW_FILES:
                    mend(self.root, spec, name)

    def _settle(self, manifest: Manifest) -> None:
        """Point the links at what ``manifest`` publishes, and drop what it does not list."""
        array, sidecar = weights_paths(manifest.names["default"])
        links = {self.root / WEIGHTS_LINK: array, self.root / METADATA_LINK: sidecar}
        replaced = [link for link, target in links.items() if replace_link(link, target)]
        if replaced:
            fsync_directory(self.root)
        with storage_errors("cleaning", self.root):
            remove_folder(self.root / WORK, missing_ok=True)
            (self.root / WITHDRAWN).unlink(missing_ok=True)
            # only what is named as a writer names it: strays are the business of whoever put them there
            for path in _entries(self.root / WEIGHTS):
                if _OWN_WEIGHTS.fullmatch(path.name) and f"{WEIGHTS}/{path.name}" not in manifest.files:
                    path.unlink()
            for folder in _entries(self.root / NEIGHBORS):
                if _OWN_DIGEST.fullmatch(folder.name) and folder.is_dir() and folder.name != manifest.neighbors:
                    remove_folder(folder)

    def _remove_leftovers(self) -> None:
        for folder in (self.root, self.root / EMBEDDINGS, self.root / WEIGHTS, *_entries(self.root / NEIGHBORS)):
            if folder.is_dir():
                remove_temp_files(folder)
        kept = [path for path in _entries(self.root / WORK) if path.name.startswith(KEPT_BLOCKS)]
        with storage_errors("cleaning", self.root / WORK):
            for path in _entries(self.root / WORK):
                if path.name.startswith(WORKER_FOLDERS):  # workers of a dead driver may still write
                    take_away(path)
            for path in _entries(self.root / WORK) if kept else [self.root / WORK]:
                if path not in kept:
                    remove_folder(path, missing_ok=True)


def lock_store(root: Path) -> WriterLock:
    """The writer's lock of the store at ``root``, once it is one that may be written to; errors as of ``StoreWriter``."""
    _refuse_foreign(root)
    _refuse_links(root)
    make_directory(root, opening=True)
    return WriterLock(root / LOCK)


def check_digest(name: str, content: bytes, digest: FileDigest) -> None:
    """Compare a file's bytes with the digest made when it was written; a difference is a CorruptStoreError."""
    found = hashlib.sha256(content).hexdigest()
    if found != digest.sha256:
        raise CorruptStoreError(
            f"{name} has sha256 {found[:16]} ({len(content)} bytes), "
            f"committed was {digest.sha256[:16]} ({digest.bytes} bytes)",
            hint="run embstore verify STORE",
        )


def _refuse_foreign(root: Path) -> None:
    """Never write into a folder of somebody else's files."""
    with storage_errors("opening", root, opening=True):
        if not root.exists():
            return
        names = {entry.name for entry in root.iterdir()}
    if JOURNAL not in names and names - {LOCK}:  # a writer that died at once leaves only its lock
        example = sorted(names - {LOCK})[0]
        raise StoreExistsError(f"{root} is not empty and holds no store (it has {example})", hint="choose another --out")


def _refuse_links(root: Path) -> None:
    """Never write, and above all never delete, through a link that somebody put in the place of a file or folder of ours."""
    folders = [EMBEDDINGS, WEIGHTS, WORK, NEIGHBORS]
    if not (root / NEIGHBORS).is_symlink():
        folders += [f"{NEIGHBORS}/{folder.name}" for folder in _entries(root / NEIGHBORS)]
    for name in (*folders, *ROW_FILES, JOURNAL, LOCK, RUNS):
        if (root / name).is_symlink() or (name not in folders and (root / name).exists() and not (root / name).is_file()):
            raise irregular(name)


def _entries(folder: Path) -> list[Path]:
    with storage_errors("reading folder", folder):
        return list(folder.iterdir()) if folder.is_dir() else []
