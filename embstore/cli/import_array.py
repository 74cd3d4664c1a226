"""``embstore import``: a store from embeddings that exist already."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from embstore.cli.frame import AsJson, app, print_json, reporting
from embstore.cli.searching import Center, Knn, Shards
from embstore.cli.storing import ChunkRows, CompressorOption, Resume, Threads, TrustJournal, WindowRows
from embstore.cli.weighting import CopiesOf, Gamma, K, MaxRatio, Method, TargetEss, UniformMix, weighting_config
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, parse_bytes


@app.command("import")
@reporting
def import_array(
    array: Annotated[
        Path, typer.Argument(help="A .npy file or the folder of a Zarr array: [N, D] floats.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the store.", show_default=False)],
    ids: Annotated[
        Path | None,
        typer.Option("--ids", help="Names of the rows: one a line, a JSON list, or JSONL; default their numbers."),
    ] = None,
    resume: Resume = False,
    compressor: CompressorOption = None,
    window_rows: WindowRows = None,
    chunk_rows: ChunkRows = None,
    threads: Threads = None,
    memory_budget: Annotated[str, typer.Option("--memory-budget", help="Anonymous memory.")] = "2GiB",
    knn: Knn = "auto",
    shards: Shards = None,
    center: Center = False,
    weighting: Method = "inverse-density",
    k: K = 10,
    gamma: Gamma = 1.0,
    target_ess: TargetEss = None,
    uniform_mix: UniformMix = 0.0,
    max_ratio: MaxRatio = 10.0,
    duplicates: CopiesOf = "collapse",
    on_error: Annotated[
        Literal["stop", "quarantine"],
        typer.Option("--on-error", help="A row of zeros or with a value that is not finite: stop, or keep its row empty."),
    ] = "stop",
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N rows.")] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Resume on other hardware or threads; recorded, voids byte identity.")
    ] = False,
    trust_journal: TrustJournal = False,
    as_json: AsJson = False,
) -> None:
    """A store from embeddings that exist already: scaled to unit length, then as build. Row i stays row i."""
    config = BuildConfig(
        embedding=EmbeddingConfig(window_rows=window_rows, chunk_rows=chunk_rows, threads=threads, compressor=compressor),
        density=DensityConfig(knn=knn, shards=shards, center=center),
        weighting=weighting_config(weighting, k, gamma, target_ess, uniform_mix, max_ratio, duplicates),
        memory_budget_bytes=parse_bytes(memory_budget),
        on_error=on_error,
        limit=limit,
        allow_drift=allow_drift,
        trust_journal=trust_journal,
    )
    from embstore.flow import array_import  # noqa: PLC0415 - other commands start without them
    from embstore.views import info, terminal  # noqa: PLC0415 - other commands start without them

    with terminal.TerminalObserver(Console(stderr=True, soft_wrap=not sys.stderr.isatty())) as observer:
        report = array_import.import_array(array, ids=ids, out=out, config=config, resume=resume, observer=observer)
    if as_json:
        print_json(report)
    else:
        terminal.print_report(terminal.results(), report, info.inspect(out))
