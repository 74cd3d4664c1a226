"""``embstore resample``: a trainer's file, drawn by density."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.cli.joining import (
    Duplicates,
    Epoch,
    IdColumn,
    KeyColumn,
    Missing,
    Name,
    NoRepeatWithin,
    NumSamples,
    Seed,
    policy_of,
    warnings_as_notes,
)


@app.command()
@reporting
def resample(
    store: Store,
    dataset: Annotated[Path, typer.Option(help="The trainer's file: JSONL, a JSON array, or Parquet; - for stdin.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .json or .parquet, as the dataset is. Must not exist.")],
    name: Name = "default",
    num_samples: NumSamples = None,
    over: Annotated[
        int, typer.Option(help="Spare draws behind these, for a trainer that drops some. They change no draw before them.")
    ] = 0,
    seed: Seed = 0,
    epoch: Epoch = 0,
    method: Annotated[
        Literal["systematic", "without_replacement", "iid"],
        typer.Option(help="systematic: draw each item as often as its quota says, rounded down or up."),
    ] = "systematic",
    no_repeat_within: NoRepeatWithin = 0,
    key_column: KeyColumn = None,
    id_column: IdColumn = None,
    on_missing: Missing = "error",
    duplicates: Duplicates = "repeat",
    reindex: Annotated[
        str | None, typer.Option(help="Column to renumber, 0 for the first draw: for trainers that find items by it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a dataset's items by density and write them to a file.

    For trainers without a sampler hook: the trainer reads the file from front to back.
    """
    from embstore.training.file_resampling import resample_file  # noqa: PLC0415

    with warnings_as_notes():
        report = resample_file(
            store,
            dataset,
            out,
            name=name,
            num_samples=num_samples,
            over=over,
            seed=seed,
            epoch=epoch,
            method=method,
            no_repeat_within=no_repeat_within,
            key_column=key_column,
            id_column=id_column,
            on_missing=policy_of(on_missing),
            duplicates=duplicates,
            reindex=reindex,
        )
    if as_json:
        print_json(report)
    else:
        draws = f"{report.num_samples:,} draws" + f" and {report.num_spare:,} to spare" * bool(report.num_spare)
        Console().print(
            f"{report.out}: {draws} of {report.distinct_items:,} among {report.num_items:,} items "
            f"(effective sample size {report.ess:,.0f})",
            highlight=False,
            soft_wrap=True,
        )
