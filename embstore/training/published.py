"""What training reads from a finished store in addition to its weights: manifest, metadata, row keys, aliases. numpy only.

Shapes: N rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import parse_json, shown
from embstore.core.errors import CorruptStoreError, EmbstoreError, IncompleteStoreError, StoreNotFoundError
from embstore.core.files import check_array, check_content, map_array, read_committed, read_if_present
from embstore.core.format import ALIASES, JOURNAL, KEYS, MANIFEST, Manifest, decode_manifest, parse_document, weights_paths


def read_manifest(root: Path) -> bytes:
    """Bytes of the manifest; a folder without one is an unfinished store, or not a store."""
    content = read_if_present(root, MANIFEST)
    if content is not None:
        return content
    if os.path.lexists(root / JOURNAL):
        raise IncompleteStoreError(
            f"{root} is not finished: no weights are published", hint=f"run embstore build --resume --out {root}"
        )
    raise StoreNotFoundError(f"{root} is not a store", hint="run embstore build PROMPTS --model MODEL --out STORE")


def read_metadata(root: Path, sidecar: str, manifest: Manifest) -> Mapping[str, object]:
    """Metadata of one weighting, compared with its digest."""
    content = read_committed(root, sidecar)
    check_content(root, sidecar, [content], manifest.files[sidecar])
    return parse_document(content, name=sidecar)


def read_keys(root: Path, manifest: Manifest, *, full: bool) -> NDArray[np.uint64]:
    """Row keys uint64 [N] in row order, a read-only map; ``full`` compares them with their digest."""
    keys_N = map_array(root, KEYS, "<u8", (manifest.rows,))
    if full:
        check_array(root, KEYS, keys_N, manifest.files[KEYS])
    return keys_N


def read_aliases(root: Path, manifest: Manifest) -> dict[str, int]:
    """Row of every input id and every row id. Price: the whole file is parsed, about 2 us an id."""
    content = read_committed(root, ALIASES, limit=None)
    check_content(root, ALIASES, [content], manifest.files[ALIASES])
    value: Any = parse_json(content, name=ALIASES)
    if not isinstance(value, dict) or not all(type(row) is int and 0 <= row < manifest.rows for row in value.values()):
        raise CorruptStoreError(
            f"{ALIASES} does not map ids to rows below {manifest.rows}", hint=f"run embstore verify {root}"
        )
    return value


def where_saved_weights_are(own: Path, weighting: object, fingerprint: object) -> str | None:
    """How to load the weights of a saved run: of those in the store of the file ``own``, by digest or by their bytes.

    None if that store cannot be read.
    """
    root = own.parents[1]
    try:
        manifest = decode_manifest(read_manifest(root))
    except (EmbstoreError, OSError):
        return None
    listed = {digest: manifest.files[weights_paths(digest)[0]].sha256 for digest in manifest.names.values()}
    digest = weighting if weighting is not None else next((each for each in listed if listed[each] == fingerprint), None)
    if digest is None:
        return (
            f"embstore weights {root} --list shows the weights that the store has: if the saved run had one of them, it is "
            f"loaded by load_weights({str(root)!r}, name=NAME)"
        )
    if digest == own.stem:
        return (
            "the saved run had the same weights of the store: join them to the same dataset in the same order, and temper "
            "them in the same way"
        )
    name = next((name for name, each in manifest.names.items() if each == digest), None)
    if name is None:
        return (
            f"the saved run had the weights {shown(digest)}, which {root} does not have: they were dropped, or belong to "
            "another store"
        )
    return (
        f"the saved run had other weights of the store: load_weights({str(root)!r}, name={name!r}), then join them as before"
    )
