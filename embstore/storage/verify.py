"""Read everything back and compare it with what was committed. Every finding names the file and what is wrong with it.

The journal says what was committed, the manifest what was published; each listed byte is covered by a checksum of one of
them. Rows are also decoded: finite, unit norm, NaN exactly where a failed row is on record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError, EmbstoreError
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
    WORK,
    FileDigest,
    Manifest,
    StoreSpec,
    array_metadata,
    chunk_name,
    decode_manifest,
    decode_spec,
    weights_paths,
)
from embstore.core.plan import grid_of
from embstore.core.records import JournalState, PromptsRecord, WindowRecord, chunk_table, decode_journal, replay
from embstore.core.rows import RowRange
from embstore.storage.chunks import check_chunk, decode_chunk
from embstore.storage.rowfiles import ROW_FILES, header_problem, slice_problem

NORM_TOLERANCE = 2e-3  # float16 rounding moves the norm of a unit row by about 2e-4
_READ_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as committed. ``window`` is set where recomputing that window mends it."""

    path: str
    message: str
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found. ``findings`` is damage; ``notes`` is not (a torn journal tail, stray files)."""

    is_complete: bool
    committed_rows: int
    total_rows: int
    files: int
    bytes: int
    findings: list[Finding]
    notes: list[str]


def check_stage0(root: Path, record: PromptsRecord) -> None:
    """Compare the stage-0 files with their commit; the first that differs is a CorruptStoreError."""
    for name, digest in record.files.items():
        problem = compare_file(root / name, digest)
        if problem is not None:
            raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root}; stage 0 cannot be recomputed")


def compare_file(path: Path, digest: FileDigest) -> str | None:
    """What is wrong with a file, or None; reads it once."""
    total, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                total.update(block)
                size += len(block)
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if size != digest.bytes:
        return f"has {size} bytes, committed were {digest.bytes}"
    if total.hexdigest() != digest.sha256:
        return f"has sha256 {total.hexdigest()[:16]}, committed was {digest.sha256[:16]}"
    return None


def damaged_windows(root: Path, spec: StoreSpec, state: JournalState) -> Iterator[tuple[int, str]]:
    """Committed windows whose bytes differ from their commit, with the first finding of each. Bound by the disk.

    Raises
    ------
    CorruptStoreError
        The basis or another file that every window is made with is not what was committed: no window can be computed again.
    """
    for name, digest in (state.spec.files if state.spec is not None else {}).items():
        problem = compare_file(root / name, digest)
        if problem is not None:
            raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root} --repair")
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
    content = (root / JOURNAL).read_bytes() if (root / JOURNAL).exists() else b""
    if not content and not (root / MANIFEST).exists():
        raise CorruptStoreError(f"{root} has no journal", hint="is this a store?")
    records, valid_bytes = decode_journal(content, name=JOURNAL)
    state = replay(records)
    manifest = _read_manifest(root, findings)
    is_complete = (root / MANIFEST).exists()
    if valid_bytes < len(content):
        torn = f"ends in a torn line of {len(content) - valid_bytes} bytes"
        if is_complete:
            findings.append(Finding(path=JOURNAL, message=torn))
        else:
            notes.append(f"{JOURNAL} {torn}: it was never acknowledged, a resume drops it")
    digests = _expected_digests(state, manifest, findings)
    total_bytes = 0
    for name, digest in digests.items():
        problem = compare_file(root / name, digest)
        if problem is not None and name not in ROW_FILES:  # those are reported by window below
            findings.append(Finding(path=name, message=problem))
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
    notes += [f"{name} is no file of this store" for name in _strays(root, spec, manifest)]
    return VerifyReport(
        is_complete=is_complete,
        committed_rows=state.committed_rows,
        total_rows=state.prompts.rows if state.prompts else 0,
        files=len(digests) + num_chunks,
        bytes=total_bytes,
        findings=findings,
        notes=notes,
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
    if not (root / MANIFEST).exists():
        return None
    try:
        content = (root / MANIFEST).read_bytes()
        manifest = decode_manifest(content)
    except CorruptStoreError as error:
        findings.append(Finding(path=MANIFEST, message=str(error)))
        return None
    if content != manifest.encode():
        findings.append(Finding(path=MANIFEST, message="is not spelled as it is written"))
    return manifest


def _read_spec(root: Path, state: JournalState, findings: list[Finding]) -> StoreSpec | None:
    if state.spec is None:
        if state.windows or (root / MANIFEST).exists():
            findings.append(Finding(path=JOURNAL, message="commits no spec, but there are rows or a manifest"))
        return None
    if compare_file(root / SPEC, state.spec.files[SPEC]) is not None:
        return None  # reported with the other digests
    try:
        spec = decode_spec((root / SPEC).read_bytes())
    except EmbstoreError as error:
        findings.append(Finding(path=SPEC, message=str(error)))
        return None
    if (root / ARRAY_METADATA).exists() and (root / ARRAY_METADATA).read_bytes() != array_metadata(spec):
        findings.append(Finding(path=ARRAY_METADATA, message="does not describe the array of spec.json"))
    return spec


def _window_findings(root: Path, spec: StoreSpec, record: WindowRecord, *, decode: bool) -> Iterator[Finding]:
    grid = grid_of(spec)
    rows = RowRange(record.start, record.stop)
    if grid.window(record.window) != rows or [chunk.index for chunk in record.chunks] != [
        index for index, _ in grid.chunks(record.window)
    ]:
        yield Finding(
            path=JOURNAL, message=f"window {record.window} does not fit the grid of spec.json", window=record.window
        )
        return
    failed = np.array([failed.row for failed in record.failed], dtype=np.int64)
    for chunk in record.chunks:
        path = chunk_name(chunk.index)
        try:
            data = (root / path).read_bytes()
            check_chunk(data, chunk)
        except FileNotFoundError:
            yield Finding(path=path, message="is missing", window=record.window)
            continue
        except (OSError, CorruptStoreError) as error:
            yield Finding(path=path, message=str(error), window=record.window)
            continue
        if decode:
            chunk_rows = grid.chunk(chunk.index)
            problem = _row_problem(data, spec, chunk_rows, failed)
            if problem is not None:
                yield Finding(path=path, message=problem, window=record.window)
    for name in ROW_FILES:
        problem = slice_problem(root, spec, name, record)
        if problem is not None:
            yield Finding(path=name, message=problem, window=record.window)


def _row_problem(data: bytes, spec: StoreSpec, rows: RowRange, failed: NDArray[np.int64]) -> str | None:
    emb_BV = decode_chunk(data, chunk_rows=spec.chunk_rows, dimension=spec.embedding.dimension, compressor=spec.compressor)
    is_failed = np.isin(np.arange(rows.start, rows.stop), failed)
    for start in range(0, rows.num_rows, 64):  # float64 norms of 64 rows at a time
        block = emb_BV[start : min(start + 64, rows.num_rows)].astype(np.float32)
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
        if (problem := compare_file(root / name, manifest.files[name])) is not None:
            yield Finding(path=name, message=problem)
    if (manifest.rows, manifest.dimension) != (spec.rows, spec.embedding.dimension) or state.committed_rows != spec.rows:
        message = (
            f"publishes {manifest.rows} x {manifest.dimension}, the spec has {spec.rows} x {spec.embedding.dimension}, "
            f"the journal committed {state.committed_rows} rows"
        )
        yield Finding(path=MANIFEST, message=message)
    chunks = [chunk for window in state.windows.values() for chunk in window.chunks]
    if (root / CHUNKS).exists() and (root / CHUNKS).read_bytes() != chunk_table(chunks):
        yield Finding(path=CHUNKS, message="is not the table of the journal's chunks")
    for digest in sorted(set(manifest.names.values())):
        name = weights_paths(digest)[0]
        weights = _load(root / name)
        if weights is None or weights.shape != (spec.rows,) or weights.dtype != np.float32:
            yield Finding(path=name, message=f"is no float32 vector of {spec.rows} rows")
        elif not (np.isfinite(weights).all() and (weights >= 0).all() and abs(weights.sum(dtype=np.float64) - 1) <= 1e-6):
            yield Finding(path=name, message="is not finite, non-negative and of sum 1")
    for link, target in zip((WEIGHTS_LINK, METADATA_LINK), weights_paths(manifest.names["default"]), strict=True):
        if not (root / link).is_symlink() or (root / link).readlink() != Path(target):
            yield Finding(path=link, message=f"does not link to {target}; run embstore build --resume")


def _load(path: Path) -> NDArray[np.float32] | None:
    try:
        array: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array


def _strays(root: Path, spec: StoreSpec | None, manifest: Manifest | None) -> Iterator[str]:
    known = {SPEC, MANIFEST, JOURNAL, RUNS, LOCK, BASIS, COORDINATES, RESIDUALS, CHUNKS, ARRAY_METADATA, *STAGE0_FILES}
    known |= {WEIGHTS_LINK, METADATA_LINK, *(manifest.files if manifest else ())}
    if spec is not None:
        known |= {chunk_name(index) for index in range(grid_of(spec).num_chunks)}
    unfinished = {NEIGHBORS, WEIGHTS} if manifest is None else set()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        top = name.split("/")[0]
        if path.is_dir() or name in known or top == WORK or top in unfinished:
            continue
        yield name
