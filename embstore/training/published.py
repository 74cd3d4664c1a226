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

from embstore.core.decode import parse_json
from embstore.core.errors import CorruptStoreError, IncompleteStoreError, StoreNotFoundError
from embstore.core.files import check_array, check_content, map_array, read_committed, read_if_present
from embstore.core.format import ALIASES, JOURNAL, KEYS, MANIFEST, Manifest, parse_document


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
