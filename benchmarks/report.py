"""The report of a store, measured: time and memory to make it, its size, and how it behaves in a real browser.

``python -m benchmarks.report --store STORE [--screenshot FILE]``

The page is made by the real command in a process of its own, and opened in Chromium without a window and without a graphics
card (software WebGL): times in a browser on a desk are shorter. Writes ``benchmarks/results/report.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.acceptance import machine
from embstore.storage.reader import open_store
from tests.support.browser import Page, browser_page, find_browser

RESULT = Path(__file__).parent / "results" / "report.json"
REPEATS = 3
DRAWN = "document.body && document.body.dataset.state === 'drawn'"
SEARCHES = ("review", "how many", "zzzz", "what")


def main() -> int:
    """Make the page, open it, search it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--screenshot", type=Path, help="also write a picture of the page's beginning here")
    options = parser.parse_args()
    browser = find_browser()
    if browser is None:
        raise SystemExit("no Chromium or Chrome on the path")
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        figures = {"html": made(options.store, "--html", page), "png": made(options.store, "--png", picture)}
        figures["browser"] = opened(browser, page, options.screenshot)
    RESULT.write_text(
        json.dumps(
            {
                "date": time.strftime("%Y-%m-%d"),
                "command": "embstore inspect STORE --html report.html",
                "rows": open_store(options.store).num_rows,
                "machine": measured_on(browser),
                **figures,
            },
            indent=2,
        )
        + "\n"
    )
    print(RESULT.read_text())
    return 0


def made(store: Path, option: str, file: Path) -> dict[str, Any]:
    """Seconds of the whole command (median), peak memory of the largest process so far, and bytes."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "embstore", "inspect", str(store), option, str(file)], check=True)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "command_seconds": round(statistics.median(seconds), 2),
        "command_seconds_all": [round(value, 2) for value in seconds],
        "peak_resident_MiB": round(peak / 2**20, 1),
        "bytes": file.stat().st_size,
    }


def opened(browser: str, file: Path, screenshot: Path | None) -> dict[str, Any]:
    """Seconds from navigation until every chart is drawn, and from a typed word until the map shows it."""
    loads = []
    for _ in range(REPEATS):
        with browser_page(browser) as page:
            page.emulate()
            loads.append(page.open(file.as_uri(), until=DRAWN))
            if len(loads) == REPEATS:
                searches = {word: search(page, word) for word in SEARCHES}
                complaints, requests = list(page.complaints), [url for url in page.requests if url.startswith("http")]
                if screenshot is not None:
                    picture(page, screenshot)
    return {
        "load_seconds": round(statistics.median(loads), 2),
        "load_seconds_all": [round(value, 2) for value in loads],
        "search_seconds": searches,
        "complaints": complaints,
        "network_requests": requests,
    }


def search(page: Page, word: str) -> dict[str, Any]:
    """Seconds until the map shows the matches of a word, the 0.12 s included that the page waits for more letters."""
    started = time.perf_counter()
    page.type_into("#search", word)
    page.wait(f"document.getElementById('found').dataset.shown === {json.dumps(word)}")
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "found": page.evaluate("document.getElementById('found').textContent")}


def picture(page: Page, file: Path) -> None:
    """The page down to its charts, without a search."""
    page.type_into("#search", "")
    page.wait("document.getElementById('found').dataset.shown === ''")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.resize(1120, 1800)
    end = page.evaluate("document.getElementById('distributions').getBoundingClientRect().bottom")
    page.resize(1120, round(end) + 24)
    time.sleep(1)  # charts follow the new width
    file.write_bytes(page.screenshot())


def measured_on(browser: str) -> dict[str, Any]:
    """Hardware, the browser, and versions."""
    version = subprocess.run([browser, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    return machine(("plotly", "matplotlib", "numpy")) | {"browser": version.split(" built")[0]}


if __name__ == "__main__":
    sys.exit(main())
