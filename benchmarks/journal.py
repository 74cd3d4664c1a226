"""What it costs to rewrite a journal, which every writer does before it believes a line (docs/decisions/0055).

``python -m benchmarks.journal [--folder .] [--rounds 5]``

A journal of so many windows is written to a new file in FOLDER, synced, renamed, and the folder synced. 2,500 windows are 10
million rows; 262,144 are the most that a store has. Reading such a journal is measured too, for the smallest. Figures go to
``benchmarks/results/journal.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.acceptance import RESULTS, machine
from embstore.core.files import fsync_directory
from embstore.core.format import JOURNAL
from embstore.core.records import (
    ChunkRecord,
    WindowRecord,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
)
from embstore.storage.atomic import DurableFile

WINDOWS = (2_500, 262_144, 1_000_000)


def main() -> int:
    """Rewrite journals of each size, and record best and median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.journal --rounds {options.rounds}",
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for windows in WINDOWS:
            content = _journal(windows)
            seconds = [_rewritten(Path(folder), content) for _ in range(options.rounds)]
            results[str(windows)] = {
                "bytes": len(content),
                "best_seconds": round(min(seconds), 3),
                "median_seconds": round(statistics.median(seconds), 3),
            }
    content = _journal(WINDOWS[0])
    started = time.perf_counter()
    decode_journal(content, name=JOURNAL)
    results[str(WINDOWS[0])]["reading_seconds"] = round(time.perf_counter() - started, 3)
    (RESULTS / "journal.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


def _journal(windows: int) -> bytes:
    """The header and one line a window, each with one chunk."""
    lines = [
        encode_journal_record(
            window + 1,
            WindowRecord(
                window=window,
                start=4096 * window,
                stop=4096 * (window + 1),
                chunks=[ChunkRecord(index=window, bytes=30_000_000, crc32c="0123abcd")],
                coordinates_crc32c="0123abcd",
                residuals_crc32c="0123abcd",
                sequences_crc32c="0123abcd",
                tokens=300_000,
                truncated=100,
                splits=0,
                failed=[],
            ),
        )
        for window in range(windows)
    ]
    return b"".join([encode_journal_header(), *lines])


def _rewritten(folder: Path, content: bytes) -> float:
    started = time.perf_counter()
    with DurableFile(folder / JOURNAL, sync_directory=False, sha256=False) as file:
        file.write(content)
    fsync_directory(folder)
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
