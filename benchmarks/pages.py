"""Write every table and picture of the documentation from results files: ``python -m benchmarks.pages``.

A block of a page lies between ``<!-- NAME: made by python -m benchmarks.pages -->`` and ``<!-- end of NAME -->``.
``--check`` (part of ``make lint``) writes nothing: it fails when a block or a picture is not what the results say, or when
the results no longer bear out what the pages claim. ``--terminal "COMMAND" --folder FOLDER`` runs a command there and draws
what it prints as ``docs/terminal.svg``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import model_tables, plots, signal_tables, speed_tables, tables, trainer_tables
from benchmarks.tables import Report
from embstore.training.trainers import TRAINERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Block:
    """What lies between the marks ``name`` of a page: ``show`` of these results."""

    page: str
    name: str
    results: str
    show: Callable[..., str]


BLOCKS = (
    Block("README.md", "figures", "embedding faults knn models training", tables.readme),
    Block("docs/performance.md", "methods", "embedding embedding_amx", speed_tables.methods),
    Block("docs/performance.md", "sweep", "embedding", speed_tables.sweep),
    Block("docs/performance.md", "streamed", "embedding", speed_tables.streamed),
    Block("docs/performance.md", "profile", "embedding", speed_tables.profile),
    Block("docs/performance.md", "writer", "embedding", speed_tables.writer),
    Block("docs/performance.md", "scale", "embedding", speed_tables.scale),
    Block("docs/performance.md", "dtype", "embedding", speed_tables.dtype),
    Block("docs/performance.md", "gpu", "gpu", speed_tables.gpu),
    Block("docs/performance.md", "models", "models", model_tables.models),
    Block("docs/performance.md", "acceptance", "acceptance", speed_tables.acceptance),
    Block("docs/density.md", "coordinates", "coordinates", speed_tables.coordinates),
    Block("docs/density.md", "shards", "knn", speed_tables.knn_shards),
    Block("docs/density.md", "store", "knn", speed_tables.knn_store),
    Block("docs/density.md", "engines", "knn", speed_tables.knn_engines),
    Block("docs/density.md", "copies", "knn", speed_tables.knn_copies),
    Block("docs/density.md", "large", "knn", speed_tables.knn_large),
    Block("docs/reliability.md", "faults", "faults", tables.faults),
    Block("docs/reliability.md", "peers", "peer_power_cuts", tables.peers),
    Block("docs/scaling.md", "workers", "scaling", tables.scaling),
    Block("docs/guide.md", "costs", "embedding gpu", tables.costs),
    Block("docs/guide.md", "reuse", "reuse", tables.reuse),
    Block("docs/training.md", "training", "training", tables.training),
    Block("docs/weights.md", "example", "signals", signal_tables.example),
    Block("docs/weights.md", "costs", "signals", signal_tables.costs),
    Block("docs/train/README.md", "trainers", "trainers", trainer_tables.index),
    *(
        Block(f"docs/train/{each.name}.md", f"trainer {each.name}", "trainers", functools.partial(trainer_tables.page, each))
        for each in TRAINERS
    ),
)
PICTURES = {
    "docs/performance.svg": ("embedding", plots.embedding_rates),
    "docs/density.svg": ("knn", plots.search_seconds),
}


@functools.cache
def result(name: str) -> Report:
    """A results file."""
    found: Report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def filled(text: str, block: Block) -> str:
    """The page's text with this block's content between its marks.

    Raises
    ------
    ValueError
        The page lacks the marks.
    """
    begin, end = f"<!-- {block.name}: made by python -m benchmarks.pages -->", f"<!-- end of {block.name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{block.page} lacks the marks of the block {block.name}: {begin} and {end}")
    return f"{before}{begin}\n\n{block.show(*map(result, block.results.split()))}\n\n{end}{after}"


def claims() -> dict[str, bool]:
    """What the pages say of the results in words, and whether the results still say so."""
    faults, scaling, reuse = result("faults"), result("scaling"), result("reuse")
    kinds = tables.faults_by_kind(faults)[tables.ACKNOWLEDGED]
    times = {title: sum(row["cycles"] for row in rows) for title, rows in kinds.items()}
    copied = {dtype: reuse[dtype]["copied_rows"] for dtype in ("auto", "float32")}
    return {
        "prompts.json: stage 0 of a million chats takes at most 1.3 times as long": result("prompts")["median_ratio"] <= 1.3
        and result("prompts")["lines"] == 1_000_000,
        "trainers.json: every test it names exists": all(_exists(row["test"]) for row in result("trainers")["evidence"]),
        "faults.json: the run passed and lost nothing": faults["passed"]
        and not any(row["losses"] for row in faults["faults"]),
        "faults.json: at least 500 kills at random moments": times["process killed at a random moment"] >= 500,
        "faults.json: at least 600 power cuts of real file systems": times["power cut of a real file system"] >= 600,
        "faults.json: every test it names exists": all(_exists(row["test"]) for row in faults["faults"]),
        "scaling.json: one and two workers wrote the same bytes": scaling["same_listed_files"],
        "scaling.json: few bytes go through the driver": scaling["builds"]["2"]["driver_bytes_a_row"] <= 8192,
        "reuse.json: 27,000 rows were copied": all(each["rows"] == 27_000 for each in copied.values()),
        "reuse.json: copied rows are within the promised distance": copied["auto"]["coordinates_l2_largest"] <= 5e-4
        and copied["float32"]["coordinates_l2_largest"] <= 2e-6,
    }


def _exists(test: str) -> bool:
    path, _, name = test.partition("::")
    file = ROOT / path
    return file.exists() and f"def {name.rpartition('::')[2]}(" in file.read_text(encoding="utf-8")


def problems() -> Iterator[str]:
    """What differs from the results, one line each."""
    for block in BLOCKS:
        text = (ROOT / block.page).read_text(encoding="utf-8")
        if filled(text, block) != text:
            yield f"{block.page}: block {block.name} differs from {block.results}"
    for path, (name, values) in PICTURES.items():
        if plots.shown_in((ROOT / path).read_text(encoding="utf-8")) != plots.digest(values(result(name))):
            yield f"{path} differs from {name}"
    yield from (f"no longer true: {claim}" for claim, holds in claims().items() if not holds)


def write() -> None:
    """Bring every block and picture up to date; a picture that shows the results already is not drawn again."""
    for block in BLOCKS:
        path = ROOT / block.page
        path.write_text(filled(path.read_text(encoding="utf-8"), block), encoding="utf-8")
    for name, (results, values) in PICTURES.items():
        path, figures = ROOT / name, values(result(results))
        if not path.exists() or plots.shown_in(path.read_text(encoding="utf-8")) != plots.digest(figures):
            path.write_text(plots.draw(figures), encoding="utf-8")


def draw_terminal(command: str, folder: Path, width: int = 110) -> None:
    """Run a command in a folder and draw its output, in the colours of a terminal."""
    colours = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(width)}
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=os.environ | colours,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    (ROOT / "docs" / "terminal.svg").write_text(plots.terminal(command, done.stdout, width), encoding="utf-8")


def main() -> int:
    """Write, compare, or draw a terminal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--terminal", metavar="COMMAND", help="run it and draw what it prints as docs/terminal.svg")
    parser.add_argument("--folder", type=Path, default=Path(), help="where that command runs")
    options = parser.parse_args()
    if options.terminal:
        draw_terminal(options.terminal, options.folder)
    elif options.check:
        found = list(problems())
        print("".join(f"{problem}\n" for problem in found), end="", file=sys.stderr)
        if found:
            print("run: python -m benchmarks.pages", file=sys.stderr)
        return min(1, len(found))
    else:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
