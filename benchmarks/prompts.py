"""What the canonical form of prompts costs: stage 0 of chats by this code and by another commit of it.

``python -m benchmarks.prompts --other FOLDER [--lines 1000000] [--rounds 1]``

``FOLDER`` is a checkout of another commit. Chats of three turns are drawn; stage 0 (``storage.ingest``) reads, names and
writes each line, and nothing is rendered. Both codes run at the same time, in processes of their own, and CPU seconds are
compared. Figures go to ``benchmarks/results/prompts.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.acceptance import RESULTS, machine

ROOT = Path(__file__).parents[1]
_WORDS = "the quick brown fox jumps over lazy dogs and asks why light bends in water when seen from far above"
_TURNS = (("user", 40), ("assistant", 60), ("user", 20))  # words of each
_INGEST = """
import sys, tempfile, time
from pathlib import Path
from embstore.storage.ingest import ingest
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
    started = time.process_time()
    record = ingest(Path(sys.argv[1]), Path(folder), Path(folder), strict=True, limit=None)
    print(record.rows, time.process_time() - started)
"""


def main() -> int:
    """Draw, ingest by both, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="checkout of the commit to compare with")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    codes = {"other": options.other.resolve(), "this": ROOT}
    commits = {name: _commit(folder) for name, folder in codes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as scratch:
        pool = _written(Path(scratch) / "chats.jsonl", options.lines)
        for _ in range(options.rounds):
            with ThreadPoolExecutor() as both:  # at the same time: whatever else the machine does slows them alike
                running = {name: both.submit(_ingested, pool, code, options.lines) for name, code in codes.items()}
                for name, found in running.items():
                    seconds[name].append(found.result())
            print({name: found[-1] for name, found in seconds.items()}, flush=True)
        pool_bytes = pool.stat().st_size
    ratios = [this / other for this, other in zip(seconds["this"], seconds["other"], strict=True)]
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.prompts --other FOLDER --lines {options.lines} --rounds {options.rounds}",
        "machine": machine(),
        "lines": options.lines,
        "pool_bytes": pool_bytes,
        "commits": commits,
        "cpu_seconds": {name: [round(value, 1) for value in found] for name, found in seconds.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }
    (RESULTS / "prompts.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


def _written(path: Path, lines: int) -> Path:
    draw, vocabulary = random.Random(0), _WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            turns = [{"role": role, "content": " ".join(draw.choices(vocabulary, k=words))} for role, words in _TURNS]
            turns[0]["content"] += f" {number}"
            file.write(json.dumps({"id": f"chat-{number}", "messages": turns, "src": "drawn"}) + "\n")
    return path


def _ingested(pool: Path, code: Path, lines: int) -> float:
    """CPU seconds of stage 0 by the code in a folder."""
    ran = subprocess.run(
        [sys.executable, "-c", _INGEST, str(pool), str(pool.parent)], cwd=code, check=True, capture_output=True, text=True
    )
    rows, seconds = ran.stdout.split()
    if int(rows) != lines:
        raise AssertionError(f"{code} made {rows} rows of {lines} lines")
    return float(seconds)


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
