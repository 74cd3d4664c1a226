"""Interleaved benchmarks never run at once, and the time that one was stopped is not counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.interleaving import run_interleaved

TURN = 0.1
NEEDS = 5 * TURN  # of a CPU, so at least five turns
BUSY = f"""
import json, time
began, cpu = time.perf_counter(), time.process_time()
while time.process_time() - cpu < {NEEDS}:
    pass
ended = time.perf_counter()
print("a line before")
spans = {{"seconds": [began, ended]}}
print(json.dumps({{"raw": ended - began, "spans": spans, "rounds": [{{"spans": spans}}]}}))
"""


def test_time_that_a_process_was_stopped_is_taken_out() -> None:
    both = run_interleaved([[sys.executable, "-c", BUSY]] * 2, seconds=TURN)
    for figures in both:
        assert figures["seconds"] >= 0.99 * NEEDS  # all that it computed
        assert figures["raw"] - figures["seconds"] >= TURN  # at least one turn of the other one
        assert figures["rounds"][0]["seconds"] == figures["seconds"]
        assert "spans" not in figures


def test_a_process_alone_is_not_stopped() -> None:
    (figures,) = run_interleaved([[sys.executable, "-c", BUSY]], seconds=TURN)
    assert figures["seconds"] == figures["raw"]


def test_when_one_fails_none_is_left(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    waits = f"import os, time\nos.symlink(str(os.getpid()), {str(file)!r})\ntime.sleep(600)"
    fails = f"import os, time\nwhile not os.path.lexists({str(file)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    with pytest.raises(subprocess.CalledProcessError):
        run_interleaved([[sys.executable, "-c", waits], [sys.executable, "-c", fails]], seconds=TURN)
    pid = int(str(file.readlink()))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
