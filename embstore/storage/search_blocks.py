"""Blocks of a long search, kept in ``work/`` so that a killed build continues where it was; deleted at publication.

A block is a file: a checksum of what follows, then for each array its name and its ``.npy`` bytes. It is written under
another name and renamed. Nothing is synced: a block that a power cut tore fails its checksum and is computed again, which
costs less than the syncs would.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import HEADER_BYTES, decode_array_header
from embstore.core.errors import CorruptStoreError
from embstore.core.files import array_header, read_blocks, storage_errors
from embstore.core.interfaces import Arrays
from embstore.storage.atomic import remove_folder
from embstore.storage.chunks import crc32c

KEPT_BLOCKS = "search-"  # folders of blocks in work/ begin like this: they outlive a writer
_CHECKSUM_BYTES = 8


class SearchBlocks:
    """Blocks of the search called ``digest`` below ``work``; blocks of other searches are removed."""

    def __init__(self, work: Path, digest: str) -> None:
        self._folder = work / f"{KEPT_BLOCKS}{digest[:16]}"
        with storage_errors("cleaning", work):
            for other in work.glob(f"{KEPT_BLOCKS}*"):
                if other != self._folder:
                    remove_folder(other)

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under ``name``; None if there are none, or if the file is not exactly what was saved."""
        with storage_errors("reading", self._folder / name):
            try:
                content = b"".join(read_blocks(self._folder, name))
            except (FileNotFoundError, CorruptStoreError):
                return None
        checksum, rest = content[:_CHECKSUM_BYTES], memoryview(content)[_CHECKSUM_BYTES:]
        if checksum != crc32c(rest).encode():
            return None
        arrays = {}
        try:
            while rest:
                key, _, start = bytes(rest[: 2 * HEADER_BYTES]).partition(b"\n")
                header = decode_array_header(start[:HEADER_BYTES], name=name)
                offset, count = len(key) + 1 + header.offset, math.prod(header.shape)
                array = np.frombuffer(rest, header.descr, count, offset).reshape(header.shape)
                arrays[key.decode()], rest = array, rest[offset + array.nbytes :]
        except (CorruptStoreError, ValueError, OverflowError):
            return None
        return arrays

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under ``name``, in place of what was there.

        Raises
        ------
        StorageError
            The disk is full or fails.
        """
        parts: list[bytes] = []
        for key, array in arrays.items():
            parts += [f"{key}\n".encode(), array_header(array.dtype, array.shape), array.tobytes()]
        content = b"".join(parts)
        path = self._folder / name
        with storage_errors("writing", path):
            self._folder.mkdir(exist_ok=True)
            temp = path.with_name(f"{name}.tmp")
            temp.write_bytes(crc32c(content).encode() + content)
            os.replace(temp, path)
