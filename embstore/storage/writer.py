"""The one writer of a store: creation, window commits, publication. The order on disk is the promise, so it is all here.

Per chunk: temp -> write -> fsync -> rename. Per window: fsync(folder), slices of the row files pwritten and fdatasynced,
then ONE journal line. Work before that line may be lost and is then recomputed; work after it is never lost. Last of all,
the rename of ``manifest.json`` publishes everything at once. Leaving this writer by an exception publishes nothing.

Until the first commit of a window a store holds nothing that cannot be made again in minutes, so a corrected command may
begin it again (``begin_again``), and a refused one deletes what it began (``discard``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, CorruptStoreError, StoreExistsError, StoreNotFoundError
from embstore.core.files import check_content, fsync_directory, irregular, open_regular, read_committed, storage_errors
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    COORDINATE_MAP,
    COORDINATES,
    DEFAULT_WEIGHTS,
    DOCUMENT_BYTES,
    EMBEDDINGS,
    JOURNAL,
    LOCK,
    MANIFEST,
    METADATA_LINK,
    NEIGHBORS,
    REFUSED,
    RESIDUALS,
    RUNS,
    SEQUENCES,
    SPEC,
    STAGE0_FILES,
    WEIGHTS,
    WEIGHTS_LINK,
    WITHDRAWN,
    WORK,
    FileDigest,
    Manifest,
    basis_file,
    canonical_json,
    decode_manifest,
    document,
    weights_paths,
)
from embstore.core.plan import grid_of, misfit, refuse_misfits
from embstore.core.records import JournalRecord, JournalState, OriginRecord, PromptsRecord, SpecRecord, WindowRecord
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec, array_metadata, decode_spec, spec_problem
from embstore.storage.atomic import (
    WriterLock,
    make_directory,
    pwrite_all,
    remove_busy_folder,
    remove_folder,
    remove_temp_files,
    replace_link,
    save_array,
    sync_data,
    write_all,
    write_durable,
)
from embstore.storage.chunk_writer import WORKER_FOLDERS, WrittenWindow
from embstore.storage.journal import SYNCS_FOLDERS, Journal
from embstore.storage.row_files import ROW_FILES, check_rows, header, map_basis, preallocate, repair, row_bytes, row_files
from embstore.storage.rows_copy import describe_copy, has_copy, is_description
from embstore.storage.search_blocks import KEPT_BLOCKS

_OWN_DIGEST = re.compile(r"[0-9a-f]{16}")
_OWN_CHUNK = re.compile(r"c\.\d{1,10}\.0")
_OWN_WEIGHTS = re.compile(r"[0-9a-f]{16}\.(npy|json)")
# what a writer that died at its start leaves
_BEGUN = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(JOURNAL)}\.[0-9a-f]{{8}}\.tmp")


class StoreWriter:
    """Exclusive write access to the store at ``root``; use as a context manager.

    Parameters
    ----------
    root
        The store's folder; created with missing parents when absent.
    resume
        Whether an existing store may be continued. Without it any store that has had a committed window is refused.
    lock
        The store's lock, if the caller has taken it to read the store before a writer cleans up; the writer releases it.

    Raises
    ------
    StoreExistsError
        ``root`` contains a store and ``resume`` is off, or contains other files.
    StoreLockedError
        Another process is writing.
    CorruptStoreError
        The journal is damaged before its last line.
    """

    def __init__(self, root: Path, *, resume: bool, lock: WriterLock | None = None) -> None:
        self.root = root
        self._handles: dict[str, int] = {}
        self._made = [folder for folder in (root, *root.parents) if not folder.exists()]
        if lock is None:
            lock = lock_store(root)
        self._lock = lock
        try:
            self._journal = Journal(root)
        except BaseException:
            self._lock.release()
            raise
        try:
            refuse_taken(root, self.state, resume=resume)
            self._is_new = self.state.prompts is None
            self._recover()
            if not self.syncs_folders:
                self.log_run({"event": "opened", "time": time.time(), SYNCS_FOLDERS: False})
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
            with contextlib.suppress(OSError):  # every row in the file was synced
                os.close(handle)
        self._handles.clear()
        self._journal.close()
        self._lock.release()

    @property
    def state(self) -> JournalState:
        """What is committed so far."""
        return self._journal.state

    @property
    def syncs_folders(self) -> bool:
        """Whether the store's file system can sync folders; if not, a power cut may take committed files away."""
        return self._journal.syncs_folder

    @property
    def work(self) -> Path:
        """Scratch folder inside the store, deleted at publication; nothing in it is ever trusted."""
        folder = self.root / WORK
        with storage_errors("creating folder", folder):
            folder.mkdir(exist_ok=True)
        return folder

    @property
    def may_begin_again(self) -> bool:
        """Whether nothing would be lost: see ``may_begin_again``."""
        return may_begin_again(self.root, self.state)

    def begin_again(self, *, keeps_prompts: bool = False) -> None:
        """Take back what is committed, or all but the prompts; durable when this returns.

        The journal changes at once, so a kill leaves the old store or the new one. Chunks that no line commits are deleted
        before: they lie where a smaller grid has none. What else is left is overwritten by name.
        """
        if not self.may_begin_again:
            raise AssertionError(f"{self.root} has committed rows")
        with storage_errors("cleaning", self.root):
            for path in _entries(self.root / EMBEDDINGS):
                if _OWN_CHUNK.fullmatch(path.name):
                    remove_folder(path)
        if (self.root / EMBEDDINGS).is_dir():
            fsync_directory(self.root / EMBEDDINGS)
        kept = [self.state.origin, self.state.prompts] if keeps_prompts else []
        self._journal.replace([record for record in kept if record is not None])
        self._is_new |= not keeps_prompts
        with storage_errors("cleaning", self.root):
            for name in (SPEC, ARRAY_METADATA, BASIS, COORDINATE_MAP, REFUSED, *ROW_FILES):
                (self.root / name).unlink(missing_ok=True)

    def adopt_prompts(self, folder: Path, record: PromptsRecord, origin: OriginRecord | None) -> None:
        """Commit stage 0 that ``ingest`` wrote to ``folder``, which lies in ``work``."""
        for name in record.files:
            with storage_errors("publishing", self.root / name):
                os.rename(folder / name, self.root / name)
        fsync_directory(self.root)
        if origin is not None:
            self.commit(origin)
        self.commit(record)

    def discard(self) -> None:
        """Delete what this writer began, and the folders it made, as long as there is no spec; then only ``close`` is left.

        The first step takes the prompts back and the last one removes the journal, so a kill leaves a store to begin. A file
        of another program stays, and its folder with it. What cannot be deleted stays, too.
        """
        if not self._is_new or self.state.spec is not None or not self.may_begin_again:
            return
        with contextlib.suppress(OSError):
            if self.state.prompts is not None:
                self._journal.replace([])
            remove_folder(self.root / WORK, missing_ok=True)
            for name in (*STAGE0_FILES, REFUSED, RUNS):
                (self.root / name).unlink(missing_ok=True)
            if (self.root / EMBEDDINGS).is_dir():
                (self.root / EMBEDDINGS).rmdir()
            fsync_directory(self.root)
            if any(path.name not in (JOURNAL, LOCK) for path in _entries(self.root)):
                return  # without a journal it would be a folder of other files, where nothing can be built
            for name in (JOURNAL, LOCK):
                (self.root / name).unlink()
            for folder in self._made:
                folder.rmdir()

    def commit(self, record: JournalRecord) -> None:
        """Append one record to the journal; durable when this returns."""
        self._journal.append(record)

    def log_run(self, entry: dict[str, object]) -> None:
        """Append to ``runs.jsonl``: times, hosts, versions. Only people read it, so it is not synced."""
        with storage_errors("writing", self.root / RUNS):
            handle = open_regular(self.root, RUNS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                write_all(handle, canonical_json(entry).encode() + b"\n")
            finally:
                os.close(handle)

    def create(self, spec: StoreSpec, basis_VR: NDArray[np.float32]) -> StoreSpec:
        """Write basis or coordinate map, array metadata, empty row files and spec, then commit them as one record.

        Returns the spec as written to ``spec.json``, with the digest of the basis. A spec beyond the limits of the format is
        a ConfigError: every reader would refuse it.
        """
        if (problem := spec_problem(spec)) is not None:
            raise ConfigError(f"no such store is possible: {problem}", hint="choose other --chunk-rows or --window-rows")
        make_directory(self.root / EMBEDDINGS)
        name = basis_file(spec.embedding.basis)
        for other in {BASIS, COORDINATE_MAP} - {name}:
            if (self.root / other).exists():  # of a store that was begun again
                (self.root / other).unlink()
        basis = save_array(self.root / name, basis_VR, sync_directory=False)  # spec.json comes last and syncs for all
        spec = dataclasses.replace(spec, basis_sha256=basis.sha256)
        files = {name: basis}
        files[ARRAY_METADATA] = write_durable(self.root / ARRAY_METADATA, array_metadata(spec))
        for row_file in row_files(spec):
            preallocate(self.root, spec, row_file)
        files[SPEC] = write_durable(self.root / SPEC, document(dataclasses.asdict(spec)))
        self.commit(SpecRecord(files=files))
        return spec

    def read_spec(self) -> StoreSpec:
        """The committed spec, checked against its digest in the journal and against the basis and the committed windows."""
        return read_spec(self.root, self.state)

    def restore_array_metadata(self) -> None:
        """Write ``zarr.json`` again: it follows from the spec."""
        write_durable(self.root / ARRAY_METADATA, array_metadata(self.read_spec()))

    def commit_window(self, spec: StoreSpec, written: WrittenWindow) -> WindowRecord:
        """Write a window's slices of the row files and commit it; durable when this returns. Windows come in any order.

        Its chunks are durable already (``storage.chunk_writer``), whichever process wrote them.

        Raises
        ------
        CorruptStoreError
            A slice changed on its way here.
        """
        record = written.record
        if misfit(grid_of(spec), record):
            raise AssertionError(f"window {record.window} does not fit the grid of the store")
        rows = RowRange(record.start, record.stop)
        slices: dict[str, NDArray[Any]] = {
            COORDINATES: written.coord_WR,
            RESIDUALS: written.residual_W,
            SEQUENCES: written.sequence_W,
        }
        for name in row_files(spec):
            values = slices[name].data.cast("B")
            check_rows(name, values, record)
            self._write_rows(spec, name, rows, values)
        self.commit(record)
        return record

    def seal_rows(self, spec: StoreSpec) -> dict[str, FileDigest]:
        """Digests of the row files, from one read of each that checks every window against its commit.

        Raises
        ------
        CorruptStoreError
            The bytes of a window differ from its commit.
        """
        digests = {}
        for name in row_files(spec):
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
        """Publish ``manifest``; then refresh the links and delete files that no manifest lists.

        Raises
        ------
        ConfigError
            It lists so many weightings that no reader would take it.
        """
        content = manifest.encode()
        if len(content) > DOCUMENT_BYTES:
            raise ConfigError(
                f"{self.root} would keep {len(manifest.names)} weightings, and its manifest {len(content)} bytes of at most "
                f"{DOCUMENT_BYTES}",
                hint=f"drop those that no run uses: embstore weights {self.root} --drop NAME",
            )
        write_durable(self.root / MANIFEST, content)
        self._settle(manifest)

    def withdraw(self) -> None:
        """Take the manifest back, durably: the store is unfinished again until a resume publishes it.

        It is kept under another name, because it lists named weightings that a resume would not make again.
        """
        if os.path.lexists(self.root / MANIFEST):
            with storage_errors("withdrawing", self.root / MANIFEST):
                os.close(open_regular(self.root, MANIFEST))  # refuses a folder of that name, which embstore did not write
                os.rename(self.root / MANIFEST, self.root / WITHDRAWN)
            fsync_directory(self.root)

    def withdrawn(self) -> Manifest | None:
        """The manifest that ``withdraw`` took back, if it can be read."""
        if not (self.root / WITHDRAWN).exists():
            return None
        with contextlib.suppress(CorruptStoreError):
            return decode_manifest(read_committed(self.root, WITHDRAWN))
        return None

    def _write_rows(self, spec: StoreSpec, name: str, rows: RowRange, values: memoryview) -> None:
        path = self.root / name
        if name not in self._handles:
            with storage_errors("opening", path):
                self._handles[name] = open_regular(self.root, name, os.O_RDWR)
        with storage_errors("writing", path):
            pwrite_all(self._handles[name], values, len(header(spec, name)) + rows.start * row_bytes(spec, name))
            sync_data(self._handles[name])

    def _recover(self) -> None:
        """Finish what a dead writer left; a sound store is not touched.

        In a published store, links and unlisted files are settled as its writer would have done. In an unfinished store, row
        files are repaired so that they can be written to. Damage that only a new build repairs is left for verify to name.
        """
        self._remove_leftovers()
        with contextlib.suppress(CorruptStoreError):
            if (self.root / MANIFEST).exists():
                self._settle(decode_manifest(read_committed(self.root, MANIFEST)))
            elif self.state.spec is not None:
                spec = self.read_spec()
                fsync_directory(self.root / EMBEDDINGS)  # a repair may have died before it synced zarr.json's name
                if [name for name in row_files(spec) if repair(self.root, spec, name)]:
                    fsync_directory(self.root)

    def refresh_links(self, manifest: Manifest) -> None:
        """Point the links at what ``manifest`` publishes; where there is a copy of the rows, the metadata describe it."""
        array, sidecar = weights_paths(manifest.names[DEFAULT_WEIGHTS])
        links = {self.root / WEIGHTS_LINK: array, self.root / METADATA_LINK: sidecar}
        if has_copy(self.root, (manifest.rows, manifest.dimension)):
            del links[self.root / METADATA_LINK]
            with contextlib.suppress(CorruptStoreError):  # a damaged sidecar is for verify to name
                if not is_description(self.root, sidecar):
                    write_durable(self.root / METADATA_LINK, describe_copy(self.root, sidecar))
        replaced = [link for link, target in links.items() if replace_link(link, target)]
        if replaced:
            fsync_directory(self.root)

    def _settle(self, manifest: Manifest) -> None:
        """Refresh the links, and delete what ``manifest`` does not list."""
        self.refresh_links(manifest)
        with storage_errors("cleaning", self.root):
            remove_folder(self.root / WORK, missing_ok=True)
            (self.root / WITHDRAWN).unlink(missing_ok=True)
            # only files with names that a writer gives; other strays belong to whoever put them there
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
                    remove_busy_folder(path)
            for path in _entries(self.root / WORK) if kept else [self.root / WORK]:
                if path not in kept:
                    remove_folder(path, missing_ok=True)


def may_begin_again(root: Path, state: JournalState) -> bool:
    """Whether a store with this journal has never had a committed row, so that another build may take its place."""
    return not state.had_windows and not any(os.path.lexists(root / name) for name in (MANIFEST, WITHDRAWN))


def refuse_taken(root: Path, state: JournalState, *, resume: bool) -> None:
    """Refuse a folder that is not for this build: of other files, or without ``resume`` a store that has had rows.

    Raises
    ------
    StoreExistsError
    """
    _refuse_foreign(root)
    if state.prompts is not None and not resume and not may_begin_again(root, state):
        raise StoreExistsError(
            f"{root} already contains a store", hint="add --resume to continue it, or choose another --out"
        )


def read_spec(root: Path, state: JournalState) -> StoreSpec:
    """As ``StoreWriter.read_spec``, for whoever only reads."""
    if state.spec is None:
        raise StoreNotFoundError(f"{root} has no spec yet", hint="run embstore build")
    content = read_committed(root, SPEC)
    check_content(root, SPEC, [content], state.spec.files[SPEC])
    spec = decode_spec(content)
    refuse_misfits(spec, state)
    map_basis(root, spec.embedding)
    return spec


def lock_store(root: Path) -> WriterLock:
    """Lock the store at ``root`` for writing, once it is known to be a store or a new folder; errors as ``StoreWriter``."""
    _refuse_foreign(root)
    _refuse_links(root)
    make_directory(root, opening=True)
    return WriterLock(root / LOCK)


def _refuse_foreign(root: Path) -> None:
    """Never write into a folder of other files."""
    with storage_errors("opening", root, opening=True):
        if not root.exists():
            return
        names = {entry.name for entry in root.iterdir()}
    foreign = sorted(name for name in names if not _BEGUN.fullmatch(name))
    if JOURNAL not in names and foreign:
        raise StoreExistsError(
            f"{root} is not empty and is not a store (it contains {foreign[0]})", hint="choose another --out"
        )


def _refuse_links(root: Path) -> None:
    """Never write or delete through a link in place of a file or folder of the store."""
    folders = [EMBEDDINGS, WEIGHTS, WORK, NEIGHBORS]
    if not (root / NEIGHBORS).is_symlink():
        folders += [f"{NEIGHBORS}/{folder.name}" for folder in _entries(root / NEIGHBORS)]
    for name in (*folders, *ROW_FILES, JOURNAL, LOCK, RUNS):
        if (root / name).is_symlink() or (name not in folders and (root / name).exists() and not (root / name).is_file()):
            raise irregular(name)


def _entries(folder: Path) -> list[Path]:
    with storage_errors("reading folder", folder):
        return list(folder.iterdir()) if folder.is_dir() else []
