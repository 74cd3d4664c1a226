"""Keep freed memory in the process while chunks are written, and return it to the kernel afterwards (glibc only).

glibc returns a freed block of 30 MB to the kernel, so every page of the next block is faulted in and zeroed again: a quarter
of the cost of encoding a chunk (docs/decisions/0015). The steps of a search need blocks of different sizes: kept blocks
would not be reused and would count against the memory budget, so they are returned before a search.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 1 << 28
_LARGEST_OF_OLD_GLIBC_BYTES = 1 << 25  # before 2.35, mallopt takes no threshold above this
_RETURNED_BYTES = 4 << 20


def keep_large_blocks() -> None:
    """Keep freed blocks of up to 256 MiB for later allocations, with an old glibc of up to 32 MiB.

    This is a setting of the whole process.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        if not mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES):
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT_BYTES)


def return_large_blocks() -> None:
    """Return blocks above 4 MiB to the kernel as soon as they are freed. This is a setting of the whole process.

    A model's probes make tensors of many sizes; glibc, left to itself, begins to keep such blocks once it has seen some, and
    the 0.5B shape then took 1.3 GB where it uses 0.6 (docs/decisions/0048).
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES)


def give_back() -> None:
    """Return free memory to the kernel."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, None if the library lacks it."""
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
