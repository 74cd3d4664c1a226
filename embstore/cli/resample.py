"""``embstore resample``: a trainer's file, drawn by density."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.core.decode import printable


@app.command()
@reporting
def resample(
    store: Store,
    dataset: Annotated[Path, typer.Option(help="The trainer's file, JSONL or Parquet; - for stdin.")],
    out: Annotated[Path, typer.Option(help="File to write, .jsonl or .parquet as the dataset is. Must not exist.")],
    name: Annotated[str, typer.Option(help="Name of the weights to use.")] = "default",
    num_samples: Annotated[int | None, typer.Option(help="Number of draws. Default: one per item.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    epoch: Annotated[int, typer.Option(help="Epoch to draw; each epoch has its own draws.")] = 0,
    method: Annotated[
        Literal["systematic", "without_replacement", "iid"],
        typer.Option(help="systematic: draw each item as often as its quota says, rounded down or up."),
    ] = "systematic",
    key_column: Annotated[
        str | None, typer.Option(help="Column with prompts. Default: those that the build read, or prompt or messages.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column with ids to join by, instead of by content.")] = None,
    on_missing: Annotated[
        str, typer.Option(help="Items not in the store: error, drop, mean, or a multiple of the mean.")
    ] = "error",
    duplicates: Annotated[
        Literal["repeat", "divide"],
        typer.Option(help="Items of one row: give each its weight (repeat), or a share of it (divide)."),
    ] = "repeat",
    as_json: AsJson = False,
) -> None:
    """Draw a dataset's items by density and write them to a file.

    For trainers without a sampler hook: the trainer reads the file from front to back.
    """
    from embstore.training.file_resampling import resample_file  # noqa: PLC0415

    policy: str | float = on_missing
    with contextlib.suppress(ValueError):
        policy = float(on_missing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        report = resample_file(
            store,
            dataset,
            out,
            name=name,
            num_samples=num_samples,
            seed=seed,
            epoch=epoch,
            method=method,
            key_column=key_column,
            id_column=id_column,
            on_missing=policy,  # type: ignore[arg-type]  # checked there
            duplicates=duplicates,
        )
    for notice in said:
        Console(stderr=True).print(f"note: {escape(printable(str(notice.message)))}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(report)
    else:
        Console().print(
            f"{report.out}: {report.num_samples:,} draws of {report.distinct_items:,} among {report.num_items:,} items "
            f"(effective sample size {report.ess:,.0f})",
            highlight=False,
            soft_wrap=True,
        )
