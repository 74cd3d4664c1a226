"""``embstore export``: a finished store in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from embstore.cli.frame import AsJson, Store, app, print_json, reporting


@app.command()
@reporting
def export(
    store: Store,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    format: Annotated[
        Literal["npy", "kat", "parquet"],
        typer.Option(
            help="npy: float32 rows and ids. kat: the original scripts' files. parquet: ids, texts, weights, neighbours."
        ),
    ] = "npy",
    as_json: AsJson = False,
) -> None:
    """Write a finished store in another format.

    npy and kat have one entry per input line, parquet one per distinct prompt.
    """
    from embstore.views.export import export_store  # noqa: PLC0415

    files = export_store(store, out, format=format)
    if as_json:
        print_json([str(file) for file in files])
    else:
        for file in files:
            Console().print(str(file), highlight=False, soft_wrap=True)
