"""Scratch arrays in mapped files: their pages are not anonymous memory, and a full disk raises an error, not SIGBUS."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import format_bytes
from embstore.core.errors import StorageError

Scalar = TypeVar("Scalar", bound=np.generic)

_ZEROS = bytes(1 << 20)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


_SMALL_BYTES = 4 << 20
_BLOCK_VALUES = 1 << 17


def block_rows(rank: int) -> int:
    """Rows of R coordinates to process at a time: 1 MiB as float64 for any R."""
    return max(1, _BLOCK_VALUES // max(1, rank))


def large_array(path: Path, shape: tuple[int, ...], dtype: type[Scalar]) -> NDArray[Scalar]:
    """Zeros for the caller to fill: up to 4 MiB in anonymous memory, larger arrays as in ``map_scratch``."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= _SMALL_BYTES:
        return np.zeros(shape, dtype=dtype)
    return map_scratch(path, shape, dtype)


def map_scratch(path: Path, shape: tuple[int, ...], dtype: type[Scalar]) -> NDArray[Scalar]:
    """A writable map of zeros in a new .npy file whose blocks are all reserved.

    Writing to a page of a sparse file when the disk is full kills the process (SIGBUS), so all blocks are reserved before
    the file is mapped.

    Raises
    ------
    StorageError
        The disk is full, or fails.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with path.open("wb+") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            )
            _reserve(file, size)
    except OSError as error:
        failure = StorageError(
            f"reserving {format_bytes(size)} in {path} failed: {error.strerror}",
            hint="free some space, then run the command again",
        )
        failure.errno = error.errno
        raise failure from error
    array: NDArray[Scalar] = np.load(path, mmap_mode="r+", allow_pickle=False)
    return array


def _reserve(file: BinaryIO, size: int) -> None:
    """Extend ``file`` by ``size`` bytes and reserve their blocks on the disk."""
    file.flush()
    if hasattr(os, "posix_fallocate"):  # missing on macOS
        try:
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:  # some C libraries do not emulate it on file systems that lack it
                raise
        else:
            return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
