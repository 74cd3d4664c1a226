"""Read everything back and compare it with what was committed. Every finding names the file and what is wrong with it.

The journal says what was committed, the manifest what was published; each listed byte is covered by a checksum of one of
them. Rows are also decoded: finite, unit norm, NaN exactly where a failed row is on record.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable
from embstore.core.errors import CorruptStoreError, EmbstoreError, StorageError
from embstore.core.format import (
    ARRAY_METADATA,
    BASIS,
    CHUNKS,
    COORDINATES,
    JOURNAL,
    LOCK,
    MANIFEST,
    METADATA_LINK,
    NEIGHBORS,
    RESIDUALS,
    RUNS,
    SPEC,
    STAGE0_FILES,
    WEIGHTS,
    WEIGHTS_LINK,
    WITHDRAWN,
    WORK,
    FileDigest,
    Manifest,
    chunk_name,
    decode_manifest,
    weights_paths,
    weights_problem,
)
from embstore.core.plan import grid_of, misfit
from embstore.core.records import JournalState, PromptsRecord, WindowRecord, chunk_table, decode_journal, replay
from embstore.core.spec import StoreSpec, array_metadata, decode_spec
from embstore.storage.arrays import map_array
from embstore.storage.atomic import file_size, read_blocks, read_committed, reading_problem
from embstore.storage.chunks import decode_chunk, read_chunk
from embstore.storage.journal import journal_bytes
from embstore.storage.rowfiles import ROW_FILES, header_problem, slice_problem

NORM_TOLERANCE = 2e-3  # float16 rounding moves the norm of a unit row by about 2e-4
# every row depends on them, and nothing that is left says what they were
ONLY_A_NEW_BUILD = frozenset({*STAGE0_FILES, SPEC, BASIS})
_ONLY_ANEW = "; it cannot be made again: take it from a copy of the store, or build into another --out"
_NO_FILE = "is no file of this store"
_NOT_COMMITTED = "is not committed: it is never read, and a resume computes it again"
_NORM_VALUES = 4 << 20
_MOST_STRAYS = 1000
_CHUNK_NAME = re.compile(re.escape(chunk_name(0)).replace("0", r"(0|[1-9]\d{0,9})", 1))
_LINK_LOOKS, _LINK_SECONDS = 10, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as committed. ``window`` is set where recomputing that window mends it."""

    path: str
    message: str
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found. ``findings`` is damage; ``notes`` is not (a torn journal tail, stray files).

    ``reused`` are the rows that were copied from other stores, as ranges [start, stop) in row order.
    """

    is_complete: bool
    committed_rows: int
    total_rows: int
    files: int
    bytes: int
    findings: list[Finding]
    notes: list[str]
    reused: list[tuple[int, int]]


def check_stage0(root: Path, record: PromptsRecord) -> None:
    """Compare the stage-0 files with their commit; the first that differs is a CorruptStoreError."""
    for name, digest in record.files.items():
        problem = compare_file(root, name, digest)
        if problem is not None:
            raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root}; stage 0 cannot be recomputed")


def compare_file(root: Path, name: str, digest: FileDigest) -> str | None:
    """What is wrong with a file of a store, or None; reads it once, or not at all if its size differs."""
    total = hashlib.sha256()
    try:
        if (size := file_size(root, name)) != digest.bytes:
            return "is missing" if size is None else f"has {size} bytes, committed were {digest.bytes}"
        for block in read_blocks(root, name):
            total.update(block)
    except CorruptStoreError as error:
        return str(error)
    except OSError as error:
        return reading_problem(root, name, error)
    found = total.hexdigest()
    if found != digest.sha256:
        width = 16 if found[:16] != digest.sha256[:16] else len(found)  # the digest itself may be what was damaged
        return f"has sha256 {found[:width]}, committed was {digest.sha256[:width]}"
    return None


def damaged_windows(root: Path, spec: StoreSpec, state: JournalState) -> Iterator[tuple[int, str]]:
    """Committed windows whose bytes differ from their commit, with the first finding of each. Bound by the disk.

    Raises
    ------
    CorruptStoreError
        The basis or another file that every window is made with is not what was committed: no window can be computed again.
    """
    for name, digest in (state.spec.files if state.spec is not None else {}).items():
        problem = compare_file(root, name, digest)
        if problem is not None:
            is_made_again = name not in ONLY_A_NEW_BUILD
            hint = f"run embstore verify {root} --repair" if is_made_again else "build into another --out"
            raise CorruptStoreError(f"{name} {problem}{'' if is_made_again else _ONLY_ANEW}", hint=hint)
    for record in state.windows.values():
        finding = next(_window_findings(root, spec, record, decode=False), None)
        if finding is not None:
            yield record.window, f"{finding.path}: {finding.message}"


def verify_store(root: Path) -> VerifyReport:
    """Check every checksum, and rows for finiteness and norm. Memory: one chunk.

    Raises
    ------
    EmbstoreError
        The store cannot be judged at all: no journal, another format version, or damage in the middle of the journal.
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
            notes.append(f"{JOURNAL} {torn}: it was never acknowledged, a resume drops it")
    digests = _expected_digests(state, manifest, findings)
    total_bytes = 0
    for name, digest in digests.items():
        problem = compare_file(root, name, digest)
        if problem is not None and name not in ROW_FILES:  # those are reported by window below
            findings.append(Finding(path=name, message=f"{problem}{_ONLY_ANEW if name in ONLY_A_NEW_BUILD else ''}"))
        total_bytes += digest.bytes
    spec = _read_spec(root, state, findings)
    num_chunks = 0
    if spec is not None:
        findings += [
            Finding(path=name, message=problem)
            for name in ROW_FILES
            if (problem := header_problem(root, spec, name)) is not None
        ]
        for window in state.windows.values():
            findings += _window_findings(root, spec, window, decode=True)
            num_chunks += len(window.chunks)
            total_bytes += sum(chunk.bytes for chunk in window.chunks)
        if manifest is not None:
            findings += _published_findings(root, spec, state, manifest)
    notes += _strays(root, spec, state, manifest)
    return VerifyReport(
        is_complete=is_complete,
        committed_rows=state.committed_rows,
        total_rows=state.prompts.rows if state.prompts else 0,
        files=len(digests) + num_chunks,
        bytes=total_bytes,
        findings=findings,
        notes=notes,
        reused=[(rows.start, rows.stop) for rows in state.reused],
    )


def _expected_digests(state: JournalState, manifest: Manifest | None, findings: list[Finding]) -> dict[str, FileDigest]:
    """Digests of all listed files: the journal's word, and the manifest's for what was made after the rows."""
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
        findings.append(Finding(path=MANIFEST, message="is not spelled as it is written"))
    return manifest


def _read_spec(root: Path, state: JournalState, findings: list[Finding]) -> StoreSpec | None:
    if state.spec is None:
        if state.windows or os.path.lexists(root / MANIFEST):
            findings.append(Finding(path=JOURNAL, message="commits no spec, but there are rows or a manifest"))
        return None
    if compare_file(root, SPEC, state.spec.files[SPEC]) is not None:
        return None  # reported with the other digests
    try:
        spec = decode_spec(read_committed(root, SPEC))
    except EmbstoreError as error:
        problem = reading_problem(root, SPEC, error) if isinstance(error, StorageError) else str(error)
        findings.append(Finding(path=SPEC, message=problem))
        return None
    if _differs(root, ARRAY_METADATA, array_metadata(spec)):
        findings.append(Finding(path=ARRAY_METADATA, message="does not describe the array of spec.json"))
    if state.prompts is None or state.prompts.rows != spec.rows:
        findings.append(Finding(path=JOURNAL, message=f"does not commit the prompts of the {spec.rows} rows of {SPEC}"))
    return spec


def _window_findings(root: Path, spec: StoreSpec, record: WindowRecord, *, decode: bool) -> Iterator[Finding]:
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
            problem = _row_problem(data, spec, chunk.index, failed) if decode else None
        except CorruptStoreError as error:
            problem = str(error)
        except StorageError as error:
            problem = reading_problem(root, path, error)
        if problem is not None:
            yield Finding(path=path, message=problem, window=record.window)
    for name in ROW_FILES:
        problem = slice_problem(root, spec, name, record)
        if problem is not None:
            yield Finding(path=name, message=problem, window=record.window)


def _row_problem(data: bytes, spec: StoreSpec, index: int, failed: NDArray[np.int64]) -> str | None:
    rows = grid_of(spec).chunk(index)
    emb_BV = decode_chunk(data, spec, index)
    is_failed = np.isin(np.arange(rows.start, rows.stop), failed)
    step = max(1, _NORM_VALUES // spec.embedding.dimension)  # rows whose norms are taken at a time
    for start in range(0, rows.num_rows, step):
        block = emb_BV[start : min(start + step, rows.num_rows)].astype(np.float32)
        expected_nan = is_failed[start : start + len(block)]
        norms = np.sqrt(np.einsum("bv,bv->b", block, block, dtype=np.float64))
        bad = np.where(expected_nan, ~np.isnan(block).all(axis=1), ~(np.abs(norms - 1) < NORM_TOLERANCE))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            kind = "should be NaN (it failed)" if expected_nan[first] else f"has norm {norms[first]:.6g}, not 1"
            return f"row {rows.start + start + first} {kind}"
    return None


def _published_findings(root: Path, spec: StoreSpec, state: JournalState, manifest: Manifest) -> Iterator[Finding]:
    """What the manifest promises beyond bytes: every row committed, row files as sealed, weights valid, links in place."""
    for name in ROW_FILES:
        if (problem := compare_file(root, name, manifest.files[name])) is not None:
            yield Finding(path=name, message=problem)
    if (manifest.rows, manifest.dimension) != (spec.rows, spec.embedding.dimension) or state.committed_rows != spec.rows:
        message = (
            f"publishes {manifest.rows} x {manifest.dimension}, the spec has {spec.rows} x {spec.embedding.dimension}, "
            f"the journal committed {state.committed_rows} rows"
        )
        yield Finding(path=MANIFEST, message=message)
    chunks = [chunk for window in state.windows.values() for chunk in window.chunks]
    if _differs(root, CHUNKS, chunk_table(chunks)):
        yield Finding(path=CHUNKS, message="is not the table of the journal's chunks")
    for digest in sorted(set(manifest.names.values())):
        name = weights_paths(digest)[0]
        try:
            problem = weights_problem(map_array(root, name, "<f4", (spec.rows,)))
        except CorruptStoreError as error:
            problem = str(error)
        except StorageError as error:
            problem = reading_problem(root, name, error)
        if problem is not None:
            yield Finding(path=name, message=problem)
    yield from _link_findings(root, manifest)


def _link_findings(root: Path, manifest: Manifest) -> list[Finding]:
    """Links that lead elsewhere, and still do after a moment: a writer refreshes them right after its flip."""
    targets = zip((WEIGHTS_LINK, METADATA_LINK), weights_paths(manifest.names["default"]), strict=True)
    astray = dict(targets)
    for look in range(_LINK_LOOKS):
        time.sleep(_LINK_SECONDS if look else 0)
        astray = {link: target for link, target in astray.items() if not _leads_to(root / link, target)}
        if not astray:
            break
    return [
        Finding(path=link, message=f"does not link to {target}; run embstore build --resume")
        for link, target in astray.items()
    ]


def _leads_to(link: Path, target: str) -> bool:
    try:
        return link.readlink() == Path(target)
    except OSError:  # no link, or nothing there
        return False


def _differs(root: Path, name: str, expected: bytes) -> bool:
    """Whether a file's bytes are others than follow from the rest of the store; its digest says if it cannot be read."""
    try:
        return file_size(root, name) != len(expected) or read_committed(root, name, limit=len(expected)) != expected
    except StorageError as error:
        reading_problem(root, name, error)
    except CorruptStoreError:
        pass
    return False


def _strays(root: Path, spec: StoreSpec | None, state: JournalState, manifest: Manifest | None) -> list[str]:
    """Notes on what lies in the folder and is no file of the store; links are not followed, and there is no recursion."""
    known = {SPEC, MANIFEST, JOURNAL, RUNS, LOCK, BASIS, COORDINATES, RESIDUALS, CHUNKS, ARRAY_METADATA, *STAGE0_FILES}
    known |= {WITHDRAWN, WEIGHTS_LINK, METADATA_LINK, *(manifest.files if manifest else ())}
    num_chunks = grid_of(spec).num_chunks if spec is not None else 0
    committed = {chunk.index for window in state.windows.values() for chunk in window.chunks}
    scratch = {WORK} if manifest is not None else {WORK, NEIGHBORS, WEIGHTS}
    strays: list[str] = []
    folders = [""]
    while folders and len(strays) < _MOST_STRAYS:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                listed = [(f"{folder}{entry.name}", entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:  # a path can be made longer than the kernel takes
            strays.append(f"{printable(folder)[:200]} cannot be read ({error.strerror})")
            continue
        folders += [f"{name}/" for name, is_folder in listed if is_folder and name not in scratch]
        files = [name for name, is_folder in listed if not is_folder and name not in known]
        chunks = {name: _CHUNK_NAME.fullmatch(name) for name in files}
        strays += [
            f"{printable(name)} {_NO_FILE if chunk is None or int(chunk[1]) >= num_chunks else _NOT_COMMITTED}"
            for name, chunk in chunks.items()
            if chunk is None or int(chunk[1]) not in committed
        ]
    if len(strays) > _MOST_STRAYS:
        return [*sorted(strays)[:_MOST_STRAYS], f"more than {_MOST_STRAYS} files are none of this store"]
    return sorted(strays)
