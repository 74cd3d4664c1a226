"""The section ``levers`` of docs/performance.md, from what ``python -m benchmarks.levers`` wrote."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]

_HEADER = [
    "| lever | way | median | lowest to highest | times embstore's | error |",
    "|---|---|---:|---:|---:|---:|",
]


def section(report: Report) -> str:
    """One table of all ways that were timed, one of attention, one of windows."""
    parts = {name: figures for name, figures in report.items() if isinstance(figures, dict) and "groups" in figures}
    dates = sorted({figures["date"] for figures in parts.values()})
    command = next(iter(parts.values()))["command"].partition(" --parts ")[0]
    versions = report["versions"]
    lines = [
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {report['hardware']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}: `{command}`",
        "",
        *_HEADER,
    ]
    for name, figures in parts.items():
        if name != "attention":
            for group in figures["groups"]:
                lines += _rows(group)
    lines += [f"\n{name}: skipped, {figures['skipped']}" for name, figures in parts.items() if "skipped" in figures]
    return "\n".join([*lines, *_attention(parts["attention"]["groups"]), *_windows(parts["windows"])])


def _rows(group: Report) -> list[str]:
    lines = []
    for index, way in enumerate(group["ways"]):
        name = f"**{way['name']}**" if way["is_ours"] else way["name"]
        if "compile_seconds" in way:
            name += f", {way['compile_seconds']:.0f} s to compile"
        if "stored_share" in way:
            name += f", {way['stored_share']:.3f} of the size"
        error = f"{way['error']:.1e}" if "error" in way else ""
        title = f"{group['title']}, {group['unit']}" if index == 0 else ""
        low, high = min(way["singles"]), max(way["singles"])
        lines.append(
            f"| {title} | {name} | {way['median']:.3g} | {low:.3g} to {high:.3g} | {way['times_ours']:.2f} | {error} |"
        )
    return lines


def _attention(groups: list[Report]) -> list[str]:
    """Ways by tokens of a row, one block for each dtype."""
    lengths = list(dict.fromkeys(group["length"] for group in groups))
    lines = [
        "",
        f"| attention, {groups[0]['unit']} | {' | '.join(f'{length} tokens' for length in lengths)} | largest error |",
        "|---|" + "---:|" * (len(lengths) + 1),
    ]
    for dtype in dict.fromkeys(group["dtype"] for group in groups):
        for ways in zip(*(group["ways"] for group in groups if group["dtype"] == dtype), strict=True):
            name = f"**{ways[0]['name']}**" if ways[0]["is_ours"] else ways[0]["name"]
            cells = [f"{way['median']:.3g} ({way['times_ours']:.2f})" for way in ways]
            error = max(way["error"] for way in ways)
            lines.append(f"| {dtype}: {name} | {' | '.join(cells)} | {error:.1e} |")
    return lines


def _windows(figures: Report) -> list[str]:
    """Padding and number of batches by sizes."""
    sizes = list(dict.fromkeys(each["batch_tokens"] for each in figures["table"]))
    lines = [
        "",
        f"| padding and batches, {figures['rows']:,} prompts | {' | '.join(f'{size} batch tokens' for size in sizes)} |",
        "|---|" + "---:|" * len(sizes),
    ]
    for window in dict.fromkeys(each["window_rows"] for each in figures["table"]):
        row = [each for each in figures["table"] if each["window_rows"] == window]
        cells = [f"{each['padding_waste']:.1%}, {each['batches']:,}" for each in row]
        lines.append(f"| windows of {window} rows | {' | '.join(cells)} |")
    return lines
