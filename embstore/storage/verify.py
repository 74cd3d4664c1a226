"""Read everything back and compare it with what was committed. Every finding names the file and what is wrong with it.

The journal lists what was committed, the manifest what was published; a checksum in one of them covers every byte of the
listed files. Rows are also decoded: they must be finite with unit norm, or NaN where the journal lists a failed row.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable
from embstore.core.errors import CorruptStoreError, EmbstoreError, StorageError
from embstore.core.events import Observer, ignore, stage
from embstore.core.files import file_problem, read_committed, reading_problem
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    CHUNKS,
    COORDINATE_MAP,
    DEFAULT_WEIGHTS,
    JOURNAL,
    LOCK,
    MANIFEST,
    METADATA_LINK,
    NEIGHBORS,
    REFUSED,
    ROWS_COPY,
    RUNS,
    SPEC,
    STAGE0_FILES,
    WEIGHTS,
    WEIGHTS_LINK,
    WITHDRAWN,
    WORK,
    FileDigest,
    Manifest,
    basis_file,
    chunk_name,
    decode_manifest,
    weights_paths,
)
from embstore.core.plan import grid_of, misfit
from embstore.core.records import JournalState, WindowRecord, chunk_table, decode_journal, replay
from embstore.core.rows import slices
from embstore.core.spec import StoreSpec, array_metadata, decode_spec
from embstore.storage.chunks import decode_chunk, read_chunk
from embstore.storage.journal import journal_bytes
from embstore.storage.listed_files import ListedFiles
from embstore.storage.row_files import ROW_FILES, RowFileCheck, header, header_problem, row_bytes, row_files
from embstore.storage.rows_copy import CopyCheck, has_copy, is_description

NORM_TOLERANCE = 2e-3  # float16 rounding moves the norm of a unit row by about 2e-4
# every row depends on these files, and nothing else records what they contained
ONLY_A_NEW_BUILD = frozenset({*STAGE0_FILES, SPEC, BASIS, COORDINATE_MAP})
_ONLY_ANEW = "; it cannot be recomputed: restore it from a copy of the store, or build into another --out"
_NO_FILE = "is not a file of this store"
_NOT_NEEDED = "; the store does not need this copy of its rows: delete it, or make it again"
_NOT_COMMITTED = "is not committed: it is never read, and a resume recomputes it"
_NORM_VALUES = 4 << 20
_MOST_STRAYS = 1000
_CHUNK_NAME = re.compile(re.escape(chunk_name(0)).replace("0", r"(0|[1-9]\d{0,9})", 1))
_LINK_LOOKS, _LINK_SECONDS = 10, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as committed. ``window`` is set if recomputing that window repairs it."""

    path: str
    message: str
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found. ``findings`` is damage; ``notes`` is not (a torn journal tail, stray files).

    ``reused`` are the rows that were copied from other stores, as ranges [start, stop) in row order. ``dropped`` names the
    weights that a repair took out.
    """

    is_complete: bool
    committed_rows: int
    total_rows: int
    files: int
    bytes: int
    findings: list[Finding]
    notes: list[str]
    reused: list[tuple[int, int]]
    dropped: list[str] = field(default_factory=list)


def check_stage0(root: Path, files: Mapping[str, FileDigest], advance: Callable[[int], None] = lambda count: None) -> None:
    """Compare files of stage 0 with their commit; the first that differs is a CorruptStoreError.

    ``advance`` is called with the number of bytes read since the last call.
    """
    for name, digest in files.items():
        problem = file_problem(root, name, digest, seen=lambda block: advance(len(block)))
        if problem is not None:
            raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root}; stage 0 cannot be recomputed")


def damaged_windows(
    root: Path, spec: StoreSpec, state: JournalState, advance: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[int, str]]:
    """Committed windows whose bytes differ from their commit, with the first finding of each. Bound by the disk.

    ``advance`` is called with the number of windows read since the last call.

    Raises
    ------
    CorruptStoreError
        The basis or coordinate map, or another file that every window depends on, differs from its commit: no window can be
        recomputed.
    """
    for name, digest in (state.spec.files if state.spec is not None else {}).items():
        problem = file_problem(root, name, digest)
        if problem is not None:
            is_recomputed = name not in ONLY_A_NEW_BUILD
            hint = f"run embstore verify {root} --repair" if is_recomputed else "build into another --out"
            raise CorruptStoreError(f"{name} {problem}{'' if is_recomputed else _ONLY_ANEW}", hint=hint)
    checks = [RowFileCheck(root, spec, name) for name in row_files(spec)]
    for record in state.windows.values():
        finding = next(_window_findings(root, spec, record, checks, decode=False), None)
        advance(1)
        if finding is not None:
            yield record.window, f"{finding.path}: {finding.message}"


def verify_store(root: Path, observer: Observer = ignore) -> VerifyReport:
    """Check every checksum, and rows for finiteness and norm; each file is read once. Memory: one chunk.

    Raises
    ------
    EmbstoreError
        The store cannot be checked at all: no journal, another format version, or damage in the middle of the journal.
    """
    notes: list[str] = []
    findings: list[Finding] = []
    content = journal_bytes(root)
    if not content and not os.path.lexists(root / MANIFEST):
        raise CorruptStoreError(f"{root} has no journal", hint="is this a store?")
    records, valid_bytes = decode_journal(content, name=JOURNAL)
    state = replay(records)
    manifest = _read_manifest(root, findings)
    is_complete = os.path.lexists(root / MANIFEST)
    if valid_bytes < len(content):
        torn = f"ends in a torn line of {len(content) - valid_bytes} bytes"
        if is_complete:
            findings.append(Finding(path=JOURNAL, message=torn))
        else:
            notes.append(f"{JOURNAL} {torn}, which was never acknowledged; a resume removes it")
    digests = _expected_digests(state, manifest, findings)
    sizes = [digest.bytes for digest in digests.values()]
    chunk_sizes = [chunk.bytes for window in state.windows.values() for chunk in window.chunks]
    with stage(observer, "verify", sum(sizes) + sum(chunk_sizes), "bytes") as advance:
        owners = _owners(manifest)
        plain = {name: digest for name, digest in digests.items() if name not in ROW_FILES}  # others: window by window
        read = ListedFiles(root, plain, [name for name in owners if name.endswith(".npy")], advance)
        findings += [
            Finding(path=name, message=problem + _what_helps(root, name, owners.get(name, ())))
            for name, problem in read.problems.items()
        ]
        copy, spec = None, _read_spec(root, state, read, findings)
        if spec is not None:
            sizes += chunk_sizes
            shape = (spec.rows, spec.embedding.dimension)
            copy = CopyCheck(root, shape) if has_copy(root, shape) else None
            findings += _row_findings(root, spec, state, manifest, copy, advance)
        if copy is not None and copy.problem is not None:
            notes.append(f"{ROWS_COPY} {copy.problem}{_NOT_NEEDED}")
        if spec is not None and manifest is not None:
            findings += _published_findings(spec, state, manifest, read)
            astray, copied = _look_at_links(root, manifest)
            findings += astray
            notes += copied
    notes += _strays(root, spec, state, manifest, {ROWS_COPY} if copy is not None else set())
    return VerifyReport(
        is_complete=is_complete,
        committed_rows=state.committed_rows,
        total_rows=state.prompts.rows if state.prompts else 0,
        files=len(sizes),
        bytes=sum(sizes),
        findings=findings,
        notes=notes,
        reused=[(rows.start, rows.stop) for rows in state.reused],
    )


def _expected_digests(state: JournalState, manifest: Manifest | None, findings: list[Finding]) -> dict[str, FileDigest]:
    """Digests of all listed files: from the journal, and from the manifest for files that were made after the rows."""
    digests: dict[str, FileDigest] = {}
    for record in (state.prompts, state.spec):
        digests |= record.files if record is not None else {}
    if manifest is None:
        return digests
    findings += [
        Finding(path=MANIFEST, message=f"its digest of {name} is not the one in the journal")
        for name, digest in digests.items()
        if manifest.files.get(name) != digest
    ]
    return {**manifest.files, **digests}


def _owners(manifest: Manifest | None) -> dict[str, list[str]]:
    """Names of the weightings that have a file, by its path."""
    owners: dict[str, list[str]] = {}
    for name, digest in sorted(manifest.names.items()) if manifest is not None else ():
        for path in weights_paths(digest):
            owners.setdefault(path, []).append(name)
    return owners


def _what_helps(root: Path, name: str, owners: Sequence[str]) -> str:
    """What to do about a damaged file, where it is not ``--repair``."""
    if name in ONLY_A_NEW_BUILD:
        return _ONLY_ANEW
    if owners and DEFAULT_WEIGHTS not in owners:
        drop = shlex.join(["embstore", "weights", str(root), *(f"--drop={owner}" for owner in owners)])
        return f"; to do without these weights: {drop}"
    return ""


def _read_manifest(root: Path, findings: list[Finding]) -> Manifest | None:
    if not os.path.lexists(root / MANIFEST):
        return None
    try:
        content = read_committed(root, MANIFEST)
        manifest = decode_manifest(content)
    except (OSError, CorruptStoreError) as error:
        problem = reading_problem(root, MANIFEST, error) if isinstance(error, OSError) else str(error)
        findings.append(Finding(path=MANIFEST, message=problem))
        return None
    if content != manifest.encode():
        findings.append(Finding(path=MANIFEST, message="is not spelled as embstore writes it"))
    return manifest


def _read_spec(root: Path, state: JournalState, read: ListedFiles, findings: list[Finding]) -> StoreSpec | None:
    if state.spec is None:
        if state.windows or os.path.lexists(root / MANIFEST):
            findings.append(Finding(path=JOURNAL, message="does not commit a spec, but there are rows or a manifest"))
        return None
    if SPEC not in read.contents:
        return None  # reported with the other digests
    try:
        spec = decode_spec(read.contents[SPEC])
    except EmbstoreError as error:
        findings.append(Finding(path=SPEC, message=str(error)))
        return None
    if read.differs(ARRAY_METADATA, array_metadata(spec)):
        findings.append(Finding(path=ARRAY_METADATA, message="does not match the array in spec.json"))
    if state.prompts is None or state.prompts.rows != spec.rows:
        findings.append(Finding(path=JOURNAL, message=f"does not commit the prompts of the {spec.rows} rows of {SPEC}"))
    return spec


def _row_findings(
    root: Path,
    spec: StoreSpec,
    state: JournalState,
    manifest: Manifest | None,
    copy: CopyCheck | None,
    advance: Callable[[int], None],
) -> Iterator[Finding]:
    """What is wrong with chunks and row files; ``copy`` is compared with the rows meanwhile."""
    for name in row_files(spec):
        if (problem := header_problem(root, spec, name)) is not None:
            yield Finding(path=name, message=problem)
    listed = manifest.files if manifest is not None else {}
    checks = [RowFileCheck(root, spec, name, listed.get(name)) for name in row_files(spec)]
    sealed = [name for name in row_files(spec) if name in listed]
    advance(sum(len(header(spec, name)) for name in sealed))
    row_width = sum(row_bytes(spec, name) for name in sealed)
    for window in state.windows.values():
        yield from _window_findings(root, spec, window, checks, decode=True, copy=copy, advance=advance)
        advance((window.stop - window.start) * row_width)
    for file in checks:
        if (problem := file.problem()) is not None:
            yield Finding(path=file.name, message=problem)


def _window_findings(
    root: Path,
    spec: StoreSpec,
    record: WindowRecord,
    checks: Sequence[RowFileCheck],
    *,
    decode: bool,
    copy: CopyCheck | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Finding]:
    grid = grid_of(spec)
    if misfit(grid, record):
        yield Finding(
            path=JOURNAL, message=f"window {record.window} does not fit the grid of spec.json", window=record.window
        )
        return
    failed = np.array([failed.row for failed in record.failed], dtype=np.int64)
    for chunk in record.chunks:
        path = chunk_name(chunk.index)
        try:
            data = read_chunk(root, spec, chunk)
            problem = _row_problem(data, spec, chunk.index, failed, copy) if decode else None
        except CorruptStoreError as error:
            problem = str(error)
        except StorageError as error:
            problem = reading_problem(root, path, error)
        advance(chunk.bytes)
        if problem is not None:
            yield Finding(path=path, message=problem, window=record.window)
    for file in checks:
        problem = file.window_problem(record)
        if problem is not None:
            yield Finding(path=file.name, message=problem, window=record.window)


def _row_problem(data: bytes, spec: StoreSpec, index: int, failed: NDArray[np.int64], copy: CopyCheck | None) -> str | None:
    rows = grid_of(spec).chunk(index)
    emb_BV = decode_chunk(data, spec, index)
    if copy is not None:
        copy.compare(rows.start, emb_BV[: rows.num_rows])
    is_failed = np.isin(np.arange(rows.start, rows.stop), failed)
    step = max(1, _NORM_VALUES // spec.embedding.dimension)  # rows whose norms are taken at a time
    for part in slices(0, rows.num_rows, step):
        block = emb_BV[part].astype(np.float32)
        expected_nan = is_failed[part]
        norms = np.sqrt(np.einsum("bv,bv->b", block, block, dtype=np.float64))
        bad = np.where(expected_nan, ~np.isnan(block).all(axis=1), ~(np.abs(norms - 1) < NORM_TOLERANCE))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            kind = "should be NaN (it failed)" if expected_nan[first] else f"has norm {norms[first]:.6g}, not 1"
            return f"row {rows.start + part.start + first} {kind}"
    return None


def _published_findings(spec: StoreSpec, state: JournalState, manifest: Manifest, read: ListedFiles) -> Iterator[Finding]:
    """What the manifest promises beyond bytes: every row is committed, weights are valid."""
    if (manifest.rows, manifest.dimension) != (spec.rows, spec.embedding.dimension) or state.committed_rows != spec.rows:
        message = (
            f"publishes {manifest.rows} x {manifest.dimension}, the spec has {spec.rows} x {spec.embedding.dimension}, "
            f"the journal committed {state.committed_rows} rows"
        )
        yield Finding(path=MANIFEST, message=message)
    for name in (basis_file(spec.embedding.basis), *row_files(spec)):
        if name not in manifest.files:
            yield Finding(path=MANIFEST, message=f"does not list {name}, which {SPEC} asks for")
    chunks = [chunk for window in state.windows.values() for chunk in window.chunks]
    if read.differs(CHUNKS, chunk_table(chunks)):
        yield Finding(path=CHUNKS, message="differs from the chunks in the journal")
    for name, values in sorted(read.values.items()):
        if (problem := values.problem(spec.rows)) is not None:
            yield Finding(path=name, message=problem)


def _look_at_links(root: Path, manifest: Manifest) -> tuple[list[Finding], list[str]]:
    """Links that lead elsewhere, and still do after a moment: a writer refreshes them right after it publishes.

    A copy in place of a link, or none, is only a note: not every file system or program that copies stores has links. The
    description of a copy of the rows may be there whether the copy still is or not.
    """
    links = dict(zip((WEIGHTS_LINK, METADATA_LINK), weights_paths(manifest.names[DEFAULT_WEIGHTS]), strict=True))
    astray, notes = dict(links), []
    for look in range(_LINK_LOOKS):
        time.sleep(_LINK_SECONDS if look else 0)
        astray = {link: target for link, target in astray.items() if not _leads_to(root / link, target)}
        for link, target in list(astray.items()):
            if file_problem(root, link, manifest.files[target]) is None:
                notes.append(f"{link} is a copy of {target}, not a link to it")
                del astray[link]
            elif link == METADATA_LINK and is_description(root, target):
                del astray[link]
        if not astray:
            break
    missing = [link for link in astray if not os.path.lexists(root / link)]
    notes += [f"{link} is missing, a link to {astray[link]}; embstore build --resume restores it" for link in missing]
    findings = [
        Finding(path=link, message=f"is not a link to {target}; embstore build --resume restores it")
        for link, target in astray.items()
        if link not in missing
    ]
    return findings, notes


def _leads_to(link: Path, target: str) -> bool:
    try:
        return link.readlink() == Path(target)
    except OSError:  # not a link, or missing
        return False


def _strays(
    root: Path, spec: StoreSpec | None, state: JournalState, manifest: Manifest | None, others: set[str]
) -> list[str]:
    """Notes on files that are neither the store's nor in ``others``; links are not followed, and there is no recursion."""
    known = others | {SPEC, MANIFEST, JOURNAL, RUNS, LOCK, REFUSED, CHUNKS, ARRAY_METADATA, *STAGE0_FILES}
    of_spec = {BASIS, COORDINATE_MAP, *ROW_FILES}
    known |= of_spec if spec is None else {basis_file(spec.embedding.basis), *row_files(spec)}
    known |= {WITHDRAWN, WEIGHTS_LINK, METADATA_LINK, *(manifest.files if manifest else ())}
    num_chunks = grid_of(spec).num_chunks if spec is not None else 0
    committed = {chunk.index for window in state.windows.values() for chunk in window.chunks}
    scratch = {WORK} if manifest is not None else {WORK, NEIGHBORS, WEIGHTS}
    strays: list[str] = []
    folders = [""]
    while folders and len(strays) <= _MOST_STRAYS:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:  # one entry at a time: there may be a million chunks
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders += [f"{name}/"] if name not in scratch else []
                    elif name not in known and (note := _stray(name, num_chunks, committed)) is not None:
                        strays.append(note)
                        if len(strays) > _MOST_STRAYS:
                            break
        except OSError as error:  # a path can be longer than the kernel accepts
            strays.append(f"{printable(folder)[:200]} cannot be read ({error.strerror})")
    if len(strays) > _MOST_STRAYS:
        return [*sorted(strays)[:_MOST_STRAYS], f"more than {_MOST_STRAYS} files do not belong to this store"]
    return sorted(strays)


def _stray(name: str, num_chunks: int, committed: Container[int]) -> str | None:
    """The note on a file that no record names, None for a committed chunk."""
    chunk = _CHUNK_NAME.fullmatch(name)
    if chunk is not None and int(chunk[1]) in committed:
        return None
    return f"{printable(name)} {_NO_FILE if chunk is None or int(chunk[1]) >= num_chunks else _NOT_COMMITTED}"
