"""One self-contained page: no network, no file beside it. Prompts are a stranger's text, here in a browser.

Three walls. Text in HTML is escaped. Data for the script is JSON in which ``<`` is spelt out, so no text ends its element,
and the script puts texts on the page as text nodes only. A content security policy names the page's two scripts by their
digests and forbids every connection: what got past the other two could neither run nor call home.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore import __version__
from embstore.core.errors import ConfigError
from embstore.views.report import sections
from embstore.views.report.charts import Charts, Histogram, charts_of
from embstore.views.report.data import ReportData

_HERE = Path(__file__).parent


def render_page(data: ReportData) -> str:
    """The whole page as HTML.

    Raises
    ------
    ConfigError
        The plotting library's extra is not installed.
    """
    plotly = _plotly()
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    charts = charts_of(data)
    # WebGL shaders are compiled with Function() by the plotting library; it reads no text of a prompt
    policy = (
        f"default-src 'none'; script-src {_digest(plotly)} {_digest(script)} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(
        [
            sections.header(data),
            sections.summary(data),
            sections.map_section(data),
            sections.distributions(data, has_distances=charts.mean_distance is not None),
            sections.sources(data),
            sections.crowded(data),
            sections.rarest(data),
            sections.duplicates(data),
            sections.origin(data),
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="embstore {__version__}">
<title>{html.escape(data.name)}: embstore report</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<noscript><p class="note">The charts need JavaScript; everything else is here.</p></noscript>
{body}
<footer class="muted small">Made by embstore {__version__}. Texts are cut and their control characters spelt out.</footer>
</main>
<div id="tooltip" hidden></div>
<script type="application/json" id="data">{embedded_json(_values(data, charts))}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded_json(value: object) -> str:
    r"""JSON for a ``script`` element: no text in it can end the element or open a comment.

    Examples
    --------
    >>> embedded_json(["</script><!--"])
    '["\\u003c/script>\\u003c!--"]'
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@functools.cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("--html needs plotly, which is not installed", hint="pip install 'embstore[report]'") from None
    # in a script only a string or a comment can hold these, and there the backslash changes nothing
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _values(data: ReportData, charts: Charts) -> dict[str, object]:
    """What the script draws."""
    rows = data.map.rows
    lengths = charts.weight_by_length
    return {
        "reach": round(charts.reach, 3),
        "ticks": charts.ticks,
        "k": data.metadata["weighting"]["k"],
        "field": data.source_field,
        "sources": data.source_values,
        "map": {
            "pca": _plane(data.map.pca),
            "umap": _plane(data.map.umap) if data.map.umap is not None else None,
            "weight": _rounded(data.weight[rows]),
            "distance": _rounded(data.mean_distance[rows]),
            "length": data.length[rows].tolist(),
            "source": data.source[rows].tolist(),
            "id": data.map.ids,
            "text": data.map.text,
        },
        "weights": _histogram(charts.weight),
        "distances": _histogram(charts.mean_distance) if charts.mean_distance is not None else None,
        "lengths": {
            "x": _rounded(lengths.length_edges),
            "y": _rounded(lengths.weight_edges),
            "counts": lengths.counts.tolist(),
            "centre": _rounded(lengths.centre),
            "low": _rounded(lengths.low),
            "median": _rounded(lengths.median),
            "high": _rounded(lengths.high),
        },
    }


def _histogram(found: Histogram) -> dict[str, object]:
    return {"edges": _rounded(found.edges), "counts": found.counts.tolist(), "above": found.above}


def _plane(points_M2: NDArray[np.float64]) -> list[list[float | None]]:
    """Two columns, in units of the larger spread: three decimals place a point to less than a pixel."""
    spread = float(np.abs(points_M2 - points_M2.mean(axis=0)).max(initial=0.0)) or 1.0
    scaled_M2 = (points_M2 - points_M2.mean(axis=0)) / spread
    return [np.round(scaled_M2[:, column], 4).tolist() for column in range(2)]


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Four significant digits, None for what is no number: a page full of digits nobody sees is twice as large."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
