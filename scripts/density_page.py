"""Put measured searches into ``docs/density.md`` and its plot: ``python -m scripts.density_page``.

``python -m benchmarks.knn`` writes ``benchmarks/results/knn.json``; page and plot show it, and a test compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "knn.json"
PAGE = ROOT / "docs" / "density.md"
PLOT = ROOT / "docs" / "density.svg"

_TARGET = 0.999
_GROWTH = 0.99  # equal recall of one graph at every size; 0.999 would need another effort for each
_ENGINES = {
    "embstore-exact": "embstore exact",
    "faiss-flat": "faiss-cpu IndexFlatL2",
    "embstore-hnsw": "embstore HNSW shards",
    "hnswlib": "hnswlib",
    "usearch": "usearch, float16",
    "faiss-hnsw": "faiss-cpu HNSW",
}
_LINES = {
    ("auto", "easy"): ("density stage, exact, easy points", "#4878a8"),
    ("auto", "hard"): ("density stage, exact, hard points", "#8064a2"),
    ("one graph", "easy"): ("one HNSW graph of recall 0.99, easy points", "#5aa469"),
    ("one graph", "hard"): ("one HNSW graph of recall 0.99, hard points", "#c0504d"),
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 70, 50
Report = dict[str, Any]
Tried = dict[str, Any]


def store(report: Report) -> str:
    """The real rows: whole density stage against the original's search."""
    part = report["store"]
    lines = [
        _conditions(report, "store"),
        "",
        "| rows | search | seconds | memory, MiB | recall@10, sampled | audit, at least | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows, found in _sizes(part):
        for title in ("sklearn", "auto", "hnsw", "hnsw, 4 shards"):
            (tried,) = found[title]["tried"]
            name = "scikit-learn, full rows" if title == "sklearn" else f"density stage, {title}"
            name += f" (took {tried['method']})" if title == "auto" else ""
            bound = f"{tried['audit_recall_lower']:.5f}" if title != "sklearn" else ""
            faster = "1" if title == "sklearn" else f"{found['times_faster'][title]:,}"
            lines.append(
                f"| {int(rows):,} | {name} | {tried['seconds']:.1f} | {found[title]['memory_mib']:,} "
                f"| {tried['recall']:.4f} | {bound} | {faster} |"
            )
    return "\n".join(lines)


def shards(report: Report) -> str:
    """One effort over more and more graphs."""
    part = report["shards"]
    lines = [_conditions(report, "shards"), "", "| points | graphs | seconds | recall@10 |", "|---|---|---|---|"]
    for title, found in part.items():
        if isinstance(found, dict):
            kind, count = title.split()
            (tried,) = found["tried"]
            name = "real rows" if kind == "store" else kind
            lines.append(f"| {name}, {part['rows']:,} | {count} | {tried['seconds']:.1f} | {tried['recall']:.4f} |")
    return "\n".join(lines)


def engines(report: Report) -> str:
    """Engines side by side: each at its least setting that reaches the target."""
    part = report["engines"]
    lines = [
        _conditions(report, "engines"),
        "",
        "| points | engine | setting | seconds | of the flat index | memory, MiB | recall@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, found in part.items():
        if not isinstance(found, dict):
            continue
        kind, rows = title.split()
        flat = found["faiss-flat"]["tried"][0]["seconds"]
        for engine, name in _ENGINES.items():
            if engine not in found:
                continue
            tried = _least(found[engine]["tried"]) if "ef" in found[engine]["tried"][0] else found[engine]["tried"][0]
            setting = f"ef {tried['ef']}" if "ef" in tried else ""
            lines.append(
                f"| {kind}, {int(rows):,} | {name} | {setting} | {tried['seconds']:.1f} | {tried['seconds'] / flat:.2f} "
                f"| {found[engine]['memory_mib']:,} | {tried['recall']:.4f} |"
            )
    return "\n".join(lines)


def copies(report: Report) -> str:
    """What repeated prompts do to a graph."""
    part = report["copies"]
    plain = ", ".join(f"{each['recall']:.2f} (ef {each['ef']})" for each in part["hnswlib"]["tried"])
    (ours,) = part["embstore"]["tried"]
    return (
        f"8 groups of 500 copies among 4,000 distinct points: recall of plain hnswlib {plain}; of the density stage with "
        f"`--knn hnsw` {ours['recall']:.4f}."
    )


def large(report: Report) -> str:
    """The density stage under 2 GiB, and the fitted growth."""
    part = report["large"]
    lines = [
        _conditions(report, "large"),
        "",
        "| points | took | sample's recall | seconds | memory, MiB | recall@10 | audit, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, found in part.items():
        if not isinstance(found, dict) or "auto" not in found:
            continue
        kind, rows = title.split()
        (tried,) = found["auto"]["tried"]
        pilot = "" if tried["pilot_recall"] is None else f"{tried['pilot_recall']:.4f}"
        lines.append(
            f"| {kind}, {int(rows):,} | {tried['method']} | {pilot} | {tried['seconds']:,.1f} "
            f"| {found['auto']['memory_mib']:,} | {tried['recall']:.4f} | {tried['audit_recall_lower']:.5f} |"
        )
        lines += [
            f"| {kind}, {int(rows):,} | {name}, ef {graph['ef']} | | {graph['seconds']:,.1f} "
            f"| {found[engine]['memory_mib']:,} | {graph['recall']:.4f} | |"
            for engine, name in (("one graph", "one graph alone"), ("two graphs", "two graphs alone"))
            for graph in found.get(engine, {"tried": []})["tried"]
        ]
    growth = ", ".join(f"{name}: {exponent:.2f}" for name, exponent in part["growth"].items())
    return "\n".join([*lines, "", f"Seconds grow as a power of the rows, fitted at recall {_GROWTH} or more: {growth}."])


SECTIONS: dict[str, Callable[[Report], str]] = {
    "store": store,
    "shards": shards,
    "engines": engines,
    "copies": copies,
    "large": large,
}


def page(text: str) -> str:
    """The page with every section's figures between its marks."""
    report: Report = json.loads(REPORT.read_text())
    for name, render in SECTIONS.items():
        begin, end = f"<!-- {name}: made by python -m scripts.density_page -->\n", f"<!-- end of {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"{PAGE.name} has no section {name!r}")
        text = f"{before}{begin}{render(report)}\n{end}{after}"
    return text


def plot() -> str:
    """Seconds over rows, both axes logarithmic, of the density stage and of single graphs of recall 0.99."""
    part = json.loads(REPORT.read_text())["large"]
    curves = {line: _curve(part, *line) for line in _LINES}
    points = [point for curve in curves.values() for point in curve]
    most_rows, most_seconds = (10 ** math.ceil(math.log10(max(values))) for values in zip(*points, strict=True))
    rows_range, seconds_range = (10**4, most_rows), (1, most_seconds)
    shapes = [_axes(rows_range, seconds_range)]
    for place, (line, (name, colour)) in enumerate(_LINES.items()):
        at = [_at(point, rows_range, seconds_range) for point in curves[line]]
        shapes.append(f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in at)}" fill="none" stroke="{colour}"/>')
        shapes += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in at]
        shapes.append(f'<rect x="{_LEFT + 12}" y="{14 + 18 * place}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{_LEFT + 30}" y="{24 + 18 * place}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _curve(part: Report, engine: str, kind: str) -> list[tuple[int, float]]:
    curve = []
    for title, found in part.items():
        if title.startswith(f"{kind} ") and engine in found:
            good = [each["seconds"] for each in found[engine]["tried"] if each["recall"] >= _GROWTH]
            if good:
                curve.append((int(title.split()[1]), min(good)))
    return curve


def _at(point: tuple[float, float], rows_range: tuple[int, int], seconds_range: tuple[int, int]) -> tuple[float, float]:
    shares = [
        (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
        for value, (low, high) in zip(point, (rows_range, seconds_range), strict=True)
    ]
    return _LEFT + shares[0] * (_WIDTH - _LEFT - 20), _HEIGHT - _BOTTOM - shares[1] * (_HEIGHT - _BOTTOM - 12)


def _axes(rows_range: tuple[int, int], seconds_range: tuple[int, int]) -> str:
    lines = []
    for power in range(round(math.log10(rows_range[0])), round(math.log10(rows_range[1])) + 1):
        x, low = _at((10**power, seconds_range[0]), rows_range, seconds_range)
        _, high = _at((10**power, seconds_range[1]), rows_range, seconds_range)
        lines.append(f'<line x1="{x:.0f}" y1="{low:.0f}" x2="{x:.0f}" y2="{high:.0f}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.0f}" y="{low + 16:.0f}" text-anchor="middle">{10**power:,}</text>')
    for power in range(round(math.log10(seconds_range[1])) + 1):
        left, y = _at((rows_range[0], 10**power), rows_range, seconds_range)
        right, _ = _at((rows_range[1], 10**power), rows_range, seconds_range)
        lines.append(f'<line x1="{left:.0f}" y1="{y:.0f}" x2="{right:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{10**power:,} s</text>')
    middle = (_LEFT + _WIDTH) // 2
    lines.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">distinct rows of 256 coordinates</text>')
    return "\n".join(lines)


def _sizes(part: Report) -> list[tuple[str, Any]]:
    return [(rows, found) for rows, found in part.items() if rows.isdigit()]


def _least(tried: list[Tried]) -> Tried:
    """The fastest setting that reaches the target; where none does, the one that comes nearest."""
    good = [each for each in tried if each["recall"] >= _TARGET]
    return min(good, key=lambda each: each["seconds"]) if good else max(tried, key=lambda each: each["recall"])


def _conditions(report: Report, part: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{report[part]['command']}`, {report[part]['date']}, {report['hardware']}; {versions}."


def main() -> None:
    """Rewrite page and plot."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PLOT.write_text(plot(), encoding="utf-8")


if __name__ == "__main__":
    main()
