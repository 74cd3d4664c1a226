"""``inspect`` and ``verify`` as values: what a store is, how far it is, what its weights say. No torch, no search.

``inspect`` reads metadata, prompts, distances and weights, never rows: well under a second, also on an unfinished store. In
memory are a few numbers a row (docs/limits.md), also with ``by``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.density import mean_distance
from embstore.core.errors import EmbstoreError
from embstore.core.events import Observer, ignore
from embstore.core.files import read_committed
from embstore.core.format import (
    ARRAY_METADATA,
    DEFAULT_WEIGHTS,
    JOURNAL,
    MANIFEST,
    METADATA_LINK,
    SPEC,
    WEIGHTS,
    WEIGHTS_LINK,
    JsonObject,
    decode_manifest,
    weights_paths,
)
from embstore.core.plan import grid_of
from embstore.core.records import DemotedRecord
from embstore.flow.artifact import extremes
from embstore.storage.journal import SYNCS_FOLDERS, read_journal, require_store, run_entries
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store, unfinished
from embstore.storage.verify import ONLY_A_NEW_BUILD, VerifyReport, verify_store
from embstore.storage.writer import StoreWriter, lock_store
from embstore.views.field_values import FieldValues, OtherValues, Share

_EXCERPT_CHARACTERS = 100
_HISTOGRAM_BINS = 16
# findings that leave the manifest in place: a resume cannot recompute these, or opening a writer repairs them
_NOT_BY_A_RESUME = ONLY_A_NEW_BUILD | {JOURNAL, WEIGHTS_LINK, METADATA_LINK}


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptInfo:
    """One prompt: ``mean_distance`` to its k nearest distinct vectors, ``weight`` in units of the mean."""

    row: int
    id: str
    mean_distance: float
    weight: float
    multiplicity: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreInfo:
    """What ``embstore inspect`` prints; ``--json`` prints the same fields.

    ``weights_histogram`` counts rows between ``histogram_edges``, which are weights in units of the mean weight; the last
    bin also counts everything above it. ``shares`` are those of the field's 1,000 heaviest values, ``other_values`` those of
    the rest together. ``survives_power_cuts`` is false if the store was written on a file system that cannot sync folders.
    """

    path: str
    is_complete: bool
    stage: str
    committed_rows: int
    total_rows: int
    committed_windows: int
    total_windows: int
    lines: int
    quarantined_lines: int
    repeated_lines: int
    failed_rows: int
    reused_rows: int
    stored_bytes: int
    survives_power_cuts: bool
    spec: JsonObject | None = None
    metadata: JsonObject | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    weights_histogram: list[int] = dataclasses.field(default_factory=list)
    histogram_edges: list[float] = dataclasses.field(default_factory=list)
    rarest: list[PromptInfo] = dataclasses.field(default_factory=list)
    most_crowded: list[PromptInfo] = dataclasses.field(default_factory=list)
    shares: list[Share] = dataclasses.field(default_factory=list)
    other_values: OtherValues | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborInfo:
    """One neighbour of a prompt."""

    id: str
    row: int
    distance: float
    text: str


def inspect(path: str | Path, *, by: str | None = None, name: str = "default", count: int = 3) -> StoreInfo:
    """Describe a store, finished or not.

    Parameters
    ----------
    path
        The store's folder.
    by
        A field of the input lines (such as ``src``): adds the share of rows and of weight for each of its values, or for the
        1,000 heaviest and all others together. Reads every prompt.
    name
        Which weighting to describe.
    count
        How many of the rarest and of the most crowded prompts.

    Raises
    ------
    StoreNotFoundError, CorruptStoreError, IdentityMismatchError
        There is no store, a file that is read is damaged, or the format version differs.
    IncompleteStoreError
        ``by`` or ``name`` was given, and the store has no weights yet.
    """
    root = Path(path)
    require_store(root)
    state = read_journal(root)
    prompts = state.prompts
    store = open_store(root, partial=True) if state.spec is not None or os.path.lexists(root / MANIFEST) else None
    info = StoreInfo(
        path=str(root),
        is_complete=store is not None and store.is_complete,
        stage=_stage(store, prompts is not None),
        committed_rows=state.committed_rows,
        total_rows=prompts.rows if prompts else 0,
        committed_windows=len(state.windows),
        total_windows=grid_of(store.spec).num_windows if store else 0,
        lines=prompts.lines if prompts else 0,
        quarantined_lines=prompts.quarantined if prompts else 0,
        repeated_lines=prompts.repeats if prompts else 0,
        failed_rows=len(state.failed),
        reused_rows=sum(rows.num_rows for rows in state.reused),
        stored_bytes=sum(chunk.bytes for window in state.windows.values() for chunk in window.chunks),
        survives_power_cuts=all(entry.get(SYNCS_FOLDERS) is not False for entry in run_entries(root)),
        spec=dataclasses.asdict(store.spec) if store else None,
    )
    if store is None or store.manifest is None:
        if by is not None or name != DEFAULT_WEIGHTS:
            raise unfinished(root, state)
        return info
    # before any array: it proves that the rows exist, so what follows takes memory in proportion to the disk
    table = store.prompts
    metadata = store.named_metadata(name)
    weights_N = store.named_weights(name)
    spread = FieldValues.read(by, table).spread(table, weights_N) if by is not None else None
    num_vectors = int(np.count_nonzero(store.groups >= 0))
    counts, edges = _histogram(weights_N, num_vectors)
    distance_N = mean_distance(store.neighbor_distances, metadata["weighting"]["k"])
    rarest, most_crowded = extremes(distance_N, count)
    return dataclasses.replace(
        info,
        metadata=metadata,
        names=store.manifest.names,
        weights_histogram=[int(value) for value in counts],
        histogram_edges=[float(value) for value in edges],
        rarest=_describe(store, table, rarest, distance_N, weights_N, num_vectors),
        most_crowded=_describe(store, table, most_crowded, distance_N, weights_N, num_vectors),
        shares=spread.shares if spread is not None else [],
        other_values=spread.others if spread is not None else None,
    )


def neighbors_of(path: str | Path, prompt_id: str, *, count: int = 10) -> list[NeighborInfo]:
    """Nearest distinct prompts of one prompt, nearest first (``embstore inspect --neighbors ID``)."""
    store = open_store(path)
    table = store.prompts  # before any array, as in inspect
    row = store.row_of(prompt_id)
    rows, distances = store.neighbor_ids[row][:count], store.neighbor_distances[row][:count]
    found = [(int(near), float(far)) for near, far in zip(rows, distances, strict=True) if near >= 0]
    return [
        NeighborInfo(id=str(prompt.id), row=near, distance=far, text=_excerpt(prompt.rendered))
        for (near, far), prompt in zip(found, table.sample([near for near, _ in found]), strict=True)
    ]


def verify(path: str | Path, *, repair: bool = False, observer: Observer = ignore) -> VerifyReport:
    """Check every checksum, finiteness, norms and strays.

    Parameters
    ----------
    path
        The store's folder.
    repair
        Unpublish a damaged store and demote its damaged windows, so that ``build --resume`` recomputes the damage: those
        windows only, neighbours, weights, small files. Prompts, spec and basis, which only a new build could make, are not
        touched. Sound weightings are published again, the default as ``default@DIGEST`` if the resume makes another. If
        only other weights than the default are damaged, they are dropped and the store stays finished.
    observer
        Called with the progress, ``core.events``; must return quickly.

    Returns
    -------
    VerifyReport
        Findings before the repair.

    Raises
    ------
    StoreNotFoundError, CorruptStoreError, IdentityMismatchError, StoreLockedError
    """
    root = Path(path)
    require_store(root)
    if not repair:
        return _verify_standing(root, observer)
    lock = lock_store(root)
    try:
        report = verify_store(root, observer)  # before the writer cleans up after a dead one
        lacks_commits = report.is_complete and not 0 < report.total_rows == report.committed_rows
        resumed = {finding.path for finding in report.findings} - _NOT_BY_A_RESUME
        lost = [] if lacks_commits else _lost_weights(root, resumed)
    except BaseException:
        lock.release()
        raise
    with StoreWriter(root, resume=True, lock=lock) as writer:
        if lost:
            writer.publish(decode_manifest(read_committed(root, MANIFEST)).without(lost))
            return dataclasses.replace(report, dropped=lost)
        if lacks_commits or resumed:
            writer.withdraw()
        damaged = {finding.window: finding for finding in report.findings if finding.window is not None}
        for window, finding in sorted(damaged.items()):
            writer.commit(DemotedRecord(window=window, reason=f"{finding.path}: {finding.message}"))
        if {ARRAY_METADATA, SPEC} & {finding.path for finding in report.findings} == {ARRAY_METADATA}:
            writer.restore_array_metadata()
    return report


def _lost_weights(root: Path, damaged: set[str]) -> list[str]:
    """Names of the weights to which all damaged files belong; none if the default or anything else is damaged, too."""
    if not damaged or not all(path.startswith(f"{WEIGHTS}/") for path in damaged):
        return []
    names = decode_manifest(read_committed(root, MANIFEST)).names
    lost = sorted(name for name, digest in names.items() if damaged & {*weights_paths(digest)})
    return [] if DEFAULT_WEIGHTS in lost else lost


def _verify_standing(root: Path, observer: Observer) -> VerifyReport:
    """A report on one published version: read again if a writer published another meanwhile."""
    while True:
        before = _manifest_bytes(root)
        report = verify_store(root, observer)
        if not report.findings or _manifest_bytes(root) == before:
            return report


def _manifest_bytes(root: Path) -> bytes | None:
    with contextlib.suppress(EmbstoreError):  # missing or damaged: verify_store reports it
        return read_committed(root, MANIFEST)
    return None


def _stage(store: EmbeddingStore | None, has_prompts: bool) -> str:
    if store is None:
        return "prompts committed" if has_prompts else "empty"
    if store.is_complete:
        return "complete"
    return "rows committed, weights missing" if store.journal.committed_rows == store.num_rows else "embedding"


def _histogram(weights_N: NDArray[np.float32], num_vectors: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and edges, in units of the mean weight."""
    relative_N = weights_N.astype(np.float64)
    relative_N *= num_vectors
    # the last bin holds everything above it, so that a few outliers do not squeeze the rest
    top = max(2.0, float(np.quantile(relative_N, 0.999)))
    np.minimum(relative_N, top, out=relative_N)
    return np.histogram(relative_N, bins=_HISTOGRAM_BINS, range=(0, top))


def _describe(
    store: EmbeddingStore,
    table: PromptTable,
    rows: list[int],
    distance_N: NDArray[np.float64],
    weights_N: NDArray[np.float32],
    num_vectors: int,
) -> list[PromptInfo]:
    return [
        PromptInfo(
            row=row,
            id=str(prompt.id),
            mean_distance=float(distance_N[row]),
            weight=float(weights_N[row]) * num_vectors,
            multiplicity=int(store.multiplicity[row]),
            text=_excerpt(prompt.rendered),
        )
        for row, prompt in zip(rows, table.sample(rows), strict=True)
    ]


def _excerpt(text: str) -> str:
    flat = " ".join(text[: 4 * _EXCERPT_CHARACTERS].split())
    return flat if len(flat) <= _EXCERPT_CHARACTERS else flat[: _EXCERPT_CHARACTERS - 1] + "…"
