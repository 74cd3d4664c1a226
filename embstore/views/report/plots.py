"""The summary plots as one picture, for a README or a paper."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError
from embstore.views.report.charts import Charts, Histogram, charts_of
from embstore.views.report.data import ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOW, _MIDDLE, _HIGH = "#2563a8", "#c3c9d0", "#c2410c"
_INK, _MUTED, _LINE = "#1b2027", "#59636e", "#d8dde3"
_DPI = 160


def render_picture(data: ReportData) -> bytes:
    """Map, weights, distances and weight against length, as PNG.

    Raises
    ------
    ConfigError
        The plotting library's extra is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("--png needs matplotlib, which is not installed", hint="pip install 'embstore[report]'") from None
    charts = charts_of(data)
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    panels = figure.subplot_mosaic([["map", "weights"], ["map", "distances"], ["map", "lengths"]], width_ratios=[1.45, 1])
    _draw_map(figure, panels["map"], data, charts)
    _draw_histogram(panels["weights"], charts.weight, "weight, in units of the mean", reach=charts.reach)
    panels["weights"].axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    k = data.metadata["weighting"]["k"]
    if charts.mean_distance is not None:
        _draw_histogram(panels["distances"], charts.mean_distance, f"mean distance to {k} neighbours")
    else:
        panels["distances"].set_axis_off()
    _draw_lengths(panels["lengths"], charts)
    figure.suptitle(_title(data), color=_INK, fontsize=11, fontweight="bold", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _title(data: ReportData) -> str:
    metadata = data.metadata
    text = f"{data.name}: {data.info.total_rows:,} prompts, effective sample size {metadata['ess_share']:.0%}"
    audit = metadata["neighbors"]["audit"]
    return text if audit is None else f"{text}, recall@{audit['k']} {audit['recall']:.4f}"


def _draw_map(figure: Figure, panel: Axes, data: ReportData, charts: Charts) -> None:
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - an extra

    colours = LinearSegmentedColormap.from_list("weight", [_LOW, _MIDDLE, _HIGH])
    points_M2 = data.map.umap if data.map.umap is not None else data.map.pca
    size = float(np.clip(20_000 / max(1, len(points_M2)), 1.2, 30))
    logs_M = np.log2(np.maximum(data.weight[data.map.rows], 1e-6))
    drawn = panel.scatter(
        points_M2[:, 0],
        points_M2[:, 1],
        c=logs_M,
        s=size,
        cmap=colours,
        vmin=-charts.reach,
        vmax=charts.reach,
        linewidths=0,
        alpha=0.8,
    )
    panel.set_aspect("equal", adjustable="datalim")
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_color(_LINE)
    kind = "UMAP" if data.map.umap is not None else f"PCA, {data.map.pca_share:.0%} of the variance"
    sample = f", a sample of {len(data.map.rows):,}" if data.map.is_sample else ""
    panel.set_title(f"prompts, coloured by weight ({kind}{sample})", fontsize=9, color=_MUTED)
    bar = figure.colorbar(drawn, ax=panel, orientation="horizontal", shrink=0.6, aspect=40, pad=0.01)
    bar.set_ticks(np.log2(charts.ticks).tolist(), labels=[f"{tick:g} ×" for tick in charts.ticks])
    bar.ax.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore] # typed as if it could be called


def _draw_histogram(panel: Axes, found: Histogram, label: str, *, reach: float | None = None) -> None:
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - an extra

    middles = (found.edges[:-1] + found.edges[1:]) / 2
    colours: str | NDArray[np.float64] = _MUTED
    if reach is not None:
        scale = LinearSegmentedColormap.from_list("weight", [_LOW, _MIDDLE, _HIGH])
        colours = scale((np.log2(np.maximum(middles, 1e-6)) / reach + 1) / 2)
    panel.bar(middles, found.counts, width=np.diff(found.edges) * 0.92, color=colours)
    beyond = f" ({found.above:,} more beyond)" if found.above else ""
    _style(panel, label + beyond, "prompts")


def _draw_lengths(panel: Axes, charts: Charts) -> None:
    found = charts.weight_by_length
    darkness = np.ma.masked_equal(np.log10(found.counts + 1), 0)
    panel.pcolormesh(found.length_edges, found.weight_edges, darkness, cmap="Greys", rasterized=True)
    panel.plot(found.centre, found.median, color=_HIGH, linewidth=1.6)
    for edge in (found.low, found.high):
        panel.plot(found.centre, edge, color=_HIGH, linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    _style(panel, "characters", "weight")


def _style(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=9, color=_MUTED)
    panel.set_ylabel(y, fontsize=9, color=_MUTED)
    panel.tick_params(labelsize=8, colors=_MUTED)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_LINE)
