"""``.npy`` files of a store: written durably, mapped once they are what they must be, compared with their commit.

Never pickled, and never read by numpy's own reader, which evaluates the header as Python.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import HEADER_BYTES, decode_array_header
from embstore.core.errors import CorruptStoreError
from embstore.core.format import FileDigest
from embstore.storage.atomic import DurableFile, open_regular, storage_errors

_HINT = "run embstore verify STORE"


def save_array(path: Path, array: NDArray[np.generic], *, sync_directory: bool = True) -> FileDigest:
    """Publish an array as .npy (never pickled)."""
    with DurableFile(path, sync_directory=sync_directory) as file:
        file.write(array_header(array.dtype, array.shape))
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return file.digest


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The .npy header of a C-ordered array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def map_array(
    root: Path, name: str, dtype: str, shape: tuple[int | None, ...], *, mode: Literal["r", "c"] = "r"
) -> NDArray[Any]:
    """Memory map of a store's array, once its header and its file's size are what ``shape`` asks for.

    None in ``shape`` stands for any length that the file really has. ``mode`` "c" is copy-on-write, "r" read-only.

    Raises
    ------
    CorruptStoreError
        The file is missing, no regular file, or no such array.
    """
    with storage_errors("reading", root / name):
        try:
            handle = open_regular(root, name)
        except FileNotFoundError:
            raise CorruptStoreError(f"{name} is missing", hint=_HINT) from None
        with os.fdopen(handle, "rb") as file:
            return _map(file, name, dtype, shape, mode)


def _map(file: BinaryIO, name: str, dtype: str, shape: tuple[int | None, ...], mode: Literal["r", "c"]) -> NDArray[Any]:
    size, start = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), HEADER_BYTES, 0)
    found = decode_array_header(start, name=name)
    expected = tuple(length if wanted is None else wanted for wanted, length in zip(shape, found.shape, strict=False))
    if found.descr != dtype or found.shape != expected or len(found.shape) != len(shape) or found.is_fortran:
        message = f"{name} holds {found.descr} of shape {found.shape}, expected was {dtype} of shape {shape}"
        raise CorruptStoreError(message, hint=_HINT)
    needed = found.offset + np.dtype(dtype).itemsize * math.prod(found.shape)
    if size != needed:
        raise CorruptStoreError(f"{name} has {size} bytes, its header asks for {needed}", hint=_HINT)
    # by descriptor: what was looked at is what is mapped, also when a writer replaces it meanwhile
    return np.memmap(file, dtype=dtype, mode=mode, offset=found.offset, shape=found.shape)


def check_array(name: str, array: NDArray[Any], digest: FileDigest) -> None:
    """Compare a mapped array with the digest of its file; a difference is a CorruptStoreError. Price: one read of it."""
    # the header follows from dtype and shape: a file with another one is not what a writer made
    total = hashlib.sha256(array_header(array.dtype, array.shape))
    total.update(array.reshape(-1).view(np.uint8).data)
    if total.hexdigest() != digest.sha256:
        raise CorruptStoreError(
            f"{name} has sha256 {total.hexdigest()[:16]}, committed was {digest.sha256[:16]}", hint=_HINT
        )
