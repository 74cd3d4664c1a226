"""Time and memory of stage 0 of very many lines: ``python -m benchmarks.stage0 [--lines 1000000,10000000] [--budget 1GiB]``.

Lines of one question each come through a pipe, half of them with an id. ``storage.ingest`` reads, numbers, names and writes
them in a process of its own, whose peak of anonymous memory is taken above what its imports take. Figures go to
``benchmarks/results/stage0.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.acceptance import RESULTS, machine
from embstore.core.config import parse_bytes

_LINES = """
import sys
for start in range(0, int(sys.argv[1]), 1000):
    sys.stdout.write("".join(
        '{"prompt": "question %d about %d", "id": "q%d"}\\n' % (line, line * 7919 % 1000003, line)
        if line % 2 else '{"prompt": "ask %d of the %d"}\\n' % (line, line // 2)
        for line in range(start, min(start + 1000, int(sys.argv[1])))
    ))
"""
_INGEST = """
import json, sys, time
from pathlib import Path
from embstore.host.memory import MemoryMeter
from embstore.storage.ingest import ingest
from embstore.storage.prompt_table import PromptTable
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
with MemoryMeter() as meter:
    meter.set_baseline()
    started = time.perf_counter()
    record = ingest("-", folder, folder, strict=True, limit=None, memory_bytes=budget)
    seconds = time.perf_counter() - started
    peak_bytes = meter.set_baseline()
    PromptTable(folder / "prompts.jsonl", record.rows)
    print(json.dumps({
        "rows": record.rows,
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": peak_bytes,
        "table_peak_bytes": meter.peak_anonymous_bytes,
    }))
"""


def main() -> int:
    """Measure each number of lines, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", default="1000000,10000000")
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to use: 3 GB for ten million lines")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.stage0 --lines {options.lines} --budget {options.budget}",
        "machine": machine(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "memory_budget_bytes": parse_bytes(options.budget),
        "lines": {
            count: measured(int(count), parse_bytes(options.budget), options.folder) for count in options.lines.split(",")
        },
    }
    (RESULTS / "stage0.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


def measured(lines: int, budget_bytes: int, folder: Path) -> dict[str, Any]:
    """Rows, seconds and peaks of memory of one ingest, whose files are deleted."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-c", _INGEST, scratch, str(budget_bytes)]
        with subprocess.Popen([sys.executable, "-c", _LINES, str(lines)], stdout=subprocess.PIPE) as writer:
            done = subprocess.run(command, stdin=writer.stdout, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
