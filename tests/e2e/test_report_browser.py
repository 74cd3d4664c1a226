"""The report's page in a real browser: it draws, hover and search work, and no prompt becomes anything but text.

Skipped where no Chromium or Chrome is installed (on Debian: ``apt-get install chromium``); ``.ci/run`` installs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.views.report.data import ReportData, one_line, read_report
from embstore.views.report.page import render_page
from tests.support.browser import Page, browser_page, find_browser
from tests.support.reports import HOSTILE, enlarged, hostile_store
from tests.support.stores import build_small, write_small_prompts

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path (apt-get install chromium)")

DRAWN = "document.body && document.body.dataset.state === 'drawn'"
# where the point of a prompt lies in the window
PLACE = """(row => {
  const plot = document.getElementById("map");
  plot.scrollIntoView({ block: "center" });
  const trace = plot.data[0], at = trace.customdata.indexOf(row);
  const { left, top } = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;
  return [left + xaxis._offset + xaxis.l2p(trace.x[at]), top + yaxis._offset + yaxis.l2p(trace.y[at])];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert BROWSER is not None
    with browser_page(BROWSER) as page:
        yield page


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    folder = tmp_path_factory.mktemp("small")
    build_small(write_small_prompts(folder / "prompts.jsonl"), folder / "store")
    return read_report(folder / "store")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return read_report(hostile_store(tmp_path_factory.mktemp("hostile")))


def shown(browser: Page, data: ReportData, folder: Path, **options: Any) -> float:
    """Open the page of a report; seconds until it is drawn."""
    file = folder / "report.html"
    file.write_text(render_page(data), encoding="utf-8")
    browser.complaints.clear()
    browser.requests.clear()
    browser.emulate()
    browser.open("about:blank")
    return browser.open(file.as_uri(), until=DRAWN, **options)


def hover(browser: Page, row: int) -> str:
    """Move the mouse onto a prompt's point; the text that the page shows for it."""
    x, y = browser.evaluate(f"{PLACE}({row})")
    browser.move(x - 40, y - 40)
    browser.move(x, y)
    browser.wait("!document.getElementById('tooltip').hidden")
    return str(browser.evaluate("document.querySelector('#tooltip bdi').textContent"))


def search(browser: Page, wanted: str) -> str:
    """Type into the search box; what the page says once the map shows it."""
    browser.type_into("#search", wanted)
    browser.wait(f"document.getElementById('found').dataset.shown === {json.dumps(wanted)}")
    return str(browser.evaluate("document.getElementById('found').textContent"))


def test_the_page_draws_without_a_word_and_without_network(browser: Page, small: ReportData, tmp_path: Path) -> None:
    shown(browser, small, tmp_path)
    for name in ("map", "weights", "distances", "lengths"):
        assert browser.evaluate(f"document.querySelectorAll('#{name} .main-svg').length") > 0, name
    assert browser.evaluate("document.getElementById('map').data[0].type") == "scattergl"
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hover_shows_the_prompt_and_search_marks_it(browser: Page, small: ReportData, tmp_path: Path) -> None:
    shown(browser, small, tmp_path)
    texts = small.map.text
    for row in (0, 35, 69):
        assert hover(browser, row) in texts  # a point may lie under another
    assert hover(browser, 69) == texts[69]  # the heaviest is drawn on top
    facts = browser.evaluate("document.querySelector('#tooltip .muted').textContent")
    assert small.map.ids[69] in facts
    assert f"weight {small.weight[small.map.rows[69]]:.2f}" in facts
    assert search(browser, "CHAT 2") == "1 of 70 prompts"
    assert browser.evaluate("document.querySelector('#matches mark').textContent") == "chat 2"
    row = next(row for row, text in enumerate(texts) if "chat 2" in text)
    assert browser.evaluate("document.getElementById('map').data[1].customdata") == [row]
    assert search(browser, "explain number").startswith("61 of 70 prompts")
    assert search(browser, small.map.ids[3]) == "1 of 70 prompts"
    assert search(browser, "no such text") == "0 of 70 prompts"
    assert search(browser, "") == ""
    assert browser.evaluate("document.getElementById('map').data[1].x.length") == 0
    assert browser.complaints == []


def test_hostile_prompts_stay_text(browser: Page, hostile: ReportData, tmp_path: Path) -> None:
    shown(browser, hostile, tmp_path)
    texts = hostile.map.text
    for number, text in enumerate(HOSTILE):
        expected = one_line(f"{number} {text}", hostile.map.characters)
        found = search(browser, expected[:60])
        assert found.startswith("1 of"), (text, found)
        assert browser.evaluate("document.querySelector('#matches bdi').textContent") == expected
    search(browser, "")
    assert hover(browser, len(texts) - 1) == texts[-1]
    assert browser.evaluate("window.pwned === undefined")
    assert browser.evaluate("document.scripts.length") == 3
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, main svg script, main > a').length") == 0
    # the library draws its own svg; nothing in it or beside it has a handler
    assert browser.evaluate(
        "[...document.querySelectorAll('*')].every(e => ![...e.attributes].some(a => /^on/.test(a.name)))"
    )
    assert browser.complaints == []


def test_a_script_that_got_in_all_the_same_would_not_run(browser: Page, small: ReportData, tmp_path: Path) -> None:
    shown(browser, small, tmp_path)
    browser.evaluate("""(() => {
      const script = document.createElement("script");
      script.textContent = "window.pwned = 9";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.pwned = 10'>");
      return fetch("https://example.invalid/").catch(() => null);
    })()""")
    assert browser.evaluate("window.pwned === undefined")
    assert sum("Content Security Policy" in complaint for complaint in browser.complaints) >= 3


@pytest.mark.slow
def test_28k_prompts_stay_usable(browser: Page, small: ReportData, tmp_path: Path) -> None:
    """How long it takes is in benchmarks/results/report.json."""
    data = enlarged(small, 28_000)
    shown(browser, data, tmp_path)
    assert browser.evaluate("document.getElementById('map').data[0].x.length") == 28_000
    assert search(browser, "number-27999 ") == "1 of 28,000 prompts"
    assert search(browser, "word7").startswith(f"{sum('word7' in text for text in data.map.text):,} of 28,000")
    search(browser, "")
    assert hover(browser, 27_999) == data.map.text[27_999]
    assert browser.complaints == []


def test_both_layouts_can_be_shown(browser: Page, small: ReportData, tmp_path: Path) -> None:
    shown(browser, enlarged(small, 200, with_umap=True), tmp_path)
    xs = "document.getElementById('map').data[0].x"
    first = browser.evaluate(xs)
    browser.evaluate("document.querySelector('[data-layout=pca]').click()")
    browser.wait(f"{xs}[0] !== {first[0]}")
    assert browser.evaluate("document.querySelector('[data-layout=pca]').getAttribute('aria-pressed')") == "true"
    browser.evaluate("document.querySelector('[data-layout=umap]').click()")
    browser.wait(f"{xs}[0] === {first[0]}")
    assert browser.complaints == []


def test_light_dark_and_paper_can_be_read(browser: Page, small: ReportData, tmp_path: Path) -> None:
    """Text has at least the contrast that WCAG 2 asks for (4.5) in each, and paper is white whatever the screen is."""
    shown(browser, small, tmp_path)
    pages = {}
    for media, scheme in (("", "light"), ("", "dark"), ("print", "dark")):
        browser.emulate(media=media, scheme=scheme)
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.wait(f"getComputedStyle(document.querySelector('#map .main-svg')).backgroundColor === {json.dumps(paper)}")
        pages[media or scheme] = luminance(paper)
        for selector in ("body", ".muted", ".low", ".high", ".good", "#map .cbtitle text, #weights .xtitle"):
            style = f"getComputedStyle(document.querySelector({json.dumps(selector)}))"
            ink = luminance(browser.evaluate(f"{style}.fill" if "#" in selector else f"{style}.color"))
            low, high = sorted((ink, pages[media or scheme]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (media, scheme, selector)
    assert pages["light"] == pages["print"] == 1
    assert pages["dark"] < 0.05
    assert browser.evaluate("getComputedStyle(document.querySelector('.tools')).display") == "none"
    assert browser.pdf().startswith(b"%PDF")
    browser.emulate()


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, by WCAG 2."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phone_gets_one_column(browser: Page, small: ReportData, tmp_path: Path) -> None:
    shown(browser, small, tmp_path, width=390, height=800)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.complaints == []


def test_without_webgl_a_part_of_the_points_is_drawn_and_all_are_searched(small: ReportData, tmp_path: Path) -> None:
    assert BROWSER is not None
    with browser_page(BROWSER) as page:
        page.command(
            "Page.addScriptToEvaluateOnNewDocument",
            source="""const real = HTMLCanvasElement.prototype.getContext;
            HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
              return /webgl/.test(kind) ? null : real.call(this, kind, ...more);
            };""",
        )
        shown(page, enlarged(small, 9000), tmp_path)
        assert page.evaluate("document.getElementById('map').data[0].type") == "scatter"
        assert page.evaluate("document.getElementById('map').data[0].x.length") == 3000
        assert "draws 3,000 of 9,000 points" in page.evaluate("document.getElementById('no-webgl').textContent")
        assert search(page, "number-8999 ") == "1 of 9,000 prompts"
        assert page.evaluate("document.getElementById('map').data[1].customdata") == [8999]
        assert page.complaints == []
