"""Tables of models of real shapes: memory, time around the pass, both orders, and a loop by hand."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables import Report, fill, paragraphs, table

_GIB = 1 << 30


def models(report: Report) -> str:
    """What was measured of each shape; parts that were not run are left out."""
    machine = next(iter(report.values()))["machine"]
    return paragraphs(
        fill(
            "`python -m benchmarks.models`, {cpu}, {cores} cores, {memory_GiB:.0f} GiB; torch {torch}, transformers "
            "{transformers}. Weights are random; prompts are the first N of 28,000.",
            machine,
        ),
        table(
            list(_builds(report)),
            {
                "shape": "{shape}",
                "prompts>": "{prompts}",
                "peak anonymous memory of the process, GiB>": "{peak_GiB:.2f}",
                "pass, s>": "{pass_seconds:.1f}",
                "around it, s>": "{outside_seconds:.1f}",
                "until the first word, s>": "{first_word_seconds:.1f}",
            },
        ),
        table(
            list(_speeds(report)),
            {"what": "{what}", "prompts>": "{prompts}", "speed>": "{speed:.2f}", "rounds>": "{rounds}", "rows": "{rows}"},
        ),
    )


def _builds(report: Report) -> Iterator[Report]:
    for shape in ("0.5B", "8B"):
        for build in report.get(shape, {}).get("builds", {}).values():
            yield {"shape": shape, "peak_GiB": build["peak_anonymous_bytes"] / _GIB, **build}


def _speeds(report: Report) -> Iterator[Report]:
    for shape in ("0.5B", "1.7B"):
        if "orders" in report.get(shape, {}):
            orders = report[shape]["orders"]
            yield {
                "what": f"{shape}: layered against plain",
                "prompts": orders["prompts"],
                "speed": orders["speed"],
                "rounds": len(orders["rounds"]),
                "rows": "the same bytes" if orders["same_bytes"] else "other bytes",
            }
    for build in report.get("8B", {}).get("builds", {}).values():
        yield {
            "what": "8B: layered in 2 GiB against transformers' own backbone over the same batches, weights mapped",
            "prompts": build["prompts"],
            "speed": build["speed"],
            "rounds": 1,
            "rows": "",
        }
    if "small" in report:
        small = report["small"]
        yield {
            "what": "4 layers of width 256: against the version before weights stayed as stored",
            "prompts": small["prompts"],
            "speed": small["speed"],
            "rounds": len(small["pairs"]),
            "rows": "",
        }
