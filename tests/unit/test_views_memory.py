"""What looks at a finished store allocates a few numbers a row: docs/limits.md promises at most 64 bytes.

Every allocation of Python and numpy is counted, for a small and for a large store. Their difference is what the rows take:
whatever has one size for any store is in both. tests/e2e/test_views_memory.py measures the memory of a process.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from embstore.core import files
from embstore.core.errors import ConfigError
from embstore.storage import atomic
from embstore.storage.reader import open_store
from embstore.views import comparison, export, info
from embstore.views.report import charts, clusters, data, page
from tests.support.large import large_store, unlike_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

SMALL, LARGE = 3_000, 12_000
BYTES_A_ROW = 64
SLACK = 60_000  # of Python's own tables, which grow in steps


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small store and the large one: of half of their rows all neighbours are near-duplicates."""
    folder = tmp_path_factory.mktemp("stores")
    small, large = (
        large_store(folder / str(num_rows), unlike_lines(num_rows), near_share=0.5) for num_rows in (SMALL, LARGE)
    )
    return small, large


def _report(store: Path, out: Path) -> None:
    found = data.read_report(store, map_rows=500, by="uuid")
    charts.charts_of(found)
    page._heaviest_tenth(found.weight)


def _unknown(store: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt has the id 'nobody'"):
        info.neighbors_of(store, "nobody")


# "inspect" without a field is a part of that with one, and the files of the format "npy" are among those of "kat"
VIEWS: dict[str, Callable[[Path, Path], object]] = {
    "inspect": lambda store, out: info.inspect(store, by="uuid"),
    "report": _report,
    "kat": lambda store, out: export.export_store(store, out, format="kat"),
    "parquet": lambda store, out: export.export_store(store, out, format="parquet"),
    "compare": lambda store, out: comparison.compare(store, store),
    "neighbours": lambda store, out: info.neighbors_of(store, str(next(open_store(store).prompts.ids()))),
    "an unknown id": _unknown,
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_takes_a_few_numbers_a_row(
    view: str, stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READ_BYTES", 1 << 18)
    monkeypatch.setattr(atomic, "_BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(export, "_GROUP_ROWS", 1000)
    for module, name in ((comparison, "_BLOCK"), (charts, "_BLOCK_ROWS"), (clusters, "_BLOCK_ROWS")):
        monkeypatch.setattr(module, name, 500)
    VIEWS[view](stores[0], tmp_path / "first")  # imports, and what is made once for each process
    peaks = []
    for store in stores:
        tracemalloc.start()
        try:
            VIEWS[view](store, tmp_path / store.name)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] <= BYTES_A_ROW * (LARGE - SMALL) + SLACK
