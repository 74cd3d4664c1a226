"""Put measured figures into ``docs/performance.md`` and its plot: ``python -m scripts.performance_page``.

``python -m benchmarks.embedding`` writes ``benchmarks/results/embedding.json``; page and plot show it, and a test compares.
``python -m benchmarks.levers`` writes ``benchmarks/results/levers.json``, shown by scripts/performance_levers.py.
``python -m benchmarks.gpu`` writes ``benchmarks/results/gpu.json``; its section stays as it is where that file is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import performance_levers

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "embedding.json"
LEVERS_REPORT = ROOT / "benchmarks" / "results" / "levers.json"
GPU_REPORT = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.svg"

_NAMES = {
    "original": "original method",
    "careful": "careful user",
    "backbone": "backbone alone (floor)",
    "packed": "the same, layers packed (floor raised)",
    "rows": "embstore, rows dropped",
    "store": "embstore, store written",
}
_COLOURS = {"float32": "#4878a8", "bfloat16": "#e08a3c"}
_LABEL, _BAR, _WIDTH = 190, 16, 720
Report = dict[str, Any]


def methods(report: Report) -> str:
    """The comparison, one table for each dtype, and what it was run on."""
    lines = [_conditions(report, "methods")]
    for dtype in _COLOURS:
        table = report["methods"][dtype]
        lines += [
            "",
            f"**{dtype}**",
            "",
            "| | rows/s | tokens/s | share of the floor | of the raised floor | times the original "
            "| times the float32 original | padding | memory above the model |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, title in _NAMES.items():
            each = table[name]
            waste = f"{each['padding_waste']:.1%}" if "padding_waste" in each else ""
            lines.append(
                f"| {title} | {each['rows_per_second']:.0f} | {each['tokens_per_second']:,.0f} "
                f"| {each['share_of_floor']:.3f} | {each['share_of_raised_floor']:.3f} "
                f"| {each['times_original']:.1f} | {each['times_float32_original']:.1f} "
                f"| {waste} | {each['peak_anonymous_bytes'] / 2**20:.0f} MiB |"
            )
        floor, store = table["backbone"], table["store"]
        lines += [
            "",
            f"The floor runs at {floor['gflops']:.0f} GFLOP/s, {floor['share_of_gemm_rate']:.0%} of what a large product "
            f"reaches here ({report['machine'][dtype]['square']:.0f}), and raised at {table['packed']['gflops']:.0f}. "
            f"embstore takes {store['milliseconds_a_row_beyond_backbone']:.2f} ms a row more than the floor. Everything "
            f"beyond its own backbone takes {store['milliseconds_a_row_beyond_packed_backbone']:.2f} ms a row, of which "
            f"tokenisation, timed alone, is {store['milliseconds_a_row_tokenising']:.2f}. With the store the embedding "
            f"stage takes {store['seconds_over_without_store']:.3f} of its time without.",
        ]
    return "\n".join(lines)


def sweep(report: Report) -> str:
    """Rows a second of the backbone under every setting."""
    lines = [_conditions(report, "sweep"), ""]
    for dtype in _COLOURS:
        found = report["sweep"][dtype]
        settings = list(dict.fromkeys((each["mask"], each["workers"]) for each in found["table"]))
        titles = [f"{'mask' if mask else 'no mask'}, {_workers(workers)}" for mask, workers in settings]
        lines += [f"| {dtype}: batch tokens | padding | {' | '.join(titles)} |", "|---:|---:|" + "---:|" * len(titles)]
        for tokens in dict.fromkeys(each["batch_tokens"] for each in found["table"]):
            row = [each for each in found["table"] if each["batch_tokens"] == tokens]
            rates = [f"{each['rows_per_second']:.0f}" for each in row]
            lines.append(f"| {tokens} | {row[0]['padding_waste']:.1%} | {' | '.join(rates)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _workers(count: int) -> str:
    return f"{count} workers of one thread" if count > 1 else "all threads on one batch"


def streamed(report: Report) -> str:
    """Heads that are not affine against the original method."""
    lines = [_conditions(report, "streamed"), "", "| head | original | embstore | times the original | memory |"]
    lines += ["|---|---:|---:|---:|---:|"]
    titles = {"capped": "soft cap (NanoChat)", "network": "network (ModernBERT decoder)"}
    for name, title in titles.items():
        each = report["streamed"][name]
        lines.append(
            f"| {title} | {each['original']['rows_per_second']:.1f} rows/s | {each['rows']['rows_per_second']:.1f} rows/s "
            f"| {each['times_original']:.1f} | {each['original']['peak_anonymous_bytes'] / 2**20:.0f} MiB and "
            f"{each['rows']['peak_anonymous_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def writer(report: Report) -> str:
    """The writer alone."""
    found = report["writer"]
    raw, direct, ours = (found[f"{name}_bytes_per_second"] / 1e6 for name in ("raw", "direct", "writer"))
    return (
        f"{found['chunks']} chunks, {found['bytes'] / 2**20:.0f} MiB encoded, four windows. Raw durable writes, at best: "
        f"through the page cache {raw:,.0f} MB/s, past it {direct:,.0f} MB/s. The writer, which compresses: "
        f"{ours:,.0f} MB/s, {found['share_of_raw']:.2f} and {found['share_of_direct']:.2f} of them "
        f"({_conditions(report, 'writer')})"
    )


def scale(report: Report) -> str:
    """Rate and memory over the number of prompts."""
    lines = [_conditions(report, "scale"), "", "| prompts | rows/s | memory above the baseline |", "|---:|---:|---:|"]
    lines += [
        f"| {each['rows']:,} | {each['rows_per_second']:.0f} | {each['peak_anonymous_bytes'] / 2**20:.0f} MiB |"
        for each in report["scale"]["sizes"]
    ]
    return "\n".join([*lines, "", f"Slowest over fastest: {report['scale']['slowest_over_fastest']:.3f}."])


def dtype(report: Report) -> str:
    """What a bfloat16 backbone does to neighbours and weights."""
    found = report["dtype"]
    rates = [f"{found[name]['rows_per_second']:.0f}" for name in _COLOURS]
    return (
        f"{found['bfloat16']['rows']:,} prompts: recall@10 of the bfloat16 neighbours against the float32 ones "
        f"{found['recall_at_10']:.4f}, TV of the weights {found['total_variation']:.1e}; {' and '.join(rates)} rows/s. "
        f"`--dtype auto` took {found['auto_takes']} "
        f"({_conditions(report, 'dtype')})"
    )


def profile(report: Report) -> str:
    """Where the time of one window goes."""
    lines = [_conditions(report, "profile"), "", "| | float32 | bfloat16 |", "|---|---:|---:|"]
    both = [report["profile"][name] for name in _COLOURS]
    for stage in both[0]["milliseconds_a_row_on_one_thread"]:
        cells = [f"{each['milliseconds_a_row_on_one_thread'][stage]:.3f} ms a row" for each in both]
        lines.append(f"| {stage}, one thread | {' | '.join(cells)} |")
    for name in list(both[0]["share_by_operation"])[:8]:
        cells = [f"{each['share_by_operation'].get(name, 0):.1%}" for each in both]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def levers(_: Report) -> str:
    """Every lever that was tried, from a report of its own."""
    return performance_levers.section(json.loads(LEVERS_REPORT.read_text()))


def gpu(report: Report) -> str:
    """The device, then for each model: methods, settings of the floor, and where the time of a window goes."""
    versions, machine = report["versions"], report["machine"]
    lines = [
        f"{machine['date']}, {machine['device']}, {machine['cores']} cores of {machine['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}: `{report['command']}`",
        "",
        f"Measured ceilings: bfloat16 products {machine['bfloat16_flops'] / 1e12:.0f} TFLOP/s, float32 products "
        f"{machine['float32_flops'] / 1e12:.0f} TFLOP/s, copies to pinned host memory "
        f"{machine['pinned_to_host_bytes_per_second'] / 1e9:.1f} GB/s, encoding on 4 threads "
        f"{machine['encode_4_bytes_per_second'] / 1e9:.2f} GB/s, durable writes on {machine['file_system']} "
        f"{machine['durable_write_4_bytes_per_second'] / 1e9:.2f} GB/s.",
    ]
    for found in report["models"].values():
        lines += ["", *_gpu_model(found)]
    return "\n".join(lines)


def _gpu_model(found: Report) -> list[str]:
    model, floor, embed = found["model"], found["floor"], found["embed"]
    methods = {
        "original method": found.get("original", {}),
        f"backbone alone (floor, batches of {floor['batch_tokens']:,} tokens)": floor | {"share_of_floor": 1.0},
        "embstore, rows dropped": embed["rows"],
        "embstore, store written": embed["store"],
    }
    lines = [
        f"**{model['name']}**, {model['layers']} layers, width {model['width']}, {model['vocabulary']:,} columns; "
        f"{model['rows']:,} prompts, bfloat16",
        "",
        "| | rows/s | tokens/s | share of the floor | MFU, measured peak | MFU, datasheet | device memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, each in methods.items():
        if "rows_per_second" not in each:
            continue
        share = f"{each['share_of_floor']:.3f}" if "share_of_floor" in each else ""
        mfu = [f"{each[name]:.1%}" if name in each else "" for name in ("mfu_of_measured", "mfu_of_datasheet")]
        memory = f"{each['peak_device_bytes'] / 2**30:.1f} GiB" if "peak_device_bytes" in each else ""
        lines.append(
            f"| {title} | {each['rows_per_second']:,.0f} | {each['tokens_per_second']:,.0f} | {share} "
            f"| {mfu[0]} | {mfu[1]} | {memory} |"
        )
    store = embed["store"]
    lines += [
        "",
        f"The store takes {store['raw_bytes_per_second'] / 1e9:.2f} GB/s of rows, "
        f"{store['stored_bytes_per_second'] / 1e9:.2f} GB/s encoded.",
    ]
    if "seconds_overlapped" in (profile := found.get("profile", {})):
        stages = ", ".join(
            f"{name} {1e3 * seconds / profile['rows']:.3f}"
            for name, seconds in profile["seconds_one_after_the_other"].items()
        )
        lines[-1] += (
            f" Milliseconds a row, one after the other: {stages}; overlapped "
            f"{1e3 * profile['seconds_overlapped'] / profile['rows']:.3f}, with the device busy "
            f"{profile['device_busy_seconds'] / profile['seconds_overlapped']:.0%} of it."
        )
    if "rows_per_second" in (compiled := found.get("compile", {})):
        lines[-1] += (
            f" `torch.compile` of the layers makes the floor {compiled['times_uncompiled']:.2f} times as fast, after "
            f"{compiled['compile_seconds']:.0f} s of compiling"
        )
        if unmasked := compiled.get("without_mask"):
            lines[-1] += (
                f"; without the mask {unmasked['times_uncompiled']:.2f} times, after {unmasked['compile_seconds']:.0f} s"
            )
        lines[-1] += "."
    own = floor["table"][-1]
    with_cudnn = [each for each in floor["table"] if each["cudnn_attention"]]
    (same,) = (each for each in with_cudnn if all(each[name] == own[name] for name in ("batch_tokens", "mask")))
    lines[-1] += (
        f" The floor at {own['batch_tokens']:,} tokens a batch, over shapes already seen and over new ones: "
        f"{same['rows_per_second']:,.0f} and {same['rows_per_second_of_new_shapes']:,.0f} rows/s; without cuDNN's attention "
        f"{own['rows_per_second']:,.0f} and {own['rows_per_second_of_new_shapes']:,.0f}."
    )
    masks = {True: "mask", False: "no mask"}
    lines += ["", "| batch tokens | padding | " + " | ".join(f"floor, {each}" for each in masks.values()) + " |"]
    lines.append("|---:|---:|---:|---:|")
    for tokens in dict.fromkeys(each["batch_tokens"] for each in with_cudnn):
        row = [each for each in with_cudnn if each["batch_tokens"] == tokens]
        rates = [next((f"{each['rows_per_second']:,.0f}" for each in row if each["mask"] == mask), "") for mask in masks]
        lines.append(f"| {tokens:,} | {row[0]['padding']:.1%} | {rates[0]} | {rates[1]} |")
    return lines


def _conditions(report: Report, part: str) -> str:
    versions = report["versions"]
    return (
        f"{report[part]['date']}, {report['hardware']}, torch {versions['torch']}, transformers {versions['transformers']}: "
        f"`{report[part]['command']}`"
    )


SECTIONS: dict[str, Callable[[Report], str]] = {
    "methods": methods,
    "sweep": sweep,
    "streamed": streamed,
    "levers": levers,
    "writer": writer,
    "scale": scale,
    "dtype": dtype,
    "profile": profile,
}


def page(text: str) -> str:
    """The page with every section's figures between its marks."""
    report: Report = json.loads(REPORT.read_text())
    for name, render in SECTIONS.items():
        text = _filled(text, name, render(report))
    return _filled(text, "gpu", gpu(json.loads(GPU_REPORT.read_text()))) if GPU_REPORT.exists() else text


def _filled(text: str, name: str, figures: str) -> str:
    begin, end = f"<!-- {name}: made by python -m scripts.performance_page -->\n", f"<!-- end of {name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{PAGE.name} has no section {name!r}")
    return f"{before}{begin}{figures}\n{end}{after}"


def plot() -> str:
    """Bars of rows a second for every method and dtype, and for every number of prompts."""
    report: Report = json.loads(REPORT.read_text())
    groups = [
        (title, [(dtype, report["methods"][dtype][name]["rows_per_second"]) for dtype in _COLOURS])
        for name, title in _NAMES.items()
    ]
    auto = report["dtype"]["auto_takes"]
    groups += [(f"{each['rows']:,} prompts, auto", [(auto, each["rows_per_second"])]) for each in report["scale"]["sizes"]]
    most = max(rate for _, bars in groups for _, rate in bars)
    shapes, top = [], 34
    for title, bars in groups:
        middle = top + _BAR * len(bars) / 2 + 4
        shapes.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{title}</text>')
        for name, rate in bars:
            width = (_WIDTH - _LABEL - 60) * rate / most
            shapes.append(f'<rect x="{_LABEL}" y="{top}" width="{width:.0f}" height="{_BAR - 2}" fill="{_COLOURS[name]}"/>')
            shapes.append(f'<text x="{_LABEL + width + 5:.0f}" y="{top + _BAR - 5}">{rate:.0f}</text>')
            top += _BAR
        top += 8
    keys = "".join(
        f'<rect x="{_LABEL + 110 * index}" y="8" width="12" height="12" fill="{colour}"/>'
        f'<text x="{_LABEL + 110 * index + 17}" y="18">{name}</text>'
        for index, (name, colour) in enumerate(_COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="8" y="18">rows a second</text>\n{keys}\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def main() -> None:
    """Rewrite page and plot."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PLOT.write_text(plot(), encoding="utf-8")


if __name__ == "__main__":
    main()
