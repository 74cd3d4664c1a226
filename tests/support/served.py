"""What a store that was cut off serves, held against an uninterrupted build of the same prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embstore.core.errors import CorruptStoreError, EmbstoreError
from embstore.core.format import MANIFEST, METADATA_LINK, WEIGHTS_LINK, decode_manifest
from embstore.storage.journal import read_journal
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.stores import snapshot

Window = tuple[int, int]


def committed_windows(store: Path) -> set[Window]:
    """Windows (start, stop) that the journal of a store holds, which may not exist yet."""
    return {(window.start, window.stop) for window in read_journal(store).windows.values()}


def what_is_wrong(
    store: Path,
    reference: Path,
    acknowledged: set[Window],
    *,
    is_finished: bool = False,
    damaged: frozenset[Window] = frozenset(),
) -> list[str]:
    """What a store breaks of the promise, a line each: an acknowledged window that is gone, anything served that is wrong.

    ``is_finished``: the end of the build was acknowledged, so the store is published, and its links lead where they should.
    ``damaged``: windows whose chunks were damaged on purpose; reading them may be refused, and repair may take them back.
    """
    try:
        lost = acknowledged - damaged - committed_windows(store)
        found = [f"window {start} to {stop} was acknowledged and is not in the journal" for start, stop in sorted(lost)]
        if is_finished and not (store / MANIFEST).exists():
            found.append("the end was acknowledged, and nothing is published")
        if read_journal(store).spec is None:
            return found
        opened = open_store(store, partial=True)
        found += _wrong_rows(opened, open_store(reference), damaged)
        if opened.is_complete and not damaged:
            found += _wrong_listed(store, reference, links=is_finished)
        return found
    except EmbstoreError as error:
        return [f"{error.kind}: {error}"]


def _wrong_rows(opened: EmbeddingStore, whole: EmbeddingStore, damaged: frozenset[Window]) -> list[str]:
    found = []
    for window in opened.journal.windows.values():
        rows = slice(window.start, window.stop)
        try:
            same = [
                opened.rows(opened.ids[rows]).tobytes() == whole.rows(whole.ids[rows]).tobytes(),
                opened.coordinates[rows].tobytes() == whole.coordinates[rows].tobytes(),
                opened.residuals[rows].tobytes() == whole.residuals[rows].tobytes(),
                np.array_equal(np.asarray(opened.sequences)[rows], np.asarray(whole.sequences)[rows]),
            ]
        except CorruptStoreError:
            if (window.start, window.stop) not in damaged:
                raise
            continue
        if not all(same):
            found.append(f"rows {window.start} to {window.stop - 1} are served, and wrong")
    return found


def _wrong_listed(store: Path, reference: Path, *, links: bool) -> list[str]:
    """A published store: every file that the manifest lists, and the weights that training maps.

    ``links`` are refreshed after the flip: a crash between the two leaves them as they were.
    """
    ignored = () if links else (WEIGHTS_LINK, METADATA_LINK)
    findings = [finding for finding in verify(store).findings if finding.path not in ignored]
    found = [f"published, but {finding.path} {finding.message}" for finding in findings]
    load_weights(store)  # checks digest, length and sum
    listed, have = snapshot(reference), snapshot(store)
    names = [MANIFEST, *decode_manifest((store / MANIFEST).read_bytes()).files]
    found += [f"published, but {name} is not the uninterrupted build's" for name in names if have[name] != listed.get(name)]
    return found
