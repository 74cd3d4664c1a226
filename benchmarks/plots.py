"""Pictures of the documentation as SVG, by matplotlib and rich: figures are values first, so that they can be compared."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from benchmarks.speed_tables import METHODS
from benchmarks.tables import DTYPES, Report

_COLOURS = ("#4878a8", "#e08a3c", "#5aa469", "#c0504d")


def embedding_rates(embedding: Report) -> dict[str, Any]:
    """Rows a second of every method in both dtypes."""
    return {
        "kind": "bars",
        "names": list(METHODS.values()),
        "series": {
            dtype: [round(embedding["methods"][dtype][name]["rows_per_second"]) for name in METHODS] for dtype in DTYPES
        },
        "label": "rows a second, two CPU cores",
    }


def search_seconds(knn: Report) -> dict[str, Any]:
    """Seconds over rows of the density stage and of single graphs that reach recall 0.99."""
    series: dict[str, list[list[float]]] = {}
    for engine, name in (("auto", "density stage, exact"), ("one graph", "one HNSW graph of recall 0.99")):
        for kind in ("easy", "hard"):
            for title, found in knn["large"].items():
                good = [
                    each["seconds"]
                    for each in (found[engine]["tried"] if title.startswith(f"{kind} ") and engine in found else ())
                    if each["recall"] >= 0.99
                ]
                if good:
                    series.setdefault(f"{name}, {kind} points", []).append([int(title.split()[1]), min(good)])
    return {"kind": "lines", "series": series, "x": "distinct rows of 256 coordinates", "y": "seconds, two CPU cores"}


def digest(figures: dict[str, Any]) -> str:
    """What a picture shows, as it says itself in its metadata; matplotlib's bytes differ between versions."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def shown_in(svg: str) -> str | None:
    """The digest of what an SVG shows."""
    found = re.search(r"figures sha256 ([0-9a-f]{64})", svg)
    return found[1] if found else None


def draw(figures: dict[str, Any]) -> str:
    """The picture as SVG that loads nothing."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "embstore", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        if figures["kind"] == "bars":
            for place, ((name, values), colour) in enumerate(zip(figures["series"].items(), _COLOURS, strict=False)):
                places = [index + 0.4 * place - 0.2 for index in range(len(values))]
                axes.bar_label(axes.barh(places, values, height=0.36, color=colour, label=name), padding=3)
            axes.set_yticks(range(len(figures["names"])), figures["names"])
            axes.invert_yaxis()
            axes.set_xlabel(figures["label"])
        else:
            for (name, points), colour in zip(figures["series"].items(), _COLOURS, strict=False):
                axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
            axes.grid(color="#dddddd", linewidth=0.5)
            axes.set_xlabel(figures["x"])
            axes.set_ylabel(figures["y"])
        axes.legend(frameon=False)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": f"figures sha256 {digest(figures)}"}
        figure.savefig(buffer, format="svg", metadata=metadata)
    return _without_trailing_spaces(buffer.getvalue().splitlines())


def terminal(command: str, output: str, width: int) -> str:
    """A command and what it printed, as SVG that loads nothing: the fonts are the reader's own."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold cyan"))
    for line in output.splitlines():
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ellipsis", highlight=False)
    picture = console.export_svg(title="embstore", unique_id="embstore")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
    return _without_trailing_spaces(picture.splitlines())


def _without_trailing_spaces(lines: Iterable[str]) -> str:
    return "".join(f"{line.rstrip()}\n" for line in lines)
