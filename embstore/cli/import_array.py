"""``embstore import``: a store from existing embeddings."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Out, Resume, app, reporting, run_and_print
from embstore.cli.options import HelpAll, PanelCommand, takes
from embstore.core.config import BuildConfig

# what is left of a build where no model runs and no line is read
_USED = {"window_rows", "chunk_rows", "threads", "compressor", "density", "weighting", "memory_budget_bytes", "on_error"}
_USED |= {"limit", "allow_drift", "trust_journal"}


@app.command("import", cls=PanelCommand)
@reporting
@takes(BuildConfig, only=_USED)
def import_array(
    array: Annotated[
        Path, typer.Argument(help="A .npy file, a folder of them, or the folder of a Zarr array: [N, D] floats.")
    ],
    *,
    config: BuildConfig,
    out: Out,
    ids: Annotated[
        Path | None, typer.Option(help="Names of the rows: one per line, a JSON list, or JSONL. Default: row numbers.")
    ] = None,
    resume: Resume = False,
    as_json: AsJson = False,
    help_all: HelpAll = False,
) -> None:
    """Make a store from existing embeddings.

    Rows are scaled to unit length, then searched and weighted as build does it. Row i stays row i.
    """
    from embstore.flow import array_import  # noqa: PLC0415 - other commands start without it

    work = functools.partial(array_import.import_array, array, ids=ids, out=out, config=config, resume=resume)
    run_and_print(work, out, as_json=as_json)
