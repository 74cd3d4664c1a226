"""Scratch arrays in mapped files: their pages are not anonymous memory, and a full disk is an error, never a bus error."""

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
    """Rows of R coordinates that are worked on at once: 1 MiB as float64, whatever R is."""
    return max(1, _BLOCK_VALUES // max(1, rank))


def large_array(path: Path, shape: tuple[int, ...], dtype: type[Scalar]) -> NDArray[Scalar]:
    """Zeros that a caller fills: below 4 MiB in anonymous memory, else as ``map_scratch``."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= _SMALL_BYTES:
        return np.zeros(shape, dtype=dtype)
    return map_scratch(path, shape, dtype)


def map_scratch(path: Path, shape: tuple[int, ...], dtype: type[Scalar]) -> NDArray[Scalar]:
    """A writable map of zeros in a new .npy file whose blocks are all reserved.

    A page of a sparse file that finds no free block when it is written kills the process (SIGBUS); here the disk is asked
    before anything is mapped.

    Raises
    ------
    StorageError
        The disk has no room, or fails.
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
            hint="free some space, then run the command again (a build: with --resume)",
        )
        failure.errno = error.errno
        raise failure from error
    array: NDArray[Scalar] = np.load(path, mmap_mode="r+", allow_pickle=False)
    return array


def _reserve(file: BinaryIO, size: int) -> None:
    """Extend ``file`` by ``size`` bytes that have a place on the disk."""
    file.flush()
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:  # some C libraries do not emulate it where a file system has none
                raise
        else:
            return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
