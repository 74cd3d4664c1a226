"""The memory of a process that looks at a finished store: tests/unit/test_views_memory.py, with what numpy and Arrow take.

Each view runs in a child of one process that has imported everything, on a small and on a large store.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from embstore.host.memory import read_memory
from tests.support.large import large_store, unlike_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)"),
]

SMALL, LARGE = 20_000, 200_000
BYTES_A_ROW = 64
SLACK = 8 << 20  # of a peak's measure, and of blocks that the small store does not fill

_VIEWS = """
import json, os, sys, traceback
from pathlib import Path
import pyarrow.parquet
from embstore.core import files
from embstore.host.memory import MemoryMeter
from embstore.views import comparison, export, info
from embstore.views.report import data, page

files._READ_BYTES = 1 << 18
export._GROUP_ROWS = 1024

def report(root):
    found = data.read_report(root, map_rows=500, by="uuid")
    page._values(found, page.charts_of(found)), page._heaviest_tenth(found.weight)

VIEWS = {
    "inspect": lambda root: info.inspect(root, by="uuid"),
    "report": report,
    "kat": lambda root: export.export_store(root, root.with_name("kat-" + root.name), format="kat"),
    "parquet": lambda root: export.export_store(root, root.with_name("parquet-" + root.name), format="parquet"),
    "compare": lambda root: comparison.compare(root, root),
}

def peak(view, root):
    inlet, outlet = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with MemoryMeter() as meter:
                meter.set_baseline()
                VIEWS[view](Path(root))
                os.write(outlet, str(meter.peak_anonymous_bytes).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(outlet)
    os.waitpid(child, 0)
    with open(inlet) as pipe:
        return int(pipe.read())

print(json.dumps({view: [peak(view, root) for root in sys.argv[1:]] for view in VIEWS}))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Peaks of every view, of the small store and of the large one."""
    folder = tmp_path_factory.mktemp("stores")
    for name, num_rows in (("small", SMALL), ("large", LARGE)):
        large_store(folder / name, unlike_lines(num_rows), near_share=0.5)
    command = [sys.executable, "-c", _VIEWS, str(folder / "small"), str(folder / "large")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("view", ["inspect", "report", "kat", "parquet", "compare"])
def test_a_view_takes_a_few_numbers_a_row(view: str, peaks: dict[str, list[int]]) -> None:
    small, large = peaks[view]
    assert large - small <= BYTES_A_ROW * (LARGE - SMALL) + SLACK
