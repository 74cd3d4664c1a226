"""How much anonymous memory a build takes besides the loaded model: the figure that ``--memory-budget`` bounds.

Anonymous memory is VmRSS - RssFile. Mapped file pages are reported separately, because the kernel can drop them at any time;
ru_maxrss includes them and is therefore not used. Memory is sampled 20 times a second, so a shorter peak can be missed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of this process: anonymous (with shared memory), and mapped file pages."""

    anonymous_bytes: int
    file_bytes: int


def read_memory() -> Memory | None:
    """Memory of this process now; None where the kernel does not report it (not Linux)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    if "VmRSS" not in sizes or "RssFile" not in sizes:
        return None
    return Memory(anonymous_bytes=sizes["VmRSS"] - sizes["RssFile"], file_bytes=sizes["RssFile"])


class MemoryMeter:
    """Samples memory in a thread while the context is open; ``set_baseline`` marks the memory in use before the work."""

    def __init__(self) -> None:
        self._peak: Memory | None = read_memory()
        self._baseline = self._peak
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embstore-memory", daemon=True)

    def __enter__(self) -> Self:
        if self._peak is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def set_baseline(self) -> int | None:
        """Measure from here, and return the peak until now: what is in memory already, such as imports, no longer counts."""
        peak_bytes = self.peak_anonymous_bytes
        self._peak = self._baseline = read_memory()
        return peak_bytes

    @property
    def peak_anonymous_bytes(self) -> int | None:
        """Peak of anonymous memory above the baseline so far; None where it cannot be read."""
        if self._peak is None or self._baseline is None:
            return None
        return max(0, self._peak.anonymous_bytes - self._baseline.anonymous_bytes)

    @property
    def peak_file_bytes(self) -> int | None:
        """Peak of mapped file pages so far."""
        return self._peak.file_bytes if self._peak is not None else None

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            now = read_memory()
            if now is not None and self._peak is not None:
                self._peak = Memory(
                    anonymous_bytes=max(now.anonymous_bytes, self._peak.anonymous_bytes),
                    file_bytes=max(now.file_bytes, self._peak.file_bytes),
                )
