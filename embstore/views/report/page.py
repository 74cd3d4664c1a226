"""One self-contained page, without network access or other files. Prompts are untrusted text, here in a browser.

Three walls. Every value that a template shows has its control characters spelt out and is escaped by jinja2. Data for the
script is JSON in which ``<`` is spelt out, so that no text ends its element, and the script adds texts as text nodes only.
A content security policy names the page's two scripts by their digests and forbids every connection: whatever passed the
other two walls could neither run nor call home.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embstore import __version__
from embstore.core.config import format_bytes, pooling_rule
from embstore.core.decode import printable
from embstore.core.diagnostics import MILD_ESS_SHARE
from embstore.core.errors import ConfigError
from embstore.core.format import FORMAT_VERSION
from embstore.views.report.charts import Charts, Histogram, charts_of
from embstore.views.report.clusters import CROWDED_SHARE
from embstore.views.report.data import ReportData

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent
_SOURCES_SHOWN = 24
_ENDS = 10
_ENOUGH_ROWS = 20


def render_page(data: ReportData) -> str:
    """The whole page as HTML.

    Raises
    ------
    ConfigError
        A library of the ``report`` extra is not installed.
    """
    templates, plotly = _templates(), _plotly()
    from markupsafe import Markup  # noqa: PLC0415 - comes with jinja2

    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    charts = charts_of(data)
    embedding = (data.info.spec or {})["embedding"]
    # WebGL shaders are compiled with Function() by the plotting library; it reads no text of a prompt
    policy = (
        f"default-src 'none'; script-src {_digest(plotly)} {_digest(script)} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return templates.get_template("page.html.jinja").render(
        data=data,
        policy=policy,
        version=__version__,
        format_version=FORMAT_VERSION,
        has_distances=charts.mean_distance is not None,
        pooling=pooling_rule(embedding["space"], embedding["pooling"]),
        stored=format_bytes(data.info.stored_bytes),
        lost=_lost_lines(data),
        heaviest_tenth=_heaviest_tenth(data.weight),
        mild_ess_share=MILD_ESS_SHARE,
        sources=_listed_sources(data),
        crowded_share=CROWDED_SHARE,
        # the only values that are not escaped; prompts occur in ``values`` alone, as JSON without "<"
        style=Markup(style),
        values=Markup(embedded_json(_values(data, charts))),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def embedded_json(value: object) -> str:
    r"""JSON for a ``script`` element: no text in it can end the element or open a comment.

    Examples
    --------
    >>> embedded_json(["</script><!--"])
    '["\\u003c/script>\\u003c!--"]'
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@functools.cache
def _templates() -> jinja2.Environment:
    try:
        import jinja2  # noqa: PLC0415 - an extra
        from markupsafe import Markup  # noqa: PLC0415
    except ImportError:
        raise ConfigError("--html needs jinja2, which is not installed", hint="pip install 'embstore[report]'") from None

    def spell_out_controls(value: object) -> object:
        return value if isinstance(value, Markup) else printable(str(value))

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=spell_out_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": format, "percent": _percent, "count": _count}
    return templates


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


def _lost_lines(data: ReportData) -> list[str]:
    """What became of input lines that did not become rows."""
    info = data.info
    lines = {"without a prompt, set aside": info.quarantined_lines, "that repeat a prompt": info.repeated_lines}
    lost = [f"{_count(number, 'line')} {what}" for what, number in lines.items() if number]
    return lost + ([f"{_count(info.failed_rows, 'prompt')} that failed, with weight 0"] if info.failed_rows else [])


def _heaviest_tenth(weight_N: NDArray[np.float64]) -> float:
    """Share of the draws that goes to the heaviest tenth of the prompts."""
    known_N = weight_N[np.isfinite(weight_N)]
    known_N.sort()
    return float(known_N[-max(1, len(known_N) // 10) :].sum() / (known_N.sum() or 1.0))


def _listed_sources(data: ReportData) -> dict[str, object]:
    """The sources that the table lists: all, or both ends of a long list and the largest source; ``reach`` scales bars."""
    shares = data.sources
    if are_ends := len(shares) > _SOURCES_SHOWN:
        enough = [share for share in shares if share.rows >= _ENOUGH_ROWS] or shares
        shares = enough if len(enough) <= 2 * _ENDS else enough[:_ENDS] + enough[-_ENDS:]
        largest = max(data.sources, key=lambda share: share.rows)
        if largest not in shares:
            shares = sorted([*shares, largest], key=lambda share: -share.ratio)
    reach = max([0.1, *(abs(share.ratio - 1) for share in shares)])
    return {"shares": shares, "reach": reach, "are_ends": are_ends, "ends": _ENDS, "enough_rows": _ENOUGH_ROWS}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float, digits: int = 0) -> str:
    """A share in percent; never 100 where something is missing, never 0 where something is there."""
    shown = f"{share:.{digits}%}"
    if share < 1 and shown == f"{1:.{digits}%}":
        shown = f"{share:.{digits + 2}%}"
        return shown.replace("%", " %") if shown != f"{1:.{digits + 2}%}" else "just under 100 %"
    if share > 0 and shown == f"{0:.{digits}%}":
        return f"under {10.0**-digits:g} %"
    return shown.replace("%", " %")


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
    """Two columns in units of the larger spread; four decimals place a point to less than a pixel."""
    spread = float(np.abs(points_M2 - points_M2.mean(axis=0)).max(initial=0.0)) or 1.0
    scaled_M2 = (points_M2 - points_M2.mean(axis=0)) / spread
    return [np.round(scaled_M2[:, column], 4).tolist() for column in range(2)]


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Four significant digits, None for NaN and infinity; all digits would double the size of the page."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
