"""Memory that is freed and taken again chunk by chunk stays with the process while a store is written; then it goes back.

glibc gives a freed block of 30 MB back to the kernel; every page of the next one is faulted in and zeroed anew: a quarter
of the cost of encoding a chunk (docs/decisions/0015). The steps of a search take unlike blocks, so what one freed would lie
beside what the next takes, and count twice against the memory budget. Elsewhere nothing is done, and nothing is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 1 << 28


def keep_large_blocks() -> None:
    """From here on freed blocks of up to 256 MiB are kept for the next ones. A setting of the process."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT_BYTES)


def give_back() -> None:
    """Return to the kernel what was kept and is free."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where it has no such."""
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
