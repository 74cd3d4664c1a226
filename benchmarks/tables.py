"""Tables of the documentation, as Markdown: the README's figures, faults, reuse, workers, costs, training.

``benchmarks/pages.py`` lists which block of which page shows which results; ``benchmarks/speed_tables.py`` has the tables of
embedding and search. Cells are format strings over one row's figures: ``{store[rows_per_second]:.0f}``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Report = dict[str, Any]

DTYPES = ("float32", "bfloat16")
_UNITS = {"MiB": (2**20, ",.0f"), "GiB": (2**30, ".1f"), "MB": (1e6, ",.0f"), "GB": (1e9, ".2f"), "T": (1e12, ".0f")}


class _Cells(string.Formatter):
    """``str.format`` with units (``{bytes:MiB}``) and a space before percent signs."""

    def format_field(self, value: Any, format_spec: str) -> str:  # noqa: ANN401 - as the class it extends
        if format_spec in _UNITS:
            divisor, format_spec = _UNITS[format_spec]
            value /= divisor
        shown = str(format(value, format_spec))
        return shown.replace("%", " %") if format_spec.endswith("%") else shown


def fill(text: str, figures: Mapping[str, Any]) -> str:
    """The text with its figures.

    Examples
    --------
    >>> fill("{a[share]:.0%}, {a[memory]:MiB} MiB", {"a": {"share": 0.913, "memory": 3 << 20}})
    '91 %, 3 MiB'
    """
    return _Cells().vformat(text, (), figures)


def _cell(text: str, figures: Mapping[str, Any]) -> str:
    try:
        return fill(text, figures)
    except KeyError:
        return ""  # not every row has every figure


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table: head and cell of each column; a head that ends in ``>`` sets its column to the right.

    A cell is empty where its row lacks a figure.

    Examples
    --------
    >>> print(table([{"name": "a", "rows": 3000}], {"name": "{name}", "rows>": "{rows:,}"}))
    | name | rows |
    |---|---:|
    | a | 3,000 |
    """
    lines = [[head.removesuffix(">") for head in columns]]
    lines += [[_cell(cell, row) for cell in columns.values()] for row in rows]
    text = [re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |") for line in lines]
    return "\n".join([text[0], "|" + "".join("---:|" if head.endswith(">") else "---|" for head in columns), *text[1:]])


def paragraphs(*parts: str) -> str:
    """Parts of a block, a blank line between them."""
    return "\n\n".join(parts)


def machine_of(report: Report) -> str:
    """Hardware and versions, where results have them as ``machine``."""
    return fill("{cpu}, {cores} cores, python {python}, torch {torch}", report["machine"])


# --- README -----------------------------------------------------------------------------------------------------------

_README = """\
| Measured on two CPU cores | | |
|---|---|---|
| Embedding speed, as a share of running the backbone alone | **{store[share_of_floor]:.0%}** in {default} \
(the default here), {other_store[share_of_floor]:.0%} in {other} | {store[rows_per_second]:.0f} and \
{other_store[rows_per_second]:.0f} rows/s, \
{store[times_original]:.0f} and {other_store[times_original]:.0f} times the original method \
([performance](docs/performance.md)) |
| Acknowledged rows lost | **{lost}** | in {processes:,} kills, signals and I/O errors, {cuts:,} power cuts of real file \
systems, {full:,} full disks, and {modelled:,} kills and power cuts of a modelled disk \
([reliability](docs/reliability.md#the-run)) |
| True 10 nearest neighbours found | **{search[recall]:.2%}** | at least {search[audit_recall_lower]:.2%} with 95 % \
confidence; 28,000 prompts in {search[seconds]:.1f} s, {faster:,} times as fast as scikit-learn over the full rows \
([density](docs/density.md#search-engines)) |
| Weights at the start of training, joined by content | **{joined[density_seconds]:.1f} s** | {prompts:,} prompts, on a \
busy machine; computing them there took {online[density_seconds]:.0f} s ([training](docs/training.md#figures)) |
| Memory of a build with an 8B checkpoint, a file of 15 GiB | **{large_GiB:.1f} GiB** | random weights, \
{large[prompts]} prompts, at {large[speed]:.2f} of the speed of its bare \
backbone ([models](docs/performance.md#models-of-real-shapes)) |"""


def readme(embedding: Report, report: Report, knn: Report, models: Report, training: Report) -> str:
    """The figures that a stranger sees first."""
    default = embedding["dtype"]["auto_takes"]
    other = next(dtype for dtype in DTYPES if dtype != default)
    kinds = faults_by_kind(report)[ACKNOWLEDGED]
    times = {title: sum(row["cycles"] for row in rows) for title, rows in kinds.items()}
    modelled = sum(count for title, count in times.items() if "modelled" in title)
    large = models["8B"]["builds"]["64"]
    figures = {
        "default": default,
        "other": other,
        "store": embedding["methods"][default]["store"],
        "other_store": embedding["methods"][other]["store"],
        "lost": sum(row["losses"] for rows in kinds.values() for row in rows),
        "processes": sum(times.values()) - modelled - times[_REAL_CUTS] - times[_FULL_DISKS],
        "cuts": times[_REAL_CUTS],
        "full": times[_FULL_DISKS],
        "modelled": modelled,
        "search": knn["store"]["28000"]["auto"]["tried"][0],
        "faster": knn["store"]["28000"]["times_faster"]["auto"],
        "large": large,
        "large_GiB": large["peak_anonymous_bytes"] / (1 << 30),
        **training["start"],
    }
    return fill(_README, figures)


# --- faults -----------------------------------------------------------------------------------------------------------

ACKNOWLEDGED = "Faults that could lose an acknowledged row"
_REAL_CUTS, _FULL_DISKS = "power cut of a real file system", "full disk"
_ERRORS = ("EDQUOT", "EIO", "EMFILE", "ENOLCK", "ENOSPC", "EROFS")
_ROT = ("damaged", "deleted", "emptied", "file replaced", "flipped", "grown", "journal", "swapped", "truncated", "zero")
_HOSTILE = ("hostile", "two billion", "one file of a store", "a terabyte", "link, FIFO")
_IN_PROCESS = ("crash during", "kill at any call", "write torn", "exception in")
_FAULTS: dict[str, dict[str, Callable[[str], bool]]] = {
    ACKNOWLEDGED: {
        "process killed at a random moment": lambda fault: fault.startswith("SIGKILL at a random moment"),
        "process killed at a system call, each in turn": lambda fault: fault.startswith("SIGKILL at the n-th"),
        "process stopped by SIGINT or SIGTERM": lambda fault: fault.startswith("SIGINT"),
        "build ended in process: at a call, in a stage, in a recovery": lambda fault: fault.startswith(_IN_PROCESS),
        "I/O error returned by a call, each in turn": lambda fault: fault.startswith(_ERRORS),
        _FULL_DISKS: lambda fault: fault.startswith("full disk"),
        _REAL_CUTS: lambda fault: fault.startswith("power cut") and not fault.endswith("modelled"),
        "power cut, modelled disk": lambda fault: fault.startswith("power cut"),
        "kill, resume or second writer, modelled disk": lambda fault: fault.endswith("modelled") and "sync" not in fault,
    },
    "Damaged and hostile files": {
        "bit rot: one damage in one file, then read": lambda fault: fault.startswith(_ROT),
        "hostile file": lambda fault: fault.startswith(_HOSTILE) or fault.endswith("in the place of a file or folder"),
    },
    "Everything else": {
        "mutation: one kind of sync left out, and noticed": lambda fault: fault.startswith("left-out sync"),
        "weights or neighbours replaced under a reader, locks, foreign chunks": lambda _: True,
    },
}


def faults_by_kind(report: Report) -> dict[str, dict[str, list[Report]]]:
    """Rows of a run by group and kind; each row counts in the first kind that fits."""
    left: list[Report] = list(report["faults"])
    found: dict[str, dict[str, list[Report]]] = {}
    for group, kinds in _FAULTS.items():
        for title, is_one in kinds.items():
            found.setdefault(group, {})[title] = [row for row in left if is_one(row["fault"])]
            left = [row for row in left if not is_one(row["fault"])]
    return found


def faults(report: Report) -> str:
    """What was injected, how often, and what was lost."""
    user = "root" if report["root"] else "an unprivileged user"
    parts = [
        f"One run of `make test-faults`: {report['seconds'] / 60:.0f} minutes on {report['cores']} cores as {user}, Linux "
        f"{report['kernel']}, Python {report['python']}. {report.get('remark', '')}".rstrip()
    ]
    for group, kinds in faults_by_kind(report).items():
        rows = [_counted(title, found) for title, found in kinds.items()]
        if group == ACKNOWLEDGED:
            rows.append(_counted("together", [row for found in kinds.values() for row in found]) | {"tests": ""})
        columns = {group: "{title}", "times>": "{times:,}", "lost, wrong or missed>": "{lost}", "tests": "{tests}"}
        parts.append(table(rows, columns))
    return paragraphs(*parts)


def _counted(title: str, rows: list[Report]) -> Report:
    tests = dict.fromkeys(row["test"].partition("::")[0].removeprefix("tests/") for row in rows)
    counts = {"times": sum(row["cycles"] for row in rows), "lost": sum(row["losses"] for row in rows)}
    return {"title": title, "tests": ", ".join(f"`{path}`" for path in tests), **counts}


def peers(report: Report) -> str:
    """What each writer lost of what it had reported."""
    writers: dict[str, Report] = {}
    columns = {"writer": "{writer}"}
    for row in report["rows"]:
        head = f"{row['file_system']}, {row['log']}>"
        columns[head] = f"{{{head}}}"
        writers.setdefault(row["writer"], {"writer": row["writer"]})[head] = fill("{lost_or_wrong} of {reported}", row)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    cuts = f"{report['rows'][0]['cuts']} cuts a cell"
    said = f"`{report['command']}`, {cuts}, {versions}: lost or wrong, of those reported as written."
    return paragraphs(said, table(writers.values(), columns))


# --- reuse, workers, costs, training ----------------------------------------------------------------------------------


def reuse(report: Report) -> str:
    """A build that copies 27 of 28 rows against a full one."""
    builds = [{"name": name, **report[name][part]} for name in ("auto", "float32") for part in ("full", "reuse")]
    for each in builds:
        each["others"] = sum(each["stage_seconds"].values()) - each["stage_seconds"]["embed"]
    return paragraphs(
        fill("`python -m benchmarks.reuse`, {auto[full][date]}, ", report) + machine_of(report) + ", a busy machine.",
        table(builds, {
            "`--dtype`": "{name}", "rows": "{rows[reused]:,} copied, {rows[embedded]:,} computed",
            "whole command, s>": "{build_seconds:.0f}", "embedding stage, s>": "{stage_seconds[embed]:.1f}",
            "other stages, s>": "{others:.1f}",
        }),
        table([{"name": name, **report[name]} for name in ("auto", "float32")], {
            "`--dtype`": "{name}", "embedding stage, of a full one>": "{ratios[embedding_stage]:.0%}",
            "whole command, of a full one>": "{ratios[whole_command]:.0%}",
            "largest distance to the full build's row>": "{copied_rows[coordinates_l2_largest]:.1e}",
            "TV of the weights>": "{copied_rows[weights_tv]:.1e}",
        }),
    )  # fmt: skip


def scaling(report: Report) -> str:
    """One worker against two."""
    names = {"0": "one process, no Ray", "1": "one worker", "2": "two workers"}
    rows = [{"name": names[count], **each} for count, each in report["builds"].items()]
    columns = {
        "one thread each": "{name}",
        "embedding stage, s>": "{stage_seconds:.0f}",
        "rows/s once loaded>": "{steady_rows_per_second:.0f}",
        "driver's memory, MiB>": "{driver_peak_MiB_above_baseline:.0f}",
        "bytes a row through the driver>": "{driver_bytes_a_row:,}",
    }
    return paragraphs(
        f"`python -m benchmarks.scaling`, {report['date']}, {machine_of(report)}, {rows[0]['rows']:,} prompts.",
        table(rows, columns),
        fill("Efficiency of two workers: {stage:.0%} of the whole stage, {steady:.0%} once loaded.", report["efficiency"]),
    )


def costs(embedding: Report, gpu_report: Report) -> str:
    """What the model's pass takes, for the guide."""
    rows = [
        {"name": f"4 layers of width 256, 2 CPU cores, {name}", **embedding["methods"][name]["store"]} for name in DTYPES
    ]
    for found in gpu_report["models"].values():
        name = fill("{layers} layers of width {width}, ", found["model"])
        rows.append({"name": f"{name}{gpu_report['machine']['device']}, bfloat16", **found["embed"]["store"]})
    columns = {
        "model, device": "{name}",
        "rows/s>": "{rows_per_second:,.0f}",
        "share of the backbone alone>": "{share_of_floor:.2f}",
    }
    return table(rows, columns)


_TRAINING = """\
`{command}`, {machine}, while other work ran on the machine: draws on {d[date]} (load averages {d[load_average]}, times are \
the least of three rounds), the start on {s[date]} (load averages {s[load_average]}, medians of {s[rounds]} rounds and one \
online run).

| what | measured |
|---|---|
| `load_weights`, everything verified | {w[28k][full_ms]:.1f} ms at 28k rows, {w[1M][full_ms]:.1f} ms at 1M, \
{w[100M][full_ms]:.0f} ms at 100M |
| `load_weights(verify="shape")` | {w[28k][shape_ms]:.1f} ms at 28k, {w[1M][shape_ms]:.1f} ms at 1M, \
{w[100M][shape_ms]:.1f} ms at 100M |
| importing `embstore.training`, beyond numpy | {i[over_numpy_ms]:.0f} ms; `import numpy` takes {i[numpy_ms]:.0f} ms, \
`import torch` {i[torch_ms]:,.0f} ms |
| first index at 1M rows, each further million | {ours[first_cpu_ms]:.0f} ms of a CPU, \
{d[systematic_first_cpu_ms_each_further_million]:.0f} ms; torch {torch[first_cpu_ms]:.0f} ms |
| draws a second at 1M rows | {ours[draws_per_second]:,}, torch's `WeightedRandomSampler` {torch[draws_per_second]:,} |
| memory of a pass | {ours[bytes_a_row]:.0f} bytes a row; torch {torch[bytes_a_row]:.0f} |
| 2^24 + 1 rows | drawn; torch: {large[torch_WeightedRandomSampler]} |
| points along a random order; before (`{j[before_commit]}`) along the stored one | first index \
{now[systematic][first_cpu_ms]:.0f} ms of a CPU, before {was[systematic][first_cpu_ms]:.0f} ms; \
{now[systematic][bytes_a_row]:.0f} bytes a row, before {was[systematic][bytes_a_row]:.0f}; \
{now[systematic][draws_per_second_over_before]:.2f} times the draws a second |
| sd of the share of odd rows, equal weights, half as many draws as rows | {now[odd]:.2f} times a simple random sample's; \
before {was[odd]:.1f} times |
| the same for periods 3, 4, 8, 64 and halves, largest | {now[largest]:.2f} times; before {was[largest]:.1f} times |
| two rows drawn together: farthest of 6,144 pairs, in standard errors | {now[pairs]:.1f}; before {was[pairs]:.1f} |
| count of a row after a pass, farthest from n p | {q[28k][largest_distance]:.5f} at 28k, \
{q[1M][largest_distance]:.5f} at 1M |
| weights computed at the start (online), {s[prompts]:,} prompts | {s[online][density_seconds]:.0f} s |
| weights of a store, joined: `load_weights(STORE).for_dataset(dataset)` | {s[joined][density_seconds]:.2f} s, \
{s[times_faster][joined]:,} times as fast |
| weights of a store in its own order: `load_weights(STORE)` | {s[bare][density_seconds]:.3f} s, \
{s[times_faster][bare]:,} times as fast |
| a join of {joined[texts]:,} texts of {joined[characters]} characters, processor time an item \
(load averages {joined[load_average]}) | a text column \
{joined[texts, column, first][cpu_us]:.1f} us, shuffled {joined[texts, shuffled, first][cpu_us]:.1f} us, a list \
{joined[texts, list, first][cpu_us]:.1f} us, records {joined[texts, records, first][cpu_us]:.1f} us; the \
keys alone, one by one, \
{joined[texts, one by one, first][cpu_us]:.1f} us |
| the next start, whose rows are kept | {joined[texts, column, again][cpu_us]:.2f} us, shuffled \
{joined[texts, shuffled, again][cpu_us]:.2f} us |
| a join of {joined[chats]:,} chats of one such text | {joined[chats, column, first][cpu_us]:.1f} us, the next start \
{joined[chats, column, again][cpu_us]:.2f} us |
| from `python` to the first batch of prompts | online {s[online][process_seconds]:.0f} s, joined \
{s[joined][process_seconds]:.1f} s, in the store's order {s[bare][process_seconds]:.1f} s (no model is loaded) |"""


def training(report: Report) -> str:
    """Weights, imports, draws and the start of a training run."""
    draws, short = report["draws"], {"28000": "28k", "1000000": "1M", "100000000": "100M"}
    weights, quotas = (
        {short[rows]: each for rows, each in report[part].items() if rows in short} for part in ("weights", "quotas")
    )
    figures = {
        "w": weights,
        "i": report["imports"],
        "d": draws,
        "q": quotas,
        "s": report["start"],
        "joined": report["joins"],
    }
    figures |= {"command": report["command"], "machine": machine_of(report), "large": draws[str(2**24 + 1)]}
    for name, side in (("was", report["joint"]["before"]), ("now", report["joint"]["after"])):
        figures[name] = {
            **side,
            "odd": side["2"],
            "largest": max(side[each] for each in ("3", "4", "8", "64", "halves")),
            "pairs": max(side[f"pairs_{kind}"] for kind in ("adjacent", "half_apart", "random")),
        }
    figures["j"] = report["joint"]
    one = draws["1000000"]
    return fill(_TRAINING, figures | {"ours": one["systematic"], "torch": one["torch_WeightedRandomSampler"]})
