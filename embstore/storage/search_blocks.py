"""Blocks of a long search, kept in ``work/`` so that a killed build goes on where it was; discarded at publication.

A block is a file: a header line (names, dtypes, shapes, crc32c of what follows), then the arrays as they lie in memory. It
is written beside its place and renamed. Nothing is synced: a block that a power cut tore fails its checksum and is
computed again, which costs less than the syncs would.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.format import canonical_json
from embstore.core.interfaces import Arrays
from embstore.storage.atomic import open_regular, remove_folder, storage_errors

_HEADER_BYTES = 1 << 16
KEPT_BLOCKS = "search-"  # how folders of blocks begin in work/: they outlive a writer
_DTYPES = frozenset({"<i4", "<i8", "<f4", "<f8", "|b1"})


class SearchBlocks:
    """Blocks of the search called ``digest`` below ``work``; what other searches left there is removed."""

    def __init__(self, work: Path, digest: str) -> None:
        self._folder = work / f"{KEPT_BLOCKS}{digest[:16]}"
        with storage_errors("cleaning", work):
            for other in work.glob(f"{KEPT_BLOCKS}*"):
                if other != self._folder:
                    remove_folder(other)

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """As ``core.blocks.BlockStore``: None also for a block that is not exactly what was saved."""
        try:
            handle = open_regular(self._folder, name)
        except (FileNotFoundError, CorruptStoreError):
            return None
        with open(handle, "rb") as file, storage_errors("reading", self._folder / name):
            content = file.read()
        header, separator, _ = content[:_HEADER_BYTES].partition(b"\n")
        payload = memoryview(content)[len(header) + 1 :]
        try:
            described = json.loads(header)
            if not separator or described["crc32c"] != google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)):
                return None
            arrays, offset = {}, 0
            for key, (dtype, shape) in described["arrays"].items():
                if dtype not in _DTYPES:
                    return None
                count = int(np.prod(shape, dtype=np.int64))
                arrays[key] = np.frombuffer(payload, dtype=dtype, count=count, offset=offset).reshape(shape)
                offset += arrays[key].nbytes
        except (ValueError, KeyError, TypeError):
            return None
        return arrays if offset == len(payload) else None

    def save(self, name: str, arrays: Arrays) -> None:
        """As ``core.blocks.BlockStore``.

        Raises
        ------
        StorageError
            The disk has no room, or fails.
        """
        parts = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}  # as the header will list them
        payload = b"".join(part.tobytes() for part in parts.values())
        header = {
            "arrays": {key: [part.dtype.str, list(part.shape)] for key, part in parts.items()},
            "crc32c": google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)),
        }
        path = self._folder / name
        with storage_errors("writing", path):
            self._folder.mkdir(exist_ok=True)
            beside = path.with_name(f"{name}.tmp")
            beside.write_bytes(canonical_json(header).encode() + b"\n" + payload)
            os.replace(beside, path)
